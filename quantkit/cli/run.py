"""`quantkit run` and `quantkit inspect`: a whole recipe, and what a path holds."""

from pathlib import Path

import click

from quantkit.cli import common


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@common.out
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting: quantize.group_size=32."
)
@click.option("--fresh", is_flag=True, help="Do every stage again.")
@click.option("--dry-run", is_flag=True, help="Say what each stage would do, and write nothing.")
@common.on
@common.friendly
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
    display = common.display()
    manifests = pipeline.run(checked, out, display=display, fresh=fresh, cluster=cluster)
    summary.print_run(display.console, out, manifests)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@common.friendly
def inspect(path: Path) -> None:
    """What PATH is (a checkpoint, an artefact, a bundle), in a screenful.

    \b
    Example:
      quantkit inspect runs/quickstart/target
    """
    from quantkit import summary

    summary.print_path(path)
