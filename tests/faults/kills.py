"""Kills a run at random moments of every stage, starts it again, and holds what comes out against an undisturbed one.

    python -m tests.faults.kills --kills 100 --seed 0 --out FOLDER

Each try is the command line itself in a process of its own, forked from this one, which has torch imported already: the
seconds that it would take to import it are no stage's.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from quantkit import artifacts
from quantkit.serve import check
from tests.faults.tiny_run import FOLDERS, write_inputs

# How many of the kills a stage gets, about: those that start vLLM take a minute each time on two busy cores.
WEIGHTS = {"checkpoint": 18, "quantize": 26, "eval": 12, "train-draft": 20, "bundle": 18, "serve": 6}
HOW = ("process", "group", "tree", "children")
_GONE_S = 10.0  # until everybody must have ended whose starter was killed
_TICK_S = 0.002


class Kill(NamedTuple):
    """One kill: where it fell, how long after the stage had begun, who was hit, and what came of it."""

    stage: str
    after_s: float
    how: str
    children: int  # that lived at that moment
    orphans: int  # of them, that still lived 10 seconds later
    whole: list[str]  # folders with a manifest, all of them as it says
    code: int  # exit code, or minus the signal


class Run:
    """A `quantkit run` in a process, group and session of its own."""

    def __init__(self, arguments: Sequence[str | Path], log: Path) -> None:
        log.touch()
        self.log, self.begin = log, log.stat().st_size
        log.touch()
        self.code: int | None = None
        words = [str(word) for word in arguments]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            with log.open("ab") as stream, Path(os.devnull).open("rb") as nothing:
                for number, file in ((0, nothing), (1, stream), (2, stream)):
                    os.dup2(file.fileno(), number)
            _command(words)

    def ended(self) -> bool:
        if self.code is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if found else None
        return self.code is not None

    def said(self) -> str:
        with self.log.open("rb") as stream:
            stream.seek(self.begin)
            return stream.read().decode(errors="replace")

    def stage(self) -> str | None:
        """The stage that it works at, by its own words."""
        begun = [line[:-4] for line in self.said().splitlines() if line[:-4] in FOLDERS and line.endswith(" ...")]
        return begun[-1] if begun else None


def _command(words: list[str]) -> None:
    """Be the command line, and end as it ends."""
    from quantkit.cli import main

    code: Any = 1
    try:
        main(words, prog_name="quantkit", standalone_mode=True)
    except SystemExit as end:
        code = end.code or 0
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()  # what Python itself would print
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def descendants(pid: int) -> list[int]:
    """All living children and theirs, and whoever else is of their sessions, but not of this process' own."""
    found: list[int] = []
    pending = [pid]
    while pending:
        one = pending.pop()
        with suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                pending += [int(child) for child in (task / "children").read_text().split()]
        found += [one] if one != pid else []
    sessions = {os.getsid(one) for one in found if alive(one)} - {os.getsid(0)}
    everybody = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return sorted({*found, *(one for one in everybody if one != pid and _session(one) in sessions)})


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1


