"""The contract, with workers of a few lines in this Python: what counts as success, and that nothing outlives it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quantkit.engines import contract, registry
from quantkit.errors import QuantkitError
from quantkit.progress import silent

ECHO = """
import json, os, sys
from pathlib import Path
folder = Path(sys.argv[1])
job = json.loads((folder / "job.json").read_bytes())
result = {"engine": "echo", "version": "1", "method": job["method"], "format": "awq", "import_cpu_s": 0.1,
          "notes": [job["scheme"]["symmetric"] is False and job["options"] == {"iters": 20} and "as asked"]}
"""
WRITE = '(folder / "result.json").write_text(json.dumps(result))\n'


def _job(folder: Path, **changes: object) -> contract.Job:
    scheme = contract.Scheme(bits=4, group_size=32, symmetric=False)
    given: dict[str, object] = {
        "checkpoint": "c", "tokens": "t", "method": "awq", "scheme": scheme, "options": {"iters": 20}, "seed": 0,
        "device": "cpu", "threads": 1, "out": str(folder / "made"),
    }  # fmt: skip
    return contract.Job.model_validate(given | changes)


def _run(tmp_path: Path, script: str, **changes: object) -> contract.Finished[contract.Result]:
    worker = tmp_path / "worker.py"
    worker.write_text(script)
    folder = tmp_path / "job"
    job = _job(folder, **changes)
    return contract.run(
        "echo", job, folder, returns=contract.Result, python=Path(sys.executable), worker=worker, report=silent
    )


def test_a_worker_that_does_what_is_asked(tmp_path: Path) -> None:
    result, spent = _run(tmp_path, ECHO + "import time; time.sleep(1)\n" + WRITE)  # sampled while it sleeps
    assert (result.engine, result.method, result.notes) == ("echo", "awq", ["as asked"])
    assert spent.exit_code == 0 and 0 < spent.cpu_s < spent.wall_s + 1 and spent.peak_memory_bytes > 1 << 20


def test_the_memory_is_the_workers_own(tmp_path: Path) -> None:
    held = bytearray(os.urandom(1 << 20)) * 200  # the kernel's high-water mark of a child would have this in it
    _, spent = _run(tmp_path, ECHO + WRITE)
    assert spent.peak_memory_bytes < len(held)


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("raise ValueError('the group does not fit')", r"exit code 1 \(ValueError: the group does not fit\)"),
        ("print('so far so good'); os.kill(os.getpid(), 9)", r"(?s)exit code -9 .*so far so good"),
        ("", "ended without a result.json"),
        ('(folder / "result.json").write_text("{")', "result.json that is none"),
        ('result["more"] = 1\n' + WRITE, r"more: Extra inputs"),
        ('del result["version"]\n' + WRITE, r"version: Field required"),
        ('result["method"] = "gptq"\n' + WRITE, "ran method gptq where awq was asked for"),
    ],
    ids=["crash", "kill", "no result", "half a result", "a word more", "a word less", "another method"],
)
def test_what_is_no_success(tmp_path: Path, ending: str, said: str) -> None:
    with pytest.raises(QuantkitError, match=said) as caught:
        _run(tmp_path, ECHO + ending)
    assert str(tmp_path / "job" / "worker.log") in str(caught.value)


def test_a_result_of_an_earlier_try_does_not_count(tmp_path: Path) -> None:
    _run(tmp_path, ECHO + WRITE)
    with pytest.raises(QuantkitError, match="ended without a result"):
        _run(tmp_path, ECHO)


def test_what_stands_in_the_callers_environment_stays_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "poison").mkdir()
    (tmp_path / "poison" / "json.py").write_text("raise SystemExit('another json')")
    for name in ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP"):
        monkeypatch.setenv(name, str(tmp_path / "poison"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    result, _ = _run(tmp_path, ECHO + 'result["notes"] = sorted(os.environ)\n' + WRITE)
    assert "CUDA_VISIBLE_DEVICES" in result.notes and "OMP_NUM_THREADS" in result.notes
    assert not [name for name in result.notes if name.startswith("PYTHON")]
    assert "HF_TOKEN" not in result.notes


HOST = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is behind & with Ctrl-C ignored
from quantkit.engines import contract
job = contract.Job.model_validate_json(Path(sys.argv[1]).read_bytes())
contract.run("slow", job, Path(sys.argv[3]), returns=contract.Result, python=Path(sys.executable),
             worker=Path(sys.argv[2]), report=lambda *_: None)
"""
SLOW = """
import os, signal, subprocess, sys, threading, time
from pathlib import Path
def watch():
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdin=subprocess.DEVNULL)
Path(sys.argv[1], "pids.tmp").write_text(f"{os.getpid()} {child.pid}")
Path(sys.argv[1], "pids.tmp").rename(Path(sys.argv[1], "pids"))
time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whoever_ends_quantkit_ends_the_worker_and_its_children(tmp_path: Path, how: signal.Signals) -> None:
    for name, text in (("host.py", HOST), ("slow.py", SLOW), ("asked.json", _job(tmp_path).model_dump_json())):
        (tmp_path / name).write_text(text)
    words = [tmp_path / name for name in ("host.py", "asked.json", "slow.py", "job")]
    host = subprocess.Popen([sys.executable, *map(str, words)], stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        _until(lambda: (tmp_path / "job" / "pids").exists(), "the worker starts")
        worker, child = map(int, (tmp_path / "job" / "pids").read_text().split())
        assert _lives(worker) and _lives(child)
        host.send_signal(how)
        host.wait(timeout=20)
        _until(lambda: not _lives(worker) and not _lives(child), "worker and child are gone")
    finally:
        host.kill()


def _until(true: object, what: str) -> None:
    assert callable(true)
    for _ in range(3000):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError(f"waited in vain: {what}")


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_job_and_result_are_what_the_workers_read_and_write(tmp_path: Path) -> None:
    """The workers have no quantkit to import: their words are held against the models here."""
    every = set(contract.Result.model_fields) | set(contract.HeadResult.model_fields) | {"cpu_s", "wall_s"}
    for name in registry.EVERY:
        text = registry.worker(name).read_text()
        begin = text.index("result = {")
        written = text[begin : text.index("}  # fmt", begin)]
        fields = contract.HeadResult.model_fields if name in registry.DRAFT_ENGINES else contract.Result.model_fields
        assert set(fields) == {key for key in every if f'"{key}":' in written}, name
        if name in registry.DRAFT_ENGINES:
            asked = set(re.findall(r'job\["(\w+)"\]', text))
            assert asked == set(contract.HeadJob.model_fields), name
        assert len(text.splitlines()) <= (160 if name in registry.DRAFT_ENGINES else 130), name
    assert json.loads(_job(tmp_path).model_dump_json())["scheme"] == {"bits": 4, "group_size": 32, "symmetric": False}
