"""Asks a running server and looks at what it counts: does it answer, stream, speculate and reuse prefixes?"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import httpx
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, ConfigDict

from quantkit.errors import QuantkitError
from quantkit.serve.check import Check

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


class SmokeResult(BaseModel):
    """What a server did when asked. Counts are of this probe alone: the counters after it less those before.

    `acceptance_rate` is accepted / proposed draft tokens, `accepted_length` is 1 + accepted / drafts, the tokens that
    one verification by the target yields; `tokens_per_step` is all generated tokens by all engine steps, prefills
    among them. They are None where nothing was drafted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    checks: list[Check]
    answers: list[str]
    completion_tokens: int
    streamed_chunks: int
    first_chunk_s: float
    num_drafts: int
    proposed_tokens: int
    accepted_tokens: int
    acceptance_rate: float | None
    accepted_length: float | None
    tokens_per_step: float | None
    prefix_hit_tokens: int

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(one.passed for one in self.checks)


class _Streamed(NamedTuple):
    text: str
    num_chunks: int
    first_chunk_s: float
    usage: Mapping[str, int] | None
    finished: bool


def probe(base_url: str, model: str, *, prompts: Sequence[str] | None = None, speculation: bool = True) -> SmokeResult:
    """Ask a server some questions and report what came back and what it counted.

    Nobody else may use the server meanwhile, as its counters are read before and after.

    Args:
        model: the served model's name.
        prompts: user messages; each is asked once whole and once streamed.
        speculation: whether the server has a draft, so that drafted tokens are expected.

    Raises:
        QuantkitError: it cannot be reached, or refuses the first question.
    """
    asked = list(prompts or PROMPTS)
    key = os.environ.get("VLLM_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # trust_env=False: a proxy in the environment would be asked for 127.0.0.1.
    with httpx.Client(base_url=base_url, headers=headers, timeout=_TIMEOUT_S, trust_env=False) as client:
        try:
            before = _counters(client)
            whole = [_ask(client, model, prompt) for prompt in asked]
            streamed = [_stream(client, model, prompt) for prompt in asked]
            after = _counters(client)
            hit_tokens, long_tokens = _prefix_hit(client, model)
        except httpx.HTTPStatusError as error:
            raise QuantkitError(f"{base_url} answered {error.response.status_code}: {_body(error.response)}") from error
        except httpx.TransportError as error:
            raise QuantkitError(f"{base_url} cannot be reached ({error}): start it with quantkit serve up") from error
    texts = [answer["choices"][0]["message"]["content"] or "" for answer in whole]
    grown = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in after}
    drafts, proposed, accepted = (int(grown.get(f"vllm:spec_decode_num_{what}_total", 0)) for what in _DRAFT_COUNTERS)
    steps = grown.get("vllm:iteration_tokens_total_count", 0)
    tokens = sum(answer["usage"]["completion_tokens"] for answer in whole)
    return SmokeResult(
        checks=[
            _check_answers(texts),
            _check_stream(texts, streamed),
            _check_usage(whole, streamed),
            _check_speculation(drafts, proposed, accepted, expected=speculation),
            _check_prefix(hit_tokens, long_tokens),
        ],
        answers=texts,
        completion_tokens=tokens,
        streamed_chunks=sum(one.num_chunks for one in streamed),
        first_chunk_s=round(min(one.first_chunk_s for one in streamed), 4),
        num_drafts=drafts,
        proposed_tokens=proposed,
        accepted_tokens=accepted,
        acceptance_rate=accepted / proposed if proposed else None,
        accepted_length=1 + accepted / drafts if drafts else None,
        tokens_per_step=grown.get("vllm:generation_tokens_total", 0) / steps if steps and drafts else None,
        prefix_hit_tokens=hit_tokens,
    )


_DRAFT_COUNTERS = ("drafts", "draft_tokens", "accepted_tokens")


def read_counters(text: str) -> dict[str, float]:
    """Prometheus text -> sample name (with `_total`) -> value, summed over labels such as the engine's number."""
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


