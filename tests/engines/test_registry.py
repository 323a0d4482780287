"""The table of engines: its pins and workers are there, and what an engine does not take is said all at once."""

from typing import get_args

import click
import pytest

from quantkit import recipe
from quantkit.cli import main
from quantkit.engines import registry
from quantkit.formats import FORMATS


def test_every_engine_has_its_worker_and_its_pins() -> None:
    names = set(registry.EVERY)
    assert {path.stem for path in registry.worker("autoawq").parent.glob("*.py")} == names
    for name, engine in registry.EVERY.items():
        pins = registry.requirements(name).read_text().splitlines()
        assert f"{engine.package}=={engine.version}" in pins
        assert any(line.startswith("torch==") for line in pins) and any(
            line.startswith("setuptools==") for line in pins
        )
        assert all(line.startswith("#") or "==" in line for line in pins), "a closure is pinned whole"


def test_recipe_and_command_line_know_the_same_engines_and_methods() -> None:
    methods = {method for engine in registry.ENGINES.values() for method in engine.methods}
    assert set(get_args(recipe.EngineName)) == {"native", *registry.ENGINES}
    assert set(get_args(recipe.Method)) == methods
    kinds = {method for engine in registry.DRAFT_ENGINES.values() for method in engine.methods}
    assert set(get_args(recipe.Draft.model_fields["kind"].annotation)) == {"draft_model", *kinds}
    engines = main.commands["engines"]
    assert isinstance(engines, click.Group)
    options = {p.name: p for p in main.commands["quantize"].params} | {"install": engines.commands["install"].params[0]}
    choices = {name: options[name].type for name in ("engine", "method", "install")}
    assert all(isinstance(choice, click.Choice) for choice in choices.values())
    found = {name: set(choice.choices) for name, choice in choices.items()}  # type: ignore[attr-defined]
    assert found == {"engine": {"native", *registry.ENGINES}, "method": methods, "install": set(registry.EVERY)}


@pytest.mark.parametrize("name", registry.ENGINES)
def test_all_that_it_says_it_stores_can_be_unpacked(name: str) -> None:
    engine = registry.ENGINES[name]
    for grids in engine.methods.values():
        for stored in set(grids) - {None}:
            assert stored is not None and set(engine.bits) <= set(FORMATS[stored].bits) | {8}


def _problems(name: str, **changes: object) -> list[str]:
    usual = {"method": None, "format": None, "bits": 4, "group_size": 64, "symmetric": False}
    given = {key: value for key, value in changes.items() if key not in usual}
    return registry.problems(name, usual | changes, given)


def test_what_an_engine_takes_is_no_problem() -> None:
    assert not _problems("autoawq") and not _problems("llmcompressor", method="awq+gptq")
    assert not _problems("autogptq", symmetric=True, format="gptq") and not _problems("autoround", format="awq")


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        ("autogptq", {}, "gptq of engine autogptq is not stored with an asymmetric grid: choose symmetric"),
        ("autoawq", {"symmetric": True}, "awq of engine autoawq is not stored with a symmetric grid"),
        ("autoawq", {"method": "gptq"}, "engine autoawq has no method gptq: choose awq"),
        ("llmcompressor", {"format": "awq"}, "stored as compressed-tensors here, not as awq: leave format out"),
        ("autoawq", {"bits": "auto"}, "engine autoawq has no bits auto: choose 4, or native"),
    ],
)  # fmt: skip
def test_what_an_engine_does_not_take_is_said_with_what_to_choose(
    name: str, asked: dict[str, object], said: str
) -> None:
    (found,) = _problems(name, **asked)
    assert said in found


def test_all_problems_at_once() -> None:
    found = _problems("gptqmodel", bits="auto", average_bits=5.0, effort="high", overrides=(), format="awq")
    assert len(found) == 3 and "takes no average_bits, effort, overrides" in found[0]
