"""The limits that a candidate must keep, and what to say: passed, failed, or not enough data to tell."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from quantkit.errors import QuantkitError
from quantkit.recipe import Limits, load_limits

Verdict = Literal["passed", "failed", "undecided"]
Unit = Literal["percent", "nats", "tokens"]
_REASON = 1000  # times the sequences there were: more than that nobody will read to settle a gate


class Gate(NamedTuple):
    """One limit, and what was measured: it is kept, or not, where the whole 95 % interval lies on one side of it."""

    name: str
    candidate: str
    value: float
    interval: tuple[float, float] | None  # None: nothing is known of the error
    limit: float
    direction: Literal["at most", "at least"]
    unit: Unit
    sequences: int = 0  # or samples, or texts, that the interval comes from; 0 where they are not of one kind

    @property
    def verdict(self) -> Verdict:
        """NaN is never within a limit."""
        if math.isnan(self.value):
            return "failed"
        if self.interval is None:
            return "undecided"
        low, high = (each - self.limit for each in self.interval)
        if self.direction == "at least":
            low, high = -high, -low
        return "passed" if high <= 0 else "failed" if low > 0 else "undecided"

    @property
    def missing(self) -> int | None:
        """About how many more sequences would settle it, if the value stays where it is; None where none would."""
        gap = abs(self.value - self.limit)
        if self.interval is None or self.sequences < 2 or gap == 0:
            return None
        reach = (self.interval[1] - self.interval[0]) / 2
        needed = math.ceil(self.sequences * (reach / gap) ** 2)
        return max(needed - self.sequences, 1) if needed < _REASON * self.sequences else None

    def sentence(self) -> str:
        """The verdict in one line."""
        said = f"{self.name} is {_spoken(self.value, self.unit)}"
        if self.interval is not None:
            low, high = (_spoken(each, self.unit) for each in self.interval)
            said += f" ({low} to {high})"
        limit = f"the limit of {self.direction} {_spoken(self.limit, self.unit)}"
        if self.verdict != "undecided":
            return f"{said}, {'within' if self.verdict == 'passed' else 'not within'} {limit}"
        if self.interval is None:
            return f"{said}, and a single sequence does not tell whether {limit} is kept: give more"
        more = (
            "no number of them would settle it"
            if self.missing is None
            else f"about {self.missing} more would settle it"
        )
        return f"{said}: not enough sequences to tell whether {limit} is kept; {more}"

    def summary(self) -> dict[str, Any]:
        """For reports."""
        return {
            "name": self.name, "candidate": self.candidate, "value": self.value, "interval": self.interval,
            "limit": self.limit, "direction": self.direction, "unit": self.unit, "verdict": self.verdict,
            "sentence": self.sentence(),
        }  # fmt: skip


def folder() -> Path:
    """Where profiles and tasks are: inside the package when it is installed, `eval/` in a checkout."""
    packaged = Path(__file__).parent / "data"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "eval"


def profile(name: str) -> Limits:
    """The limits of a profile, by its name or as a file.

    Raises:
        QuantkitError: there is none of that name, or it holds something else.
    """
    if name.endswith((".yaml", ".yml")):
        return load_limits(Path(name))
    known = sorted(path.stem for path in folder().glob("*.yaml"))
    if name not in known:
        raise QuantkitError(f"profile {name!r}: choose {', '.join(known)}, or give a .yaml file of limits")
    return load_limits(folder() / f"{name}.yaml")


def judge(candidate: dict[str, Any], limits: Limits) -> list[Gate]:
    """The gates of one candidate, as the report has it: each limit on each set of text where it was measured."""
    kept = candidate["kv_cache"]
    name, gates = candidate["name"] + ("" if kept == "auto" else f", {kept} KV cache"), []

    def gate(what: str, found: dict[str, Any], limit: float | None, direction: Any, unit: Unit, count: int = 0) -> None:
        if limit is not None:
            interval = found["interval"]
            gates.append(Gate(what, name, found["value"], interval and tuple(interval), limit, direction, unit, count))

    for kind, found in candidate["on"].items():
        count = found["sequences"]
        if kind == "text":
            gate("perplexity drift on text", found["drift"], limits.perplexity_drift, "at most", "percent", count)
        gate(f"KL on {kind}", found["kl_nats"], limits.kl, "at most", "nats", count)
        gate(f"top-1 agreement on {kind}", found["top1_agreement"], limits.top1_agreement, "at least", "percent", count)
    for kind, found in (candidate["served"] or {}).items():
        apart = found["gap_nats"]
        farthest = apart["interval"] and _absolute(apart["interval"])
        gate(f"vLLM's nll on {kind}, apart from the weights'", {"value": abs(apart["value"]), "interval": farthest},
             limits.served_gap, "at most", "nats", found["sequences"])  # fmt: skip
    for task in candidate["tasks"]:
        if task["recovery"] is None:
            continue  # the reference scored nothing that could be kept
        if task["standard_error"] is None:
            unsure = {"value": task["recovery"], "interval": None}
            gate(f"recovery of {task['task']}", unsure, limits.task_recovery, "at least", "percent")
            continue
        reach = 1.96 * task["standard_error"]
        recovered = {"value": task["recovery"], "interval": (task["recovery"] - reach, task["recovery"] + reach)}
        gate(f"recovery of {task['task']}", recovered, limits.task_recovery, "at least", "percent", task["samples"])
    if candidate["acceptance"]:
        length = candidate["acceptance"]["accepted_length"]
        reach = 1.96 * _length_error(candidate["acceptance"])
        accepted = {"value": length, "interval": (length - reach, length + reach)}
        gate("the draft's accepted length", accepted, limits.accepted_length, "at least", "tokens")
    return gates


def overall(gates: Sequence[Gate]) -> Verdict:
    """Failed where any gate failed, undecided where any is."""
    found = {gate.verdict for gate in gates}
    return "failed" if "failed" in found else "undecided" if "undecided" in found else "passed"


def _length_error(counted: dict[str, Any]) -> float:
    """The standard error of an accepted length by vLLM's counters, as if every draft stood alone.

    With P_j the share of drafts whose first j tokens were accepted, the mean square of the number accepted is the sum
    of (2 j - 1) P_j.
    """
    shares = counted["per_position"]
    square = sum((2 * j - 1) * share for j, share in enumerate(shares, 1))
    return math.sqrt(max(square - sum(shares) ** 2, 0) / max(counted["drafts"], 1))


def _absolute(interval: Sequence[float]) -> tuple[float, float]:
    """The interval of |x| from that of x."""
    low, high = sorted(abs(each) for each in interval)
    return (0.0 if interval[0] < 0 < interval[1] else low), high


def _spoken(value: float, unit: Unit) -> str:
    return f"{100 * value:.2f} %" if unit == "percent" else f"{value:.4f} nats" if unit == "nats" else f"{value:.2f}"
