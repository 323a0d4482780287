"""The one loop over decoder layers: calibrate, choose the integers, store, go on with what was stored.

One layer's weights and Gram matrices are all that must be in memory; the hidden states of the calibration set are
mapped files (`states`). A layer's file is written last, after the states behind it: a run that was killed goes on at
the first layer without a file, from the very states that the layer before it left.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from quantkit import artifacts, decoder, formats, hardware, quantization_config, ranks, shards, vllm_support
from quantkit.architecture import INPUT_GROUPS, Architecture, layer_prefix, linear_shapes
from quantkit.checkpoint import Checkpoint, copy_companions, open_checkpoint, save_tensors, write_weights
from quantkit.errors import QuantkitError, raise_all
from quantkit.formats import QuantizedWeight, Storages
from quantkit.progress import LINE, Report, silent
from quantkit.quantize import allocate, fisher, gram, schemes, states
from quantkit.quantize.kv_scales import KvNote
from quantkit.quantize.layer import Layer, LinearNote, Settings
from quantkit.quantize.schemes import Override
from quantkit.shards import Entry
from quantkit.tokens import TokenSet

_ALLOCATION = "allocation.json"  # what `bits: auto` chose
_KV_NOTES = "kv_cache"  # in the metadata of a layer's file


def check_settings(checkpoint: Checkpoint, settings: Settings) -> list[str]:
    """Refuse, before any work, what vLLM would not load; returns what only some devices load, a sentence each.

    Raises:
        QuantkitError: each reason, with what to choose instead.
    """
    stored = storages(checkpoint.arch, settings)
    problems: list[str] = []
    limits: list[str] = []
    for storage in {stored.usual, *stored.special.values()} - {None}:
        assert storage is not None
        shapes = {
            linear: shape
            for linear, shape in linear_shapes(checkpoint.arch).items()
            if any(stored.of(layer_prefix(index) + linear) == storage for index in range(checkpoint.arch.num_layers))
        }
        for ask, reasons in (
            (vllm_support.unsupported, problems), (vllm_support.cuda_only, limits), (vllm_support.cpu_only, limits),
        ):  # fmt: skip
            reasons += ask(
                storage.format, bits=storage.bits, group_size=storage.group_size, symmetric=storage.symmetric,
                shapes=shapes,
            )  # fmt: skip
    choices: tuple[int, ...] = ()
    if settings.average_bits is not None:
        try:
            choices = allocate.choices(settings.format, settings.bit_choices)
        except ValueError as error:
            problems.append(str(error))
        else:
            problems += _budget_problems(checkpoint.arch, settings.average_bits, choices, stored)
    raise_all(problems)
    if 8 in choices:
        limits += vllm_support.cuda_only(
            settings.format, bits=8, group_size=settings.group_size, symmetric=True,
            shapes=linear_shapes(checkpoint.arch),
        )  # fmt: skip
    return sorted(set(limits))


def _budget_problems(arch: Architecture, average_bits: float, choices: tuple[int, ...], stored: Storages) -> list[str]:
    """Why what patterns name, and the fewest bits for the rest, are more than the budget."""
    weights, fewest = 0, 0
    for index, (linear, (rows, columns)) in itertools.product(range(arch.num_layers), linear_shapes(arch).items()):
        name = layer_prefix(index) + linear
        storage = stored.of(name)
        weights += rows * columns
        fewest += rows * columns * ((storage.bits if storage else 16) if name in stored.special else min(choices))
    if weights * average_bits >= fewest:
        return []
    return [
        f"average_bits {average_bits:g} is less than the {fewest / weights:.2f} that what ignore and overrides name "
        f"leaves at the least: raise it, or name fewer linears"
    ]


def allocation(folder: Path) -> dict[str, Any] | None:
    """What `bits: auto` chose: the average, and for each group its linears, bits and the cost by bits; else None."""
    path = folder / _ALLOCATION
    return json.loads(path.read_text()) if path.exists() else None


def settled(settings: Settings, folder: Path) -> Settings:
    """The settings with the bits that `bits: auto` chose, as soon as `quantize_layers` has chosen them."""
    chosen = allocation(folder)
    if settings.average_bits is None or chosen is None:
        return settings
    overrides, ignore = list(settings.overrides), list(settings.ignore)
    for entry in chosen["groups"]:
        for linear in entry["linears"]:
            if entry["bits"] == 16:
                ignore.append(linear)
            elif entry["bits"] != settings.bits:
                overrides.append(Override(linear, bits=entry["bits"], symmetric=True))
    return settings._replace(average_bits=None, overrides=tuple(overrides), ignore=tuple(ignore))


def _allocate(
    checkpoint: Checkpoint, input_ids_ST: Tensor, settings: Settings, *, folder: Path, own: Path, device: str,
    dtype: torch.dtype, report: Report,
) -> None:  # fmt: skip
    """Choose bits for every group of linears that no pattern names, and store what was chosen and why."""
    path, arch = folder / _ALLOCATION, checkpoint.arch
    assert settings.average_bits is not None
    if path.exists():
        return
    choices = allocate.choices(settings.format, settings.bit_choices)

    def errors(weight_OI: Tensor) -> dict[int, Tensor]:
        return allocate.rounding_errors(
            weight_OI, choices, group_size=settings.group_size, symmetric=settings.symmetric
        )

    costs = fisher.measure(
        checkpoint, input_ids_ST, folder=folder, own=own, begin=0, device=device, dtype=dtype, report=report,
        errors=errors,
    )  # fmt: skip
    if not settings.output_curvature:
        for index in range(arch.num_layers):
            fisher.drop(folder, own, index)
    shapes, fixed = linear_shapes(arch), storages(arch, settings).special
    names, groups = [], []
    for index, group in itertools.product(range(arch.num_layers), INPUT_GROUPS):
        linears = [layer_prefix(index) + linear for linear in group]
        cost = {bits: sum(costs[index][linear][bits] for linear in group) if bits < 16 else 0.0 for bits in choices}
        if linears[0] in fixed:
            storage = fixed[linears[0]]
            cost = {storage.bits if storage else 16: 0.0}
        names.append(linears)
        groups.append(allocate.Group(sum(math.prod(shapes[linear]) for linear in group), cost))
    chosen = allocate.solve(groups, settings.average_bits)
    weights = sum(group.weights for group in groups)
    average = sum(group.weights * bits for group, bits in zip(groups, chosen, strict=True)) / weights
    free = [place for place, linears in enumerate(names) if linears[0] not in fixed]
    shown = ", ".join(f"{chosen.count(bits)} groups of linears at {bits} bits" for bits in sorted(set(chosen)))
    report(f"bits: {shown}; {average:.2f} on average", 0, LINE)
    if ranks.rank() == 0:
        entries = [{"linears": names[place], "bits": chosen[place], "cost_nats": groups[place].cost} for place in free]
        artifacts.write_json(path, {"average_bits": average, "groups": entries})
    ranks.barrier()


def storages(arch: Architecture, settings: Settings) -> Storages:
    """How the settings' linears are stored."""
    return schemes.plan(arch, settings.storage, settings.ignore, settings.overrides)


