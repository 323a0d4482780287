"""Child processes: what they inherit, how their logs are read, and that none of them outlives who started it."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from quantkit import provenance

_TICK_S = 0.1


class Spent(NamedTuple):
    """What a process and its children took. The memory is theirs together, sampled."""

    exit_code: int
    wall_s: float
    cpu_s: float
    peak_memory_bytes: int


def passed_on(names: Iterable[str]) -> dict[str, str]:
    """The caller's environment variables of these names, and no others."""
    return {name: os.environ[name] for name in names if name in os.environ}


def run_logged(
    command: Sequence[str | Path], *, env: Mapping[str, str], folder: Path, log: Path, append: bool = False,
    on_tick: Callable[[float, str], None] = lambda seconds, line: None,
) -> Spent:  # fmt: skip
    """Run a command in `folder` to its end, in a process group of its own, with all that it prints in `log`.

    `on_tick(seconds, last line of the log)` is called while it runs. Its standard input is a pipe that says nothing and
    ends with this process: a child that watches it knows when nobody waits for its result any more. Whatever ends the
    wait, Ctrl-C too, ends the whole group.
    """
    begin_s, peak_bytes = time.monotonic(), 0
    with log.open("a" if append else "w") as stream:
        child = subprocess.Popen(
            [str(word) for word in command], cwd=folder, env=dict(env), stdin=subprocess.PIPE, stdout=stream,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    assert child.stdin is not None
    told_s = 0.0
    try:
        while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            # The kernel's own high-water mark of a child counts what its parent held when it started it.
            peak_bytes = max(peak_bytes, provenance.resident_bytes(child.pid))
            if time.monotonic() - told_s > 0.5:
                told_s = time.monotonic()
                on_tick(told_s - begin_s, (log_tail(log, 1 << 12) or [""])[-1].strip())
            time.sleep(_TICK_S)
    finally:
        # Not yet waited for, the child keeps its number, so this is its group for sure; a child that has ended by
        # itself may have left others behind in it.
        os.killpg(child.pid, signal.SIGKILL)
        child.stdin.close()
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    return Spent(child.returncode, time.monotonic() - begin_s, used.ru_utime + used.ru_stime, peak_bytes)


def telling_line(log: Path) -> str:
    """The line of a log that says best why a process died: its last error that is not the wrapper of an earlier one."""
    lines = log_tail(log, 1 << 18)
    errors = [line for line in lines if _ERROR.search(line) and not _WRAPPER.search(line)]
    return bare((errors or lines or ["it printed nothing"])[-1])[:500]


_ERROR = re.compile(r"\b\w*(Error|Exception|Interrupt)\b: \S|: error: |^ERROR: ")
_WRAPPER = re.compile(r"See root cause above|Engine core initialization failed|WorkerProc initialization failed")
# "(EngineCore pid=12) ERROR 11-23 02:00:00 [core.py:99] " before the text that matters
_PREFIX = re.compile(r"^(\(\S+ pid=\d+\) )?((ERROR|WARNING|INFO) \S+ \S+ (\[\S+\] )?)?")


def bare(line: str) -> str:
    """A log line without its prefix of process, level and time."""
    return _PREFIX.sub("", line).strip()


def log_tail(log: Path, num_bytes: int) -> list[str]:
    """The lines in the last bytes of a log; a carriage return ends a line too."""
    if not log.is_file():
        return []
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - num_bytes))
        text = stream.read().decode(errors="replace")
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]
