"""What config.json says under "quantization_config": written for each format, and read, our own and other tools'."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from quantkit.formats import FORMATS, Storage, Storages, by_name
from quantkit.patterns import Patterns


def build(
    format: str, *, bits: int, group_size: int, symmetric: bool, ignore: Sequence[str],
    special: Mapping[str, Storage | None] | None = None, kv_strategy: str | None = None,
) -> dict[str, object]:  # fmt: skip
    """What config.json says under "quantization_config".

    group_size: -1 for per channel.
    ignore: the linears left in full precision, "lm_head" among them. AWQ needs at least one and matches them
        as substrings; compressed-tensors matches names, and "re:..." as patterns; GPTQ has no place for them,
        and vLLM goes by which linears have packed tensors in the files.
    special: linears of decoder layers by full name that are stored otherwise, or not quantized (None). Those that
        vLLM runs as one (q, k, v; gate, up) must share a scheme.
    kv_strategy: the files hold scales of an FP8 KV cache, "tensor": one a layer, "attn_head": one a key-value head.

    Raises ValueError for an unknown format, for AWQ without names to ignore or with linears of another scheme, and for
    KV scales in a format that vLLM drops them of.
    """
    by_name(format)
    config = _BUILDERS[format](bits=bits, group_size=group_size, symmetric=symmetric, ignore=ignore)
    by_storage: dict[Storage | None, list[str]] = {}
    for name, storage in (special or {}).items():
        by_storage.setdefault(storage, []).append(name)
    for number, (storage, names) in enumerate(sorted(by_storage.items(), key=str), start=1):
        _SPECIALS[format](config, number, storage, names)
    if kv_strategy is not None:
        if format != "compressed-tensors":
            raise ValueError(f"vLLM drops the KV scales of a checkpoint in {format} format: choose compressed-tensors")
        config["kv_cache_scheme"] = {
            "num_bits": 8, "type": "float", "symmetric": True, "strategy": kv_strategy, "dynamic": False,
        }  # fmt: skip
    return config


def read(config: Mapping[str, object], linears: Iterable[str] = ()) -> Storages:
    """How a quantization_config, our own or another tool's, says that linears are stored.

    linears: full names of those in decoder layers, to find out which of them are stored otherwise than most.

    Reads quant_method awq, gptq, compressed-tensors and auto-round (in its AWQ and GPTQ packing). group_size
    is -1 for per channel. AWQ is never symmetric: its files hold zero points even where they are all 8.
    Raises ValueError, saying why, for what `formats.FORMATS` cannot unpack.
    """
    readers = {
        "awq": _read_awq,
        "gptq": _read_gptq,
        "compressed-tensors": _read_compressed_tensors,
        "auto-round": _read_auto_round,
        "intel/auto-round": _read_auto_round,
    }
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in readers:
        raise ValueError(f"quant_method is {method!r}: only {', '.join(readers)} can be read")
    usual = readers[method](config)
    patterns = Patterns()
    special = {name: _special(config, usual, name, patterns) for name in linears}
    return Storages(usual, {name: storage for name, storage in special.items() if storage != usual})


class _Build(Protocol):
    """Writes the quantization_config of a whole checkpoint."""

    def __call__(self, *, bits: int, group_size: int, symmetric: bool, ignore: Sequence[str]) -> dict[str, object]: ...


def _awq_config(*, bits: int, group_size: int, symmetric: bool, ignore: Sequence[str]) -> dict[str, object]:
    if not ignore:
        # vLLM would list the linears with float tensors itself, and take a k_scale for the sign of an
        # unquantized layer.
        raise ValueError('awq needs names in ignore (modules_to_not_convert): give at least "lm_head"')
    patterns = [name for name in ignore if name.startswith("re:")]
    if patterns:
        raise ValueError(f"awq ignores by substring, not by pattern: spell out {', '.join(patterns)}")
    return {
        "quant_method": "awq",
        "bits": bits,
        "group_size": group_size,
        "zero_point": True,  # stored in any case; a symmetric grid has 8 everywhere
        "version": "gemm",
        "modules_to_not_convert": list(ignore),
    }


def _gptq_config(*, bits: int, group_size: int, symmetric: bool, ignore: Sequence[str]) -> dict[str, object]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,  # act_order with static groups leaves nothing to reorder; vLLM refuses true
        "sym": symmetric,
        "lm_head": False,
        "checkpoint_format": "gptq",
    }


def _compressed_tensors_config(
    *, bits: int, group_size: int, symmetric: bool, ignore: Sequence[str]
) -> dict[str, object]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
        "actorder": None,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


_BUILDERS: dict[str, _Build] = {
    "awq": _awq_config,
    "gptq": _gptq_config,
    "compressed-tensors": _compressed_tensors_config,
}


def _special_awq(config: dict[str, object], number: int, storage: Storage | None, names: list[str]) -> None:
    if storage is not None:
        raise ValueError("awq stores all its linears alike: choose compressed-tensors, or gptq")
    ignored = config["modules_to_not_convert"]
    assert isinstance(ignored, list)
    ignored += names  # as substrings: a full name behind its layer's number and dot is no other's part


def _special_gptq(config: dict[str, object], number: int, storage: Storage | None, names: list[str]) -> None:
    dynamic = config.setdefault("dynamic", {})
    assert isinstance(dynamic, dict)
    for pattern in _patterns(names):
        if storage is None:
            dynamic[f"-:{pattern}"] = {}
        else:
            scheme = {"bits": storage.bits, "group_size": storage.group_size, "sym": storage.symmetric}
            dynamic[f"+:{pattern}"] = scheme


def _special_compressed_tensors(
    config: dict[str, object], number: int, storage: Storage | None, names: list[str]
) -> None:
    targets = [f"re:{pattern}" for pattern in _patterns(names)]
    groups, ignored = config["config_groups"], config["ignore"]
    assert isinstance(groups, dict) and isinstance(ignored, list)
    if storage is None:
        ignored += targets
        return
    other = _compressed_tensors_config(
        bits=storage.bits, group_size=storage.group_size, symmetric=storage.symmetric, ignore=[]
    )["config_groups"]
    assert isinstance(other, dict)
    groups[f"group_{number}"] = other["group_0"] | {"targets": targets}


_SPECIALS = {"awq": _special_awq, "gptq": _special_gptq, "compressed-tensors": _special_compressed_tensors}
_FUSED = (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj")))


def _patterns(names: Sequence[str]) -> list[str]:
    """Regular expressions for these linears, one for those of a kind; also for the names that vLLM fuses them under."""
    layers: dict[str, list[int]] = {}
    for name in names:
        _, _, index, kind = name.split(".", 3)
        layers.setdefault(kind, []).append(int(index))
    for fused, parts in _FUSED:
        for kind in [kind for kind in layers if kind.rpartition(".")[2] == parts[0]]:
            layers[f"{kind.rpartition('.')[0]}.{fused}"] = layers[kind]
    by_layers: dict[tuple[int, ...], list[str]] = {}
    for kind, found in layers.items():
        by_layers.setdefault(tuple(sorted(found)), []).append(kind)
    patterns = []
    for indices, alike in by_layers.items():
        numbers, endings = "|".join(map(str, indices)), "|".join(map(re.escape, alike))
        patterns.append(rf"model\.layers\.({numbers})\.({endings})$")
    return patterns


def _special(config: Mapping[str, object], usual: Storage, name: str, patterns: Patterns) -> Storage | None:
    """How one linear is stored."""
    if config.get("quant_method") == "awq":
        ignored = config.get("modules_to_not_convert") or []
        return None if isinstance(ignored, list) and any(str(part) in name for part in ignored) else usual
    if config.get("quant_method") == "gptq":
        return _special_by_dynamic(config.get("dynamic") or {}, usual, name, patterns)
    if config.get("quant_method") == "compressed-tensors":
        return _special_by_target(config, name, patterns)
    return usual


def _special_by_dynamic(dynamic: object, usual: Storage, name: str, patterns: Patterns) -> Storage | None:
    assert isinstance(dynamic, Mapping)
    for pattern, scheme in dynamic.items():
        if not patterns.match(str(pattern).removeprefix("-:").removeprefix("+:"), name):
            continue
        if str(pattern).startswith("-:"):
            return None
        given = scheme if isinstance(scheme, Mapping) else {}
        usually = {"bits": usual.bits, "group_size": usual.group_size}
        bits, group_size = (_integer(usually | dict(given), key) for key in usually)
        return _known("gptq", bits, group_size, bool(given.get("sym", usual.symmetric)))
    return usual


def _special_by_target(config: Mapping[str, object], name: str, patterns: Patterns) -> Storage | None:
    def listed(targets: object) -> bool:
        return isinstance(targets, list) and any(
            patterns.match(str(target).removeprefix("re:"), name) if str(target).startswith("re:") else target == name
            for target in targets
        )

    groups = config["config_groups"]
    assert isinstance(groups, Mapping)
    if listed(config.get("ignore")):
        return None
    for key, group in sorted(groups.items(), key=lambda item: _for_all(item[1])):
        if listed(group.get("targets")) or _for_all(group):
            return _known("compressed-tensors", *_read_config_group(key, group, config.get("format")))
    return None


def _read_awq(config: Mapping[str, object]) -> Storage:
    # Files of AutoAWQ before transformers read them have w_bit and q_group_size.
    bits = _integer(config, "bits", "w_bit")
    group_size = _integer(config, "group_size", "q_group_size")
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise ValueError(f"AWQ version is {version!r}: only the packing of gemm can be read")
    if config.get("zero_point", True) is not True:
        raise ValueError("AWQ without zero_point can not be read: quantize with zero_point true")
    return _known("awq", bits, group_size, False)


def _read_gptq(config: Mapping[str, object]) -> Storage:
    bits, group_size = _integer(config, "bits"), _integer(config, "group_size")
    checkpoint_format = config.get("checkpoint_format") or "gptq"
    if checkpoint_format != "gptq":
        raise ValueError(
            f"checkpoint_format is {checkpoint_format!r}: only gptq, with zero points minus one, can be read"
        )
    if config.get("desc_act") and group_size != -1:
        raise ValueError("desc_act with groups can not be read, nor loaded by vLLM 0.32: quantize with static groups")
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise ValueError(f"dynamic is {dynamic!r}: expected patterns with what they change")
    return _known("gptq", bits, group_size, bool(config.get("sym", True)))


def _read_auto_round(config: Mapping[str, object]) -> Storage:
    packings = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}
    packing = config.get("packing_format", "auto_round:auto_gptq")
    if not isinstance(packing, str) or packing not in packings:
        raise ValueError(f"packing_format is {packing!r}: only {', '.join(packings)} can be read")
    if config.get("data_type", "int") != "int":
        raise ValueError(f"data_type is {config['data_type']!r}: only int can be read")
    if config.get("extra_config"):
        raise ValueError("extra_config gives some linears a scheme of their own: only one scheme for all can be read")
    symmetric = bool(config.get("sym", True)) and packings[packing] != "awq"
    return _known(packings[packing], _integer(config, "bits"), _integer(config, "group_size"), symmetric)


def _read_compressed_tensors(config: Mapping[str, object]) -> Storage:
    for key in ("transform_config", "sparsity_config"):
        if config.get(key):
            raise ValueError(f"{key} is set: weights that are transformed or sparse besides can not be read")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError("config_groups is empty: no weights are quantized")
    schemes = {name: _read_config_group(name, group, config.get("format")) for name, group in groups.items()}
    for_all = [name for name, group in groups.items() if _for_all(group)]
    return _known("compressed-tensors", *schemes[for_all[0] if for_all else next(iter(schemes))])


def _for_all(group: Mapping[str, object]) -> bool:
    targets = group.get("targets")
    return isinstance(targets, list) and "Linear" in targets


def _read_config_group(name: str, group: object, default_format: object) -> tuple[int, int, bool]:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(group, Mapping) or not isinstance(weights, Mapping):
        raise ValueError(f"{name} quantizes no weights")
    packing = group.get("format") or default_format
    if packing != "pack-quantized":
        raise ValueError(f"the format of {name} is {packing!r}: only pack-quantized can be read")
    if group.get("input_activations") or group.get("output_activations"):
        raise ValueError(f"{name} quantizes activations: only weights can be read")
    if weights.get("type", "int") != "int" or weights.get("dynamic"):
        raise ValueError(f"the weights of {name} are not static integers")
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise ValueError(f"actorder of {name} is {weights['actorder']!r}: quantize with actorder weight instead")
    strategy = weights.get("strategy")
    if strategy not in ("group", "channel"):
        raise ValueError(f"the strategy of {name} is {strategy!r}: only group and channel can be read")
    group_size = -1 if strategy == "channel" else _integer(weights, "group_size")
    return _integer(weights, "num_bits"), group_size, bool(weights.get("symmetric", True))


def _integer(config: Mapping[str, object], *keys: str) -> int:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    raise ValueError(f"{keys[0]} is {config.get(keys[0])!r}: expected an integer")


def _known(format: str, bits: int, group_size: int, symmetric: bool) -> Storage:
    if bits not in FORMATS[format].bits:
        raise ValueError(f"{format} with {bits} bits can not be read: only {FORMATS[format].bits}")
    if group_size < 1 and group_size != -1:
        raise ValueError(f"group_size is {group_size}: expected -1 or more than 0")
    return Storage(format, bits, group_size, symmetric)
