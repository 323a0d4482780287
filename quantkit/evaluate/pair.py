"""Whether candidate and reference belong together, and whether the text is one to judge them by."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit import artifacts, decoder, tokens
from quantkit.architecture import layer_prefix, linear_shapes
from quantkit.checkpoint import Checkpoint
from quantkit.errors import QuantkitError, raise_all
from quantkit.evaluate.windows import Windows
from quantkit.formats import grouped
from quantkit.tokens import TokenSet

_SHARED = 0.01  # of the held-out text's 32-token runs may also stand in the calibration text by chance
_APART = 0.3  # relative difference of the embeddings of a few tokens, which no quantizer changes by much
_ROWS = 64
# What 4 bits round away of a linear is a tenth or two of it; other weights, or these in wrong places, differ by 1.
_OTHER = 0.6
_RESCALED = 0.12  # a group's factor is off by a hundredth or four; at another group's scale, by a fifth
_POSITIONS = 64
_PROBE = "Name three colours, one of them blue; 17 + 25 = 42."


def check(reference: Checkpoint, candidate: Checkpoint, *, base: str) -> None:
    """Refuse a candidate that was not made from the reference, or would be asked in other tokens.

    base: the reference's digest.

    Raises:
        QuantkitError: another size or base, other weights or positions, another BOS, tokenizer or chat template.
    """
    problems = []
    sizes = [each.arch._replace(tied_embeddings=True) for each in (reference, candidate)]
    give = "give the checkpoint that was quantized as --reference"
    if sizes[0] != sizes[1]:
        problems.append(f"their configs differ in size or kind: {give}")
    else:
        if _base(candidate.path) not in (None, base):
            problems.append(f"its manifest names another base: {give}")
        apart = _embeddings_apart(reference, candidate)
        if apart > _APART:
            problems.append(f"the embeddings of {_ROWS} tokens differ by {apart:.0%}: {give}")
        before, after = (
            decoder.rotation(each.config, _POSITIONS, dtype=torch.float32, device="cpu")
            for each in (reference, candidate)
        )
        if not all(torch.equal(one, other) for one, other in zip(before, after, strict=True)):
            problems.append(
                "its rotary embeddings are others (rope_theta, rope_scaling): take both from the reference's config"
            )
        problems += [] if problems else _other_linears(reference, candidate)
    problems += _tokenizer_problems(reference.path, candidate.path)
    raise_all([f"{candidate.path} was not made from {reference.path}: {problem}" for problem in problems])


def _other_linears(reference: Checkpoint, candidate: Checkpoint) -> list[str]:
    """The quantized linears that hold something else than the reference's weights, rounded: a line for each kind of it.

    Quantizers fold scales of inputs into what is before a linear, so rows and columns may have scales of their own.
    """
    other, rescaled = [], []
    for index in range(reference.arch.num_layers if candidate.storages else 0):
        for linear in linear_shapes(reference.arch):
            name = layer_prefix(index) + linear
            storage = candidate.storages.of(name) if candidate.storages else None
            if storage is None:
                continue  # pruned, or tuned: what that does is for the gates to say
            wanted, held = (each.dense(f"{name}.weight", dtype=torch.float32) for each in (reference, candidate))
            apart, off = _apart(wanted, held, storage.group_size)
            if not apart <= _OTHER:  # NaN is none of its numbers
                other.append(f"{name} ({apart:.0%} apart)")
            elif off > _RESCALED:
                rescaled.append(f"{name} ({off:.0%} off)")
    return [
        f"{found[0]}{f' and {len(found) - 1} more' if len(found) > 1 else ''} {what}"
        for found, what in (
            (other, "holds other weights than the reference's, or holds them in the wrong places"),
            (rescaled, "holds its groups at other scales than the reference's"),
        )
        if found
    ]


def _apart(wanted_OI: Tensor, held_OI: Tensor, group_size: int) -> tuple[float, float]:
    """How far a linear is from what it was made from, but for scales of its rows and columns; and its groups' scales.

    The first is |held - rows * wanted * columns| / |held|, where rows and columns, by turns, make it least; the second
    the root mean square of how far the groups' own best factors are from 1.
    """
    fitted_OI = wanted_OI
    for axis in (0, 1, 0, 1):
        shared = (held_OI * fitted_OI).sum(axis, keepdim=True)
        fitted_OI = fitted_OI * (shared / fitted_OI.square().sum(axis, keepdim=True).clamp_min(1e-30))
    apart = float((held_OI - fitted_OI).norm() / held_OI.norm().clamp_min(1e-30))
    size = held_OI.shape[1] if group_size == -1 else group_size
    held_OGi, fitted_OGi = (grouped(each, size) for each in (held_OI, fitted_OI))
    weight_OG = fitted_OGi.square().sum(-1)
    off_OG = (held_OGi * fitted_OGi).sum(-1) - weight_OG
    return apart, float((off_OG / weight_OG.clamp_min(1e-30)).square().mean().sqrt())


def _base(candidate: Path) -> str | None:
    """The digest of the checkpoint that the candidate's manifest says it was quantized from."""
    manifest = artifacts.read_manifest(candidate)
    return manifest.inputs.get("checkpoint") if manifest and manifest.kind == "quantized" else None


def _embeddings_apart(reference: Checkpoint, candidate: Checkpoint) -> float:
    rows = torch.linspace(0, reference.arch.vocab_size - 1, _ROWS).long()
    ours, theirs = (
        each.dense("model.embed_tokens.weight", dtype=torch.float32)[rows] for each in (reference, candidate)
    )
    return float((ours - theirs).norm() / ours.norm())


def _tokenizer_problems(reference: Path, candidate: Path) -> list[str]:
    first, second = (tokens.load_tokenizer(path) for path in (reference, candidate))
    ours, theirs = (each(_PROBE)["input_ids"] for each in (first, second))
    begins = [ids[:1] == [each.bos_token_id] for ids, each in ((ours, first), (theirs, second))]
    copy = "copy tokenizer.json, tokenizer_config.json and chat_template.jinja from the reference"
    problems = []
    if begins[0] != begins[1]:
        words = ("adds no BOS to a text, the reference's does", "adds a BOS to a text, the reference's does not")
        problems.append(f"its tokenizer {words[begins[1]]}: {copy}")
    elif ours != theirs:
        problems.append(f"its tokenizer makes other tokens of the same text: {copy}")
    templates = [getattr(each, "chat_template", None) for each in (first, second)]
    if templates[0] and not templates[1]:
        problems.append(f"it has no chat template, the reference has one: {copy}")
    elif templates[0] and templates[0] != templates[1]:
        problems.append(f"its chat template is not the reference's: {copy}")
    return problems


def refuse_leak(calibrated_on: Sequence[str], windows: Windows, tokenizer: Any) -> None:
    """Refuse held-out text whose words, not only whose name, were calibrated on."""
    for source in calibrated_on:
        if source.startswith(("hf:", "self:")):
            continue  # known by name; reading the whole of it again would cost more than the evaluation
        shared = tokens.shared_spans(tokens.whole(source, tokenizer), TokenSet(windows.input_ids_ST, windows.adds_bos))
        if shared > _SHARED:
            raise QuantkitError(
                f"{shared:.0%} of the held-out text also stands in the calibration text {source!r}: "
                "the drift would be flattered; evaluate on another text"
            )
