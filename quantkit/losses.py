"""How far one model's next-token distribution is from another's: pure functions of logits, nats a token.

What learns is called the draft, what it learns from the target: a small model or a quantized copy of the target itself.
"""

from typing import Any

import torch
from torch import Tensor


def forward_kl(draft_logits_NV: Tensor, target_logits_NV: Tensor) -> Tensor:
    """KL(target || draft) of each position: float32 [N], in nats (DistillSpec, arXiv 2310.08461, section 3.2)."""
    target = target_logits_NV.float().log_softmax(-1)
    draft = draft_logits_NV.float().log_softmax(-1)
    return (target.exp() * (target - draft)).sum(-1)


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


def chunked_forward_kl(
    draft_hidden_NC: Tensor,
    target_hidden_NE: Tensor,
    draft_head_VC: Tensor,
    target_head_VE: Tensor,
    *,
    chunk: int = 128,
) -> Tensor:
    """`forward_kl` summed over N positions, from the hidden states that the two heads read.

    Only `chunk` positions' logits stand in memory at a time: with a vocabulary of 128k, those of a batch of 8 x 512
    positions would take 2 GB each. The gradient for the hidden states is found in the same pass, as
    (softmax(draft) - softmax(target)) W, so nothing is computed twice; the heads get none, they are frozen.
    """
    arguments = (draft_hidden_NC, target_hidden_NE, draft_head_VC, target_head_VE, chunk)
    loss: Tensor = _ChunkedForwardKl.apply(*arguments)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedForwardKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, draft_hidden_NC: Tensor, target_hidden_NE: Tensor, draft_head_VC: Tensor, target_head_VE: Tensor,
        chunk: int,
    ) -> Tensor:  # fmt: skip
        gradient_NC = torch.empty_like(draft_hidden_NC)
        total = torch.zeros((), dtype=torch.float32, device=draft_hidden_NC.device)
        draft_head, target_head = draft_head_VC.to(draft_hidden_NC.dtype), target_head_VE.to(target_hidden_NE.dtype)
        for begin in range(0, draft_hidden_NC.shape[0], chunk):
            part = slice(begin, begin + chunk)
            target = (target_hidden_NE[part] @ target_head.T).float().log_softmax(-1)
            draft = (draft_hidden_NC[part] @ draft_head.T).float().log_softmax(-1)
            likely = target.exp()
            total += (likely * (target - draft)).sum()
            gradient_NC[part] = (draft.exp() - likely).to(draft_head.dtype) @ draft_head
        ctx.save_for_backward(gradient_NC)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient_NC,) = ctx.saved_tensors
        return gradient_NC * gradients[0].to(gradient_NC.dtype), None, None, None, None
