"""What the user did that cannot work, said in one line with the remedy; the CLI turns it into an exit code."""

from collections.abc import Sequence


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
    """Raise one QuantkitError that holds every problem, so that the user mends them in one go."""
    if len(problems) == 1:
        raise QuantkitError(problems[0])
    if problems:
        raise QuantkitError(f"{len(problems)} problems:\n" + "\n".join(f"  - {line}" for line in problems))
