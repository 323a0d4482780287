"""A checkpoint directory: opened with every problem named at once, read lazily, written tensor by tensor."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from quantkit import artifacts, foreign, formats, headers, quantization_config, shards
from quantkit.architecture import Architecture, all_shapes, layer_prefix, layer_shapes, linear_shapes, read_architecture
from quantkit.errors import QuantkitError, raise_all
from quantkit.formats import QuantizedWeight, Storage, Storages
from quantkit.headers import INDEX_NAME, SINGLE_NAME, Header
from quantkit.kv_cache import Scales
from quantkit.kv_scheme import has_kv_scheme, kv_scale_name, kv_scale_problems
from quantkit.shards import Entry

SHARD_BYTES = 1 << 30
_FLOATS = {"F16", "BF16", "F32"}
# What travels with the weights: tokenizer, chat template, generation defaults. Weights and code do not.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json",
    "merges.txt", "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Tensors are read when asked for; nothing stays in memory."""

    path: Path
    config: dict[str, Any]
    arch: Architecture
    shards: Mapping[str, Path]  # tensor name -> file
    storages: Storages | None  # how its linears are stored when quantized

    @property
    def storage(self) -> Storage | None:
        """How most of its linears are stored when it is quantized."""
        return self.storages.usual if self.storages else None

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by full name, as stored."""
        found: dict[str, Tensor] = {}
        by_shard: dict[Path, list[str]] = {}
        for name in names:
            by_shard.setdefault(self.shards[name], []).append(name)
        for shard, wanted in by_shard.items():
            with safe_open(shard, framework="pt") as handle:
                found |= {name: handle.get_tensor(name) for name in wanted}
        return found

    def layer(self, index: int, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The dense tensors of a decoder layer by their name inside it; quantized linears are dequantized."""
        prefix = layer_prefix(index)
        return {name: self.dense(prefix + name, dtype=dtype) for name in self._inside(index)}

    def dense(self, name: str, *, dtype: torch.dtype) -> Tensor:
        """One tensor by full name; the weight of a quantized linear is dequantized."""
        if name in self.shards:
            # As stored it is mapped, and its pages count as this process's memory: no more than one at a time.
            return self.read([name])[name].to(dtype)
        linear = name.removesuffix(".weight")
        storage = self.storages.of(linear) if self.storages else None
        assert storage is not None, f"there is no {name}"
        stored = self.read(each for each in self.shards if each.startswith(f"{linear}."))
        shape = linear_shapes(self.arch)[linear.split(".", 3)[-1]]
        try:
            return formats.dequantize(unpack_linear(stored, linear, shape, storage)).to(dtype)
        except ValueError as error:
            raise QuantkitError(
                f"{self.path}: {linear} is not stored as config.json says ({error}): quantize it again, or mend the "
                "quantization_config"
            ) from error

    def kv_scales(self, index: int) -> Scales | None:
        """What vLLM divides a layer's queries, keys and values by for an FP8 cache; None where the files bring nothing.

        Queries without a scale are divided by 1.0.
        """
        if not has_kv_scheme(self.config):
            return None
        names = [kv_scale_name(self.shards, index, which) for which in "qkv"]
        found = self.read(name for name in names if name is not None)
        return Scales(*(found[name].float().flatten() if name else torch.ones(1) for name in names))

    def _inside(self, index: int) -> list[str]:
        """The names of a decoder layer's dense tensors."""
        shapes = layer_shapes(self.arch)
        found = [name for name in shapes if layer_prefix(index) + name in self.shards]
        return found + [name for linear in linear_shapes(self.arch) if (name := f"{linear}.weight") not in found]

    def outer(self, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The tensors outside the decoder layers: embeddings, last norm, and the head where it is not tied."""
        names = [name for name in self.shards if not name.startswith("model.layers.")]
        return {name: tensor.to(dtype) for name, tensor in self.read(names).items()}

    def dense_tensors(self, *, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the dequantized checkpoint by full name, one in memory at a time."""
        for entry in self.dense_entries(dtype=dtype):
            yield entry.name, entry.read()

    def dense_entries(self, *, dtype: torch.dtype) -> Iterator[Entry]:
        """Every tensor of the dequantized checkpoint, to be read when it is written."""
        for name, shape in self.outer_shapes().items():
            yield Entry(name, dtype, shape, partial(self.dense, name, dtype=dtype))
        shapes = layer_shapes(self.arch)
        for index in range(self.arch.num_layers):
            for inside in self._inside(index):
                name = layer_prefix(index) + inside
                yield Entry(name, dtype, shapes[inside], partial(self.dense, name, dtype=dtype))

    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors outside the decoder layers, in the order of `outer`."""
        names = [name for name in self.shards if not name.startswith("model.layers.")]
        found, problems = _read_headers(self.path, {name: self.shards[name] for name in names})
        raise_all(problems)
        return {name: found[name][1] for name in names}


def unpack_linear(
    stored: Mapping[str, Tensor], linear: str, shape: tuple[int, int], storage: Storage
) -> QuantizedWeight:
    """The integers and the grid of one packed linear of a layer."""
    start = f"{linear}."
    packed = {name.removeprefix(start): tensor for name, tensor in stored.items() if name.startswith(start)}
    return formats.unpack(storage, packed, shape=shape)


def open_checkpoint(path: Path, *, quantized: bool | None = None) -> Checkpoint:
    """Open and validate a Llama-family checkpoint directory; reads headers only, never a weight.

    `quantized` says what is wanted: True only quantized, False only unquantized, None either.

    Raises:
        QuantkitError: everything that is wrong with it, in one message.
    """
    config = _read_config(path)
    arch, problems = read_architecture(config)
    storages = None
    problems += code_problems(path)
    if (quantization := config.get("quantization_config")) is not None:
        if not isinstance(quantization, dict):
            problems.append(f"{path / 'config.json'}: quantization_config is no object: get the file again")
        elif quantized is False:
            problems.append(
                f"{path} is already quantized ({quantization.get('quant_method')}): start from the FP16 original"
            )
        else:
            try:
                names = (
                    []
                    if arch is None
                    else [
                        layer_prefix(index) + linear
                        for index in range(arch.num_layers)
                        for linear in linear_shapes(arch)
                    ]
                )
                storages = quantization_config.read(quantization, names)
            except ValueError as error:
                problems.append(f"{path / 'config.json'}: {error}")
    elif quantized:
        problems.append(f"{path} is not quantized: give the output of `quantkit quantize`")
    shards, shard_problems = _find_shards(path)
    problems += shard_problems
    found, header_problems = _read_headers(path, shards)
    problems += header_problems
    if arch is not None and not problems:
        problems += _shape_problems(arch, found, storages)
        problems += [f"{path}: {problem}" for problem in kv_scale_problems(config, found)]
    raise_all(problems)
    assert arch is not None
    return Checkpoint(path=path, config=config, arch=arch, shards=shards, storages=storages)


def check_finite(checkpoint: Checkpoint, on_tensor: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Read every weight once and refuse NaN and Inf, before hours are spent on them.

    `on_tensor(done, total)` is called after each tensor.
    """
    problems = []
    for done, name in enumerate(checkpoint.shards, start=1):
        tensor = checkpoint.read([name])[name]
        # one NaN or Inf makes the sum so: a pass over the bytes, and the slow count only where it is needed
        suspect = tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float32))
        if suspect and (bad := int((~torch.isfinite(tensor)).sum())):
            problems.append(f"{checkpoint.shards[name]}: {name} holds {bad} NaN or Inf values: get the file again")
        on_tensor(done, len(checkpoint.shards))
    raise_all(problems)


