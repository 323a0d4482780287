"""Killed anywhere, tried again: the same bytes, no manifest over half a folder, nobody left alive.

Short forms of `kills` and `steps`; the long ones are run by hand (docs/robustness.md).
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quantkit import processes
from tests.faults.kills import alive, descendants

_ROOT = Path(__file__).parents[2]


def _run(module: str, *words: object) -> dict[str, object]:
    """The last line that it prints."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.faults.{module}", *map(str, words)], cwd=_ROOT, capture_output=True, text=True,
        timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_import_and_quantization_killed_at_random(tmp_path: Path) -> None:
    found = _run("kills", "--kills", 16, "--seed", 5, "--stages", "checkpoint,quantize", "--out", tmp_path)
    assert int(str(found["kills"])) >= 16 and found["orphans"] == 0
    assert found["different_files"] == {"checkpoint": [], "target": []}


def test_every_step_of_writing_an_artefact_killed_in_turn(tmp_path: Path) -> None:
    found = _run("steps", tmp_path)
    assert len(found) == 6 and all(isinstance(kills, int) and kills > 15 for kills in found.values())


@pytest.mark.parametrize("how", ["itself", "its group"])
def test_nobody_outlives_who_started_them(how: str, tmp_path: Path) -> None:
    """A child in a session of its own, as a vLLM server is, with a child of its own, as its engine is."""
    child = "import subprocess, time; subprocess.Popen(['sleep', '600']); time.sleep(600)"
    starter = (
        f"import time; from quantkit import processes\nheld = processes.start([{sys.executable!r}, '-c', {child!r}])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", f"{starter}\ntime.sleep(600)"], start_new_session=True, cwd=tmp_path
    )  # fmt: skip
    begin_s = time.monotonic()
    while len(family := descendants(process.pid)) < 3:  # the child, the sleeper, and who watches
        assert time.monotonic() - begin_s < 60
        time.sleep(0.05)
    if how == "itself":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    begin_s = time.monotonic()
    while left := [one for one in family if alive(one)]:
        assert time.monotonic() - begin_s < 10, f"{left} of {family} live on"
        time.sleep(0.05)


def test_a_child_is_itself_and_ends_as_it_ends() -> None:
    """What is waited for is the command, not what watches it: its number, its exit code, its signals."""
    code = "import os, sys; print(os.getpid(), os.getsid(0)); sys.exit(7)"
    child = processes.start([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    said, _ = child.communicate(timeout=60)
    assert child.returncode == 7 and said.split() == [str(child.pid)] * 2
    child = processes.start([sys.executable, "-c", "import time; time.sleep(600)"])
    time.sleep(1)
    child.terminate()
    assert child.wait(timeout=60) == -signal.SIGTERM
