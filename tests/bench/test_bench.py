"""The real thing on a tiny bundle whose draft is its target: servers, vLLM's client, the pages, the next bundle."""

import json
from pathlib import Path

import pytest
import yaml

from quantkit import hardware, speculation, stages
from quantkit.errors import QuantkitError
from quantkit.progress import Display
from quantkit.recipe import Bench, Serve

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def display() -> Display:
    from rich.console import Console

    return Display(Console(stderr=True))


@pytest.fixture(scope="module")
def benched(bundle: Path, tiny_llama: Path, display: Display, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "out"
    beginning = out.with_name("beginning.txt")
    beginning.write_text("The harbour of the town lies open to the west, and no ship can leave it. " * 3)
    settings = Bench(
        variants=("w4", "w4+draft", "w4+draft+prefix"), concurrencies=(1, 4), rounds=2, requests=3, output_tokens=12,
        system_prompt=str(beginning), price_per_hour=2.0, ttft_limit_s=60, tpot_limit_s=60,
    )  # fmt: skip
    stages.run_stage(stages.bench(bundle, tiny_llama, settings=settings), out, display=display)
    return out


def test_it_measures_what_was_asked(benched: Path) -> None:
    found = json.loads((benched / "bench.json").read_bytes())
    cells = {(row["variant"], row["kind"], row["concurrency"]): row for row in found["cells"]}
    unique = {(name, "unique", size) for name in ("w4", "w4+draft") for size in (1, 4)}
    shared = {(name, "shared", size) for name in ("w4+draft", "w4+draft+prefix") for size in (1, 4)}
    assert cells.keys() == unique | shared
    assert cells["w4", "unique", 1]["requests"] == 2 * 3 and cells["w4", "unique", 4]["requests"] == 2 * 4
    for (name, _, _), row in cells.items():
        drafted, cached = "draft" in name, "prefix" in name
        # whatever it proposes is accepted, but for what lies beyond the end of an answer
        assert (row["acceptance"]["accepted_length"] > 3.5) if drafted else row["acceptance"] is None
        assert (row["prefix_hit_rate"] > 0.5) if cached else row["prefix_hit_rate"] is None
        assert row["within_limits"] == 1 and row["preemptions"] == 0 and row["price_per_million_tokens"] > 0
        assert 0 < row["ttft_s"]["p50"] < row["latency_s"]["p50"] and row["output_tokens"] <= 12
    techniques = {(gain["technique"], gain["kind"]) for gain in found["gains"]}
    assert techniques == {("speculation", "unique"), ("prefix caching", "shared")}
    assert [load["concurrency"] for load in found["speculation"]["loads"]] == [1, 4]
    assert list(found["turns_negative"]) == ["w4+draft"]
    served = {one["name"]: one for one in found["variants"]}
    assert served["w4"]["flags"]["no-enable-prefix-caching"] and served["w4"]["ready_s"] > 0
    for file in ("bench.html", "bench.md", "settings/w4+draft.yaml", "loads/w4-unique-t0-c1-r0.json"):
        assert (benched / file).stat().st_size > 200


def test_the_next_bundle_drafts_as_was_measured(
    bundle: Path, benched: Path, tiny_llama: Path, display: Display, tmp_path: Path
) -> None:
    settings = Serve(max_model_len=512, max_num_seqs=4, max_num_batched_tokens=512, speculate="auto")
    stage = stages.bundle(tiny_llama, draft=tiny_llama, report_dir=None, settings=settings, bench_dir=benched)
    manifest = stages.run_stage(stage, tmp_path / "tuned", display=display)
    plan = json.loads((benched / "bench.json").read_bytes())["speculation"]
    expected = speculation.decide("auto", speculation.Plan.model_validate(plan), max_num_seqs=4)
    written = yaml.safe_load((tmp_path / "tuned" / "vllm" / "serve.cpu.yaml").read_text())
    assert written.get("speculative-config", {}).get("num_speculative_tokens", 0) == expected.tokens
    assert "as served" in manifest.results["speculation"]["cpu"]


def test_a_bench_of_something_else_is_refused(
    benched: Path, drifted_llama: Path, tiny_llama: Path, display: Display, tmp_path: Path
) -> None:
    stage = stages.bundle(drifted_llama, draft=tiny_llama, report_dir=None, settings=Serve(), bench_dir=benched)
    with pytest.raises(QuantkitError, match=r"the target that .* measured is another one"):
        stages.run_stage(stage, tmp_path / "other", display=display)


def test_what_cannot_be_measured_here_is_refused_before_any_server(
    bundle: Path, tiny_llama: Path, display: Display, tmp_path: Path
) -> None:
    asked = Bench(variants=("w4", "w4+fp8", "w4+what-if:0.7"))
    with pytest.raises(QuantkitError, match="synthetic acceptance needs a GPU") as caught:
        stages.run_stage(stages.bench(bundle, tiny_llama, settings=asked), tmp_path / "out", display=display)
    assert ("AVX-512" if hardware.lacks_avx512() else "quantize with kv_cache fp8") in str(caught.value)