def write_weights(directory: Path, entries: Iterable[Entry], *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors in the order given as safetensors shards with an index (one file and no index when they fit).

    One tensor is in memory at a time: what has to be known of the others is their types and shapes.
    """
    pending: list[Entry] = []
    pending_bytes, total_bytes = 0, 0
    written: list[tuple[Path, list[str]]] = []

    def flush() -> None:
        temporary = directory / f"model-{len(written) + 1:05d}.safetensors"
        shards.write_file(temporary, pending, metadata={"format": "pt"})
        written.append((temporary, [entry.name for entry in pending]))
        pending.clear()

    for entry in entries:
        if pending and pending_bytes + entry.num_bytes > shard_bytes:
            flush()
            pending_bytes = 0
        pending.append(entry)
        pending_bytes += entry.num_bytes
        total_bytes += entry.num_bytes
    flush()
    if len(written) == 1:
        written[0][0].replace(directory / SINGLE_NAME)
        return
    weight_map: dict[str, str] = {}
    for number, (temporary, names) in enumerate(written, start=1):
        shard = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        temporary.replace(directory / shard)
        weight_map |= dict.fromkeys(names, shard)
    artifacts.write_json(directory / INDEX_NAME, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def write_dense(checkpoint: Checkpoint, out: Path) -> None:
    """Write an FP16 copy with every linear dequantized: the same function for readers without a kernel for it."""
    out.mkdir(parents=True, exist_ok=True)
    write_weights(out, checkpoint.dense_entries(dtype=torch.float16))
    copy_companions(checkpoint.path, out)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    artifacts.write_json(out / "config.json", config)  # last: its presence means that the copy is whole


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors that are in memory as a safetensors file, whole or not at all.

    Raises:
        OSError: the system's own, a full disk for example.
    """
    shards.write_file(path, (shards.held(name, tensor) for name, tensor in tensors.items()), metadata=metadata or {})


def copy_companions(source: Path, destination: Path) -> None:
    """Copy tokenizer, chat template and generation defaults: what a server needs beside config and weights."""
    for name in COMPANIONS:
        if (source / name).is_file():
            foreign.regular(source / name, within=source)
            shutil.copyfile(source / name, destination / name)


def code_problems(path: Path) -> list[str]:
    """What in a checkpoint's JSON files names code to load, or a tokenizer's files elsewhere; empty as a rule."""
    found = []
    for file in ("config.json", "tokenizer_config.json"):
        try:
            said = foreign.json_object(path / file, remedy="get the file again", within=path)
        except FileNotFoundError:
            continue
        if "auto_map" in said:
            found.append(
                f"{path / file} has auto_map, which loads code: use a checkpoint that transformers knows itself"
            )
        found += [
            f"{path / file}: {key} leads to {value!r}: a tokenizer's files are those beside it; remove the key"
            for key, value in said.items()
            if key.endswith("_file") and isinstance(value, str) and path / Path(value).name != path / value
        ]
    return found


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise QuantkitError(f"{path} is not a directory: give a checkpoint directory with config.json and safetensors")
    try:
        return foreign.json_object(path / "config.json", remedy="get the file again", within=path)
    except FileNotFoundError:
        raise QuantkitError(f"{path} has no config.json: give a Hugging Face checkpoint directory") from None


def _find_shards(path: Path) -> tuple[dict[str, Path], list[str]]:
    """Which file each tensor is said to be in; for a single file the names come from its header."""
    try:
        named = headers.weight_map(path)
    except FileNotFoundError:
        return _single(path)
    except QuantkitError as error:
        return {}, [str(error)]
    missing = [
        f"{file} is missing, though {INDEX_NAME} names it: download that shard"
        for file in sorted(set(named.values()))
        if not file.exists()
    ]
    return named, missing


def _single(path: Path) -> tuple[dict[str, Path], list[str]]:
    single = path / SINGLE_NAME
    try:
        return dict.fromkeys(headers.header(single, within=path), single), []
    except QuantkitError as error:
        return {}, [str(error)]
    except FileNotFoundError:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        if pickles:
            return {}, [f"{path} holds only pickled weights ({pickles[0]}): convert them to safetensors first"]
        return {}, [f"{path} has neither {SINGLE_NAME} nor {INDEX_NAME}: get the weights as safetensors"]


def _read_headers(path: Path, shards: Mapping[str, Path]) -> tuple[Header, list[str]]:
    """Data type and shape of each tensor, as the header of the shard that it is said to be in says."""
    found: Header = {}
    problems = []
    for shard in sorted(set(shards.values())):
        try:
            inside = headers.header(shard, within=path)
            found |= {name: said for name, said in inside.items() if shards.get(name) == shard}
        except FileNotFoundError:
            continue  # named already
        except QuantkitError as error:
            problems.append(str(error))
    if not problems:
        problems += [
            f"{shard}: the index says it holds {name}, and it does not: get index and shards of one revision"
            for name, shard in shards.items()
            if name not in found and shard.exists()
        ]
    return found, problems


def _shape_problems(arch: Architecture, found: Header, storages: Storages | None) -> list[str]:
    problems = []
    linears = linear_shapes(arch)
    for name, shape in all_shapes(arch).items():
        stem = name.removesuffix(".weight")
        if name not in found:
            inside = stem.split(".", 3)[-1]
            packed = inside in linears and storages is not None and storages.of(stem) is not None
            packed = packed and any(key.startswith(f"{stem}.") for key in found)
            if not packed:
                problems.append(f"tensor {name} is missing: the checkpoint does not match its config.json")
            continue
        dtype, stored = found[name]
        if stored != shape:
            problems.append(
                f"tensor {name} has shape {list(stored)}, config.json asks for {list(shape)}: get both anew"
            )
        if dtype not in _FLOATS:
            problems.append(f"tensor {name} is {dtype}: only F16, BF16 and F32 weights can be read: convert it")
    return problems
