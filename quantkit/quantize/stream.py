"""The one loop over decoder layers: calibrate, choose the integers, store, go on with what was stored.

Inside a layer the linears are quantized in the order of the forward pass, each group on the inputs that the groups
before it, already quantized, really give it. One layer's weights, its Gram matrices and the hidden states of the
calibration set are all that is in memory.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from quantkit import artifacts, decoder, formats, hardware, quantization_config, vllm_support
from quantkit.architecture import INPUT_GROUPS, Architecture, layer_prefix, linear_shapes
from quantkit.checkpoint import Checkpoint, copy_companions, dense_layer, save_tensors, write_weights
from quantkit.decoder import Rotation
from quantkit.errors import QuantkitError, raise_all
from quantkit.formats import QuantizedWeight
from quantkit.progress import Report
from quantkit.quantize.awq import awq, search_scale
from quantkit.quantize.gptq import gptq
from quantkit.tokens import TokenSet

_BATCH = 4  # samples a forward pass


class Settings(NamedTuple):
    """What decides the integers and how they are stored."""

    method: str
    format: str
    bits: int
    group_size: int  # -1: per channel
    symmetric: bool
    act_order: bool
    damping: float


class LinearNote(NamedTuple):
    """What became of one linear; goes into the manifest."""

    linear: str
    relative_error: float  # |(W - Q) X|^2 / |W X|^2 over the calibration inputs
    dead_inputs: int
    damping: float  # 0 where the method needs none
    awq_exponent: float | None  # alpha of the scale s = mean|x|^alpha; 0 means that no scaling was best


class Inputs(NamedTuple):
    """What a group of linears was seen to read."""

    gram_II: Tensor  # mean of x x^T, float32
    mean_abs_I: Tensor


def check_settings(checkpoint: Checkpoint, settings: Settings) -> None:
    """Refuse, before any work, what vLLM would not load.

    Raises:
        QuantkitError: each reason, with what to choose instead.
    """
    raise_all(vllm_support.unsupported(
        settings.format, bits=settings.bits, group_size=settings.group_size, symmetric=settings.symmetric,
        shapes=linear_shapes(checkpoint.arch),
    ))  # fmt: skip


def quantize_layers(
    checkpoint: Checkpoint, tokens: TokenSet, settings: Settings, *, folder: Path, device: str, report: Report
) -> list[LinearNote]:
    """Quantize every decoder layer; each is stored in `folder` as it is done, and found there after a kill.

    What a layer reads is always computed from the stored layers before it, so a resumed run sees the same numbers as
    one that was never stopped, and gives the same bytes.
    """
    arch = checkpoint.arch
    folder.mkdir(parents=True, exist_ok=True)
    notes: list[LinearNote] = []
    # Calibration inputs need no more than bfloat16: what rounds them is far below what 4 bits round away. Weights, Gram
    # matrices and residual stream stay float32.
    compute = hardware.compute_dtype(device)
    with torch.no_grad():
        rotary = decoder.rotation(checkpoint.config, tokens.input_ids_ST.shape[1], dtype=compute, device=device)
        hidden_STC = checkpoint.outer()["model.embed_tokens.weight"][tokens.input_ids_ST]
        for index in range(arch.num_layers):
            report("layer", index, arch.num_layers)
            stored = layer_file(folder, index)
            if not stored.exists():
                weights = {name: tensor.to(device) for name, tensor in checkpoint.layer(index).items()}
                layer = _Layer(weights, arch, settings, rotary, hidden_STC)
                layer.quantize()
                _store(stored, layer)
            tensors, layer_notes = _load(stored, arch, settings)
            notes += [note._replace(linear=layer_prefix(index) + note.linear) for note in layer_notes]
            dense = {name: tensor.to(device, compute) for name, tensor in tensors.items()}
            for begin in range(0, len(hidden_STC), _BATCH):
                part = hidden_STC[begin : begin + _BATCH].to(device)
                hidden_STC[begin : begin + _BATCH] = decoder.layer(dense, arch, part, rotary).cpu()
    report("layer", arch.num_layers, arch.num_layers)
    return notes


def write_checkpoint(checkpoint: Checkpoint, settings: Settings, *, folder: Path, out: Path) -> None:
    """Put the stored layers together as a checkpoint that vLLM loads."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in checkpoint.outer().items():
            yield name, half(tensor, name)
        for index in range(checkpoint.arch.num_layers):
            for name, tensor in load_file(layer_file(folder, index)).items():
                yield layer_prefix(index) + name, tensor

    write_weights(out, tensors())
    config = checkpoint.config | {
        "dtype": "float16",
        "quantization_config": quantization_config.build(
            settings.format, bits=settings.bits, group_size=settings.group_size, symmetric=settings.symmetric,
            ignore=["lm_head"],
        ),
    }  # fmt: skip
    config.pop("torch_dtype", None)  # the old spelling of dtype
    artifacts.write_json(out / "config.json", config)
    copy_companions(checkpoint.path, out)


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


