"""An engine's environment: made once from its pins in the user's cache, and used only when it is whole."""

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from quantkit import artifacts, foreign, processes
from quantkit.engines import registry
from quantkit.errors import QuantkitError
from quantkit.progress import LINE, Report, spoken

_STATE_NAME = "quantkit-engine.json"


class State(BaseModel):
    """What a whole environment says of itself; written last."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    engine: str
    version: str
    python: str
    disk_bytes: int
    seconds: float


def folder(name: str) -> Path:
    """Where the environment lies, or will lie: other pins, other folder."""
    return cache() / f"{name}-{registry.digest(name)}"


def cache() -> Path:
    """`engines` in $QUANTKIT_CACHE, else in the user's cache."""
    return artifacts.cache("engines")


def python(name: str) -> Path:
    """The environment's interpreter."""
    return folder(name) / "bin" / "python"


def state(name: str) -> State | None:
    """What is there of the environment; None unless it is whole."""
    try:
        found = foreign.json_model(folder(name) / _STATE_NAME, State, remedy="it is made again")
    except (FileNotFoundError, QuantkitError):
        return None
    return found if python(name).exists() else None  # the Python it was made with may be gone


def ensure(name: str, report: Report) -> State:
    """The environment, made first where it is not there; says so before, with size and time.

    Raises:
        QuantkitError: it cannot be made, with the telling line of the installer.
    """
    if (found := state(name)) is not None:
        return found
    engine = registry.EVERY[name]
    report(
        f"{name} runs in an environment of its own, which is not there yet. Making it takes about {engine.minutes:.0f} "
        f"minutes, {engine.disk_gb:.1f} GB of disk (more with a CUDA torch) and a package registry",
        0, LINE,
    )  # fmt: skip
    target = folder(name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QuantkitError(f"{target.parent} can not be made ({error}): set QUANTKIT_CACHE to a folder") from error
    with _locked(target, report):
        target.with_name(f"{target.name}.log").unlink(missing_ok=True)
        if (found := state(name)) is not None:  # by whoever held the lock
            return found
        return _make(name, target, report)


def _make(name: str, target: Path, report: Report) -> State:
    if target.exists():
        shutil.rmtree(target)  # a half of one
    log = target.with_name(f"{target.name}.log")
    seconds = 0.0
    for what, command in _steps(name, target):

        def tick(passed_s: float, line: str, what: str = what) -> None:
            report(f"{what}, {spoken(passed_s)}: {line[:80]}", 0, 0)

        spent = processes.run_logged(
            command, env=_environment(), folder=target.parent, log=log, append=True, on_tick=tick
        )
        seconds += spent.wall_s
        if spent.exit_code:
            raise QuantkitError(
                f"the environment of {name} can not be made: {what} failed ({processes.telling_line(log)}); "
                f"the whole log is {log}"
            )
    made = State(
        engine=name, version=registry.EVERY[name].version, python=sys.version.split()[0],
        disk_bytes=sum(file.lstat().st_size for file in target.rglob("*") if not file.is_dir()),
        seconds=round(seconds, 1),
    )  # fmt: skip
    artifacts.write_text(target / _STATE_NAME, made.model_dump_json(indent=2) + "\n")
    return made


def _steps(name: str, target: Path) -> list[tuple[str, list[str | Path]]]:
    """What to run, one after the other."""
    pins = registry.requirements(name).resolve()
    lines = pins.read_text().splitlines()
    # torch by pip, which takes a CPU build where it is told of one. Some of the rest are built from source, against
    # that torch and by that setuptools.
    first = [line for line in lines if line.startswith(("torch==", "setuptools=="))]
    interpreter = target / "bin" / "python"
    pip: list[str | Path] = [
        interpreter, "-I", "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-compile",
    ]  # fmt: skip
    closure: list[str | Path] = ["--no-deps", "--no-build-isolation", "-r", pins]
    uv = _uv()
    # pip takes hashes for all packages or for none, and torch's build is chosen by who has the machine
    hashed: list[str | Path] = ["-c", registry.hashes(name).resolve()] if uv and registry.hashes(name).is_file() else []
    by_uv: list[str | Path] = [uv or "", "pip", "install", "--python", interpreter]
    return [
        ("making the environment", [sys.executable, "-I", "-m", "venv", target]),
        (f"installing {' '.join(first)}", [*pip, "-c", pins, *first]),
        (f"installing {name} and what it needs", [*(by_uv if uv else pip), *closure, *hashed]),
    ]


def _uv() -> str | None:
    """uv, where there is one, is quicker with the many small packages."""
    return shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def _environment() -> Mapping[str, str]:
    """The caller's, who may have told pip of proxies and indexes, less what points Python at other packages."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    kept.pop("VIRTUAL_ENV", None)
    # AutoGPTQ's and AutoAWQ's CUDA kernels are needed to run their models, not to make them
    return kept | {"BUILD_CUDA_EXT": "0"}


@contextmanager
def _locked(target: Path, report: Report) -> Iterator[None]:
    """Hold the making of an environment; whoever comes second waits. The lock goes with the process."""
    with target.with_name(f"{target.name}.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("another quantkit makes this environment: waiting for it", 0, LINE)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
