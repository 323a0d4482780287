"""What config.json says: written in full, valid to its own library, read from other tools, refused with a reason."""

import re
from collections.abc import Mapping

import pytest

from quantkit import quantization_config
from quantkit.formats import FORMATS, Storage


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("group_size", [-1, 64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_config_round_trip(name: str, group_size: int, symmetric: bool, bits: int) -> None:
    bits = 4 if name == "awq" else bits
    config = quantization_config.build(name, bits=bits, group_size=group_size, symmetric=symmetric, ignore=["lm_head"])
    expected = (name, bits, group_size, symmetric and name != "awq")
    assert quantization_config.read(config).usual == expected


def test_configs_in_full() -> None:
    assert quantization_config.build("awq", bits=4, group_size=64, symmetric=False, ignore=["lm_head"]) == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    assert quantization_config.build("gptq", bits=4, group_size=64, symmetric=True, ignore=["lm_head"]) == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 64,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
    }
    with pytest.raises(ValueError, match="at least"):
        quantization_config.build("awq", bits=4, group_size=64, symmetric=False, ignore=[])
    with pytest.raises(ValueError, match="spell out re:"):
        quantization_config.build("awq", bits=4, group_size=64, symmetric=False, ignore=["re:.*down_proj"])
    with pytest.raises(ValueError, match="format is 'gguf'"):
        quantization_config.build("gguf", bits=4, group_size=64, symmetric=False, ignore=[])


@pytest.mark.parametrize("group_size", [-1, 64])
def test_compressed_tensors_config_is_valid_in_its_own_library(group_size: int) -> None:
    library = pytest.importorskip("compressed_tensors.quantization")
    config = quantization_config.build(
        "compressed-tensors", bits=4, group_size=group_size, symmetric=False, ignore=["lm_head"]
    )
    parsed = library.QuantizationConfig.model_validate(config)
    weights = parsed.config_groups["group_0"].weights
    assert (weights.num_bits, weights.symmetric) == (4, False)
    assert weights.group_size == (None if group_size == -1 else 64)
    assert parsed.ignore == ["lm_head"] and parsed.format == "pack-quantized"


def compressed_tensors_group(**changes: object) -> dict[str, object]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    return {"targets": ["Linear"], "weights": {**weights, **changes}, "input_activations": None}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "version": "GEMM"}, ("awq", 4, 128, False)),
        (
            {"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": True, "desc_act": True},
            ("gptq", 8, -1, True),
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"-:.*down_proj": {}}},
            ("gptq", 4, 32, True),
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {
                    "a": compressed_tensors_group(actorder="weight"),
                    "b": compressed_tensors_group(),
                },
            },
            ("compressed-tensors", 4, 32, True),
        ),
        (
            {
                "quant_method": "auto-round",
                "bits": 4,
                "group_size": 64,
                "sym": False,
                "packing_format": "auto_round:auto_awq",
            },
            ("awq", 4, 64, False),
        ),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 64, "sym": True}, ("gptq", 4, 64, True)),
    ],
)
def test_other_tools_configs_are_read(config: Mapping[str, object], expected: tuple[str, int, int, bool]) -> None:
    assert quantization_config.read(config).usual == expected


AWQ: dict[str, object] = {"quant_method": "awq", "bits": 4, "group_size": 64}
GPTQ: dict[str, object] = {"quant_method": "gptq", "bits": 4, "group_size": 64}
COMPRESSED: dict[str, object] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, "quant_method is None"),
        ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'"),
        ({**AWQ, "version": "gemv"}, "version is 'gemv'"),
        ({**AWQ, "zero_point": False}, "zero_point"),
        ({**AWQ, "bits": 3}, "3 bits"),
        ({**AWQ, "group_size": 0}, "group_size is 0"),
        ({**AWQ, "group_size": None}, "group_size is None"),
        ({**GPTQ, "checkpoint_format": "gptq_v2"}, "gptq_v2"),
        ({**GPTQ, "desc_act": True}, "desc_act"),
        ({**GPTQ, "dynamic": ["-:.*down_proj"]}, "dynamic"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:fp8"}, "packing_format"),
        ({**COMPRESSED, "config_groups": {}}, "config_groups is empty"),
        ({**COMPRESSED, "config_groups": {"g": compressed_tensors_group(type="float")}}, "static integers"),
        ({**COMPRESSED, "config_groups": {"g": compressed_tensors_group(actorder="group")}}, "actorder"),
        ({**COMPRESSED, "config_groups": {"g": compressed_tensors_group(strategy="tensor")}}, "strategy"),
        (
            {**COMPRESSED, "format": "int-quantized", "config_groups": {"g": compressed_tensors_group()}},
            "int-quantized",
        ),
        (
            {
                **COMPRESSED,
                "config_groups": {"g": {**compressed_tensors_group(), "input_activations": {"num_bits": 8}}},
            },
            "activations",
        ),
    ],
)
def test_configs_that_cannot_be_read_say_why(config: Mapping[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        quantization_config.read(config)


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LINEARS = [f"model.layers.{i}.{name}" for i in range(12) for name in (*ATTENTION, "self_attn.o_proj", "mlp.down_proj")]


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "awq"])
def test_linears_stored_otherwise_are_read_back(format: str) -> None:
    usual = Storage(format, 4, 64, format == "gptq")
    special: dict[str, Storage | None] = {f"model.layers.1.{name}": None for name in ATTENTION}
    special["model.layers.11.mlp.down_proj"] = None
    if format != "awq":
        special["model.layers.1.mlp.down_proj"] = Storage(format, 8, 32, True)
        special["model.layers.2.mlp.down_proj"] = Storage(format, 4, -1, True)
    config = quantization_config.build(
        format, bits=4, group_size=64, symmetric=usual.symmetric, ignore=["lm_head"], special=special
    )
    found = quantization_config.read(config, LINEARS)
    assert found.usual == usual
    assert dict(found.special) == special
    assert found.of("model.layers.10.mlp.down_proj") == usual


def test_what_vllm_fuses_is_named_as_it_names_it() -> None:
    special = dict.fromkeys(f"model.layers.{index}.{name}" for index in (0, 3) for name in ATTENTION)
    config = quantization_config.build(
        "gptq", bits=4, group_size=64, symmetric=True, ignore=["lm_head"], special=special
    )
    (pattern,) = config["dynamic"]  # type: ignore[misc]
    for name in ("model.layers.3.self_attn.qkv_proj", "model.layers.0.self_attn.k_proj"):
        assert re.match(pattern.removeprefix("-:"), name)
    for name in ("model.layers.30.self_attn.qkv_proj", "model.layers.3.self_attn.o_proj"):
        assert not re.match(pattern.removeprefix("-:"), name)
    with pytest.raises(ValueError, match="all its linears alike"):
        quantization_config.build(
            "awq", bits=4, group_size=64, symmetric=False, ignore=["lm_head"],
            special={LINEARS[0]: Storage("awq", 4, 32, False)},
        )  # fmt: skip