class _Layer:
    """One decoder layer while its linears are being quantized, and the calibration set passing through it."""

    def __init__(
        self, weights: dict[str, Tensor], arch: Architecture, settings: Settings, rotary: Rotation, hidden_STC: Tensor
    ) -> None:
        self.weights = weights  # dense float32; a linear's weight is replaced by its dequantized one
        self.dtype = rotary[0].dtype
        self.compute = {name: tensor.to(self.dtype) for name, tensor in weights.items()}  # the same, to run
        self.arch = arch
        self.settings = settings
        self.rotary = rotary
        self.hidden_STC = hidden_STC
        self.device = rotary[0].device
        self.quantized: dict[str, QuantizedWeight] = {}
        self.notes: list[LinearNote] = []

    def quantize(self) -> None:
        """Go through the layer once, in the order of the forward pass."""
        qkv, o, gate_up, down = INPUT_GROUPS
        self._quantize_group(qkv, _observe(self._attention_inputs()), producer="input_layernorm")
        contexts = list(self._contexts())
        self._quantize_group(o, _observe(iter(contexts)), producer="self_attn.v_proj")
        if self.settings.method == "awq":
            contexts = list(self._contexts())  # v_proj took in o_proj's scale
        middles = [
            hidden + decoder.linear(self.compute, "self_attn.o_proj", context)
            for hidden, context in zip(self._batches(), contexts, strict=True)
        ]
        del contexts
        self._quantize_group(
            gate_up,
            _observe(decoder.mlp_input(self.compute, self.arch, middle) for middle in middles),
            producer="post_attention_layernorm",
        )
        inner = (decoder.gated(self.compute, decoder.mlp_input(self.compute, self.arch, middle)) for middle in middles)
        self._quantize_group(down, _observe(inner), producer="mlp.up_proj")

    def _batches(self) -> Iterator[Tensor]:
        for begin in range(0, len(self.hidden_STC), _BATCH):
            yield self.hidden_STC[begin : begin + _BATCH].to(self.device)

    def _attention_inputs(self) -> Iterator[Tensor]:
        return (decoder.attention_input(self.compute, self.arch, hidden) for hidden in self._batches())

    def _contexts(self) -> Iterator[Tensor]:
        return (decoder.attention(self.compute, self.arch, x, self.rotary) for x in self._attention_inputs())

    def _quantize_group(self, names: tuple[str, ...], inputs: Inputs, *, producer: str) -> None:
        exponent, gram_II = None, inputs.gram_II
        if self.settings.method == "awq":
            scale_I, exponent = self._search(names, inputs)
            self._fold(producer, scale_I)
            for name in names:
                self._set(f"{name}.weight", self.weights[f"{name}.weight"] * scale_I)
            gram_II = gram_II / (scale_I[:, None] * scale_I)
        # rows are independent of each other: stacked, the linears share one inverse of the Gram matrix
        weight_OI = torch.cat([self.weights[f"{name}.weight"] for name in names])
        quantized, damping = self._choose(weight_OI, gram_II)
        dead, begin = int((gram_II.diagonal() == 0).sum()), 0
        for name in names:
            original_OI = self.weights[f"{name}.weight"]
            rows = slice(begin, begin + len(original_OI))
            self._keep(name, _rows(quantized, rows))
            error = _energy(original_OI - self.weights[f"{name}.weight"], gram_II)
            relative = float(error / _energy(original_OI, gram_II).clamp_min(1e-30))
            self.notes.append(LinearNote(name, round(relative, 6), dead, damping, exponent))
            begin = rows.stop

    def _choose(self, weight_OI: Tensor, gram_II: Tensor) -> tuple[QuantizedWeight, float]:
        """The method's integers for a weight, and the damping it took."""
        settings, group_size = self.settings, self._group_size(weight_OI.shape[1])
        if settings.method == "awq":
            bits, symmetric = settings.bits, settings.symmetric
            return awq(weight_OI, gram_II, bits=bits, group_size=group_size, symmetric=symmetric), 0.0
        result = gptq(
            weight_OI, gram_II, bits=settings.bits, group_size=group_size, symmetric=settings.symmetric,
            act_order=settings.act_order, damping=settings.damping,
        )  # fmt: skip
        return result.quantized, result.damping

    def _search(self, names: tuple[str, ...], inputs: Inputs) -> tuple[Tensor, float]:
        settings, arch = self.settings, self.arch
        tie = _tie_query_heads(arch) if names == ("self_attn.o_proj",) and arch.kv_group > 1 else None
        found = search_scale(
            [self.weights[f"{name}.weight"] for name in names], inputs.gram_II, inputs.mean_abs_I, bits=settings.bits,
            group_size=self._group_size(len(inputs.gram_II)), symmetric=settings.symmetric, tie=tie,
        )  # fmt: skip
        return found.scale_I, found.exponent

    def _fold(self, producer: str, scale_I: Tensor) -> None:
        """Divide what the producer gives by the scale, so that the layer computes the same as before."""
        if producer in self.quantized:
            if producer == "self_attn.v_proj":  # one value head feeds a group of query heads, whose scales are tied
                scale_I = scale_I.unflatten(0, (self.arch.num_kv_heads, self.arch.kv_group, -1))[:, 0].flatten()
            integers_OI, grid = self.quantized[producer]
            narrow_OG = (grid.scale_OG / scale_I[:, None]).to(torch.float16).float()  # as it will be stored
            self._keep(producer, QuantizedWeight(integers_OI, grid._replace(scale_OG=narrow_OG)))
            if (bias := self.weights.get(f"{producer}.bias")) is not None:
                self._set(f"{producer}.bias", _narrow(bias / scale_I))
        else:
            self._set(f"{producer}.weight", _narrow(self.weights[f"{producer}.weight"] / scale_I))

    def _group_size(self, in_features: int) -> int:
        return self.settings.group_size if self.settings.group_size > 0 else in_features

    def _keep(self, name: str, quantized: QuantizedWeight) -> None:
        self.quantized[name] = quantized
        self._set(f"{name}.weight", formats.dequantize(quantized))

    def _set(self, name: str, tensor: Tensor) -> None:
        self.weights[name] = tensor
        self.compute[name] = tensor.to(self.dtype)


