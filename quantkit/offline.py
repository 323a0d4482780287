"""Batches through the real vLLM, in a child process: answers, acceptance, log-probabilities, seconds of a step.

A child, because vLLM takes threads and environment at import and keeps memory for good. It runs one engine in one
process (started in seconds on a CPU) and writes each finished request as a JSON line, so that a killed job resumes
request by request.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from quantkit import artifacts, processes, vllm_environment
from quantkit.errors import QuantkitError

RESULTS_NAME = "results.jsonl"
TIMING_NAME, SECONDS_NAME = "timing.json", "seconds.json"

Dtype = Literal["auto", "float16", "bfloat16", "float32"]


class Request(BaseModel):
    """One prompt, as token ids, and what is asked of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    prompt: list[int]
    temperature: float = 0.0
    max_tokens: int = 1
    seed: int | None = None
    stop_token_ids: list[int] = []
    prompt_logprobs: bool = False


class Result(BaseModel):
    """What vLLM gave for one request."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    tokens: list[int]
    finished: Literal["stop", "length"]
    prompt_logprobs: list[float] | None = None  # nats, of tokens 1.. of the prompt


class Engine(BaseModel):
    """How vLLM is started."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    model: str
    max_model_len: int
    max_num_seqs: int = 128
    dtype: Dtype = "auto"
    draft: str | None = None
    speculative_method: Literal["draft_model", "eagle3"] = "draft_model"
    speculative_tokens: int = 4
    kv_cache_dtype: str = "auto"
    kv_cache_bytes: int = 1 << 30
    seed: int = 0


class Job(Engine):
    """An engine and the requests that go through it, all at once."""

    requests: list[Request]


class Timing(Engine):
    """An engine whose decode steps are timed: batch after batch, each over the first so many of the prompts.

    What is generated, greedily and past any EOS, is thrown away: a batch ends after `steps` steps.
    """

    prompts: list[list[int]]
    batches: list[int]  # sequences of each
    steps: int


class Seconds(BaseModel):
    """Of each batch of a Timing, the seconds of each step in which every sequence of it was decoded; and where.

    On a CPU they are those that the engine's main thread computed: other work on the machine does not count.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    machine: str
    steps: list[list[float]]


class Speculation(BaseModel):
    """vLLM's own counters of a job with a draft (its `spec_decode` metrics)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    drafts: int
    proposed: int
    accepted: int
    accepted_per_position: list[int]


