"""The command line: one short function a command; what the user did wrong becomes a line and an exit code."""

import errno
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Literal, TypeVar

import click
from click.core import ParameterSource

from quantkit import __version__, option_values
from quantkit.errors import QuantkitError

Command = TypeVar("Command", bound=Callable[..., Any])

# spelled out, because the table of them comes with torch, which takes seconds to import
_ENGINES = ("autoawq", "autogptq", "gptqmodel", "llmcompressor", "autoround")
_DRAFT_ENGINES = ("speculators",)

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again; it goes on where it stopped",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
    errno.EROFS: "the file system is read-only: choose another --out",
    errno.EACCES: "permission denied: choose an --out that you may write",
    errno.ENOENT: "is not there any more: put it back and run the same command again; it goes on where it stopped",
}


def _friendly(command: Command) -> Command:
    """Turn a QuantkitError, a full disk or Ctrl-C into a line on stderr and an exit code."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except QuantkitError as error:
            click.secho(f"error: {error}", fg="red", err=True)
            sys.exit(error.exit_code)
        except OSError as error:
            number = errno.ENOENT if isinstance(error, FileNotFoundError) else error.errno  # safetensors gives none
            if number not in _DISK_ERRORS:
                raise
            where = error.filename2 or error.filename or (error if error.errno is None else None)
            click.secho(f"error: {f'{where}: ' if where else ''}{_DISK_ERRORS[number]}", fg="red", err=True)
            sys.exit(QuantkitError.exit_code)
        except KeyboardInterrupt:
            click.secho("stopped; the same command goes on where it was", fg="yellow", err=True)
            sys.exit(130)

    return run  # type: ignore[return-value]


def _display() -> Any:
    from rich.console import Console

    from quantkit.progress import Display

    return Display(Console(stderr=True))


_out = click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to write.")


def _was_given(name: str) -> bool:
    """Whether an option of the running command is there because the user wrote it."""
    return click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT


_seed = click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
_fresh = click.option("--fresh", is_flag=True, help="Replace what --out holds instead of resuming or refusing.")
_on = click.option(
    "--on", "cluster", metavar="ADDRESS", callback=option_values.cluster,
    help="Ray cluster on which vLLM writes and answers: ray://HOST:PORT, or auto (RAY_ADDRESS, or the one here).",
)  # fmt: skip
_device = click.option("--device", default="cpu", show_default=True, help="torch device, for example cuda.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="quantkit")
def main() -> None:
    """From an FP16 Llama checkpoint to a 4-bit, speculative vLLM serving bundle, with the evidence in it."""
    import os
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@_out
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting: quantize.group_size=32."
)
@click.option("--fresh", is_flag=True, help="Do every stage again.")
@click.option("--dry-run", is_flag=True, help="Say what each stage would do, and write nothing.")
@_on
@_friendly
def run(
    recipe: Path, out: Path, overrides: tuple[str, ...], fresh: bool, dry_run: bool, cluster: str | None
) -> None:  # fmt: skip
    """All stages of RECIPE, in order; skips what is fresh, resumes what was interrupted. --on goes before what RECIPE
    says of a cluster.

    \b
    Example:
      quantkit run recipes/quickstart.yaml --out runs/quickstart
      quantkit run recipes/quickstart.yaml --out runs/g32 --set quantize.group_size=32
    """
    from quantkit import pipeline, summary
    from quantkit.recipe import load_recipe

    checked = load_recipe(recipe, overrides)
    if dry_run:
        for folder, state in pipeline.states(checked, out):
            click.echo(f"{folder:12} {'runs' if fresh else state}")
        return
    display = _display()
    manifests = pipeline.run(checked, out, display=display, fresh=fresh, cluster=cluster)
    summary.print_run(display.console, out, manifests)


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@_out
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
    "--continuations", type=click.IntRange(0), help="Instead of the effort's (high: up to 11): windows that CHECKPOINT "
    "writes for each sample, going on from a piece of it.",
)  # fmt: skip
@click.option(
    "--memory-budget", callback=option_values.size, metavar="SIZE",
    help="Refuse to begin where more is needed: 16GiB. Hidden states lie in files and do not count.",
)  # fmt: skip
@_on
@_device
@_seed
@_fresh
@_friendly
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
    given = {name.rstrip("_"): value for name, value in asked.items() if _was_given(name)}
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
            stages.run_stage(stage, out, display=_display(), replace=fresh)
    click.echo(str(out))


@main.group(invoke_without_command=True)
@click.pass_context
@_friendly
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
@_friendly
def engines_install(name: str) -> None:
    """Make the environment of the engine NAME now rather than when it is first used.

    Its pinned packages go to $QUANTKIT_CACHE, or ~/.cache/quantkit, under engines/. What is there already is left.

    \b
    Example:
      quantkit engines install llmcompressor
    """
    from quantkit.engines import environment

    display = _display()
    with display.stage(f"environment of {name}") as report:
        environment.ensure(name, report)
    click.echo(str(environment.folder(name)))


@main.command("eval")
@click.argument("candidates", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--reference", type=click.Path(path_type=Path), required=True, help="The FP16 checkpoint it was made from."
)
@click.option("--compare", is_flag=True, help="Several CANDIDATES beside one another, with size against KL.")
@_out
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
@_on
@_device
@_seed
@_fresh
@_friendly
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
    from quantkit.errors import QuantkitError

    if len(candidates) > 1 and not compare:
        raise QuantkitError(f"{len(candidates)} candidates: give --compare to see them beside one another")
    checked = recipe.check(recipe.Evaluate, settings, where="eval")
    with ranks.joined(device) as own_device:
        if ranks.rank() > 0:
            ranks.follow(own_device)
            return
        display = _display()
        try:
            with ranks.leading() as hand_out:
                stage = stages.evaluate(
                    candidates, reference, settings=checked, seed=seed, draft=draft, device=own_device,
                    hand_out=hand_out, cluster=cluster,
                )  # fmt: skip
                stages.run_stage(stage, out, display=display, replace=fresh)
        finally:
            summary.print_evaluation(display.console, out)


@main.command("train-draft")
@click.argument("target", type=click.Path(path_type=Path))
@_out
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
@_on
@_seed
@_fresh
@_friendly
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
        display = _display()
        with ranks.leading() as hand_out:
            stage = stages.train_draft(target, settings=checked, seed=seed, cluster=cluster, hand_out=hand_out)
            manifest = stages.run_stage(stage, out, display=display, replace=fresh)
    summary.print_draft(display.console, manifest)
    click.echo(str(out))


@main.group()
def serve() -> None:
    """Serving bundles: write, check, start."""


@serve.command("bundle")
@click.option("--target", type=click.Path(path_type=Path), required=True, help="The quantized checkpoint.")
@click.option("--draft", type=click.Path(path_type=Path), help="The draft; without one nothing is speculated.")
@click.option("--report", "report_dir", type=click.Path(path_type=Path), help="The evaluation of the target.")
@click.option(
    "--bench", "bench_dir", type=click.Path(path_type=Path),
    help="A bench of a bundle of these two: its numbers of draft tokens, as measured at each load.",
)  # fmt: skip
@_out
@click.option("--served-model-name", help="The name that clients ask for.")
@click.option("--max-model-len", type=click.IntRange(1), help="Longest prompt and answer together, in tokens.")
@click.option("--max-num-seqs", type=click.IntRange(1), default=32, show_default=True)
@click.option("--max-num-batched-tokens", type=click.IntRange(1), default=2048, show_default=True)
@click.option("--gpu-memory-utilization", type=click.FloatRange(0, 1), default=0.92, show_default=True)
@click.option("--tensor-parallel-size", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--kv-cache-dtype", default="auto", show_default=True,
    help="As vLLM's. auto: fp8 where the target brings scales, else 16 bits.",
)  # fmt: skip
@click.option(
    "--kv-cache-skip-layers", callback=option_values.numbers, metavar="LAYER,...",
    help="Layers whose KV cache keeps 16 bits, instead of those that the report would leave so.",
)  # fmt: skip
@click.option(
    "--uncalibrated-kv-cache", is_flag=True, default=None,
    help="Allow --kv-cache-dtype fp8 for a target without scales: at 1.0.",
)  # fmt: skip
@click.option("--prefix-caching/--no-prefix-caching", default=True, show_default=True)
@click.option(
    "--speculate", type=click.Choice(["auto", "always", "never"]), default="auto", show_default=True,
    help="auto: where the draft's plan is sure that it pays at every load; without a plan always.",
)  # fmt: skip
@click.option("--speculative-tokens", type=click.IntRange(1), help="Instead of the plan's; without a plan 4.")
@click.option(
    "--replicas", type=click.IntRange(1), default=2, show_default=True, help="Of vLLM, in compose.yaml and k8s/."
)
@click.option("--gpus-per-node", type=click.IntRange(1), default=8, show_default=True, help="Of the cluster, for k8s/.")
@click.option(
    "--router", type=click.Choice(["least_load", "cache_aware"]), default="least_load", show_default=True,
    help="Who gets a request: the replica with the freest KV cache, or first the one that knows its beginning.",
)  # fmt: skip
@_fresh
@_friendly
def serve_bundle(
    target: Path, draft: Path | None, report_dir: Path | None, bench_dir: Path | None, out: Path, fresh: bool,
    **settings: Any,
) -> None:  # fmt: skip
    """A directory with target, draft, flags and evidence that `vllm serve --config` serves.

    \b
    Example:
      quantkit serve bundle --target llama-w4 --draft draft --report report --out bundle
      quantkit serve bundle --target llama-w4 --draft draft --bench bench --out tuned
    """
    from quantkit import recipe, stages, summary

    given = {name: value for name, value in settings.items() if value is not None}
    checked = recipe.check(recipe.Serve, given, where="serve bundle")
    stage = stages.bundle(target, draft=draft, report_dir=report_dir, settings=checked, bench_dir=bench_dir)
    manifest = stages.run_stage(stage, out, display=_display(), replace=fresh)
    for warning in manifest.results["warnings"]:
        click.secho(f"warning: {warning}", fg="yellow", err=True)
    for name, value in summary.speculation_rows(manifest.results):
        click.echo(f"{name}: {value}", err=True)
    click.echo(str(out))


_key = click.Path(path_type=Path)
_public_key = click.option("--public-key", type=_key, help="Whose signature it must carry (quantkit[sign]).")


@serve.command("check")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--start", is_flag=True, help="Have vLLM load it, read back the KV scales it divides by, and end it.")
@_public_key
@_friendly
def serve_check(bundle: Path, start: bool, public_key: Path | None) -> None:
    """Digests, tokenizers, signature, and whether the installed vLLM accepts the very flags of BUNDLE; exit 2 when not.

    \b
    Example:
      quantkit serve check runs/quickstart/bundle
      quantkit serve check runs/quickstart/bundle --start
      quantkit serve check runs/quickstart/bundle --public-key key.pub
    """
    from rich.console import Console

    from quantkit import summary
    from quantkit.serve.check import check

    checks = check(bundle, start=start, public_key=public_key)
    summary.print_checks(Console(), checks)
    if not all(one.passed for one in checks):
        raise QuantkitError(f"{bundle} must not be served as it is")


@serve.command("sign")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--private-key", type=_key, required=True,
    help="PEM, elliptic curve P-256, P-384 or P-521; the password of an encrypted one: $QUANTKIT_KEY_PASSWORD.",
)  # fmt: skip
@_friendly
def serve_sign(bundle: Path, private_key: Path) -> None:
    """Sign every file of BUNDLE with a key of your own (quantkit[sign]); the signature goes into the bundle.

    \b
    Example:
      quantkit serve sign runs/quickstart/bundle --private-key key.pem
    """
    from quantkit.serve import signing

    click.echo(str(signing.sign(bundle, private_key)))


@serve.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--public-key", type=_key, required=True, help="PEM, of the key that signed it.")
@_friendly
def serve_verify(bundle: Path, public_key: Path) -> None:
    """Whether this key signed BUNDLE, and no file of it was changed, added or removed since; exit 2 when not.

    \b
    Example:
      quantkit serve verify runs/quickstart/bundle --public-key key.pub
    """
    from quantkit.serve import signing

    click.echo(f"{signing.verify(bundle, public_key)} files, each as {public_key} signed it")


@serve.command("up")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--profile", type=click.Choice(["auto", "gpu", "cpu"]), default="auto", show_default=True)
@click.option("--port", type=click.IntRange(1, 65535), help="Instead of the bundle's own.")
@click.option("--log", type=click.Path(path_type=Path), default=Path("quantkit-serve.log"), show_default=True)
@click.option("--probe", is_flag=True, help="Ask it what the bundle promises, print what was seen, and stop.")
@_friendly
def serve_up(bundle: Path, profile: Literal["auto", "gpu", "cpu"], port: int | None, log: Path, probe: bool) -> None:
    """Start BUNDLE with vLLM on 127.0.0.1 of this machine; Ctrl-C stops it.

    \b
    Example:
      quantkit serve up runs/quickstart/bundle
      quantkit serve up runs/quickstart/bundle --probe
    """
    from rich.console import Console

    from quantkit import summary
    from quantkit.serve import prove

    console = Console()
    with console.status("vLLM starts (a minute or two on a CPU)") as status:

        def say(line: str) -> None:
            status.stop()
            console.print(line, highlight=False, soft_wrap=True)

        if not probe:
            prove.stay_up(bundle, profile=profile, port=port, log=log, say=say)
            return
        checks = prove.probe_once(bundle, profile=profile, port=port, log=log)
    summary.print_checks(console, checks)
    if not all(one.passed for one in checks):
        raise QuantkitError(f"{bundle} did not serve what it promises; the server's log is {log}")


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--baseline", type=click.Path(path_type=Path), required=True, help="The FP16 checkpoint that it was made from."
)
@_out
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
@_fresh
@_friendly
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
    display = _display()
    manifest = stages.run_stage(stages.bench(bundle, baseline, settings=checked), out, display=display, replace=fresh)
    summary.print_rows(display.console, "Before and after", summary.bench_rows(manifest.results))
    click.echo(str(out / "bench.html"))


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--gpu", metavar="NAME[:N]", help="h100-80gb:4, my-gpu.yaml, or cpu: this processor, measured.")
@click.option("--context", type=click.IntRange(2), default=4096, show_default=True, help="Tokens of a request, all.")
@click.option("--answer-tokens", type=click.IntRange(1), default=256, show_default=True, help="Those of its answer.")
@click.option("--users", type=click.IntRange(1), default=32, show_default=True, help="Requests at once.")
@click.option(
    "--kv-cache", multiple=True, metavar="TYPE",
    help="auto, fp8, ...; may be repeated. If not given: auto, and fp8 beside it for 4-bit weights.",
)  # fmt: skip
@click.option("--draft", type=click.Path(path_type=Path), help="A draft; one of train-draft brings its acceptance.")
@click.option(
    "--draft-size", type=click.FloatRange(0, 1, min_open=True), help="Or a draft of such a part of the model."
)
@click.option("--acceptance", type=click.FloatRange(0, 1), help="What if each draft token were accepted so often?")
@click.option(
    "--draft-tokens", type=click.IntRange(1), help="Draft tokens a step; if not given 5, or what was counted."
)
@click.option("--price-per-hour", type=click.FloatRange(0, min_open=True), help="Dollars for an hour of one GPU.")
@click.option("--ttft-limit", "ttft_limit_s", type=click.FloatRange(0, min_open=True), default=2.0, show_default=True,
              help="Seconds to the first token that the limits of the queue keep.")  # fmt: skip
@click.option("--gpu-memory-utilization", "memory_utilization", type=click.FloatRange(0, 1), default=0.92,
              show_default=True)  # fmt: skip
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]),
              help="With --gpu cpu: of activations.  [default: as vLLM would be run on this processor]")  # fmt: skip
@click.option("--save-gpu", type=click.Path(path_type=Path), help="Keep the machine as FILE.yaml, for --gpu.")
@click.option("--json", "as_json", is_flag=True, help="The plan as JSON on standard output, and nothing else.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory for plan.json, plan.md and plan.html.")
@_friendly
def plan(
    checkpoint: Path, gpu: str | None, save_gpu: Path | None, as_json: bool, out: Path | None, **asked: Any
) -> None:
    """What of CHECKPOINT fits on a GPU, as stored and in 4 bits: cache, users, limits, seconds a token, cost.

    Estimates from config.json and safetensors headers; CHECKPOINT may be a folder with config.json alone, or a recipe
    with a `plan` section, whose claims are then judged.

    \b
    Examples:
      quantkit plan Llama-3.1-8B-Instruct --gpu h100-80gb --context 4096 --users 32
      quantkit plan Llama-3.3-70B --gpu a100-80gb:4 --price-per-hour 2.5 --acceptance 0.7 --draft-size 0.02
      quantkit plan llama-w4 --draft draft --gpu my-gpu.yaml --out plan
      quantkit plan SmolLM2-135M --gpu cpu --save-gpu here.yaml
      quantkit plan recipes/llama-2-70b-h100.yaml
    """
    from quantkit import summary
    from quantkit.capacity import subject

    given = {name: value for name, value in asked.items() if _was_given(name)}
    answer = subject.plan(checkpoint, gpu=gpu, given=given, save_gpu=save_gpu)
    if out is not None:
        from quantkit.capacity import page

        page.write(out, *answer)
    if as_json:
        click.echo(answer.plan.model_dump_json(indent=2))
        return
    summary.print_plan(*answer)
    if out is not None:
        click.echo(str(out / "plan.html"))


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@_friendly
def inspect(path: Path) -> None:
    """What PATH is (a checkpoint, an artefact, a bundle), in a screenful.

    \b
    Example:
      quantkit inspect runs/quickstart/target
    """
    from quantkit import summary

    summary.print_path(path)


if __name__ == "__main__":
    main()
