"""Effort `high`: with the integers fixed, the scales learn to make the whole model say what the original says.

The second phase of EfficientQAT (arXiv 2407.11062, section 3.3) with distillation for its loss: KL(original ||
quantized) of the next token on the calibration windows. Norms and biases learn too. One decoder layer's weights are in
memory at a time: the forward pass keeps the states before each layer in a mapped file, the backward pass computes each
layer again from there, last to first.
"""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from quantkit import decoder, formats, ranks
from quantkit.architecture import layer_prefix, linear_shapes
from quantkit.checkpoint import Checkpoint, save_tensors, unpack_linear
from quantkit.decoder import Rotation
from quantkit.formats import QuantizedWeight, Storages
from quantkit.losses import chunked, forward_kl
from quantkit.progress import Report
from quantkit.quantize import states
from quantkit.quantize.grid import FLOAT16_TINY

_NORM = "model.norm.weight"
_MEAN_DECAY, _SQUARE_DECAY, _EPSILON = 0.9, 0.99, 1e-12  # Adam (arXiv 1412.6980)


class Plan(NamedTuple):
    """How long the scales learn, and how far they move: rates are fractions of each first value, a step."""

    epochs: int = 4
    batch_size: int = 2  # windows a step, over all ranks
    learning_rate: float = 5e-4
    dense_learning_rate: float = 5e-5  # of norms and biases
    warmup: float = 0.1  # fraction of the steps; then a cosine down to 0


class Learned(NamedTuple):
    """kl: the mean over each epoch's steps of KL(original || quantized) on the calibration windows, nats a token."""

    kl: list[float]


class _Leaves:
    """What learns in a layer, as slices of one vector; beside it where it began, and Adam's two means."""

    def __init__(self, folder: Path, index: int, start: Mapping[str, Tensor], *, scales: int) -> None:
        self.shapes = {name: tensor.shape for name, tensor in start.items()}
        self.scales = scales  # how many of the vector's elements are scales; they come first
        size = sum(tensor.numel() for tensor in start.values())
        rows = states.scratch(folder, f"tune-{index:05d}", (4, size), torch.float32)
        self.start_P, self.value_P, self.mean_P, self.square_P = rows
        torch.cat([tensor.flatten() for tensor in start.values()], out=self.start_P)
        self.value_P.copy_(self.start_P)
        self.mean_P.zero_()
        self.square_P.zero_()

    def named(self, vector_P: Tensor) -> dict[str, Tensor]:
        """The vector's slices by name, each in its shape."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        pieces = vector_P.split(sizes)
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}

    def move(self, gradient_P: Tensor, rate: float, dense_rate: float, step: int) -> None:
        """One step of Adam on every element as a fraction of where it began."""
        gradient_P = gradient_P.cpu() * self.start_P
        self.mean_P.lerp_(gradient_P, 1 - _MEAN_DECAY)
        self.square_P.mul_(_SQUARE_DECAY).addcmul_(gradient_P, gradient_P, value=1 - _SQUARE_DECAY)
        spread_P = (self.square_P / (1 - _SQUARE_DECAY**step)).sqrt_().add_(_EPSILON)
        move_P = self.mean_P.div(spread_P).mul_(self.start_P).div_(1 - _MEAN_DECAY**step)
        self.value_P[: self.scales].sub_(move_P[: self.scales], alpha=rate)
        self.value_P[self.scales :].sub_(move_P[self.scales :], alpha=dense_rate)


class _TunedLayer:
    """A stored layer, opened to learn."""

    def __init__(self, checkpoint: Checkpoint, index: int, path: Path, storages: Storages, own: Path) -> None:
        stored = load_file(path)
        self.levels: dict[str, Tensor] = {}  # integer - zero point, [out_features, groups, group_size]
        self.fixed = {name: tensor for name, tensor in stored.items() if name.endswith(".weight") and tensor.ndim > 1}
        start = {}
        for linear, shape in linear_shapes(checkpoint.arch).items():
            if f"{linear}.weight" not in self.fixed:
                storage = storages.of(layer_prefix(index) + linear)
                assert storage is not None
                integers_OI, grid = unpack_linear(stored, linear, shape, storage)
                levels_OGi = formats.grouped(integers_OI.int(), grid.group_size) - grid.zero_point_OG[..., None]
                narrow = torch.int8 if grid.bits <= 4 else torch.int16
                self.levels[linear] = states.scratch(own, f"tune-{index:05d}-{linear}", levels_OGi.shape, narrow)
                self.levels[linear].copy_(levels_OGi)
                start[f"{linear}.weight"] = grid.scale_OG
        scales = sum(tensor.numel() for tensor in start.values())
        packed = tuple(f"{linear}." for linear in self.levels)
        dense = {n: t for n, t in stored.items() if n not in self.fixed and not (n.startswith(packed) and t.ndim > 1)}
        start |= {name: tensor.float() for name, tensor in dense.items() if tensor.is_floating_point()}
        self.leaves = _Leaves(own, index, start, scales=scales)

    def weights(self, vector_P: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """The layer's dense tensors, as a function of what learns."""
        found = {name: tensor.to(vector_P.device, dtype) for name, tensor in self.fixed.items()}
        for name, tensor in self.leaves.named(vector_P).items():
            levels_OGi = self.levels.get(name.removesuffix(".weight"))
            if levels_OGi is None:
                found[name] = tensor.to(dtype)
            else:
                levels_OGi = levels_OGi.to(vector_P.device, torch.float32)
                found[name] = (levels_OGi * tensor[..., None]).flatten(1).to(dtype)
        return found


