"""What is a head of this target and what is none: a head as the library writes it, spoilt in one place at a time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quantkit.checkpoint import Checkpoint
from quantkit.engines import head
from quantkit.errors import QuantkitError

Spoil = Callable[[dict[str, Any], dict[str, Tensor]], object]
LAYERS = [2, 4, 5]


def test_what_the_library_writes_is_taken_over_without_its_code(
    config: dict[str, Any], tensors: dict[str, Tensor], eight_layers: Checkpoint, tmp_path: Path
) -> None:
    made, out = tmp_path / "made", tmp_path / "out"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(config))
    (made / "config.py").write_text("raise SystemExit")
    save_file(tensors, made / "model.safetensors")
    head.take_over(made, out, target=eight_layers, layers=LAYERS, name="speculators")
    assert {path.name for path in out.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not (out / "config.py").exists() and "auto_map" not in json.loads((out / "config.json").read_text())


def test_a_head_over_all_tokens_has_no_tables(
    config: dict[str, Any], tensors: dict[str, Tensor], eight_layers: Checkpoint
) -> None:
    config["draft_vocab_size"] = 320
    kept = {name: tensor for name, tensor in tensors.items() if name not in ("d2t", "t2d")}
    kept["lm_head.weight"] = torch.zeros(320, 64).half()
    assert not head.problems(config, kept, target=eight_layers, layers=LAYERS)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda c, t: c.update(eagle_aux_hidden_state_layer_ids=[2, 5]), r"layer_ids is \[2, 5\], not \[2, 4, 5\]"),
        (lambda c, t: c.update(speculators_model_type="dflash"), "speculators_model_type is 'dflash'"),
        (lambda c, t: c["transformer_layer_config"].update(vocab_size=384), "vocab_size is 384, the target's is 320"),
        (lambda c, t: c["transformer_layer_config"].update(num_hidden_layers=2), "2 layers of llama, not one"),
        (lambda c, t: c["transformer_layer_config"].update(rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
         "rotary embeddings are others"),
        (lambda c, t: t.pop("fc.weight"), "fc.weight is missing"),
        (lambda c, t: t.update({"embed_tokens.weight": torch.zeros(320, 64)}), "embed_tokens.weight is no part of a"),
        (lambda c, t: t.update({"norm.weight": torch.zeros(64)}), r"norm.weight is torch.float32 \(64,\), not"),
        (lambda c, t: t["lm_head.weight"].fill_(float("nan")), "lm_head.weight holds NaN"),
        (lambda c, t: t["d2t"].__setitem__(7, 21), "d2t does not name 300 different tokens"),
        (lambda c, t: t["d2t"].__setitem__(299, 21), "d2t does not name 300 different tokens of 320"),
        (lambda c, t: t["t2d"].__setitem__(20, False), "d2t and t2d name different tokens"),
    ],
)  # fmt: skip
def test_anything_else_is_said(
    spoil: Spoil,
    said: str,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    eight_layers: Checkpoint,
    tmp_path: Path,
) -> None:
    spoil(config, tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(QuantkitError, match=said):
        head.take_over(tmp_path, tmp_path / "out", target=eight_layers, layers=LAYERS, name="speculators")
    assert not (tmp_path / "out").exists()


def test_three_places_in_a_target_that_has_them() -> None:
    assert head.layers_read(32) == [2, 16, 29] and head.layers_read(7) == [2, 3, 4]
    with pytest.raises(QuantkitError, match="the target has 6 layers"):
        head.layers_read(6)
