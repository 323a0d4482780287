"""Recipes: unknown keys with the nearest right name, overrides, percentages, and that those shipped are valid."""

from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from quantkit.cli import option_values
from quantkit.errors import QuantkitError
from quantkit.recipe import Recipe, load_recipe

CONTEXT, OPTION = click.Context(click.Command("run")), click.Option(["--on"])
RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
MINIMAL: dict[str, Any] = {
    "name": "tiny",
    "model": "somewhere",
    "calibration": {"text": ["a.txt"]},
    "draft": {"keep_layers": 2},
    "evaluate": {"text": ["b.txt"], "max_perplexity_drift": "2.5%", "chat": False},
}


def _load(tmp_path: Path, data: dict[str, Any], *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    return load_recipe(path, overrides)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert load_recipe(path).name == path.stem


def test_percentages_become_fractions(tmp_path: Path) -> None:
    assert _load(tmp_path, MINIMAL).evaluate.max_perplexity_drift == 0.025
    assert _load(tmp_path, MINIMAL).evaluate.chat == "no"


def test_an_unknown_key_is_named_with_the_nearest_right_one(tmp_path: Path) -> None:
    wrong = MINIMAL | {"quantize": {"groupsize": 64}}
    with pytest.raises(QuantkitError, match=r"quantize\.groupsize is no setting; did you mean group_size"):
        _load(tmp_path, wrong)


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    wrong = MINIMAL | {"quantize": {"bits": 5}, "draft": {"keep_layers": 0}}
    with pytest.raises(QuantkitError, match=r"(?s)2 problems.*quantize\.bits.*draft\.keep_layers"):
        _load(tmp_path, wrong)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("{average_bits: 5}", "bits auto and average_bits go together"),
        ("{bits: auto}", "bits auto and average_bits go together"),
        ("{bit_choices: [4, 16]}", "bit_choices is for bits auto"),
        ("{bits: auto, average_bits: 5, bit_choices: [8, 16]}", "bit_choices is 4 and what"),
        ("{bits: auto, average_bits: 5, bit_choices: [4]}", "bit_choices is 4 and what"),
        ("{bits: auto, average_bits: 5, bit_choices: [4, 5]}", "bit_choices.1"),
    ],
)
def test_bits_auto_has_a_budget_and_a_choice(given: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(QuantkitError, match=reason):
        _load(tmp_path, MINIMAL, f"quantize={given}")
    chosen = _load(tmp_path, MINIMAL, "quantize={bits: auto, average_bits: 5, bit_choices: [4, 16]}").quantize
    assert chosen.bit_choices == (4, 16)


@pytest.mark.parametrize(
    ("given", "address"),
    [("ray://10.0.0.1:6379", "10.0.0.1:6379"), ("10.0.0.1:6379", "10.0.0.1:6379"), ("auto", "auto")],
)
def test_a_cluster_is_named_as_by_the_command_line(given: str, address: str, tmp_path: Path) -> None:
    assert _load(tmp_path, MINIMAL).cluster is None
    cluster = _load(tmp_path, MINIMAL, f"cluster.address={given}").cluster
    assert cluster is not None and cluster.address == address
    assert option_values.cluster(CONTEXT, OPTION, given) == address
    assert _load(tmp_path, MINIMAL | {"cluster": {"address": given}}, "cluster=null").cluster is None


@pytest.mark.parametrize("given", ["10.0.0.1", "http://10.0.0.1:6379", "ray://:6379", "ray://10.0.0.1:port"])
def test_a_cluster_without_an_address_is_refused(given: str, tmp_path: Path) -> None:
    with pytest.raises(QuantkitError, match=r"cluster\.address: .*write it as ray://HOST:PORT"):
        _load(tmp_path, MINIMAL | {"cluster": {"address": given}})
    with pytest.raises(click.BadParameter, match=r"write it as ray://HOST:PORT"):
        option_values.cluster(CONTEXT, OPTION, given)


@pytest.mark.parametrize("draft", [{}, {"keep_layers": 2, "init": "small"}])
def test_a_draft_has_exactly_one_origin(tmp_path: Path, draft: dict[str, Any]) -> None:
    with pytest.raises(QuantkitError, match="exactly one of init"):
        _load(tmp_path, MINIMAL | {"draft": draft})


def test_a_head_has_no_origin_and_takes_nothing_of_a_draft_model(tmp_path: Path) -> None:
    assert _load(tmp_path, MINIMAL).draft.kind == "draft_model"
    head = _load(tmp_path, MINIMAL | {"draft": {"kind": "eagle3", "epochs": 5}}).draft
    assert (head.kind, head.init, head.keep_layers, head.epochs) == ("eagle3", None, None, 5)
    wrong = {"kind": "eagle3", "init": "small", "on_policy": 0.5, "quantize": "no"}
    with pytest.raises(QuantkitError, match="kind eagle3 takes no init, on_policy, quantize: leave out"):
        _load(tmp_path, MINIMAL | {"draft": wrong})


def test_overrides_reach_into_sections(tmp_path: Path) -> None:
    recipe = _load(tmp_path, MINIMAL, "quantize.group_size=32", "calibration.text=[c.txt, d.txt]", "seed=7")
    assert recipe.quantize.group_size == 32 and recipe.calibration.text == ("c.txt", "d.txt") and recipe.seed == 7


@pytest.mark.parametrize("override", ["quantize.group_size", "=3", "name.first=x", "seed=[1"])
def test_a_malformed_override_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(QuantkitError, match="--set"):
        _load(tmp_path, MINIMAL, override)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "", "!!python/object/apply:os.system ['true']"])
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(QuantkitError):
        load_recipe(path)


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantkitError, match="is not there"):
        load_recipe(tmp_path / "none.yaml")
