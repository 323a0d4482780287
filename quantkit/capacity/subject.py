"""What is planned, on what: a checkpoint, a folder with config.json alone, or a recipe; and what was asked besides."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from quantkit.capacity import claims, duration, machines, planning, weights
from quantkit.capacity.claims import Judged
from quantkit.capacity.machines import Gpu
from quantkit.capacity.planning import Draft, Plan, Question
from quantkit.capacity.weights import Model
from quantkit.errors import QuantkitError
from quantkit.recipe import Recipe, check, load_recipe

_OF_QUESTION = {"kv_cache": "kv_caches"}


class Answer(NamedTuple):
    """A plan, and what the claims of a recipe came to."""

    plan: Plan
    judged: list[Judged]


def plan(path: Path, *, gpu: str | None, given: Mapping[str, Any], save_gpu: Path | None = None) -> Answer:
    """Plan what lies at `path`; `given` are the options that the user wrote, which go before what a recipe says.

    Raises:
        QuantkitError: a file or a name is wrong, options contradict each other, or nothing fits.
    """
    model, recipe = _model(path)
    section = recipe.plan if recipe else None
    asked = (section.model_dump(exclude={"gpu", "claims", "architecture"}) if section else {}) | dict(given)
    name = gpu or (section.gpu if section else None)
    if name is None:
        raise QuantkitError(f"on which machine should {path} be planned? Give --gpu h100-80gb, FILE.yaml or cpu")
    gpu_name, gpus = machines.asked(name)
    draft = _draft(model, asked.pop("draft", None), asked.pop("draft_size", None))
    values = {_OF_QUESTION.get(key, key): value for key, value in asked.items()} | {"gpus": gpus}
    found = _machine(gpu_name, gpus, model, values.get("dtype"))
    if found.measured is not None and "dtype" not in values:
        values["dtype"] = next(iter(found.measured.products))
    question = check(Question, values, where="plan")
    if save_gpu is not None:
        machines.save(found, save_gpu)
    made = planning.make(model, gpu_name, found, question, draft, duration.work(recipe))
    judged = claims.judge(made, model, section.claims) if section and section.claims else []
    return Answer(made, judged)


def _machine(name: str, gpus: int, model: Model, dtype: str | None) -> Gpu:
    if name != machines.CPU:
        return machines.find(name)
    if gpus > 1:
        raise QuantkitError(f"--gpu cpu:{gpus}: this machine is one processor; leave the number out")
    from quantkit import hardware
    from quantkit.capacity import measure  # with torch, which takes seconds to import

    served = "float32" if hardware.lacks_avx512() else "bfloat16"  # as `serve up` has vLLM run it
    return measure.processor(model.arch, dtype=dtype or served)


def _model(path: Path) -> tuple[Model, Recipe | None]:
    if path.suffix not in (".yaml", ".yml"):
        if not path.is_dir():
            raise QuantkitError(f"{path} is no folder: give a checkpoint, a folder with its config.json, or a recipe")
        return weights.open_model(path), None
    recipe = load_recipe(path)
    section = recipe.plan
    if (Path(recipe.model) / "config.json").is_file():
        return weights.open_model(Path(recipe.model)), recipe
    if section is None or not section.architecture:
        raise QuantkitError(
            f"{path}: its model {recipe.model} is not there, and the recipe has no plan.architecture: give a "
            "checkpoint, or write the keys of its config.json there"
        )
    return weights.described(recipe.name, section.architecture), recipe


def _draft(model: Model, path: Path | None, size: float | None) -> Draft | None:
    if path is not None:
        return planning.real_draft(path)
    return None if size is None else planning.draft_of_size(model, size)
