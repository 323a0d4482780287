"""The bundle on disk: what is in it, what is refused before anything is written, what a check finds afterwards."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file, save_file

from quantkit import artifacts, vllm_environment
from quantkit.errors import QuantkitError
from quantkit.serve import bundle as bundles
from quantkit.serve import check
from quantkit.serve.settings import ServeSettings
from quantkit.serve.verdict import Check

MakeLlama = Callable[..., Path]

SETTINGS = ServeSettings(
    served_model_name="tiny", max_model_len=1024, max_num_seqs=4, max_num_batched_tokens=1024, num_speculative_tokens=3
)
WITHOUT_DRAFT = SETTINGS.model_copy(update={"num_speculative_tokens": None})


def build(
    out: Path, target: Path, draft: Path | None, report: Path | None = None, settings: ServeSettings = SETTINGS
) -> dict[str, Any]:
    """A bundle as the pipeline makes it; returns the results of its manifest."""
    with artifacts.making(out, "bundle", inputs={}, settings=settings.model_dump(), replace=True) as work:
        bundles.build(work, target=target, draft=draft, report=report, settings=settings, sources={"seed": "recipe"})
        return work.results


def edit_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON file. Writes a new file: the old one may be a hard link into another folder."""
    text = json.dumps(json.loads(path.read_bytes()) | changes, indent=2)
    path.unlink()
    path.write_text(text)


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    """A checkpoint that the test may spoil."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


@pytest.fixture
def made(tiny_llama: Path, tmp_path: Path) -> Path:
    """A bundle that the test may spoil."""
    build(tmp_path / "bundle", tiny_llama, tiny_llama)
    return tmp_path / "bundle"


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks without the half-minute import of vLLM."""
    monkeypatch.setattr(vllm_environment, "distribution", lambda: None)


def failed(found: list[Check]) -> dict[str, str]:
    return {one.name: one.detail for one in found if not one.passed and not one.detail.startswith("not run")}


def test_everything_is_in_it(made: Path, tiny_llama: Path) -> None:
    names = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()}
    assert names == {
        "README.md", "SHA256SUMS", "bundle.json", "quantkit.json", "vllm/serve.yaml", "vllm/serve.cpu.yaml",
        *(f"k8s/{name}.yaml" for name in (
            "base/kustomization", "base/deployment", "base/service", "base/network-policy", "base/disruption-budget",
            "base/volume-claim", "autoscaling/kustomization", "autoscaling/scaled-object",
            "autoscaling/service-monitor", "kserve/kustomization", "kserve/llm-inference-service",
            "site.example/kustomization",
        )),
        "ray/serve.yaml", "ray/serve.most-free-kv.yaml", "ray/most_free_kv.py",
        "provenance/model-card.md", "provenance/bom.cdx.json", "provenance/slsa.intoto.json",
        "compose.yaml", "compose/deploy.env.example", "compose/nginx.conf", "compose/start_vllm.py",
        "compose/start_router.py", "compose/grafana/datasources/prometheus.yaml",
        "compose/grafana/dashboards/bundle.yaml", "observability/prometheus.yml", "observability/rules.yml",
        "observability/rules_test.yml", "observability/dashboard.json", "smoke/smoke.py", "load/load.sh",
        "load/prompts.jsonl",
        *(f"{role}/{name}" for role in ("target", "draft") for name in (
            "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
            "chat_template.jinja",
        )),
    }  # fmt: skip
    assert (made / "target/model.safetensors").samefile(tiny_llama / "model.safetensors")
    record = json.loads((made / "bundle.json").read_text())
    assert record["pin"]["target"] == artifacts.digest(tiny_llama)
    assert record["sources"]["seed"] == "recipe"
    assert record["settings"]["num_speculative_tokens"] == 3
    assert record["kv_cache"]["bytes_per_token"] == {"target": 512, "draft": 512}


def test_sums_are_those_of_sha256sum(made: Path) -> None:
    assert subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=made).returncode == 0
    listed = [line.split("  ")[1] for line in (made / "SHA256SUMS").read_text().splitlines()]
    assert listed == sorted(listed)


def test_same_inputs_same_bytes(made: Path, tiny_llama: Path, tmp_path: Path) -> None:
    build(tmp_path / "again", tiny_llama, tiny_llama)
    assert (tmp_path / "again" / "SHA256SUMS").read_bytes() == (made / "SHA256SUMS").read_bytes()


def test_readme_holds_the_commands_and_no_place(made: Path, tiny_llama: Path) -> None:
    text = (made / "README.md").read_text()
    assert "vllm serve --config vllm/serve.yaml" in text
    assert "/v1/chat/completions" in text
    for path in (made / "README.md", made / "bundle.json", made / "vllm/serve.yaml", made / "vllm/serve.cpu.yaml"):
        assert str(made.parent) not in path.read_text()
        assert str(tiny_llama) not in path.read_text()


