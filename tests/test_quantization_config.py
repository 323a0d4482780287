"""What config.json says: written in full, valid to its own library, read from other tools, refused with a reason."""

from collections.abc import Mapping

import pytest

from quantkit import quantization_config
from quantkit.formats import FORMATS


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("group_size", [-1, 64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_config_round_trip(name: str, group_size: int, symmetric: bool, bits: int) -> None:
    bits = 4 if name == "awq" else bits
    config = quantization_config.build(name, bits=bits, group_size=group_size, symmetric=symmetric, ignore=["lm_head"])
    expected = (name, bits, group_size, symmetric and name != "awq")
    assert quantization_config.read(config) == expected


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
    assert quantization_config.read(config) == expected


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
        ({**GPTQ, "dynamic": {"+:.*down_proj": {"bits": 8}}}, "dynamic"),
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
                "config_groups": {"g": compressed_tensors_group(), "h": compressed_tensors_group(num_bits=8)},
            },
            "several schemes",
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
