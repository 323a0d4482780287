"""One decoder layer: its linears quantized in the order of the forward pass, on what really reaches them.

Each group of linears that share an input is quantized on the inputs that the groups before it, already quantized, give
it. With drift correction the original layer runs beside it, on the original model's hidden states, to say what the
outputs ought to be.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkit import decoder, formats, ranks
from quantkit.architecture import INPUT_GROUPS, Architecture, linear_shapes
from quantkit.capacity import duration
from quantkit.decoder import Rotation
from quantkit.formats import Grid, QuantizedWeight, Storage
from quantkit.quantize import kv_scales, states
from quantkit.quantize.awq import awq, search_scale
from quantkit.quantize.descent import descend
from quantkit.quantize.drift import target_weight
from quantkit.quantize.fisher import MAX_TOKENS, Curvature
from quantkit.quantize.gptq import gptq
from quantkit.quantize.gram import add_gram, add_product, mirror, shrunk, usual_shrinkage
from quantkit.quantize.kv_scales import KvNote, KvSettings, Seen
from quantkit.quantize.schemes import Override
from quantkit.quantize.smooth import smoothing_scale

BATCH = 4  # samples a forward pass
ROW_BLOCKS, FEWEST_ROWS = 12, 32  # that outputs are rounded in under their curvature, and of how many at least
REPORTED_ROWS = 512  # of a linear, evenly spread, that its relative error is of, at the least


class Effort(NamedTuple):
    """What an effort stands for where nothing else is asked for."""

    method: str
    drift_correction: float
    output_curvature: bool
    continuations: int | None
    rounds: int


EFFORTS = {
    "fast": Effort("gptq", 0.0, False, 0, 0),
    "default": Effort("awq+gptq", 0.8, True, 0, duration.ROUNDS),
    "high": Effort("awq+gptq", 0.8, True, None, 5),
}
ENOUGH_TOKENS = 120  # for each input of the widest linear, that `continuations` makes of the calibration set
MOST_CONTINUATIONS = 22  # what begins with a quarter of a window each is more and more alike


class Settings(NamedTuple):
    """What decides the integers and how they are stored."""

    method: str  # gptq, awq, or awq+gptq: inputs scaled for GPTQ (`smooth`), then its integers
    format: str
    bits: int
    group_size: int  # -1: per channel
    symmetric: bool
    act_order: bool
    damping: float
    shrinkage: float | None = None  # of the Gram matrix towards its diagonal; None: by the tokens an input
    drift_correction: float = 0.0  # share of the drift so far that a linear makes up for
    output_curvature: bool = False  # whether rows make up for each other's errors (`fisher`)
    continuations: int | None = 0  # windows that the model writes for each calibration window; None: the usual number
    rounds: int = 0  # of coordinate descent over GPTQ's integers and their scales (`descent`)
    average_bits: float | None = None  # bits: auto, so many a weight on average; `bits` for those that get fewest
    bit_choices: tuple[int, ...] | None = None  # what `bits: auto` may give; None: all that the format stores
    ignore: tuple[str, ...] = ()  # patterns of linears left in 16 bits (`schemes`)
    overrides: tuple[Override, ...] = ()  # of bits, group size and symmetry, by pattern
    kv_cache: KvSettings | None = None  # how scales of an FP8 KV cache are chosen; None: none are

    @classmethod
    def of(cls, *, effort: str, **given: Any) -> "Settings":
        """The settings of an effort; what is given, and not None, wins over the effort's."""
        chosen = EFFORTS[effort]._asdict() | {name: value for name, value in given.items() if value is not None}
        if chosen["bits"] == "auto":
            chosen["bits"] = 4
        overrides = [each if isinstance(each, Override) else Override(**each) for each in chosen.pop("overrides", ())]
        return cls(**chosen | {"overrides": tuple(overrides), "ignore": tuple(chosen.get("ignore", ()))})

    @property
    def storage(self) -> Storage:
        """How linears are stored that no pattern names."""
        return Storage(self.format, self.bits, self.group_size, self.symmetric)

    def stored_as(self, storage: Storage) -> "Settings":
        """The settings for a linear that is stored so."""
        return self._replace(bits=storage.bits, group_size=storage.group_size, symmetric=storage.symmetric)

    @property
    def streams(self) -> tuple[str, ...]:
        """Whose hidden states go through the layers: the quantized model's, and the original's to compare with."""
        return ("quantized", "original") if self.drift_correction else ("quantized",)


