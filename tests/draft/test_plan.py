"""The plan of a draft: its formulas against speculation played out, the estimate against a table, seconds by vLLM."""

import random
import statistics
from math import sqrt
from pathlib import Path

import pytest

from quantkit import progress
from quantkit.architecture import Architecture, linear_shapes, read_architecture
from quantkit.capacity import roofline
from quantkit.capacity.roofline import Machine, Reads
from quantkit.draft import plan
from quantkit.draft.acceptance import Acceptance
from quantkit.draft.plan import Costs, Measured, Sweep
from quantkit.offline import Session

RATES = (0.8, 0.7, 0.75, 0.6)  # of each position, given that those before it were accepted; the last goes on for ever
FAST = Machine("any", bytes_per_s=3e12, operations_per_s=1e30)


def _accepted(generator: random.Random, k: int) -> int:
    """How many of k draft tokens the target takes, played out token by token."""
    for place in range(k):
        if generator.random() >= RATES[min(place, len(RATES) - 1)]:
            return place
    return k


def _count(generator: random.Random, k: int, drafts: int) -> Acceptance:
    found = [_accepted(generator, k) for _ in range(drafts)]
    per_position = [sum(length > place for length in found) for place in range(k)]
    return Acceptance(drafts, drafts * k, sum(found), per_position)


def _geometric(rate: float, positions: int = 8, drafts: int = 10**12) -> Acceptance:
    counts = [round(drafts * rate ** (place + 1)) for place in range(positions)]
    return Acceptance(drafts, drafts * positions, sum(counts), counts)


def _costs(plain_s: float, speculative_s: dict[int, float]) -> Costs:
    timed = {k: Measured(seconds, 0.0) for k, seconds in speculative_s.items()}
    return Costs("cpu", "measured", "a machine", 128, {1: Measured(plain_s, 0.0)}, {1: timed})


@pytest.mark.parametrize("k", [1, 3, 4, 7])
def test_speedup_is_that_of_speculation_played_out(k: int) -> None:
    """Acceptance counted at four positions foretells a run with another number of tokens, beyond four too."""
    draft_s, plain_s, verify_s = 0.2, 1.0, 1.0 + 0.1 * k
    acceptance = _count(random.Random(k), 4, 20_000)
    length = plan.accepted_length(acceptance, k)
    found = plan.speedup(length, Measured(plain_s, 0.0), Measured(k * draft_s + verify_s, 0.0))

    generator, tokens, spent_s, steps = random.Random(1000 + k), 0, 0.0, 40_000
    for _ in range(steps):
        for _ in range(k):
            spent_s += draft_s
        spent_s += verify_s
        tokens += _accepted(generator, k) + 1
    played_out = tokens / spent_s * plain_s  # without speculation a token takes plain_s
    assert abs(found.value - played_out) < 4 * sqrt(1 + 1 / 2) * found.standard_error
    assert found.standard_error < 0.02 * found.value


@pytest.mark.parametrize("k", [2, 4, 6])
def test_standard_error_is_the_spread_of_repeated_counts(k: int) -> None:
    generator = random.Random(5)
    lengths = [plan.accepted_length(_count(generator, 4, 300), k) for _ in range(400)]
    spread = statistics.stdev(length.value for length in lengths)
    assert statistics.mean(length.standard_error for length in lengths) == pytest.approx(spread, rel=0.12)


def test_at_the_counted_positions_it_is_the_counted_length() -> None:
    acceptance = _count(random.Random(0), 4, 1000)
    assert plan.accepted_length(acceptance, 4).value == pytest.approx(acceptance.length)
    assert plan.accepted_length(acceptance, 1).value == pytest.approx(1 + acceptance.per_position[0] / 1000)


def test_beyond_the_counted_positions_the_last_conditional_rate_goes_on() -> None:
    acceptance = Acceptance(100, 200, 90, [60, 30])
    assert plan.accepted_length(acceptance, 4).value == pytest.approx(1 + 0.6 + 0.3 + 0.15 + 0.075)
    one = Acceptance(100, 100, 60, [60])
    assert plan.accepted_length(one, 3).value == pytest.approx(1 + 0.6 + 0.36 + 0.216)
    for drafts in (100, 0):
        assert plan.accepted_length(Acceptance(drafts, 2 * drafts, 0, [0, 0]), 5) == Measured(1.0, 0.0)


def test_seconds_between_timed_numbers_lie_on_straight_lines() -> None:
    timed = {1: Measured(1.0, 0.1), 3: Measured(2.0, 0.1), 7: Measured(3.0, 0.3)}
    assert plan.between(timed, 3) == timed[3]
    assert plan.between(timed, 2) == pytest.approx((1.5, 0.1 / sqrt(2)))
    assert plan.between(timed, 6).value == pytest.approx(2.75)


def test_a_dear_draft_is_not_used_and_a_cheap_one_is() -> None:
    acceptance = _geometric(0.6, drafts=500)
    dear = plan.make(acceptance, _costs(1.0, {1: 1.7, 8: 6.0}))
    assert dear.loads[0].tokens == 0 and dear.loads[0].best.speedup < 1
    cheap = plan.make(acceptance, _costs(1.0, {1: 1.1, 8: 1.8}))
    assert cheap.loads[0].tokens == 3 and cheap.loads[0].best.lower > 1.5


def test_what_is_not_sure_to_pay_is_not_used() -> None:
    """The same rates and seconds, counted in 20 drafts and in 20,000."""
    costs = _costs(1.0, {1: 1.5, 2: 1.9})
    few, many = (plan.make(_geometric(0.6, 2, drafts), costs).loads[0] for drafts in (20, 20_000))
    assert few.best.speedup == pytest.approx(many.best.speedup, rel=0.01) and many.best.speedup > 1
    assert (few.tokens, many.tokens) == (0, 1)


