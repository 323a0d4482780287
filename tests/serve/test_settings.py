"""The two settings files: what is in them, what is left out by name, and what is refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantkit import vllm_environment
from quantkit.errors import QuantkitError
from quantkit.serve import settings as flags
from quantkit.serve.settings import ServeSettings

CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 2048,
}
CT_WITH_KV = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}


def some(**changes: Any) -> ServeSettings:
    values = {"served_model_name": "tiny", "max_model_len": 1024, "max_num_seqs": 8, "num_speculative_tokens": 4}
    return ServeSettings.of(values | changes)


def test_gpu_file_is_what_vllm_expects() -> None:
    text = flags.to_yaml(some(tensor_parallel_size=2), "gpu", sources={"max_model_len": "recipe"})
    loaded = yaml.safe_load(text)
    assert loaded["model"] == "target"
    assert loaded["speculative-config"] == {
        "method": "draft_model",
        "model": "draft",
        "num_speculative_tokens": 4,
        "draft_tensor_parallel_size": 2,
    }
    assert loaded["gpu-memory-utilization"] == 0.92
    assert {"block-size", "quantization", "enforce-eager", "kv-cache-memory-bytes"}.isdisjoint(loaded)
    assert not [key for key in loaded if "_" in key]
    assert "max-model-len: 1024" in text
    assert next(line for line in text.splitlines() if line.startswith("max-model-len")).endswith("# recipe")
    assert next(line for line in text.splitlines() if line.startswith("seed")).endswith("# default")


def test_cpu_file_names_what_it_leaves_out() -> None:
    settings = some(tensor_parallel_size=2, kv_cache_dtype="int8_per_token_head", gpu_memory_utilization=0.8)
    text = flags.to_yaml(settings, "cpu", sources={})
    loaded = yaml.safe_load(text)
    assert loaded["enforce-eager"] is True
    assert loaded["kv-cache-dtype"] == "auto"
    assert loaded["kv-cache-memory-bytes"] == 1 << 30
    assert loaded["block-size"] == 32
    assert loaded["override-generation-config"] == {"temperature": 0}
    assert "draft_tensor_parallel_size" not in loaded["speculative-config"]
    gpu = yaml.safe_load(flags.to_yaml(settings, "gpu", sources={}))
    left_out = text[text.index("# Left out") :]
    for key in gpu.keys() - loaded.keys():
        assert f"# - {key} " in left_out
    for words in ("gpu-memory-utilization 0.8", "tensor-parallel-size 2", "kv-cache-dtype int8", "temperature above 0"):
        assert words in left_out


def test_the_cpu_may_have_its_own_dtype() -> None:
    settings = some(dtype="float16", cpu_dtype="bfloat16")
    text = flags.to_yaml(settings, "cpu", sources={"cpu_dtype": "recipe"})
    assert yaml.safe_load(text)["dtype"] == "bfloat16"
    assert "# - dtype float16: bfloat16 here" in text
    assert yaml.safe_load(flags.to_yaml(settings, "gpu", sources={}))["dtype"] == "float16"
    quantized = CONFIG | {"quantization_config": {"quant_method": "awq"}}
    assert "float32" in flags.problems(some(cpu_dtype="float32"), quantized, CONFIG)[0]


def test_without_a_draft_nothing_speaks_of_one() -> None:
    settings = some(num_speculative_tokens=None)
    for profile in flags.CONFIG_FILES:
        text = flags.to_yaml(settings, profile, sources={})
        assert "speculative" not in text
        assert "temperature" not in text


def test_names_survive_yaml() -> None:
    for name in ("no", "1.0", "2024-01-01", 'a "quoted" # name', "null"):
        text = flags.to_yaml(some(served_model_name=name), "gpu", sources={})
        assert yaml.safe_load(text)["served-model-name"] == name


def test_prefix_caching_can_be_switched_off() -> None:
    text = flags.to_yaml(some(enable_prefix_caching=False), "gpu", sources={})
    written = yaml.safe_load(text)
    assert written["no-enable-prefix-caching"] is True and "enable-prefix-caching" not in written


_AS_VLLM_SERVE = """
import sys
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
ServeSubcommand().subparser_init(parser.add_subparsers())
for file in sys.argv[1:]:
    print(parser.parse_args(["serve", "--config", file]).enable_prefix_caching)
