"""A run with every stage of recipes/quickstart.yaml, on a Llama of four layers: what the tests of this room break."""

import json
from pathlib import Path

import numpy as np
import yaml
from gguf import GGUFWriter
from safetensors.torch import load_file

from tests.conftest import write_text, write_tiny_llama

FOLDERS = {
    "checkpoint": "checkpoint", "quantize": "target", "eval": "report", "train-draft": "draft", "bundle": "bundle",
    "serve": "served",
}  # fmt: skip
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INNER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(checkpoint: Path, out: Path) -> Path:
    """Write a Llama checkpoint of float32 weights as a GGUF file.

    q and k are not permuted, as llama.cpp has them: for random weights it is as good another model.
    """
    config = json.loads((checkpoint / "config.json").read_bytes())
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_bytes())["model"]
    writer = GGUFWriter(out, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    # transformers adds this one, beyond the embedding's rows, where it is missing: it takes the place of the last merge
    words = [*sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)[:-1], "<|endoftext|>"]
    writer.add_token_list(words)
    writer.add_token_types([3] * 4 + [1] * (len(words) - 5) + [3])  # control tokens
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"][:-1]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((checkpoint / "chat_template.jinja").read_text())
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if stem in _OUTER:
            writer.add_tensor(f"{_OUTER[stem]}.weight", tensor.numpy().astype(np.float32))
        else:
            _, _, layer, inside = stem.split(".", 3)
            writer.add_tensor(f"blk.{layer}.{_INNER[inside]}.weight", tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def write_inputs(folder: Path, *, effort: str = "default", layers: int = 4) -> Path:
    """Write model, texts, prompts and recipe; returns the recipe. With effort high vLLM writes calibration text too."""
    write_tiny_llama(folder / "model", layers=layers)
    things = ("harbour", "town", "ship", "library", "sentence", "colour", "thing", "count", "wind", "west")
    prompts = folder / "prompts.jsonl"
    prompts.write_text(
        "".join(f'{{"prompt": "{start} the {thing}?"}}\n' for thing in things for start in ("Name", "What is"))
    )
    recipe = {
        "name": "tiny",
        "model": str(write_gguf(folder / "model", folder / "tiny.gguf")),
        "calibration": {
            "text": [str(write_text(folder / "calibration.txt", words=3000, seed=1))], "samples": 8, "length": 64,
        },
        "quantize": {"effort": effort, "format": "compressed-tensors", "group_size": 32},
        "evaluate": {
            "text": [str(write_text(folder / "held_out.txt", words=3000, seed=2))], "samples": 4, "length": 64,
            "chat": str(prompts), "chat_tokens": 16, "profile": "none",
        },
        "draft": {
            "keep_layers": 1, "prompts": str(prompts), "held_out_prompts": 4, "validation_prompts": 2,
            "answer_tokens": 16, "epochs": 3, "batch_size": 4, "quantize": "fast", "speculative_tokens": 3,
        },
        "serve": {
            "served_model_name": "tiny", "max_model_len": 512, "max_num_seqs": 4, "max_num_batched_tokens": 512,
            "speculate": "always", "speculative_tokens": 3,
        },
    }  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path
