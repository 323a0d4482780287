"""Losses against their definitions written out, their gradients against each other, and the chunked form."""

import math

import pytest
import torch
from torch import Tensor

from quantkit import losses
from quantkit.losses import LOSSES, chunked, forward_kl, overlap


def _pair(rows: int = 3, words: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, words), torch.randn(rows, words)


def _gradient(loss: losses.Loss, draft: Tensor, target: Tensor) -> Tensor:
    logits = draft.clone().requires_grad_()
    loss(logits, target).sum().backward()
    assert logits.grad is not None
    return logits.grad


def test_values_are_those_of_the_definitions() -> None:
    draft, target = _pair()
    p, q = target.softmax(-1).tolist(), draft.softmax(-1).tolist()
    for n in range(3):
        pairs = list(zip(p[n], q[n], strict=True))
        alpha = sum(min(a, b) for a, b in pairs)
        kl = sum(a * math.log(a / b) for a, b in pairs)
        weight = math.exp(-3 * alpha)
        expected = {
            "forward_kl": kl,
            "reverse_kl": sum(b * math.log(b / a) for a, b in pairs),
            "total_variation": sum(abs(a - b) for a, b in pairs) / 2,
            "lk_alpha": -math.log(alpha),
            "lk_hybrid": weight * kl + (1 - weight) * (1 - alpha),
            "tvd++": 0.0,  # a policy's surrogate: its advantages average to nothing, its gradient is what counts
        }
        found = {name: float(loss(draft, target)[n]) for name, loss in LOSSES.items()}
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_draft_that_is_its_target_has_nothing_to_learn(name: str) -> None:
    _, target = _pair()
    assert torch.allclose(LOSSES[name](target, target), torch.zeros(3), atol=1e-6)
    assert _gradient(LOSSES[name], target, target).abs().max() < 1e-3


def test_tvd_plus_plus_is_total_variation_with_a_step_of_its_own_at_each_position() -> None:
    """The gradient of 1 - alpha is that of -sum q 1(p > q): normalising rewards divides it by their deviation."""
    draft, target = _pair()
    plain, normalised = (_gradient(LOSSES[name], draft, target) for name in ("total_variation", "tvd++"))
    p, q = target.softmax(-1), draft.softmax(-1)
    mean = (q * (p > q)).sum(-1, keepdim=True)
    torch.testing.assert_close(normalised, plain / (mean * (1 - mean)).sqrt())


def test_lk_losses_between_their_ends() -> None:
    draft, target = _pair()
    torch.testing.assert_close(losses.lk_hybrid(draft, target, eta=0.0), forward_kl(draft, target))
    torch.testing.assert_close(losses.lk_hybrid(draft, target, eta=1e3), losses.total_variation(draft, target))
    alpha = overlap(draft, target)[:, None]
    expected = _gradient(LOSSES["total_variation"], draft, target) / alpha
    torch.testing.assert_close(_gradient(LOSSES["lk_alpha"], draft, target), expected)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_strangers_give_finite_numbers(name: str) -> None:
    draft, target = torch.tensor([[200.0, 0.0, 0.0]]), torch.tensor([[0.0, 200.0, 0.0]])
    assert torch.isfinite(LOSSES[name](draft, target)).all()
    assert torch.isfinite(_gradient(LOSSES[name], draft, target)).all()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_chunks_change_neither_value_nor_gradient(name: str) -> None:
    torch.manual_seed(0)
    loss, head, target = LOSSES[name], torch.randn(17, 4), torch.randn(11, 17)
    start = torch.linspace(-1, 1, 44).view(11, 4)
    whole = start.clone().requires_grad_()
    value = loss(whole @ head.T, target).sum()
    value.backward()
    for chunk in (3, 11, 100):
        hidden = start.clone().requires_grad_()
        found = chunked(hidden, head, lambda logits, part: loss(logits, target[part]), chunk=chunk)
        (2 * found).backward()
        torch.testing.assert_close(found, value.detach())
        torch.testing.assert_close(hidden.grad, 2 * whole.grad)
