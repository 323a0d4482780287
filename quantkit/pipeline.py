"""All stages of a recipe in order: what is fresh is skipped, what was interrupted goes on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from quantkit import artifacts, gguf, stages, text, vllm_environment
from quantkit.artifacts import Manifest
from quantkit.errors import QuantkitError, raise_all
from quantkit.progress import Display
from quantkit.recipe import Recipe
from quantkit.stages import Stage

_NAME_FILE = "recipe-name.txt"


class Step(NamedTuple):
    """A stage and the folder of the run that it fills."""

    folder: str
    stage: Stage


def plan(recipe: Recipe, out: Path, *, cluster: str | None = None) -> list[Step]:
    """The stages of a recipe, in order; those of a run in `out`. vLLM answers on `cluster`, or where the recipe says.

    Raises:
        QuantkitError: everything that can be seen to be wrong before any work.
    """
    _preflight(recipe, out)
    if cluster is None and recipe.cluster is not None:
        cluster = recipe.cluster.address
    steps = []
    if gguf.is_gguf(recipe.model):
        checkpoint = out / "checkpoint"
        steps.append(Step("checkpoint", stages.import_checkpoint(gguf.find_gguf(recipe.model))))
    else:
        checkpoint = Path(recipe.model)
    target, report, draft, bundle = out / "target", out / "report", out / "draft", out / "bundle"
    steps += [
        Step("target", stages.quantize(
            checkpoint, calibration=recipe.calibration, settings=recipe.quantize, seed=recipe.seed,
            cluster=cluster)),
        Step("report", stages.evaluate(
            [target], checkpoint, settings=recipe.evaluate, seed=recipe.seed, note=recipe.note, cluster=cluster)),
        Step("draft", stages.train_draft(
            target, settings=recipe.draft, seed=recipe.seed, cluster=cluster)),
        Step("bundle", stages.bundle(target, draft=draft, report_dir=report, settings=recipe.serve)),
        Step("served", stages.serve_once(bundle)),
    ]  # fmt: skip
    if recipe.bench is not None:
        steps.append(Step("bench", stages.bench(bundle, checkpoint, settings=recipe.bench)))
    return steps


def run(
    recipe: Recipe, out: Path, *, display: Display, fresh: bool = False, cluster: str | None = None
) -> dict[str, Manifest]:
    """Run a recipe into `out`; the manifests by folder.

    Raises:
        QuantkitError: wrong input, a failed gate, or `out` holds the run of another recipe.
    """
    steps = plan(recipe, out, cluster=cluster)
    with _claimed(recipe, out):
        if fresh:
            for step in steps:
                artifacts.discard(out / step.folder)
        return {
            step.folder: stages.run_stage(step.stage, out / step.folder, display=display, replace=True)
            for step in steps
        }


def states(recipe: Recipe, out: Path) -> list[tuple[str, str]]:
    """What `run` would do with each stage: fresh, resumes, runs; nothing is written."""
    found = []
    stale = False
    for step in plan(recipe, out):
        directory = out / step.folder
        missing = [path for path in step.stage.inputs.values() if not path.exists()]
        stale = stale or bool(missing) or not artifacts.is_fresh(directory, step.stage.key()[0])
        resumes = (directory / artifacts.PARTIAL_NAME / "key").is_file()
        found.append((step.folder, "fresh" if not stale else "resumes" if resumes else "runs"))
    return found


def _preflight(recipe: Recipe, out: Path) -> None:
    """What can be refused before any work is, all at once."""
    problems = []
    if out.is_file():
        problems.append(f"{out} is a file: give an output directory")
    checks: list[Callable[[], object]] = [
        lambda: gguf.find_gguf(recipe.model) if gguf.is_gguf(recipe.model) else _directory(recipe.model),
        lambda: text.refuse_shared_text(recipe.calibration.text, recipe.evaluate.text),
        lambda: text.describe([recipe.draft.prompts]),
        lambda: [text.self_prompts(source) for source in (recipe.draft.prompts, *recipe.calibration.text)],
        lambda: _directory(recipe.draft.init) if recipe.draft.init else None,
    ]
    for check in checks:
        try:
            check()
        except QuantkitError as error:
            problems.append(str(error))
    if vllm_environment.distribution() is None:
        problems.append(f"vLLM is not installed: {vllm_environment.INSTALL_HINT}")
    problems += stages.engine_problems(recipe.quantize)
    raise_all(problems)


def _directory(path: str) -> None:
    if not Path(path).is_dir():
        raise QuantkitError(
            f"{path} is not a directory: give a checkpoint directory, a .gguf file or gguf:PACKAGE/FILE"
        )


@contextmanager
def _claimed(recipe: Recipe, out: Path) -> Iterator[None]:
    """Hold the folder for this run alone; refuse one that holds another recipe's run, or files that no run wrote."""
    path = out / _NAME_FILE
    if not path.is_file() and out.is_dir() and any(out.iterdir()):
        raise QuantkitError(f"{out} holds files that no run wrote: choose an empty --out")
    with artifacts.locked(path, what=out) as file:
        file.seek(0)
        name = file.read().strip()
        if name and name != recipe.name:
            raise QuantkitError(f"{out} holds a run of the recipe {name!r}, not {recipe.name!r}: choose another --out")
        if not name:  # new, or killed before it was written
            file.write(recipe.name + "\n")
            file.flush()
        yield
