"""Gram matrices: summed in whatever type they were computed in, and shrunk."""

from typing import Any

import pytest
import torch

from quantkit.quantize.gram import WRITTEN_COUNTS, add_gram, add_product, mirror, shrunk, told, usual_shrinkage
from tests.quantize.test_gptq import problem


@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [3, 64, 258])
def test_a_sum_of_parts_is_the_gram_matrix(computed: torch.dtype, width: int) -> None:
    """Inputs that bfloat16 holds give what float32 gives: their products are summed in float32."""
    x_NI = (torch.randn(900, width, generator=torch.Generator().manual_seed(0)) + 1).bfloat16().float()
    gram_II = torch.zeros(width, width)
    for part_NI in x_NI.split(400):
        add_gram(gram_II, part_NI, computed)
    mirror(gram_II)
    torch.testing.assert_close(gram_II.double(), x_NI.double().T @ x_NI.double(), rtol=1e-5, atol=1e-3)


def test_products_of_more_digits_lose_no_more_than_bfloat16_does() -> None:
    left_NJ, right_NI = torch.randn(2, 700, 96, generator=torch.Generator().manual_seed(1)).unbind()
    exact_JI, sum_JI = left_NJ.double().T @ right_NI.double(), torch.zeros(96, 96)
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    add_product(sum_JI, left_NJ, right_NI, torch.bfloat16)
    assert products.fp32_precision == before
    assert float((sum_JI - exact_JI).square().mean().sqrt()) < 700**0.5 * 2**-8
    sum_JI.zero_()
    add_product(sum_JI, left_NJ, right_NI, torch.float32)
    torch.testing.assert_close(sum_JI.double(), exact_JI, rtol=1e-4, atol=1e-3)


def test_a_shrunk_gram_matrix_keeps_its_diagonal() -> None:
    _, hessian_II = problem(16)
    found_II = shrunk(hessian_II, 0.25)
    assert torch.equal(found_II.diagonal(), hessian_II.diagonal())
    off_II = ~torch.eye(24, dtype=torch.bool)
    torch.testing.assert_close(found_II[off_II], 0.75 * hessian_II[off_II])
    assert torch.equal(shrunk(hessian_II, 1.0), hessian_II.diagonal().diag())
    assert shrunk(hessian_II, 0.0) is hessian_II
    with pytest.raises(ValueError, match="share is 1"):
        shrunk(hessian_II, 1.5)


def test_more_tokens_are_shrunk_less() -> None:
    assert usual_shrinkage(1024, 12 * 1024) == 0.5
    assert usual_shrinkage(1024, 0) == 1
    assert usual_shrinkage(4096, 128 * 2048) < 0.16 < usual_shrinkage(4096, 16 * 2048)


def test_written_tokens_count_for_less() -> None:
    assert told(16, 0) == 1
    assert told(0, 16) == WRITTEN_COUNTS
    assert 16 / 64 < told(16, 48) < 1
