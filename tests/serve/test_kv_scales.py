"""The scales that a real engine divides by, read back and compared with the files; on any processor, as vLLM loads them
before it looks for a kernel.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit import artifacts, hardware
from quantkit.capacity import sizing
from quantkit.errors import QuantkitError
from quantkit.progress import silent
from quantkit.serve import bundle as bundles
from quantkit.serve import kv_scales, prove
from quantkit.serve.settings import ServeSettings

MakeBundle = Callable[..., Path]
SETTINGS = ServeSettings(
    served_model_name="tiny", max_model_len=512, max_num_seqs=4, max_num_batched_tokens=512, num_speculative_tokens=2,
    kv_cache_memory_bytes=16 << 20, dtype="bfloat16",
)  # fmt: skip


@pytest.fixture(scope="module")
def target(
    make_llama: Callable[..., Path], make_scaled: Callable[..., Path], texts: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """Two query heads to each key-value head, and a scale for each: what vLLM has most to do for."""
    folder = tmp_path_factory.mktemp("target")
    source = make_llama(folder / "source", heads=4, kv_heads=2, hidden_size=128)
    return make_scaled(source, texts[0], folder / "target", strategy="attn_head")


@pytest.fixture(scope="module")
def bundle(target: Path, make_bundle: MakeBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Target and draft are the same checkpoint, and both bring scales."""
    return make_bundle(target, tmp_path_factory.mktemp("scaled") / "bundle", SETTINGS)


@pytest.mark.vllm
def test_the_server_divides_by_the_scales_in_the_bundle(bundle: Path, tmp_path: Path) -> None:
    found = prove.prove(bundle, out=tmp_path, report=silent)
    checks = {one["name"]: one for one in found["checks"]}
    said = checks["KV scales of the running engine"]
    kept = "bfloat16" if hardware.lacks_avx512() else "fp8"
    both = (f"{role}: 2 layers hold the file's scales, cache of type {kept}" for role in ("target", "draft"))
    assert said["passed"] and said["detail"] == "; ".join(both)
    assert all(one["passed"] for one in found["checks"]), found["checks"]
    tokens_logged = next(
        line.split("KV cache size: ")[1].split(" tokens")[0]
        for line in (tmp_path / "server.log").read_text().splitlines() if "KV cache size: " in line
    )  # fmt: skip
    sized = sizing.size(
        bundle / "target", bundle / "draft", kv_cache_bytes=16 << 20, block_size=32, max_model_len=512,
        kv_cache_dtype=kept,
    )  # fmt: skip
    assert int(tokens_logged.replace(",", "")) == sized.kv_cache_tokens


def test_other_scales_than_the_file_has_are_named(bundle: Path, tmp_path: Path) -> None:
    expected = kv_scales.expected(bundle / "target")
    assert all(len(values) == 2 for scales in expected.values() for values in scales.values())
    lines = [
        {"layer": f"{start}model.layers.{index}.self_attn.attn", "cache": "fp8", **scales}
        for start in ("", "draft_model.")
        for index, scales in expected.items()
    ]
    told = tmp_path / "1.jsonl"
    told.write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = tmp_path / "log"
    log.write_text("all is well")
    assert kv_scales.check(bundle, tmp_path, log, settings=SETTINGS, profile="cpu").passed
    lines[0]["k"] = lines[0]["k"][::-1]
    told.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert (
        "layer 0 divides by k_scale" in kv_scales.check(bundle, tmp_path, log, settings=SETTINGS, profile="cpu").detail
    )
    lines[0]["k"], lines[1]["v"] = expected[0]["k"], [1.0]
    told.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = kv_scales.check(bundle, tmp_path, log, settings=SETTINGS, profile="cpu")
    assert not said.passed and "target: layer 1 divides by v_scale [1.0], the file has [" in said.detail
    told.write_text("")
    assert (
        "the engine said of no layer" in kv_scales.check(bundle, tmp_path, log, settings=SETTINGS, profile="cpu").detail
    )
    lines[1]["v"] = expected[1]["v"]
    told.write_text("".join(json.dumps(line) + "\n" for line in lines[: len(expected)]))
    alone = SETTINGS.model_copy(update={"cpu_num_speculative_tokens": 0})
    assert kv_scales.check(bundle, tmp_path, log, settings=alone, profile="cpu").passed, "no draft is loaded"
    assert not kv_scales.check(bundle, tmp_path, log, settings=alone, profile="gpu").passed
    log.write_text("WARNING Using KV cache scaling factor 1.0 for fp8_e4m3.")
    assert "runs at scale 1.0" in kv_scales.check(bundle, tmp_path, log, settings=SETTINGS, profile="cpu").detail


def test_fp8_without_scales_must_be_meant(tiny_llama: Path, tmp_path: Path) -> None:
    asked = SETTINGS.model_copy(update={"kv_cache_dtype": "fp8", "num_speculative_tokens": None})

    def build(settings: ServeSettings, out: Path) -> dict[str, object]:
        with artifacts.making(out, "bundle", inputs={}, settings=settings.model_dump()) as work:
            bundles.build(work, target=tiny_llama, draft=None, report=None, settings=settings, sources={})
        return dict(bundles.read_bundle(out))

    with pytest.raises(QuantkitError, match="the target carries no scales for it, and vLLM would take"):
        build(asked, tmp_path / "refused")
    record = build(asked.model_copy(update={"uncalibrated_kv_cache": True}), tmp_path / "out")
    assert record["kv_cache"]["scales"] == "1.0, uncalibrated as asked for"  # type: ignore[index]
    assert any("uncalibrated scales of 1.0" in str(line) for line in record["warnings"])  # type: ignore[attr-defined]
    assert "uncalibrated" in (tmp_path / "out" / "README.md").read_text()
    assert "uncalibrated" not in (tmp_path / "out" / "vllm" / "serve.yaml").read_text()