def continuations(settings: Settings, arch: Architecture, calibration_tokens: int) -> int:
    """How many windows the model writes for each calibration window (`conversations.extended`).

    What the settings say; else as many as make ENOUGH_TOKENS for each input of the widest linear.
    """
    if settings.continuations is not None:
        return settings.continuations
    wanted = ENOUGH_TOKENS * max(inputs for _, inputs in linear_shapes(arch).values())
    return min(max(math.ceil(wanted / calibration_tokens) - 1, 0), MOST_CONTINUATIONS)


class LinearNote(NamedTuple):
    """What became of one linear; goes into the manifest."""

    linear: str
    relative_error: float  # |(W' - Q) X|^2 / |W' X|^2 for calibration inputs X, some rows of W', what was to be rounded
    dead_inputs: int
    damping: float  # 0 where the method needs none
    scale_gain: float | None  # what the scale of its inputs leaves of the error that it is judged by; None: no scale


class Run:
    """A forward pass through the layer, in pieces: its weights, and what stands between the linears."""

    def __init__(self, weights: dict[str, Tensor], hidden_STC: Tensor) -> None:
        self.weights = weights
        self.hidden_STC = hidden_STC
        self.context_STD: Tensor | None = None  # what o_proj reads
        self.middle_STC: Tensor | None = None  # the residual stream between attention and MLP
        self.inner_STF: Tensor | None = None  # what down_proj reads, where it is kept


class _Inputs(NamedTuple):
    """What a group of linears was seen to read, as means over all tokens of all ranks; see `target_weight`.

    The matrices are weighted by what each token's outputs matter, where that is known.
    """

    tokens: int
    gram_II: Tensor
    mean_abs_I: Tensor | None  # for AWQ's search alone
    cross_II: Tensor | None
    residual_CI: Tensor | None


