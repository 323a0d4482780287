"""What each type of cache gives back, against the definitions."""

import pytest
import torch
from torch import Tensor

from quantkit import kv_cache
from quantkit.kv_cache import Scales


def x(*values: float, heads: int = 1) -> Tensor:
    return torch.tensor(values).view(1, heads, -1, 1)


def test_e4m3_rounds_to_even_and_cuts_off() -> None:
    given = kv_cache.e4m3(x(0.0, 1.0, 1.0625, 1.1875, 500.0, -1000.0), torch.ones(1)).flatten().tolist()
    assert given == [0.0, 1.0, 1.0, 1.25, 448.0, -448.0]


def test_a_scale_moves_the_range() -> None:
    given = kv_cache.e4m3(x(500.0, -1000.0, 3.0), torch.tensor([4.0])).flatten().tolist()
    assert given == [512.0, -1024.0, 3.0]


def test_heads_have_scales_of_their_own() -> None:
    query = torch.full((1, 4, 1, 1), 600.0)
    key = value = torch.full((1, 2, 1, 1), 600.0)
    scales = Scales(torch.tensor([1.0, 1.0, 2.0, 2.0]), torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0]))
    query, key, value = kv_cache.through("fp8", scales)(query, key, value)
    assert query.flatten().tolist() == [448.0, 448.0, 576.0, 576.0]
    assert key.flatten().tolist() == [448.0, query[0, 2, 0, 0].item()]
    assert value.flatten().tolist() == [query[0, 2, 0, 0].item(), 448.0]


@pytest.mark.parametrize(("kind", "most"), [("int8_per_token_head", 1 / 254), ("fp8_per_token_head", 1 / 16)])
def test_a_scale_a_token_and_head_keeps_every_magnitude(kind: str, most: float) -> None:
    """The error is within half a step of each token's own largest element, however large other tokens are."""
    torch.manual_seed(0)
    key = torch.randn(2, 3, 5, 64) * torch.logspace(-6, 6, 5)[None, None, :, None]
    query, given, _ = kv_cache.through(kind, None)(key, key, key)
    assert torch.equal(query, key)
    assert ((given - key).abs() <= 1.0001 * most * key.abs().amax(-1, keepdim=True)).all()
    assert not torch.equal(given, key)


def test_e5m2_is_coarser_and_reaches_further() -> None:
    _, given, _ = kv_cache.through("fp8_e5m2", None)(x(1.0), x(1.1, 1000.0, 1e9), x(1.0))
    assert given.flatten().tolist() == [1.0, 1024.0, 57344.0]


def test_what_is_stored_as_it_is_has_no_rounding() -> None:
    with pytest.raises(KeyError):
        kv_cache.through("float16", None)
