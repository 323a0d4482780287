"""Means over tokens with their errors over sequences, and what they make of perplexity and its drift."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

SURE = 0.95  # of every interval, two-sided


class Estimate(NamedTuple):
    """A mean over tokens; `interval` holds the true one in 95 of 100 cases, None where a single sequence is all."""

    value: float
    standard_error: float  # over sequences; NaN with a single one
    interval: tuple[float, float] | None
    sequences: int

    def summary(self) -> dict[str, object]:
        """For reports."""
        return {
            "value": self.value, "standard_error": None if math.isnan(self.standard_error) else self.standard_error,
            "interval": self.interval,
        }  # fmt: skip


def mean(values_N: Tensor, sequence_N: Tensor) -> Estimate:
    """The mean over all tokens; its error is that of sequences drawn anew, whose tokens come together.

    A ratio of two sums over sequences, of values and of tokens: a sequence's part in the error is by how much its
    values are above the mean of as many tokens (Cochran, Sampling Techniques, section 2.11). The interval takes
    Student's t, because sequences are few.
    """
    values, count = values_N.double(), int(sequence_N.max()) + 1
    sums_S = torch.zeros(count, dtype=torch.float64).index_add_(0, sequence_N, values)
    sizes_S = torch.zeros(count, dtype=torch.float64).index_add_(0, sequence_N, torch.ones_like(values))
    present = sizes_S > 0
    sums_S, sizes_S = sums_S[present], sizes_S[present]
    found, sequences = float(sums_S.sum() / sizes_S.sum()), len(sums_S)
    if sequences < 2:
        return Estimate(found, math.nan, None, sequences)
    gaps_S = sums_S - found * sizes_S
    error = math.sqrt(sequences / (sequences - 1) * float(gaps_S.square().sum())) / float(sizes_S.sum())
    reach = error * quantile(sequences)
    return Estimate(found, error, (found - reach, found + reach), sequences)


def quantile(sequences: int) -> float:
    """How many standard errors an interval reaches to either side: of Student's t with one freedom less."""
    from scipy.stats import t

    return float(t.ppf((1 + SURE) / 2, sequences - 1))


def drift(reference_nll_N: Tensor, candidate_nll_N: Tensor, sequence_N: Tensor) -> Estimate:
    """How far the candidate's perplexity is above the reference's, as a fraction of it.

    Both read the same tokens, so what tells is the mean d of the differences of their nll: exp(d) - 1, and by the delta
    method exp(d) times the error of d.
    """
    apart = mean(candidate_nll_N.double() - reference_nll_N.double(), sequence_N)
    ratio = math.exp(apart.value)
    low_high = apart.interval and (math.exp(apart.interval[0]) - 1, math.exp(apart.interval[1]) - 1)
    return Estimate(ratio - 1, ratio * apart.standard_error, low_high, apart.sequences)


def perplexity(nll_N: Tensor) -> float:
    """exp of the mean nll a token."""
    return math.exp(float(nll_N.double().mean()))
