"""What the requests of a load took, and how sure that is: percentiles, medians with intervals, ratios by prompt."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

CONFIDENCE = 0.95


class Request(NamedTuple):
    """One answered request, in seconds; `tpot_s` and what it is of need two tokens at least."""

    ttft_s: float
    tpot_s: float | None  # a token after the first
    latency_s: float
    output_tokens: int


class Middle(NamedTuple):
    """A median and the interval that holds it with 95 % certainty; None where there are too few values for one."""

    value: float
    interval: tuple[float, float] | None


def of_client(seen: Mapping[str, Any]) -> list[Request]:
    """The requests of one result of `vllm bench serve --save-detailed`, in the order of its prompts."""
    return [
        Request(ttft, (latency - ttft) / (tokens - 1) if tokens > 1 else None, latency, tokens)
        for ttft, latency, tokens in zip(seen["ttfts"], seen["latencies"], seen["output_lens"], strict=True)
    ]


def median(values: Sequence[float]) -> Middle:
    """The median, and its interval by order statistics: no shape of the distribution is assumed.

    How many values lie below the median is binomial with 1/2: the ranks at its 2.5 % quantiles hold it between them.
    """
    from scipy.stats import binom

    ordered = sorted(values)
    low = int(binom.ppf((1 - CONFIDENCE) / 2, len(ordered), 0.5))
    middle = float(np.median(ordered))
    if low < 1:  # even the smallest and the largest hold it too seldom
        return Middle(middle, None)
    return Middle(middle, (ordered[low - 1], ordered[-low]))


def percentiles(values: Sequence[float]) -> dict[str, Any]:
    """p50 with its interval, p95 and p99, in the unit of the values; nothing of none."""
    if not values:
        return {}
    middle = median(values)
    high = np.percentile(values, [95, 99])
    return {"p50": middle.value, "interval": middle.interval, "p95": float(high[0]), "p99": float(high[1])}


def ratios(without: Sequence[float | None], with_: Sequence[float | None]) -> Middle | None:
    """How many times as long it takes without: the median over pairs of the same prompt in the same round."""
    pairs = [a / b for a, b in zip(without, with_, strict=True) if a is not None and b is not None and b > 0]
    return median(pairs) if pairs else None


def within(request: Request, *, ttft_s: float, tpot_s: float) -> bool:
    """Whether a request kept both limits."""
    return request.ttft_s <= ttft_s and (request.tpot_s or 0.0) <= tpot_s
