"""Which grid: scales and zero points for the groups of a weight, by range or by clip search.

A linear's weight [out_features, in_features] is cut along in_features into groups of `group_size`. Each
(output row, group) has one scale and one zero point, and its weights become (integer - zero_point) * scale.
Letters in names: O output features, I input features, G groups in a row, i inputs in a group.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.formats import Grid, grouped

FLOAT16_MAX = 65504.0
FLOAT16_TINY = 2.0**-24  # the smallest positive float16, a subnormal: exact in every format's float16 scales
CLIP_CANDIDATES = tuple(1 - step / 20 for step in range(10))  # 1, 0.95, ... 0.55 of the group's range
CLIP_STEP = 0.025  # either side of the best of these that is tried then
CHUNK_ELEMENTS = 1 << 22  # weights that a search holds in float32 at a time: a few buffers of 16 MiB


def minmax_grid(
    weight_OI: Tensor, *, bits: int, group_size: int, symmetric: bool, shrink: float | Tensor = 1.0
) -> Grid:
    """The grid over the range of each group, shrunk towards zero.

    With an asymmetric grid, 2**bits - 1 steps over [min(w, 0), max(w, 0)], so that 0.0 is always on it, even
    in a group whose weights have one sign. With a symmetric one, as many steps over [-max |w|, max |w|], zero
    point 2**(bits - 1); the largest positive weight then lies half a step past the last integer. An all-zero
    group gets scale 1; a scale too small for float16 becomes the smallest float16.

    shrink: a factor in (0, 1] on the range, or a tensor of such factors that broadcasts to [out_features,
        groups].

    Raises ValueError when group_size does not divide in_features, bits are not 2..8, a weight is not finite,
    or a range needs a scale that float16 cannot hold.
    """
    _check(weight_OI, bits, group_size)
    low_OG, high_OG = _range(grouped(weight_OI.float(), group_size), bits)
    scale_OG, zero_point_OG = _scale_and_zero_point(low_OG * shrink, high_OG * shrink, bits, symmetric)
    return Grid(scale_OG, zero_point_OG.int(), bits, group_size, symmetric)


def fit_grid(
    weight_OI: Tensor,
    hessian_II: Tensor | None,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    candidates: Sequence[float] = CLIP_CANDIDATES,
) -> Grid:
    """The min-max grid that is shrunk, group by group, by the candidate of least error (clip search).

    The error of a row's group is e^T H e, with e the rounding error of its weights and H the group's diagonal
    block of hessian_II: the part of the output error (GPTQ, arXiv 2210.17323, eq. 1) that falls within the
    group. Without a Hessian H is the identity. Of equal candidates the first wins.

    hessian_II: [in_features, in_features], the Gram matrix of the linear's inputs in any unit; or None.
    candidates: factors in (0, 1]; with 1 among them the result is never worse than `minmax_grid`. Of several, what
        lies CLIP_STEP to either side of a group's best one is tried as well.

    Raises ValueError as `minmax_grid` does, and when the Hessian has another shape or is not finite.
    """
    _check(weight_OI, bits, group_size)
    if not candidates:
        raise ValueError("clip search needs at least one candidate")
    in_features = weight_OI.shape[1]
    blocks_Gii = None
    if hessian_II is not None:
        check_hessian(hessian_II, in_features)
        blocks_Gii = diagonal_blocks(hessian_II, group_size)
    rows = max(1, CHUNK_ELEMENTS // in_features)
    parts = [
        _fit_rows(grouped(chunk_OI.float(), group_size), blocks_Gii, bits, symmetric, candidates)
        for chunk_OI in torch.split(weight_OI, rows)
    ]
    scale_OG = torch.cat([scale for scale, _ in parts])
    zero_point_OG = torch.cat([zero_point for _, zero_point in parts])
    return Grid(scale_OG, zero_point_OG.int(), bits, group_size, symmetric)


def round_to_grid(weight_OI: Tensor, grid: Grid) -> Tensor:
    """The nearest integers on the grid: uint8 [out_features, in_features]. Halves go to even."""
    weight_OGi = grouped(weight_OI.float(), grid.group_size)
    levels_OGi = torch.div(weight_OGi, grid.scale_OG[..., None]).round_().add_(grid.zero_point_OG[..., None])
    return levels_OGi.clamp_(0, 2**grid.bits - 1).to(torch.uint8).flatten(1)


def check_hessian(hessian_II: Tensor, in_features: int) -> None:
    """ValueError unless hessian_II is [in_features, in_features] and finite throughout."""
    if hessian_II.shape != (in_features, in_features):
        raise ValueError(f"the Hessian is {tuple(hessian_II.shape)} where the weight has in_features {in_features}")
    if not torch.isfinite(hessian_II).all():
        raise ValueError("the Hessian holds infinite or NaN values: the calibration inputs overflowed")


def _check(weight_OI: Tensor, bits: int, group_size: int) -> None:
    if weight_OI.ndim != 2:
        raise ValueError(f"a weight is [out_features, in_features], not {tuple(weight_OI.shape)}")
    if not 2 <= bits <= 8:
        raise ValueError(f"bits is {bits}: choose 2 to 8")
    in_features = weight_OI.shape[1]
    if group_size < 1 or in_features % group_size:
        raise ValueError(f"in_features {in_features} is not divisible by group_size {group_size}")


def _range(weight_xyi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The range of each group, zero included: low <= 0 <= high."""
    low_xy, high_xy = weight_xyi.aminmax(dim=-1)
    low_xy, high_xy = low_xy.clamp_(max=0), high_xy.clamp_(min=0)
    widest = float(torch.maximum(-low_xy, high_xy).max())
    # Not `widest > limit`: a NaN compares false with everything, and must not pass.
    if not widest <= FLOAT16_MAX * (2**bits - 1) / 2:
        raise ValueError(f"the largest weight is {widest}: its scale does not fit in float16")
    return low_xy, high_xy


