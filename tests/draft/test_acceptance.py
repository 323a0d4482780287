"""Counting acceptance: the simulation against a step-by-step speculation written out from the definition."""

import pytest
import torch

from quantkit.draft.acceptance import simulate_greedy, total


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
    found = simulate_greedy(matches, k)
    assert (found.drafts, found.accepted) == _slow(matches, k)
    assert found.proposed == found.drafts * k and sum(found.per_position) == found.accepted


def test_a_perfect_draft_is_accepted_whole() -> None:
    found = simulate_greedy([True] * 50, 4)
    assert found.drafts == 10 and found.accepted == 40
    assert found.rate == 1 and found.length == 5


def test_a_useless_draft_costs_one_step_a_token() -> None:
    found = simulate_greedy([False] * 7, 4)
    assert found.drafts == 7 and found.accepted == 0 and found.length == 1


def test_counts_of_several_texts_add_up() -> None:
    both = total([simulate_greedy([True] * 10, 4), simulate_greedy([False] * 3, 4)])
    assert (both.drafts, both.accepted, both.per_position) == (5, 8, [2, 2, 2, 2])
