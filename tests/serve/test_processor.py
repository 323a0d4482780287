"""What stands for what a processor without AVX-512 lacks, by the bundle's own files."""

import json
from pathlib import Path

import pytest

from quantkit import hardware
from quantkit.serve import processor

CT = {"quant_method": "compressed-tensors", "kv_cache_scheme": None}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "target").mkdir()
    return tmp_path


def fill(bundle: Path, *, kv_cache_dtype: str, quantization: dict[str, object] | None, dtype: str = "bfloat16") -> None:
    (bundle / "vllm" / "serve.cpu.yaml").write_text(f'kv-cache-dtype: "{kv_cache_dtype}"\ndtype: "{dtype}"\n')
    config = {} if quantization is None else {"quantization_config": quantization}
    (bundle / "target" / "config.json").write_text(json.dumps(config))


WIDE = ("--dtype", "float32")
SCHEME = CT | {"kv_cache_scheme": {"num_bits": 8}}
BARE = ("--kv-cache-dtype", "auto", "--hf-overrides", json.dumps({"quantization_config": CT}))


@pytest.mark.parametrize(
    ("kv_cache_dtype", "quantization", "flags"),
    [
        ("auto", None, [WIDE]),
        ("auto", CT, [(), WIDE]),
        ("fp8", None, [WIDE, ("--kv-cache-dtype", "auto")]),
        ("fp8_e4m3", CT, [(), WIDE, ("--kv-cache-dtype", "auto")]),
        ("auto", SCHEME, [(), WIDE, BARE]),
        ("bfloat16", SCHEME, [(), WIDE, BARE]),
    ],
)
def test_without_avx512(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, kv_cache_dtype: str, quantization: dict[str, object] | None,
    flags: list[tuple[str, ...]],
) -> None:  # fmt: skip
    monkeypatch.setattr(hardware, "lacks_avx512", lambda: True)
    fill(bundle, kv_cache_dtype=kv_cache_dtype, quantization=quantization)
    assert [one.flags for one in processor.substitutes(bundle)] == flags


def test_scales_a_head_keep_the_models_type(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "lacks_avx512", lambda: True)
    fill(bundle, kv_cache_dtype="auto", quantization=CT | {"kv_cache_scheme": {"strategy": "attn_head"}})
    assert [one.flags for one in processor.substitutes(bundle)] == [(), ("--kv-cache-dtype", "bfloat16")]


@pytest.mark.parametrize(("dtype", "kept"), [("auto", "float16"), ("float16", "float16"), ("bfloat16", "bfloat16")])
def test_where_float32_is_refused_the_cache_has_the_models_own_type(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, kept: str
) -> None:
    monkeypatch.setattr(hardware, "lacks_avx512", lambda: True)
    fill(bundle, kv_cache_dtype="fp8", quantization={"quant_method": "awq"}, dtype=dtype)
    assert [one.flags for one in processor.substitutes(bundle)] == [(), ("--kv-cache-dtype", kept)]


def test_with_avx512_the_profile_stays_as_it_is(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "lacks_avx512", lambda: False)
    fill(bundle, kv_cache_dtype="fp8", quantization=CT)
    assert processor.substitutes(bundle) == []
