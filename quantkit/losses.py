"""How far one model's next-token distribution is from another's: pure functions of logits, one number a position.

What learns is called the draft, what it learns from the target: a small model or a quantized copy of the target itself.
p is what the target says, q what the draft says. All take logits [N, V] of draft and target and give float32 [N].
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]

_TINY = 1e-6  # keeps logarithms and quotients of an overlap of nothing finite


def forward_kl(draft_logits_NV: Tensor, target_logits_NV: Tensor) -> Tensor:
    """KL(p || q) in nats (DistillSpec, arXiv 2310.08461, section 3.2): q must be wherever p is."""
    target = target_logits_NV.float().log_softmax(-1)
    draft = draft_logits_NV.float().log_softmax(-1)
    return (target.exp() * (target - draft)).sum(-1)


def reverse_kl(draft_logits_NV: Tensor, target_logits_NV: Tensor) -> Tensor:
    """KL(q || p) in nats (DistillSpec, arXiv 2310.08461, section 3.2): q must not be where p is not."""
    return forward_kl(target_logits_NV, draft_logits_NV)


def overlap(draft_logits_NV: Tensor, target_logits_NV: Tensor) -> Tensor:
    """alpha = sum_v min(p_v, q_v): how likely a token sampled from q is accepted (arXiv 2211.17192, corollary 3.6)."""
    return torch.minimum(draft_logits_NV.float().softmax(-1), target_logits_NV.float().softmax(-1)).sum(-1)


def total_variation(draft_logits_NV: Tensor, target_logits_NV: Tensor) -> Tensor:
    """1 - alpha, the total variation distance: what is rejected, itself. Its gradient vanishes where alpha does."""
    return 1 - overlap(draft_logits_NV, target_logits_NV)


def total_variation_advantage(draft_logits_NV: Tensor, target_logits_NV: Tensor) -> Tensor:
    """TVD++ (arXiv 2403.00858, section 2.2): the distance's gradient as that of a policy, its rewards normalised.

    A token sampled from q is rewarded with 1 where p > q, else 0. The mean m of that under q is taken off and its
    deviation sqrt(m (1 - m)) divided by, position by position and exactly, where the paper samples tokens.
    """
    target, draft = target_logits_NV.float().softmax(-1), draft_logits_NV.float().softmax(-1)
    with torch.no_grad():
        reward = (target > draft).float()
        mean = (draft * reward).sum(-1, keepdim=True)
        advantage = (reward - mean) / (mean * (1 - mean)).clamp(min=_TINY).sqrt()
    return -(draft * advantage).sum(-1)


def negative_log_overlap(draft_logits_NV: Tensor, target_logits_NV: Tensor) -> Tensor:
    """-log alpha in nats (LK losses, arXiv 2602.23881): the distance's gradient, larger where little is accepted."""
    return -overlap(draft_logits_NV, target_logits_NV).clamp(min=_TINY).log()


def lk_hybrid(draft_logits_NV: Tensor, target_logits_NV: Tensor, *, eta: float = 3.0) -> Tensor:
    """w KL(p || q) + (1 - w) (1 - alpha), w = exp(-eta alpha) held fixed (LK losses, arXiv 2602.23881; its eta is 3).

    Forward KL where draft and target are strangers, total variation where they agree.
    """
    alpha = overlap(draft_logits_NV, target_logits_NV)
    weight = (-eta * alpha.detach()).exp()
    return weight * forward_kl(draft_logits_NV, target_logits_NV) + (1 - weight) * (1 - alpha)


LOSSES: dict[str, Loss] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "total_variation": total_variation,
    "tvd++": total_variation_advantage,
    "lk_alpha": negative_log_overlap,
    "lk_hybrid": lk_hybrid,
}


def curvature_probe(logits_NV: Tensor, generator: torch.Generator) -> Tensor:
    """Random directions whose covariance is the second derivative of `forward_kl` at a draft that is the target.

    That is diag(p) - p p^T for each position, the Fisher information of its logits (Martens, New insights and
    perspectives on the natural gradient method, arXiv 1412.1193, section 9): sent backward in place of a gradient, they
    give at any tensor behind the logits vectors whose outer products average to the Fisher information there.

    logits_NV: float32. Returns float32 [N, V]; each row sums to 0.
    """
    likely = logits_NV.softmax(-1)
    root = likely.sqrt()
    noise = torch.randn(root.shape, generator=generator, device=root.device).mul_(root)
    return noise.sub_(likely.mul_(noise.sum(-1, keepdim=True)))


def chunked(hidden_NC: Tensor, head_VC: Tensor, loss: Callable[[Tensor, slice], Tensor], *, chunk: int = 128) -> Tensor:
    """A loss of logits summed over N positions, from the hidden states that the head reads.

    Only `chunk` positions' logits stand in memory at a time: with a vocabulary of 128k, those of a batch of 8 x 512
    positions would take 2 GB. Value and gradient are found in one pass, nothing is computed twice. The head gets no
    gradient: it is frozen.

    loss: from float32 logits [n, V] and where among the N positions they are, one number a position.
    """
    total: Tensor = _Chunked.apply(hidden_NC, head_VC, loss, chunk)  # type: ignore[no-untyped-call]
    return total


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NC: Tensor, head_VC: Tensor, loss: Callable[[Tensor, slice], Tensor], chunk: int
    ) -> Tensor:
        gradient_NC = torch.empty_like(hidden_NC)
        total = torch.zeros((), dtype=torch.float32, device=hidden_NC.device)
        head = head_VC.to(hidden_NC.dtype)
        for begin in range(0, hidden_NC.shape[0], chunk):
            part = slice(begin, min(begin + chunk, hidden_NC.shape[0]))
            with torch.enable_grad():
                logits_NV = (hidden_NC[part].detach() @ head.T).float().requires_grad_()
                value = loss(logits_NV, part).sum()
                (gradient_NV,) = torch.autograd.grad(value, logits_NV)
            total += value.detach()
            gradient_NC[part] = gradient_NV.to(head.dtype) @ head
        ctx.save_for_backward(gradient_NC)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_NC,) = ctx.saved_tensors
        return gradient_NC * gradients[0].to(gradient_NC.dtype), None, None, None