def quantize_layers(
    checkpoint: Checkpoint, tokens: TokenSet, settings: Settings, *, folder: Path, device: str, report: Report
) -> list[LinearNote]:
    """Quantize every decoder layer; each is stored in `folder` as it is done, and found there after a kill.

    Under torch.distributed every rank calls this with the same arguments: samples and rows are shared out, rank 0
    stores the layers, and `folder` must be on a disk that all ranks see.
    """
    arch = checkpoint.arch
    folder.mkdir(parents=True, exist_ok=True)
    own = _own(folder)
    own.mkdir(exist_ok=True)
    # Calibration inputs need no more than bfloat16: what rounds them is far below what 4 bits round away. Weights, Gram
    # matrices and residual stream stay float32.
    compute = hardware.compute_dtype(device)
    with torch.no_grad():
        rotary = decoder.rotation(checkpoint.config, tokens.input_ids_ST.shape[1], dtype=compute, device=device)
        own_ST = ranks.share(tokens.input_ids_ST)
        if settings.average_bits is not None:
            _allocate(checkpoint, own_ST, settings, folder=folder, own=own, device=device, dtype=compute, report=report)
            settings = settled(settings, folder)
        stored = storages(arch, settings)
        told = gram.told(len(tokens.input_ids_ST) - tokens.written, tokens.written)
        begin, hidden = _start(checkpoint, own_ST, settings, folder, own)
        if settings.output_curvature:
            fisher.measure(
                checkpoint, own_ST, folder=folder, own=own, begin=begin, device=device, dtype=compute, report=report
            )
        for index in range(begin, arch.num_layers):
            report("layer", index, arch.num_layers)
            original = {name: tensor.to(device) for name, tensor in checkpoint.layer(index).items()}
            curvature = fisher.read(folder, own, index, rotary[0].device) if settings.output_curvature else None
            prefix = layer_prefix(index)
            special = {n.removeprefix(prefix): s for n, s in stored.special.items() if n.startswith(prefix)}
            layer = Layer(original, arch, settings, rotary, hidden, own, curvature, special, told)
            layer.quantize()
            behind = {name: states.make(own, index + 1, name, tensor.shape) for name, tensor in hidden.items()}
            layer.outputs(layer.run, behind["quantized"])
            if layer.reference is not None:
                layer.outputs(layer.reference, behind["original"])
            states.commit(own, index + 1)
            ranks.barrier()
            if ranks.rank() == 0:
                _store(layer_file(folder, index), layer)
            ranks.barrier()
            fisher.drop(folder, own, index)
            states.drop_before(own, index + 1)
            hidden = behind
    report("layer", arch.num_layers, arch.num_layers)
    return [note for index in range(arch.num_layers) for note in _read_notes(folder, index)]


