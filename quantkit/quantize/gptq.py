"""Which integers, by GPTQ: round one input column at a time, and let the columns left make up for its error.

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers,
arXiv 2210.17323. With the curvature of the loss over a linear's outputs known as well, the output rows left make up for
the rows before them in the same way: the two-sided rounding of YAQA (Tseng et al., Model-Preserving Adaptive Rounding,
arXiv 2505.22988), for integers on a grid.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.formats import Grid, QuantizedWeight
from quantkit.quantize.grid import check_hessian, fit_grid, minmax_grid

MAX_DAMPING = 1.0  # past this the Hessian says less than its damping does
OUTPUT_DAMPING = 0.01  # of output Hessians, as a fraction of their mean diagonal
FLOAT64_IN_FEATURES = 8192  # up to here the factor is found in float64, for twice the time


class GptqResult(NamedTuple):
    """What `gptq` did.

    dead_inputs: how many inputs calibration never activated; their weights are zero now.
    damping: the fraction of the mean diagonal that was added in the end.
    """

    quantized: QuantizedWeight
    dead_inputs: int
    damping: float


def gptq(
    weight_OI: Tensor,
    hessian_II: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    act_order: bool = True,
    damping: float = 0.01,
    block_size: int = 128,
    clip_search: bool = True,
    output_hessians: Sequence[Tensor] = (),
    row_block: int = 32,
) -> GptqResult:
    """Quantizes a weight so that its outputs on the calibration inputs change least (Algorithm 1).

    Round each column to its grid, divide the error by the pivot, and subtract its share from every column not
    yet rounded (eq. 2-3, with the inverse Hessians of the remaining sets read off one Cholesky factor).

    weight_OI: [out_features, in_features], any float dtype; computed in float32, or in float64 if it is
        that; left as it is. Without output_hessians rows do not touch each other: linears that share an input
        may be stacked, and then share the cost of the Cholesky factor.
    hessian_II: [in_features, in_features], the Gram matrix X^T X of the linear's inputs. Any positive factor
        on it (2 of the loss, 1 / tokens of a mean) changes nothing. Left as it is.
    group_size: divides in_features; in_features for one scale per channel.
    act_order: take columns by descending Hessian diagonal. Grids are then static: found on the original
        weight, and in its column order, so that the result needs no g_idx. Otherwise columns go from left to
        right, and a group's grid is found when the loop reaches it, on weights that already carry the errors
        of the groups before.
    damping: fraction of the mean diagonal (of live inputs) to add to the diagonal, >= 0. Raised tenfold, up
        to MAX_DAMPING, while the Hessian is not positive definite; the result says what it took.
    block_size: columns between two updates of the rest of the weight; speed alone.
    clip_search: `fit_grid` with the group's block of the Hessian; otherwise `minmax_grid`.
    output_hessians: what the loss thinks of errors in the outputs, as the diagonal blocks [rows, rows] of a
        matrix over all of out_features, in the order of the rows; any positive factor on a block changes
        nothing. With them the objective is tr(G E H E^T), G the outputs' and E the error, in place of
        tr(E H E^T).
    row_block: rows of a block of G that are rounded at a time, before the rest makes up for their errors.
        Rows of one such block do not: 1 is exact, more is faster.

    Inputs with H_ii = 0 never fired: their weights become zero, and are counted.

    Deterministic on one device and thread count. Raises ValueError when shapes do not fit, a value is not
    finite, or MAX_DAMPING does not make the Hessian positive definite.
    """
    in_features = weight_OI.shape[-1]
    check_hessian(hessian_II, in_features)
    if block_size < 1 or damping < 0:
        raise ValueError(f"block_size {block_size}, damping {damping}: choose block_size >= 1 and damping >= 0")
    dead_I = hessian_II.diagonal() == 0
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    weight_OI = weight_OI.to(dtype).masked_fill(dead_I, 0)

    def find_grid(weight_OI: Tensor, hessian_II: Tensor) -> Grid:
        if clip_search:
            return fit_grid(weight_OI, hessian_II, bits=bits, group_size=group_size, symmetric=symmetric)
        return minmax_grid(weight_OI, bits=bits, group_size=group_size, symmetric=symmetric)

    # Static grids, or the shape of those that each group finds when the loop reaches it.
    grid = (
        find_grid(weight_OI, hessian_II)
        if act_order
        else minmax_grid(weight_OI, bits=bits, group_size=group_size, symmetric=symmetric)
    )
    order_I = torch.arange(in_features, device=weight_OI.device)
    if act_order:
        order_I = input_order(hessian_II)
    # Rows and columns of the Hessian go with the columns of the weight.
    factor_II, damping = inverse_factor(hessian_II, order_I, damping, dtype)
    columns = _Columns(
        factor_II, order_I, group_size, 2**bits - 1, block_size, None if act_order else hessian_II, find_grid
    )
    if output_hessians:
        integers_OI, scale_OG, zero_point_OG = _by_row_blocks(columns, weight_OI, grid, output_hessians, row_block)
    else:
        integers_OI, _, scale_OG, zero_point_OG = columns.round(weight_OI, grid.scale_OG, grid.zero_point_OG)
    grid = grid._replace(scale_OG=scale_OG.contiguous(), zero_point_OG=zero_point_OG.contiguous())
    return GptqResult(QuantizedWeight(integers_OI, grid), int(dead_I.sum()), damping)


class _Columns(NamedTuple):
    """The loop over input columns, for any rows of the weight."""

    factor_II: Tensor
    order_I: Tensor
    group_size: int
    highest: int  # level
    block_size: int
    hessian_II: Tensor | None  # where a group's grid is found when the loop reaches it
    find_grid: Callable[[Tensor, Tensor], Grid]

    def round(
        self, weight_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Integers, the weights that they stand for, scales and zero points of the rows."""
        in_features = weight_OI.shape[1]
        pivots = self.factor_II.diagonal().tolist()
        groups = (self.order_I // self.group_size).tolist()
        # Transposed, so that a column of the weight is contiguous.
        columns_IO = weight_OI.T[self.order_I].contiguous()
        integers_IO = torch.empty_like(columns_IO, dtype=torch.uint8)
        rounded_IO = torch.empty_like(columns_IO)
        scale_GO = scale_OG.T.to(columns_IO.dtype).contiguous()
        zero_point_GO = zero_point_OG.T.to(columns_IO.dtype).contiguous()
        for start, stop in _blocks(
            in_features, in_features if self.hessian_II is None else self.group_size, self.block_size
        ):
            errors_bO = torch.empty_like(columns_IO[start:stop])
            for i in range(start, stop):
                group = groups[i]
                if self.hessian_II is not None and i % self.group_size == 0:
                    members = slice(i, i + self.group_size)
                    found = self.find_grid(columns_IO[members].T, self.hessian_II[members, members])
                    scale_GO[group], zero_point_GO[group] = found.scale_OG[:, 0], found.zero_point_OG[:, 0]
                scale_O, zero_point_O = scale_GO[group], zero_point_GO[group]
                levels_O = torch.div(columns_IO[i], scale_O).round_().add_(zero_point_O).clamp_(0, self.highest)
                integers_IO[i] = levels_O
                rounded_O = torch.mul(levels_O.sub_(zero_point_O), scale_O, out=rounded_IO[i])
                error_O = torch.sub(columns_IO[i], rounded_O, out=errors_bO[i - start]).div_(pivots[i])
                columns_IO[i + 1 : stop].addr_(self.factor_II[i, i + 1 : stop], error_O, alpha=-1)
            columns_IO[stop:].addmm_(self.factor_II[start:stop, stop:].T, errors_bO, alpha=-1)
        integers_OI, rounded_OI = torch.empty_like(weight_OI, dtype=torch.uint8), torch.empty_like(weight_OI)
        integers_OI[:, self.order_I], rounded_OI[:, self.order_I] = integers_IO.T, rounded_IO.T
        return integers_OI, rounded_OI, scale_GO.T.float(), zero_point_GO.T.int()


def _by_row_blocks(
    columns: _Columns, weight_OI: Tensor, grid: Grid, output_hessians: Sequence[Tensor], row_block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """GPTQ over blocks of rows, where to round a block is GPTQ over the columns; integers, scales, zero points.

    With H = N^-T D N^-1 for the columns and G = M^-T B M^-1 for the rows, N and M lower triangular with ones, the
    objective is the sum of |d|^2 weighted by D and B over what each rounding left, d, while E = -M d N^T. What a row
    left after its own loop over the columns, v = d N^T, is the difference of its target and its rounded weights: the
    rows after it take M v off theirs.
    """
    if sum(map(len, output_hessians)) != len(weight_OI):
        raise ValueError(
            f"output_hessians for {sum(map(len, output_hessians))} rows where the weight has {len(weight_OI)}"
        )
    parts = []  # where the rows of each block of G stand, the most curved first, and its factor in that order
    begin = 0
    for hessian_RR in output_hessians:
        order_R = input_order(hessian_RR)
        factor_RR, _ = inverse_factor(hessian_RR, order_R, OUTPUT_DAMPING, weight_OI.dtype)
        parts.append((begin + order_R, factor_RR))
        begin += len(order_R)
    target_OI = weight_OI.clone()
    integers_OI = torch.empty_like(weight_OI, dtype=torch.uint8)
    scale_OG, zero_point_OG = grid.scale_OG.clone(), grid.zero_point_OG.clone()
    for start in range(0, max(map(len, output_hessians)), row_block):
        now = [rows_R[start : start + row_block] for rows_R, _ in parts]
        rows_B = torch.cat(now)
        integers_OI[rows_B], rounded_BI, scale_OG[rows_B], zero_point_OG[rows_B] = columns.round(
            target_OI[rows_B], scale_OG[rows_B], zero_point_OG[rows_B]
        )
        left = (target_OI[rows_B] - rounded_BI).split([len(rows) for rows in now])
        for (rows_R, factor_RR), left_bI in zip(parts, left, strict=True):
            stop = start + len(left_bI)
            if start < stop < len(rows_R):
                share_br = torch.linalg.solve_triangular(
                    factor_RR[start:stop, start:stop], factor_RR[start:stop, stop:], upper=True
                )
                target_OI[rows_R[stop:]] -= share_br.T @ left_bI
    return integers_OI, scale_OG, zero_point_OG


def _blocks(in_features: int, group_size: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Blocks of at most block_size columns, in order. One that begins a group in its middle holds all of it.

    A group's grid can then be found at the group's first column, from weights that are up to date: either the
    block starts there, and all blocks before are done with, or the group lies in the block.
    """
    span = max(group_size, block_size - block_size % group_size)
    for span_start in range(0, in_features, span):
        span_stop = min(span_start + span, in_features)
        for start in range(span_start, span_stop, block_size):
            yield start, min(start + block_size, span_stop)


def input_order(hessian_II: Tensor) -> Tensor:
    """The order in which inputs are rounded: by descending diagonal of the Hessian."""
    return hessian_II.diagonal().argsort(descending=True, stable=True)


def inverse_factor(hessian_II: Tensor, order_I: Tensor, damping: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Upper triangular U with U^T U = (H + damping * mean diagonal * I)^-1, H the Hessian in that order of its inputs.

    Row i of U, divided by its pivot, is the first row of the inverse of the Hessian of columns i and after,
    divided by its first element: what eq. 3 multiplies the error with. Returns the damping that it took as well.

    For the widest linears these matrices are most of the memory that quantization takes: beside the Hessian there are
    never more than two.
    """
    working_dtype = torch.float64 if hessian_II.shape[0] <= FLOAT64_IN_FEATURES else dtype
    backward_I = order_I.flip(0)
    undamped_I = hessian_II.diagonal()[backward_I].to(working_dtype)
    mean = float(undamped_I.sum()) / max(int((undamped_I != 0).sum()), 1)
    undamped_I[undamped_I == 0] = 1
    while True:
        # H = R R^T with R upper is the Cholesky factor of H with both axes reversed, reversed back; U = R^-1.
        # The same U as inverting H and factoring the inverse, for half the work, and without squaring the
        # condition number.
        flipped_II = hessian_II[backward_I[:, None], backward_I].to(working_dtype)
        flipped_II.diagonal().copy_(undamped_I + damping * mean)
        lower_II, info = torch.linalg.cholesky_ex(flipped_II)
        del flipped_II
        if int(info) == 0:
            _invert_lower(lower_II)
            factor_II = lower_II.to(dtype).flip(0, 1)
            del lower_II  # as flipped as it was: by columns, and copied once more to lie by rows
            factor_II = factor_II.contiguous()
            if all(map(math.isfinite, torch.stack(torch.aminmax(factor_II)).tolist())):
                return factor_II, damping
        if damping >= MAX_DAMPING:
            raise ValueError(
                f"the Hessian is not positive definite, even with {damping:g} of its mean diagonal added: "
                "calibrate on more, or more varied, tokens"
            )
        damping = min(damping * 10 if damping else 0.01, MAX_DAMPING)


def _invert_lower(lower_II: Tensor, *, block: int = 256) -> None:
    """Invert a lower triangular matrix where it stands, by blocks of columns from the last (LAPACK's trtri).

    Two thirds of the operations of solving for the identity, and neither that nor a second matrix beside it.
    """
    size = len(lower_II)
    for start in reversed(range(0, size, block)):
        stop = min(start + block, size)
        inner = slice(start, stop)
        identity_bb = torch.eye(stop - start, dtype=lower_II.dtype, device=lower_II.device)
        inverse_bb = torch.linalg.solve_triangular(lower_II[inner, inner], identity_bb, upper=False)
        lower_II[stop:, inner] = lower_II[stop:, stop:] @ lower_II[stop:, inner] @ inverse_bb.neg()
        lower_II[inner, inner] = inverse_bb
