"""What the loss thinks of an error in a linear's outputs: their Fisher information, before any integer is chosen.

KL(original || quantized) is to second order e^T F e / 2, with F the Fisher information at the output that carries the
error e. Averaged over tokens it is the output side of a Kronecker-factored curvature (K-FAC, Martens and Grosse, arXiv
1503.05671), as the Gram matrix of the inputs is its input side; `gptq` rounds under both. How much of it each token has
weighs the token in the Gram matrix: what a linear reads where nothing depends on its output need not be kept.

One forward and one backward pass of the original model, a layer at a time: the states before each layer lie in a mapped
file.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from quantkit import decoder, ranks
from quantkit.architecture import INPUT_GROUPS, linear_shapes
from quantkit.capacity import duration
from quantkit.checkpoint import Checkpoint, save_tensors
from quantkit.decoder import Rotation
from quantkit.losses import curvature_probe
from quantkit.progress import Report
from quantkit.quantize import states
from quantkit.quantize.gram import add_gram, mirror

Errors = Callable[[Tensor], dict[int, Tensor]]  # of a weight
BATCH = 4  # samples a pass through a layer
MAX_ROWS, MAX_TOKENS = duration.CURVATURE_ROWS, duration.CURVATURE_TOKENS
LOUD = 30.0  # times the mean: what a token's trace says past this is no chance
MAX_SHARE = 3.0  # times the mean of its window: nor of a block of the Fisher information
_CHUNK = 128  # positions whose logits stand in memory


class Curvature(NamedTuple):
    """Of one layer, in any unit.

    blocks: by linear, the diagonal blocks of the Fisher information at its outputs, float32 [rows, rows] each. A token
        counts up to MAX_SHARE: the first of each window, which every later one attends to, has most of the trace of
        v_proj, and what a handful of tokens show of 192 rows is chance.
    tokens: by the first linear of those that read the same, what each token weighs in their Gram matrix. float32
        [samples, length], of this rank's samples.
    """

    blocks: dict[str, list[Tensor]]
    tokens: dict[str, Tensor]


def block_sizes(out_features: int) -> list[int]:
    """Rows of each diagonal block that a linear's Fisher information is kept as."""
    return duration.block_sizes(out_features, MAX_ROWS)


