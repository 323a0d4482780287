"""Fitting layers: what is left is less, on texts that taught nothing too, and the cheapest way is found."""

import itertools
from pathlib import Path

import pytest
import torch

from quantkit.checkpoint import open_checkpoint
from quantkit.conversations import Exchange
from quantkit.draft import fit, initialize, teacher, train
from quantkit.progress import silent


@pytest.mark.parametrize("keep", [1, 2, 3, 5, 7])
def test_the_way_whose_errors_add_up_to_least_is_found(keep: int) -> None:
    """Against all ways, tried one by one."""
    layers, generator = 7, torch.Generator().manual_seed(keep)
    errors = {
        (begin, end): float(torch.rand((), generator=generator)) * (end - begin - 1)
        for begin in range(layers)
        for end in range(begin + 1, layers + 1)
    }

    def cost(kept: tuple[int, ...]) -> float:
        return sum(errors[step] for step in itertools.pairwise([*kept, layers]))

    ways = [(0, *rest) for rest in itertools.combinations(range(1, layers), keep - 1)]
    assert cost(tuple(fit._shortest(errors, layers, keep))) == pytest.approx(min(map(cost, ways)))


@pytest.fixture(scope="module")
def written(make_llama, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:  # type: ignore[no-untyped-def]
    """A target of six mild layers, and random texts."""
    path = make_llama(tmp_path_factory.mktemp("six") / "model", layers=6, initializer_range=0.1)
    generator = torch.Generator().manual_seed(3)
    return path, [[0, *torch.randint(4, 320, (20 + n % 9,), generator=generator).tolist()] for n in range(120)]


def _agreement(target: Path, draft: Path, texts: list[list[int]]) -> float:
    """Mean over positions of sum min(p, q) on other texts."""
    models = [train.build_model(open_checkpoint(path), dtype=torch.float32) for path in (target, draft)]
    found = []
    for text in texts:
        with torch.no_grad():
            p, q = (model(input_ids=torch.tensor([text])).logits[0].softmax(-1) for model in models)
        found.append(float(torch.minimum(p, q).sum(-1).mean()))
    return sum(found) / len(found)


def test_fitted_layers_stand_for_those_left_out(written: tuple[Path, list[list[int]]], tmp_path: Path) -> None:
    path, texts = written
    target = open_checkpoint(path)
    kept = fit.choose(target, texts[:100], 3, device="cpu", report=silent)
    assert kept[0] == 0 and kept == sorted(set(kept)) and len(kept) == 3
    config, weights = initialize.from_layers(target, kept)
    changed = fit.fitted(target, kept, texts[:100], device="cpu", report=silent)
    moved = {name for name, tensor in changed.items() if not torch.equal(tensor, weights[name])}
    assert moved and moved <= {f"model.layers.{place}.mlp.down_proj.weight" for place in range(3)}
    for name, tensors in (("as-they-were", weights), ("fitted", weights | changed)):
        initialize.write_draft(tmp_path / name, config, tensors, companions=path)
    before, after = (_agreement(path, tmp_path / name, texts[100:]) for name in ("as-they-were", "fitted"))
    assert after > before + 0.02


def test_a_layer_before_the_next_one_has_nothing_to_stand_for(written: tuple[Path, list[list[int]]]) -> None:
    """All layers kept: the streams are the same, and least squares find nothing to add."""
    path, texts = written
    target = open_checkpoint(path)
    changed = fit.fitted(target, range(6), texts[:16], device="cpu", report=silent)
    for index in range(6):
        for name, tensor in target.layer(index).items():
            assert torch.allclose(changed[f"model.layers.{index}.{name}"], tensor, atol=1e-4), (index, name)


def test_a_layer_that_changes_nothing_is_left_out(deep_llama: Path, exchanges: list[Exchange]) -> None:
    texts = [exchange.prompt + exchange.answer for exchange in exchanges]
    assert fit.choose(open_checkpoint(deep_llama), texts, 3, device="cpu", report=silent) == [0, 2, 3]


def test_a_teacher_who_says_nothing_has_the_targets_head(deep_llama: Path) -> None:
    target = open_checkpoint(deep_llama)
    assert torch.equal(teacher.silent(target).head_VC, target.outer()["lm_head.weight"])
