"""Means, drift and their intervals against simulations; every number from the definition."""

import math

import pytest
import torch

from quantkit.evaluate.perplexity import drift, mean, perplexity


def test_drift_from_the_definition() -> None:
    reference, candidate = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.5, 2.0, 3.0, 4.5])
    found = drift(reference, candidate, torch.tensor([0, 0, 1, 1]))
    assert found.value == pytest.approx(perplexity(candidate) / perplexity(reference) - 1)
    assert perplexity(reference) == pytest.approx(math.exp(2.5)) and found.sequences == 2
    assert found.standard_error == pytest.approx(0, abs=1e-12)  # both sequences drift by the same


def _sequences(generator: torch.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and sequence numbers of as many sequences, of very different lengths, each with a level of its own."""
    sizes = torch.randint(5, 60, (count,), generator=generator)
    number_N = torch.repeat_interleave(torch.arange(count), sizes)
    level_S = 0.08 + 0.05 * torch.randn(count, generator=generator)
    return level_S[number_N] + 0.01 * torch.randn(len(number_N), generator=generator), number_N


def test_the_interval_holds_the_true_mean_in_95_of_100_cases() -> None:
    generator = torch.Generator().manual_seed(0)
    found = [mean(*_sequences(generator, 12)) for _ in range(1500)]
    inside = [each.interval is not None and each.interval[0] < 0.08 < each.interval[1] for each in found]
    assert sum(inside) / len(inside) == pytest.approx(0.95, abs=0.02)
    spread = torch.tensor([each.value for each in found]).std()
    stated = torch.tensor([each.standard_error for each in found]).mean()
    assert float(stated / spread) == pytest.approx(1, abs=0.08)


def test_sequences_without_tokens_do_not_count() -> None:
    found = mean(torch.tensor([1.0, 3.0]), torch.tensor([0, 4]))
    assert found.value == 2 and found.sequences == 2


def test_one_sequence_has_no_interval() -> None:
    found = mean(torch.ones(4), torch.zeros(4, dtype=torch.int64))
    assert math.isnan(found.standard_error) and found.interval is None
    assert found.summary() == {"value": 1.0, "standard_error": None, "interval": None}
