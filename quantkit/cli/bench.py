"""`quantkit bench`."""

from pathlib import Path
from typing import Any

import click

from quantkit.cli import common, option_values


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--baseline", type=click.Path(path_type=Path), required=True, help="The FP16 checkpoint that it was made from."
)
@common.out
@click.option(
    "--variant", "variants", multiple=True, metavar="NAME",
    help="Instead of one technique after the other: fp16 or w4, then any of +serial, +draft[:K], +ngram[:K], +prefix, "
    "+fp8. May be repeated.",
)  # fmt: skip
@click.option(
    "--concurrency", "concurrencies", type=click.IntRange(1), multiple=True,
    help="Requests at once; may be repeated.  [default: 1 and 8 on a CPU; 1, 4, 16, 64 on GPUs]",
)  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Of all loads on all variants.")
@click.option("--requests", type=click.IntRange(1), help="Of a load, or all at once.  [default: 2 on a CPU, or 32]")
@click.option("--output-tokens", type=click.IntRange(2), help="Of the longest answer.  [default: 12 on a CPU, or 128]")
@click.option("--prompts", default="bundle", show_default=True, help="Text source, or those that BUNDLE carries.")
@click.option(
    "--system-prompt", type=click.Path(exists=True, dir_okay=False),
    help="The beginning that all prompts share where prefix caching is measured.",
)  # fmt: skip
@click.option(
    "--temperature", "temperatures", multiple=True, default=("0",), show_default=True,
    callback=option_values.temperatures, help="Of the answers; or deployment: the target's own. May be repeated.",
)  # fmt: skip
@click.option("--ttft-limit", "ttft_limit_s", type=float, help="Seconds to the first token.  [default: the bundle's]")
@click.option("--tpot-limit", "tpot_limit_s", type=float, help="Seconds a further token.  [default: the bundle's]")
@click.option("--price-per-hour", type=float, help="Of what one server runs on: then a million tokens have a price.")
@click.option(
    "--what-if", callback=option_values.acceptance, metavar="acceptance=A",
    help="Also a draft with this acceptance, which nobody need have trained (GPUs only).",
)  # fmt: skip
@click.option("--knee", is_flag=True, help="Have guidellm, if it is on PATH, look for the load that is one too many.")
@click.option(
    "--servers", type=click.Choice(["auto", "together", "in turns"]), default="auto", show_default=True,
    help="All kept up at once, where memory allows it, or each for its turn.",
)  # fmt: skip
@common.fresh
@common.friendly
def bench(bundle: Path, baseline: Path, out: Path, fresh: bool, **settings: Any) -> None:
    """What each technique of BUNDLE gives on this machine: FP16 without batching, with it, then one after the other.

    The real vLLM, its own client, the same prompts for all, in turns; bench.html, bench.md and bench.json say where a
    technique gains, where it loses, and why.

    \b
    Example:
      quantkit bench runs/quickstart/bundle --baseline runs/quickstart/checkpoint --out runs/quickstart/bench
      quantkit bench bundle --baseline llama --out bench --price-per-hour 2.50 --concurrency 1 --concurrency 32
      quantkit bench bundle --baseline llama --out bench --variant w4 --variant w4+draft:2 --variant w4+draft:4
      quantkit bench bundle --baseline llama --out bench --what-if acceptance=0.7
    """
    from quantkit import recipe, stages, summary

    checked = recipe.check(
        recipe.Bench, {name: value for name, value in settings.items() if value is not None}, where="bench"
    )
    display = common.display()
    manifest = stages.run_stage(stages.bench(bundle, baseline, settings=checked), out, display=display, replace=fresh)
    summary.print_rows(display.console, "Before and after", summary.bench_rows(manifest.results))
    click.echo(str(out / "bench.html"))
