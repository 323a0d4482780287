"""The contract with an engine's process: job.json in, a checkpoint and result.json out, and nothing else believed.

The worker is started as `PYTHON -I -u WORKER FOLDER`. It writes the checkpoint to the job's `out`, then result.json,
last and by rename. Its standard input is a pipe that ends when quantkit does: the worker then ends its process group.
"""

import os
import shutil
from pathlib import Path
from typing import Generic, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from quantkit import artifacts, foreign, processes
from quantkit.errors import QuantkitError, one_line
from quantkit.processes import Spent
from quantkit.progress import Report, spoken

LOG_NAME = "worker.log"
_TAIL = 8  # lines of the log in an error
# What an engine may see of its surroundings: where to find things and which devices to use. No tokens, no PYTHONPATH.
_PASSED_ON = (
    "PATH", "HOME", "USER", "LANG", "LC_ALL", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "XDG_CACHE_HOME", "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES",
)  # fmt: skip


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Scheme(_Message):
    """The grid that is asked for."""

    bits: int
    group_size: int  # -1: per channel
    symmetric: bool


class AnyJob(_Message):
    """What every worker reads."""

    checkpoint: str  # FP16, a directory
    method: str
    options: dict[str, bool | int | float | str] = {}  # the engine's own
    seed: int
    device: str
    threads: int
    out: str  # the directory to write


class Job(AnyJob):
    """What a quantizer's worker reads: job.json."""

    tokens: str  # a safetensors file with input_ids, int64 [samples, length]
    scheme: Scheme


class HeadJob(AnyJob):
    """What the worker of a head's training reads: job.json."""

    exchanges: str  # a file of JSON lines, each with the token ids of a prompt and of the target's answer
    layers: list[int]  # the target's states behind so many of its layers are what the head reads
    epochs: int
    batch_size: int  # exchanges a step
    learning_rate: float  # peak
    warmup: float  # fraction of the steps
    speculative_tokens: int
    draft_vocab_size: int  # tokens that the head can propose


class AnyResult(_Message):
    """What every worker writes when the checkpoint is whole."""

    engine: str
    version: str
    method: str
    import_cpu_s: float = Field(ge=0)
    notes: list[str]  # what was patched, and what the engine did other than asked


class Result(AnyResult):
    """What a quantizer's worker writes: result.json."""

    format: Literal["awq", "gptq", "compressed-tensors"]


class HeadResult(AnyResult):
    """What the worker of a head's training writes: result.json."""

    steps: int
    epoch_losses: list[float]  # mean a token and draft position, nats
    first_token_agreement: float  # with the target's likeliest token, in the last epoch's batches


ResultT = TypeVar("ResultT", bound=AnyResult)


class Finished(NamedTuple, Generic[ResultT]):
    """A job that ended with a valid result, and what it took by our own measure."""

    result: ResultT
    spent: Spent


def run(
    name: str, job: AnyJob, folder: Path, *, returns: type[ResultT], python: Path, worker: Path, report: Report
) -> Finished[ResultT]:
    """Put a job through an engine's worker, from the start: no engine can go on where it was interrupted.

    `folder` gets job.json, worker.log and result.json, and is emptied before.

    Raises:
        QuantkitError: the worker failed or left no valid result; with the end of its log.
    """
    if folder.exists():
        shutil.rmtree(folder)  # no result of an earlier try may pass for this one's
    folder.mkdir(parents=True)
    artifacts.write_text(folder / "job.json", job.model_dump_json(indent=2) + "\n")
    log = folder / LOG_NAME
    spent = processes.run_logged(
        [python, "-I", "-u", worker, folder], env=_environment(job.threads), folder=folder, log=log,
        on_tick=lambda seconds, line: report(f"{name}, {spoken(seconds)}: {processes.bare(line)[:80]}", 0, 0),
    )  # fmt: skip
    if spent.exit_code:
        raise QuantkitError(_failure(name, log, f"ended with exit code {spent.exit_code}"))
    return Finished(read_result(name, job.method, folder, returns), spent)


def read_result(name: str, method: str, folder: Path, returns: type[ResultT]) -> ResultT:
    """The result.json that an engine's worker left, of the method that was asked for.

    Raises:
        QuantkitError: there is none, or it is none; with the end of the worker's log.
    """
    log = folder / LOG_NAME
    try:
        result = foreign.json_model(folder / "result.json", returns, remedy="report it to its engine", within=folder)
    except FileNotFoundError:
        raise QuantkitError(_failure(name, log, "ended without a result.json")) from None
    except QuantkitError as error:
        raise QuantkitError(_failure(name, log, f"left a result.json that is none ({one_line(error)})")) from error
    if result.method != method:
        raise QuantkitError(
            _failure(name, log, f"ran method {one_line(result.method)[:100]} where {method} was asked for")
        )
    return result


def threads() -> int:
    """How many threads an engine gets: OMP_NUM_THREADS, else one a core that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) else len(os.sched_getaffinity(0))


def _environment(num_threads: int) -> dict[str, str]:
    return processes.passed_on(_PASSED_ON) | {
        "OMP_NUM_THREADS": str(num_threads),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _failure(name: str, log: Path, what: str) -> str:
    lines = [f"    {line[:200]}" for line in processes.log_tail(log, 1 << 16)[-_TAIL:]]
    return "\n".join([f"engine {name} {what} ({processes.telling_line(log)}); the end of {log}:", *lines])
