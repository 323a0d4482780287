"""Reference and candidate over the same windows, one decoder layer in memory at a time: nll, KL and agreement.

Under torchrun each rank reads every N-th window, and scores its part of the tokens; rank 0 puts them together, so that
what lies on the disk does not tell how many there were.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from quantkit import checkpoint as checkpoints
from quantkit import decoder, ranks
from quantkit.checkpoint import Checkpoint, save_tensors
from quantkit.decoder import Cache
from quantkit.evaluate.windows import Windows
from quantkit.progress import Report, silent
from quantkit.ranks import HandOut

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


CacheOf = Callable[[int], Cache | None]  # of a layer by its number, what its KV cache makes of what attention reads


def _alone(order: ranks.Order) -> None:
    """Nobody to hand anything to."""


def read(
    checkpoint: Checkpoint, windows: Windows, path: Path, *, device: str, what: str, report: Report,
    cache: CacheOf | None = None, hand_out: HandOut = _alone,
) -> States:  # fmt: skip
    """Have a checkpoint read the windows in float32, unless `path` holds what came of it; on rank 0.

    cache: None: what attention reads is what was computed.
    """
    if not path.exists():
        hand_out(_Reading(checkpoint.path, windows, path, cache))
        _read(checkpoint, windows, path, cache, device=device, what=what, report=report)
    return States(path)


class _Reading(NamedTuple):
    """What the other ranks are told of `read`."""

    checkpoint: Path
    windows: Windows
    path: Path
    cache: CacheOf | None

    def follow(self, device: str) -> None:
        """Read this rank's windows."""
        opened = checkpoints.open_checkpoint(self.checkpoint)
        _read(opened, self.windows, self.path, self.cache, device=device, what="", report=silent)


def _read(
    checkpoint: Checkpoint, windows: Windows, path: Path, cache: CacheOf | None, *, device: str, what: str,
    report: Report,
) -> None:  # fmt: skip
    """This rank's windows; rank 0 stores what came of all."""
    arch, scored_ST = checkpoint.arch, ranks.share(windows.scored_ST)
    ids_ST, lengths_S = ranks.share(windows.input_ids_ST), ranks.share(windows.lengths_S).tolist()
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = f"{path.stem}-{ranks.rank()}-{os.getpid()}"  # another process may be at the same
    hidden_STC = _room((*ids_ST.shape, arch.hidden_size), path.with_name(f"{mine}.states"))
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
            watched += [hidden_STC[0, : min(_WATCHED, lengths_S[0])].clone()] if ranks.rank() == 0 else []
    report(what, arch.num_layers, arch.num_layers)
    own_NC = hidden_STC[scored_ST.roll(-1, 1)]  # a token's state predicts the next one
    step = ranks.world_size()
    counts = [int(windows.scored_ST[rank::step].sum()) for rank in range(step)]
    parts = ranks.collect(own_NC, counts)
    if ranks.rank() == 0:
        own = path.with_name(mine + path.suffix)
        save_tensors(own, {"hidden": _in_order(parts, windows.scored_ST), "watched": torch.stack(watched)})
        own.replace(path)


def _in_order(parts: Sequence[Tensor], scored_ST: Tensor) -> Tensor:
    """The rows of every rank's windows, in the order of all windows."""
    if len(parts) == 1:
        return parts[0]
    windows = [iter(part.split(scored_ST[rank :: len(parts)].sum(1).tolist())) for rank, part in enumerate(parts)]
    return torch.cat([next(windows[number % len(parts)]) for number in range(len(scored_ST))])


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
    report: Report, hand_out: HandOut = _alone,
) -> Scores:  # fmt: skip
    """Score every token under both checkpoints, from what they made of the windows; on rank 0."""
    wanted_N = windows.input_ids_ST[windows.scored_ST]
    hand_out(_Comparing(reference.path, candidate.path, wanted_N))
    parts = _compare(reference, candidate, states, wanted_N, device=device, report=report)
    window_N, position_N = windows.scored_ST.nonzero(as_tuple=True)
    nll, theirs_nll, kl, same, shared = (torch.cat(column) for column in zip(*parts, strict=True))
    return Scores(nll, theirs_nll, kl, same, shared, windows.sequence_S[window_N], position_N)


class _Comparing(NamedTuple):
    """What the other ranks are told of `compare`."""

    reference: Path
    candidate: Path
    wanted_N: Tensor

    def follow(self, device: str) -> None:
        """Score the tokens that rank 0 deals out."""
        reference, candidate = (checkpoints.open_checkpoint(path) for path in (self.reference, self.candidate))
        _compare(reference, candidate, None, self.wanted_N, device=device, report=silent)


def _compare(
    reference: Checkpoint, candidate: Checkpoint, states: tuple[States, States] | None, wanted_N: Tensor, *,
    device: str, report: Report,
) -> list[list[Tensor]]:  # fmt: skip
    """The first columns of Scores, in parts one behind the other; on rank 0, which alone has the states."""
    heads = [_head(checkpoint, device) for checkpoint in (reference, candidate)]
    step = ranks.world_size()
    rows = max(_LOGITS // (8 * reference.arch.vocab_size), 1)
    read = [each.parts(rows * step) for each in states] if states else None
    found = []
    with torch.no_grad():
        for begin in range(0, len(wanted_N), rows * step):
            report("comparing, token", begin, len(wanted_N))
            wanted = wanted_N[begin : begin + rows * step].tensor_split(step)
            logits = []
            for place, (head, checkpoint) in enumerate(zip(heads, (reference, candidate), strict=True)):
                whole = next(read[place])[1].tensor_split(step) if read else None
                like = torch.empty(len(wanted[ranks.rank()]), checkpoint.arch.hidden_size)
                logits.append(decoder.head(head, checkpoint.arch, ranks.deal(whole, like).to(device)))
            few = (each.split(_ROWS) for each in (*logits, wanted[ranks.rank()].to(device)))
            own = [torch.stack(score_logits(*each), 1).cpu() for each in zip(*few, strict=True)]
            parts = ranks.collect(torch.cat(own), [len(each) for each in wanted])
            found += [list(part.unbind(1)) for part in parts]
    report("comparing, token", len(wanted_N), len(wanted_N))
    return found


def beside(
    reference: Checkpoint, candidate: Checkpoint, windows: Windows, *, device: str, folder: Path, report: Report
) -> Scores:
    """On one process: both read, and are scored; `folder` keeps what the reference made of the windows."""
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
