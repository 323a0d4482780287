"""`quantkit quantize`, and `quantkit engines`, the other tools that it can call."""

from pathlib import Path
from typing import Any

import click

from quantkit.cli import common, option_values

# spelled out, because the table of them comes with torch, which takes seconds to import
_ENGINES = ("autoawq", "autogptq", "gptqmodel", "llmcompressor", "autoround")
_DRAFT_ENGINES = ("speculators",)


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@common.out
@click.option(
    "--effort",
    type=click.Choice(["fast", "default", "high"]),
    default="default",
    show_default=True,
    help="fast: GPTQ. default: scaled inputs, the curvature of both sides, drift correction, integers and scales gone "
    "over again. high: as default, five times, on more text, which CHECKPOINT writes.",
)
@click.option(
    "--engine", type=click.Choice(["native", *_ENGINES]),
    default="native", show_default=True,
    help="Another tool, in an environment of its own (`quantkit engines`). Interrupted, it begins again.",
)  # fmt: skip
@click.option(
    "--engine-option", "engine_options", multiple=True, callback=option_values.engine_options, metavar="KEY=VALUE",
    help="Passed on to the other tool, the value as in YAML: iters=20. May be repeated.",
)  # fmt: skip
@click.option(
    "--method", type=click.Choice(["gptq", "awq", "awq+gptq", "gptaq", "autoround"]),
    help="Instead of the effort's; `quantkit engines` says which of them another engine has.",
)  # fmt: skip
@click.option(
    "--format", "format_", type=click.Choice(["compressed-tensors", "gptq", "awq"]),
    help="compressed-tensors, or the other engine's own.",
)  # fmt: skip
@click.option("--bits", type=click.Choice(["4", "8", "auto"]), default="4", show_default=True)
@click.option("--average-bits", type=float, help="With --bits auto: as many a weight, 4, 8 or 16 for each linear.")
@click.option(
    "--bit-choices", callback=option_values.numbers, metavar="BITS,...",
    help="With --bits auto: 4,16 for example, where 8 would have no kernel.",
)  # fmt: skip
@click.option("--group-size", type=int, default=128, show_default=True, help="-1: per channel.")
@click.option("--symmetric/--asymmetric", default=False, show_default=True)
@click.option(
    "--ignore", multiple=True, metavar="PATTERN", help="Linears left in 16 bits: '*.down_proj'. May be repeated."
)
@click.option(
    "--override", "overrides", multiple=True, callback=option_values.overrides, metavar="PATTERN:KEY=VALUE,...",
    help="Another scheme for some linears: 'model.layers.0.*:bits=8,group_size=32,symmetric=true'. May be repeated.",
)  # fmt: skip
@click.option(
    "--kv-cache", type=click.Choice(["no", "fp8"]), default="no", show_default=True,
    help="fp8: scales of an FP8 KV cache beside the weights, which vLLM then uses by itself.",
)  # fmt: skip
@click.option(
    "--kv-scales", type=click.Choice(["mse", "max", "percentile"]), default="mse", show_default=True,
    help="What they leave: the least squared error, all that was seen uncut, or 99.99 % of it.",
)  # fmt: skip
@click.option(
    "--kv-strategy", type=click.Choice(["tensor", "attn_head"]), default="tensor", show_default=True,
    help="One scale a layer, or one a key-value head (FlashAttention 3 on GPUs).",
)  # fmt: skip
@click.option(
    "--uncalibrated-kv-cache", is_flag=True,
    help="With --kv-cache fp8 and a format that takes no scales (awq, gptq): serve it at 1.0, and say so.",
)  # fmt: skip
@click.option(
    "--calibration",
    "text",
    multiple=True,
    required=True,
    help="Text source, or self:N: chats that CHECKPOINT writes. May be repeated.",
)
@click.option("--samples", type=click.IntRange(1), default=128, show_default=True)
@click.option("--length", type=click.IntRange(16), default=2048, show_default=True, help="Tokens a sample.")
@click.option(
    "--continuations", type=click.IntRange(0), help="Instead of the effort's (high: up to 22): windows that CHECKPOINT "
    "writes for each sample of text, going on from a piece of it; of chats it holds new ones.",
)  # fmt: skip
@click.option(
    "--memory-budget", callback=option_values.size, metavar="SIZE",
    help="Refuse to begin where more is needed: 16GiB. Hidden states lie in files and do not count.",
)  # fmt: skip
@common.on
@common.device
@common.seed
@common.fresh
@common.friendly
def quantize(
    checkpoint: Path, out: Path, text: tuple[str, ...], samples: int, length: int, memory_budget: int | None,
    device: str, cluster: str | None, seed: int, fresh: bool, format_: str | None, bits: str, **asked: Any,
) -> None:  # fmt: skip
    """4-bit weights for CHECKPOINT, stored so that vLLM loads them.

    \b
    Example:
      quantkit quantize Llama-3.1-8B-Instruct --out llama-w4 --calibration prose.txt --calibration self:200
      quantkit quantize llama --out w4-kv8 --kv-cache fp8 --calibration prose.txt
      quantkit quantize llama --out llama-awq --method awq --format awq --calibration prose.txt
      quantkit quantize llama --out w4 --calibration c.jsonl --override '*.down_proj:bits=8,symmetric=true'
      quantkit quantize llama --out w4 --calibration c.jsonl --engine llmcompressor --method awq
      quantkit quantize llama --out w4 --calibration c.jsonl --engine autoround --engine-option iters=20
      torchrun --nproc-per-node 4 --no-python quantkit quantize llama --out w4 --calibration c.jsonl --device cuda
    """
    from quantkit import ranks, recipe, stages

    asked |= {"format_": format_, "bits": bits if bits == "auto" else int(bits)}
    # what was asked for and no more: an engine refuses what it does not take
    given = {name.rstrip("_"): value for name, value in asked.items() if common.was_given(name)}
    settings = recipe.check(recipe.Quantize, given, where="quantize")
    windows = recipe.TextWindows(text=text, samples=samples, length=length)
    with ranks.joined(device) as own_device:
        if ranks.rank() > 0:
            ranks.follow(own_device)
            return
        with ranks.leading() as hand_out:
            stage = stages.quantize(
                checkpoint, calibration=windows, settings=settings, seed=seed, device=own_device,
                memory_budget=memory_budget, hand_out=hand_out, cluster=cluster,
            )  # fmt: skip
            stages.run_stage(stage, out, display=common.display(), replace=fresh)
    click.echo(str(out))


@click.group(invoke_without_command=True)
@click.pass_context
@common.friendly
def engines(context: click.Context) -> None:
    """Other tools, for `quantize --engine` and `train-draft --kind`: lists them, and makes their environments.

    \b
    Example:
      quantkit engines
      quantkit engines install llmcompressor
    """
    if context.invoked_subcommand is None:
        from rich.console import Console

        from quantkit import summary

        summary.print_engines(Console())


@engines.command("install")
@click.argument("name", type=click.Choice(_ENGINES + _DRAFT_ENGINES))
@common.friendly
def engines_install(name: str) -> None:
    """Make the environment of the engine NAME now rather than when it is first used.

    Its pinned packages go to $QUANTKIT_CACHE, or ~/.cache/quantkit, under engines/. What is there already is left.

    \b
    Example:
      quantkit engines install llmcompressor
    """
    from quantkit.engines import environment

    display = common.display()
    with display.stage(f"environment of {name}") as report:
        environment.ensure(name, report)
    click.echo(str(environment.folder(name)))
