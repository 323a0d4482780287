"""Losses against the definition, and the chunked form against the whole one, gradients included."""

import torch

from quantkit.losses import chunked_forward_kl, forward_kl


def test_forward_kl_is_the_sum_over_the_vocabulary() -> None:
    torch.manual_seed(0)
    draft, target = torch.randn(3, 5), torch.randn(3, 5)
    p, q = target.softmax(-1), draft.softmax(-1)
    expected = torch.tensor([sum(float(p[n, v] * (p[n, v] / q[n, v]).log()) for v in range(5)) for n in range(3)])
    torch.testing.assert_close(forward_kl(draft, target), expected)
    assert torch.allclose(forward_kl(target, target), torch.zeros(3), atol=1e-6)


def test_chunks_change_neither_value_nor_gradient() -> None:
    torch.manual_seed(0)
    target_hidden, head, target_head = torch.randn(11, 6), torch.randn(17, 4), torch.randn(17, 6)
    gradients, values = [], []
    for chunk in (3, 100):
        hidden = torch.linspace(-1, 1, 44).view(11, 4).requires_grad_()
        value = chunked_forward_kl(hidden, target_hidden, head, target_head, chunk=chunk)
        value.backward()
        assert hidden.grad is not None
        gradients.append(hidden.grad)
        values.append(value.detach())
    whole = forward_kl(torch.linspace(-1, 1, 44).view(11, 4) @ head.T, target_hidden @ target_head.T).sum()
    torch.testing.assert_close(values[0], whole)
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(gradients[0], gradients[1])