"""


@pytest.mark.vllm
def test_vllm_serve_sees_what_is_switched_off(tmp_path: Path) -> None:
    files = []
    for on in (True, False):
        files.append(tmp_path / f"{on}.yaml")
        files[-1].write_text(flags.to_yaml(some(enable_prefix_caching=on), "gpu", sources={}))
    run = subprocess.run(
        [sys.executable, "-c", _AS_VLLM_SERVE, *map(str, files)], capture_output=True, text=True, timeout=300,
        env=vllm_environment.process_environment(on_cpu=True), check=True,
    )  # fmt: skip
    assert run.stdout.split()[-2:] == ["True", "False"]


@pytest.mark.parametrize(
    ("changes", "target", "draft", "said"),
    [
        ({"max_num_seqs": 2048}, {}, {}, "raise it to 10240"),
        ({"num_speculative_tokens": None}, {}, {}, "num_speculative_tokens is missing"),
        ({}, {}, None, "without a draft"),
        ({}, {}, {"vocab_size": 384}, r"target \(320\) and draft \(384\) differ"),
        ({"max_model_len": 4096}, {}, {}, "exceeds the 2048 positions"),
        ({"tensor_parallel_size": 3}, {}, {}, r"target: 8 attention heads do not divide by tensor_parallel_size 3"),
        ({"tensor_parallel_size": 8}, {}, {"num_attention_heads": 4}, "draft: 4 attention heads"),
        ({"dtype": "float32"}, {"quantization_config": {"quant_method": "awq"}}, {}, "kernels of the target"),
        ({"dtype": "float32"}, {}, {"quantization_config": {"quant_method": "gptq"}}, "kernels of the draft"),
        ({"kv_cache_dtype": "fp8_e5m2"}, {"quantization_config": CT_WITH_KV}, {}, "e4m3 scales"),
    ],
)
def test_what_cannot_work_is_refused(
    changes: dict[str, Any], target: dict[str, Any], draft: dict[str, Any] | None, said: str
) -> None:
    pair = CONFIG | target, None if draft is None else CONFIG | draft
    found = flags.problems(some(**changes), *pair)
    with pytest.raises(QuantkitError, match=said):
        raise QuantkitError("\n".join(found))


def test_a_good_pair_has_no_problem() -> None:
    assert flags.problems(some(), CONFIG, CONFIG) == []
    assert flags.problems(some(num_speculative_tokens=None), CONFIG, None) == []
    assert flags.warnings(some(), CONFIG, CONFIG) == []


def test_uncalibrated_fp8_is_said() -> None:
    awq = CONFIG | {"quantization_config": {"quant_method": "awq"}}
    assert "scales of 1.0: a checkpoint in awq format" in flags.warnings(some(kv_cache_dtype="fp8"), awq)[0]
    calibrated = CONFIG | {"quantization_config": CT_WITH_KV}
    assert flags.warnings(some(kv_cache_dtype="fp8"), calibrated) == []
    assert "carries no scales" in flags.warnings(some(), calibrated, CONFIG)[0]
    assert "overrides" in flags.warnings(some(kv_cache_dtype="float16"), calibrated)[0]
    assert "open to the network" in flags.warnings(some(host="0.0.0.0"), CONFIG)[0]


def test_wrong_values_are_all_named() -> None:
    with pytest.raises(QuantkitError) as caught:
        some(max_num_seqs=0, kv_cache_dtype="nvfp4", block_size=16, quantization="awq")
    for word in ("max_num_seqs = 0", "kv_cache_dtype = 'nvfp4'", "block_size = 16", "quantization = 'awq'"):
        assert word in str(caught.value)
