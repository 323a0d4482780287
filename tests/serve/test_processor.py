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


def fill(bundle: Path, *, kv_cache_dtype: str, quantization: dict[str, object] | None) -> None:
    (bundle / "vllm" / "serve.cpu.yaml").write_text(f'kv-cache-dtype: "{kv_cache_dtype}"\n')
    config = {} if quantization is None else {"quantization_config": quantization}
    (bundle / "target" / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kv_cache_dtype", "quantization", "flags"),
    [
        ("auto", None, []),
        ("auto", CT, [()]),
        ("fp8", None, [("--kv-cache-dtype", "bfloat16")]),
        ("fp8_e4m3", CT, [(), ("--kv-cache-dtype", "bfloat16")]),
        ("auto", CT | {"kv_cache_scheme": {"num_bits": 8}}, [(), ("--kv-cache-dtype", "bfloat16")]),
        ("bfloat16", CT | {"kv_cache_scheme": {"num_bits": 8}}, [()]),
    ],
)
def test_without_avx512(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, kv_cache_dtype: str, quantization: dict[str, object] | None,
    flags: list[tuple[str, ...]],
) -> None:  # fmt: skip
    monkeypatch.setattr(hardware, "lacks_avx512", lambda: True)
    fill(bundle, kv_cache_dtype=kv_cache_dtype, quantization=quantization)
    assert [one.flags for one in processor.substitutes(bundle)] == flags


def test_with_avx512_the_profile_stays_as_it_is(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "lacks_avx512", lambda: False)
    fill(bundle, kv_cache_dtype="fp8", quantization=CT)
    assert processor.substitutes(bundle) == []
