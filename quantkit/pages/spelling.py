"""How pages write numbers, intervals, seconds and sizes down."""

import math
from collections.abc import Sequence
from typing import Any

UNKNOWN = "\N{EN DASH}"


def known(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def spelled(value: Any, unit: str, sign: str = "") -> str:
    """A number with its unit, as far as it is worth reading; `tokens` and bits have none."""
    if not known(value):
        return UNKNOWN
    if unit == "percent":
        return number(100 * value, f"{sign}.2f") + " %"
    if unit == "nats":
        return number(value, f"{sign}.4f" if abs(value) >= 0.001 or value == 0 else f"{sign}.2g") + " nats"
    return number(value, f"{sign}.2f")


def number(value: Any, form: str) -> str:
    """A number with a true minus sign; a dash where there is none."""
    return format(value, form).replace("-", "\N{MINUS SIGN}") if known(value) else UNKNOWN


def count(value: Any) -> str:
    """A whole number, its thousands apart."""
    return f"{value:,}".replace(",", "\u202f") if known(value) else UNKNOWN


def between(interval: Sequence[float] | None, unit: str) -> str:
    """An interval; nothing where there is none."""
    if not interval or not all(map(known, interval)):
        return ""
    low, high = (spelled(each, unit) for each in interval)
    return f"{low.removesuffix(' %').removesuffix(' nats')} to {high.removesuffix(' nats')}"


def error(value: Any, unit: str) -> str:
    """A standard error; nothing where there is none."""
    return f"± {spelled(value, unit).removesuffix(' nats')}" if known(value) else ""


def size(value: Any) -> str:
    """Bytes."""
    if not known(value):
        return UNKNOWN
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def duration(seconds: Any) -> str:
    """Seconds as milliseconds below ten of them."""
    if not known(seconds):
        return UNKNOWN
    if seconds >= 10:
        return f"{seconds:.1f} s"
    return f"{1000 * seconds:,.0f} ms".replace(",", "\u202f") if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"


def times(value: Any) -> str:
    """A ratio, to read as so many times."""
    return f"{value:.2f}\u00d7" if known(value) else UNKNOWN
