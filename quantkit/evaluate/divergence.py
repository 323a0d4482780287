"""Reference and candidate over the same windows, one decoder layer in memory at a time: nll, KL and agreement."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from quantkit import decoder
from quantkit.checkpoint import Checkpoint, save_tensors
from quantkit.decoder import Cache
from quantkit.evaluate.windows import Windows
from quantkit.progress import Report

_LOGITS = 1 << 28  # bytes of both models' logits that stand in memory at a time: long multiplications are fast ones
_ROWS = 8  # positions whose logits are looked at together: what stays in the processor's cache
_TOKENS = 2048  # of a forward pass
_IN_MEMORY = 1 << 30  # bytes of hidden states; more are kept in a file and leave memory to the system
_WATCHED = 128  # tokens of the first window whose states are kept behind every layer
_BEST = 5


class Scores(NamedTuple):
    """Of every scored token, [N], in the order of windows and tokens."""

    reference_nll_N: Tensor  # nats
    candidate_nll_N: Tensor  # nats
    kl_N: Tensor  # KL(reference || candidate), nats
    same_top1_N: Tensor  # float, 0 or 1: both have the same most likely token
    same_top5_N: Tensor  # float: the share of the reference's five likeliest tokens that are among the candidate's
    sequence_N: Tensor  # int64
    position_N: Tensor  # int64: the token's place in its window

    def by_sequence(self) -> dict[str, Tensor]:
        """The means of nll and KL over each sequence's tokens, [S] float64."""
        columns = {"reference_nll": self.reference_nll_N, "candidate_nll": self.candidate_nll_N, "kl": self.kl_N}
        return {
            name: torch.stack([column[self.sequence_N == one].double().mean() for one in self.sequence_N.unique()])
            for name, column in columns.items()
        }


class States(NamedTuple):
    """A file with the last layer's states [N, C] before every scored token, and the first window's behind each layer.

    Both float32: `hidden` [N, C], `watched` [L, T, C].
    """

    path: Path

    def watched(self) -> Tensor:
        """[L, T, C]"""
        with safe_open(self.path, "pt") as file:
            watched: Tensor = file.get_tensor("watched")
        return watched

    def parts(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        """So many rows of the states at a time, with the number of the first."""
        with safe_open(self.path, "pt") as file:
            hidden = file.get_slice("hidden")
            for begin in range(0, hidden.get_shape()[0], rows):
                yield begin, hidden[begin : begin + rows]


def name_of(digest: str, windows: Windows, device: str) -> str:
    """What a checkpoint's states of windows are called, by what decides them."""
    name = hashlib.sha256(f"{digest} {device} {_WATCHED} {torch.__version__}".encode())
    for part in (windows.input_ids_ST, windows.scored_ST):
        name.update(f"{tuple(part.shape)}".encode() + part.numpy().tobytes())
    return name.hexdigest()[:32]


def read(
    checkpoint: Checkpoint, windows: Windows, path: Path, *, device: str, what: str, report: Report,
    cache: Callable[[int], Cache | None] | None = None,
) -> States:  # fmt: skip
    """Have a checkpoint read the windows in float32, unless `path` holds what came of it.

    cache: of a layer by its number, what its KV cache makes of what attention computes with; None: nothing.
    """
    if path.exists():
        return States(path)
    arch, ids_ST = checkpoint.arch, windows.input_ids_ST
    lengths_S = windows.lengths_S.tolist()
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f"{path.stem}-{os.getpid()}{path.suffix}")  # another process may be at the same
    hidden_STC = _room((*ids_ST.shape, arch.hidden_size), own.with_suffix(".states"))
    embedding_VC = checkpoint.dense("model.embed_tokens.weight", dtype=torch.float32)
    for number, ids_T in enumerate(ids_ST):
        hidden_STC[number] = embedding_VC[ids_T]
    del embedding_VC
    rotary = decoder.rotation(checkpoint.config, ids_ST.shape[1], dtype=torch.float32, device=device)
    batch = max(_TOKENS // ids_ST.shape[1], 1)
    watched = []
    with torch.no_grad():
        for index in range(arch.num_layers):
            report(what, index, arch.num_layers)
            weights = {name: tensor.to(device, torch.float32) for name, tensor in checkpoint.layer(index).items()}
            between = cache(index) if cache else None
            for begin in range(0, len(ids_ST), batch):
                rows, width = slice(begin, begin + batch), max(lengths_S[begin : begin + batch])
                part_BTC = hidden_STC[rows, :width].to(device)
                turned = tuple(each[:, :width] for each in rotary)
                hidden_STC[rows, :width] = decoder.layer(weights, arch, part_BTC, turned, between).cpu()  # type: ignore[arg-type]
            watched.append(hidden_STC[0, : min(_WATCHED, lengths_S[0])].clone())
    report(what, arch.num_layers, arch.num_layers)
    before_ST = windows.scored_ST.roll(-1, 1)  # a token's state predicts the next one
    save_tensors(own, {"hidden": hidden_STC[before_ST], "watched": torch.stack(watched)})
    own.replace(path)
    return States(path)


def _room(shape: tuple[int, ...], spilled: Path) -> Tensor:
    size = torch.Size(shape).numel()
    if 4 * size <= _IN_MEMORY:
        return torch.empty(shape)
    # Taken at once: a mapped file that finds the disk full when it is written to ends the process by SIGBUS.
    with spilled.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 4 * size)
    mapped = torch.from_file(str(spilled), shared=True, size=size, dtype=torch.float32).view(shape)
    spilled.unlink()  # mapped it lives on, and no longer than this process
    return mapped