class Layer:
    """A decoder layer while it is quantized. `quantize` once, `outputs` after it."""

    def __init__(
        self, original: dict[str, Tensor], arch: Architecture, settings: Settings, rotary: Rotation,
        hidden: dict[str, Tensor], folder: Path, curvature: Curvature | None = None,
        special: Mapping[str, Storage | None] | None = None, told: float = 1.0,
    ) -> None:  # fmt: skip
        """Begin a layer.

        original: its dense tensors, float32. hidden: the states before it, float32 [samples, length, C], of the
        "quantized" model and, for drift correction, of the "original". folder: for what stands between the linears.
        special: how linears are stored, by their name in the layer, where that is not the settings'; None: dense.
        curvature: of the loss over the outputs of its linears (`fisher.read`). told: of a token, on average, what it
            counts for where Gram matrices are shrunk by how many there are (`gram.told`).
        """
        self.arch = arch
        self.settings = settings
        self.rotary = rotary
        self.device = rotary[0].device
        self.dtype = rotary[0].dtype
        self.folder = folder
        self.curvature = curvature or Curvature({}, {})
        self.special = special or {}
        self.told = told
        self.weights = dict(original)  # float32; a linear's weight is replaced by its dequantized one
        self.quantized: dict[str, QuantizedWeight] = {}
        self.notes: list[LinearNote] = []
        self.kv_scales: dict[str, Tensor] = {}  # of the KV cache, by their name in the layer
        self.kv_notes: list[KvNote] = []
        compute = {name: tensor.to(self.dtype) for name, tensor in original.items()}
        self.run = Run(compute, hidden["quantized"])
        self.reference = Run(dict(compute), hidden["original"]) if "original" in hidden else None

    def quantize(self) -> None:
        """Go through the layer once."""
        qkv, o, gate_up, down = INPUT_GROUPS
        arch, scaled = self.arch, self.settings.method != "gptq"
        self._quantize_group(
            qkv, lambda run, part: decoder.attention_input(run.weights, arch, self._part(run.hidden_STC, part)),
            producer="input_layernorm",
        )  # fmt: skip
        self._attend(self.reference)
        self._attend(self.run, calibrate=not scaled)
        self._quantize_group(
            o, lambda run, part: self._part(run.context_STD, part), producer="self_attn.v_proj",
            residual=lambda run, part: self._part(run.hidden_STC, part),
        )  # fmt: skip
        if scaled:
            self._attend(self.run, calibrate=True)  # v_proj took in o_proj's scale
        self._add_attention(self.reference)
        self._add_attention(self.run)
        self._quantize_group(
            gate_up, lambda run, part: decoder.mlp_input(run.weights, arch, self._part(run.middle_STC, part)),
            producer="post_attention_layernorm",
        )  # fmt: skip
        self._quantize_group(
            down, self._keep_gated, producer="mlp.up_proj", residual=lambda run, part: self._part(run.middle_STC, part)
        )

    def outputs(self, run: Run, out_STC: Tensor) -> None:
        """Write the states after the layer; they may stand where those before it stood."""
        for part in self._parts():
            inner = self._gated(run, part) if run.inner_STF is None else self._part(run.inner_STF, part)
            middle = self._part(run.middle_STC, part)
            out_STC[part] = (middle + decoder.linear(run.weights, "mlp.down_proj", inner)).cpu()

    def _parts(self) -> Iterator[slice]:
        samples = len(self.run.hidden_STC)
        return (slice(begin, min(begin + BATCH, samples)) for begin in range(0, samples, BATCH))

    def _part(self, states_STx: Tensor | None, part: slice) -> Tensor:
        assert states_STx is not None
        return states_STx[part].to(self.device)

    def _gated(self, run: Run, part: slice) -> Tensor:
        return decoder.gated(run.weights, decoder.mlp_input(run.weights, self.arch, self._part(run.middle_STC, part)))

    def _keep_gated(self, run: Run, part: slice) -> Tensor:
        """`_gated`, kept for `outputs` on a CPU, where it takes longer to compute than to read from a file.

        Not where up_proj will take in a scale and give something else.
        """
        inner = self._gated(run, part)
        if self.device.type == "cpu" and (run is self.reference or self.settings.method == "gptq"):
            if run.inner_STF is None:
                run.inner_STF = self._scratch(run, "inner", self.arch.intermediate_size, self.dtype)
            run.inner_STF[part] = inner
        return inner

    def _attend(self, run: Run | None, *, calibrate: bool = False) -> None:
        """calibrate: keys and values are those that will be served, and scales are chosen for them if asked for."""
        if run is None:
            return
        tokens = run.hidden_STC.shape[0] * run.hidden_STC.shape[1]
        seen = Seen(tokens, self.arch.num_kv_heads) if calibrate and self.settings.kv_cache else None
        if run.context_STD is None:
            width = self.arch.num_heads * self.arch.head_dim
            run.context_STD = self._scratch(run, "context", width, self.dtype)
        for part in self._parts():
            x_BTC = decoder.attention_input(run.weights, self.arch, self._part(run.hidden_STC, part))
            context = decoder.attention(run.weights, self.arch, x_BTC, self.rotary, seen.look if seen else None)
            run.context_STD[part] = context.cpu()
        if seen is not None and self.settings.kv_cache is not None:
            ranks.sum_up(seen.counts, tokens)
            ranks.take_largest(seen.largest)
            self.kv_scales, self.kv_notes = kv_scales.choose(seen, self.settings.kv_cache)
            if self.settings.kv_cache.strategy == "attn_head":  # vLLM takes the largest of the query heads of a group
                self.kv_scales["q_scale"] = self.kv_scales["q_scale"].repeat_interleave(self.arch.kv_group)

    def _add_attention(self, run: Run | None) -> None:
        if run is None:
            return
        run.middle_STC = self._scratch(run, "middle", self.arch.hidden_size, torch.float32)
        for part in self._parts():
            added = decoder.linear(run.weights, "self_attn.o_proj", self._part(run.context_STD, part))
            run.middle_STC[part] = (self._part(run.hidden_STC, part) + added).cpu()

    def _scratch(self, run: Run, name: str, width: int, dtype: torch.dtype) -> Tensor:
        which = "quantized" if run is self.run else "original"
        return states.scratch(self.folder, f"{which}-{name}", (*run.hidden_STC.shape[:2], width), dtype)

    def _quantize_group(
        self, names: tuple[str, ...], read: Callable[[Run, slice], Tensor], *, producer: str,
        residual: Callable[[Run, slice], Tensor] | None = None,
    ) -> None:  # fmt: skip
        storage = self.special.get(names[0], self.settings.storage)  # the linears of a group share it
        if storage is None:
            return
        settings = self.settings.stored_as(storage)
        inputs = self._observe(read, residual, self.curvature.tokens.get(names[0]))
        shrinkage = settings.shrinkage
        if shrinkage is None:
            shrinkage = usual_shrinkage(len(inputs.gram_II), self.told * inputs.tokens)
        # Rows are independent of each other: stacked, the linears share one inverse of the Gram matrix.
        weight_OI = torch.cat([self.weights[f"{name}.weight"] for name in names])
        gram_II, gain = inputs.gram_II, None
        if inputs.cross_II is not None:
            weight_OI = target_weight(
                weight_OI, gram_II, inputs.cross_II, inputs.residual_CI, strength=settings.drift_correction,
                shrinkage=shrinkage,
            )  # fmt: skip
            inputs = inputs._replace(cross_II=None, residual_CI=None)  # each as large as the Gram matrix, and done with
        curvature = [
            shrunk(block, usual_shrinkage(len(block), min(inputs.tokens, MAX_TOKENS)))
            for name in names
            for block in self.curvature.blocks.get(name, [])
        ]
        if settings.method != "gptq":
            scale_I, gain = self._search(settings, names, _by_row(weight_OI, curvature), inputs, shrinkage)
            self._fold(producer, scale_I)
            weight_OI = weight_OI * scale_I
            gram_II.div_(scale_I[:, None] * scale_I)  # the group's own, and not read unscaled again
        quantized, damping = ranks.by_rows(
            lambda rows_OI, blocks: _choose(settings, rows_OI, gram_II, shrinkage, blocks), weight_OI, curvature
        )
        dead, begin = int((gram_II.diagonal() == 0).sum()), 0
        for name in names:
            rows = slice(begin, begin + len(self.weights[f"{name}.weight"]))
            self._keep(name, _rows(quantized, rows))
            error = self._energy(weight_OI[rows] - self.weights[f"{name}.weight"], gram_II)
            relative = error / max(self._energy(weight_OI[rows], gram_II), 1e-30)
            self.notes.append(LinearNote(name, round(relative, 6), dead, damping, gain and round(gain, 4)))
            begin = rows.stop

    def _energy(self, weight_OI: Tensor, gram_II: Tensor) -> float:
        """tr(W H W^T), the mean squared output of a linear: a figure to report, which some of the rows will do for."""
        weight_OI = weight_OI[:: max(len(weight_OI) // REPORTED_ROWS, 1)]
        seen_OI = weight_OI.to(self.dtype) @ gram_II.to(self.dtype)
        return float((seen_OI * weight_OI).sum())

    def _observe(
        self, read: Callable[[Run, slice], Tensor], residual: Callable[[Run, slice], Tensor] | None,
        weight_ST: Tensor | None,
    ) -> _Inputs:  # fmt: skip
        sums: dict[str, Tensor] = {}

        def add(name: str, left_NJ: Tensor, right_NI: Tensor) -> None:
            if name not in sums:
                sums[name] = torch.zeros(left_NJ.shape[1], right_NI.shape[1], device=self.device)
            add_product(sums[name], left_NJ, right_NI, self.dtype)

        for part in self._parts():
            x_NI = read(self.run, part).flatten(0, 1).float()
            if "gram" not in sums:
                sums["gram"] = torch.zeros(x_NI.shape[1], x_NI.shape[1], device=self.device)
            if self.settings.method == "awq":
                sums["abs"] = sums.get("abs", 0) + x_NI.abs().sum(0)
            weighted_NI = x_NI
            if weight_ST is None:
                add_gram(sums["gram"], x_NI, self.dtype)
            else:
                root_N1 = weight_ST[part].flatten()[:, None].sqrt()
                weighted_NI = x_NI * root_N1
                add_gram(sums["gram"], weighted_NI, self.dtype)
                weighted_NI.mul_(root_N1)
            if self.reference is not None and self.settings.drift_correction:
                add("cross", read(self.reference, part).flatten(0, 1).float() - x_NI, weighted_NI)
                if residual is not None:
                    add(
                        "residual",
                        (residual(self.reference, part) - residual(self.run, part)).flatten(0, 1),
                        weighted_NI,
                    )
        count = ranks.sum_up(sums, self.run.hidden_STC.shape[0] * self.run.hidden_STC.shape[1])
        means = {name: tensor.div_(count) for name, tensor in sums.items()}
        mirror(means["gram"])
        return _Inputs(count, means["gram"], means.get("abs"), means.get("cross"), means.get("residual"))

    def _search(
        self, settings: Settings, names: tuple[str, ...], weight_OI: Tensor, inputs: _Inputs, shrinkage: float
    ) -> tuple[Tensor, float]:
        arch, group_size = self.arch, _group_size(settings, len(inputs.gram_II))
        tie = _tie_query_heads(arch) if names == ("self_attn.o_proj",) and arch.kv_group > 1 else None
        if settings.method == "awq+gptq":
            gram_II = shrunk(inputs.gram_II, shrinkage)
            return smoothing_scale(weight_OI, gram_II, group_size=group_size, damping=settings.damping, tie=tie)
        assert inputs.mean_abs_I is not None
        found = search_scale(
            [weight_OI], inputs.gram_II, inputs.mean_abs_I, bits=settings.bits, group_size=group_size,
            symmetric=settings.symmetric, tie=tie,
        )  # fmt: skip
        return found.scale_I, found.error / found.error_unscaled if found.error_unscaled else 1.0

    def _fold(self, producer: str, scale_I: Tensor) -> None:
        """Divide what the producer gives by the scale, so that the layer computes the same as before."""
        if producer == "self_attn.v_proj":  # one value head feeds a group of query heads, whose scales are tied
            scale_I = scale_I.unflatten(0, (self.arch.num_kv_heads, self.arch.kv_group, -1))[:, 0].flatten()
        weight = self.weights[f"{producer}.weight"]
        if producer in self.quantized:
            integers_OI, grid = self.quantized[producer]
            narrow_OG = (grid.scale_OG / scale_I[:, None]).to(torch.float16).float()  # as it will be stored
            self._keep(producer, QuantizedWeight(integers_OI, grid._replace(scale_OG=narrow_OG)))
        else:
            by_output = scale_I if weight.ndim == 1 else scale_I[:, None]  # a norm, or a linear left dense
            self._set(f"{producer}.weight", _narrow(weight / by_output))
        if (bias := self.weights.get(f"{producer}.bias")) is not None:
            self._set(f"{producer}.bias", _narrow(bias / scale_I))

    def _keep(self, name: str, quantized: QuantizedWeight) -> None:
        self.quantized[name] = quantized
        self._set(f"{name}.weight", formats.dequantize(quantized))

    def _set(self, name: str, tensor: Tensor) -> None:
        self.weights[name] = tensor
        self.run.weights[name] = tensor.to(self.dtype)


def _choose(
    settings: Settings, weight_OI: Tensor, gram_II: Tensor, shrinkage: float, curvature: Sequence[Tensor]
) -> tuple[QuantizedWeight, float]:
    """The method's integers for some rows, and the damping it took."""
    bits, symmetric, group_size = settings.bits, settings.symmetric, _group_size(settings, weight_OI.shape[1])
    if settings.method == "awq":
        return awq(weight_OI, gram_II, bits=bits, group_size=group_size, symmetric=symmetric), 0.0
    gram_II = shrunk(gram_II, shrinkage)
    result = gptq(
        weight_OI, gram_II, bits=bits, group_size=group_size, symmetric=symmetric, act_order=settings.act_order,
        damping=settings.damping, output_hessians=curvature,
        row_block=max(min(map(len, curvature), default=0) // ROW_BLOCKS, FEWEST_ROWS),
    )  # fmt: skip
    quantized = descend(
        weight_OI, result.quantized, gram_II, curvature, damping=result.damping, rounds=settings.rounds
    )  # fmt: skip
    return quantized, result.damping


def _by_row(weight_OI: Tensor, curvature: Sequence[Tensor]) -> Tensor:
    """The rows times the root of what the loss makes of an error in their outputs.

    A grid goes with its row: the errors are those of the rows as they are, weighted.
    """
    if not curvature:
        return weight_OI
    root_O = torch.cat([block.diagonal() for block in curvature]).clamp_min(0).sqrt()
    return weight_OI * (root_O / root_O.mean()).clamp_min(1e-3)[:, None]


def _group_size(settings: Settings, in_features: int) -> int:
    return settings.group_size if settings.group_size > 0 else in_features


def _rows(quantized: QuantizedWeight, rows: slice) -> QuantizedWeight:
    integers_OI, grid = quantized
    narrow = Grid(grid.scale_OG[rows], grid.zero_point_OG[rows], grid.bits, grid.group_size, grid.symmetric)
    return QuantizedWeight(integers_OI[rows], narrow)


def _tie_query_heads(arch: Architecture) -> Callable[[Tensor], Tensor]:
    """One scale a value channel: the mean over the query heads that share its head, given to each of them."""

    def tie(scale_I: Tensor) -> Tensor:
        heads: Tensor = scale_I.unflatten(0, (arch.num_kv_heads, arch.kv_group, arch.head_dim))
        return heads.mean(1, keepdim=True).expand_as(heads).flatten()

    return tie


def _narrow(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float16).float()
