"""Child processes: what they inherit, how their logs are read, and that none of them outlives who started it."""

import os
import re
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from quantkit import provenance

_TICK_S = 0.1
_KEEPER = Path(__file__).with_name("keeper.py")


class Spent(NamedTuple):
    """What a process and its children took. The memory is theirs together, sampled."""

    exit_code: int
    wall_s: float
    cpu_s: float
    peak_memory_bytes: int


def passed_on(names: Iterable[str]) -> dict[str, str]:
    """The caller's environment variables of these names, and no others."""
    return {name: os.environ[name] for name in names if name in os.environ}


def start(command: Sequence[str | Path], **settings: Any) -> "subprocess.Popen[Any]":
    """`subprocess.Popen` in a session of its own. Its group ends when this process does, by SIGKILL too.

    It also ends when what is returned is forgotten: hold it as long as the child is wanted.
    """
    told, held = os.pipe()
    keeper = [sys.executable, "-I", "-S", str(_KEEPER), str(told)]
    try:
        child = subprocess.Popen(
            [*keeper, *map(str, command)], pass_fds=(told,), start_new_session=True, **settings
        )  # fmt: skip
    except BaseException:
        os.close(held)
        raise
    finally:
        os.close(told)
    weakref.finalize(child, os.close, held)
    return child


def run_logged(
    command: Sequence[str | Path], *, env: Mapping[str, str], folder: Path, log: Path, append: bool = False,
    on_tick: Callable[[float, str], None] = lambda seconds, line: None,
) -> Spent:  # fmt: skip
    """Run a command in `folder` to its end, in a process group of its own, with all that it prints in `log`.

    `on_tick(seconds, last line of the log)` is called while it runs. Its standard input is a pipe that says nothing and
    ends with this process. Whatever ends the wait, Ctrl-C or SIGKILL too, ends the whole group.
    """
    begin_s, peak_bytes = time.monotonic(), 0
    with log.open("a" if append else "w") as stream:
        child = start(
            command, cwd=folder, env=dict(env), stdin=subprocess.PIPE, stdout=stream, stderr=subprocess.STDOUT
        )
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


DONE = "done"  # what a worker answers where it has done what it was asked


class Worker:
    """A child that takes jobs one after the other: a line each on its standard input, a line back when it is done."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("w") as stream:
            self.process = start(
                command, env=dict(env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True
            )

    def ask(self, line: str, on_tick: Callable[[], None] = lambda: None) -> bool:
        """Have it do a job; whether it did. One that failed has ended, and so have all its children."""
        child: subprocess.Popen[str] = self.process
        answer = ""
        assert child.stdin is not None and child.stdout is not None
        try:
            with suppress(BrokenPipeError):
                child.stdin.write(f"{line}\n")
                child.stdin.flush()
            while child.poll() is None and not select.select([child.stdout], [], [], 0.5)[0]:
                on_tick()
            answer = child.stdout.readline().strip()
        finally:
            if answer != DONE:  # it failed, or Ctrl-C: nothing of it may outlive what asked it
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
        on_tick()
        return answer == DONE

    def close(self) -> None:
        """Tell it that there are no more jobs, and wait until it has ended."""
        child = self.process
        assert child.stdin is not None and child.stdout is not None
        with suppress(BrokenPipeError):
            child.stdin.close()
        try:
            child.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        child.stdout.close()


def answer(run: Callable[[Path], None]) -> None:
    """Run what lies in the folders that standard input names, a line each; standard output says when each is done."""
    # What vLLM and its libraries print goes to the log; standard output belongs to the conversation.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        run(Path(line.rstrip("\n")))
        answers.write(f"{DONE}\n")


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
