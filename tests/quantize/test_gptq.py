"""GPTQ against optimal brain quantization written straight from its definition, integer for integer."""

import pytest
import torch
from torch import Tensor

from quantkit.formats import Grid, QuantizedWeight, dequantize
from quantkit.quantize.gptq import MAX_DAMPING, gptq
from quantkit.quantize.grid import fit_grid, minmax_grid, round_to_grid


def problem(seed: int, out_features: int = 8, in_features: int = 24) -> tuple[Tensor, Tensor]:
    """A weight, and the Gram matrix of correlated inputs of very different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(out_features, in_features, generator=generator) * 0.05
    inputs = torch.randn(100, in_features, generator=generator)
    inputs = inputs @ torch.randn(in_features, in_features, generator=generator)
    inputs *= torch.randn(in_features, generator=generator).exp()
    return weight_OI, inputs.T @ inputs


def output_error(weight_OI: Tensor, quantized: QuantizedWeight, hessian_II: Tensor) -> float:
    error_OI = (dequantize(quantized) - weight_OI).double()
    return float(((error_OI @ hessian_II.double()) * error_OI).sum())


def optimal_brain_quantization(
    weight_OI: Tensor,
    hessian_II: Tensor,
    *,
    group_size: int,
    symmetric: bool,
    act_order: bool,
    damping: float,
    clip_search: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, scales and zero points by eq. 2-3: after each column the inverse of what remains, from
    scratch."""
    in_features = weight_OI.shape[1]
    weight_OI, hessian_II = weight_OI.double().clone(), hessian_II.double()
    damped_II = hessian_II + damping * hessian_II.diagonal().mean() * torch.eye(in_features)

    def group_grid(group: int) -> Grid:
        members = slice(group * group_size, (group + 1) * group_size)
        options = {"bits": 4, "group_size": group_size, "symmetric": symmetric}
        weight = weight_OI[:, members].float()
        if clip_search:
            return fit_grid(weight, hessian_II[members, members], **options)  # type: ignore[arg-type]
        return minmax_grid(weight, **options)  # type: ignore[arg-type]

    groups = in_features // group_size
    grids = [group_grid(group) for group in range(groups)]
    remaining = list(range(in_features))
    if act_order:
        remaining.sort(key=lambda column: -float(hessian_II[column, column]))
    integers_OI = torch.zeros(weight_OI.shape, dtype=torch.uint8)
    while remaining:
        column = remaining[0]
        group = column // group_size
        if not act_order and column % group_size == 0:
            grids[group] = group_grid(group)
        scale_O = grids[group].scale_OG[:, 0].double()
        zero_point_O = grids[group].zero_point_OG[:, 0].double()
        level_O = ((weight_OI[:, column] / scale_O).round() + zero_point_O).clamp(0, 15)
        integers_OI[:, column] = level_O.to(torch.uint8)
        inverse = torch.linalg.inv(damped_II[remaining][:, remaining])
        error_O = weight_OI[:, column] - (level_O - zero_point_O) * scale_O
        weight_OI[:, remaining] -= error_O[:, None] / inverse[0, 0] * inverse[0]
        remaining = remaining[1:]
    scale_OG = torch.cat([grid.scale_OG for grid in grids], dim=1)
    return integers_OI, scale_OG, torch.cat([grid.zero_point_OG for grid in grids], dim=1)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip_search", [True, False])
# Blocks that hold several groups, that lie in one group, that fit neither groups nor columns, and all columns
# in one.
@pytest.mark.parametrize(("group_size", "block_size"), [(4, 8), (8, 4), (6, 10), (24, 7), (4, 128)])
def test_integers_equal_optimal_brain_quantization(
    seed: int, act_order: bool, symmetric: bool, clip_search: bool, group_size: int, block_size: int
) -> None:
    weight_OI, hessian_II = problem(seed)
    result = gptq(
        weight_OI.double(),  # so that nothing but a wrong step can tell the two apart, not even a tie
        hessian_II,
        bits=4,
        group_size=group_size,
        symmetric=symmetric,
        act_order=act_order,
        damping=0.01,
        block_size=block_size,
        clip_search=clip_search,
    )
    integers_OI, scale_OG, zero_point_OG = optimal_brain_quantization(
        weight_OI,
        hessian_II,
        group_size=group_size,
        symmetric=symmetric,
        act_order=act_order,
        damping=0.01,
        clip_search=clip_search,
    )
    assert torch.equal(result.quantized.grid.scale_OG, scale_OG)
    assert torch.equal(result.quantized.grid.zero_point_OG, zero_point_OG)
    assert torch.equal(result.quantized.integers_OI, integers_OI)
    assert result.dead_inputs == 0 and result.damping == 0.01


