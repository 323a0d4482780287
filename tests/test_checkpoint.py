"""Opening a checkpoint: every kind of bad input is one line with a remedy, and all are named at once."""

import json
import shutil
from collections.abc import Callable
from itertools import starmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.checkpoint import INDEX_NAME, SINGLE_NAME, check_finite, open_checkpoint, write_weights
from quantkit.errors import QuantkitError
from quantkit.shards import held

Damage = Callable[[Path], None]


@pytest.fixture
def sharded(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint in several shards."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_llama, copy)
    tensors = load_file(copy / SINGLE_NAME)
    (copy / SINGLE_NAME).unlink()
    write_weights(copy, starmap(held, tensors.items()), shard_bytes=100_000)
    assert len(list(copy.glob("*.safetensors"))) > 2
    return copy


def _edit_config(**changes: object) -> Damage:
    def damage(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))

    return damage


def _first_shard(path: Path) -> Path:
    return min(path.glob("*.safetensors"))


def _edit_tensor(path: Path, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(_first_shard(path))
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name] = edit(tensors[name]).contiguous()
    save_file(tensors, _first_shard(path))


def _truncate(path: Path) -> None:
    shard = _first_shard(path)
    shard.write_bytes(shard.read_bytes()[:-1000])


def _escape(path: Path) -> None:
    index = json.loads((path / INDEX_NAME).read_text())
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    (path / INDEX_NAME).write_text(json.dumps(index))


_DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing shard": (lambda path: _first_shard(path).unlink(), "is missing, though"),
    "truncated shard": (_truncate, "is truncated or no safetensors file"),
    "not safetensors": (lambda path: _first_shard(path).write_text("version https"), "no safetensors file"),
    "wrong shape": (lambda path: _edit_tensor(path, lambda tensor: tensor[:-1]), "config.json asks for"),
    "integer weights": (lambda path: _edit_tensor(path, lambda tensor: tensor.to(torch.int8)), "only F16, BF16"),
    "other architecture": (_edit_config(model_type="gpt2", architectures=["GPT2LMHeadModel"]), "is not supported"),
    "already quantized": (_edit_config(quantization_config={"quant_method": "awq"}), "already quantized (awq)"),
    "no such size": (_edit_config(num_hidden_layers="two"), "must be a positive whole number"),
    "config is no JSON": (lambda path: (path / "config.json").write_text("{"), "is not JSON"),
    "no config": (lambda path: (path / "config.json").unlink(), "has no config.json"),
    "index is no JSON": (lambda path: (path / INDEX_NAME).write_text("[]"), "no readable weight_map"),
    "shard outside": (_escape, "is no name of a file"),
}


@pytest.mark.parametrize("name", _DAMAGES)
def test_damage_is_named_with_a_remedy(name: str, sharded: Path) -> None:
    damage, expected = _DAMAGES[name]
    damage(sharded)
    with pytest.raises(QuantkitError, match="(?s)" + expected.replace("(", r"\(").replace(")", r"\)")) as caught:
        open_checkpoint(sharded, quantized=False)
    assert ":" in str(caught.value)


def test_the_undamaged_copy_opens(sharded: Path, tiny_llama: Path) -> None:
    opened, whole = open_checkpoint(sharded, quantized=False), open_checkpoint(tiny_llama)
    for name, tensor in whole.layer(1).items():
        assert torch.equal(opened.layer(1)[name], tensor)
    check_finite(opened)


def test_all_problems_are_named_at_once(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    shards[0].unlink()
    shards[1].write_text("broken")
    with pytest.raises(QuantkitError) as caught:
        open_checkpoint(sharded)
    assert str(caught.value).startswith("2 problems") and shards[0].name in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_found(bad: float, sharded: Path) -> None:
    def poison(tensor: torch.Tensor) -> torch.Tensor:
        tensor[1, 2] = bad
        return tensor

    _edit_tensor(sharded, poison)
    opened = open_checkpoint(sharded)
    with pytest.raises(QuantkitError, match="holds 1 NaN or Inf values"):
        check_finite(opened)


def test_large_finite_weights_are_no_infinity(tmp_path: Path, sharded: Path) -> None:
    _edit_tensor(sharded, lambda tensor: torch.full_like(tensor, 3e38))
    check_finite(open_checkpoint(sharded))


def test_pickled_weights_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_llama, copy)
    (copy / SINGLE_NAME).rename(copy / "pytorch_model.bin")
    with pytest.raises(QuantkitError, match="only pickled weights"):
        open_checkpoint(copy)