class Session:
    """A child process with vLLM imported, which takes jobs one after the other; started with the first job.

    Importing vLLM takes longer than starting an engine in it, so jobs that follow each other share a child. Close it
    (or leave the `with` block) to give its memory back.
    """

    def __init__(self, *, cluster: str | None = None) -> None:
        """With the address of a Ray cluster (`auto`: RAY_ADDRESS, or the one here), its machines answer instead.

        What is counted of a draft, timed or scored is of this machine in any case.
        """
        self._cluster = cluster
        self._children: dict[str | None, processes.Worker] = {}  # by where they work; None: here

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, job: Job, folder: Path, *, on_result: Callable[[int, int], None] = lambda done, total: None
    ) -> tuple[list[Result], Speculation | None]:
        """Put a job through vLLM; results in the order of its requests, and vLLM's counters when it has a draft.

        `folder` keeps job.json, results.jsonl and, for the first job, worker.log. Results of an earlier, interrupted
        try of the same job are kept and only the missing requests are run (a job with a draft runs whole: its
        counters must be of one run). `on_result(done, total)` is called as results arrive.

        Raises:
            QuantkitError: vLLM is not installed, or the child failed; with the telling line of its log.
        """
        scored = any(each.prompt_logprobs for each in job.requests)
        where = None if job.draft is not None or scored else self._cluster  # Ray hands on no counters
        folder.mkdir(parents=True, exist_ok=True)
        results_path, job_path, counters = folder / RESULTS_NAME, folder / "job.json", folder / "speculation.json"
        text = job.model_dump_json()
        same = job_path.exists() and job_path.read_text() == text
        if not same or (job.draft is not None and not counters.exists()):
            results_path.unlink(missing_ok=True)
            counters.unlink(missing_ok=True)
            artifacts.write_text(job_path, text)
        found = _read_results(results_path)
        if len(found) < len(job.requests):
            on_result(len(found), len(job.requests))
            self._ask(folder, lambda: on_result(_count_lines(results_path), len(job.requests)), where)
            found = _read_results(results_path)
        missing = [request.name for request in job.requests if request.name not in found]
        if missing:
            raise QuantkitError(f"vLLM ended without answers to {len(missing)} requests; see {folder}")
        speculation = Speculation.model_validate_json(counters.read_bytes()) if job.draft is not None else None
        return [found[request.name] for request in job.requests], speculation

    def time(self, timing: Timing, folder: Path) -> Seconds:
        """Seconds of the decode steps of each batch; `folder` keeps what was measured, and it is not measured again.

        Raises:
            QuantkitError: vLLM is not installed, or the child failed; with the telling line of its log.
        """
        folder.mkdir(parents=True, exist_ok=True)
        timing_path, seconds_path = folder / TIMING_NAME, folder / SECONDS_NAME
        text = timing.model_dump_json()
        if not (seconds_path.exists() and timing_path.exists() and timing_path.read_text() == text):
            seconds_path.unlink(missing_ok=True)
            artifacts.write_text(timing_path, text)
            self._ask(folder, lambda: None)
        return Seconds.model_validate_json(seconds_path.read_bytes())

    def close(self) -> None:
        """End the children, if there are any."""
        for where in list(self._children):
            self._children.pop(where).close()

    def _ask(self, folder: Path, on_tick: Callable[[], None], where: str | None = None) -> None:
        """Have the child that works there run the job in `folder`."""
        if where not in self._children:
            self._children[where] = _start(folder, where)
        child = self._children[where]
        if not child.ask(str(folder.resolve()), on_tick):
            self.close()
            line = processes.telling_line(child.log).removeprefix("quantkit.errors.QuantkitError: ")
            who = "vLLM" if where is None else "vLLM on Ray"
            raise QuantkitError(f"{who} failed ({line}); the whole log is {child.log}")


def _start(folder: Path, where: str | None) -> processes.Worker:
    if vllm_environment.distribution() is None:
        raise QuantkitError(f"vLLM is not installed: {vllm_environment.INSTALL_HINT}")
    on_cpu = vllm_environment.is_cpu_build()
    env = vllm_environment.process_environment(on_cpu=on_cpu) | vllm_environment.one_process(on_cpu=on_cpu)
    command = [sys.executable, "-P", "-m", "quantkit.offline_worker"]
    if where is not None:
        command[-1:] = ["quantkit.cluster", where]
        # how to reach it, and what proves that one may
        env |= processes.passed_on(name for name in os.environ if name.startswith("RAY_"))
        env["RAY_USAGE_STATS_ENABLED"] = "0"
    return processes.Worker(command, env=env, log=folder / "worker.log")


def _read_results(path: Path) -> dict[str, Result]:
    if not path.exists():
        return {}
    lines = path.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # a kill can leave half a line
    if len(whole) != len(lines):
        artifacts.write_text(path, "".join(whole))
    results = (Result.model_validate(json.loads(line)) for line in whole)
    return {result.name: result for result in results}


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def windows_job(model: Path, windows: Sequence[Sequence[int]], **settings: Any) -> Job:
    """A job that asks for the log-probability of every token of every window."""
    requests = [
        Request(name=f"window-{number}", prompt=list(window), prompt_logprobs=True)
        for number, window in enumerate(windows)
    ]
    longest = max(len(window) for window in windows)
    return Job(model=str(model), requests=requests, max_model_len=longest + 1, **settings)
