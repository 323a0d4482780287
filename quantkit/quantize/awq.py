"""Which weights to protect, by AWQ: scale inputs that carry much up before rounding, and down again after it.

Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, arXiv 2306.00978.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.formats import QuantizedWeight, dequantize, grouped
from quantkit.quantize.grid import CHUNK_ELEMENTS, check_hessian, fit_grid, minmax_grid, round_to_grid

MAGNITUDE_FLOOR = 1e-4  # an input counts as at least this fraction of the largest: no division by zero


class ScaleSearch(NamedTuple):
    """What `search_scale` found.

    scale_I: float32 [in_features], positive. Multiply the weights' columns by it, divide the inputs by it.
    error, error_unscaled: the summed output error with scale_I and with no scale, in the unit of the Hessian.
    exponent: the alpha of eq. 5; 0 with a scale of ones when nothing was better.
    weight_magnitude: whether the scale was divided by the weights' mean magnitude to the power 1 - alpha.
    """

    scale_I: Tensor
    error: float
    error_unscaled: float
    exponent: float
    weight_magnitude: bool


def search_scale(
    weights: Sequence[Tensor],
    hessian_II: Tensor,
    mean_abs_I: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    steps: int = 20,
    tie: Callable[[Tensor], Tensor] | None = None,
) -> ScaleSearch:
    """The input scale, shared by linears with the same input, that makes rounding change their outputs least.

    Minimises eq. 4 of the paper, || Q(W diag(s)) diag(s)^-1 X - W X ||^2 summed over the linears, over s =
    mean|x|^alpha (eq. 5), and over mean|x|^alpha / mean|w|^(1 - alpha) with |w| as a fraction of its group's
    largest. The error is had from the Gram matrix H of the inputs, as tr((W - Ŵ) H (W - Ŵ)^T), so no module
    is run again. Q rounds to the min-max grid. Scales of ones are a candidate: the result is never worse than
    without a scale.

    weights: one or more [out_features, in_features], any float dtype; computed in float32.
    hessian_II: [in_features, in_features], the Gram matrix of the inputs, before any scaling.
    mean_abs_I: [in_features], the mean magnitude of each input, >= 0.
    steps: alpha goes over 0, 1/steps, ... 1.
    tie: maps a positive scale_I to one that the producer of the inputs can take in, for example equal over
        the query heads that share a value head; it must commute with a constant factor. Candidates pass
        through it.

    Scales are normalised to sqrt(max * min) = 1. Raises ValueError when shapes do not fit or a value is not
    finite.
    """
    if not weights:
        raise ValueError("a scale needs at least one weight")
    in_features = hessian_II.shape[0]
    check_hessian(hessian_II, in_features)
    shapes = [tuple(weight_OI.shape) for weight_OI in weights]
    if any(weight_OI.ndim != 2 or weight_OI.shape[1] != in_features for weight_OI in weights):
        raise ValueError(f"weights {shapes} do not share the in_features {in_features} of the Hessian")
    if mean_abs_I.shape != (in_features,) or not (torch.isfinite(mean_abs_I) & (mean_abs_I >= 0)).all():
        raise ValueError(f"mean_abs_I {tuple(mean_abs_I.shape)} must be {in_features} finite values >= 0")
    if steps < 1:
        raise ValueError(f"steps is {steps}: choose at least 1")
    hessian_II = hessian_II.float()

    def output_error(scale_I: Tensor) -> float:
        total = torch.zeros((), dtype=torch.float64, device=hessian_II.device)
        rows = max(1, CHUNK_ELEMENTS // in_features)
        for chunk_OI in (chunk for weight_OI in weights for chunk in torch.split(weight_OI, rows)):
            chunk_OI = chunk_OI.float()
            scaled_OI = chunk_OI * scale_I
            grid = minmax_grid(scaled_OI, bits=bits, group_size=group_size, symmetric=symmetric)
            rounded_OI = dequantize(QuantizedWeight(round_to_grid(scaled_OI, grid), grid))
            error_OI = rounded_OI.div_(scale_I).sub_(chunk_OI)
            total += (error_OI @ hessian_II).mul_(error_OI).sum(dtype=torch.float64)
        return float(total)

    ones_I = torch.ones(in_features, device=hessian_II.device)
    unscaled = output_error(ones_I)
    best = ScaleSearch(ones_I, unscaled, unscaled, exponent=0.0, weight_magnitude=False)
    for scale_I, exponent, weight_magnitude in _candidates(weights, mean_abs_I.float(), group_size, steps):
        allowed_I = scale_I if tie is None else tie(scale_I)
        allowed_I = allowed_I / (allowed_I.max() * allowed_I.min()).sqrt()
        error = output_error(allowed_I)
        if error < best.error:
            best = ScaleSearch(allowed_I, error, unscaled, exponent, weight_magnitude)
    return best


def awq(weight_OI: Tensor, hessian_II: Tensor, *, bits: int, group_size: int, symmetric: bool) -> QuantizedWeight:
    """Clip search, then round to nearest: the second half of AWQ, for a weight that is scaled already.

    weight_OI: [out_features, in_features], columns multiplied by the scale.
    hessian_II: [in_features, in_features], the Gram matrix of the scaled inputs: H / (s s^T) for inputs
        divided by s.

    Raises ValueError as `fit_grid` does.
    """
    grid = fit_grid(weight_OI, hessian_II, bits=bits, group_size=group_size, symmetric=symmetric)
    return QuantizedWeight(round_to_grid(weight_OI, grid), grid)


def _candidates(
    weights: Sequence[Tensor], mean_abs_I: Tensor, group_size: int, steps: int
) -> Iterator[tuple[Tensor, float, bool]]:
    """(scale_I, exponent, weight_magnitude) of every candidate but the scale of ones."""
    input_I = mean_abs_I / mean_abs_I.max().clamp(min=torch.finfo(torch.float32).tiny)
    input_I = input_I.clamp(min=MAGNITUDE_FLOOR)
    weight_I = _relative_magnitude(weights, group_size).clamp(min=MAGNITUDE_FLOOR)
    for step in range(steps + 1):
        exponent = step / steps
        scale_I = input_I**exponent
        if step > 0:
            yield scale_I, exponent, False
        if step < steps:  # at 1 the weights' part is a constant
            yield scale_I / weight_I ** (1 - exponent), exponent, True


def _relative_magnitude(weights: Sequence[Tensor], group_size: int) -> Tensor:
    """[in_features]: |w| as a fraction of the largest in its row's group, averaged over the rows of all the
    weights."""
    in_features = weights[0].shape[1]
    total_I = torch.zeros(in_features, device=weights[0].device)
    rows = max(1, CHUNK_ELEMENTS // in_features)
    for chunk_OI in (chunk for weight_OI in weights for chunk in torch.split(weight_OI, rows)):
        chunk_OGi = grouped(chunk_OI.float().abs(), group_size)
        largest_OG1 = chunk_OGi.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        total_I += (chunk_OGi / largest_OG1).sum(0).flatten()
    return total_I / sum(weight_OI.shape[0] for weight_OI in weights)
