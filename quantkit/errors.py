"""What the user did that cannot work, said in one line with the remedy; the CLI turns it into an exit code."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_MOST_PROBLEMS = 50  # of one message: what is wrong with a damaged file may be wrong with every tensor
_MOST_CHARACTERS = 2000  # of one problem


class QuantkitError(Exception):
    """Wrong input or a failed environment. The message names the thing, its value and the remedy."""

    exit_code = 2


class GateFailed(QuantkitError):
    """An evaluation gate said no: the candidate drifted further than its limit."""

    exit_code = 8


class GateUndecided(QuantkitError):
    """An evaluation gate could not tell: the interval of what was measured has the limit inside it."""

    exit_code = 9


def raise_all(problems: Sequence[str]) -> None:
    """Raise one QuantkitError that holds every problem, a line each, so that the user mends them in one go."""
    lines = [one_line(problem) for problem in problems]
    if len(lines) == 1:
        raise QuantkitError(lines[0])
    if len(lines) > _MOST_PROBLEMS:
        lines = [*lines[:_MOST_PROBLEMS], f"and {len(lines) - _MOST_PROBLEMS} more"]
    if lines:
        raise QuantkitError(f"{len(problems)} problems:\n" + "\n".join(f"  - {line}" for line in lines))


def one_line(text: object) -> str:
    """Text in one line of a bounded length, without what would steer a terminal: some of it a stranger wrote."""
    line = " ".join(str(text)[: 2 * _MOST_CHARACTERS].split())
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)
    return line if len(line) <= _MOST_CHARACTERS else f"{line[:_MOST_CHARACTERS]} ..."


@contextmanager
def refusing(what: str, remedy: str) -> Iterator[None]:
    """Say in a line what a library raised at somebody's file: which of its errors that is, no library promises.

    Raises:
        QuantkitError: "{what} ({the error}): {remedy}".
    """
    try:
        yield
    except QuantkitError:
        raise
    except Exception as error:
        raise QuantkitError(f"{what} ({_said(error)}): {remedy}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust; it has no class that can be imported
            raise
        raise QuantkitError(f"{what} ({_said(error)}): {remedy}") from error


def _said(error: BaseException) -> str:
    line = one_line(error)
    return line[:300] if line and not isinstance(error, KeyError) else f"{type(error).__name__} {line[:300]}".strip()
