"""Where a draft starts: a smaller checkpoint of the family, or some of the target's own layers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from quantkit import artifacts, decoder, tokens
from quantkit.architecture import layer_prefix
from quantkit.checkpoint import Checkpoint, copy_companions, write_weights
from quantkit.errors import QuantkitError, raise_all
from quantkit.hardware import compute_dtype
from quantkit.progress import Report
from quantkit.shards import held

Tensors = dict[str, torch.Tensor]


def evenly_spaced(num_layers: int, keep: int) -> list[int]:
    """`keep` of `num_layers` layers, the first and the last among them, the rest evenly between."""
    if keep == 1:
        return [0]
    return [round(index * (num_layers - 1) / (keep - 1)) for index in range(keep)]


def most_influential(
    target: Checkpoint, texts: Sequence[list[int]], keep: int, *, device: str, report: Report
) -> list[int]:
    """The first layer and the `keep` - 1 others that turn the residual stream most, in their order.

    A layer's influence is 1 - cos(what goes in, what comes out), the mean over the texts' tokens (ShortGPT, arXiv
    2403.03853, equation 1). The first layer makes states of embeddings and is never left out.
    """
    arch = target.arch
    width = max(map(len, texts))
    known_BT = torch.tensor([[True] * len(text) + [False] * (width - len(text)) for text in texts])
    ids_BT = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    compute = compute_dtype(device)
    rotary = decoder.rotation(target.config, width, dtype=compute, device=device)
    hidden_BTC = target.outer()["model.embed_tokens.weight"][ids_BT].to(device)
    influence = []
    with torch.no_grad():
        for index in range(arch.num_layers):
            report("weighing the target's layers", index, arch.num_layers)
            weights = {name: tensor.to(device, compute) for name, tensor in target.layer(index).items()}
            behind_BTC = decoder.layer(weights, arch, hidden_BTC, rotary)
            alike_BT = torch.cosine_similarity(hidden_BTC, behind_BTC, dim=-1).cpu()
            influence.append(1 - float(alike_BT[known_BT].mean()))
            hidden_BTC = behind_BTC
    report("weighing the target's layers", arch.num_layers, arch.num_layers)
    others = sorted(range(1, arch.num_layers), key=lambda index: -influence[index])
    return sorted([0, *others[: keep - 1]])


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
    artifacts.write_json(out / "config.json", config | {"dtype": "float16", "torch_dtype": "float16"})
    copy_companions(companions, out)
