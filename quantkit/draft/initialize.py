"""Where a draft starts: a smaller checkpoint of the family, or some of the target's own layers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from quantkit import artifacts, tokens
from quantkit.architecture import layer_prefix
from quantkit.checkpoint import Checkpoint, copy_companions, write_weights
from quantkit.errors import QuantkitError, raise_all
from quantkit.shards import held

Tensors = dict[str, torch.Tensor]


def evenly_spaced(num_layers: int, keep: int) -> list[int]:
    """`keep` of `num_layers` layers, the first and the last among them, the rest evenly between."""
    if keep == 1:
        return [0]
    return [round(index * (num_layers - 1) / (keep - 1)) for index in range(keep)]


def check_family(target: Checkpoint, draft: Checkpoint) -> None:
    """Refuse a draft that vLLM could not pair with the target, or whose proposals would mean other tokens.

    Raises:
        QuantkitError: another vocabulary size, another tokenizer, or a draft no smaller than the target.
    """
    problems = []
    ours, theirs = target.arch.vocab_size, draft.arch.vocab_size
    if ours != theirs:
        problems.append(
            f"the draft {draft.path} has a vocabulary of {theirs} tokens and the target one of {ours}: "
            "vLLM pairs equal sizes only; choose a smaller checkpoint of the target's own family"
        )
    elif _vocabulary(target.path) != _vocabulary(draft.path):
        problems.append(
            f"the draft {draft.path} and the target have different tokenizers: the same ids would mean different "
            "text; choose a smaller checkpoint of the target's own family"
        )
    raise_all(problems)


def _vocabulary(path: Path) -> dict[str, int]:
    vocabulary: dict[str, int] = tokens.load_tokenizer(path).get_vocab()
    return vocabulary


def check_keep_layers(target: Checkpoint, keep: int) -> None:
    """Refuse a draft with as many layers as its target, or more."""
    if keep >= target.arch.num_layers:
        raise QuantkitError(
            f"--keep-layers {keep}: the target has {target.arch.num_layers} layers, a draft needs fewer to be faster"
        )


def from_layers(target: Checkpoint, kept: Sequence[int]) -> tuple[dict[str, Any], Tensors]:
    """A draft's config and dense FP32 tensors from some of the target's layers."""
    weights = target.outer()
    for position, layer in enumerate(kept):
        weights |= {layer_prefix(position) + name: tensor for name, tensor in target.layer(layer).items()}
    config = {key: value for key, value in target.config.items() if key != "quantization_config"}
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = [config["layer_types"][layer] for layer in kept]
    return config | {"num_hidden_layers": len(kept)}, weights


def from_checkpoint(target: Checkpoint, init: Checkpoint) -> tuple[dict[str, Any], Tensors]:
    """A draft's config and dense FP32 tensors from a smaller checkpoint of the target's family."""
    check_family(target, init)
    config = {key: value for key, value in init.config.items() if key != "quantization_config"}
    return config, dict(init.dense_tensors(dtype=torch.float32))


def write_draft(out: Path, config: dict[str, Any], weights: Tensors, companions: Path) -> None:
    """Write a draft as an FP16 checkpoint with the target's tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    layers = config["num_hidden_layers"]
    names = [name for name in weights if not name.startswith("model.layers.")]
    names += [name for layer in range(layers) for name in weights if name.startswith(layer_prefix(layer))]
    write_weights(out, (held(name, weights[name].to(torch.float16)) for name in names))
    copy_companions(companions, out)
    # last: its presence means that the draft is whole
    artifacts.write_json(out / "config.json", config | {"dtype": "float16", "torch_dtype": "float16"})
