"""Kills what writes an artefact before each of its steps on the disk, in turn, and has it tried again.

    python -m tests.faults.steps FOLDER

Random moments (`kills`) seldom fall between two steps that are microseconds apart; these fall between all of them.
"""

import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantkit import artifacts, pipeline
from quantkit.recipe import Recipe

# What Python tells an audit hook before it does it, of all that changes a folder; of what is opened, what is written.
_STEPS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "fcntl.flock"}
_WRITES = os.O_WRONLY | os.O_RDWR
_MINE, _OTHER = {"bits": 4}, {"bits": 8}


def _make(out: Path, settings: dict[str, int], *, replace: bool = False, die: bool = False) -> None:
    if artifacts.is_fresh(out, artifacts.work_key("report", {"a": "1"}, settings)):  # as stages.run_stage does
        artifacts.tidy(out)
        return
    with artifacts.making(out, "report", inputs={"a": "1"}, settings=settings, replace=replace) as work:
        (work.partial / "layers").mkdir(exist_ok=True)
        artifacts.write_text(work.partial / "layers" / "0", "done")
        (out / "inner").mkdir(exist_ok=True)
        artifacts.write_text(out / "inner" / "half", "half" if die else str(settings))
        if die:
            os.kill(os.getpid(), signal.SIGKILL)
        (out / "inner" / "half").replace(out / "whole")
        (out / "inner").rmdir()


def _anew(out: Path) -> None:
    _make(out, _MINE)


def _instead(out: Path) -> None:
    _make(out, _MINE, replace=True)


def _fresh(out: Path) -> None:
    artifacts.discard(out)
    _make(out, _MINE)


def _run(out: Path) -> None:
    """A run of several stages: its own claim on the folder, one stage that stands for all."""
    recipe = Recipe.model_construct(name="tiny")
    with pipeline._claimed(recipe, out):
        _make(out / "stage", _MINE, replace=True)


def _nothing(out: Path) -> None:
    """Begin with no folder."""


# What lies in the folder before, and what is then done: again and again, if it is killed.
CASES: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "anew": (_nothing, _anew),
    "gone on with": (lambda out: _make(out, _MINE, die=True), _anew),
    "instead of another": (lambda out: _make(out, _OTHER), _instead),
    "instead of half another": (lambda out: _make(out, _OTHER, die=True), _instead),
    "discarded and made anew": (lambda out: _make(out, _OTHER), _fresh),
    "a run": (_nothing, _run),
}


def _in_a_child(work: Callable[[Path], None], out: Path, *, killed_at: int | None = None) -> int:
    """Exit code of the work, or minus the signal; killed before the step of that number."""
    pid = os.fork()
    if pid == 0:
        steps = itertools.count()

        def hook(event: str, given: tuple[Any, ...]) -> None:
            read = event == "open" and not given[2] & _WRITES
            if event in _STEPS and not read and next(steps) == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)

        if killed_at is not None:
            sys.addaudithook(hook)
        work(out)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check_whole(out: Path) -> None:
    """A manifest, if there is one, is over the very files that it names."""
    manifest = artifacts.read_manifest(out)
    assert manifest is None or artifacts.record_files(out) == manifest.files, f"a manifest over half of {out}"


def every_step(name: str, out: Path) -> int:
    """Kill the case before its first step, its second, and so on until it needs no more; how often that was."""
    before, work = CASES[name]
    made = out / "stage" if name == "a run" else out
    for number in itertools.count():
        shutil.rmtree(out, ignore_errors=True)
        _in_a_child(before, out)
        code = _in_a_child(work, out, killed_at=number)
        check_whole(made)
        if code == 0:
            return number
        assert code == -signal.SIGKILL, f"{name}: step {number} ended with {code}"
        code = _in_a_child(work, out)
        assert code == 0, f"{name}: killed before step {number}, it ends with {code} when it is tried again"
        check_whole(made)
        assert (made / "whole").read_text() == str(_MINE)
        left = sorted(path.name for path in made.rglob("*"))
        assert left == [artifacts.MANIFEST_NAME, "whole"], f"{name}: step {number} left {left}"
    raise AssertionError


def main() -> None:
    """All cases; prints how many kills each took."""
    print(json.dumps({name: every_step(name, Path(sys.argv[1]) / "out") for name in CASES}))


if __name__ == "__main__":
    main()