def test_results_of_the_stages_are_carried(tiny_llama: Path, copy: Path, tmp_path: Path) -> None:
    def stage(name: str, kind: artifacts.Kind, inputs: dict[str, str], results: dict[str, Any], source: Path) -> Path:
        out = tmp_path / name
        with artifacts.making(out, kind, inputs=inputs, settings={}) as work:
            shutil.copytree(source, out, dirs_exist_ok=True)
            work.results.update(results)
        return out

    counted = {
        t: {"vllm": {"acceptance_rate": r, "per_position": [0.875, 0.5, r]}} for t, r in (("0", 0.5), ("1", 0.125))
    }
    pages = tmp_path / "pages"
    pages.mkdir()
    (pages / "report.html").write_text("<p>drift</p>")
    target = stage("target", "quantized", {"checkpoint": "0" * 64}, {"method": "gptq"}, tiny_llama)
    draft = stage("draft", "draft", {"target": "another"}, {"acceptance": {"after": counted}}, copy)
    report = stage("report", "report", {}, {"perplexity_drift": 0.0041}, pages)
    results = build(tmp_path / "bundle", target, draft, report)
    assert results["measured"]["draft"]["acceptance"]["after"] == counted
    readme = (tmp_path / "bundle" / "README.md").read_text()
    assert "| acceptance.after.0.vllm.acceptance_rate | 0.5 |" in readme
    rules = (tmp_path / "bundle" / "observability" / "rules.yml").read_text()
    assert "3 tokens a draft, by vLLM on held-out prompts at temperature 1: acceptance rate 0.5,\n" in rules
    assert "accepted length 2.5. " in rules and "expr: quantkit:acceptance_rate < 0.4\n" in rules
    assert "| perplexity_drift | 0.0041 |" in readme
    assert "trained for another target" in readme
    assert (tmp_path / "bundle" / "report" / "report.html").read_text() == "<p>drift</p>"
    assert not list((tmp_path / "bundle").rglob("*/quantkit.json"))
    assert json.loads((tmp_path / "bundle" / "bundle.json").read_text())["inputs"]["target"]["checkpoint"] == "0" * 64


def test_a_head_is_served_as_one(tiny_llama: Path, copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_bytes())
    (copy / "config.json").write_text(
        json.dumps({"speculators_model_type": "eagle3", "transformer_layer_config": config | {"num_hidden_layers": 1}})
    )
    out = tmp_path / "bundle"
    build(out, tiny_llama, copy)
    for file in ("vllm/serve.yaml", "vllm/serve.cpu.yaml"):
        assert yaml.safe_load((out / file).read_text())["speculative-config"]["method"] == "eagle3"
    record = bundles.read_bundle(out)
    assert record["kv_cache"]["bytes_per_token"] == {"target": 512, "draft": 256}  # two layers, and one
    assert record["settings"]["speculative_method"] == "eagle3" and "an EAGLE-3 head" in (out / "README.md").read_text()
    found = {one.name: one for one in check.check(out, ask_vllm=False)}
    assert all(one.passed for one in found.values()), found

    flags = out / "vllm" / "serve.yaml"
    flags.write_text(flags.read_text().replace('method: "eagle3"', 'method: "draft_model"'))
    found = {one.name: one for one in check.check(out, ask_vllm=False)}
    assert "method draft_model, but the draft is of the kind eagle3" in found["settings files"].detail


@pytest.mark.usefixtures("no_vllm")
def test_without_a_draft(tiny_llama: Path, tmp_path: Path) -> None:
    build(tmp_path / "bundle", tiny_llama, None, settings=WITHOUT_DRAFT)
    assert "draft/" not in (tmp_path / "bundle" / "README.md").read_text()
    assert failed(check.check(tmp_path / "bundle")) == {}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "state.pkl", "modeling_tiny.py"])
def test_code_is_refused(copy: Path, tmp_path: Path, name: str) -> None:
    (copy / name).write_bytes(b"")
    with pytest.raises(QuantkitError, match=f"target {name} can run code"):
        build(tmp_path / "bundle", copy, None, settings=WITHOUT_DRAFT)
    assert not (tmp_path / "bundle" / "target").exists()