def tune(
    checkpoint: Checkpoint, input_ids_ST: Tensor, plan: Plan, storages: Storages, *, seed: int, layers: Path, own: Path,
    out: Path, device: str, dtype: torch.dtype, report: Report,
) -> Learned:  # fmt: skip
    """Learn on this rank's windows, and store every layer anew in `out`, the last norm in `out`/outer.safetensors.

    Needs the last states of the original model in `own`, as quantization with drift correction leaves them there. Goes
    on at the last whole epoch after a kill. Every rank calls it with its own windows (`ranks.share`).

    layers: where the layers lie as they were quantized; they are only read.
    """
    arch = checkpoint.arch
    out.mkdir(exist_ok=True)
    told_STC = states.find(own, arch.num_layers, "original", (*input_ids_ST.shape, arch.hidden_size))
    assert told_STC is not None, "the original model's last states were not kept"
    model = _Model(checkpoint, layers, storages, plan, tuple(input_ids_ST.shape), own, device, dtype)
    begin, kl = model.restore(out)
    windows = len(input_ids_ST) if ranks.world_size() == 1 else ranks.sum_up({}, len(input_ids_ST))
    per_epoch = -(-windows // plan.batch_size)
    total = plan.epochs * per_epoch
    for epoch in range(begin, plan.epochs):
        order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        losses = 0.0
        for number in range(per_epoch):
            step = epoch * per_epoch + number
            report("tuning the scales, step", step, total)
            batch = order[number * plan.batch_size : (number + 1) * plan.batch_size]
            mine = [sample // ranks.world_size() for sample in batch if sample % ranks.world_size() == ranks.rank()]
            losses += model.step(input_ids_ST[mine], told_STC[mine], len(batch), step + 1, _schedule(step, total, plan))
        kl.append(losses / per_epoch)
        if ranks.rank() == 0:
            model.keep(out, epoch + 1, kl)
        ranks.barrier()
    report("tuning the scales, step", total, total)
    if ranks.rank() == 0:
        model.store(layers, out)
    ranks.barrier()
    return Learned(kl)


def _schedule(step: int, total: int, plan: Plan) -> float:
    """The share of the learning rate at a step: a linear warmup, then half a cosine."""
    rising = plan.warmup * total
    falling = max(step - rising, 0) / max(total - rising, 1)
    return min(1.0, (step + 1) / max(rising, 1)) * (1 + math.cos(math.pi * falling)) / 2


class _Model:
    """The whole model while it learns, in mapped files."""

    def __init__(
        self, checkpoint: Checkpoint, layers: Path, storages: Storages, plan: Plan, shape_ST: tuple[int, ...],
        own: Path, device: str, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.arch, self.storages, self.plan, self.device, self.dtype = checkpoint.arch, storages, plan, device, dtype
        self.rotary: Rotation = decoder.rotation(checkpoint.config, shape_ST[1], dtype=dtype, device=device)
        outer = checkpoint.outer()
        self.embedding_VC = outer["model.embed_tokens.weight"]
        self.head_VC = outer.get("lm_head.weight", self.embedding_VC).to(device, dtype)
        self.norm_C = outer[_NORM].to(device)
        self.layers = [
            _TunedLayer(checkpoint, index, layers / f"layer-{index:05d}.safetensors", storages, own)
            for index in range(self.arch.num_layers)
        ]
        self.last = _Leaves(own, self.arch.num_layers, {_NORM: outer[_NORM]}, scales=0)
        rows = min(plan.batch_size, shape_ST[0])
        kept = (self.arch.num_layers + 1, rows, shape_ST[1], self.arch.hidden_size)
        self.states_LBTC = states.scratch(own, "tune-states", kept, torch.float32)

    def step(self, ids_BT: Tensor, told_BTC: Tensor, batch: int, step: int, rate: float) -> float:
        """Forward, backward, and one move of everything that learns; the mean KL of the batch over all ranks.

        ids_BT, told_BTC: this rank's windows of the batch, and the original model's last states there.
        batch: windows of the batch on all ranks.
        """
        count = len(ids_BT)
        kept = self.states_LBTC[:, :count]
        kept[0] = self.embedding_VC[ids_BT]
        with torch.no_grad():
            for index, layer in enumerate(self.layers):
                weights = layer.weights(layer.leaves.value_P.to(self.device), self.dtype)
                hidden_BTC = kept[index].to(self.device)
                kept[index + 1] = decoder.layer(weights, self.arch, hidden_BTC, self.rotary) if count else hidden_BTC
        norm_P = self.last.value_P.to(self.device, copy=True).requires_grad_()
        hidden_BTC = kept[-1].to(self.device).requires_grad_()
        loss = self._loss(hidden_BTC, norm_P, told_BTC.to(self.device)) / max(batch * ids_BT.shape[1], 1)
        loss.backward()
        self._move(self.last, norm_P, step, rate)
        for index in reversed(range(len(self.layers))):
            layer, behind_BTC = self.layers[index], hidden_BTC.grad
            vector_P = layer.leaves.value_P.to(self.device, copy=True).requires_grad_()
            hidden_BTC = kept[index].to(self.device).requires_grad_()
            if count:
                weights = layer.weights(vector_P, self.dtype)
                decoder.layer(weights, self.arch, hidden_BTC, self.rotary).backward(behind_BTC)
            self._move(layer.leaves, vector_P, step, rate)
        sums = {"loss": loss.detach()}
        ranks.sum_up(sums, 0)
        return float(sums["loss"])

    def _loss(self, hidden_BTC: Tensor, norm_C: Tensor, told_BTC: Tensor) -> Tensor:
        said_NC = decoder.rms_norm(hidden_BTC, norm_C, self.arch.norm_epsilon).flatten(0, 1).to(self.dtype)
        told_NC = decoder.rms_norm(told_BTC, self.norm_C, self.arch.norm_epsilon).flatten(0, 1).to(self.dtype)
        return chunked(
            said_NC, self.head_VC, lambda logits_NV, part: forward_kl(logits_NV, told_NC[part] @ self.head_VC.T)
        )

    def _move(self, leaves: _Leaves, vector_P: Tensor, step: int, rate: float) -> None:
        sums = {"gradient": torch.zeros_like(vector_P) if vector_P.grad is None else vector_P.grad}
        ranks.sum_up(sums, 0)
        leaves.move(sums["gradient"], rate * self.plan.learning_rate, rate * self.plan.dense_learning_rate, step)

    def _learning(self) -> list[_Leaves]:
        return [*(layer.leaves for layer in self.layers), self.last]

    def keep(self, out: Path, epochs: int, kl: list[float]) -> None:
        """Store what a resumed run needs after an epoch, in a folder that is there whole or not at all."""
        folder = out / f"epoch-{epochs:03d}"
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for index, leaves in enumerate(self._learning()):
            rows = {"value": leaves.value_P, "mean": leaves.mean_P, "square": leaves.square_P}
            save_tensors(partial / f"{index:05d}.safetensors", rows, metadata={"kl": " ".join(map(repr, kl))})
        partial.rename(folder)
        for older in out.glob("epoch-*"):
            if older != folder:
                shutil.rmtree(older)

    def restore(self, out: Path) -> tuple[int, list[float]]:
        """Take up the last whole epoch: how many were done, and their KL."""
        folder = max((path for path in out.glob("epoch-*") if not path.suffix), default=None)
        if folder is None:
            return 0, []
        for index, leaves in enumerate(self._learning()):
            rows = load_file(folder / f"{index:05d}.safetensors")
            leaves.value_P.copy_(rows["value"])
            leaves.mean_P.copy_(rows["mean"])
            leaves.square_P.copy_(rows["square"])
        with safe_open(folder / "00000.safetensors", framework="pt") as handle:
            return int(folder.name.removeprefix("epoch-")), [float(word) for word in handle.metadata()["kl"].split()]

    def store(self, layers: Path, out: Path) -> None:
        """Write every layer with what it learned, packed as it was."""
        pack = formats.by_name(self.storages.usual.format).pack
        shapes = linear_shapes(self.arch)
        for index, layer in enumerate(self.layers):
            path = layers / f"layer-{index:05d}.safetensors"
            stored = load_file(path)
            for name, tensor in layer.leaves.named(layer.leaves.value_P).items():
                linear = name.removesuffix(".weight")
                if linear not in layer.levels:
                    stored[name] = tensor.half().clone()
                    continue
                storage = self.storages.of(layer_prefix(index) + linear)
                assert storage is not None
                integers_OI, grid = unpack_linear(stored, linear, shapes[linear], storage)
                scale_OG = tensor.half().float().clamp(min=FLOAT16_TINY)
                learned = QuantizedWeight(integers_OI, grid._replace(scale_OG=scale_OG))
                stored |= {f"{linear}.{part}": packed.contiguous() for part, packed in pack(learned).items()}
            with safe_open(path, framework="pt") as handle:
                save_tensors(out / path.name, stored, metadata=handle.metadata())
        save_tensors(out / "outer.safetensors", {_NORM: self.last.value_P.half().clone()})