def test_costs_that_scatter_widen_the_bound() -> None:
    found = plan.speedup(Measured(2.0, 0.04), Measured(1.0, 0.03), Measured(1.0, 0.0))
    assert found == pytest.approx((2.0, 2.0 * sqrt(0.02**2 + 0.03**2)))


def test_steps_timed_as_shorter_than_those_without_a_draft_are_noise() -> None:
    found = plan.speedup(Measured(1.2, 0.0), Measured(0.05, 0.02), Measured(0.02, 0.0))
    assert found == pytest.approx((1.2, 1.2 * 0.4))


def _arch(layers: int, hidden: int, inner: int, heads: int, head_dim: int, *, tied: bool) -> Architecture:
    config = {
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": head_dim, "vocab_size": 128_256,
        "tie_word_embeddings": tied,
    }  # fmt: skip
    arch, problems = read_architecture(config)
    assert arch is not None and not problems
    return arch


LLAMA_8B = _arch(32, 4096, 14_336, 32, 128, tied=False)
LLAMA_70B = _arch(80, 8192, 28_672, 64, 128, tied=False)
LLAMA_1B = _arch(16, 2048, 8192, 32, 64, tied=True)
W4 = 0.5 + 4 / 8 / 128 + 2 / 128  # bytes of a weight: integer, its share of a zero point and of a scale


def _reads(arch: Architecture, linear_bytes: float, head_bytes: float) -> Reads:
    linears = arch.num_layers * sum(rows * columns for rows, columns in linear_shapes(arch).values())
    head = arch.vocab_size * arch.hidden_size
    return Reads(round(linears * linear_bytes + head * head_bytes), 2 * (linears + head), 0)


@pytest.mark.parametrize(
    ("target", "draft", "ratio", "speedups"),
    [
        (_reads(LLAMA_8B, 2, 2), _reads(LLAMA_1B, 2, 2), 0.165, (1.47, 1.70, 2.03)),
        (_reads(LLAMA_8B, W4, 2), _reads(LLAMA_1B, 2, 2), 0.53, (1.04, 1.11, 1.18)),
        (_reads(LLAMA_8B, W4, 2), _reads(LLAMA_1B, W4, 2), 0.22, (1.36, 1.52, 1.78)),
        (_reads(LLAMA_8B, W4, 2), _reads(LLAMA_1B, W4, W4), 0.14, (1.54, 1.80, 2.19)),
        (_reads(LLAMA_70B, W4, 2), _reads(LLAMA_1B, 2, 2), 0.066, (1.82, 2.21, 2.85)),
    ],
)  # fmt: skip
def test_the_estimate_at_one_sequence(
    target: Reads, draft: Reads, ratio: float, speedups: tuple[float, float, float]
) -> None:
    """Bytes alone, worked out by hand for Llama 3.1 and 3.2: the ratio of the two, and the best speed-up."""
    assert draft.weight_bytes / target.weight_bytes == pytest.approx(ratio, abs=0.006)
    costs = plan.estimate_costs(target, draft, FAST, context_tokens=0, concurrencies=(1,), tokens=range(1, 13))
    found = [plan.make(_geometric(rate, 12), costs).loads[0].best.speedup for rate in (0.6, 0.7, 0.8)]
    assert found == pytest.approx(speedups, abs=0.015)


def test_the_estimate_falls_with_concurrency_where_operations_count() -> None:
    target, draft = _reads(LLAMA_8B, W4, 2), _reads(LLAMA_1B, W4, 2)
    machine = Machine("an accelerator", bytes_per_s=3e12, operations_per_s=8e14)
    found = plan.make(_geometric(0.7), plan.estimate_costs(target, draft, machine, concurrencies=(1, 32, 128, 512)))
    best = [load.best.speedup for load in found.loads]
    assert best == sorted(best, reverse=True) and best[0] > 1.4 and best[-1] < 1
    assert found.loads[0].tokens >= 2 and found.loads[-1].tokens == 0
    assert found.origin == "estimated" and "not a measurement" in found.basis


def test_a_checkpoint_is_read_as_it_is_stored(tiny_llama: Path) -> None:
    found = roofline.reads(tiny_llama)
    linears, head = 2 * (4 * 64 * 64 + 3 * 64 * 128), 320 * 64
    assert found.weight_bytes == pytest.approx(4 * (linears + head), rel=0.02)  # float32; norms and the file's header
    assert found.token_operations == 2 * (linears + head)
    assert found.cache_bytes == 2 * 2 * 64 * 2


@pytest.mark.vllm
@pytest.mark.timeout(1200)
def test_steps_are_timed_by_vllm(tiny_llama: Path, tmp_path: Path) -> None:
    sweep = Sweep((1, 4), (1, 6), context_tokens=16, steps=5)

    def measure(session: Session) -> Costs:
        drafts = {"itself": tiny_llama}
        return plan.measure_costs(session, tiny_llama, drafts, sweep, folder=tmp_path, report=progress.silent)["itself"]

    with Session() as session:
        costs = measure(session)
    assert costs.origin == "measured" and "thread" in costs.machine
    for size in (1, 4):
        # the draft is the target itself: seven passes and one cannot take less than two and one
        assert costs.plain[size].value < costs.speculative[size][6].value
        assert costs.speculative[size][1].value < costs.speculative[size][6].value
    assert measure(Session()) == costs, "a resumed run measures nothing again"
    made = plan.make(Acceptance(50, 50 * 4, 0, [0, 0, 0, 0]), costs)
    assert [load.tokens for load in made.loads] == [0, 0]
