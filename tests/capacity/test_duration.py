"""Hours by stage: operations held against a count of what a stage really multiplies; what more GPUs may change."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from quantkit import tokens
from quantkit.architecture import linear_shapes
from quantkit.capacity import duration, machines, planning, subject, weights
from quantkit.checkpoint import open_checkpoint
from quantkit.evaluate import divergence, windows
from quantkit.progress import silent
from quantkit.quantize import fisher, stream
from quantkit.quantize.layer import Settings

RECIPE = Path(__file__).parents[2] / "recipes" / "llama-2-70b-h100.yaml"


def _plan(gpu: str) -> planning.Plan:
    return subject.plan(RECIPE, gpu=gpu, given={}).plan


def _seconds(plan: planning.Plan, stage: str) -> dict[int, float | None]:
    return {one.gpus: one.seconds for one in plan.durations if one.stage == stage}


def test_a_70b_by_stage_on_more_and_more_gpus() -> None:
    plan = _plan("h100-80gb:8")
    assert [one.stage for one in plan.durations[:4]] == ["quantize", "answers", "draft training", "eval"]
    for stage in ("quantize", "answers", "eval"):
        seconds = [each for each in _seconds(plan, stage).values() if each is not None]
        assert len(seconds) == 4 and seconds == sorted(seconds, reverse=True), stage
        assert seconds[-1] > seconds[0] / 8 * 0.99, "no more than eight times as fast on eight"
    parts = next(one for one in plan.durations if one.stage == "quantize" and one.gpus == 8)
    assert parts.seconds == pytest.approx((parts.shared_s or 0) + parts.everywhere_s + parts.links_s + parts.disk_s)
    assert set(duration.FORMULAS) <= set(plan.formulas)


def test_on_what_it_does_not_fit_a_405b_has_no_answers() -> None:
    model = weights.described("405b", _CONFIG_405B)
    plan = planning.make(model, "h100-80gb", machines.find("h100-80gb"), planning.Question(gpus=8), None)
    assert _seconds(plan, "answers")[1] is None and _seconds(plan, "answers")[8] is not None
    assert weights.elements(model.arch) == pytest.approx(405e9, rel=0.01)


_CONFIG_405B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16384, "intermediate_size": 53248,
    "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
    "hidden_act": "silu", "rope_theta": 500000.0,
}  # fmt: skip


def test_operations_are_those_that_torch_counts(tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    """Of products alone, without attention, which the formula leaves out; factoring is no product for the counter."""
    checkpoint = open_checkpoint(tiny_llama)
    read = tokens.tokenize([str(texts[0])], tokens.load_tokenizer(tiny_llama), samples=16, length=64, seed=0)
    settings = Settings.of(
        effort="default", format="compressed-tensors", bits=4, group_size=32, symmetric=False, act_order=True,
        damping=0.01,
    )  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        stream.quantize_layers(checkpoint, read, settings, folder=tmp_path, device="cpu", report=silent)
    counted = sum(
        flops for name, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(name)
    )  # fmt: skip
    said = duration.quantizing(
        checkpoint.arch, 1024, streams=2, drift=True, curvature=duration.curvature_elements(checkpoint.arch), seen=1024
    )
    # it is above: of rounding it counts every column for every other, and those that are done with are none any more
    assert 0.7 * (said.compute + said.float32) < counted < 1.1 * (said.compute + said.float32)
    with FlopCounterMode(display=False) as counter:
        divergence.beside(
            checkpoint, checkpoint, windows.of_passages(read), device="cpu", folder=tmp_path / "eval", report=silent
        )
    counted = sum(
        flops for name, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(name)
    )  # fmt: skip
    layers = checkpoint.arch.num_layers * sum(
        rows * columns for rows, columns in linear_shapes(checkpoint.arch).values()
    )
    head = checkpoint.arch.vocab_size * checkpoint.arch.hidden_size
    assert 2 * 2 * (layers + head) * 1024 == pytest.approx(counted, rel=0.05)


def test_blocks_of_curvature_are_those_that_are_measured() -> None:
    for rows in (64, 2048, 2049, 5000, 28672):
        sizes = duration.block_sizes(rows)
        parts = torch.arange(rows).tensor_split(len(sizes))
        assert sizes == [len(part) for part in parts] == fisher.block_sizes(rows)
