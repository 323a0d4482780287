"""The weight to round is the least-squares answer to what the original would have given on its own inputs."""

import pytest
import torch

from quantkit.quantize.drift import target_weight


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(6, 8, generator=generator)
    x_NI = torch.randn(200, 8, generator=generator)
    seen_NI = x_NI + 0.3 * torch.randn(200, 8, generator=generator) @ torch.randn(8, 8, generator=generator)
    residual_NO = torch.randn(200, 6, generator=generator) + seen_NI @ torch.randn(8, 6, generator=generator)
    return weight_OI, x_NI, seen_NI, residual_NO


@pytest.mark.parametrize("with_residual", [False, True])
def test_it_is_the_least_squares_answer(with_residual: bool) -> None:
    weight_OI, x_NI, seen_NI, residual_NO = data()
    wanted_NO = x_NI @ weight_OI.T + (residual_NO if with_residual else 0)
    expected_OI = torch.linalg.lstsq(seen_NI, wanted_NO).solution.T
    gram_II, cross_II = seen_NI.T @ seen_NI / 200, (x_NI - seen_NI).T @ seen_NI / 200
    residual_OI = residual_NO.T @ seen_NI / 200 if with_residual else None
    found_OI = target_weight(weight_OI, gram_II, cross_II, residual_OI, strength=1, damping=0)
    torch.testing.assert_close(found_OI, expected_OI, atol=1e-4, rtol=1e-4)


def test_strength_goes_from_the_original_to_the_answer() -> None:
    weight_OI, x_NI, seen_NI, _ = data()
    gram_II, cross_II = seen_NI.T @ seen_NI / 200, (x_NI - seen_NI).T @ seen_NI / 200
    none, half, whole = (target_weight(weight_OI, gram_II, cross_II, strength=s) for s in (0, 0.5, 1))
    assert torch.equal(none, weight_OI)
    torch.testing.assert_close(half, (none + whole) / 2)


def test_no_drift_changes_nothing() -> None:
    weight_OI, _, seen_NI, _ = data()
    gram_II = seen_NI.T @ seen_NI / 200
    assert torch.equal(target_weight(weight_OI, gram_II, torch.zeros(8, 8), strength=1), weight_OI)


def test_bad_input_says_why() -> None:
    weight_OI, *_ = data()
    with pytest.raises(ValueError, match="strength is 2"):
        target_weight(weight_OI, torch.eye(8), torch.zeros(8, 8), strength=2)
    with pytest.raises(ValueError, match="positive definite"):
        target_weight(weight_OI, -torch.eye(8), torch.zeros(8, 8), strength=1)


def test_shrinkage_takes_less_noise_for_drift() -> None:
    """A residual drift that has nothing to do with the inputs leaves the original weight the right answer."""
    weight_OI, _, seen_NI, _ = data()
    residual_NO = 3 * torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    gram_II, residual_OI = seen_NI.T @ seen_NI / 200, residual_NO.T @ seen_NI / 200

    def error(shrinkage: float) -> float:
        found_OI = target_weight(
            weight_OI, gram_II, torch.zeros(8, 8), residual_OI, strength=1, shrinkage=shrinkage
        )  # fmt: skip
        return float((seen_NI @ (found_OI - weight_OI).T).square().mean())

    assert error(1.0) == 0
    assert 0 < error(0.4) < 0.7 * error(0.0)