def test_all_problems_are_said_at_once(copy: Path, tmp_path: Path) -> None:
    draft = Path(shutil.copytree(copy, tmp_path / "draft"))
    edit_json(copy / "config.json", auto_map={"AutoConfig": "modeling.Tiny"})
    (draft / "elsewhere.json").symlink_to(tmp_path / "outside.json")
    edit_json(draft / "config.json", vocab_size=384)
    tokenizer = json.loads((draft / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    edit_json(draft / "tokenizer.json", **tokenizer)
    edit_json(copy / "generation_config.json", min_p=0.1)
    with pytest.raises(QuantkitError) as caught:
        build(tmp_path / "bundle", copy, draft)
    for words in ("config.json has auto_map", "draft elsewhere.json is a link out of", "(320) and draft (384)",
                  "give 2 tokens different ids ('a', 'b', ...)", "min_p", "5 problems"):  # fmt: skip
        assert words in str(caught.value)


def test_tokenizers_may_differ_in_bytes_but_not_in_ids(tiny_llama: Path, copy: Path) -> None:
    truncation = {"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0}
    edit_json(copy / "tokenizer.json", truncation=truncation)
    assert (copy / "tokenizer.json").read_bytes() != (tiny_llama / "tokenizer.json").read_bytes()
    assert bundles.tokenizer_problems(tiny_llama, copy) == []


def test_promised_kv_scales_must_be_there(copy: Path, tmp_path: Path) -> None:
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    edit_json(
        copy / "config.json", quantization_config={"quant_method": "compressed-tensors", "kv_cache_scheme": scheme}
    )
    with pytest.raises(QuantkitError, match=r"4 scales are missing \(model\.layers\.0\.self_attn\.k_scale"):
        build(tmp_path / "bundle", copy, None, settings=WITHOUT_DRAFT)
    tensors = load_file(copy / "model.safetensors")
    one = next(iter(tensors.values())).reshape(-1)[:1].copy()
    scales = {f"model.layers.{n}.self_attn.{kind}_scale": one for n in (0, 1) for kind in "kv"}
    (copy / "model.safetensors").unlink()
    save_file(tensors | scales, copy / "model.safetensors")
    build(tmp_path / "bundle", copy, None, settings=WITHOUT_DRAFT)


def test_links_inside_a_checkpoint_are_followed(copy: Path, tmp_path: Path) -> None:
    (copy / "blobs").mkdir()
    (copy / "model.safetensors").rename(copy / "blobs" / "weights")
    (copy / "model.safetensors").symlink_to("blobs/weights")
    build(tmp_path / "bundle", copy, None, settings=WITHOUT_DRAFT)
    carried = tmp_path / "bundle" / "target" / "model.safetensors"
    assert not carried.is_symlink()
    assert carried.samefile(copy / "blobs" / "weights")
    assert json.loads((tmp_path / "bundle" / "bundle.json").read_text())["left_out"] == {"target": ["blobs/weights"]}


def test_folders_above_cannot_mislead_vllm(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "my-EAGLE3-project" / "bundle"
    build(out, tiny_llama, tiny_llama)
    for file in ("vllm/serve.yaml", "vllm/serve.cpu.yaml"):
        assert yaml.safe_load((out / file).read_text())["speculative-config"]["model"] == "draft"


@pytest.mark.usefixtures("no_vllm")
def test_a_good_bundle_passes_but_what_was_not_run_does_not(made: Path) -> None:
    found = check.check(made)
    assert failed(found) == {}
    unasked = [one for one in found if one.detail.startswith("not run: install quantkit[cpu]")]
    assert [one.passed for one in unasked] == [False, False]


@pytest.mark.usefixtures("no_vllm")
def test_a_moved_bundle_passes(made: Path, tmp_path: Path) -> None:
    assert failed(check.check(made.rename(tmp_path / "elsewhere"))) == {}


@pytest.mark.usefixtures("no_vllm")
def test_a_check_finds_what_was_spoilt(made: Path) -> None:
    edit_json(made / "target" / "config.json", quantization_config={"quant_method": "awq"})
    (made / "draft" / "generation_config.json").unlink()
    (made / "vllm" / "extra.yaml").write_text("")
    gpu = made / "vllm" / "serve.yaml"
    text = (
        gpu.read_text()
        .replace('model: "draft"', 'model: "/srv/eagle3/draft"')
        .replace("enable-prefix", "enable_prefix")
    )
    gpu.unlink()
    gpu.write_text(text)
    found = failed(check.check(made))
    assert found["SHA256SUMS"] == (
        "draft/generation_config.json is missing; vllm/extra.yaml is not listed; target/config.json has changed; "
        "vllm/serve.yaml has changed"
    )
    assert "quantization_config differs" in found["bundle.json agrees with the checkpoints"]
    for words in ("must be a folder inside", "'eagle3'", "enable_prefix-caching is dropped"):
        assert words in found["settings files"]


@pytest.mark.usefixtures("no_vllm")
def test_a_missing_draft_is_found(made: Path) -> None:
    shutil.rmtree(made / "draft")
    found = failed(check.check(made))
    assert found["draft safe and complete"] == "bundle.json names a draft and there is none"
    assert "speculative-config without the folder draft" in found["settings files"]


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(QuantkitError, match=r"holds no bundle\.json"):
        check.check(tmp_path)
