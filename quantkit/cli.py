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
            if error.errno not in _DISK_ERRORS:
                raise
            click.secho(
                f"error: {error.filename or ''} {_DISK_ERRORS[error.errno]}".replace("  ", " "), fg="red", err=True
            )
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
@_friendly
def run(recipe: Path, out: Path, overrides: tuple[str, ...], fresh: bool, dry_run: bool) -> None:
    """All stages of RECIPE, in order; skips what is fresh, resumes what was interrupted.

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
    manifests = pipeline.run(checked, out, display=display, fresh=fresh)
    summary.print_run(display.console, out, manifests)


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@_out
@click.option(
    "--effort",
    type=click.Choice(["fast", "default", "high"]),
    default="default",
    show_default=True,
    help="fast: GPTQ. default: scaled inputs, the curvature of both sides, drift correction. high: as default, on more "
    "text, which CHECKPOINT writes.",
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
    "--calibration",
    "text",
    multiple=True,
    required=True,
    help="Text source, or self:N: chats that CHECKPOINT writes. May be repeated.",
)
@click.option("--samples", type=click.IntRange(1), default=128, show_default=True)
@click.option("--length", type=click.IntRange(16), default=2048, show_default=True, help="Tokens a sample.")
@click.option(
    "--continuations", type=click.IntRange(0), help="Instead of the effort's (high: 3): windows that CHECKPOINT writes "
    "for each sample, going on from a piece of it.",
)  # fmt: skip
@click.option(
    "--memory-budget", callback=option_values.size, metavar="SIZE",
    help="Refuse to begin where more is needed: 16GiB. Hidden states lie in files and do not count.",
)  # fmt: skip
@_device
@_seed
@_fresh
@_friendly
def quantize(
    checkpoint: Path, out: Path, text: tuple[str, ...], samples: int, length: int, memory_budget: int | None,
    device: str, seed: int, fresh: bool, format_: str | None, bits: str, **asked: Any,
) -> None:  # fmt: skip
    """4-bit weights for CHECKPOINT, stored so that vLLM loads them.

    \b
    Example:
      quantkit quantize Llama-3.1-8B-Instruct --out llama-w4 --calibration prose.txt --calibration self:200
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
                memory_budget=memory_budget, hand_out=hand_out,
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
@click.argument("candidate", type=click.Path(path_type=Path))
@click.option(
    "--reference", type=click.Path(path_type=Path), required=True, help="The FP16 checkpoint it was made from."
)
@_out
@click.option("--text", multiple=True, required=True, help="Held-out text source; may be repeated.")
@click.option("--samples", type=click.IntRange(1), default=32, show_default=True)
@click.option("--length", type=click.IntRange(16), default=2048, show_default=True, help="Tokens a window.")
@click.option("--max-perplexity-drift", default="2%", show_default=True, help="Over it, exit 8.")
@_device
@_seed
@_fresh
@_friendly
def evaluate(
    candidate: Path, reference: Path, out: Path, text: tuple[str, ...], samples: int, length: int,
    max_perplexity_drift: str, device: str, seed: int, fresh: bool,
) -> None:  # fmt: skip
    """Perplexity drift, KL and top-1 agreement of CANDIDATE against its FP16 original; exit 8 when the gate fails.

    \b
    Example:
      quantkit eval llama-w4 --reference Llama-3.1-8B-Instruct --out report --text held-out.txt
    """
    from quantkit import recipe, stages, summary

    settings = recipe.check(
        recipe.Evaluate,
        {"text": text, "samples": samples, "length": length, "max_perplexity_drift": max_perplexity_drift},
        where="eval",
    )
    display = _display()
    stage = stages.evaluate(candidate, reference, settings=settings, seed=seed, device=device)
    try:
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
    "--quantize", type=click.Choice(["no", "fast", "default", "high"]), default="default", show_default=True,
    help="Effort of the draft's own 4-bit weights; kept where the estimated speed-up with them is higher.",
)  # fmt: skip
@_seed
@_fresh
@_friendly
def train_draft(target: Path, out: Path, init: Path | None, seed: int, fresh: bool, **settings: Any) -> None:
    """A draft for TARGET, distilled on the target's own answers; acceptance before and after, by vLLM.

    \b
    Example:
      quantkit train-draft llama-w4 --out draft --keep-layers 8 --prompts self:2000
      quantkit train-draft llama-70b-w4 --out draft --init Llama-3.2-1B-Instruct --prompts chats.jsonl
      quantkit train-draft llama-w4 --out draft --keep-layers 8 --loss forward_kl --temperature 0 --temperature 1
      quantkit train-draft llama-w4 --out head --kind eagle3 --prompts self:2000
      torchrun --nproc-per-node 4 --no-python quantkit train-draft llama-w4 --out draft --keep-layers 8
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
            stage = stages.train_draft(target, settings=checked, seed=seed, hand_out=hand_out)
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
@_out
@click.option("--served-model-name", help="The name that clients ask for.")
@click.option("--max-model-len", type=click.IntRange(1), help="Longest prompt and answer together, in tokens.")
@click.option("--max-num-seqs", type=click.IntRange(1), default=32, show_default=True)
@click.option("--max-num-batched-tokens", type=click.IntRange(1), default=2048, show_default=True)
@click.option("--gpu-memory-utilization", type=click.FloatRange(0, 1), default=0.92, show_default=True)
@click.option("--tensor-parallel-size", type=click.IntRange(1), default=1, show_default=True)
@click.option("--kv-cache-dtype", default="auto", show_default=True, help="auto, fp8, fp8_e4m3 or fp8_e5m2.")
@click.option("--prefix-caching/--no-prefix-caching", default=True, show_default=True)
@click.option(
    "--speculate", type=click.Choice(["auto", "always", "never"]), default="auto", show_default=True,
    help="auto: where the draft's plan is sure that it pays at every load; without a plan always.",
)  # fmt: skip
@click.option("--speculative-tokens", type=click.IntRange(1), help="Instead of the plan's; without a plan 4.")
@_fresh
@_friendly
def serve_bundle(
    target: Path, draft: Path | None, report_dir: Path | None, out: Path, fresh: bool, **settings: Any
) -> None:
    """A directory with target, draft, flags and evidence that `vllm serve --config` serves.

    \b
    Example:
      quantkit serve bundle --target llama-w4 --draft draft --report report --out bundle
    """
    from quantkit import recipe, stages, summary

    given = {name: value for name, value in settings.items() if value is not None}
    checked = recipe.check(recipe.Serve, given, where="serve bundle")
    stage = stages.bundle(target, draft=draft, report_dir=report_dir, settings=checked)
    manifest = stages.run_stage(stage, out, display=_display(), replace=fresh)
    for warning in manifest.results["warnings"]:
        click.secho(f"warning: {warning}", fg="yellow", err=True)
    for name, value in summary.speculation_rows(manifest.results):
        click.echo(f"{name}: {value}", err=True)
    click.echo(str(out))


@serve.command("check")
@click.argument("bundle", type=click.Path(path_type=Path))
@_friendly
def serve_check(bundle: Path) -> None:
    """Digests, tokenizers, and whether the installed vLLM accepts the very flags of BUNDLE; exit 2 when not.

    \b
    Example:
      quantkit serve check runs/quickstart/bundle
    """
    from rich.console import Console

    from quantkit import summary
    from quantkit.serve.check import check

    checks = check(bundle)
    summary.print_checks(Console(), checks)
    if not all(one.passed for one in checks):
        raise QuantkitError(f"{bundle} must not be served as it is")


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
