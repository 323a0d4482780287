"""Grids: what they must contain, and clip search against a search written out as loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.formats import Grid, QuantizedWeight, dequantize
from quantkit.quantize import grid as grid_module
from quantkit.quantize.grid import CLIP_CANDIDATES, CLIP_STEP, FLOAT16_TINY, fit_grid, minmax_grid, round_to_grid


def random_weight(seed: int, out_features: int = 6, in_features: int = 32) -> Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) * 0.02


def random_hessian(seed: int, in_features: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(in_features, in_features, generator=generator)
    inputs = torch.randn(4 * in_features, in_features, generator=generator) @ mixing
    return inputs.T @ inputs


def rounded(weight_OI: Tensor, grid: Grid) -> Tensor:
    return dequantize(QuantizedWeight(round_to_grid(weight_OI, grid), grid))


def test_asymmetric_values_by_hand() -> None:
    # Range [-0.5, 1.0] over 15 steps: 0.1, or 0.0999755859375 in float16. 0.5 / 0.09998 rounds to 5.
    weight_OI = torch.tensor([[-0.5, 1.0, 0.0, 0.26]])
    grid = minmax_grid(weight_OI, bits=4, group_size=4, symmetric=False)
    assert grid.scale_OG.tolist() == [[0.0999755859375]]
    assert grid.zero_point_OG.tolist() == [[5]]
    assert round_to_grid(weight_OI, grid).tolist() == [[0, 15, 5, 8]]


def test_symmetric_values_by_hand() -> None:
    # Range [-1.5, 1.5] over 15 steps: 0.2, or 0.199951171875 in float16. 1.5 is 7.5 steps: the last integer.
    weight_OI = torch.tensor([[-1.5, 1.5, 0.0, -0.2]])
    grid = minmax_grid(weight_OI, bits=4, group_size=4, symmetric=True)
    assert grid.scale_OG.tolist() == [[0.199951171875]]
    assert grid.zero_point_OG.tolist() == [[8]]
    # -1.5 is -7.502 stored steps, hence -8.
    assert round_to_grid(weight_OI, grid).tolist() == [[0, 15, 8, 7]]


finite_weights = st.floats(-90000, 90000, width=32) | st.floats(-(2**-20), 2**-20, width=32) | st.just(0.0)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(finite_weights, min_size=16, max_size=16),
    bits=st.sampled_from([2, 4, 8]),
    symmetric=st.booleans(),
    group_size=st.sampled_from([4, 8]),
)
def test_every_grid_is_storable_and_holds_zero(
    values: list[float], bits: int, symmetric: bool, group_size: int
) -> None:
    weight_OI = torch.tensor(values).reshape(2, 8)
    for grid in (
        minmax_grid(weight_OI, bits=bits, group_size=group_size, symmetric=symmetric),
        fit_grid(weight_OI, None, bits=bits, group_size=group_size, symmetric=symmetric),
    ):
        scale_OG, zero_point_OG = grid.scale_OG, grid.zero_point_OG
        assert torch.equal(scale_OG.half().float(), scale_OG)
        assert torch.isfinite(scale_OG).all() and (scale_OG >= FLOAT16_TINY).all()
        assert zero_point_OG.dtype == torch.int32
        assert ((zero_point_OG >= 0) & (zero_point_OG < 2**bits)).all()
        assert not symmetric or (zero_point_OG == 2 ** (bits - 1)).all()
        # Zero is on the grid: its integer stands for exactly 0.0.
        assert (rounded(torch.zeros_like(weight_OI), grid) == 0).all()
        integers_OI = round_to_grid(weight_OI, grid)
        assert integers_OI.dtype == torch.uint8 and (integers_OI.int() < 2**bits).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_error_is_at_most_half_a_step(symmetric: bool) -> None:
    weight_OI = random_weight(0)
    grid = minmax_grid(weight_OI, bits=4, group_size=8, symmetric=symmetric)
    error_OG = (rounded(weight_OI, grid) - weight_OI).abs().reshape(6, 4, 8).amax(-1)
    # The zero point may shift an asymmetric range by half a step more, at its ends.
    assert (error_OG <= grid.scale_OG * (0.51 if symmetric else 1.01)).all()


def test_one_sided_weights_keep_zero_at_an_end() -> None:
    weight_OI = torch.tensor([[0.5, 0.6, 0.7, 0.8], [-0.5, -0.6, -0.7, -0.8]])
    grid = minmax_grid(weight_OI, bits=4, group_size=4, symmetric=False)
    assert grid.zero_point_OG.tolist() == [[0], [15]]
    assert (rounded(weight_OI, grid) - weight_OI).abs().max() < 0.03


def test_all_zero_and_vanishing_groups() -> None:
    weight_OI = torch.tensor([[0.0, 0.0, 1e-9, -1e-9, 3e-7, -3e-7]])
    grid = minmax_grid(weight_OI, bits=4, group_size=2, symmetric=False)
    assert grid.scale_OG.tolist() == [[1.0, FLOAT16_TINY, FLOAT16_TINY]]
    assert rounded(weight_OI, grid)[0, :4].tolist() == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("with_hessian", [True, False])
def test_clip_search_equals_a_search_by_loops(symmetric: bool, with_hessian: bool) -> None:
    weight_OI, hessian_II = random_weight(1), random_hessian(2)
    hessian = hessian_II if with_hessian else None
    found = fit_grid(weight_OI, hessian, bits=4, group_size=8, symmetric=symmetric)
    shrunk = 0
    for row in range(weight_OI.shape[0]):
        for group in range(4):
            members = slice(8 * group, 8 * group + 8)
            weight_1i = weight_OI[row : row + 1, members]
            block_ii = hessian_II[members, members].double() if with_hessian else torch.eye(8).double()
            best_error, best, best_shrink = float("inf"), None, 1.0
            coarse = list(CLIP_CANDIDATES)
            for turn in range(len(coarse) + 2):
                if turn == len(coarse):
                    coarse += [min(best_shrink + CLIP_STEP, 1.0), best_shrink - CLIP_STEP]
                shrink = float(torch.tensor(coarse[turn]))  # as float32 has it
                grid = minmax_grid(weight_1i, bits=4, group_size=8, symmetric=symmetric, shrink=shrink)
                error_i = (rounded(weight_1i, grid) - weight_1i)[0].double()
                error = float(error_i @ block_ii @ error_i)
                if error < best_error:
                    best_error, best, best_shrink = error, grid, shrink
            assert best is not None
            assert found.scale_OG[row, group] == best.scale_OG[0, 0]
            assert found.zero_point_OG[row, group] == best.zero_point_OG[0, 0]
            widest = minmax_grid(weight_1i, bits=4, group_size=8, symmetric=symmetric)
            shrunk += bool(best.scale_OG[0, 0] < widest.scale_OG[0, 0])
    assert shrunk > 4  # or the search would not have been tested


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI, hessian_II = random_weight(3, out_features=7), random_hessian(4)
    whole = fit_grid(weight_OI, hessian_II, bits=4, group_size=16, symmetric=False)
    monkeypatch.setattr(grid_module, "CHUNK_ELEMENTS", 64)
    chunked = fit_grid(weight_OI, hessian_II, bits=4, group_size=16, symmetric=False)
    assert torch.equal(whole.scale_OG, chunked.scale_OG)
    assert torch.equal(whole.zero_point_OG, chunked.zero_point_OG)


def test_shrink_may_differ_by_group() -> None:
    weight_OI = random_weight(5, out_features=2, in_features=16)
    shrink_OG = torch.tensor([[1.0, 0.5], [0.75, 1.0]])
    grid = minmax_grid(weight_OI, bits=4, group_size=8, symmetric=True, shrink=shrink_OG)
    half = minmax_grid(weight_OI, bits=4, group_size=8, symmetric=True, shrink=0.5)
    assert grid.scale_OG[0, 1] == half.scale_OG[0, 1] and grid.scale_OG[0, 0] != half.scale_OG[0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_left_as_they_are(dtype: torch.dtype) -> None:
    weight_OI = random_weight(6).to(dtype)
    before = weight_OI.clone()
    grid = fit_grid(weight_OI, None, bits=4, group_size=8, symmetric=False)
    assert grid.scale_OG.dtype == torch.float32
    assert torch.equal(grid.scale_OG, fit_grid(before.float(), None, bits=4, group_size=8, symmetric=False)[0])
    round_to_grid(weight_OI, grid)
    assert torch.equal(weight_OI, before)


def test_wrong_input_is_named() -> None:
    weight_OI = random_weight(7)
    with pytest.raises(ValueError, match="in_features 32 is not divisible by group_size 12"):
        minmax_grid(weight_OI, bits=4, group_size=12, symmetric=True)
    with pytest.raises(ValueError, match="bits is 9"):
        minmax_grid(weight_OI, bits=9, group_size=8, symmetric=True)
    with pytest.raises(ValueError, match="does not fit in float16"):
        minmax_grid(weight_OI * 1e9, bits=4, group_size=8, symmetric=True)
    with pytest.raises(ValueError, match="nan"):
        fit_grid(weight_OI / 0 * 0, None, bits=4, group_size=8, symmetric=True)
    with pytest.raises(ValueError, match="the Hessian is"):
        fit_grid(weight_OI, torch.eye(8), bits=4, group_size=8, symmetric=True)
    with pytest.raises(ValueError, match="infinite or NaN"):
        fit_grid(weight_OI, torch.full((32, 32), torch.nan), bits=4, group_size=8, symmetric=True)
