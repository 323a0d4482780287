"""What the target says at every token of its answers, kept on the disk: it reads them once, and not in every epoch.

The last hidden states give its exact logits through its head, at hidden-size bytes a token instead of vocabulary-size.
Where even those are too much, or the head does not fit beside the draft, its `top_k` most likely tokens are kept.
The target reads as it is quantized: one decoder layer in memory.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from quantkit import decoder
from quantkit.architecture import Architecture
from quantkit.checkpoint import Checkpoint, save_tensors
from quantkit.conversations import Exchange
from quantkit.errors import QuantkitError
from quantkit.hardware import compute_dtype
from quantkit.progress import Report

_STATES_BYTES = 1 << 30  # of hidden states that stand in memory while the target reads, layer by layer
_BATCH_TOKENS = 4096  # that go through a layer at once
_ROWS = 256  # positions whose logits stand in memory at a time


class Said(NamedTuple):
    """What the target said at N positions: either its last states [N, C], or its likeliest tokens' log p [N, K]."""

    hidden_NC: Tensor | None = None
    log_p_NK: Tensor | None = None
    tokens_NK: Tensor | None = None


class Teacher(NamedTuple):
    """What the target said of some exchanges, in files, and its head, which makes logits of states."""

    files: list[Path]  # of each exchange, in their order
    head_VC: Tensor

    def read(self, numbers: Sequence[int]) -> Said:
        """What was said at the answers of these exchanges, one after the other."""
        parts: dict[str, list[Tensor]] = {}
        for number in numbers:
            with safe_open(self.files[number], framework="pt") as file:
                for name in ("hidden", "log_p", "tokens"):
                    if f"{name}-{number}" in file.keys():  # noqa: SIM118 (a handle, no mapping)
                        parts.setdefault(name, []).append(file.get_tensor(f"{name}-{number}"))
        found = {name: torch.cat(tensors) for name, tensors in parts.items()}
        return Said(found.get("hidden"), found.get("log_p"), found.get("tokens"))


def logits(said: Said, head_VC: Tensor, rows: slice) -> Tensor:
    """The target's logits [n, V] at some of the positions; beyond its `top_k`, the rest of p is spread evenly."""
    if said.hidden_NC is not None:
        return said.hidden_NC[rows].to(head_VC.dtype) @ head_VC.T
    assert said.log_p_NK is not None and said.tokens_NK is not None
    log_p_nK, tokens_nK = said.log_p_NK[rows].float(), said.tokens_NK[rows].long()
    words = head_VC.shape[0]
    rest_n = (1 - log_p_nK.exp().sum(-1, keepdim=True)).clamp(min=1e-9) / max(words - log_p_nK.shape[1], 1)
    return rest_n.log().repeat(1, words).scatter_(-1, tokens_nK, log_p_nK)


def bytes_needed(arch: Architecture, answer_tokens: int, top_k: int | None) -> int:
    """Bytes on the disk for what the target says at so many tokens."""
    return answer_tokens * (2 * arch.hidden_size if top_k is None else 6 * top_k)


def listen(
    target: Checkpoint, exchanges: Sequence[Exchange], *, top_k: int | None, device: str, folder: Path, report: Report
) -> Teacher:
    """Have the target read the exchanges; what it says is kept in `folder`, group by group, so a killed run goes on.

    Raises:
        QuantkitError: more bytes are needed than the disk has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arch = target.arch
    outer = target.outer()
    head_VC = _head(target, outer)
    groups = list(_groups(exchanges, arch.hidden_size))
    files = [folder / f"said-{number:05d}.safetensors" for number in range(len(groups))]
    missing = [number for number, path in enumerate(files) if not path.exists()]
    left = sum(len(exchanges[index].answer) for number in missing for index in groups[number])
    _check_room(arch, left, top_k, folder)
    for number in missing:

        def progress(done: int, total: int, before: int = number) -> None:
            report("the target reads its answers, layer", before * total + done, len(groups) * total)

        texts = [exchanges[index] for index in groups[number]]
        with torch.no_grad():
            states = _states(target, outer, texts, device=device, report=progress)
            said = [_kept(state_NC, head_VC, top_k, device) for state_NC in states]
        pairs = zip(groups[number], said, strict=True)
        save_tensors(files[number], {f"{name}-{index}": t for index, one in pairs for name, t in one.items()})
    of = {index: path for group, path in zip(groups, files, strict=True) for index in group}
    return Teacher([of[index] for index in range(len(exchanges))], head_VC)


def silent(target: Checkpoint) -> Teacher:
    """A teacher who says nothing: for a loss that asks for the texts' tokens alone."""
    return Teacher([], _head(target, target.outer()))


