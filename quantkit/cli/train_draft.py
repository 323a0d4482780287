"""`quantkit train-draft`."""

from pathlib import Path
from typing import Any

import click

from quantkit.cli import common


@click.command("train-draft")
@click.argument("target", type=click.Path(path_type=Path))
@common.out
@click.option(
    "--kind", type=click.Choice(["draft_model", "eagle3"]), default="draft_model", show_default=True,
    help="eagle3: a head on the target's own states, which speculators trains (`quantkit engines`).",
)  # fmt: skip
@click.option("--init", type=click.Path(path_type=Path), help="A smaller checkpoint of the family to start from.")
@click.option("--keep-layers", type=click.IntRange(1), help="Or: start from this many of the target's own layers.")
@click.option("--prompts", default="self:400", show_default=True, help="Text source, or self:N: the target writes N.")
@click.option(
    "--layer-choice", type=click.Choice(["fit", "evenly"]), default="fit", show_default=True,
    help="Which layers --keep-layers keeps: those that stand best for the ones left out, or spread evenly.",
)  # fmt: skip
@click.option("--fit/--no-fit", default=True, help="Whether they are fitted to stand for them, before training.")
@click.option("--held-out-prompts", type=click.IntRange(1), default=32, show_default=True, help="To measure on.")
@click.option("--validation-prompts", type=click.IntRange(1), default=16, show_default=True, help="To stop by.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True, help="Of the longest prompt.")
@click.option("--answer-tokens", type=click.IntRange(2), default=128, show_default=True, help="Of the longest answer.")
@click.option(
    "--temperature", "temperatures", type=click.FloatRange(0, 2), multiple=True, default=(0.0, 0.7), show_default=True,
    help="Of the answers that are learned from. May be repeated: prompts take them in turn.",
)  # fmt: skip
@click.option(
    "--loss", default="lk_hybrid", show_default=True,
    type=click.Choice(
        ["forward_kl", "reverse_kl", "total_variation", "tvd++", "lk_alpha", "lk_hybrid", "cross_entropy"]
    ),
)  # fmt: skip
@click.option("--top-k", type=click.IntRange(1), help="Keep so many of the target's likeliest tokens, not its states.")
@click.option(
    "--on-policy", type=click.FloatRange(0, 1), default=0.0, show_default=True,
    help="Fraction of the prompts that the draft answers itself before each epoch but the first, to learn from too.",
)  # fmt: skip
@click.option("--epochs", type=click.IntRange(1), default=3, show_default=True)
@click.option("--patience", type=click.IntRange(1), default=3, show_default=True, help="Epochs without gain to stop.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--learning-rate", type=float, default=4e-4, show_default=True)
@click.option("--speculative-tokens", type=click.IntRange(1), default=4, show_default=True)
@click.option(
    "--draft-vocab-size", type=click.IntRange(1), default=32000, show_default=True,
    help="Tokens that a head (eagle3) can propose, the commonest in the answers; fewer are faster.",
)  # fmt: skip
@click.option(
    "--quantize", type=click.Choice(["no", "fast", "default", "high"]), default="default", show_default=True,
    help="Effort of the draft's own 4-bit weights; kept where the estimated speed-up with them is higher.",
)  # fmt: skip
@common.on
@common.seed
@common.fresh
@common.friendly
def train_draft(
    target: Path, out: Path, init: Path | None, cluster: str | None, seed: int, fresh: bool, **settings: Any
) -> None:
    """A draft for TARGET, distilled on the target's own answers; acceptance before and after, by vLLM.

    \b
    Example:
      quantkit train-draft llama-w4 --out draft --keep-layers 8 --prompts self:2000
      quantkit train-draft llama-70b-w4 --out draft --init Llama-3.2-1B-Instruct --prompts chats.jsonl
      quantkit train-draft llama-w4 --out draft --keep-layers 8 --loss forward_kl --temperature 0 --temperature 1
      quantkit train-draft llama-w4 --out head --kind eagle3 --prompts self:2000
      torchrun --nproc-per-node 4 --no-python quantkit train-draft llama-w4 --out draft --keep-layers 8
      quantkit train-draft /shared/llama-w4 --out /shared/draft --keep-layers 8 --on ray://10.0.0.1:6379
    """
    import torch

    from quantkit import ranks, recipe, stages, summary

    checked = recipe.check(recipe.Draft, settings | {"init": str(init) if init else None}, where="train-draft")
    with ranks.joined("cuda" if torch.cuda.is_available() else "cpu") as own_device:
        if ranks.rank() > 0:
            ranks.follow(own_device)
            return
        display = common.display()
        with ranks.leading() as hand_out:
            stage = stages.train_draft(target, settings=checked, seed=seed, cluster=cluster, hand_out=hand_out)
            manifest = stages.run_stage(stage, out, display=display, replace=fresh)
    summary.print_draft(display.console, manifest)
    click.echo(str(out))
