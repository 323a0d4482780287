"""One question that a bundle or a server was asked, and the answers of tools that need not be on this machine."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

_TIMEOUT_S = 120
_SAID = 4000  # characters of what a tool complained of; promtool prints all that it expected and all that it saw


class Check(BaseModel):
    """One question, whether the answer is good, and what was seen.

    What could not be asked has not passed, except of a tool that gives a second opinion on a file of the bundle and is
    not here: then `detail` begins with "not asked".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    passed: bool
    detail: str


def of_problems(name: str, problems: Sequence[str], *, good: str = "nothing to complain of") -> Check:
    """The check that these problems fail, or none."""
    return Check(name=name, passed=not problems, detail="; ".join(problems) or good)


def find_tool(name: str) -> str | None:
    """A program beside this Python or on PATH; /usr/sbin too, where Debian keeps servers and users have no PATH to."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.is_file() else shutil.which(name) or shutil.which(name, path="/usr/sbin")


def ask_tool(name: str, command: Sequence[str | Path], *, cwd: Path, install: str) -> Check:
    """What a tool says of a file: whether it exits with 0, and the beginning of what it prints where not.

    install: how to get the tool, said where it is not here.
    """
    tool = find_tool(str(command[0]))
    if tool is None:
        return Check(name=name, passed=True, detail=f"not asked: {command[0]} is not here ({install})")
    try:
        run = subprocess.run(
            [tool, *map(str, command[1:])], cwd=cwd, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Check(name=name, passed=False, detail=f"{command[0]} did not answer within {_TIMEOUT_S} s")
    said = " ".join((run.stdout + run.stderr).split())[:_SAID]
    return Check(name=name, passed=run.returncode == 0, detail=said if run.returncode else f"accepted by {command[0]}")
