"""Which weight to round: the original, moved so that it makes up for what the quantized layers before it changed.

GPTAQ (Li et al., arXiv 2504.02692) asks for the integers Q that give, on the quantized model's inputs X~, what the
original W gave on its own inputs X: min || W X - Q X~ ||^2. With H = X~ X~^T that is (W' - Q) H (W' - Q)^T plus a
constant, where W' = W + W (X - X~) X~^T H^-1: any method that rounds W' under H solves it. A linear that writes to the
residual stream can make up for the stream's own drift R = h - h~ as well: W' gains R X~^T H^-1.
"""

import torch
from torch import Tensor

from quantkit.quantize.gram import shrunk


def target_weight(
    weight_OI: Tensor,
    gram_II: Tensor,
    cross_II: Tensor,
    residual_OI: Tensor | None = None,
    *,
    strength: float,
    shrinkage: float = 0.0,
    damping: float = 0.01,
) -> Tensor:
    """The weight whose rounding makes up for the drift so far: float32 [out_features, in_features].

    weight_OI: the original weight.
    gram_II: [in_features, in_features], mean of x~ x~^T over the calibration tokens, x~ the quantized model's inputs.
    cross_II: mean of (x - x~) x~^T, x the original model's inputs for the same tokens.
    residual_OI: mean of (h - h~) x~^T, the drift of the residual stream that the linear adds to; None where it
        adds to none.
    strength: the share of the drift to make up for, 0..1. What a finite calibration set shows of it is partly noise.
    shrinkage: of all three means towards what each input says alone (`gram.shrunk`; the residual has no diagonal and
        goes towards 0). One layer after another fits its correction to the same tokens: without it the whole model
        knows them by heart, and is the worse on others.
    damping: fraction of the Gram matrix's mean diagonal added to its diagonal.

    Raises ValueError when strength is not in 0..1 or the damped Gram matrix is not positive definite.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}: choose 0 to 1")
    weight_OI = weight_OI.float()
    wanted_OI = weight_OI @ shrunk(cross_II, shrinkage)
    if residual_OI is not None:
        wanted_OI = wanted_OI + (1 - shrinkage) * residual_OI
    damped_II = shrunk(gram_II, shrinkage) if shrinkage else gram_II.clone()
    damped_II.diagonal().add_(damping * gram_II.diagonal().mean())
    lower_II, info = torch.linalg.cholesky_ex(damped_II)
    del damped_II
    if int(info):
        raise ValueError("the Gram matrix is not positive definite: calibrate on more, or more varied, tokens")
    # What cholesky_solve does, without the copy of the factor that it makes.
    halfway_IO = torch.linalg.solve_triangular(lower_II, wanted_OI.T, upper=False)
    moved_IO: Tensor = torch.linalg.solve_triangular(lower_II.T, halfway_IO, upper=True)
    return weight_OI + strength * moved_IO.T