def test_wider_than_the_blocks_that_the_factor_is_inverted_by() -> None:
    weight_OI, hessian_II = problem(3, out_features=4, in_features=300)
    hessian_II += hessian_II.diagonal().mean() * torch.eye(300)  # fewer tokens than inputs: both ways must be exact
    scheme = {"group_size": 60, "symmetric": False, "act_order": True, "damping": 0.01}
    found = gptq(weight_OI.double(), hessian_II, bits=4, **scheme).quantized  # type: ignore[arg-type]
    integers_OI, scale_OG, _ = optimal_brain_quantization(
        weight_OI,
        hessian_II,
        clip_search=True,
        **scheme,  # type: ignore[arg-type]
    )
    assert torch.equal(found.grid.scale_OG, scale_OG)
    assert torch.equal(found.integers_OI, integers_OI)


@pytest.mark.parametrize("act_order", [True, False])
def test_float32_gives_the_integers_of_float64_but_for_ties(act_order: bool) -> None:
    weight_OI, hessian_II = problem(4, out_features=32)
    scheme = {"bits": 4, "group_size": 12, "symmetric": False, "act_order": act_order}
    single = gptq(weight_OI, hessian_II, **scheme).quantized  # type: ignore[arg-type]
    double = gptq(weight_OI.double(), hessian_II, **scheme).quantized  # type: ignore[arg-type]
    assert float((single.integers_OI == double.integers_OI).float().mean()) > 0.98


@pytest.mark.parametrize("act_order", [True, False])
def test_output_error_is_far_below_rounding_to_nearest(act_order: bool) -> None:
    weight_OI, hessian_II = problem(5)
    grid = minmax_grid(weight_OI, bits=4, group_size=12, symmetric=False)
    nearest = QuantizedWeight(round_to_grid(weight_OI, grid), grid)
    result = gptq(weight_OI, hessian_II, bits=4, group_size=12, symmetric=False, act_order=act_order)
    ratio = output_error(weight_OI, result.quantized, hessian_II) / output_error(weight_OI, nearest, hessian_II)
    assert ratio < 0.5


def test_a_diagonal_hessian_leaves_rounding_to_nearest() -> None:
    weight_OI, _ = problem(6)
    hessian_II = torch.diag(torch.rand(24, generator=torch.Generator().manual_seed(6)) + 0.1)
    result = gptq(weight_OI, hessian_II, bits=4, group_size=8, symmetric=False)
    grid = fit_grid(weight_OI, hessian_II, bits=4, group_size=8, symmetric=False)
    assert torch.equal(result.quantized.integers_OI, round_to_grid(weight_OI, grid))


def test_stacked_rows_give_the_integers_of_each() -> None:
    (first_OI, hessian_II), (second_OI, _) = problem(7), problem(8, out_features=4)
    both = gptq(torch.cat([first_OI, second_OI]), hessian_II, bits=4, group_size=12, symmetric=True).quantized
    first = gptq(first_OI, hessian_II, bits=4, group_size=12, symmetric=True).quantized
    second = gptq(second_OI, hessian_II, bits=4, group_size=12, symmetric=True).quantized
    assert torch.equal(both.integers_OI, torch.cat([first.integers_OI, second.integers_OI]))


def test_a_factor_on_the_hessian_changes_nothing() -> None:
    weight_OI, hessian_II = problem(9)
    one = gptq(weight_OI, hessian_II, bits=4, group_size=12, symmetric=True).quantized
    other = gptq(weight_OI, hessian_II * 2.0**-12, bits=4, group_size=12, symmetric=True).quantized
    assert torch.equal(one.integers_OI, other.integers_OI)


@pytest.mark.parametrize("act_order", [True, False])
def test_dead_inputs_get_zero_weights_and_do_not_touch_the_rest(act_order: bool) -> None:
    weight_OI, hessian_II = problem(10)
    dead = [3, 17, 18]
    hessian_II[dead] = 0
    hessian_II[:, dead] = 0
    before = weight_OI.clone(), hessian_II.clone()
    result = gptq(weight_OI, hessian_II, bits=4, group_size=8, symmetric=False, act_order=act_order)
    assert result.dead_inputs == 3
    assert (dequantize(result.quantized)[:, dead] == 0).all()
    assert torch.equal(weight_OI, before[0]) and torch.equal(hessian_II, before[1])
    weight_OI[:, dead] = 0
    # Any value on the dead diagonal gives the same integers elsewhere; damping counts live inputs alone.
    hessian_II[dead, dead] = hessian_II.diagonal().sum() / 21
    alive = gptq(weight_OI, hessian_II, bits=4, group_size=8, symmetric=False, act_order=act_order)
    assert torch.equal(result.quantized.integers_OI, alive.quantized.integers_OI)


def test_all_inputs_dead() -> None:
    weight_OI, _ = problem(11)
    result = gptq(weight_OI, torch.zeros(24, 24), bits=4, group_size=8, symmetric=True)
    assert result.dead_inputs == 24
    assert (dequantize(result.quantized) == 0).all()


