"""Answers by a Ray cluster: the same as vLLM's here, resumed when the driver was killed, and mistakes in a line."""

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from quantkit.cli import main
from quantkit.errors import QuantkitError
from quantkit.offline import RESULTS_NAME, Job, Request, Session

PATIENCE_S = 600  # of a machine that is busy with other things
EOS = 1  # of tiny_llama, at which what is sampled may end
StartRay = Callable[..., AbstractContextManager[Any]]
RayCluster = Any  # of conftest.py, which cannot be imported


@pytest.fixture(scope="module")
def cluster(start_ray: StartRay) -> Iterator[RayCluster]:
    """A cluster of one machine with two cores."""
    with start_ray(num_cpus=2) as started:
        yield started


def _job(model: Path, number: int, *, max_tokens: int) -> Job:
    """Greedy requests, every other one with stop tokens that it is bound to meet, every fourth one sampled."""
    requests = [
        Request(
            name=f"answer-{i}", prompt=[3, *divmod(i, 16), 7 + i % 5], max_tokens=max_tokens - i % 3,
            stop_token_ids=list(range(20, 320, 9)) if i % 2 else [], temperature=0.7 if i % 4 == 3 else 0.0,
            seed=i if i % 4 == 3 else None,
        )
        for i in range(number)
    ]  # fmt: skip
    return Job(model=str(model), requests=requests, max_model_len=512, max_num_seqs=16)


@pytest.mark.vllm
@pytest.mark.timeout(4 * PATIENCE_S)
def test_a_cluster_answers_as_this_machine_does_and_a_killed_driver_goes_on(
    cluster: RayCluster, tiny_llama: Path, tmp_path: Path
) -> None:
    job = _job(tiny_llama, 96, max_tokens=60)
    (tmp_path / "job").write_text(job.model_dump_json())
    with Session() as session:
        here, _ = session.run(job, tmp_path / "here")
    assert {each.finished for each in here} == {"stop", "length"}

    there = tmp_path / "there"
    program = (
        "import pathlib, sys; from quantkit.offline import Job, Session; "
        "job = Job.model_validate_json(pathlib.Path(sys.argv[1]).read_text()); "
        "Session(cluster=sys.argv[2]).run(job, pathlib.Path(sys.argv[3]))"
    )
    asking = subprocess.Popen([sys.executable, "-c", program, tmp_path / "job", cluster.address, there])
    _wait(lambda: asking.poll() is not None or _lines(there) > 0)
    assert asking.poll() is None
    driver = int(Path(f"/proc/{asking.pid}/task/{asking.pid}/children").read_text())
    engines = cluster.processes(b"EngineCore")
    assert engines
    asking.kill()
    asking.wait()
    _wait(lambda: not Path(f"/proc/{driver}").exists())
    _wait(lambda: not engines & cluster.processes(b"EngineCore"))  # none stays and keeps its GPU
    kept = (there / RESULTS_NAME).read_text()
    kept = kept[: kept.rindex("\n") + 1]
    assert 0 < kept.count("\n") < 96

    with Session(cluster=cluster.address) as session:
        found, _ = session.run(job, there)
    text = (there / RESULTS_NAME).read_text()
    assert text.startswith(kept) and text.count("\n") == 96, "what was answered is not asked again"
    greedy = [number for number, request in enumerate(job.requests) if request.temperature == 0]
    assert [found[number] for number in greedy] == [here[number] for number in greedy]
    for request, result in zip(job.requests, found, strict=True):
        assert result.name == request.name
        stopped = result.tokens[-1] in {*request.stop_token_ids, EOS}
        assert result.finished == ("stop" if stopped else "length")
        assert stopped or len(result.tokens) == request.max_tokens


@pytest.mark.vllm
def test_no_cluster_there_is_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    job = Job(model=str(tiny_llama), requests=[Request(name="one", prompt=[1, 2, 3])], max_model_len=64)
    with (
        Session(cluster="127.0.0.1:1") as session,
        pytest.raises(QuantkitError, match=r"no Ray cluster could be joined at '127\.0\.0\.1:1'"),
    ):
        session.run(job, tmp_path)


def test_a_cluster_without_ray_is_refused_before_any_work(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else found(name, *rest))
    words = ["train-draft", str(tiny_llama), "--keep-layers", "1", "--out", str(tmp_path / "out"), "--on", "auto"]
    said = CliRunner().invoke(main, words)
    assert said.exit_code == 2 and "install quantkit[ray]" in said.stderr
    assert not (tmp_path / "out").exists()


def _lines(folder: Path) -> int:
    path = folder / RESULTS_NAME
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _wait(true: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end_s
        time.sleep(0.05)
