"""Puts twice the load on a bundle's vLLM that it takes, for long, and counts what comes of every request.

    python -m tests.faults.soak BUNDLE --minutes 30 --out FOLDER

What it takes is measured first: as many requests at once as it runs at once, each followed by the next. Then requests
come at twice that rate whether or not others are answered (a Poisson process), of which some go away in the middle of
their answer. A request ends well with an answer that is whole, with 503 at once (as the first event of the stream where
vLLM had sent the headers), or by its own going away.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import secrets
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from quantkit.serve import bundle as bundles
from quantkit.serve import launch, smoke

WELL = ("whole", "refused", "refused in its stream", "away")
REFUSAL = "raise QueueOverflowError"  # in the traceback that vLLM writes of one behind the headers
KEY_VARIABLE = "VLLM_API_KEY"
AWAY = 0.1  # of the requests go away while they are answered
TOKENS = (16, 96)  # of an answer, from and to; of a prompt three times as many words
PATIENCE_S = 600.0  # for one request: past that it hangs
_WORDS = ("the", "harbour", "of", "town", "where", "ships", "lie", "in", "winter", "and", "letters", "come")


@dataclass
class Outcome:
    """What came of one request, and after how long."""

    kind: str  # one of WELL; anything else is a fault
    seconds: float


@dataclass
class Soak:
    """A load on one server, and what was seen meanwhile."""

    base_url: str
    model: str
    key: str
    rng: random.Random
    outcomes: list[Outcome] = field(default_factory=list)
    begin_s: float = 0.0

    async def ask(self, client: httpx.AsyncClient, *, leaves: bool = False) -> Outcome:
        """One chat, streamed; with `leaves` the connection is closed after a few of its tokens."""
        asked = self.rng.randint(*TOKENS)
        prompt = " ".join(self.rng.choices(_WORDS, k=3 * self.rng.randint(*TOKENS)))
        body = {
            "model": self.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": asked,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.7,
        }  # fmt: skip
        goes = self.rng.randint(1, 8)
        begin_s, kind, tokens = time.monotonic(), "cut", 0
        try:
            async with asyncio.timeout(PATIENCE_S):
                async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    if response.status_code == 503:
                        kind = "refused"
                    elif response.status_code != 200:
                        kind = f"status {response.status_code}"
                    else:
                        seen = 0
                        async for line in response.aiter_lines():
                            seen += line.startswith("data: ")
                            if leaves and seen > goes:
                                kind = "away"
                                break
                            told = json.loads(line[6:]) if line.startswith("data: {") else {}
                            if "error" in told:  # vLLM counts again when it takes a request in, behind the headers
                                code = told["error"]["code"]
                                kind = "refused in its stream" if code == 503 else f"error {code} in its stream"
                                break
                            if told.get("usage"):
                                tokens = told["usage"]["completion_tokens"]
                            if line == "data: [DONE]":
                                kind = "whole" if tokens == asked else f"{tokens} tokens of {asked}"
        except TimeoutError:
            kind = "hung"
        except httpx.HTTPError as error:
            kind = type(error).__name__
        outcome = Outcome(kind, time.monotonic() - begin_s)
        self.outcomes.append(outcome)
        return outcome

    async def capacity(self, client: httpx.AsyncClient, at_once: int, seconds: float) -> float:
        """Requests a second that are answered where so many are always under way."""
        end_s = time.monotonic() + seconds
        done = 0

        async def one_after_another() -> None:
            nonlocal done
            while time.monotonic() < end_s:
                outcome = await self.ask(client)
                if outcome.kind != "whole":
                    raise AssertionError(f"before there was any load: {outcome.kind}")
                done += 1

        begin_s = time.monotonic()
        await asyncio.gather(*(one_after_another() for _ in range(at_once)))
        self.outcomes.clear()
        return done / (time.monotonic() - begin_s)

    async def storm(self, client: httpx.AsyncClient, rate: float, seconds: float) -> None:
        """Requests at a rate, a second, that heeds no answer; then all of them are waited for."""
        self.begin_s = time.monotonic()
        under_way: set[asyncio.Task[Outcome]] = set()
        at_s = 0.0
        while at_s < seconds:
            at_s += self.rng.expovariate(rate)
            await asyncio.sleep(max(self.begin_s + at_s - time.monotonic(), 0))
            task = asyncio.create_task(self.ask(client, leaves=self.rng.random() < AWAY))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        while under_way:
            await asyncio.wait(under_way)


def memory(leader: int) -> int:
    """Bytes that the processes of a session hold, what they share counted once."""
    held = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ProcessLookupError):
            if os.getsid(int(folder.name)) == leader:
                held += sum(
                    int(line.split()[1]) << 10
                    for line in (folder / "smaps_rollup").read_text().splitlines()
                    if line.startswith("Pss:")
                )
    return held


async def _watch(server: launch.Server, every_s: float, seen: list[dict[str, float]], soak: Soak) -> None:
    """Memory, and what the server says of itself, from time to time."""
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        while True:
            counted = smoke.read_counters((await client.get(f"{server.base_url}/metrics")).text)
            seen.append({
                "at_s": time.monotonic() - soak.begin_s, "memory_bytes": float(memory(server.pid)),
                "running": counted["vllm:num_requests_running"], "waiting": counted["vllm:num_requests_waiting"],
                "kv_cache": counted["vllm:kv_cache_usage_perc"],
            })  # fmt: skip
            await asyncio.sleep(every_s)


async def _soak(server: launch.Server, soak: Soak, at_once: int, measured_s: float, seconds: float) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
    headers = {"Authorization": f"Bearer {soak.key}"}
    samples: list[dict[str, float]] = []
    async with httpx.AsyncClient(
        base_url=server.base_url, headers=headers, trust_env=False, timeout=None, limits=limits
    ) as client:
        knee = await soak.capacity(client, at_once, measured_s)
        watching = asyncio.create_task(_watch(server, max(seconds / 60, 1.0), samples, soak))
        await soak.storm(client, 2 * knee, seconds)
        idle: dict[str, float] = {}
        for _ in range(60):  # what went away last is taken out at the engine's next step
            counted = smoke.read_counters((await client.get("/metrics")).text)
            names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            idle = {name: counted[f"vllm:{name}"] for name in names}
            if not any(idle.values()):
                break
            await asyncio.sleep(0.5)
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        after = await soak.ask(client)
    return {"knee_per_s": knee, "samples": samples, "idle": idle, "after": after.kind}


def slope(samples: list[dict[str, float]]) -> float:
    """By how much memory grew from the first third of the samples to the last, as a share of it, by medians."""
    held = [sample["memory_bytes"] for sample in samples]
    third = max(len(held) // 3, 1)
    first = statistics.median(held[:third])
    return (statistics.median(held[-third:]) - first) / first


def soak_bundle(bundle: Path, log: Path, *, seconds: float, measured_s: float, seed: int = 0) -> dict[str, Any]:
    """Start a bundle's server and put the load on it; what was seen, by name."""
    settings = bundles.read_bundle(bundle)["settings"]
    key = secrets.token_hex(16)
    before = os.environ.get(KEY_VARIABLE)
    os.environ[KEY_VARIABLE] = key
    try:
        with launch.serving(bundle, profile="cpu", log=log) as server:
            soak = Soak(server.base_url, settings["served_model_name"], key, random.Random(seed))
            found = asyncio.run(_soak(server, soak, settings["max_num_seqs"], measured_s, seconds))
            found["alive"] = httpx.get(f"{server.base_url}/health", trust_env=False, timeout=60).status_code == 200
            said = log.read_text(errors="replace")  # before it is ended, of which vLLM writes one more
            # one is written for each refusal behind the headers, and names what it was
            found["tracebacks"] = said.count("Traceback (most recent") - said.count(REFUSAL)
    finally:
        os.environ.pop(KEY_VARIABLE)
        if before is not None:
            os.environ[KEY_VARIABLE] = before
    # the one behind the load is asked for by itself, and in `after`
    outcomes = soak.outcomes[:-1]
    kinds = Counter(outcome.kind for outcome in outcomes)
    seconds_of = {kind: sorted(outcome.seconds for outcome in outcomes if outcome.kind == kind) for kind in WELL}
    return found | {
        "queue_limit": settings["max_num_queued_reqs"], "at_once": settings["max_num_seqs"], "kinds": dict(kinds),
        "seconds": {
            kind: {"median": each[len(each) // 2], "p99": each[int(0.99 * (len(each) - 1))], "most": each[-1]}
            for kind, each in seconds_of.items()
            if each
        },
        "growth": slope(found["samples"]), "key_in_log": key in log.read_text(errors="replace"),
    }  # fmt: skip


def faults(found: dict[str, Any], *, refused_within_s: float, growth: float) -> list[str]:
    """What must not have been; a line each."""
    said = [f"{count} requests ended with: {kind}" for kind, count in found["kinds"].items() if kind not in WELL]
    for kinds in (("whole",), ("away",), ("refused", "refused in its stream")):
        if not any(found["kinds"].get(kind) for kind in kinds):
            said.append(f"no request was {kinds[0]}: the load was not what it should be")
    for kind in ("refused", "refused in its stream"):
        if (took_s := found["seconds"].get(kind, {"p99": 0.0})["p99"]) > refused_within_s:
            said.append(f"{kind}: {took_s:.1f} s (99 %)")
    if any(found["idle"].values()):
        said.append(f"after the load: {found['idle']}")
    if found["growth"] > growth:
        said.append(f"memory grew by {found['growth']:.1%}")
    said += [f"{found['tracebacks']} tracebacks in the log"] * bool(found["tracebacks"])
    said += ["the key is in the log"] * found["key_in_log"]
    said += ["it does not answer any more"] * (not found["alive"] or found["after"] != "whole")
    return said


def main() -> int:
    """Soak a bundle, print what came of it; 1 where there is a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found = soak_bundle(
        options.bundle, options.out / "vllm.log", seconds=60 * options.minutes, measured_s=60.0, seed=options.seed
    )  # fmt: skip
    said = faults(found, refused_within_s=1.0, growth=0.02)
    (options.out / "soak.json").write_text(json.dumps(found | {"faults": said}, indent=1))
    print(json.dumps({key: value for key, value in found.items() if key != "samples"}, indent=1))
    for line in said:
        print(f"FAULT {line}")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
