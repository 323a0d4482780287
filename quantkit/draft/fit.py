"""A draft of the target's own layers that is of use before it is trained: those kept make up for those left out.

The draft's layer that was the target's k-th is to give what the target had before the layer that is kept next. Its
down_proj, which adds to the residual stream, is moved by ridge regression: with x what down_proj reads in the draft and
r what its stream then lacks, min over D of sum_t w_t || r_t - D x_t ||^2 + ridge || D ||^2, where w_t is one over the
mean square of the target's state, for a layer reads its input normed. And as the errors that remain say how well a
layer stands for those behind it, the layers are kept whose errors add up to least.

LLM-Streamline (arXiv 2403.19135) puts a small network, trained on the states around them, in place of layers that are
cut out; here nothing is put in place of them, and nothing is trained.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit import decoder
from quantkit.architecture import layer_prefix
from quantkit.checkpoint import Checkpoint
from quantkit.hardware import compute_dtype
from quantkit.progress import Report

REACH = 8  # layers, at most, that one may stand for, where that leaves a choice
_DOWN = "mlp.down_proj.weight"
_RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)  # times the mean square of an input: which is best, texts apart say
_APART = 8  # every so many-th text
_CHOICE_TOKENS, _CHOICE_INPUTS, _CHOICE_RIDGE = 4096, 1024, 0.05  # the choice is made on so many, of more inputs
_BATCH_TOKENS = 4096  # that go through a layer at once

Tensors = dict[str, Tensor]


class _Batch(NamedTuple):
    """States [B, T, C] of texts of about one length, and where they are text and not padding.

    Attention never looks to the right, so padding needs no mask; what it computes is not read.
    """

    known_BT: Tensor
    hidden_BTC: Tensor

    @property
    def states(self) -> Tensor:
        """[N, C], of what is text."""
        return self.hidden_BTC[self.known_BT]

    def behind(self, states_NC: Tensor) -> "_Batch":
        """The same texts with other states."""
        hidden_BTC = self.hidden_BTC.clone()
        hidden_BTC[self.known_BT] = states_NC.to(hidden_BTC.dtype)
        return _Batch(self.known_BT, hidden_BTC)


class _Passage(NamedTuple):
    """A layer on N tokens: what its down_proj reads, and the stream that it adds to."""

    inner_NI: Tensor
    stream_NC: Tensor


def choose(target: Checkpoint, texts: Sequence[list[int]], keep: int, *, device: str, report: Report) -> list[int]:
    """The layers to keep, in their order, the first among them: those whose fitted errors add up to least.

    The error of a layer standing for all up to another is that of the regression above, on the target's own states and
    from some of down_proj's inputs; the way through the target in `keep` such steps is the shortest (dynamic
    programming). Memory: inputs and outputs of `REACH` layers for 4096 tokens.
    """
    arch = target.arch
    reach = max(REACH, -(-arch.num_layers // keep))
    batches = _embedded(target, first(texts, _CHOICE_TOKENS), device)
    drawn = torch.randperm(arch.intermediate_size, generator=torch.Generator().manual_seed(0))
    inputs = drawn[:_CHOICE_INPUTS].to(device)
    standing: dict[int, tuple[Tensor, Tensor]] = {}  # what a layer's down_proj read, and what the layer gave
    errors: dict[tuple[int, int], float] = {}
    for index in range(arch.num_layers):
        report("choosing the draft's layers", index, arch.num_layers)
        weights = _weights(target, index, device)
        passages = [_passage(weights, target, batch) for batch in batches]
        batches = [b.behind(_out(p, weights[_DOWN])) for b, p in zip(batches, passages, strict=True)]
        states_NC = torch.cat([batch.states for batch in batches])
        weigh_N1 = _weigh(states_NC)
        for begin, (inner_NI, own_NC) in standing.items():
            seen_NI, lacking_NC = inner_NI * weigh_N1, (states_NC - own_NC) * weigh_N1
            solved_IC = _solved(seen_NI.T @ seen_NI, seen_NI.T @ lacking_NC, _CHOICE_RIDGE)
            errors[begin, index + 1] = float((lacking_NC - seen_NI @ solved_IC).square().mean())
        errors[index, index + 1] = 0.0
        standing[index] = (torch.cat([each.inner_NI for each in passages])[:, inputs].float(), states_NC)
        standing.pop(index + 1 - reach, None)
    report("choosing the draft's layers", arch.num_layers, arch.num_layers)
    return _shortest(errors, arch.num_layers, keep)


def fitted(
    target: Checkpoint, kept: Sequence[int], texts: Sequence[list[int]], *, device: str, report: Report
) -> Tensors:
    """The kept layers' weights by their names in the draft, float32, each fitted to stand for those behind it.

    texts: of the target's; every 8th says which ridge is best and teaches nothing.
    """
    arch = target.arch
    teaching = [text for number, text in enumerate(texts) if number % _APART != _APART - 1]
    batches = _embedded(target, teaching, device)
    taught = len(batches)
    theirs = ours = batches + _embedded(target, list(texts[_APART - 1 :: _APART]) or teaching[:1], device)
    found: Tensors = {}
    for place, (begin, end) in enumerate(zip(kept, [*kept[1:], arch.num_layers], strict=True)):
        own = _weights(target, begin, device)
        for index in range(begin, end):
            report("fitting the draft's layers", index, arch.num_layers)
            weights = own if index == begin else _weights(target, index, device)
            theirs = [each.behind(_out(_passage(weights, target, each), weights[_DOWN])) for each in theirs]
        passages = [_passage(own, target, each) for each in ours]
        pairs = [_weighed(p, each.states, own[_DOWN]) for p, each in zip(passages, theirs, strict=True)]
        stored = {name: tensor.float() for name, tensor in target.layer(begin).items()}  # own may be rounded to compute
        stored[_DOWN] += _moved(pairs[:taught], pairs[taught:]).to("cpu")
        down_CI = stored[_DOWN].to(own[_DOWN])
        ours = [each.behind(_out(p, down_CI)) for each, p in zip(ours, passages, strict=True)]
        found |= {layer_prefix(place) + name: tensor for name, tensor in stored.items()}
    report("fitting the draft's layers", arch.num_layers, arch.num_layers)
    return found


def first(texts: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """So many of the texts as hold that many tokens, one at least."""
    found: list[list[int]] = []
    for text in texts:
        if found and sum(map(len, found)) + len(text) > tokens:
            break
        found.append(text)
    return found


def _moved(teaching: Sequence[tuple[Tensor, Tensor]], apart: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """D [C, I], with the ridge that leaves least on the texts apart. Pairs: x [N, I] and r [N, C], both weighed."""
    gram_II = torch.stack([seen_NI.T @ seen_NI for seen_NI, _ in teaching]).sum(0)
    cross_IC = torch.stack([seen_NI.T @ lacking_NC for seen_NI, lacking_NC in teaching]).sum(0)
    best, least = torch.zeros_like(cross_IC), float("inf")
    for ridge in _RIDGES:
        solved_IC = _solved(gram_II, cross_IC, ridge)
        left = sum(float((lacking_NC - seen_NI @ solved_IC).square().sum()) for seen_NI, lacking_NC in apart)
        if left < least:
            best, least = solved_IC, left
    return best.T


def _weighed(passage: _Passage, wanted_NC: Tensor, down_CI: Tensor) -> tuple[Tensor, Tensor]:
    """What down_proj reads, and what the stream behind it lacks of the wanted states; both times the root of w."""
    weigh_N1 = _weigh(wanted_NC)
    return passage.inner_NI.float() * weigh_N1, (wanted_NC - _out(passage, down_CI)) * weigh_N1


def _weigh(states_NC: Tensor) -> Tensor:
    """The root of w [N, 1]: one over the root mean square of a state."""
    return states_NC.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()


def _solved(gram_II: Tensor, cross_IC: Tensor, ridge: float) -> Tensor:
    """The transpose of D [I, C]; ridge in mean squares of an input."""
    damped_II = gram_II.clone()
    damped_II.diagonal().add_(ridge * gram_II.diagonal().mean())
    return torch.cholesky_solve(cross_IC, torch.linalg.cholesky(damped_II))


def _shortest(errors: Mapping[tuple[int, int], float], layers: int, keep: int) -> list[int]:
    """The way from 0 to `layers` in `keep` steps whose errors add up to least: where its steps begin."""
    ways: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for _ in range(keep):
        longer: dict[int, tuple[float, list[int]]] = {}
        for (begin, end), error in errors.items():
            if begin in ways:
                way = (ways[begin][0] + error, [*ways[begin][1], begin])
                longer[end] = min(longer.get(end, way), way)
        ways = longer
    return ways[layers][1]


def _embedded(target: Checkpoint, texts: Sequence[list[int]], device: str) -> list[_Batch]:
    """The states before the first layer, in batches."""
    embedding_VC = target.outer()["model.embed_tokens.weight"]
    batches: list[list[list[int]]] = [[]]
    for text in sorted(texts, key=len):
        if batches[-1] and (len(batches[-1]) + 1) * len(text) > _BATCH_TOKENS:
            batches.append([])
        batches[-1].append(text)
    found = []
    for batch in batches:
        width = max(map(len, batch))
        known_BT = torch.tensor([[True] * len(text) + [False] * (width - len(text)) for text in batch])
        ids_BT = torch.tensor([text + [0] * (width - len(text)) for text in batch])
        found.append(_Batch(known_BT.to(device), embedding_VC[ids_BT].to(device, torch.float32)))
    return found


def _weights(target: Checkpoint, index: int, device: str) -> Tensors:
    compute = compute_dtype(device)
    return {name: tensor.to(device, compute) for name, tensor in target.layer(index).items()}


def _passage(weights: Tensors, target: Checkpoint, batch: _Batch) -> _Passage:
    arch, hidden_BTC = target.arch, batch.hidden_BTC
    length, compute = hidden_BTC.shape[1], weights[_DOWN].dtype
    rotary = decoder.rotation(target.config, length, dtype=compute, device=hidden_BTC.device)
    context = decoder.attention(weights, arch, decoder.attention_input(weights, arch, hidden_BTC), rotary)
    stream_BTC = hidden_BTC + decoder.linear(weights, "self_attn.o_proj", context)
    inner_BTI = decoder.gated(weights, decoder.mlp_input(weights, arch, stream_BTC))
    return _Passage(inner_BTI[batch.known_BT], stream_BTC[batch.known_BT])


def _out(passage: _Passage, down_CI: Tensor) -> Tensor:
    """The states behind a layer, float32 [N, C]."""
    return passage.stream_NC + (passage.inner_NI @ down_CI.T).float()
