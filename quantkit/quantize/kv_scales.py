"""Scales of an FP8 KV cache, from the queries, keys and values that the quantized model gives on calibration text.

A scale s stores x as e4m3(x / s), whose numbers reach from 2^-9 to 448 (Micikevicius et al. 2022, arXiv 2209.05433).
Its error relative to x is the same at every magnitude between: a scale decides what is cut off at the top, what drowns
at the bottom, and where between two powers of two the bulk falls. It is chosen from counts of the magnitudes as
bfloat16 has them, sixteen for each of e4m3's: counts add up over samples and processes, and every choice can be read
from them.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from quantkit import kv_cache

Choice = Literal["max", "percentile", "mse"]
Strategy = Literal["tensor", "attn_head"]  # compressed-tensors' words: a scale a layer, or one a key-value head
PERCENTILE = 99.99
_BINS = 0x7F80  # bfloat16's bits of 0 to below infinity
_TOKENS = 1 << 15  # of a layer that are counted; the largest element is sought in all
_STEPS = 16  # scales that are tried in an octave
_BELOW, _ABOVE = 2, 3  # octaves from the scale at which nothing is cut off
_NEAR = 1.01  # of the least error: the largest scale within it leaves the most room for what was not seen


class KvSettings(NamedTuple):
    """How the KV cache is calibrated."""

    choice: Choice = "mse"
    strategy: Strategy = "tensor"


class KvNote(NamedTuple):
    """What became of one of a layer's three; goes into the manifest."""

    name: str
    scales: list[float]
    largest: float  # of the magnitudes
    error: float  # |x - e4m3(x)|^2 / |x|^2 with these scales, of what was counted
    error_at_one: float  # the same with 1.0


class Seen:
    """The magnitudes of one layer's queries, keys and values on this process's samples."""

    def __init__(self, tokens: int, kv_heads: int) -> None:
        self._every, self._kv_heads = max(tokens // _TOKENS, 1), kv_heads
        self.counts: dict[str, Tensor] = {}  # [kv heads, bins] float64: what is added up over processes
        self.largest: dict[str, Tensor] = {}  # [kv heads]

    def look(self, query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Count, and give back what was given: it stands where a cache would."""
        for name, x_BHTD in (("q_scale", query_BHTD), ("k_scale", key_BHTD), ("v_scale", value_BHTD)):
            x_HN = x_BHTD.unflatten(1, (self._kv_heads, -1)).transpose(0, 1).flatten(1)
            counted_HN = x_BHTD[:, :, :: self._every].unflatten(1, (self._kv_heads, -1)).transpose(0, 1).flatten(1)
            bits_HN = counted_HN.abs().to(torch.bfloat16).view(torch.int16).long().clamp_(max=_BINS - 1)
            bits_HN += torch.arange(self._kv_heads, device=x_HN.device)[:, None] * _BINS
            counts = torch.bincount(bits_HN.flatten(), minlength=self._kv_heads * _BINS)
            counts_HB = counts.view(self._kv_heads, _BINS).double()
            largest_H = x_HN.abs().amax(1).float()
            self.counts[name] = self.counts[name] + counts_HB if name in self.counts else counts_HB
            known = self.largest.get(name, largest_H)
            self.largest[name] = torch.maximum(known, largest_H)
        return query_BHTD, key_BHTD, value_BHTD


def choose(seen: Seen, settings: KvSettings) -> tuple[dict[str, Tensor], list[KvNote]]:
    """The scales of a layer, [1] or [kv heads] float32 by their name in it, and what they make of what was seen."""
    scales, notes = {}, []
    for name, counts_HB in seen.counts.items():
        counts_HB, largest_H = counts_HB.cpu(), seen.largest[name].cpu()
        if settings.strategy == "tensor":
            counts_HB, largest_H = counts_HB.sum(0, keepdim=True), largest_H.max()[None]
        found = [
            _CHOICES[settings.choice](counts_B, float(top)) for counts_B, top in zip(counts_HB, largest_H, strict=True)
        ]
        scales[name] = torch.tensor(found)
        energy = sum(float(counts_B @ _MAGNITUDES_B.square()) for counts_B in counts_HB) or 1.0
        errors = [
            sum(_error(counts_B, scale) for counts_B, scale in zip(counts_HB, each, strict=True)) / energy
            for each in (found, [1.0] * len(found))
        ]
        notes.append(KvNote(name, found, float(largest_H.max()), *(round(error, 9) for error in errors)))
    return scales, notes


_MAGNITUDES_B = torch.arange(_BINS, dtype=torch.int16).view(torch.bfloat16).double()


def _error(counts_B: Tensor, scale: float) -> float:
    """The summed squared error of the counted magnitudes."""
    there = counts_B.nonzero()[:, 0]
    x_N = _MAGNITUDES_B[there]
    given_N = kv_cache.e4m3(x_N[None, None, None].float(), torch.tensor([scale])).double().flatten()
    return float(counts_B[there] @ (x_N - given_N).square())


def _max(counts_B: Tensor, largest: float) -> float:
    """Nothing that was seen is cut off."""
    return largest / kv_cache.LARGEST if largest > 0 else 1.0


def _percentile(counts_B: Tensor, largest: float) -> float:
    """So much of what was seen is not cut off."""
    cumulated_B = counts_B.cumsum(0)
    place = int(torch.searchsorted(cumulated_B, cumulated_B[-1] * PERCENTILE / 100))
    return _max(counts_B, min(float(_MAGNITUDES_B[min(place, _BINS - 1)]), largest))


def _mse(counts_B: Tensor, largest: float) -> float:
    """The largest scale whose squared error is within a hundredth of the least.

    Scales around `max`: below it something is cut off, above it there is room for what the calibration did not see.
    """
    steps = range(-_BELOW * _STEPS, _ABOVE * _STEPS + 1)
    tried = [_max(counts_B, largest) * 2 ** (step / _STEPS) for step in steps]
    errors = [_error(counts_B, scale) for scale in tried]
    return max(scale for scale, error in zip(tried, errors, strict=True) if error <= _NEAR * min(errors))


_CHOICES: dict[str, Callable[[Tensor, float], float]] = {"max": _max, "percentile": _percentile, "mse": _mse}
