"""A head as speculators writes it, with random weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.checkpoint import Checkpoint, open_checkpoint

LAYERS = [2, 4, 5]  # of a target of eight layers


@pytest.fixture(scope="module")
def eight_layers(make_llama, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:  # type: ignore[no-untyped-def]
    """Eight layers, grouped-query attention."""
    return open_checkpoint(make_llama(tmp_path_factory.mktemp("target") / "model", layers=8, heads=2, kv_heads=1))


@pytest.fixture
def config(eight_layers: Checkpoint) -> dict[str, Any]:
    """What speculators 0.9.0 wrote for a target of these sizes, but for what is of no account here."""
    copied = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps",
              "rope_parameters", "max_position_embeddings", "vocab_size")  # fmt: skip
    layer = {key: eight_layers.config[key] for key in copied} | {
        "model_type": "llama", "num_hidden_layers": 1, "head_dim": 32, "sliding_window": 0, "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "layer_types": ["full_attention"],
    }  # fmt: skip
    return {
        "architectures": ["Eagle3DraftModel"], "auto_map": {"": "config.Eagle3SpeculatorConfig"},
        "speculators_model_type": "eagle3", "draft_vocab_size": 300, "eagle_aux_hidden_state_layer_ids": LAYERS,
        "norm_before_fc": True, "fc_norm": False, "target_hidden_size": None, "transformer_layer_config": layer,
    }  # fmt: skip


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """Its tensors; of the target's tokens all but the first twenty."""
    shapes = {
        "fc": (64, 192), "input_norm": (192,), "norm": (64,), "lm_head": (300, 64), "layers.0.hidden_norm": (64,),
        "layers.0.input_layernorm": (64,), "layers.0.post_attention_layernorm": (64,),
        "layers.0.self_attn.q_proj": (64, 128), "layers.0.self_attn.k_proj": (32, 128),
        "layers.0.self_attn.v_proj": (32, 128), "layers.0.self_attn.o_proj": (64, 64),
        "layers.0.mlp.gate_proj": (128, 64), "layers.0.mlp.up_proj": (128, 64), "layers.0.mlp.down_proj": (64, 128),
    }  # fmt: skip
    found = {f"{name}.weight": torch.randn(shape).half() for name, shape in shapes.items()}
    return found | {"d2t": torch.full((300,), 20), "t2d": torch.arange(320) >= 20}
