"""Acceptance: the simulation against speculation step by step, and chances against rejection sampling played out."""

import pytest
import torch

from quantkit.draft.acceptance import Acceptance, chances, gain, simulate, total


def _slow(matches: list[bool], k: int) -> tuple[int, int]:
    """Drafts and accepted tokens, token by token: propose k, keep what matches, then one token of the target's own."""
    text = list(range(len(matches)))
    written: list[int] = []
    drafts = accepted = 0
    while len(written) < len(text):
        drafts += 1
        proposals = []
        for step in range(k):
            position = len(written) + step
            right = position < len(text) and matches[position] and all(p >= 0 for p in proposals)
            proposals.append(position if right else -1)
        for proposal in proposals:
            if proposal < 0 or proposal != text[len(written)]:
                break
            written.append(proposal)
            accepted += 1
            if len(written) == len(text):
                break
        if len(written) < len(text):
            written.append(text[len(written)])
    return drafts, accepted


@pytest.mark.parametrize("k", [1, 2, 4, 7])
@pytest.mark.parametrize("seed", range(5))
def test_simulation_equals_speculation_step_by_step(k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matches = (torch.rand(53, generator=generator) < 0.6).tolist()
    found = simulate(matches, k)
    assert (found.drafts, found.accepted) == _slow(matches, k)
    assert found.proposed == found.drafts * k and sum(found.per_position) == found.accepted


@pytest.mark.parametrize("k", [1, 3, 5])
def test_expected_counts_are_the_mean_of_coins_thrown(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    likely = torch.rand(23, generator=generator)
    throws = [_slow((torch.rand(23, generator=generator) < likely).tolist(), k) for _ in range(6000)]
    drafts, accepted = torch.tensor(throws, dtype=torch.float64).mean(0).tolist()
    found = simulate(likely.tolist(), k)
    assert found.drafts == pytest.approx(drafts, rel=0.02) and found.accepted == pytest.approx(accepted, rel=0.02)
    assert sum(found.per_position) == pytest.approx(found.accepted)


def test_a_perfect_draft_is_accepted_whole() -> None:
    found = simulate([True] * 50, 4)
    assert found.drafts == 10 and found.accepted == 40
    assert found.rate == 1 and found.length == 5


def test_a_useless_draft_costs_one_step_a_token() -> None:
    found = simulate([False] * 7, 4)
    assert found.drafts == 7 and found.accepted == 0 and found.length == 1


def test_counts_of_several_texts_add_up_and_their_spread_is_the_error() -> None:
    both = total([simulate([True] * 10, 4), simulate([False] * 3, 4)])
    assert (both.drafts, both.accepted, both.per_position) == (5, 8, [2, 2, 2, 2])
    assert both.error > 0.5
    assert total([simulate([True, False] * 8, 4)] * 5).error == pytest.approx(0)


def test_the_error_is_the_deviation_between_sets_of_texts() -> None:
    generator = torch.Generator().manual_seed(0)

    def texts() -> list[list[bool]]:
        return [(torch.rand(20, generator=generator) < torch.rand((), generator=generator)).tolist() for _ in range(40)]

    drawn = [total([simulate(text, 4) for text in texts()]) for _ in range(300)]
    lengths = torch.tensor([one.length for one in drawn])
    assert torch.tensor([one.error for one in drawn]).mean() == pytest.approx(float(lengths.std()), rel=0.15)


def test_chances_are_those_of_rejection_sampling() -> None:
    """Proposals drawn, accepted or replaced by the residual's; then counted given the token that came out."""
    generator = torch.Generator().manual_seed(0)
    temperature, draws = 0.7, 200_000
    draft, target = torch.randn(6, generator=generator), torch.randn(6, generator=generator)
    p, q = (target / temperature).softmax(-1), (draft / temperature).softmax(-1)
    proposed = torch.multinomial(q, draws, replacement=True, generator=generator)
    accepted = torch.rand(draws, generator=generator) < (p / q)[proposed]
    residual = torch.multinomial((p - q).clamp(min=0), draws, replacement=True, generator=generator)
    came_out = torch.where(accepted, proposed, residual)
    found = chances(draft.repeat(6, 1), target.repeat(6, 1), torch.arange(6), temperature)
    for token in range(6):
        share = accepted[came_out == token].float().mean()
        assert float(found["sampled"][token]) == pytest.approx(float(share), abs=0.015)
    assert float(found["overlap"][0]) == pytest.approx(float(accepted.float().mean()), abs=0.005)
    assert float(found["top"][0]) == pytest.approx(float(p[q.argmax()]))
    assert found["greedy"].tolist() == [float(token == int(q.argmax())) for token in range(6)]


def test_at_temperature_zero_all_is_whether_the_most_likely_token_agrees() -> None:
    draft, target = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.5], [0.0, 1.0, 0.0]])
    found = chances(draft, target, target.argmax(-1), 0)
    assert {name: values.tolist() for name, values in found.items()} == {name: [1.0, 0.0] for name in found}


def test_a_gain_is_known_better_than_either_length() -> None:
    generator = torch.Generator().manual_seed(0)

    def texts(lift: float, easy: torch.Tensor) -> list[Acceptance]:
        return [simulate((torch.rand(90, generator=generator) < ease + lift).tolist(), 4) for ease in easy.tolist()]

    def drawn() -> tuple[list[Acceptance], list[Acceptance]]:
        easy = 0.2 + 0.6 * torch.rand(40, generator=generator)  # what makes both drafts better at a text
        return texts(0.05, easy), texts(0.0, easy)

    ours, theirs = drawn()
    found, error = gain(ours, theirs)
    assert found == pytest.approx(total(ours).length - total(theirs).length)
    assert error < 0.7 * (total(ours).error ** 2 + total(theirs).error ** 2) ** 0.5
    spread = torch.tensor([gain(*drawn())[0] for _ in range(200)]).std()
    assert error == pytest.approx(float(spread), rel=0.35)
    assert gain(ours, ours) == (0, 0)