def _counters(client: httpx.Client) -> dict[str, float]:
    return read_counters(client.get("/metrics").raise_for_status().text)


def _request(model: str, prompt: str, max_tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": _TEMPERATURE,
        "max_tokens": max_tokens,
    }


def _ask(client: httpx.Client, model: str, prompt: str, max_tokens: int = _MAX_TOKENS) -> dict[str, Any]:
    answer = client.post("/v1/chat/completions", json=_request(model, prompt, max_tokens)).raise_for_status()
    return dict(answer.json())


def _stream(client: httpx.Client, model: str, prompt: str) -> _Streamed:
    """One streamed completion, read as server-sent events.

    A chunk holds as many tokens as the draft got accepted: chunks are not tokens, usage says how many there were.
    """
    body = _request(model, prompt, _MAX_TOKENS) | {"stream": True, "stream_options": {"include_usage": True}}
    parts: list[str] = []
    usage, finished, first_s, begin_s = None, False, 0.0, time.monotonic()
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.is_error:
            response.read()
        response.raise_for_status()
        for line in response.iter_lines():
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


def _prefix_hit(client: httpx.Client, model: str) -> tuple[int, int]:
    """Tokens of a long prompt found in the prefix cache when it is asked a second time, and its length."""
    length = int(_ask(client, model, _LONG_PROMPT, 1)["usage"]["prompt_tokens"])
    before = _counters(client)
    _ask(client, model, _LONG_PROMPT, 1)
    name = "vllm:prefix_cache_hits_total"
    return int(_counters(client).get(name, 0) - before.get(name, 0)), length


def _check_answers(texts: Sequence[str]) -> Check:
    empty = sum(not text for text in texts)
    detail = f"{len(texts) - empty} of {len(texts)} prompts answered"
    return Check(name="chat completion", passed=empty == 0, detail=detail)


def _check_stream(texts: Sequence[str], streamed: Sequence[_Streamed]) -> Check:
    problems = [f"stream {n} ended without [DONE]" for n, one in enumerate(streamed, 1) if not one.finished]
    problems += [
        f"stream {n} differs from the whole answer: {one.text[:40]!r} against {text[:40]!r}"
        for n, (text, one) in enumerate(zip(texts, streamed, strict=True), 1)
        if text != one.text
    ]
    detail = "; ".join(problems) or f"{len(streamed)} streams equal to the whole answers"
    return Check(name="streamed completion", passed=not problems, detail=detail)


def _check_usage(whole: Sequence[Mapping[str, Any]], streamed: Sequence[_Streamed]) -> Check:
    counts = [int(answer["usage"]["completion_tokens"]) for answer in whole]
    reported = [int(one.usage["completion_tokens"]) if one.usage else None for one in streamed]
    chunks = sum(one.num_chunks for one in streamed)
    detail = f"{sum(counts)} tokens whole, {sum(n or 0 for n in reported)} streamed in {chunks} chunks"
    return Check(name="stream reports its usage", passed=counts == reported, detail=detail)


def _check_speculation(drafts: int, proposed: int, accepted: int, *, expected: bool) -> Check:
    if not expected:
        detail = f"{drafts} drafts counted" if drafts else "no draft, none counted"
        return Check(name="no speculation", passed=drafts == 0, detail=detail)
    rate = f", acceptance rate {accepted / proposed:.1%}, accepted length {1 + accepted / drafts:.2f}" if drafts else ""
    detail = f"{drafts} drafts, {proposed} tokens proposed, {accepted} accepted{rate}"
    return Check(name="speculation", passed=drafts > 0 and accepted > 0, detail=detail)


def _check_prefix(hit_tokens: int, prompt_tokens: int) -> Check:
    detail = f"{hit_tokens} of {prompt_tokens} prompt tokens found again"
    return Check(name="prefix cache", passed=hit_tokens > 0, detail=detail)


def _body(response: httpx.Response) -> str:
    return response.text.strip().replace("\n", " ")[:300]
