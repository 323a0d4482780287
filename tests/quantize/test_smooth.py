"""The scale of inputs before GPTQ: its model of the loss, what GPTQ really leaves, and what a scale must not change."""

import pytest
import torch
from torch import Tensor

from quantkit.formats import dequantize
from quantkit.quantize import smooth
from quantkit.quantize.gptq import gptq
from quantkit.quantize.smooth import smoothing_scale

IN_FEATURES, GROUP = 64, 16


def layer_inputs(seed: int) -> Tensor:
    """[tokens, in_features], correlated, with a few channels far larger than the rest, as in a language model."""
    generator = torch.Generator().manual_seed(seed)
    inputs_TI = torch.randn(512, IN_FEATURES, generator=generator) @ torch.randn(
        IN_FEATURES, IN_FEATURES, generator=generator
    )
    inputs_TI[:, :3] *= torch.tensor([30.0, 12.0, 8.0])
    return inputs_TI


def layer_weight(seed: int, rows: int = 96) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, IN_FEATURES, generator=generator) * torch.rand(IN_FEATURES, generator=generator)


def left_by_gptq(weight_OI: Tensor, gram_II: Tensor, scale_I: Tensor) -> float:
    """The output error in float64, of the weight as it is with the scale undone."""
    found = gptq(weight_OI * scale_I, gram_II / (scale_I[:, None] * scale_I), bits=4, group_size=GROUP, symmetric=False)
    error_OI = (dequantize(found.quantized) / scale_I - weight_OI).double()
    return float((error_OI @ gram_II.double() * error_OI).sum())


@pytest.mark.parametrize("seed", range(4))
def test_gptq_is_left_with_less(seed: int) -> None:
    inputs_TI, weight_OI = layer_inputs(seed), layer_weight(seed)
    gram_II = inputs_TI.T @ inputs_TI / len(inputs_TI)
    found = smoothing_scale(weight_OI, gram_II, group_size=GROUP)
    left = left_by_gptq(weight_OI, gram_II, found.scale_I) / left_by_gptq(weight_OI, gram_II, torch.ones(IN_FEATURES))
    assert left < 0.8
    assert left == pytest.approx(found.loss, rel=0.5)  # the model says about how much less


def test_the_loss_is_the_sum_over_groups_and_rows() -> None:
    """The model in plain loops, with each input's variance given those behind it by least squares."""
    inputs_TI, weight_OI = layer_inputs(5), layer_weight(5, rows=6)
    gram_II = (inputs_TI.T @ inputs_TI / len(inputs_TI)).double()
    found = smoothing_scale(weight_OI, gram_II, group_size=GROUP)
    damped_II = gram_II + 0.01 * gram_II.diagonal().mean() * torch.eye(IN_FEATURES, dtype=torch.float64)
    order = gram_II.diagonal().argsort(descending=True).tolist()
    left_I = torch.zeros(IN_FEATURES, dtype=torch.float64)
    for place, index in enumerate(order):
        behind = order[place + 1 :]
        share = torch.linalg.solve(damped_II[behind][:, behind], damped_II[behind, index]) if behind else torch.zeros(0)
        left_I[index] = damped_II[index, index] - (damped_II[index, behind] @ share.double() if behind else 0)

    def loss(scale_I: Tensor) -> float:
        total = 0.0
        for begin in range(0, IN_FEATURES, GROUP):
            group = slice(begin, begin + GROUP)
            spread = sum(float((row[group] * scale_I[group]).double().pow(4).mean()) ** 0.5 for row in weight_OI)
            total += float((left_I[group] / scale_I[group].double() ** 2).sum()) * spread
        return total

    assert found.loss == pytest.approx(loss(found.scale_I) / loss(torch.ones(IN_FEATURES)), rel=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):  # a minimum: what is near it is no better
        near_I = found.scale_I * (0.1 * torch.randn(IN_FEATURES, generator=generator)).exp()
        assert loss(near_I) > loss(found.scale_I)


def test_tied_scales_are_equal_where_the_producer_needs_it() -> None:
    def tie(scale_I: Tensor) -> Tensor:  # two value heads of 16, each read by two query heads
        heads_HGD: Tensor = scale_I.unflatten(0, (2, 2, 16))
        return heads_HGD.mean(1, keepdim=True).expand_as(heads_HGD).flatten()

    inputs_TI, weight_OI = layer_inputs(6), layer_weight(6)
    gram_II = inputs_TI.T @ inputs_TI
    tied, free = (smoothing_scale(weight_OI, gram_II, group_size=GROUP, tie=each) for each in (tie, None))
    heads = tied.scale_I.unflatten(0, (2, 2, 16))
    assert torch.equal(heads[:, 0], heads[:, 1])
    assert free.loss < tied.loss < 1


def test_scales_are_centred_and_what_never_fired_is_no_reason() -> None:
    inputs_TI, weight_OI = layer_inputs(7), layer_weight(7)
    inputs_TI[:, 7] = 0
    kept = weight_OI.clone()
    found = smoothing_scale(weight_OI, inputs_TI.T @ inputs_TI, group_size=GROUP)
    assert torch.isfinite(found.scale_I).all() and (found.scale_I > 0).all()
    assert float(found.scale_I.max() * found.scale_I.min()) == pytest.approx(1, rel=1e-5)
    assert torch.equal(weight_OI, kept)
    nothing = smoothing_scale(weight_OI, torch.zeros(IN_FEATURES, IN_FEATURES), group_size=GROUP)
    assert nothing.loss == 1 and torch.equal(nothing.scale_I, torch.ones(IN_FEATURES))


def test_many_rows_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs_TI, weight_OI = layer_inputs(8), layer_weight(8, rows=96)
    gram_II = inputs_TI.T @ inputs_TI
    monkeypatch.setattr(smooth, "MAX_ROWS", 32)
    sampled = smoothing_scale(weight_OI, gram_II, group_size=GROUP)
    assert torch.equal(sampled.scale_I, smoothing_scale(weight_OI[::3], gram_II, group_size=GROUP).scale_I)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_no_bit(threads: int) -> None:
    generator = torch.Generator().manual_seed(9)
    inputs_TI, weight_OI = torch.randn(600, 512, generator=generator), torch.randn(1024, 512, generator=generator)
    gram_II, before = inputs_TI.T @ inputs_TI, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = smoothing_scale(weight_OI, gram_II, group_size=64).scale_I
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, smoothing_scale(weight_OI, gram_II, group_size=64).scale_I)


def test_a_row_of_zeros_hides_no_scale() -> None:
    weight_OI, inputs_TI = layer_weight(4), layer_inputs(4)
    gram_II = inputs_TI.T @ inputs_TI
    weight_OI[7, :GROUP] = 0
    found = smoothing_scale(weight_OI, gram_II, group_size=GROUP)
    assert found.loss < 1 and bool(torch.isfinite(found.scale_I).all())
