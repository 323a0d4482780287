"""AWQ: the Gram-matrix error against real inputs, the search against brute force, and what a scale must not
change."""

import pytest
import torch
from torch import Tensor

from quantkit.formats import QuantizedWeight, dequantize
from quantkit.quantize.awq import awq, search_scale
from quantkit.quantize.grid import fit_grid, minmax_grid, round_to_grid

IN_FEATURES = 32


def layer_inputs(seed: int, in_features: int = IN_FEATURES) -> Tensor:
    """[tokens, in_features] with a few channels far larger than the rest, as in a language model."""
    generator = torch.Generator().manual_seed(seed)
    inputs_TI = torch.randn(128, in_features, generator=generator)
    inputs_TI[:, :3] *= torch.tensor([30.0, 12.0, 8.0])
    return inputs_TI


def layer_weights(seed: int, in_features: int = IN_FEATURES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, in_features, generator=generator) * 0.05 for rows in (24, 8, 8)]


def rounded(weight_OI: Tensor, group_size: int, symmetric: bool) -> Tensor:
    grid = minmax_grid(weight_OI, bits=4, group_size=group_size, symmetric=symmetric)
    return dequantize(QuantizedWeight(round_to_grid(weight_OI, grid), grid))


def real_error(weights: list[Tensor], inputs_TI: Tensor, scale_I: Tensor, group_size: int, symmetric: bool) -> float:
    """Eq. 4 by running the inputs through the linears in float64."""
    total = 0.0
    for weight_OI in weights:
        quantized_OI = rounded(weight_OI * scale_I, group_size, symmetric).double()
        got_TO = (inputs_TI.double() / scale_I.double()) @ quantized_OI.T
        total += float((got_TO - inputs_TI.double() @ weight_OI.double().T).square().sum())
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("symmetric", [True, False])
def test_gram_matrix_error_equals_the_error_of_real_outputs(seed: int, symmetric: bool) -> None:
    inputs_TI, weights = layer_inputs(seed), layer_weights(seed)
    found = search_scale(
        weights, inputs_TI.T @ inputs_TI, inputs_TI.abs().mean(0), bits=4, group_size=16, symmetric=symmetric
    )
    ones_I = torch.ones(IN_FEATURES)
    assert found.error == pytest.approx(real_error(weights, inputs_TI, found.scale_I, 16, symmetric), rel=1e-4)
    assert found.error_unscaled == pytest.approx(real_error(weights, inputs_TI, ones_I, 16, symmetric), rel=1e-4)
    assert found.error < 0.8 * found.error_unscaled  # the large channels are worth protecting


def test_search_equals_brute_force() -> None:
    inputs_TI, weights = layer_inputs(3, in_features=4), layer_weights(3, in_features=4)
    mean_abs_I = inputs_TI.abs().mean(0)
    found = search_scale(weights, inputs_TI.T @ inputs_TI, mean_abs_I, bits=4, group_size=2, symmetric=False, steps=5)
    magnitude_OI = torch.cat(weights).abs().reshape(-1, 2, 2)
    magnitude_I = (magnitude_OI / magnitude_OI.amax(-1, keepdim=True)).mean(0).flatten()
    candidates = {}
    for step in range(6):
        alpha = step / 5
        candidates[alpha, False] = mean_abs_I**alpha
        candidates[alpha, True] = mean_abs_I**alpha / magnitude_I ** (1 - alpha)
    scales = {key: scale / (scale.max() * scale.min()).sqrt() for key, scale in candidates.items()}
    errors = {key: real_error(weights, inputs_TI, scale, 2, False) for key, scale in scales.items()}
    best = min(errors, key=lambda key: errors[key])
    assert (found.exponent, found.weight_magnitude) == best
    assert found.error == pytest.approx(errors[best], rel=1e-4)
    assert torch.allclose(found.scale_I, scales[best])
    assert len({round(error, 6) for error in errors.values()}) > 8  # the candidates do differ


def test_a_scale_cancels_exactly_without_rounding() -> None:
    inputs_TI, (weight_OI, *_) = layer_inputs(4).double(), layer_weights(4)
    # Powers of two: scaling is exact in floating point, and so must its undoing be.
    scale_I = 2.0 ** torch.randint(-3, 4, (IN_FEATURES,), generator=torch.Generator().manual_seed(4)).double()
    plain_TO = inputs_TI @ weight_OI.double().T
    assert torch.equal((inputs_TI / scale_I) @ (weight_OI.double() * scale_I).T, plain_TO)