def _observe(batches: Iterator[Tensor]) -> Inputs:
    """Mean Gram matrix and mean magnitude of the inputs [B, T, I] of a group of linears."""
    gram_II: Tensor | None = None
    mean_abs_I: Tensor | None = None
    count = 0
    for batch in batches:
        x_NI = batch.flatten(0, 1).float()
        gram_II = x_NI.T @ x_NI if gram_II is None else gram_II.addmm_(x_NI.T, x_NI)
        magnitude = x_NI.abs().sum(0)
        mean_abs_I = magnitude if mean_abs_I is None else mean_abs_I + magnitude
        count += len(x_NI)
    assert gram_II is not None and mean_abs_I is not None
    return Inputs(gram_II / count, mean_abs_I / count)


def _rows(quantized: QuantizedWeight, rows: slice) -> QuantizedWeight:
    integers_OI, grid = quantized
    narrow = grid._replace(scale_OG=grid.scale_OG[rows], zero_point_OG=grid.zero_point_OG[rows])
    return QuantizedWeight(integers_OI[rows], narrow)


def _energy(weight_OI: Tensor, gram_II: Tensor) -> Tensor:
    """tr(W H W^T): the mean squared output of a linear."""
    return ((weight_OI @ gram_II) * weight_OI).sum()


def _tie_query_heads(arch: Architecture) -> Any:
    """One scale a value channel: the mean over the query heads that share its head, given to each of them."""

    def tie(scale_I: Tensor) -> Tensor:
        heads: Tensor = scale_I.unflatten(0, (arch.num_kv_heads, arch.kv_group, arch.head_dim))
        return heads.mean(1, keepdim=True).expand_as(heads).flatten()

    return tie


def _narrow(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float16).float()


def _store(path: Path, layer: _Layer) -> None:
    """Write a finished layer, packed, with its notes; whole or not at all."""
    pack = formats.FORMATS[layer.settings.format].pack
    tensors = {
        f"{linear}.{name}": tensor.cpu().contiguous()
        for linear, quantized in layer.quantized.items()
        for name, tensor in pack(_on_cpu(quantized)).items()
    }
    for name, tensor in layer.weights.items():
        if name.removesuffix(".weight") not in layer.quantized:
            tensors[name] = half(tensor, name).cpu()
    notes = {note.linear: ",".join(str(value) for value in note[1:]) for note in layer.notes}
    save_tensors(path, dict(sorted(tensors.items())), metadata=notes)


def _load(path: Path, arch: Architecture, settings: Settings) -> tuple[dict[str, Tensor], list[LinearNote]]:
    """The dense weights of a stored layer, as any reader of the checkpoint will see them, and its notes."""
    stored = load_file(path)
    storage = formats.Storage(settings.format, settings.bits, settings.group_size, settings.symmetric)
    dense = dense_layer(stored, arch, storage)
    with safe_open(path, framework="pt") as handle:
        return dense, _parse_notes(handle.metadata())


def _parse_notes(metadata: Mapping[str, str]) -> list[LinearNote]:
    notes = []
    for linear in linear_order(metadata):
        error, dead, damping, exponent = metadata[linear].split(",")
        alpha = None if exponent == "None" else float(exponent)
        notes.append(LinearNote(linear, float(error), int(dead), float(damping), alpha))
    return notes


def linear_order(names: Mapping[str, str]) -> list[str]:
    """The linears of a layer in the order of the forward pass."""
    return [linear for group in INPUT_GROUPS for linear in group if linear in names]


def _on_cpu(quantized: QuantizedWeight) -> QuantizedWeight:
    integers_OI, grid = quantized
    return QuantizedWeight(
        integers_OI.cpu(),
        grid._replace(scale_OG=grid.scale_OG.cpu(), zero_point_OG=grid.zero_point_OG.cpu()),
    )
