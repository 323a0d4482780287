"""Which integers, by GPTQ: round one input column at a time, and let the columns left make up for its error.

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers,
arXiv 2210.17323.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.formats import Grid, QuantizedWeight
from quantkit.quantize.grid import check_hessian, fit_grid, minmax_grid

MAX_DAMPING = 1.0  # past this the Hessian says less than its damping does
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
) -> GptqResult:
    """Quantizes a weight so that its outputs on the calibration inputs change least (Algorithm 1).

    Round each column to its grid, divide the error by the pivot, and subtract its share from every column not
    yet rounded (eq. 2-3, with the inverse Hessians of the remaining sets read off one Cholesky factor).

    weight_OI: [out_features, in_features], any float dtype; computed in float32, or in float64 if it is
        that; left as it is. Rows do not touch each other: linears that share an input may be stacked, and
        then share the cost of the Cholesky factor.
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

    if act_order:
        grid = find_grid(weight_OI, hessian_II)
        order_I = hessian_II.diagonal().argsort(descending=True, stable=True)
        blocks = _blocks(in_features, in_features, block_size)
    else:
        # Shape, and a check of the input, before the loop finds each group's own.
        grid = minmax_grid(weight_OI, bits=bits, group_size=group_size, symmetric=symmetric)
        order_I = torch.arange(in_features, device=weight_OI.device)
        blocks = _blocks(in_features, group_size, block_size)
    # Rows and columns of the Hessian go with the columns of the weight.
    factor_II, damping = _inverse_factor(hessian_II[order_I][:, order_I], damping, dtype)
    pivots = factor_II.diagonal().tolist()
    groups = (order_I // group_size).tolist()

    # Transposed, so that a column of the weight is contiguous.
    columns_IO = weight_OI.T[order_I].contiguous()
    integers_IO = torch.empty_like(columns_IO, dtype=torch.uint8)
    scale_GO = grid.scale_OG.T.contiguous()
    zero_point_GO = grid.zero_point_OG.T.float().contiguous()
    for start, stop in blocks:
        errors_bO = torch.empty_like(columns_IO[start:stop])
        for i in range(start, stop):
            group = groups[i]
            if not act_order and i % group_size == 0:
                members = slice(i, i + group_size)
                found = find_grid(columns_IO[members].T, hessian_II[members, members])
                scale_GO[group], zero_point_GO[group] = found.scale_OG[:, 0], found.zero_point_OG[:, 0]
            scale_O, zero_point_O = scale_GO[group], zero_point_GO[group]
            levels_O = torch.div(columns_IO[i], scale_O).round_().add_(zero_point_O).clamp_(0, 2**bits - 1)
            integers_IO[i] = levels_O
            rounded_O = levels_O.sub_(zero_point_O).mul_(scale_O)
            error_O = torch.sub(columns_IO[i], rounded_O, out=errors_bO[i - start]).div_(pivots[i])
            columns_IO[i + 1 : stop].addr_(factor_II[i, i + 1 : stop], error_O, alpha=-1)
        columns_IO[stop:].addmm_(factor_II[start:stop, stop:].T, errors_bO, alpha=-1)

    integers_OI = torch.empty_like(weight_OI, dtype=torch.uint8)
    integers_OI[:, order_I] = integers_IO.T
    grid = grid._replace(scale_OG=scale_GO.T.contiguous(), zero_point_OG=zero_point_GO.T.int().contiguous())
    return GptqResult(QuantizedWeight(integers_OI, grid), int(dead_I.sum()), damping)


def shrunk(gram_II: Tensor, share: float) -> Tensor:
    """(1 - share) H + share diag(H): the Gram matrix with its off-diagonal part taken for partly chance.

    A Gram matrix of few tokens understates the directions that they happened not to take, and GPTQ puts the errors just
    there. Linear shrinkage (Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance matrices,
    2004) towards the diagonal leaves each input's own energy as it was seen; damping adds to all inputs alike.

    Raises ValueError when share is not in 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}: choose 0 to 1")
    if share == 0:
        return gram_II
    mixed_II = gram_II * (1 - share)
    mixed_II.diagonal().copy_(gram_II.diagonal())
    return mixed_II


def usual_shrinkage(in_features: int, tokens: int) -> float:
    """How much to shrink a Gram matrix of so many tokens: 1 / (1 + tokens / (12 in_features)).

    The chance in it falls as one over the tokens, as the optimum of Ledoit and Wolf does; the factor is a measurement
    (docs/quantize.md). A half at 12 tokens an input, a sixth at 64: 128 windows of 2048 for 4096 inputs.
    """
    return 1 / (1 + tokens / (12 * in_features))


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


def _inverse_factor(hessian_II: Tensor, damping: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Upper triangular U with U^T U = (H + damping * mean diagonal * I)^-1; and the damping that it took.

    Row i of U, divided by its pivot, is the first row of the inverse of the Hessian of columns i and after,
    divided by its first element: what eq. 3 multiplies the error with.
    """
    working_dtype = torch.float64 if hessian_II.shape[0] <= FLOAT64_IN_FEATURES else dtype
    hessian_II = hessian_II.to(working_dtype, copy=True)
    diagonal_I = hessian_II.diagonal()  # a view: writes go to the Hessian
    live = int((diagonal_I != 0).sum())
    mean = float(diagonal_I.sum()) / max(live, 1)
    diagonal_I[diagonal_I == 0] = 1
    undamped_I = diagonal_I.clone()
    identity_II = torch.eye(hessian_II.shape[0], dtype=hessian_II.dtype, device=hessian_II.device)
    while True:
        diagonal_I.copy_(undamped_I + damping * mean)
        # H = R R^T with R upper is the Cholesky factor of H with both axes reversed, reversed back; U = R^-1.
        # The same U as inverting H and factoring the inverse, for half the work, and without squaring the
        # condition number.
        lower_II, info = torch.linalg.cholesky_ex(hessian_II.flip(0, 1))
        if int(info) == 0:
            factor_II = torch.linalg.solve_triangular(lower_II.flip(0, 1), identity_II, upper=True).to(dtype)
            if torch.isfinite(factor_II).all():
                return factor_II.contiguous(), damping
        if damping >= MAX_DAMPING:
            raise ValueError(
                f"the Hessian is not positive definite, even with {damping:g} of its mean diagonal added: "
                "calibrate on more, or more varied, tokens"
            )
        damping = min(damping * 10 if damping else 0.01, MAX_DAMPING)
