"""Gram matrices X^T X of what a linear reads, and of the gradients at what it gives: summed, and shrunk."""

from torch import Tensor


def add_gram(gram_II: Tensor, x_NI: Tensor) -> None:
    """Add X^T X to the blocks on and above the diagonal, in place: five eighths of the products. See `mirror`."""
    width = x_NI.shape[1]
    step = max(-(-width // 4), 1)
    for begin in range(0, width, step):
        gram_II[begin : begin + step, begin:].addmm_(x_NI[:, begin : begin + step].T, x_NI[:, begin:])


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


def usual_shrinkage(in_features: int, tokens: int) -> float:
    """How much to shrink a Gram matrix of so many tokens: 1 / (1 + tokens / (12 in_features)).

    The chance in it falls as one over the tokens, as the optimum of Ledoit and Wolf does; the factor is a measurement
    (docs/quantize.md). A half at 12 tokens an input, a sixth at 64: 128 windows of 2048 for 4096 inputs.
    """
    return 1 / (1 + tokens / (12 * in_features))