class Order(NamedTuple):
    """What rank 0 hands to the others: the arguments of `quantize_layers`."""

    checkpoint: Path
    tokens: TokenSet
    settings: Settings
    folder: Path

    def follow(self, device: str) -> None:
        """Take part in what rank 0 quantizes."""
        checkpoint = open_checkpoint(self.checkpoint)
        quantize_layers(checkpoint, self.tokens, self.settings, folder=self.folder, device=device, report=silent)


def _start(
    checkpoint: Checkpoint, input_ids_ST: Tensor, settings: Settings, folder: Path, own: Path
) -> tuple[int, dict[str, Tensor]]:
    """The first layer without a file, and the states before it.

    Raises:
        QuantkitError: layers were stored, and the states behind them are not there.
    """
    names = settings.streams
    shape = (*input_ids_ST.shape, checkpoint.arch.hidden_size)
    done = 0
    while layer_file(folder, done).exists():
        done += 1
    if done == checkpoint.arch.num_layers:
        return done, {}
    found = {name: states.find(own, done, name, shape) for name in names}
    if all(tensor is not None for tensor in found.values()):
        return done, {name: tensor for name, tensor in found.items() if tensor is not None}
    if done:
        raise QuantkitError(
            f"{folder} holds {done} finished layers and no states to go on from (another number of processes, or files "
            "that were deleted): start again with --fresh"
        )
    name = "model.embed_tokens.weight"
    embedding_VC = checkpoint.read([name])[name]  # as stored, and mapped: only the rows that occur are read
    hidden = {name: states.make(own, 0, name, shape) for name in names}
    for tensor in hidden.values():
        for sample, ids_T in enumerate(input_ids_ST):
            tensor[sample] = embedding_VC[ids_T]
    return 0, hidden