def test_damping_is_raised_until_the_hessian_is_positive_definite() -> None:
    weight_OI, hessian_II = problem(12)
    mean = float(hessian_II.diagonal().mean())
    lowest = float(torch.linalg.eigvalsh(hessian_II)[0])
    # The lowest eigenvalue becomes -0.05 of the mean diagonal: 0.01 is too little, 0.1 enough.
    vector_I = torch.linalg.eigh(hessian_II).eigenvectors[:, 0]
    hessian_II -= (lowest + 0.05 * mean) * torch.outer(vector_I, vector_I)
    assert gptq(weight_OI, hessian_II, bits=4, group_size=8, symmetric=True).damping == pytest.approx(0.1)


def test_without_damping_a_singular_hessian_gets_some() -> None:
    weight_OI, _ = problem(13)
    result = gptq(weight_OI, torch.ones(24, 24), bits=4, group_size=8, symmetric=True, damping=0.0)
    assert result.damping > 0


def test_a_hessian_that_no_damping_saves_is_refused() -> None:
    weight_OI, hessian_II = problem(14)
    with pytest.raises(ValueError, match=f"not positive definite, even with {MAX_DAMPING:g}"):
        gptq(weight_OI, -hessian_II, bits=4, group_size=8, symmetric=True)


def test_wrong_input_is_named() -> None:
    weight_OI, hessian_II = problem(15)
    with pytest.raises(ValueError, match="in_features 24 is not divisible by group_size 16"):
        gptq(weight_OI, hessian_II, bits=4, group_size=16, symmetric=True)
    with pytest.raises(ValueError, match="in_features 24"):
        gptq(weight_OI, hessian_II[:16, :16], bits=4, group_size=8, symmetric=True)
    with pytest.raises(ValueError, match="infinite or NaN"):
        gptq(weight_OI, hessian_II * torch.inf, bits=4, group_size=8, symmetric=True)
    with pytest.raises(ValueError, match="block_size"):
        gptq(weight_OI, hessian_II, bits=4, group_size=8, symmetric=True, block_size=0)


def _curvature(rows: int, seed: int) -> torch.Tensor:
    """A positive definite matrix whose diagonal falls, so that rows are taken as they stand."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(rows, 3 * rows, generator=generator, dtype=torch.float64)
    factor /= factor.norm(dim=1, keepdim=True)
    scale = torch.linspace(3, 1, rows, dtype=torch.float64)
    return (factor @ factor.T) * scale[:, None] * scale


def test_output_hessians_are_gptq_on_the_kronecker_product() -> None:
    """Row by row it is GPTQ of the weight as one long row, under G x H."""
    rows, inputs, group = 5, 16, 8
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    seen = torch.randn(64, inputs, generator=generator, dtype=torch.float64)
    hessian, curvature = seen.T @ seen, _curvature(rows, 1)
    assert (curvature.diagonal().diff() < 0).all()

    def damped(matrix: torch.Tensor) -> torch.Tensor:
        return matrix + 0.01 * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)

    scheme = {"bits": 4, "group_size": group, "symmetric": False, "act_order": False}
    long = gptq(weight.reshape(1, -1), torch.kron(damped(curvature), damped(hessian)), damping=0, **scheme)
    two_sided = gptq(weight, hessian, output_hessians=[curvature], row_block=1, damping=0.01, **scheme)
    assert torch.equal(long.quantized.integers_OI.reshape(rows, inputs), two_sided.quantized.integers_OI)
    plain = gptq(weight, hessian, damping=0.01, **scheme)
    assert not torch.equal(plain.quantized.integers_OI, two_sided.quantized.integers_OI)


@pytest.mark.parametrize("act_order", [True, False])
def test_output_hessians_lower_what_they_weigh(act_order: bool) -> None:
    rows, inputs = 96, 64
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, inputs, generator=generator)
    seen = torch.randn(256, inputs, generator=generator)
    hessian = seen.T @ seen
    blocks = [_curvature(64, 1).float(), _curvature(32, 2).float()]
    curvature = torch.block_diag(*blocks)
    scheme = {"bits": 4, "group_size": 32, "symmetric": False, "act_order": act_order}

    def error(**given: object) -> float:
        result = gptq(weight, hessian, **scheme, **given)
        wrong = dequantize(result.quantized) - weight
        return float((curvature @ wrong @ hessian).mul(wrong).sum())

    plain, coarse, exact = (
        error(),
        error(output_hessians=blocks, row_block=16),
        error(output_hessians=blocks, row_block=1),
    )
    assert exact < coarse < plain
    assert exact < 0.85 * plain


def test_output_hessians_that_say_nothing_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, seen = torch.randn(24, 32, generator=generator), torch.randn(128, 32, generator=generator)
    scheme = {"bits": 4, "group_size": 16, "symmetric": True}
    plain = gptq(weight, seen.T @ seen, **scheme)
    same = gptq(weight, seen.T @ seen, output_hessians=[3 * torch.eye(16), torch.eye(8)], row_block=5, **scheme)
    assert torch.equal(plain.quantized.integers_OI, same.quantized.integers_OI)
    with pytest.raises(ValueError, match="16 rows where the weight has 24"):
        gptq(weight, seen.T @ seen, output_hessians=[torch.eye(16)], **scheme)