def alive(pid: int) -> bool:
    """Whether a process is there and has not ended: one that waits to be waited for has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def kill(run: Run, how: str) -> tuple[str, int, int]:
    """Kill whom `how` says; the children that lived then, and those that still lived ten seconds later."""
    children = descendants(run.pid)
    if how == "children" and not children:
        how = "process"
    if how in ("tree", "children"):
        for one in children:
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
    if how == "group":
        os.killpg(run.pid, signal.SIGKILL)
    elif how != "children":
        os.kill(run.pid, signal.SIGKILL)
    begin_s = time.monotonic()
    while not run.ended():  # without its children it ends by itself, with an error or well
        assert how == "children" or time.monotonic() - begin_s < _GONE_S, "a process outlived SIGKILL"
        time.sleep(_TICK_S)
    begin_s = time.monotonic()
    while (left := sum(map(alive, children))) and time.monotonic() - begin_s < _GONE_S:
        time.sleep(0.02)
    return how, len(children), left


def whole_folders(out: Path) -> Iterator[str]:
    """The folders with a manifest; each holds exactly the files that it names, of the digests that it names."""
    for path in sorted(out.glob(f"*/{artifacts.MANIFEST_NAME}")):
        manifest = artifacts.read_manifest(path.parent)
        assert manifest is not None
        found = artifacts.record_files(path.parent)
        assert found == manifest.files, f"a manifest over half a folder: {path}"
        yield path.parent.name


class Tormentor:
    """Runs a recipe into a folder, and kills it."""

    def __init__(self, recipe: Path, out: Path, seed: int) -> None:
        self.arguments = ["run", recipe, "--out", out]
        self.out, self.log, self.random = out, out.with_suffix(".log"), random.Random(seed)
        self.kills: list[Kill] = []
        self.resumed: list[str] = []  # what the tries after a kill said of themselves

    def strike(self, stage: str, lasts_s: float) -> bool:
        """Start, wait for a random moment of the stage, kill, look; False where the run ended before."""
        run = Run(self.arguments, self.log)
        while run.stage() != stage:
            if run.ended():
                return self._over(run)
            time.sleep(_TICK_S)
        after_s = self.random.uniform(0, lasts_s)
        begin_s = time.monotonic()
        while time.monotonic() - begin_s < after_s:
            if run.ended():
                return self._over(run)
            time.sleep(_TICK_S)
        fell_on = run.stage() or stage
        how, children, orphans = kill(run, self.random.choice(HOW))
        assert run.code is not None
        whole = list(whole_folders(self.out)) if self.out.is_dir() else []
        self.kills.append(Kill(fell_on, round(after_s, 3), how, children, orphans, whole, run.code))
        print(self.kills[-1], flush=True)
        assert "Traceback" not in run.said(), run.said()[-3000:]
        assert orphans == 0, f"{orphans} processes outlived the run"
        assert how != "children" or run.code in (0, 2), run.said()[-3000:]
        return True

    def _over(self, run: Run) -> bool:
        assert run.code == 0, run.said()[-3000:]
        return False

    def torment(self, stage: str, kills: int, lasts_s: float) -> None:
        """So many kills in a stage; what has finished meanwhile is taken away, so that it is made again."""
        while sum(one.stage == stage for one in self.kills) < kills:
            if (self.out / FOLDERS[stage] / artifacts.MANIFEST_NAME).is_file():
                take_away(self.out, stage)
            self.strike(stage, lasts_s)

    def finish(self, *, until: str | None = None) -> str:
        """Run to the end, or until a stage has ended; what was said."""
        run = Run(self.arguments, self.log)
        while not run.ended():
            if until and (self.out / FOLDERS[until] / artifacts.MANIFEST_NAME).is_file():
                os.kill(run.pid, signal.SIGKILL)
            time.sleep(_TICK_S)
        assert run.code == 0 or (until and run.code == -signal.SIGKILL), run.said()[-3000:]
        return run.said()


def take_away(out: Path, stage: str) -> None:
    """Remove a stage's folder and those of the stages behind it."""
    names = list(FOLDERS)
    for later in names[names.index(stage) :]:
        shutil.rmtree(out / FOLDERS[later], ignore_errors=True)


def seconds(out: Path) -> dict[str, float]:
    """How long each finished stage took."""
    found = {stage: artifacts.read_manifest(out / folder) for stage, folder in FOLDERS.items()}
    return {stage: float(manifest.cost["wall_s"]) for stage, manifest in found.items() if manifest is not None}


def same(out: Path, other: Path, folder: str) -> list[str]:
    """The files of a folder's manifest that are not the same bytes in both runs."""
    one, two = (artifacts.record_files(each / folder) for each in (out, other))
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


def main() -> None:
    """Kill, run to the end, compare, and print what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default=",".join(FOLDERS), help="those that are killed, and none behind them runs")
    parser.add_argument("--effort", default="default", help="of quantize; high: vLLM is part of it")
    parser.add_argument("--whole", type=Path, help="an undisturbed run of the same recipe, made if it is not there")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    import torch  # noqa: F401  (before the forks)
    import transformers  # noqa: F401

    chosen = [stage for stage in FOLDERS if stage in options.stages.split(",")]
    until = None if chosen[-1] == "serve" else chosen[-1]
    options.out.mkdir(parents=True, exist_ok=True)
    recipe = options.out / "tiny.yaml"
    if not recipe.exists():
        write_inputs(options.out, effort=options.effort)
    whole = options.whole or options.out / "whole"
    Tormentor(recipe, whole, options.seed).finish(until=until)
    lasts_s = seconds(whole)
    print(json.dumps({"undisturbed_s": lasts_s}), flush=True)
    tormentor = Tormentor(recipe, options.out / f"killed-{options.seed}", options.seed)
    begin_s, weights = time.monotonic(), sum(WEIGHTS[stage] for stage in chosen)
    for stage in chosen:
        tormentor.torment(stage, max(round(options.kills * WEIGHTS[stage] / weights), 1), lasts_s[stage])
    tormentor.finish(until=until)
    out = tormentor.out
    different = {FOLDERS[stage]: same(out, whole, FOLDERS[stage]) for stage in chosen}
    checked = None
    if (out / "bundle").is_dir():
        checked = [one.model_dump() for one in check.check(out / "bundle") if not one.passed]
    print(json.dumps({
        "seed": options.seed, "kills": len(tormentor.kills), "seconds": round(time.monotonic() - begin_s, 1),
        "by_stage": Counter(one.stage for one in tormentor.kills),
        "by_how": Counter(one.how for one in tormentor.kills),
        "children_hit": sum(one.children for one in tormentor.kills),
        "orphans": sum(one.orphans for one in tormentor.kills),
        "manifests_checked": sum(len(one.whole) for one in tormentor.kills),
        "different_files": different, "failed_checks": checked,
    }))  # fmt: skip
    weights_differ = [name for name in different.get("target", []) if name != artifacts.MANIFEST_NAME]
    sys.exit(bool(weights_differ or checked))


if __name__ == "__main__":
    main()
