"""Coordinate descent after GPTQ: less error, and in the end none that a move of one integer or scale makes less."""

import pytest
import torch
from torch import Tensor

from quantkit.formats import QuantizedWeight, dequantize
from quantkit.quantize.descent import descend
from quantkit.quantize.gptq import OUTPUT_DAMPING, gptq
from tests.quantize.test_gptq import problem

DAMPING = 0.01


def damped(matrix: Tensor, damping: float) -> Tensor:
    return matrix.double() + damping * matrix.double().diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)


def error(weight_OI: Tensor, quantized: QuantizedWeight, hessian_II: Tensor, curvature: Tensor) -> float:
    """tr(G E H E^T) from its definition, as the two matrices are damped."""
    error_OI = (dequantize(quantized) - weight_OI).double()
    return float((curvature @ error_OI @ damped(hessian_II, DAMPING) * error_OI).sum())


def curvatures(sizes: list[int]) -> tuple[list[Tensor], Tensor]:
    """Blocks [rows, rows], and the damped matrix that they are the diagonal of."""
    blocks = []
    for seed, size in enumerate(sizes):
        seen = torch.randn(40, size, generator=torch.Generator().manual_seed(seed))
        seen = seen @ torch.randn(size, size, generator=torch.Generator().manual_seed(100 + seed))
        blocks.append(seen.T @ seen)
    return blocks, torch.block_diag(*(damped(block, OUTPUT_DAMPING) for block in blocks))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("sizes", [[], [8], [4, 4]])
def test_it_ends_where_no_move_of_one_integer_or_scale_is_less_error(sizes: list[int], symmetric: bool) -> None:
    weight_OI, hessian_II = problem(3)
    blocks, curvature = curvatures(sizes)
    if not blocks:
        curvature = torch.eye(8, dtype=torch.float64)
    first = gptq(
        weight_OI, hessian_II, bits=4, group_size=8, symmetric=symmetric, damping=DAMPING, output_hessians=blocks
    ).quantized
    found = descend(weight_OI, first, hessian_II, blocks, damping=DAMPING, rounds=50)
    least = error(weight_OI, found, hessian_II, curvature)
    assert least < 0.95 * error(weight_OI, first, hessian_II, curvature)
    assert torch.equal(found.grid.zero_point_OG, first.grid.zero_point_OG)
    assert torch.equal(found.grid.scale_OG, found.grid.scale_OG.half().float())
    for row in range(8):
        for column, move in ((column, move) for column in range(24) for move in (-1, 1)):
            integers_OI = found.integers_OI.int()
            integers_OI[row, column] += move
            if 0 <= integers_OI[row, column] <= 15:
                other = QuantizedWeight(integers_OI.to(torch.uint8), found.grid)
                assert error(weight_OI, other, hessian_II, curvature) > least * (1 - 1e-5)
        for group, factor in ((group, factor) for group in range(3) for factor in (0.99, 1.01)):
            scale_OG = found.grid.scale_OG.clone()
            scale_OG[row, group] *= factor
            other = found._replace(grid=found.grid._replace(scale_OG=scale_OG))
            assert error(weight_OI, other, hessian_II, curvature) > least * (1 - 1e-5)


def test_the_error_falls_with_each_round() -> None:
    weight_OI, hessian_II = problem(5, 32, 256)
    blocks, curvature = curvatures([32])
    quantized = gptq(
        weight_OI, hessian_II, bits=4, group_size=64, symmetric=False, damping=DAMPING, output_hessians=blocks
    ).quantized
    errors = [error(weight_OI, quantized, hessian_II, curvature)]
    for rounds in (0, 1, 2, 4):
        found = descend(weight_OI, quantized, hessian_II, blocks, damping=DAMPING, rounds=rounds)
        errors.append(error(weight_OI, found, hessian_II, curvature))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.95 * errors[0]


@pytest.mark.parametrize("damping", [0.0, DAMPING])
def test_inputs_that_never_fired_and_rows_of_zeros_stay_as_they_are(damping: float) -> None:
    weight_OI, hessian_II = problem(7)
    hessian_II[5], hessian_II[:, 5], weight_OI[3] = 0, 0, 0
    blocks, _ = curvatures([8])
    for output_hessians in ([], blocks, [torch.zeros(8, 8)]):
        first = gptq(
            weight_OI, hessian_II, bits=4, group_size=8, symmetric=False, damping=damping,
            output_hessians=output_hessians,
        ).quantized  # fmt: skip
        found = descend(weight_OI, first, hessian_II, output_hessians, damping=damping, rounds=3)
        assert torch.equal(found.integers_OI[:, 5], first.integers_OI[:, 5])
        assert bool(torch.isfinite(dequantize(found)).all())
        if not output_hessians:
            assert not dequantize(found)[3].any()
