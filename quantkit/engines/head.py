"""Is an engine's EAGLE-3 head (arXiv 2503.01840) one that vLLM serves before this target? Found out from its files."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from quantkit import artifacts, decoder, foreign, headers
from quantkit.architecture import Architecture, linear_shapes, read_architecture
from quantkit.checkpoint import Checkpoint, copy_companions
from quantkit.errors import QuantkitError, raise_all

_FEWEST_LAYERS = 7  # of a target: with fewer, two of the three places are one
_WEIGHTS = "model.safetensors"
_SHOWN = 5  # of the problems: wrong sizes are wrong everywhere
_POSITIONS = 64
# What of the head's one layer must be as in the target: vLLM gives both the same states, embeddings and positions.
_SAME = ("hidden_size", "vocab_size", "max_position_embeddings")


def layers_read(num_layers: int) -> list[int]:
    """Behind how many of the target's layers the head reads its states: vLLM's own three.

    Raises:
        QuantkitError: a target with too few layers.
    """
    if num_layers < _FEWEST_LAYERS:
        raise QuantkitError(
            f"kind eagle3: the target has {num_layers} layers, and a head reads its states behind three of at least "
            f"{_FEWEST_LAYERS}: choose kind draft_model"
        )
    return [2, num_layers // 2, num_layers - 3]


def take_over(made: Path, out: Path, *, target: Checkpoint, layers: list[int], name: str) -> None:
    """Check the head in `made` and move it to `out`, with the target's tokenizer.

    Raises:
        QuantkitError: everything that is wrong with it, some lines of it.
    """
    try:
        config = foreign.json_object(made / "config.json", remedy="report it to its engine", within=made)
        headers.header(made / _WEIGHTS, within=made)
        with safe_open(made / _WEIGHTS, framework="pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, QuantkitError) as error:
        raise QuantkitError(f"engine {name} left no head in {made}: {error}") from error
    found = problems(config, tensors, target=target, layers=layers)
    if len(found) > _SHOWN:
        found = [*found[:_SHOWN], "and more of the kind"]
    raise_all([f"what engine {name} made is no EAGLE-3 head of {target.path}: {problem}" for problem in found])
    config.pop("auto_map", None)  # names the Python file that the library writes beside it, which stays behind
    out.mkdir(exist_ok=True)
    artifacts.write_json(out / "config.json", config)
    (made / _WEIGHTS).chmod(0o644)  # safetensors writes for the owner alone; a server runs as another user
    (made / _WEIGHTS).replace(out / _WEIGHTS)
    copy_companions(target.path, out)


def problems(
    config: dict[str, Any], tensors: dict[str, Tensor], *, target: Checkpoint, layers: list[int]
) -> list[str]:  # fmt: skip
    """Why config.json and tensors are no head that vLLM serves before the target; empty when they are."""
    asked = {
        "speculators_model_type": "eagle3", "eagle_aux_hidden_state_layer_ids": layers, "target_hidden_size": None,
        "fc_norm": False,
    }  # fmt: skip
    found = [f"{key} is {config.get(key)!r}, not {value!r}" for key, value in asked.items() if config.get(key) != value]
    layer = config.get("transformer_layer_config")
    layer = layer if isinstance(layer, dict) else {}
    arch, unread = read_architecture(layer | {"architectures": []})
    found += [f"transformer_layer_config: {problem}" for problem in unread]
    if arch is None:
        return found
    if (arch.model_type, arch.num_layers) != ("llama", 1):
        found.append(f"{arch.num_layers} layers of {arch.model_type}, not one of llama")
    for field in _SAME:
        ours, theirs = getattr(arch, field), getattr(target.arch, field)
        if ours != theirs:
            found.append(f"{field} is {ours}, the target's is {theirs}")
    if found:
        return found  # transformers refuses a config that contradicts itself
    before, after = (
        decoder.rotation(each, _POSITIONS, dtype=torch.float32, device="cpu") for each in (target.config, layer)
    )
    if not all(one.shape == other.shape and torch.equal(one, other) for one, other in zip(before, after, strict=True)):
        found.append("rotary embeddings are others than the target's (rope_theta, rope_scaling)")
    vocabulary = config.get("draft_vocab_size") or 0
    if type(vocabulary) is not int or not 0 <= vocabulary <= arch.vocab_size:
        return [f"draft_vocab_size is {str(vocabulary)[:100]}, the target's vocabulary {arch.vocab_size}"]
    shapes = _shapes(arch, vocabulary, bool(config.get("norm_before_fc")), len(layers))
    for tensor_name in sorted(shapes.keys() | tensors.keys()):
        if tensor_name not in shapes or tensor_name not in tensors:
            found.append(f"{tensor_name} is " + ("missing" if tensor_name in shapes else "no part of a head"))
            continue
        tensor, (dtype, shape) = tensors[tensor_name], shapes[tensor_name]
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            found.append(f"{tensor_name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}")
        elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
            found.append(f"{tensor_name} holds NaN or Inf")
    return found or _vocabulary_problems(tensors, arch.vocab_size)


def _shapes(arch: Architecture, vocabulary: int, norm_before_fc: bool, read: int) -> dict[str, tuple[Any, Any]]:
    """dtype and shape of every tensor of a head, by name; embeddings are the target's and not among them."""
    hidden = arch.hidden_size
    linears = {
        # The layer reads a token's embedding and the state before it side by side.
        f"layers.0.{name}.weight": (rows, 2 * columns if name.endswith(("q_proj", "k_proj", "v_proj")) else columns)
        for name, (rows, columns) in linear_shapes(arch).items()
    }
    norms = ("layers.0.hidden_norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm")
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (hidden,) for name in norms}
    shapes |= linears | {"fc.weight": (hidden, read * hidden), "lm_head.weight": (vocabulary, hidden)}
    if norm_before_fc:
        shapes["input_norm.weight"] = (read * hidden,)
    found: dict[str, tuple[Any, Any]] = {name: (torch.float16, shape) for name, shape in shapes.items()}
    if vocabulary != arch.vocab_size:
        found |= {"d2t": (torch.int64, (vocabulary,)), "t2d": (torch.bool, (arch.vocab_size,))}
    return found


def _vocabulary_problems(tensors: dict[str, Tensor], vocab_size: int) -> list[str]:
    """d2t holds how far the target's id of a token is above the head's; t2d marks the target's ids that are meant."""
    if "d2t" not in tensors:
        return []
    ids = tensors["d2t"] + torch.arange(len(tensors["d2t"]))
    inside = bool((ids >= 0).all() and (ids < vocab_size).all())
    if not inside or len(ids.unique()) != len(ids):
        return [f"d2t does not name {len(ids)} different tokens of {vocab_size}"]
    if not torch.equal(tensors["t2d"].nonzero()[:, 0], ids.sort().values):
        return ["d2t and t2d name different tokens"]
    return []
