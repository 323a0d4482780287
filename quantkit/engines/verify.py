"""Is an engine's checkpoint what was asked for? Found out from its files; what the engine says counts for nothing."""

from pathlib import Path

import torch

from quantkit import checkpoint, decoder, headers
from quantkit.architecture import layer_prefix, linear_shapes
from quantkit.checkpoint import Checkpoint, open_checkpoint
from quantkit.errors import QuantkitError, raise_all
from quantkit.formats import Storage, dequantize
from quantkit.progress import Report

_SHOWN = 5  # of the problems: a wrong scheme is wrong everywhere
_POSITIONS = 64


def take_over(made: Path, out: Path, *, source: Checkpoint, wanted: Storage, name: str, report: Report) -> Checkpoint:
    """Check the checkpoint in `made` and move its weights and config to `out`, with the source's tokenizer.

    Raises:
        QuantkitError: everything that is wrong with it, some lines of it.
    """
    try:
        opened = open_checkpoint(made, quantized=True)
        check(opened, source, wanted, report)
    except QuantkitError as error:
        raise QuantkitError(f"what engine {name} made is not what was asked of it: {error}") from error
    report("taking over the checkpoint", 0, 0)
    names = {file.name for file in opened.shards.values()} | {"config.json"}
    if (made / headers.INDEX_NAME).is_file():
        names.add(headers.INDEX_NAME)
    for each in sorted(names):
        (made / each).chmod(0o644)  # safetensors writes for the owner alone; a server runs as another user
        (made / each).replace(out / each)
    checkpoint.copy_companions(source.path, out)
    return open_checkpoint(out, quantized=True)


def check(opened: Checkpoint, source: Checkpoint, wanted: Storage, report: Report) -> None:
    """Refuse a checkpoint other than the source quantized as `wanted`.

    Every linear of the decoder layers must be there, stored so, and finite; everything else dense and finite; and the
    config must describe the source's model.

    Raises:
        QuantkitError: what is wrong, the first problems of many.
    """
    arch = source.arch
    problems = []
    # An engine may store a tied head again: the same function. Anything else of the model must be as it was.
    if opened.arch._replace(tied_embeddings=arch.tied_embeddings) != arch:
        changed = [
            f"{field} {getattr(arch, field)!r} became {getattr(opened.arch, field)!r}"
            for field in arch._fields
            if field != "tied_embeddings" and getattr(arch, field) != getattr(opened.arch, field)
        ]
        problems.append(f"config.json: {', '.join(changed)}")
    else:
        before, after = (
            decoder.rotation(config, _POSITIONS, dtype=torch.float32, device="cpu")
            for config in (source.config, opened.config)
        )
        if not all(torch.equal(one, other) for one, other in zip(before, after, strict=True)):
            problems.append("config.json: rotary embeddings are others than the source's (rope_theta, rope_scaling)")
    for index in range(arch.num_layers):
        report("checking what was made, layer", index, arch.num_layers)
        problems += _layer_problems(opened, index, wanted)
        if len(problems) > _SHOWN:
            problems = [*problems[:_SHOWN], "and more of the kind"]
            break
    raise_all(problems)
    dense = [name for name, tensor in opened.outer().items() if not torch.isfinite(tensor).all()]
    raise_all([f"{name} holds NaN or Inf" for name in dense])


def _layer_problems(opened: Checkpoint, index: int, wanted: Storage) -> list[str]:
    prefix, problems = layer_prefix(index), []
    assert opened.storages is not None
    stored = opened.read(name for name in opened.shards if name.startswith(prefix))
    inside = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
    for linear, shape in linear_shapes(opened.arch).items():
        name, storage = prefix + linear, opened.storages.of(prefix + linear)
        if f"{linear}.weight" in inside or storage is None:
            problems.append(f"{name} is not quantized")
            continue
        if storage != wanted:
            problems.append(f"{name} is stored as {_spoken(storage)}, asked for was {_spoken(wanted)}")
            continue
        try:
            quantized = checkpoint.unpack_linear(inside, linear, shape, storage)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        if wanted.symmetric and not quantized.grid.symmetric:
            problems.append(f"{name} has zero points of its own, asked for was a symmetric grid")
        if not torch.isfinite(dequantize(quantized)).all():
            problems.append(f"{name} holds NaN or Inf")
    dense = [name for name, tensor in inside.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    return problems + [f"{prefix}{name} holds NaN or Inf" for name in dense]


def _spoken(storage: Storage) -> str:
    grid = "symmetric" if storage.symmetric else "asymmetric"
    return f"{storage.format}, {storage.bits} bits, group size {storage.group_size}, {grid}"
