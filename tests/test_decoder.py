"""The layer's forward pass against transformers, for each family of the table."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit import decoder
from quantkit.architecture import all_shapes, layer_prefix, read_architecture

_SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("llama", {"rope_parameters": _LLAMA3_ROPE}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}


@pytest.mark.parametrize("case", _CASES)
def test_logits_equal_those_of_transformers(case: str) -> None:
    model_type, extra = _CASES[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **_SIZES, **extra), dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    arch, problems = read_architecture(config)
    assert arch is not None and problems == []
    weights = {name: tensor for name, tensor in model.state_dict().items() if name in all_shapes(arch)}
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == all_shapes(arch)
    input_ids = torch.randint(96, (2, 40))
    with torch.no_grad():
        expected = model(input_ids).logits
        hidden = weights["model.embed_tokens.weight"][input_ids]
        rotary = decoder.rotation(config, 40, dtype=torch.float32, device="cpu")
        for index in range(arch.num_layers):
            prefix = layer_prefix(index)
            inside = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
            hidden = decoder.layer(inside, arch, hidden, rotary)
        torch.testing.assert_close(decoder.head(weights, arch, hidden), expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_weights_leave_the_residual_stream_in_float32() -> None:
    config = AutoConfig.for_model("llama", **_SIZES).to_dict()
    arch, _ = read_architecture(config | {"architectures": ["LlamaForCausalLM"]})
    assert arch is not None
    from quantkit.architecture import layer_shapes

    weights = {name: torch.randn(shape).bfloat16() for name, shape in layer_shapes(arch).items()}
    rotary = decoder.rotation(config, 8, dtype=torch.bfloat16, device="cpu")
    assert decoder.layer(weights, arch, torch.randn(1, 8, 32), rotary).dtype == torch.float32


def test_an_unknown_family_is_named_with_what_is_supported() -> None:
    arch, problems = read_architecture({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    assert arch is None
    assert "gpt2" in problems[0] and "LlamaForCausalLM" in problems[0]


def test_sliding_window_is_refused() -> None:
    config = AutoConfig.for_model("mistral", **_SIZES).to_dict() | {"sliding_window": 16}
    arch, problems = read_architecture(config | {"architectures": ["MistralForCausalLM"]})
    assert arch is None and "sliding_window 16" in problems[0]
