#!/usr/bin/env python3
"""Asks a running server what its bundle promises, and looks at what it counts meanwhile.

    python3 smoke/smoke.py http://127.0.0.1:8000 --metrics http://127.0.0.1:8000
    VLLM_API_KEY=... python3 smoke/smoke.py http://127.0.0.1:8080 --proxied

A copy of this file is in every bundle, where it runs with nothing but Python 3.11 and reads bundle.json beside its
folder; `quantkit serve up --probe` and the pipeline call `probe`. Nobody else may use the server meanwhile: its
counters are read before and after.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

PROMPTS = (
    "Say in one sentence what a library is for.",
    "Count from one to ten.",
    "Name three colours and a thing that has each of them.",
)

# Longer than any block of the KV cache that a bundle sets up: only whole blocks are found again.
_LONG_PROMPT = (
    "The harbour of the town lies open to the west, and when the wind blows from there no ship can leave it. The "
    "people have known this for as long as the town has stood, and they plan their year around it: in spring they mend "
    "the nets and the boats, in summer they fish, in autumn they salt and smoke what they have caught, and in winter "
    "they sit by the fire and tell each other how large the fish were. A stranger who came in November asked why they "
    "did not build a wall against the wind. They looked at him for a while, and then the oldest of them said that the "
    "wind had been there first. Retell this in one sentence."
)

# Greedy, always. What is compared must be the same question twice, and on CPUs vLLM 0.32 answers noise at any other
# temperature once a draft is there.
_TEMPERATURE = 0
_MAX_TOKENS = 48
_TIMEOUT_S = 300
# What vLLM answers without a key, or should not answer to the world: closed by whatever stands before it.
CLOSED = ("/invocations", "/tokenize", "/metrics", "/load", "/version", "/docs", "/openapi.json")
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{.*\})? ([^ ]+)")


class Answer(NamedTuple):
    """One question, whether the answer is good, and what was seen."""

    name: str
    passed: bool
    detail: str


class NotAnswered(Exception):
    """The server cannot be reached, or refuses what it must take."""


@dataclass
class SmokeResult:
    """What a server did when asked. Counts are of this probe alone: the counters after it less those before.

    `acceptance_rate` is accepted / proposed draft tokens, `accepted_length` is 1 + accepted / drafts, the tokens that
    one verification by the target yields; `tokens_per_step` is all generated tokens by all engine steps, prefills
    among them. They are None where nothing was drafted, or no counters were read.
    """

    checks: list[Answer] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    completion_tokens: int = 0
    streamed_chunks: int = 0
    first_chunk_s: float = 0.0
    num_drafts: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0
    acceptance_rate: float | None = None
    accepted_length: float | None = None
    tokens_per_step: float | None = None
    prefix_hit_tokens: int = 0


class _Streamed(NamedTuple):
    text: str
    num_chunks: int
    first_chunk_s: float
    usage: Mapping[str, int] | None
    finished: bool


def main() -> int:
    """Ask, print what was seen, a line each; 1 where something is not as promised."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("url", help="where clients ask: http://127.0.0.1:8080")
    parser.add_argument(
        "--metrics", action="append", default=[], metavar="URL", help="a vLLM whose counters may be read; repeat it"
    )
    parser.add_argument("--proxied", action="store_true", help="the URL is an allow-list's: other paths must be 404")
    parser.add_argument(
        "--no-sums", action="store_true", help="leave out the digests, which take a while on large files"
    )
    options = parser.parse_args()
    bundle = Path(__file__).resolve().parents[1]
    record = json.loads((bundle / "bundle.json").read_bytes())
    checks = [] if options.no_sums else [sums(bundle)]
    try:
        checks += probe(
            options.url, str(record["settings"]["served_model_name"]), metrics=options.metrics,
            speculation=record["pin"]["draft"] is not None, proxied=options.proxied,
        ).checks  # fmt: skip
    except NotAnswered as error:
        checks.append(Answer("the server answers", False, str(error)))
    for name, passed, detail in checks:
        print(f"{'ok    ' if passed else 'FAILED'} {name}: {detail}")
    return 0 if all(one.passed for one in checks) else 1


def completes(base_url: str, model: str) -> None:
    """Have the server write one token: /health and /v1/models are answered long before it can.

    Raises:
        NotAnswered: it cannot.
    """
    _Client(base_url, os.environ.get("VLLM_API_KEY")).json(
        "/v1/completions", {"model": model, "prompt": "One", "max_tokens": 1, "temperature": _TEMPERATURE}
    )


def sums(bundle: Path) -> Answer:
    """Whether every file that SHA256SUMS lists is as it was."""
    changed, count = [], 0
    for line in (bundle / "SHA256SUMS").read_text().splitlines():
        wanted, _, name = line.partition("  ")
        count += 1
        try:
            with (bundle / name).open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError:
            found = None
        changed += [] if found == wanted else [name]
    return Answer(
        "SHA256SUMS", not changed, f"changed: {', '.join(changed)}" if changed else f"{count} files unchanged"
    )