def _scale_and_zero_point(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """float32 scale and float32 zero point (integral) of ranges low <= 0 <= high, any shape."""
    steps = 2**bits - 1
    spread = torch.maximum(-low, high) * 2 if symmetric else high - low
    scale = torch.where(spread > 0, spread / steps, 1.0)
    # The scale is rounded before the zero point and the integers are found, so that they fit the stored
    # scale, and clamped after the rounding, which takes everything below half the smallest float16 to zero.
    scale = scale.half().float().clamp_(min=FLOAT16_TINY)
    if symmetric:
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    return scale, torch.div(-low, scale).round_().clamp_(0, steps)


def _fit_rows(
    weight_OGi: Tensor, blocks_Gii: Tensor | None, bits: int, symmetric: bool, candidates: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Scale and zero point [rows, groups] of the best candidate, for some rows."""
    weight_GOi = weight_OGi.transpose(0, 1).contiguous()  # groups first: one batched product with their blocks
    low_GO, high_GO = _range(weight_GOi, bits)
    best_scale_GO = torch.ones_like(low_GO)
    best_zero_point_GO = torch.zeros_like(low_GO)
    best_error_GO = torch.full_like(low_GO, torch.inf)
    best_shrink_GO = torch.ones_like(low_GO)

    def attempt(shrink_GO: Tensor) -> None:
        scale_GO, zero_point_GO = _scale_and_zero_point(low_GO * shrink_GO, high_GO * shrink_GO, bits, symmetric)
        scale_GO1, zero_point_GO1 = scale_GO[..., None], zero_point_GO[..., None]
        error_GOi = torch.div(weight_GOi, scale_GO1).round_().add_(zero_point_GO1).clamp_(0, 2**bits - 1)
        error_GOi.sub_(zero_point_GO1).mul_(scale_GO1).sub_(weight_GOi)
        weighted_GOi = error_GOi if blocks_Gii is None else error_GOi @ blocks_Gii
        error_GO = (weighted_GOi * error_GOi).sum(-1)
        better_GO = error_GO < best_error_GO
        for best_GO, found_GO in (
            (best_error_GO, error_GO), (best_scale_GO, scale_GO), (best_zero_point_GO, zero_point_GO),
            (best_shrink_GO, shrink_GO),
        ):  # fmt: skip
            torch.where(better_GO, found_GO, best_GO, out=best_GO)

    for shrink in candidates:
        attempt(torch.full_like(low_GO, shrink))
    if len(candidates) > 1:
        middle_GO = best_shrink_GO.clone()  # the first of the two steps may move the best
        for step in (CLIP_STEP, -CLIP_STEP):
            attempt((middle_GO + step).clamp_(max=1))
    return best_scale_GO.T.contiguous(), best_zero_point_GO.T.contiguous()


def diagonal_blocks(hessian_II: Tensor, group_size: int) -> Tensor:
    """[groups, group_size, group_size] float32: the Hessian among the inputs of each group."""
    groups = hessian_II.shape[0] // group_size
    blocks_iiG = hessian_II.reshape(groups, group_size, groups, group_size).diagonal(dim1=0, dim2=2)
    return blocks_iiG.permute(2, 0, 1).float().contiguous()
