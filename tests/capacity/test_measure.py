"""This machine's processor as one more GPU: what it measures, and whether vLLM's steps take as long as is estimated."""

import statistics
from pathlib import Path

import pytest

from quantkit import hardware, vllm_environment
from quantkit.architecture import all_shapes
from quantkit.capacity import latency, measure, sizing, weights
from quantkit.capacity.machines import Gpu
from quantkit.capacity.weights import Model
from quantkit.offline import Session, Timing

# 65M weights: enough for their products to be most of a step, and few enough to be written.
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 20, "hidden_size": 512,
    "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4096,
    "max_position_embeddings": 1024, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "torch_dtype": "float16",
}  # fmt: skip


def test_more_rows_are_never_slower_by_the_token() -> None:
    found = measure.processor(weights.described("small", CONFIG).arch, dtype="float32", threads=1)
    seen = found.measured
    assert seen is not None and seen.inputs == [512, 1536] and seen.threads == 1
    rates = seen.products["float32"]
    assert rates[64] > rates[1] > 0, "float32 is multiplied in hardware everywhere: rows share the reading of weights"
    assert all(value > 0 for value in seen.layer_us.values())
    assert seen.fp8_cache != hardware.lacks_avx512()
    assert found == Gpu.model_validate(found.model_dump(mode="json")), "it is kept in a file and read again"


def _step_s(model: Model, gpu: Gpu, dtype: str, sequences: int) -> float:
    cache = sizing.kv_bytes_per_token(model.config, dtype)
    read = weights.reads(weights.as_stored(model), model, gpu.roof(), cache_bytes=cache, dtype=dtype)
    return latency.point(read, gpu.roof(), None, sequences=sequences, context_tokens=36).itl_s


@pytest.mark.vllm
def test_vllm_steps_take_as_long_as_is_estimated(tmp_path: Path) -> None:
    """Within 30 %, one and eight sequences at once, in the CPU profile's type; measured and estimated in turn."""
    import json

    import torch
    from safetensors.torch import save_file

    model_dir = tmp_path / "model"
    model_dir.mkdir()
    (model_dir / "config.json").write_text(json.dumps(CONFIG))
    model = weights.open_model(model_dir)
    tensors = {name: (torch.randn(shape) * 0.02).half() for name, shape in all_shapes(model.arch).items()}
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
    model = weights.open_model(model_dir)
    threads = int(vllm_environment.one_process(on_cpu=True)["OMP_NUM_THREADS"])
    prompts = [[(7919 * row + 31 * place) % 4096 for place in range(32)] for row in range(8)]
    seen: dict[int, list[float]] = {1: [], 8: []}
    machines = [measure.processor(model.arch, threads=threads)]
    ratios: dict[int, float] = {}
    with Session() as session:
        # three rounds are enough on a machine that does nothing else; where others compute, medians take more to settle
        for round_ in range(9):
            timing = Timing(
                model=str(model_dir), dtype="bfloat16", prompts=prompts, batches=[1, 8], steps=8, max_model_len=256,
                max_num_seqs=8, kv_cache_bytes=64 << 20, seed=round_,
            )  # fmt: skip
            for sequences, steps in zip(seen, session.time(timing, tmp_path / str(round_)).steps, strict=True):
                seen[sequences] += steps
            machines.append(measure.processor(model.arch, threads=threads))
            for sequences, steps in seen.items():
                estimated = statistics.median(_step_s(model, gpu, "bfloat16", sequences) for gpu in machines)
                ratios[sequences] = estimated / statistics.median(steps)
            if round_ >= 2 and all(0.7 < ratio < 1.3 for ratio in ratios.values()):
                return
    pytest.fail(f"estimated / measured by number of sequences: {ratios}")