def measure(
    checkpoint: Checkpoint, input_ids_ST: Tensor, *, folder: Path, own: Path, begin: int, device: str,
    dtype: torch.dtype, report: Report, errors: Errors | None = None,
) -> list[dict[str, dict[int, float]]]:  # fmt: skip
    """Store each layer's in `folder`, unless those from layer `begin` on are there and no errors are asked about.

    input_ids_ST: this rank's windows (`ranks.share`); every rank calls it. own: this rank's folder, for the states.
    errors: changes of a linear's weight, float32 [out, in], by any key.

    Returns what each change would cost, KL(original || changed) in nats a token to second order, by layer and linear.
    """
    arch = checkpoint.arch
    if errors is None and all(_file(folder, index).exists() for index in range(begin, arch.num_layers)):
        return []
    windows = max(MAX_TOKENS // input_ids_ST.shape[1] // ranks.world_size(), 1)
    ids_ST = input_ids_ST[:windows]
    rotary = decoder.rotation(checkpoint.config, ids_ST.shape[1], dtype=dtype, device=device)
    parts = [slice(start, min(start + BATCH, len(ids_ST))) for start in range(0, len(ids_ST), BATCH)]
    shape = (*ids_ST.shape, arch.hidden_size)
    behind_STC = states.scratch(own, "fisher-states-0", shape, dtype)
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    names += [] if arch.tied_embeddings else ["lm_head.weight"]
    outer = checkpoint.read(names)  # as stored, and mapped
    total = 2 * arch.num_layers
    with torch.no_grad():
        behind_STC[:] = outer[names[0]][ids_ST]
        for index in range(arch.num_layers):
            report("measuring the curvature, layer", index, total)
            weights = {name: tensor.to(device, dtype) for name, tensor in checkpoint.layer(index).items()}
            before_STC, behind_STC = behind_STC, states.scratch(own, f"fisher-states-{index + 1}", shape, dtype)
            for part in parts:
                behind_STC[part] = decoder.layer(weights, arch, before_STC[part].to(device), rotary).cpu()
    costs: list[dict[str, dict[int, float]]] = []
    gradient_STC = states.scratch(own, "fisher-gradient", shape, torch.float32)
    head_VC, norm_C = outer[names[-1] if len(names) > 2 else names[0]].to(device, dtype), outer[names[1]].to(device)
    for part in parts:
        first = ranks.rank() + part.start * ranks.world_size()  # of all ranks' windows: the seed of its probe
        hidden_BTC = behind_STC[part].to(device)
        gradient_STC[part] = _at_the_end(hidden_BTC, norm_C.float(), head_VC, arch.norm_epsilon, first).cpu()
    del outer, head_VC
    del before_STC, behind_STC
    for index in reversed(range(begin, arch.num_layers)):
        report("measuring the curvature, layer", total - 1 - index, total)
        weights = {name: tensor.to(device, dtype) for name, tensor in checkpoint.layer(index).items()}
        changes = {name: errors(weights[f"{name}.weight"].float()) for name in linear_shapes(arch)} if errors else {}
        before_STC = states.reopen_scratch(own, f"fisher-states-{index}", shape, dtype)
        blocks, traces, cost = _backward(checkpoint, weights, before_STC, gradient_STC, parts, rotary, changes)
        costs.append(_mean(cost, ids_ST.numel()))
        ranks.sum_up(blocks, 0)
        for block in blocks.values():
            mirror(block.div_(ids_ST.numel()))
        save_tensors(_tokens_file(own, index), _weights(traces, input_ids_ST.shape))
        if ranks.rank() == 0:
            save_tensors(_file(folder, index), {name: block.cpu() for name, block in blocks.items()})
    report("measuring the curvature, layer", total, total)
    for name in ("gradient", *(f"states-{index}" for index in range(arch.num_layers + 1))):
        states.drop_scratch(own, f"fisher-{name}")
    ranks.barrier()
    return costs[::-1]


def read(folder: Path, own: Path, index: int, device: torch.device) -> Curvature:
    """A layer's, as `measure` left it."""
    blocks: dict[str, list[Tensor]] = {}
    for name, block in sorted(load_file(_file(folder, index)).items()):
        blocks.setdefault(name.rpartition(".")[0], []).append(block.to(device))
    return Curvature(blocks, {name: each.to(device) for name, each in load_file(_tokens_file(own, index)).items()})


def drop(folder: Path, own: Path, index: int) -> None:
    """Delete a layer's, which is done with."""
    _file(folder, index).unlink(missing_ok=True)
    _tokens_file(own, index).unlink(missing_ok=True)


def _file(folder: Path, index: int) -> Path:
    return folder / f"fisher-{index:05d}.safetensors"


def _tokens_file(own: Path, index: int) -> Path:
    return own / f"fisher-tokens-{index:05d}.safetensors"


def _mean(sums: dict[str, dict[int, Tensor]], tokens: int) -> dict[str, dict[int, float]]:
    """The sums of all ranks over their tokens."""
    named = {f"{linear}/{key}": each for linear, by_key in sums.items() for key, each in by_key.items()}
    count = ranks.sum_up(named, tokens) if named else tokens
    return {linear: {key: float(named[f"{linear}/{key}"]) / count for key in each} for linear, each in sums.items()}


def _weights(traces: dict[str, Tensor], shape_ST: torch.Size) -> dict[str, Tensor]:
    """What this rank's tokens weigh, by group: the root of their traces over the mean of all ranks'.

    Tokens of windows that were not measured weigh what those at their place in the others do on average.

    The root, since a trace is one probe's and as much chance as it is the token's. Not so for a token that is far above
    the others, as the first of a window is for keys and values: beyond LOUD times the mean the trace itself counts.
    Such inputs are much alike, and to keep them right takes few of a weight's degrees of freedom.
    """
    found = {}
    for group in INPUT_GROUPS:
        trace_ST = torch.stack([traces[linear] for linear in group]).sum(0)
        sums = {"trace": trace_ST.sum()}
        count = ranks.sum_up(sums, trace_ST.numel())
        weight_ST = trace_ST * (count / sums["trace"].clamp_min(torch.finfo(torch.float32).tiny))
        weight_ST = (weight_ST * (weight_ST / LOUD).clamp_min(1)).sqrt()
        sums = {"weight": weight_ST.sum(0)}
        windows = ranks.sum_up(sums, len(weight_ST))
        found[group[0]] = (sums["weight"] / windows).repeat(shape_ST[0], 1)
        found[group[0]][: len(trace_ST)] = weight_ST
    return {name: weight_ST.cpu() for name, weight_ST in found.items()}


@torch.enable_grad()
def _at_the_end(hidden_BTC: Tensor, norm_C: Tensor, head_VC: Tensor, epsilon: float, first: int) -> Tensor:
    """The probe of every position, sent back through the head and the last norm: float32 [B, T, C]."""
    hidden_BTC = hidden_BTC.float().requires_grad_()
    normed_BTC = decoder.rms_norm(hidden_BTC, norm_C, epsilon)
    gradient_BTC = torch.empty_like(normed_BTC)
    with torch.no_grad():
        for sample, normed_TC in enumerate(normed_BTC.to(head_VC.dtype)):
            generator = torch.Generator(head_VC.device).manual_seed(first + sample * ranks.world_size())
            for begin in range(0, len(normed_TC), _CHUNK):
                logits_NV = (normed_TC[begin : begin + _CHUNK] @ head_VC.T).float()
                probe_NV = curvature_probe(logits_NV, generator)
                gradient_BTC[sample, begin : begin + _CHUNK] = probe_NV.to(head_VC.dtype) @ head_VC
    normed_BTC.backward(gradient_BTC)
    assert hidden_BTC.grad is not None
    return hidden_BTC.grad


@torch.enable_grad()
def _backward(
    checkpoint: Checkpoint, weights: decoder.Weights, states_STC: Tensor, gradient_STC: Tensor, parts: list[slice],
    rotary: Rotation, changes: dict[str, dict[int, Tensor]],
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, dict[int, Tensor]]]:  # fmt: skip
    """Take the gradient before the layer for that behind it.

    Returns each block's sum over the tokens, each token's trace, and what each change costs, summed over the tokens.
    """
    arch, device = checkpoint.arch, rotary[0].device
    blocks: dict[str, Tensor] = {}
    traces = {linear: torch.zeros(states_STC.shape[:2], device=device) for linear in linear_shapes(arch)}
    for linear, (rows, _) in linear_shapes(arch).items():
        for number, size in enumerate(block_sizes(rows)):
            blocks[f"{linear}.{number:03d}"] = torch.zeros(size, size, device=device)

    cost = {linear: {key: torch.zeros((), device=device) for key in each} for linear, each in changes.items()}

    def watch(linear: str, x_BTI: Tensor, part: slice) -> Callable[[Tensor], None]:
        def add(gradient_BTO: Tensor) -> None:
            for key, change_OI in changes.get(linear, {}).items():
                moved_BTO = x_BTI.detach() @ change_OI.T.to(x_BTI.dtype)
                cost[linear][key] += (moved_BTO.float() * gradient_BTO).sum(-1).square().sum() / 2
            trace_BT1 = gradient_BTO.float().square().sum(-1, keepdim=True)
            traces[linear][part] = trace_BT1[..., 0]
            most_B11 = MAX_SHARE * trace_BT1.mean(1, keepdim=True)
            capped_BTO = gradient_BTO * (most_B11 / trace_BT1.maximum(most_B11)).nan_to_num_(1.0).sqrt()
            pieces = capped_BTO.flatten(0, 1).float().split(block_sizes(capped_BTO.shape[-1]), dim=1)
            for number, piece_NR in enumerate(pieces):
                add_gram(blocks[f"{linear}.{number:03d}"], piece_NR, gradient_BTO.dtype)

        return add

    for part in parts:

        def show(linear: str, x_BTI: Tensor, output_BTO: Tensor, part: slice = part) -> None:
            output_BTO.register_hook(watch(linear, x_BTI, part))

        watched = decoder.Watched(weights, show)
        hidden_BTC = states_STC[part].to(device, torch.float32).requires_grad_()
        decoder.layer(watched, arch, hidden_BTC, rotary).backward(gradient_STC[part].to(device))
        assert hidden_BTC.grad is not None
        gradient_STC[part] = hidden_BTC.grad.cpu()
    return blocks, traces, cost
