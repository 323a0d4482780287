"""`quantkit serve`: bundles, written, checked, signed and started."""

from pathlib import Path
from typing import Any, Literal

import click

from quantkit.cli import common, option_values
from quantkit.errors import QuantkitError


@click.group()
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
@common.out
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
@common.fresh
@common.friendly
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
    manifest = stages.run_stage(stage, out, display=common.display(), replace=fresh)
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
@common.friendly
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
@common.friendly
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
@common.friendly
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
@common.friendly
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
