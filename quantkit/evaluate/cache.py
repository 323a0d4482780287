"""What a candidate pays for its KV cache alone: beside the same weights with one of 16 bits, and layer by layer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit import decoder, kv_cache
from quantkit.checkpoint import Checkpoint
from quantkit.decoder import Cache
from quantkit.evaluate import divergence, measures
from quantkit.evaluate.divergence import States
from quantkit.evaluate.windows import Windows
from quantkit.kv_scheme import KINDS, has_kv_scheme
from quantkit.progress import Report
from quantkit.ranks import HandOut

PLAIN = "float16"  # and bfloat16: what a 16-bit model computes is stored as it is
_SEQUENCES, _TOKENS = 4, 128  # that tell the layers apart: each layer is one more pass through those behind it
_MATTERS = 0.1  # of the weights' own KL: what the cache adds below that is nobody's concern
_MOST_LEFT = 0.25  # of the layers, at 16 bits


def resolved(checkpoint: Checkpoint, kind: str) -> str:
    """The type that `auto` stands for: FP8 where the checkpoint brings scales, as vLLM has it."""
    if kind != "auto":
        return kind
    return "fp8" if has_kv_scheme(checkpoint.config) else PLAIN


@dataclass(frozen=True)
class Reader:
    """The cache of each layer, for `divergence.read`; None of one that is left at 16 bits."""

    checkpoint: Checkpoint
    kind: str
    left: tuple[int, ...] = ()

    def __call__(self, index: int) -> Cache | None:
        return None if index in self.left else kv_cache.through(self.kind, self.checkpoint.kv_scales(index))


def reader(checkpoint: Checkpoint, kind: str) -> Reader | None:
    """The cache of each layer, None where nothing is rounded."""
    real = resolved(checkpoint, kind)
    return None if real in ("float16", "bfloat16") else Reader(checkpoint, real)


def scales(checkpoint: Checkpoint, kind: str) -> str:
    """In words, what the cache of that type divides by."""
    real = resolved(checkpoint, kind)
    if not KINDS[real].scales:
        return "of each token and head" if KINDS[real].scale_bytes else "none"
    return "calibrated, of the checkpoint" if has_kv_scheme(checkpoint.config) else "1.0, uncalibrated"


def cost(
    checkpoint: Checkpoint, kind: str, states: Mapping[str, tuple[States, States]], sets: Mapping[str, Windows], *,
    weights_kl: float, folder: Path, device: str, report: Report, hand_out: HandOut,
) -> dict[str, Any]:  # fmt: skip
    """KL and drift that the cache adds, on each set and by position; by layer; and which layers to leave at 16 bits.

    states: of each set, with a cache of 16 bits and with this one. weights_kl: what the candidate pays on text with a
    cache of 16 bits, nats a token.
    """
    on = {}
    for name, pair in states.items():
        scores = divergence.compare(
            checkpoint, checkpoint, pair, sets[name], device=device, report=report, hand_out=hand_out
        )
        found = measures.summarize(scores)
        on[name] = {"kl_nats": found["kl_nats"], "drift": found["drift"]}
    given = reader(checkpoint, kind)
    assert given is not None
    few = _few(sets["text"])
    kl_L = by_layer(checkpoint, few, given, device=device, report=report)
    left = to_leave(kl_L, added=on["text"]["kl_nats"]["value"], weights=weights_kl)
    found = {
        "type": resolved(checkpoint, kind), "scales": scales(checkpoint, kind), "on": on,
        "by_layer": {"kl_nats": kl_L, "tokens": int(few.scored_ST.sum())}, "leave_at_16_bits": left,
        "with_those_left": None,
    }  # fmt: skip
    if left:
        path = folder / "left.safetensors"
        path.unlink(missing_ok=True)
        mixed = divergence.read(
            checkpoint, sets["text"], path, device=device, report=report, what="some layers left at 16 bits, layer",
            cache=replace(given, left=tuple(left)), hand_out=hand_out,
        )  # fmt: skip
        pair = (states["text"][0], mixed)
        scores = divergence.compare(
            checkpoint, checkpoint, pair, sets["text"], device=device, report=report, hand_out=hand_out
        )
        found["with_those_left"] = measures.summarize(scores)["kl_nats"]
    return found


def _few(windows: Windows) -> Windows:
    """The beginnings of the first windows; every token of them but the first is scored."""
    ids_ST = windows.input_ids_ST[:_SEQUENCES, :_TOKENS]
    scored_ST = torch.arange(ids_ST.shape[1]) < windows.lengths_S[:_SEQUENCES, None]
    scored_ST[:, 0] = False
    return windows._replace(input_ids_ST=ids_ST, scored_ST=scored_ST, sequence_S=windows.sequence_S[:_SEQUENCES])


def by_layer(
    checkpoint: Checkpoint, windows: Windows, cache: Callable[[int], Cache | None], *, device: str, report: Report
) -> list[float]:
    """KL that the cache of each layer adds alone, nats a token.

    One pass over the weights: at each layer a copy of the states goes on that read its cache, beside those that read
    an earlier layer's: half as many layers' work as there are layers, on few tokens.
    """
    arch = checkpoint.arch
    embedding_VC = checkpoint.dense("model.embed_tokens.weight", dtype=torch.float32)
    plain_STC = embedding_VC[windows.input_ids_ST].to(device)
    del embedding_VC
    rotary = decoder.rotation(
        checkpoint.config, windows.input_ids_ST.shape[1], dtype=torch.float32, device=device
    )  # fmt: skip
    forks: list[Tensor] = []
    with torch.no_grad():
        for index in range(arch.num_layers):
            report("the cache of each layer alone, layer", index, arch.num_layers)
            weights = {name: tensor.to(device) for name, tensor in checkpoint.layer(index).items()}
            forks = [decoder.layer(weights, arch, fork_STC, rotary) for fork_STC in forks]
            forks.append(decoder.layer(weights, arch, plain_STC, rotary, cache(index)))
            plain_STC = decoder.layer(weights, arch, plain_STC, rotary)
        report("the cache of each layer alone, layer", arch.num_layers, arch.num_layers)
        names = ["model.norm.weight", "model.embed_tokens.weight" if arch.tied_embeddings else "lm_head.weight"]
        outer = {name: checkpoint.dense(name, dtype=torch.float32).to(device) for name in names}
        before_ST = windows.scored_ST.roll(-1, 1)
        wanted_N = windows.input_ids_ST[windows.scored_ST].to(device)
        plain_NV = decoder.head(outer, arch, plain_STC[before_ST])
        found = []
        for fork_STC in forks:
            fork_NV = decoder.head(outer, arch, fork_STC[before_ST])
            found.append(float(divergence.score_logits(plain_NV.clone(), fork_NV, wanted_N)[2].double().mean()))
    return found


def to_leave(kl_L: list[float], *, added: float, weights: float) -> list[int]:
    """The fewest layers to leave at 16 bits, dearest first, so that the rest adds less than a tenth of the weights' KL.

    added: what all layers add together, measured; the layers' own are taken to share it in proportion. None where it
    is little already; at most a quarter of the layers, beyond which the type of cache is the wrong one.
    """
    total = sum(kl_L)
    if added <= _MATTERS * weights or total <= 0:
        return []
    left: list[int] = []
    for index in sorted(range(len(kl_L)), key=lambda index: -kl_L[index])[: int(_MOST_LEFT * len(kl_L))]:
        rest = added * sum(kl for place, kl in enumerate(kl_L) if place not in left) / total
        if rest <= _MATTERS * weights:
            break
        left.append(index)
    return sorted(left)
