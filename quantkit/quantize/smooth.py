"""Which scale for each input, where GPTQ chooses the integers: what AWQ searches for, by the error that GPTQ leaves.

Multiplying a weight's columns by s and dividing its inputs by s changes nothing but the grids (SmoothQuant, arXiv
2211.10438, section 4; AWQ, arXiv 2306.00978, section 3.2). AWQ takes s from the inputs' magnitudes, one exponent for
all, and counts the error of rounding to nearest. With GPTQ an error in one input is made up for by the inputs that are
rounded after it; what is left of it is D_i e_i^2, where D_i = 1 / U_ii^2 is the input's variance given those (the pivot
that GPTQ divides by). The error e_i is in proportion to the step of its group's grid, so that the loss is

    sum over groups g of (sum of D_i / s_i^2 over the group) (sum over rows r of the squared spread of w_ri s_i)

which is smooth in log s where the spread is, and its gradient is followed.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.quantize.gptq import input_order, inverse_factor

STEPS = 100
RATE = 0.05  # of Adam, in log s; falls linearly to 0
NORM = 4  # of the spread: between the root mean square, and the range, of which clip search takes the outermost off
MAX_ROWS = 1024  # rows that are looked at, evenly spread
TINY = torch.finfo(torch.float32).tiny  # a row of zeros has no slope


class Smoothing(NamedTuple):
    """scale_I: float32 [in_features], positive, sqrt(max * min) = 1. Multiply the weight's columns by it.

    loss: the modelled loss with it, as a fraction of that without.
    """

    scale_I: Tensor
    loss: float


def smoothing_scale(
    weight_OI: Tensor,
    hessian_II: Tensor,
    *,
    group_size: int,
    damping: float = 0.01,
    tie: Callable[[Tensor], Tensor] | None = None,
) -> Smoothing:
    """The scale under which GPTQ is left with the least error, as far as the model above says.

    weight_OI: [out_features, in_features], the rows weighted by the root of what the loss makes of their errors.
    hessian_II: [in_features, in_features], the Gram matrix that GPTQ will be given, before any scaling.
    damping: GPTQ's.
    tie: maps a positive scale to one that the producer of the inputs can take in, for example equal over the query
        heads that share a value head; it must commute with a constant factor, and be differentiable.

    A scale of ones is kept where nothing better is found. Raises ValueError as `gptq` does.
    """
    rows, in_features = weight_OI.shape
    seen_OI = weight_OI[:: max(rows // MAX_ROWS, 1)].float()
    power_GOi = seen_OI.pow(NORM).unflatten(1, (-1, group_size)).transpose(0, 1).contiguous()
    order_I = input_order(hessian_II)
    factor_II, _ = inverse_factor(hessian_II, order_I, damping, torch.float32)
    left_I = torch.empty(in_features, device=weight_OI.device)
    left_I[order_I] = factor_II.diagonal().square().reciprocal()
    left_I *= hessian_II.diagonal() != 0  # an input that never fired costs nothing

    def loss(log_I: Tensor) -> Tensor:
        scale_I = log_I.exp() if tie is None else tie(log_I.exp())
        power_GO = (power_GOi @ scale_I.pow(NORM).view(-1, group_size, 1))[..., 0].clamp_min(TINY)
        cost_G = (left_I / scale_I.square()).view(-1, group_size).sum(-1)
        total: Tensor = (cost_G * power_GO.pow(2 / NORM).sum(1)).sum()
        return total.clamp_min(TINY).log()

    log_I = torch.zeros(in_features, device=weight_OI.device, requires_grad=True)
    adam = torch.optim.Adam([log_I], lr=RATE)
    with torch.enable_grad():
        for step in range(STEPS):
            adam.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
            adam.zero_grad()
            loss(log_I).backward()
            adam.step()
    with torch.no_grad():
        gain = float(loss(log_I) - loss(torch.zeros_like(log_I)))
        if not gain < 0:
            return Smoothing(torch.ones_like(log_I), 1.0)
        scale_I = log_I.exp() if tie is None else tie(log_I.exp())
        return Smoothing(scale_I / (scale_I.max() * scale_I.min()).sqrt(), math.exp(gain))
