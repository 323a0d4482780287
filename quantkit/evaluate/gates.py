"""The limits that a candidate must keep, and what to say when it does not."""

from typing import NamedTuple


class Gate(NamedTuple):
    """One limit: a measured value must not exceed it."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the value keeps the limit; NaN never does."""
        return self.value <= self.limit

    def sentence(self) -> str:
        """The verdict in one line."""
        verdict = "within" if self.passed else "over"
        return f"{self.name} is {self.value:.2%}, {verdict} the limit of {self.limit:.2%}"
