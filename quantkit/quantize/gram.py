"""Gram matrices X^T X of what a linear reads, and of the gradients at what it gives: summed, and shrunk."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

WRITTEN_COUNTS = 1 / 8  # of a token that was given, when matrices are shrunk: a measurement (docs/quantize.md)
_ONEDNN: Any = torch.backends.mkldnn  # its settings by kind of operation are set up as it is imported


def add_gram(gram_II: Tensor, x_NI: Tensor, computed: torch.dtype) -> None:
    """Add X^T X to the blocks on and above the diagonal, in place: five eighths of the products. See `mirror`.

    x_NI: float32, of what was computed in the given type; see `add_product`.
    """
    width = x_NI.shape[1]
    step = max(-(-width // 4), 1)
    for begin in range(0, width, step):
        add_product(gram_II[begin : begin + step, begin:], x_NI[:, begin : begin + step], x_NI[:, begin:], computed)


def add_product(sum_JI: Tensor, left_NJ: Tensor, right_NI: Tensor, computed: torch.dtype) -> None:
    """Add left^T right, in place; all float32.

    What was computed in bfloat16 has no more digits than that. A CPU that multiplies bfloat16 in hardware then rounds
    both sides to it, in place of their being float32, and sums in float32 all the same (oneDNN's fpmath mode).
    """
    with _narrow_products() if computed == torch.bfloat16 else contextlib.nullcontext():
        sum_JI.addmm_(left_NJ.T, right_NI)


@contextlib.contextmanager
def _narrow_products() -> Iterator[None]:
    """Matrix products of float32 on a CPU round their factors to bfloat16 meanwhile."""
    before = _ONEDNN.matmul.fp32_precision
    _ONEDNN.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        _ONEDNN.matmul.fp32_precision = before


def mirror(gram_II: Tensor) -> None:
    """Copy what is above the diagonal below it, in place: what `add_gram` left out."""
    gram_II.copy_(gram_II.triu() + gram_II.triu(1).T)


def shrunk(gram_II: Tensor, share: float) -> Tensor:
    """(1 - share) H + share diag(H): the Gram matrix with its off-diagonal part taken for partly chance.

    A Gram matrix of few tokens understates the directions that they happened not to take, and GPTQ puts the errors just
    there. Linear shrinkage (Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance matrices,
    2004) towards the diagonal leaves each input's own energy as it was seen; damping adds to all inputs alike.

    Raises ValueError when share is not in 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}: choose 0 to 1")
    if share == 0:
        return gram_II
    mixed_II = gram_II * (1 - share)
    mixed_II.diagonal().copy_(gram_II.diagonal())
    return mixed_II


def told(given: int, written: int) -> float:
    """What a token counts for, on average, in `usual_shrinkage`: 1 where it was given, WRITTEN_COUNTS where written.

    What a model writes differs from what it will read by more than chance, and that part does not fall with tokens.
    """
    return (given + WRITTEN_COUNTS * written) / (given + written)


def usual_shrinkage(in_features: int, tokens: float) -> float:
    """How much to shrink a Gram matrix of so many tokens: 1 / (1 + tokens / (12 in_features)).

    The chance in it falls as one over the tokens, as the optimum of Ledoit and Wolf does; the factor is a measurement
    (docs/quantize.md). A half at 12 tokens an input, a sixth at 64: 128 windows of 2048 for 4096 inputs.
    """
    return 1 / (1 + tokens / (12 * in_features))
