"""A draft for a target, and its own 4-bit weights."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from quantkit import architecture, text
from quantkit.artifacts import Work
from quantkit.engines import registry
from quantkit.errors import QuantkitError
from quantkit.kv_scheme import has_kv_scheme
from quantkit.progress import Report
from quantkit.recipe import Draft, Quantize
from quantkit.stages.quantizing import native_settings
from quantkit.stages.stage import Stage, check_cluster, open_inputs

if TYPE_CHECKING:
    from quantkit import ranks

_HEAD_ENGINE = "speculators"
_DRAFT_WINDOWS, _DRAFT_WINDOW = 128, 512  # that a draft's 4-bit weights are calibrated on at most, and their tokens


def train_draft(
    target: Path, *, settings: Draft, seed: int, cluster: str | None = None,
    hand_out: "ranks.HandOut" = lambda order: None,
) -> Stage:  # fmt: skip
    """A draft for the target, distilled on the target's own answers, and quantized where that makes it better.

    A head (kind eagle3) is another engine's work and stays in 16 bits. `hand_out` tells other processes to train along.
    With the address of a Ray cluster the target writes prompts and answers there; the name of the work does not say
    where it is done, so it goes on here, or there, when interrupted.

    Raises:
        QuantkitError: a head and several processes; a cluster, and no Ray here.
    """
    with_head = settings.kind == "eagle3"
    if with_head and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise QuantkitError("kind eagle3 is trained by one process: leave out torchrun")
    check_cluster(cluster)

    def make(work: Work, report: Report) -> None:
        from quantkit import checkpoint as checkpoints
        from quantkit.draft import distil

        if with_head:
            from quantkit.engines import head

            head.layers_read(checkpoints.open_checkpoint(target).arch.num_layers)  # refuses what is too shallow

        def train_head(dense: Path, exchanges: Path, out: Path) -> dict[str, Any]:
            import torch

            from quantkit.engines import run

            return run.train_head(
                _HEAD_ENGINE, checkpoints.open_checkpoint(dense), exchanges, settings, seed=seed, out=out,
                device="cuda" if torch.cuda.is_available() else "cpu", folder=work.partial, report=report,
            )  # fmt: skip

        def quantize(draft: Path, out: Path, texts: Sequence[list[int]]) -> None:
            _quantize_draft(
                draft, out, texts, target, settings, seed=seed, hand_out=hand_out, folder=work.partial, report=report
            )

        work.results |= distil.train_draft(
            target, settings=settings, seed=seed, out=work.out, folder=work.partial, report=report,
            quantize=None if settings.quantize == "no" else quantize, train_head=train_head, hand_out=hand_out,
            cluster=cluster,
        )  # fmt: skip

    inputs = {"target": target} | ({"init": Path(settings.init)} if settings.init else {})
    shape = {"draft": settings.model_dump(), "prompts": text.describe([settings.prompts]), "seed": seed}
    if with_head:
        shape["pins"] = registry.digest(_HEAD_ENGINE)
    return Stage("train-draft", "draft", inputs, shape, make, look=lambda: open_inputs(*inputs.values()))


def _quantize_draft(
    draft: Path, out: Path, texts: Sequence[list[int]], target: Path, settings: Draft, *, seed: int,
    hand_out: "ranks.HandOut", folder: Path, report: Report,
) -> None:  # fmt: skip
    """The draft with 4-bit weights in groups as its target's, calibrated on what target and draft are asked and say."""
    from quantkit import checkpoint as checkpoints
    from quantkit import tokens
    from quantkit.quantize import stream

    assert settings.quantize != "no"
    source, storage = checkpoints.open_checkpoint(draft), checkpoints.open_checkpoint(target).storage
    sizes = [storage.group_size] if storage and storage.group_size > 0 else [128, 64, 32]
    inputs = [shape[1] for shape in architecture.linear_shapes(source.arch).values()]
    fitting = [size for size in [*sizes, 128, 64, 32] if all(width % size == 0 for width in inputs)]
    group_size = fitting[0] if fitting else -1
    windows = tokens.pack(texts, length=_DRAFT_WINDOW, samples=_DRAFT_WINDOWS)
    # a draft's cache is of its target's type, and has scales of its own
    kept: Literal["no", "fp8"] = "fp8" if has_kv_scheme(checkpoints.open_checkpoint(target).config) else "no"
    plan = native_settings(Quantize(effort=settings.quantize, group_size=group_size, continuations=0, kv_cache=kept))
    layers, partial = folder / "draft-layers", out.with_suffix(".partial")

    def say(what: str, done: int, total: int) -> None:
        report(f"the draft: {what}", done, total)

    hand_out(stream.Order(source.path, windows, plan, layers))
    stream.quantize_layers(source, windows, plan, folder=layers, device="cpu", report=say)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    stream.write_checkpoint(source, plan, folder=layers, out=partial)
    partial.rename(out)