def write_checkpoint(checkpoint: Checkpoint, settings: Settings, *, folder: Path, out: Path) -> None:
    """Put the stored layers together as a checkpoint that vLLM loads, one tensor in memory at a time."""
    settings = settled(settings, folder)

    def narrow(name: str) -> Tensor:
        return half(checkpoint.read([name])[name], name)

    def entries() -> Iterator[Entry]:
        for name, shape in checkpoint.outer_shapes().items():
            yield Entry(name, torch.float16, shape, partial(narrow, name))
        for index in range(checkpoint.arch.num_layers):
            yield from shards.stored(layer_file(folder, index), prefix=layer_prefix(index))

    write_weights(out, entries())
    config = checkpoint.config | {
        "dtype": "float16",
        "quantization_config": quantization_config.build(
            settings.format, bits=settings.bits, group_size=settings.group_size, symmetric=settings.symmetric,
            ignore=["lm_head"], special=storages(checkpoint.arch, settings).special,
            kv_strategy=settings.kv_cache.strategy if settings.kv_cache else None,
        ),
    }  # fmt: skip
    config.pop("torch_dtype", None)  # the old spelling of dtype
    artifacts.write_json(out / "config.json", config)
    copy_companions(checkpoint.path, out)


def _own(folder: Path) -> Path:
    return folder / f"rank-{ranks.rank()}-of-{ranks.world_size()}"


def layer_file(folder: Path, index: int) -> Path:
    """Where a finished layer lies until the checkpoint is put together."""
    return folder / f"layer-{index:05d}.safetensors"


def half(tensor: Tensor, name: str) -> Tensor:
    """A tensor as float16.

    Raises:
        QuantkitError: a value is out of float16's range (possible in a BF16 or FP32 original).
    """
    narrow = tensor.to(torch.float16)
    if not torch.isfinite(narrow).all():
        raise QuantkitError(f"tensor {name} has values beyond float16's range of 65504: this model cannot be served so")
    return narrow


def _store(path: Path, layer: Layer) -> None:
    """Write a finished layer, packed, with its notes; whole or not at all."""
    pack = formats.by_name(layer.settings.format).pack
    tensors = {
        f"{linear}.{name}": tensor.cpu().contiguous()
        for linear, quantized in layer.quantized.items()
        for name, tensor in pack(_on_cpu(quantized)).items()
    }
    for name, tensor in layer.weights.items():
        if name.removesuffix(".weight") not in layer.quantized:
            tensors[name] = half(tensor, name).cpu()
    tensors |= {f"self_attn.{name}": scale for name, scale in layer.kv_scales.items()}
    notes = {note.linear: ",".join(str(value) for value in note[1:]) for note in layer.notes}
    notes[_KV_NOTES] = json.dumps([note._asdict() for note in layer.kv_notes])
    save_tensors(path, dict(sorted(tensors.items())), metadata=notes)


def _read_notes(folder: Path, index: int) -> list[LinearNote]:
    """The notes of a stored layer, in the order of the forward pass."""
    with safe_open(layer_file(folder, index), framework="pt") as handle:
        metadata: Mapping[str, str] = handle.metadata()
    notes = []
    for linear in (linear for group in INPUT_GROUPS for linear in group if linear in metadata):
        error, dead, damping, gain = metadata[linear].split(",")
        kept = None if gain == "None" else float(gain)
        notes.append(LinearNote(layer_prefix(index) + linear, float(error), int(dead), float(damping), kept))
    return notes


def kv_notes(folder: Path, num_layers: int) -> list[list[KvNote]]:
    """What became of each finished layer's KV cache, in the order of the layers; empty lists where none was asked."""
    found = []
    for index in range(num_layers):
        with safe_open(layer_file(folder, index), framework="pt") as handle:
            found.append([KvNote(**note) for note in json.loads(handle.metadata().get(_KV_NOTES, "[]"))])
    return found


def _on_cpu(quantized: QuantizedWeight) -> QuantizedWeight:
    integers_OI, grid = quantized
    return QuantizedWeight(
        integers_OI.cpu(),
        grid._replace(scale_OG=grid.scale_OG.cpu(), zero_point_OG=grid.zero_point_OG.cpu()),
    )
