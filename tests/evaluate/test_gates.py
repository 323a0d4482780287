"""Gates: yes, no, and not enough data; the profiles in eval/."""

import math

import pytest
import torch

from quantkit.errors import QuantkitError
from quantkit.evaluate import gates
from quantkit.evaluate.gates import Gate
from quantkit.recipe import Limits


def _gate(value: float, interval: tuple[float, float] | None, direction: str = "at most", sequences: int = 16) -> Gate:
    return Gate("perplexity drift", "w4", value, interval, 0.02, direction, "percent", sequences)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.01, 0.02, "passed"), (0.021, 0.03, "failed"), (0.015, 0.021, "undecided")]
)
def test_a_gate_says_what_its_whole_interval_says(low: float, high: float, verdict: str) -> None:
    assert _gate((low + high) / 2, (low, high)).verdict == verdict
    mirrored = Gate("agreement", "w4", -(low + high) / 2, (-high, -low), -0.02, "at least", "percent", 16)
    assert mirrored.verdict == verdict


def test_nan_never_passes_and_one_sequence_never_decides() -> None:
    assert _gate(math.nan, None).verdict == "failed"
    assert _gate(0.001, None).verdict == "undecided"
    assert "a single sequence does not tell" in _gate(0.001, None).sentence()


def test_an_undecided_gate_says_how_much_would_settle_it() -> None:
    """16 sequences reach 0.010 to either side of 0.015; the limit is 0.005 away: half the reach, four times as many."""
    gate = _gate(0.015, (0.005, 0.025))
    assert gate.verdict == "undecided" and gate.missing == 48
    assert gate.sentence().endswith("; about 48 more would settle it")
    assert _gate(0.02, (0.01, 0.03)).missing is None
    assert "no number of them would settle it" in _gate(0.02, (0.01, 0.03)).sentence()


def test_profiles_hold_limits_from_lax_to_strict() -> None:
    small, usual, strict = (gates.profile(name) for name in ("small-model", "default", "strict"))
    for name in ("perplexity_drift", "kl", "served_gap"):
        assert getattr(small, name) >= getattr(usual, name) >= getattr(strict, name) > 0
    for name in ("top1_agreement", "task_recovery"):
        assert getattr(small, name) <= getattr(usual, name) <= getattr(strict, name) < 1


def test_a_profile_that_is_none_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(QuantkitError, match="profile 'lax': choose default, none, small-model, strict"):
        gates.profile("lax")
    mine = tmp_path / "mine.yaml"
    mine.write_text("perplexity_drif: 2%\n")
    with pytest.raises(QuantkitError, match="perplexity_drift"):
        gates.profile(str(mine))


def _found(value: float, reach: float = 0.001) -> dict[str, object]:
    return {"value": value, "interval": [value - reach, value + reach]}


def test_every_limit_is_held_against_what_was_measured() -> None:
    on = {"drift": _found(0.01), "kl_nats": _found(0.03), "top1_agreement": _found(0.9), "sequences": 9}
    candidate = {
        "name": "w4", "kv_cache": "auto", "on": {"text": on, "chat": on},
        "served": {"text": {"gap_nats": _found(-0.05), "sequences": 9}},
        "tasks": [{"task": "arc", "recovery": 0.9, "standard_error": 0.01, "samples": 100}],
        "acceptance": {"accepted_length": 2.5, "per_position": [0.8, 0.5, 0.2], "drafts": 400},
    }  # fmt: skip
    limits = Limits(
        perplexity_drift=0.02, kl=0.02, top1_agreement=0.88, served_gap=0.02, task_recovery=0.97, accepted_length=2
    )
    found = {gate.name: gate.verdict for gate in gates.judge(candidate, limits)}
    assert found == {
        "perplexity drift on text": "passed", "KL on text": "failed", "top-1 agreement on text": "passed",
        "KL on chat": "failed", "top-1 agreement on chat": "passed",
        "vLLM's nll on text, apart from the weights'": "failed", "recovery of arc": "failed",
        "the draft's accepted length": "passed",
    }  # fmt: skip
    assert gates.overall(gates.judge(candidate, limits)) == "failed"
    length = gates.judge(candidate, limits)[-1]
    accepted = torch.tensor([0] * 80 + [1] * 120 + [2] * 120 + [3] * 80, dtype=torch.float64)  # of 400 drafts
    assert length.interval == pytest.approx(
        [2.5 + side * 1.96 * float(accepted.std(correction=0)) / 20 for side in (-1, 1)]
    )
    assert gates.judge(candidate, Limits()) == [] and gates.overall([]) == "passed"