def compare(
    reference: Checkpoint, candidate: Checkpoint, states: tuple[States, States], windows: Windows, *, device: str,
    report: Report,
) -> Scores:  # fmt: skip
    """Score every token under both checkpoints, from what they made of the windows."""
    first, second = (_head(checkpoint, device) for checkpoint in (reference, candidate))
    wanted_N = windows.input_ids_ST[windows.scored_ST].to(device)
    rows = max(_LOGITS // (8 * reference.arch.vocab_size), 1)
    parts = []
    with torch.no_grad():
        for (begin, ours), (_, theirs) in zip(*(each.parts(rows) for each in states), strict=True):
            report("comparing, token", begin, len(wanted_N))
            first_NV = decoder.head(first, reference.arch, ours.to(device))
            second_NV = decoder.head(second, candidate.arch, theirs.to(device))
            few = (each.split(_ROWS) for each in (first_NV, second_NV, wanted_N[begin : begin + len(ours)]))
            parts += [[part.cpu() for part in score_logits(*each)] for each in zip(*few, strict=True)]
    report("comparing, token", len(wanted_N), len(wanted_N))
    window_N, position_N = windows.scored_ST.nonzero(as_tuple=True)
    nll, theirs_nll, kl, same, shared = (torch.cat(column) for column in zip(*parts, strict=True))
    return Scores(nll, theirs_nll, kl, same, shared, windows.sequence_S[window_N], position_N)


def beside(
    reference: Checkpoint, candidate: Checkpoint, windows: Windows, *, device: str, folder: Path, report: Report
) -> Scores:
    """Both read, and are scored; `folder` keeps what the reference made of the windows."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / "candidate.safetensors"
    fresh.unlink(missing_ok=True)
    states = (
        read(reference, windows, folder / "reference.safetensors", device=device, what="reference", report=report),
        read(candidate, windows, fresh, device=device, what="candidate", report=report),
    )
    return compare(reference, candidate, states, windows, device=device, report=report)


def _head(checkpoint: Checkpoint, device: str) -> dict[str, Tensor]:
    names = ["model.norm.weight", "model.embed_tokens.weight" if checkpoint.arch.tied_embeddings else "lm_head.weight"]
    return {name: checkpoint.dense(name, dtype=torch.float32).to(device) for name in names}


def score_logits(reference_NV: Tensor, candidate_NV: Tensor, wanted_N: Tensor) -> tuple[Tensor, ...]:
    """The first five columns of Scores for N positions, from float32 logits of both, which are used up.

    With e = exp(z - max z), s its sum, z' the candidate's: KL = sum e (z - z') / s - log s - max z + log s' + max z'
    """
    first, second = (each.topk(min(_BEST, each.shape[-1]), -1) for each in (reference_NV, candidate_NV))
    nll_N, theirs_N = (-each.gather(-1, wanted_N[:, None])[:, 0] for each in (reference_NV, candidate_NV))
    likely_NV = (reference_NV - first.values[:, :1]).exp_()
    sum_N = likely_NV.sum(-1)
    kl_N = torch.linalg.vecdot(likely_NV, reference_NV.sub_(candidate_NV)) / sum_N
    log_N = sum_N.log() + first.values[:, 0]
    theirs_log_N = candidate_NV.sub_(second.values[:, :1]).exp_().sum(-1).log() + second.values[:, 0]
    shared_N = (first.indices[:, :, None] == second.indices[:, None, :]).any(-1).float().mean(-1)
    same_N = (first.indices[:, 0] == second.indices[:, 0]).float()
    return nll_N + log_N, theirs_N + theirs_log_N, kl_N - log_N + theirs_log_N, same_N, shared_N


def by_layer(reference: States, candidate: States) -> list[float]:
    """How far the candidate's residual stream is off behind each layer: |difference| / |reference| over the tokens.

    The first token is left out: in many models its state is a thousand times the others', and hides them.
    """
    ours, theirs = reference.watched()[:, 1:], candidate.watched()[:, 1:]
    return [float(off.norm() / whole.norm()) for off, whole in zip(ours - theirs, ours, strict=True)]