def probe(
    base_url: str, model: str, *, prompts: Sequence[str] = PROMPTS, speculation: bool = True,
    metrics: Sequence[str] | None = None, proxied: bool = False,
) -> SmokeResult:  # fmt: skip
    """Ask a server some questions and report what came back and what it counted.

    Args:
        model: the served model's name.
        prompts: user messages; each is asked once whole and once streamed.
        speculation: whether the server has a draft, so that drafted tokens are expected.
        metrics: of the servers behind it, whose counters are added up; None: its own.
        proxied: whether a proxy stands before it that lets through what clients need, and nothing else.

    Raises:
        NotAnswered: it cannot be reached, or refuses a question.
    """
    client = _Client(base_url, os.environ.get("VLLM_API_KEY"))
    counted = [base_url] if metrics is None else list(metrics)
    before = _counters(counted)
    served = [str(one["id"]) for one in client.json("/v1/models")["data"]]
    whole = [client.json("/v1/chat/completions", _request(model, prompt, _MAX_TOKENS)) for prompt in prompts]
    streamed = [_stream(client, model, prompt) for prompt in prompts]
    grown = _grown(before, _counters(counted))
    texts = [str(answer["choices"][0]["message"]["content"] or "") for answer in whole]
    drafts, proposed, accepted = (int(grown.get(f"vllm:spec_decode_num_{what}_total", 0)) for what in _DRAFT_COUNTERS)
    steps = grown.get("vllm:iteration_tokens_total_count", 0)
    result = SmokeResult(
        checks=[
            Answer("model", model in served, f"serves {', '.join(served)}"), _check_answers(texts),
            _check_stream(texts, streamed), _check_usage(whole, streamed),
        ],
        answers=texts, completion_tokens=sum(answer["usage"]["completion_tokens"] for answer in whole),
        streamed_chunks=sum(one.num_chunks for one in streamed),
        first_chunk_s=round(min(one.first_chunk_s for one in streamed), 4), num_drafts=drafts,
        proposed_tokens=proposed, accepted_tokens=accepted, acceptance_rate=accepted / proposed if proposed else None,
        accepted_length=1 + accepted / drafts if drafts else None,
        tokens_per_step=grown.get("vllm:generation_tokens_total", 0) / steps if steps and drafts else None,
    )  # fmt: skip
    if counted:
        result.checks.append(_check_speculation(drafts, proposed, accepted, expected=speculation))
        result.prefix_hit_tokens, long_tokens = _prefix_hit(client, counted, model)
        result.checks.append(_check_prefix(result.prefix_hit_tokens, long_tokens))
    else:
        result.checks.append(Answer("speculation, prefix cache", True, "not counted: no --metrics was given"))
    result.checks += _locks(client, proxied=proxied)
    return result


_DRAFT_COUNTERS = ("drafts", "draft_tokens", "accepted_tokens")


