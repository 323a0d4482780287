"""Real engines in their real environments, made on demand: what they write is taken, evaluated and served."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from quantkit import artifacts, offline, tokens
from quantkit.checkpoint import open_checkpoint
from quantkit.cli import main
from quantkit.draft.train import build_model
from quantkit.engines import registry

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(3600)]


def test_llm_compressor_from_nothing_to_vllm(
    make_llama, texts: tuple[Path, Path], tmp_path: Path  # type: ignore[no-untyped-def]
) -> None:  # fmt: skip
    model = make_llama(tmp_path / "model", initializer_range=0.12, dtype=torch.float16)
    out = tmp_path / "out"
    words = [
        "quantize", model, "--out", out, "--calibration", texts[0], "--samples", 4, "--length", 64, "--group-size", 32,
        "--engine", "llmcompressor", "--method", "gptq",
    ]  # fmt: skip
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.stderr
    manifest = artifacts.read_manifest(out)
    assert manifest is not None and manifest.results["engine"]["name"] == "llmcompressor"
    ids = tokens.tokenize([str(texts[1])], tokens.load_tokenizer(model), samples=4, length=64, seed=0).input_ids_ST
    with offline.Session() as session:
        job = offline.windows_job(out, ids.tolist(), dtype="float16", kv_cache_bytes=64 << 20)
        served = torch.tensor([result.prompt_logprobs for result in session.run(job, tmp_path / "vllm")[0]])
    expected, original = (_logprobs(path, ids) for path in (out, model))
    assert (served - expected).abs().mean() < 0.01
    assert (served - original).abs().mean() > 0.02, "the test must be able to tell the two apart"


def test_speculators_from_nothing_to_a_head_that_vllm_serves(
    make_llama, texts: tuple[Path, Path], tmp_path: Path  # type: ignore[no-untyped-def]
) -> None:  # fmt: skip
    """A 4-bit target whose next token hangs on the one before alone: a head learns that, and vLLM accepts it."""
    model = make_llama(tmp_path / "model", layers=8, initializer_range=0.15, dtype=torch.float16)
    weights = load_file(model / "model.safetensors")
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] *= 0.02
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    target, out, prompts = tmp_path / "target", tmp_path / "head", tmp_path / "prompts.jsonl"
    words = texts[0].read_text().split()
    asked = [" ".join(words[begin : begin + 5 + begin % 4]) for begin in range(0, 48 * 9, 9)]
    prompts.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in asked))
    for command in (
        ["quantize", model, "--out", target, "--effort", "fast", "--group-size", 32, "--samples", 4, "--length", 64,
         "--calibration", texts[0]],
        ["train-draft", target, "--out", out, "--kind", "eagle3", "--prompts", prompts, "--held-out-prompts", 8,
         "--validation-prompts", 2, "--answer-tokens", 24, "--temperature", 0, "--epochs", 20, "--learning-rate", 5e-3],
    ):  # fmt: skip
        done = CliRunner().invoke(main, [str(word) for word in command])
        assert done.exit_code == 0, done.stderr
    manifest = artifacts.read_manifest(out)
    assert manifest is not None
    found = manifest.results
    assert found["engine"]["version"] == registry.EVERY["speculators"].version
    assert found["epoch_losses"][-1] < 0.7 * found["epoch_losses"][0]
    assert found["acceptance"]["after"]["0"]["vllm"]["per_position"][0] > 0.15  # untrained: nothing of 320 tokens


def _logprobs(path: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = build_model(open_checkpoint(path), dtype=torch.float32)(ids).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]  # type: ignore[no-any-return]
