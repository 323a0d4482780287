"""What the scores of all tokens come to: the measures of one candidate on one set of text."""

from typing import Any

import torch
from torch import Tensor

from quantkit.evaluate import perplexity
from quantkit.evaluate.divergence import Scores

_SMALLEST = 1e-6  # nats: KL below it is one bin of the histogram
_BINS = 40


def summarize(scores: Scores) -> dict[str, Any]:
    """Perplexities, drift, KL and agreement, each with its error over sequences; KL by position and as a histogram."""
    kl = scores.kl_N.double()
    means = scores.by_sequence()
    return {
        "scored_tokens": len(kl), "sequences": len(scores.sequence_N.unique()),
        "perplexity": {
            "reference": perplexity.perplexity(scores.reference_nll_N),
            "candidate": perplexity.perplexity(scores.candidate_nll_N),
        },
        "drift": perplexity.drift(scores.reference_nll_N, scores.candidate_nll_N, scores.sequence_N).summary(),
        "kl_nats": perplexity.mean(scores.kl_N, scores.sequence_N).summary() | {
            "median": float(kl.quantile(0.5)), "p99": float(kl.kthvalue(max(round(0.99 * len(kl)), 1)).values),
            "by_position": _by_position(kl, scores.position_N), "histogram": _histogram(kl),
        },
        "top1_agreement": perplexity.mean(scores.same_top1_N, scores.sequence_N).summary(),
        "top5_agreement": perplexity.mean(scores.same_top5_N, scores.sequence_N).summary(),
        "perplexity_by_position": [
            [begin, first, second] for (begin, first), (_, second) in zip(
                _by_position(scores.reference_nll_N.double(), scores.position_N, of=torch.exp),
                _by_position(scores.candidate_nll_N.double(), scores.position_N, of=torch.exp), strict=True,
            )
        ],
        "drift_by_sequence": (means["candidate_nll"] - means["reference_nll"]).expm1().tolist(),
    }  # fmt: skip


def _by_position(values_N: Tensor, position_N: Tensor, of: Any = lambda mean: mean) -> list[list[float]]:
    """The mean in bins of positions that double in width from 16 on: a bin's first position, and its mean."""
    found = []
    begin, end = 1, 16
    while begin <= int(position_N.max()):
        inside = (position_N >= begin) & (position_N < end)
        if inside.any():
            found.append([begin, float(of(values_N[inside].mean()))])
        begin, end = end, 2 * end
    return found


def _histogram(kl_N: Tensor) -> dict[str, list[float]]:
    top = max(float(kl_N.max()), 10 * _SMALLEST)
    edges = torch.logspace(
        float(torch.tensor(_SMALLEST).log10()), float(torch.tensor(top).log10()), _BINS + 1, dtype=torch.float64
    )
    edges[-1] = max(float(edges[-1]), top)
    counts = torch.histogram(kl_N.clamp(min=_SMALLEST), edges).hist
    return {"edges": edges.tolist(), "counts": counts.tolist()}
