"""Answers by a Ray cluster of two hosts: each prompt once, though an engine is killed, and then a host."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest

from quantkit.offline import RESULTS_NAME, Job, Request, Result

PATIENCE_S = 600  # of a machine that is busy with other things
Hosts = Any  # of hosts.py, which cannot be imported
RayCluster = Any  # of conftest.py, likewise
StartRay = Callable[..., AbstractContextManager[RayCluster]]
NUMBER, LENGTH = 400, 48  # prompts, and tokens of each answer
ASK = (
    "import pathlib, sys; from quantkit.offline import Job, Session; "
    "job = Job.model_validate_json(pathlib.Path(sys.argv[1]).read_text()); "
    "Session(cluster=sys.argv[2]).run(job, pathlib.Path(sys.argv[3]))"
)


@pytest.mark.vllm
@pytest.mark.timeout(6 * PATIENCE_S)
def test_each_prompt_is_answered_once_though_an_engine_dies_and_then_a_host(
    hosts: Hosts, start_ray: StartRay, tiny_llama: Path, tmp_path: Path
) -> None:
    """Each host has room for one engine, as one GPU has. A stopped engine keeps the requests that it has in hand."""
    requests = [
        Request(name=f"answer-{n}", prompt=[3, *divmod(n, 16), 7 + n % 5], max_tokens=LENGTH) for n in range(NUMBER)
    ]
    job = Job(model=str(tiny_llama), requests=requests, max_model_len=512, max_num_seqs=16)
    (tmp_path / "job").write_text(job.model_dump_json())
    out = tmp_path / "out"

    def ask() -> "subprocess.Popen[str]":
        words = (sys.executable, "-c", ASK, tmp_path / "job", cluster.address, out)
        process: subprocess.Popen[str] = hosts[0].start(*words, stderr=subprocess.PIPE)
        return process

    def answered(host: int) -> int:
        """How many batches the engines of a host have answered, as its own Ray logs say."""
        logs = cluster.logs[host].glob("worker-*.err")
        return sum(path.read_text(errors="replace").count("Elapsed time for batch") for path in logs)

    def wait(true: Callable[[], bool]) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while not true():
            assert asking.poll() is None, asking.communicate()[1][-3000:]
            assert time.monotonic() < end_s
            time.sleep(0.05)

    with start_ray(num_cpus=1, hosts=hosts) as cluster:
        asking = ask()
        wait(lambda: answered(0) + answered(1) > 0)
        first = 0 if answered(0) else 1
        second = 1 - first
        tell(hosts[first], signal.SIGSTOP)
        wait(lambda: answered(second) > 0)  # so both have taken part

        killed = answered(second)
        tell(hosts[second], signal.SIGSTOP, signal.SIGKILL)
        wait(lambda: answered(second) > killed)  # by the engine in its place: the other one is still stopped

        tell(hosts[1], signal.SIGSTOP)
        tell(hosts[0], signal.SIGCONT)
        hosts[1].kill()
        said = asking.communicate(timeout=PATIENCE_S)[1]
        assert asking.returncode and f"Ray machine {hosts[1].address} is gone" in said, said[-3000:]
        assert "start the same command again" in said
        kept = whole_lines(out)
        assert 0 < len(kept) < NUMBER

        asking = ask()
        said = asking.communicate(timeout=PATIENCE_S)[1]
        assert asking.returncode == 0, said[-3000:]
    lines = whole_lines(out)
    assert lines[: len(kept)] == kept, "what was answered is not asked again"
    results = [Result.model_validate_json(line) for line in lines]
    assert sorted(each.name for each in results) == sorted(each.name for each in requests)
    assert all(len(each.tokens) == LENGTH for each in results)


def tell(host: Any, *signals: int) -> None:
    """Send signals to the engine of a host: the process that batches, and the one that computes."""
    for number in signals:
        for process in host.processes("VLLM::"):
            with suppress(ProcessLookupError):
                os.kill(process, number)


def whole_lines(folder: Path) -> list[str]:
    """The results so far; a process that ends in the midst of one leaves half a line."""
    return [line for line in (folder / RESULTS_NAME).read_text().splitlines(keepends=True) if line.endswith("\n")]
