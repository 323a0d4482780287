"""What a stage is, how it runs, and what each looks at before it does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from quantkit import artifacts, vllm_environment
from quantkit.artifacts import Kind, Manifest, Work
from quantkit.progress import Display, Report


class Stage(NamedTuple):
    """A stage before it runs. `inputs` are digested and `settings` recorded; together they name the work."""

    title: str
    kind: Kind
    inputs: dict[str, Path]
    settings: dict[str, Any]
    make: Callable[[Work, Report], None]
    verdict: Callable[[Manifest], None] = lambda manifest: None  # raises when the result must stop the run
    look: Callable[[], object] = lambda: None  # raises when an input is not whole, before anything of `out` is touched

    def key(self) -> tuple[str, dict[str, str]]:
        """The name of the work, and the digests of its inputs."""
        digests = {name: artifacts.digest(path) for name, path in self.inputs.items()}
        return artifacts.work_key(self.kind, digests, self.settings), digests


def run_stage(stage: Stage, out: Path, *, display: Display, replace: bool = False) -> Manifest:
    """Run a stage into `out`, or say that what is there is fresh.

    Raises:
        QuantkitError: wrong input, `out` holds another run, or the stage's verdict.
    """
    key, digests = stage.key()
    if artifacts.is_fresh(out, key):
        display.console.print(f"[green]fresh[/] [bold]{stage.title}[/] ({out})", highlight=False)
        artifacts.tidy(out)
    else:
        stage.look()
        with (
            display.stage(stage.title) as report,
            artifacts.making(out, stage.kind, inputs=digests, settings=stage.settings, replace=replace) as work,
        ):
            stage.make(work, report)
    manifest = artifacts.read_manifest(out)
    assert manifest is not None
    stage.verdict(manifest)
    return manifest


def open_inputs(*paths: Path, quantized: bool | None = None) -> None:
    """Raise what is wrong with checkpoints and their tokenizers; `quantized`: what they must be."""
    from quantkit import checkpoint as checkpoints
    from quantkit import tokens

    for path in paths:
        checkpoints.open_checkpoint(path, quantized=quantized)
        tokens.load_tokenizer(path)


def check_cluster(cluster: str | None) -> None:
    """Raise what is missing here for vLLM to answer on a Ray cluster, where one is asked for."""
    if cluster is not None:
        vllm_environment.check_ray()