@pytest.mark.parametrize("seed", range(8))
def test_never_worse_than_without_a_scale(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs_TI = torch.randn(64, IN_FEATURES, generator=generator)  # nothing stands out: often nothing to gain
    weights = layer_weights(seed)
    # Magnitudes that have nothing to do with the inputs mislead every candidate but the scale of ones.
    misleading_I = torch.rand(IN_FEATURES, generator=generator) ** 8 * 1e3
    found = search_scale(weights, inputs_TI.T @ inputs_TI, misleading_I, bits=4, group_size=16, symmetric=True)
    assert found.error <= found.error_unscaled
    if found.error == found.error_unscaled:
        assert found.exponent == 0 and torch.equal(found.scale_I, torch.ones(IN_FEATURES))


def test_inputs_that_are_always_zero_get_a_finite_scale() -> None:
    inputs_TI, weights = layer_inputs(5), layer_weights(5)
    inputs_TI[:, 7] = 0
    found = search_scale(
        weights, inputs_TI.T @ inputs_TI, inputs_TI.abs().mean(0), bits=4, group_size=16, symmetric=False
    )
    assert torch.isfinite(found.scale_I).all() and (found.scale_I > 0).all()
    nothing = search_scale(weights, torch.zeros(32, 32), torch.zeros(32), bits=4, group_size=16, symmetric=False)
    assert nothing.error == 0 and torch.equal(nothing.scale_I, torch.ones(32))


def test_tied_scales_are_equal_where_the_producer_needs_it() -> None:
    # Two value heads of 8, each read by two query heads: in_features is [head 0, head 0, head 1, head 1].
    def tie(scale_I: Tensor) -> Tensor:
        shared_HD = scale_I.reshape(2, 2, 8).mean(1, keepdim=True)
        return shared_HD.expand(2, 2, 8).reshape(-1)

    inputs_TI, weights = layer_inputs(6), layer_weights(6)[:1]
    gram_II, mean_abs_I = inputs_TI.T @ inputs_TI, inputs_TI.abs().mean(0)
    tied = search_scale(weights, gram_II, mean_abs_I, bits=4, group_size=16, symmetric=False, tie=tie)
    heads = tied.scale_I.reshape(2, 2, 8)
    assert torch.equal(heads[:, 0], heads[:, 1])
    assert tied.exponent > 0 and tied.error < tied.error_unscaled
    assert tied.error == pytest.approx(real_error(weights, inputs_TI, tied.scale_I, 16, False), rel=1e-4)
    free = search_scale(weights, gram_II, mean_abs_I, bits=4, group_size=16, symmetric=False)
    assert not torch.equal(free.scale_I, tied.scale_I)


def test_scales_are_centred_and_inputs_are_left_alone() -> None:
    inputs_TI, weights = layer_inputs(7), layer_weights(7)
    before = [weight_OI.clone() for weight_OI in weights]
    found = search_scale(
        weights, inputs_TI.T @ inputs_TI, inputs_TI.abs().mean(0), bits=4, group_size=16, symmetric=False
    )
    assert float(found.scale_I.max() * found.scale_I.min()) == pytest.approx(1, rel=1e-5)
    assert all(torch.equal(weight_OI, copy) for weight_OI, copy in zip(weights, before, strict=True))


def test_awq_rounds_to_the_grid_of_the_clip_search() -> None:
    inputs_TI, (weight_OI, *_) = layer_inputs(8), layer_weights(8)
    gram_II = inputs_TI.T @ inputs_TI
    quantized = awq(weight_OI, gram_II, bits=4, group_size=16, symmetric=False)
    grid = fit_grid(weight_OI, gram_II, bits=4, group_size=16, symmetric=False)
    assert torch.equal(quantized.grid.scale_OG, grid.scale_OG)
    assert torch.equal(quantized.integers_OI, round_to_grid(weight_OI, grid))


def test_wrong_input_is_named() -> None:
    inputs_TI, weights = layer_inputs(9), layer_weights(9)
    gram_II, mean_abs_I = inputs_TI.T @ inputs_TI, inputs_TI.abs().mean(0)
    with pytest.raises(ValueError, match="at least one weight"):
        search_scale([], gram_II, mean_abs_I, bits=4, group_size=16, symmetric=True)
    with pytest.raises(ValueError, match="do not share the in_features 32"):
        search_scale([weights[0][:, :16]], gram_II, mean_abs_I, bits=4, group_size=16, symmetric=True)
    with pytest.raises(ValueError, match="mean_abs_I"):
        search_scale(weights, gram_II, -mean_abs_I, bits=4, group_size=16, symmetric=True)
    with pytest.raises(ValueError, match="is not divisible by group_size 12"):
        search_scale(weights, gram_II, mean_abs_I, bits=4, group_size=12, symmetric=True)
