"""`quantkit eval`."""

from pathlib import Path
from typing import Any

import click

from quantkit.cli import common, option_values
from quantkit.errors import QuantkitError


@click.command("eval")
@click.argument("candidates", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--reference", type=click.Path(path_type=Path), required=True, help="The FP16 checkpoint it was made from."
)
@click.option("--compare", is_flag=True, help="Several CANDIDATES beside one another, with size against KL.")
@common.out
@click.option("--text", multiple=True, required=True, help="Held-out text source; may be repeated.")
@click.option(
    "--samples", default="32", show_default=True, callback=option_values.count_or_all,
    help="Windows drawn from the text; or all: whole documents, scored as lm-eval does.",
)  # fmt: skip
@click.option("--length", type=click.IntRange(16), default=2048, show_default=True, help="Tokens a window.")
@click.option("--stride", type=click.IntRange(1), help="With --samples all: tokens from window to window.")
@click.option(
    "--chat", default="auto", show_default=True,
    help="Prompts that the reference answers: a text source, self:N, no, or auto: self:32 where it can.",
)  # fmt: skip
@click.option("--chat-tokens", type=click.IntRange(2), default=256, show_default=True, help="Of the longest answer.")
@click.option(
    "--kv-cache",
    type=click.Choice(["auto", "float16", "fp8", "fp8_e5m2", "fp8_per_token_head", "int8_per_token_head"]),
    multiple=True, default=("auto",), show_default=True,
    help="Type of the candidate's KV cache; may be repeated, to judge it with each. auto: as vLLM, fp8 where the "
    "candidate brings scales, else 16 bits.",
)  # fmt: skip
@click.option("--long-length", type=click.IntRange(16), help="Tokens of a few longer windows, scored besides.")
@click.option("--long-samples", type=click.IntRange(1), default=4, show_default=True)
@click.option("--served", is_flag=True, help="Have vLLM score the same tokens, and compare.")
@click.option("--task", "tasks", multiple=True, help="Task of lm-eval, or of a YAML or folder; may be repeated.")
@click.option("--task-limit", type=click.IntRange(1), help="Samples of each task, its first ones.")
@click.option("--draft", type=click.Path(path_type=Path), help="Measure this draft's acceptance before each candidate.")
@click.option(
    "--profile", default="default", show_default=True, help="Limits: default, strict, small-model, none or a file."
)
@click.option("--max-perplexity-drift", help="Instead of the profile's, for example 0.5%.")
@common.on
@common.device
@common.seed
@common.fresh
@common.friendly
def evaluate(
    candidates: tuple[Path, ...], reference: Path, compare: bool, out: Path, draft: Path | None, device: str,
    cluster: str | None, seed: int, fresh: bool, **settings: Any,
) -> None:  # fmt: skip
    """Whether CANDIDATES may be served: perplexity drift, KL and agreement with FP16; exit 8 when a gate fails, 9
    when there is too little text to tell.

    \b
    Examples:
      quantkit eval llama-w4 --reference Llama-3.1-8B-Instruct --out report --text held-out.txt
      quantkit eval llama-w4 --reference Llama-3.1-8B-Instruct --out report --text held-out.txt --profile strict \\
          --served --kv-cache auto --kv-cache fp8 --task everyday
      quantkit eval --compare llama-w4 llama-w8 --reference Llama-3.1-8B-Instruct --out report --text held-out.txt
      torchrun --nproc-per-node 4 --no-python quantkit eval w4 --reference llama --out report --text t.txt --device cuda
    """
    from quantkit import ranks, recipe, stages, summary

    if len(candidates) > 1 and not compare:
        raise QuantkitError(f"{len(candidates)} candidates: give --compare to see them beside one another")
    checked = recipe.check(recipe.Evaluate, settings, where="eval")
    with ranks.joined(device) as own_device:
        if ranks.rank() > 0:
            ranks.follow(own_device)
            return
        display = common.display()
        try:
            with ranks.leading() as hand_out:
                stage = stages.evaluate(
                    candidates, reference, settings=checked, seed=seed, draft=draft, device=own_device,
                    hand_out=hand_out, cluster=cluster,
                )  # fmt: skip
                stages.run_stage(stage, out, display=display, replace=fresh)
        finally:
            summary.print_evaluation(display.console, out)
