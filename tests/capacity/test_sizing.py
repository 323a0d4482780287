"""KV cache arithmetic against figures that vLLM itself logged, and against hand counts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from quantkit import vllm_environment
from quantkit.capacity import sizing
from quantkit.errors import QuantkitError

SMOLLM2 = {
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
LLAMA2_70B = {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "torch_dtype": "float16",
}


def write_checkpoint(directory: Path, config: dict[str, Any], **tensors: np.ndarray[Any, Any]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors or {"w": np.zeros((3, 5), np.float16)}, directory / "model.safetensors")
    return directory


def test_blocks_as_vllm_logged_them(tmp_path: Path) -> None:
    """vLLM 0.32 on a CPU: 1 GiB, SmolLM2-135M, blocks of 128 -> 46,592 tokens, 22.75 sequences of 2048."""
    target = write_checkpoint(tmp_path / "target", SMOLLM2)
    found = sizing.size(target, kv_cache_bytes=1 << 30, block_size=128, max_model_len=2048)
    assert (found.kv_bytes_per_token, found.num_blocks, found.kv_cache_tokens) == (23040, 364, 46592)
    assert found.concurrency == 22.75
    assert found.fits


def test_llama2_70b_takes_a_gib_and_a_quarter_a_sequence() -> None:
    assert sizing.kv_bytes_per_token(LLAMA2_70B, "auto") * 4096 == 1.25 * 2**30
    assert sizing.kv_bytes_per_token(LLAMA2_70B, "fp8") * 4096 == 0.625 * 2**30
    assert sizing.kv_bytes_per_token(LLAMA2_70B, "auto", 4) * 4096 * 4 == 1.25 * 2**30


def test_heads_are_replicated_beyond_their_number() -> None:
    at_8 = sizing.kv_bytes_per_token(LLAMA2_70B, "auto", 8)
    assert sizing.kv_bytes_per_token(LLAMA2_70B, "auto", 16) == at_8
    multi_head = LLAMA2_70B | {"num_key_value_heads": None}
    assert sizing.kv_bytes_per_token(multi_head, "auto") == 8 * sizing.kv_bytes_per_token(LLAMA2_70B, "auto")


def test_draft_shares_the_blocks_and_the_memory(tmp_path: Path) -> None:
    target = write_checkpoint(tmp_path / "target", SMOLLM2)
    draft = write_checkpoint(tmp_path / "draft", SMOLLM2 | {"num_hidden_layers": 10})
    alone = sizing.size(target, gpu_memory_bytes=4 << 30, reserved_bytes=1 << 30)
    both = sizing.size(target, draft, gpu_memory_bytes=4 << 30, reserved_bytes=1 << 30)
    assert both.kv_bytes_per_token == 40 * 768
    assert both.kv_cache_bytes == alone.kv_cache_bytes - both.draft_weight_bytes == alone.kv_cache_bytes - 30
    assert both.num_blocks < alone.num_blocks


def test_auto_follows_the_checkpoint() -> None:
    assert sizing.kv_dtype(SMOLLM2, "auto") == "bfloat16"
    assert sizing.kv_dtype(SMOLLM2 | {"torch_dtype": "float32"}, "auto") == "float16"
    assert sizing.kv_dtype(SMOLLM2, "auto", "float32") == "float32"
    scheme = {"quantization_config": {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}}
    assert sizing.kv_dtype(SMOLLM2 | scheme, "auto") == "fp8"
    assert sizing.kv_dtype(SMOLLM2 | scheme, "float16") == "float16"


def test_int8_counts_its_scales() -> None:
    assert sizing.kv_bytes_per_token(SMOLLM2, "int8_per_token_head") == 2 * 30 * 3 * (64 + 4)


def test_weights_come_from_the_index(tmp_path: Path) -> None:
    target = write_checkpoint(tmp_path / "target", SMOLLM2, a=np.zeros((4, 4), np.float32), b=np.zeros(6, np.int8))
    assert sizing.weight_bytes(target) == 70
    save_file({"a": np.zeros((4, 4), np.float32)}, target / "consolidated.safetensors")
    index = {"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    assert sizing.weight_bytes(target) == 70
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    with pytest.raises(QuantkitError, match=r"lacks model-2\.safetensors that its index names"):
        sizing.weight_bytes(target)


def test_what_does_not_fit_says_so(tmp_path: Path) -> None:
    target = write_checkpoint(tmp_path / "target", SMOLLM2)
    none_left = sizing.size(target, gpu_memory_bytes=1 << 30, reserved_bytes=2 << 30)
    assert (none_left.kv_cache_bytes, none_left.num_blocks, none_left.fits) == (0, 0, False)
    with pytest.raises(QuantkitError, match=r"9 attention heads do not divide .* 2: use one of \[1, 3, 9\]"):
        sizing.size(target, kv_cache_bytes=1 << 30, tensor_parallel_size=2)
    with pytest.raises(QuantkitError, match="only one of them"):
        sizing.size(target)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    target = write_checkpoint(tmp_path / "target", SMOLLM2)
    whole = (target / "model.safetensors").read_bytes()
    (target / "model.safetensors").write_bytes(whole[:-4])
    with pytest.raises(QuantkitError, match="is truncated or no safetensors file"):
        sizing.weight_bytes(target)
    (target / "config.json").write_text("{")
    with pytest.raises(QuantkitError, match="is not JSON"):
        sizing.read_config(target)


# vLLM's own classes, in a process of its own: bytes of a block of 32 tokens of all layers.
_BLOCK_BYTES = """
import json, sys
from dataclasses import replace
import torch
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec, UniformTypeKVCacheSpecs, get_kv_quant_mode

layers, heads, size, kind, skipped = json.loads(sys.argv[1])

def spec(kind):
    dtype = torch.float16 if kind == "auto" else STR_DTYPE_TO_TORCH_DTYPE[kind]
    return TritonAttentionBackend.customize_spec(FullAttentionSpec(
        block_size=32, num_kv_heads=heads, head_size=size, dtype=dtype, kv_quant_mode=get_kv_quant_mode(kind)))

specs = {f"model.layers.{i}.self_attn.attn": spec("auto" if i in skipped else kind) for i in range(layers)}
whole = UniformTypeKVCacheSpecs.from_specs(specs)
print(whole.page_size_bytes if whole else sum(each.page_size_bytes for each in specs.values()))
"""


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("kind", "skipped"),
    [("float16", ()), ("fp8", ()), ("fp8", (0, 29)), ("fp8_e5m2", ()), ("int8_per_token_head", ()),
     ("int8_per_token_head", (3,)), ("fp8_per_token_head", ())],
)  # fmt: skip
def test_a_block_is_as_large_as_vllm_has_it(kind: str, skipped: tuple[int, ...]) -> None:
    asked = json.dumps([30, 3, 64, "auto" if kind == "float16" else kind, skipped])
    run = subprocess.run(
        [sys.executable, "-P", "-c", _BLOCK_BYTES, asked], env=vllm_environment.process_environment(on_cpu=True),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    ours = sizing.kv_bytes_per_token(SMOLLM2, kind, skip_layers=skipped)
    assert 32 * ours == int(run.stdout.splitlines()[-1])


def test_skipped_layers_keep_sixteen_bits() -> None:
    whole, halved = (sizing.kv_bytes_per_token(SMOLLM2, kind) for kind in ("float16", "fp8"))
    assert sizing.kv_bytes_per_token(SMOLLM2, "fp8", skip_layers=range(30)) == whole
    assert sizing.kv_bytes_per_token(SMOLLM2, "fp8", skip_layers=(2, 2, 99)) == halved + whole // 60
