"""Reads files that were made hostile, a million of them, and says what came of it.

    python -m tests.hostile.fuzz --inputs 100000 --seed 0            # of each format
    python -m tests.hostile.fuzz --format GGUF --first 4711 --inputs 1    # one of them again

Each format is read in a process of its own with a bound on its memory. A QuantkitError in one line is a file that was
refused; any other exception, a file opened outside the folder, a process started, code unpickled or imported, a time
or a memory beyond bounds, is a hole, and ends the run with the number of the input that made it.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from quantkit.serve.verdict import find_tool

MEMORY_BYTES = 6 << 30  # of addresses: torch and its libraries have mapped 4 GiB of them before anything is read
SECONDS = 20.0  # of processor time for one input; a chat template may take as long by the clock, in its own process
_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn", "pickle.find_class", "socket.connect",
    "ctypes.dlopen", "code.__new__",
)  # fmt: skip
_OUR_TOOLS = {  # are started; nginx and kubectl of files that were looked through
    "quantkit.chat_template_worker",
    *(str(find_tool(name)) for name in ("check-jsonschema", "kubectl", "nginx", "promtool")),
}
_OUR_OWN = (sys.prefix, sys.base_prefix, Path(__file__).parents[2])
_READ_ONLY = tuple(str(Path(p).resolve()) for p in (*_OUR_OWN, "/usr", "/etc/ssl", "/proc", "/sys", "/dev/null"))


class Hole(AssertionError):
    """What must not happen happened."""


class Watch:
    """Sees what the interpreter is asked to open, start and unpickle, while it is on."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.on, self.seen = str(folder.resolve()), False, ""
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on or self.seen:
            return
        if (event == "subprocess.Popen" and not _OUR_TOOLS & {*map(str, args[1])}) or event in _FORBIDDEN:
            self.seen = f"{event} {args!r:.200}"
        elif event == "open" and isinstance(args[0], str | bytes):
            path, flags = os.path.realpath(os.fsdecode(args[0])), args[2] or 0
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if not path.startswith(self.folder) and (writes or not path.startswith(_READ_ONLY)):
                self.seen = f"open {path} {'to write' if writes else 'to read'}"


def problem_of(message: str) -> str:
    """Why a message is not what a QuantkitError says; empty when it is."""
    lines = message.splitlines()
    if not lines or len(message) > 150_000 or not all(line.isprintable() for line in lines):
        return "empty, too long, or with characters that steer a terminal"
    listed = lines[0].endswith(" problems:") and all(line.startswith("  - ") for line in lines[1:])
    if not listed and len(lines) > 1 and not lines[0].startswith("engine "):
        return f"{len(lines)} lines"
    return "" if ":" in message else "no remedy"


def attempt(case: Any, rng: Random, watch: Watch | None = None, data: bytes | None = None) -> str:
    """Make one hostile file and read it: `accepted`, or `refused`.

    Raises:
        Hole: anything else.
    """
    from quantkit.errors import QuantkitError

    data = case.mutate(rng) if data is None else data
    case.file.write_bytes(data)
    begin_s, outcome = time.process_time(), "accepted"
    try:
        if watch:
            watch.on = True
        case.read(rng)
    except QuantkitError as error:
        outcome = "refused"
        if wrong := problem_of(str(error)):
            raise Hole(f"the message is {wrong}: {error}"[:2000]) from error
    except Exception as error:
        raise Hole(f"{type(error).__name__}: {error}"[:2000]) from error
    finally:
        if watch:
            watch.on = False
    if watch and watch.seen:
        raise Hole(watch.seen)
    spent = time.process_time() - begin_s
    if spent > SECONDS:
        raise Hole(f"it took {spent:.0f} s of processor time")
    return outcome


def run(name: str, first: int, count: int, seed: int, folder: Path, found: Any) -> None:
    """Inputs `first` to `first + count` of a format, in this process; what came of them goes into `found`."""
    import torch

    torch.set_num_threads(1)
    from tests.hostile.formats import FORMATS

    tempfile.tempdir = str(folder)  # transformers converts a GGUF file's tokenizer by way of a temporary file
    case = FORMATS[name](folder)
    warm = Random(0)
    for _ in range(3):  # what is imported once is no input's
        case.file.write_bytes(case.mutate(warm))
        try:
            case.read(warm)
        except Exception:  # noqa: BLE001  (counted below)
            continue
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    watch, outcomes, slowest = Watch(folder), Counter[str](), (0.0, 0)
    for number in range(first, first + count):
        found["at"] = number
        signal.alarm(300)  # a loop in a library ends the process, and the number says where
        begin_s = time.monotonic()
        try:
            outcomes[attempt(case, Random(f"{seed} {name} {number}"), watch)] += 1
        except Hole as hole:
            found["hole"] = f"{hole}\n{traceback.format_exc(limit=-8)}"
            kept = folder.parent / f"hole-{name.replace(' ', '-')}-{number}"
            kept.write_bytes(case.file.read_bytes())
            break
        slowest = max(slowest, (time.monotonic() - begin_s, number))
        if number % 100 == 0:
            found.update(outcomes)
    signal.alarm(0)
    found.update(outcomes)
    found["slowest_s"], found["slowest"] = slowest
    found["grown_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def fuzz(name: str, first: int, count: int, seed: int, scratch: Path) -> dict[str, Any]:
    """Inputs of a format in a process of its own; what came of them, a hole or the signal that ended it among it."""
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="hostile-", dir=scratch))
    context = multiprocessing.get_context("fork")  # what it reads with is imported once: that takes ten seconds
    with context.Manager() as manager:
        found = manager.dict()
        begin_s = time.monotonic()
        child = context.Process(target=run, args=(name, first, count, seed, folder, found))
        child.start()
        child.join()
        told = dict(found) | {"seconds": time.monotonic() - begin_s}
    shutil.rmtree(folder, ignore_errors=True)
    if child.exitcode and "hole" not in told:
        told["hole"] = f"the process ended with {child.exitcode} at input {told.get('at')}"
    return told


def main() -> int:
    """Fuzz what is asked for; 1 where there is a hole."""
    from tests.hostile.formats import FORMATS

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--format", action="append", choices=list(FORMATS), help="only this one; may be repeated")
    parser.add_argument("--inputs", type=int, default=1000, help="of each format")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    holes = 0
    print("| format | inputs | accepted | refused | seconds | slowest, s | grown, MB |", flush=True)
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in options.format or FORMATS:
        told = fuzz(name, options.first, options.inputs, options.seed, options.scratch)
        accepted, refused = told.get("accepted", 0), told.get("refused", 0)
        print(
            f"| {name} | {accepted + refused} | {accepted} | {refused} | {told['seconds']:.0f} | "
            f"{told.get('slowest_s', -1):.2f} | {told.get('grown_mb', -1):.0f} |", flush=True,
        )  # fmt: skip
        if "hole" in told:
            holes += 1
            print(f"HOLE in {name}, input {told.get('at')}: {json.dumps(told['hole'])[:4000]}", flush=True)
    return 1 if holes else 0


if __name__ == "__main__":
    sys.exit(main())