class _Client:
    """Asks one server, with the key; a proxy in the environment would be asked for 127.0.0.1, and is not."""

    def __init__(self, base_url: str, key: str | None) -> None:
        self.base_url, self.key = base_url.rstrip("/"), key
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    @contextmanager
    def asked(self, path: str, body: Mapping[str, Any] | None = None) -> Iterator[Any]:
        try:
            with self._opener.open(self._request(path, body, self.key), timeout=_TIMEOUT_S) as response:
                yield response
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(2000).decode(errors="replace").split())[:300]
            raise NotAnswered(f"{self.base_url}{path} answered {error.code}: {said}") from error
        except OSError as error:  # URLError and what a broken connection raises are of its kind
            raise NotAnswered(f"{self.base_url} cannot be reached ({error}): is it started?") from error

    def json(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        with self.asked(path, body) as response:
            return json.load(response)

    def status(self, path: str, key: str | None, body: Mapping[str, Any] | None = None) -> int:
        """The status code alone, with another key or none."""
        try:
            with self._opener.open(self._request(path, body, key), timeout=_TIMEOUT_S) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError as error:
            raise NotAnswered(f"{self.base_url} cannot be reached ({error}): is it started?") from error

    def _request(self, path: str, body: Mapping[str, Any] | None, key: str | None) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.Request(self.base_url + path, data=data, headers=headers)


def read_counters(text: str) -> dict[str, float]:
    """Prometheus text -> sample name (with `_total`) -> value, summed over labels such as the engine's number."""
    totals: dict[str, float] = {}
    for match in filter(None, map(_SAMPLE.match, text.splitlines())):
        totals[match[1]] = totals.get(match[1], 0.0) + float(match[2])
    return totals


def _counters(urls: Iterable[str]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for url in urls:
        with _Client(url, None).asked("/metrics") as response:
            for name, value in read_counters(response.read().decode()).items():
                totals[name] = totals.get(name, 0.0) + value
    return totals


def _grown(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def _request(model: str, prompt: str, max_tokens: int) -> dict[str, Any]:
    return {
        "model": model, "messages": [{"role": "user", "content": prompt}], "temperature": _TEMPERATURE,
        "max_tokens": max_tokens,
    }  # fmt: skip


def _stream(client: _Client, model: str, prompt: str) -> _Streamed:
    """One streamed completion, read as server-sent events.

    A chunk holds as many tokens as the draft got accepted: chunks are not tokens, usage says how many there were.
    """
    body = _request(model, prompt, _MAX_TOKENS) | {"stream": True, "stream_options": {"include_usage": True}}
    parts: list[str] = []
    usage, finished, first_s, begin_s = None, False, 0.0, time.monotonic()
    with client.asked("/v1/chat/completions", body) as response:
        for raw in response:
            line = raw.decode().strip()
            if not line.startswith("data: "):
                continue
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                finished = True
                break
            event = json.loads(data)
            usage = event.get("usage") or usage
            text = event["choices"][0]["delta"].get("content") if event["choices"] else None
            if text:
                first_s = first_s or time.monotonic() - begin_s
                parts.append(text)
    return _Streamed("".join(parts), len(parts), first_s, usage, finished)


def _prefix_hit(client: _Client, counted: Sequence[str], model: str) -> tuple[int, int]:
    """Tokens of a long prompt found in the prefix cache when it is asked a second time, and its length."""
    body = _request(model, _LONG_PROMPT, 1)
    length = int(client.json("/v1/chat/completions", body)["usage"]["prompt_tokens"])
    before = _counters(counted)
    client.json("/v1/chat/completions", body)
    return int(_grown(before, _counters(counted)).get("vllm:prefix_cache_hits_total", 0)), length


def _locks(client: _Client, *, proxied: bool) -> list[Answer]:
    """Whether the key is asked for, and whether what is closed is closed."""
    if client.key is None:
        checks = [Answer("key", True, "none is set here (VLLM_API_KEY), so none was asked for")]
    else:
        found = [client.status("/v1/models", key) for key in (None, client.key + "x")]
        said = f"without one {found[0]}, with a wrong one {found[1]}"
        checks = [Answer("key", found == [401, 401], said)]
    if proxied:
        found = [client.status(path, client.key, {} if path in CLOSED[:2] else None) for path in CLOSED]
        open_ = [f"{path} answers {code}" for path, code in zip(CLOSED, found, strict=True) if code != 404]
        said = "; ".join(open_) or f"{', '.join(CLOSED)} are 404"
        checks.append(Answer("closed paths", not open_, said))
    return checks


def _check_answers(texts: Sequence[str]) -> Answer:
    empty = sum(not text for text in texts)
    return Answer("chat completion", empty == 0, f"{len(texts) - empty} of {len(texts)} prompts answered")


def _check_stream(texts: Sequence[str], streamed: Sequence[_Streamed]) -> Answer:
    problems = [f"stream {n} ended without [DONE]" for n, one in enumerate(streamed, 1) if not one.finished]
    problems += [
        f"stream {n} differs from the whole answer: {one.text[:40]!r} against {text[:40]!r}"
        for n, (text, one) in enumerate(zip(texts, streamed, strict=True), 1)
        if text != one.text
    ]
    said = "; ".join(problems) or f"{len(streamed)} streams equal to the whole answers"
    return Answer("streamed completion", not problems, said)


def _check_usage(whole: Sequence[Mapping[str, Any]], streamed: Sequence[_Streamed]) -> Answer:
    counts = [int(answer["usage"]["completion_tokens"]) for answer in whole]
    reported = [int(one.usage["completion_tokens"]) if one.usage else None for one in streamed]
    chunks = sum(one.num_chunks for one in streamed)
    said = f"{sum(counts)} tokens whole, {sum(n or 0 for n in reported)} streamed in {chunks} chunks"
    return Answer("stream reports its usage", counts == reported, said)


def _check_speculation(drafts: int, proposed: int, accepted: int, *, expected: bool) -> Answer:
    if not expected:
        said = f"{drafts} drafts counted" if drafts else "no draft, none counted"
        return Answer("no speculation", drafts == 0, said)
    rate = f", acceptance rate {accepted / proposed:.1%}, accepted length {1 + accepted / drafts:.2f}" if drafts else ""
    said = f"{drafts} drafts, {proposed} tokens proposed, {accepted} accepted{rate}"
    return Answer("speculation", drafts > 0 and accepted > 0, said)


def _check_prefix(hit_tokens: int, prompt_tokens: int) -> Answer:
    said = f"{hit_tokens} of {prompt_tokens} prompt tokens found again"
    return Answer("prefix cache", hit_tokens > 0, said)


if __name__ == "__main__":
    sys.exit(main())
