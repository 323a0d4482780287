"""Which integers and scales, after GPTQ: each in turn to where the error is least, the others as they are.

GPTQ rounds each weight once, and knows only what the weights rounded before it left; grids are found before any weight
is rounded. Block coordinate descent goes over both again on the objective of both sides, tr(G E H E^T), with E the
error, H the Gram matrix of the inputs and G the curvature over the outputs: over the integers as CDQuant (arXiv
2406.17542) and QuantEase (arXiv 2309.01885) do for one side, over the scales of a group of inputs by solving for all
rows at once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.formats import QuantizedWeight, dequantize
from quantkit.quantize.gptq import OUTPUT_DAMPING
from quantkit.quantize.grid import FLOAT16_MAX

COLUMNS = 128  # whose gradients are kept up to date at once
PASSES = 2  # over the integers, between two fits of the scales
STEPS, LEFT = 30, 1e-6  # of conjugate gradients: how many at most, and the share of the squared residual that ends them


def descend(
    weight_OI: Tensor,
    quantized: QuantizedWeight,
    hessian_II: Tensor,
    output_hessians: Sequence[Tensor] = (),
    *,
    damping: float,
    rounds: int,
) -> QuantizedWeight:
    """Integers and scales with less error than those given; zero points stay.

    weight_OI: [out_features, in_features], what was rounded.
    hessian_II: [in_features, in_features], as `gptq` was given it; `damping` of its mean diagonal is added. Inputs
        that never fired keep their integers, which stand for zero.
    output_hessians: as `gptq` was given them; without any, every output matters alike and rows do not touch each other.
    rounds: in each the integers are gone over twice, and the scales fitted to them; before the first they are fitted
        once.
    """
    integers_OI, grid = quantized
    hessian_II = hessian_II.float().clone()
    dead_I = hessian_II.diagonal() == 0
    hessian_II.diagonal().add_(damping * hessian_II.diagonal().sum() / max(int((~dead_I).sum()), 1))
    hessian_II.diagonal().masked_fill_(dead_I, 1)
    found = _Found(
        integers_OI.float(), grid.scale_OG.clone(), grid.zero_point_OG.float(),
        dequantize(quantized) - weight_OI.float().masked_fill(dead_I, 0),
    )  # fmt: skip
    sizes = [len(block) for block in output_hessians] or [len(weight_OI)]
    for number, tensors in enumerate(zip(*(tensor.split(sizes) for tensor in found), strict=True)):
        curvature_RR = None
        if output_hessians:
            curvature_RR = output_hessians[number].float().clone()
            curvature_RR.diagonal().add_(OUTPUT_DAMPING * curvature_RR.diagonal().mean())
            curvature_RR.diagonal().masked_fill_(curvature_RR.diagonal() == 0, 1)  # nothing reads any of these rows
        rows = _Found(*tensors)
        _fit_scales(rows, hessian_II, curvature_RR, grid.group_size)
        for _ in range(rounds):
            for _ in range(PASSES):
                _move_integers(rows, hessian_II, curvature_RR, grid.group_size, 2**grid.bits - 1)
            _fit_scales(rows, hessian_II, curvature_RR, grid.group_size)
    return QuantizedWeight(found.levels_OI.to(integers_OI.dtype), grid._replace(scale_OG=found.scale_OG))


class _Found(NamedTuple):
    """What is changed in place: some rows, and what they differ by from the weight."""

    levels_OI: Tensor
    scale_OG: Tensor
    zero_point_OG: Tensor
    error_OI: Tensor


def _move_integers(
    rows: _Found, hessian_II: Tensor, curvature_RR: Tensor | None, group_size: int, highest: int
) -> None:
    """One pass over the inputs. Rows move together where that is less error, else the one that gains most alone."""
    # Transposed, so that what an input reaches is contiguous.
    levels_IR, scale_GR, _, error_IR = (tensor.T.contiguous() for tensor in rows)
    steep_R = torch.ones_like(scale_GR[0]) if curvature_RR is None else curvature_RR.diagonal()
    levels_per_slope_GR = -1 / (scale_GR * steep_R)
    inward_I = hessian_II.diagonal().tolist()
    for start in range(0, len(error_IR), COLUMNS):
        stop = min(start + COLUMNS, len(error_IR))
        slope_bR = hessian_II[start:stop] @ error_IR  # half the gradient
        if curvature_RR is not None:
            slope_bR = slope_bR @ curvature_RR
        for i in range(start, stop):
            group, inward, slope_R = i // group_size, inward_I[i], slope_bR[i - start]
            moves_R = torch.addcmul(levels_IR[i], slope_R, levels_per_slope_GR[group], value=1 / inward)
            moves_R.round_().clamp_(0, highest).sub_(levels_IR[i])
            moving_m = moves_R.nonzero()[:, 0]
            if not len(moving_m):
                continue
            step_m = moves_R[moving_m] * scale_GR[group, moving_m]
            if curvature_RR is None:
                reach_R = torch.zeros_like(slope_R).index_copy_(0, moving_m, step_m)
            else:
                reach_R = step_m @ curvature_RR[moving_m]
                if 2 * step_m.dot(slope_R[moving_m]) + inward * step_m.dot(reach_R[moving_m]) >= 0:
                    gain_m = 2 * step_m * slope_R[moving_m] + inward * steep_R[moving_m] * step_m.square()
                    best = gain_m.argmin()[None]
                    moving_m, step_m = moving_m[best], step_m[best]
                    reach_R = step_m @ curvature_RR[moving_m]
            levels_IR[i, moving_m] += moves_R[moving_m]
            error_IR[i, moving_m] += step_m
            slope_bR.addr_(hessian_II[i, start:stop], reach_R)
    rows.levels_OI.copy_(levels_IR.T)
    rows.error_OI.copy_(error_IR.T)


def _fit_scales(rows: _Found, hessian_II: Tensor, curvature_RR: Tensor | None, group_size: int) -> None:
    """For one group of inputs after another the scales of all rows, by least squares, as float16 holds them.

    With V the levels less their zero point, a change d of the group's scales adds d_r V_r to row r's error, and the
    objective is smallest where (G o (V H V^T)) d = -diag(G E H V^T), o the product element by element.
    """
    levels_RI, scale_RG, zero_point_RG, error_RI = rows
    for group in range(scale_RG.shape[1]):
        members = slice(group * group_size, (group + 1) * group_size)
        levels_Ri = levels_RI[:, members] - zero_point_RG[:, group : group + 1]
        slope_Ri = error_RI @ hessian_II[:, members]
        inward_Ri = levels_Ri @ hessian_II[members, members]
        if curvature_RR is None:
            bend_R = (inward_Ri * levels_Ri).sum(1)
            change_R = -(slope_Ri * levels_Ri).sum(1) / bend_R.masked_fill(bend_R == 0, 1)
        else:
            slope_R = ((curvature_RR @ slope_Ri) * levels_Ri).sum(1)
            change_R = _solved(curvature_RR * (inward_Ri @ levels_Ri.T), -slope_R)
        fitted_R = (scale_RG[:, group] + change_R).to(torch.float16).float()
        fitted_R = torch.where((fitted_R > 0) & (fitted_R <= FLOAT16_MAX), fitted_R, scale_RG[:, group])
        error_RI[:, members] += levels_Ri * (fitted_R - scale_RG[:, group])[:, None]
        scale_RG[:, group] = fitted_R


def _solved(matrix_RR: Tensor, right_R: Tensor) -> Tensor:
    """x with A x = b, nearly: conjugate gradients, preconditioned by A's diagonal; each step is nearer than the last.

    Outputs say little of each other, so a few steps are enough, where a factor would take R^3 / 3 operations.
    """
    diagonal_R = matrix_RR.diagonal()
    share_R = 1 / diagonal_R.masked_fill(diagonal_R == 0, 1)
    found_R, left_R = torch.zeros_like(right_R), right_R.clone()
    towards_R = share_R * left_R
    size = first = float(left_R.dot(towards_R))
    for _ in range(STEPS):
        if size <= LEFT * first:
            break
        reach_R = matrix_RR @ towards_R
        bend = float(towards_R.dot(reach_R))
        if bend <= 0:  # as far as float32 tells the matrix from a singular one
            break
        found_R.add_(towards_R, alpha=size / bend)
        left_R.sub_(reach_R, alpha=size / bend)
        scaled_R = share_R * left_R
        before, size = size, float(left_R.dot(scaled_R))
        towards_R = scaled_R.add_(towards_R, alpha=size / before)
    return found_R
