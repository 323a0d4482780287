"""Perplexity and its drift with a standard error over sequences, from per-token nll."""

import math
from typing import NamedTuple

from torch import Tensor


class Drift(NamedTuple):
    """Perplexities of reference and candidate, and how far they are apart as a fraction of the reference's."""

    reference: float
    candidate: float
    drift: float  # candidate / reference - 1
    drift_standard_error: float  # over sequences, paired
    scored_tokens: int
    sequences: int


def drift(reference_nll_ST: Tensor, candidate_nll_ST: Tensor) -> Drift:
    """Drift of the candidate's perplexity, its standard error paired by sequence.

    The two read the same sequences, so what tells is the mean of the per-sequence differences d_s of their mean nll:
    drift = exp(mean d) - 1, and by the delta method its standard error is exp(mean d) * sd(d) / sqrt(S). Sequences
    must be of one length (all windows are). With a single sequence there is no standard error: it is NaN.
    """
    first, second = reference_nll_ST.double(), candidate_nll_ST.double()
    differences = (second - first).mean(-1)
    ratio = math.exp(float(differences.mean()))
    count = len(differences)
    error = float(differences.std(unbiased=True)) / math.sqrt(count) if count > 1 else math.nan
    return Drift(
        reference=math.exp(float(first.mean())), candidate=math.exp(float(second.mean())), drift=ratio - 1,
        drift_standard_error=ratio * error, scored_tokens=first.numel(), sequences=count,
    )  # fmt: skip


def mean_and_error(values_ST: Tensor) -> tuple[float, float]:
    """The mean over all tokens and its standard error over sequences."""
    by_sequence = values_ST.double().mean(-1)
    count = len(by_sequence)
    error = float(by_sequence.std(unbiased=True)) / math.sqrt(count) if count > 1 else math.nan
    return float(by_sequence.mean()), error
