"""What a KV cache of each of vLLM's types takes, and gives back of what attention stores in it and asks it with."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.decoder import Cache
from quantkit.kv_scheme import KINDS

LARGEST = 448.0  # of float8 e4m3 (arXiv 2209.05433)
_LARGEST_E5M2 = 57344.0
_LARGEST_INT8 = 127.0


class Scales(NamedTuple):
    """What a layer's queries, keys and values are divided by, each [1], or one a head; all float32.

    Of queries one a query head: those that share a key-value head have the same.
    """

    query: Tensor
    key: Tensor
    value: Tensor


def through(kind: str, scales: Scales | None) -> Cache:
    """What attention computes with when the cache is of that type: queries, keys, values, [B, heads, T, D] each.

    scales: the layer's; None where the checkpoint brings none, and vLLM takes 1.0.

    FP8 rounds queries besides: vLLM's CUDA backends multiply in FP8 (`supports_quant_query_input`). Sums stay exact
    here, so this is the error of what is stored. Raises KeyError for a type that is not rounded here.
    """
    if KINDS[kind].scales:
        one = torch.ones(1)
        query, key, value = scales or Scales(one, one, one)
        return lambda q, k, v: (e4m3(q, query), e4m3(k, key), e4m3(v, value))
    plain = {
        "fp8_e5m2": _e5m2,
        "fp8_per_token_head": _by_token(lambda x: e4m3(x, torch.ones(1)), LARGEST),
        "int8_per_token_head": _by_token(torch.round, _LARGEST_INT8),
    }[kind]
    return lambda q, k, v: (q, plain(k), plain(v))


def e4m3(x_BHTD: Tensor, scale: Tensor) -> Tensor:
    """x as float8 e4m3 of x / scale gives it back: rounded to even, and what is beyond the range cut off.

    scale: [1], or [heads].
    """
    by_head = scale.to(x_BHTD.device, torch.float32)[:, None, None]
    scaled = (x_BHTD.float() / by_head).clamp(-LARGEST, LARGEST)
    return (scaled.to(torch.float8_e4m3fn).float() * by_head).to(x_BHTD.dtype)


def _e5m2(x: Tensor) -> Tensor:
    return x.clamp(-_LARGEST_E5M2, _LARGEST_E5M2).to(torch.float8_e5m2).to(x.dtype)


def _by_token(rounded: Callable[[Tensor], Tensor], largest: float) -> Callable[[Tensor], Tensor]:
    """Each token's key, or value, of each head is divided by what makes its largest element `largest`."""

    def give_back(x_BHTD: Tensor) -> Tensor:
        wide = x_BHTD.float()
        scale = (wide.abs().amax(-1, keepdim=True) / largest).clamp_min(torch.finfo(torch.float32).tiny)
        return (rounded(wide / scale) * scale).to(x_BHTD.dtype)

    return give_back
