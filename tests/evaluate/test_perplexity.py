"""Drift and its standard error against a simulation; every number from the definition."""

import math

import pytest
import torch

from quantkit.evaluate.gates import Gate
from quantkit.evaluate.perplexity import drift, mean_and_error


def test_perplexity_and_drift_from_the_definition() -> None:
    reference, candidate = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.5, 2.0], [3.0, 4.5]])
    found = drift(reference, candidate)
    assert found.reference == pytest.approx(math.exp(2.5)) and found.candidate == pytest.approx(math.exp(2.75))
    assert found.drift == pytest.approx(found.candidate / found.reference - 1)
    assert found.scored_tokens == 4 and found.sequences == 2
    assert found.drift_standard_error == pytest.approx(0, abs=1e-12)  # both sequences drift by the same


def test_the_standard_error_is_that_of_repeated_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(400):
        reference = torch.randn(24, 32, generator=generator) * 2 + 3
        offsets = 0.08 + 0.05 * torch.randn(24, 1, generator=generator)
        found.append(drift(reference, reference + offsets))
    spread = torch.tensor([one.drift for one in found]).std()
    stated = torch.tensor([one.drift_standard_error for one in found]).mean()
    assert float(stated / spread) == pytest.approx(1, abs=0.1)


def test_one_sequence_has_no_standard_error() -> None:
    assert math.isnan(drift(torch.ones(1, 4), torch.ones(1, 4)).drift_standard_error)
    assert math.isnan(mean_and_error(torch.ones(1, 4))[1])


@pytest.mark.parametrize(("value", "passed"), [(0.01, True), (0.02, True), (0.021, False), (math.nan, False)])
def test_a_gate_passes_up_to_its_limit_and_never_on_nan(value: float, passed: bool) -> None:
    assert Gate("perplexity drift", value, 0.02).passed is passed