def _head(target: Checkpoint, outer: dict[str, Tensor]) -> Tensor:
    return outer["model.embed_tokens.weight" if target.arch.tied_embeddings else "lm_head.weight"]


def _check_room(arch: Architecture, answer_tokens: int, top_k: int | None, folder: Path) -> None:
    needed, free = bytes_needed(arch, answer_tokens, top_k), shutil.disk_usage(folder).free
    if needed > free:
        fewer = min(64, free // max(6 * answer_tokens, 1))
        raise QuantkitError(
            f"what the target says at {answer_tokens} answer tokens needs {needed / 1e9:.1f} GB in {folder}, and "
            f"{free / 1e9:.1f} GB are free: free some space, give fewer prompts"
            + (f", or keep its likeliest tokens alone (top_k {fewer})" if fewer and top_k != fewer else "")
        )


def _groups(exchanges: Sequence[Exchange], hidden_size: int) -> Iterator[list[int]]:
    """Exchanges by length, in groups whose states fit into memory together."""
    order = sorted(range(len(exchanges)), key=lambda index: _length(exchanges[index]))
    group: list[int] = []
    tokens = 0
    for index in order:
        if group and (tokens + _length(exchanges[index])) * hidden_size * 4 > _STATES_BYTES:
            yield group
            group, tokens = [], 0
        group.append(index)
        tokens += _length(exchanges[index])
    if group:
        yield group


def _length(exchange: Exchange) -> int:
    return len(exchange.prompt) + len(exchange.answer)


def _states(
    target: Checkpoint, outer: dict[str, Tensor], exchanges: Sequence[Exchange], *, device: str,
    report: Callable[[int, int], None],
) -> list[Tensor]:  # fmt: skip
    """The last states, normed, where each answer token is predicted: float32 [answer tokens, C] for each exchange.

    exchanges: by length, so that those beside each other are padded little. Attention never looks to the right, so
        padding needs no mask; what it computes is not read.
    """
    arch, compute = target.arch, compute_dtype(device)
    embedding_VC = outer["model.embed_tokens.weight"]
    batches: list[list[Exchange]] = [[]]
    for exchange in exchanges:
        if batches[-1] and (len(batches[-1]) + 1) * _length(exchange) > _BATCH_TOKENS:
            batches.append([])
        batches[-1].append(exchange)
    states = []
    for batch in batches:
        width = max(map(_length, batch))
        ids = torch.tensor([one.prompt + one.answer + [0] * (width - _length(one)) for one in batch])
        states.append(embedding_VC[ids])
    longest = max(state.shape[1] for state in states)
    cos, sin = decoder.rotation(target.config, longest, dtype=compute, device=device)
    for index in range(arch.num_layers):
        report(index, arch.num_layers)
        weights = {name: tensor.to(device, compute) for name, tensor in target.layer(index).items()}
        for number, state_BTC in enumerate(states):
            width = state_BTC.shape[1]
            rotary = (cos[:, :width], sin[:, :width])
            states[number] = decoder.layer(weights, arch, state_BTC.to(device), rotary).to("cpu", torch.float32)
    report(arch.num_layers, arch.num_layers)
    norm_C = outer["model.norm.weight"]
    return [
        decoder.rms_norm(state_TC[len(one.prompt) - 1 : _length(one) - 1], norm_C, arch.norm_epsilon)
        for batch, state_BTC in zip(batches, states, strict=True)
        for one, state_TC in zip(batch, state_BTC, strict=True)
    ]


def _kept(state_NC: Tensor, head_VC: Tensor, top_k: int | None, device: str) -> dict[str, Tensor]:
    """What is kept of a text: bfloat16 states, or float16 log p and int32 tokens of the likeliest."""
    if top_k is None:
        return {"hidden": state_NC.to(torch.bfloat16)}
    compute = compute_dtype(device)
    head = head_VC.to(device, compute)
    best = [
        (rows_NC.to(device, compute) @ head.T).float().log_softmax(-1).topk(top_k) for rows_NC in state_NC.split(_ROWS)
    ]
    return {
        "log_p": torch.cat([each.values for each in best]).half().cpu(),
        "tokens": torch.cat([each.indices for each in best]).int().cpu(),
    }
