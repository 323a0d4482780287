"""Does a regular expression that somebody else wrote match a name? Answered within a time, or not at all.

Python's `re` has no limit: `(a+)+$` takes longer than the machine will live for a name of forty letters.
"""

import time
from typing import Any

import regex

_SECONDS = 10.0  # of all that one reader matches; a sane pattern takes microseconds


class Patterns:
    """Matches names against patterns, for so long altogether."""

    def __init__(self, seconds: float = _SECONDS) -> None:
        self._seconds = self._left = seconds

    def match(self, pattern: str, name: str, *, whole: bool = False) -> bool:
        """Whether the expression matches the beginning of the name, or all of it where `whole` says so.

        Raises ValueError for what is no expression, and where the time is over.
        """
        begin_s = time.monotonic()
        try:
            compiled: Any = regex.compile(pattern)
            ask = compiled.fullmatch if whole else compiled.match
            return ask(name, timeout=max(self._left, 1e-3)) is not None
        except regex.error as error:
            raise ValueError(f"{pattern[:200]!r} is no regular expression ({error})") from None
        except TimeoutError:
            raise ValueError(f"{pattern[:200]!r} and names took over {self._seconds:g} s to compare") from None
        except (RecursionError, MemoryError, OverflowError) as error:
            raise ValueError(f"{pattern[:200]!r} cannot be compared with names ({type(error).__name__})") from None
        finally:
            self._left -= time.monotonic() - begin_s
