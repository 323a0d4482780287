"""More bits where they pay: the budget's solution against all there are."""

import itertools

import pytest
import torch

from quantkit.quantize.allocate import Group, rounding_errors, solve


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_within_the_budget_is_better(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> float:
        return float(torch.rand((), generator=generator))

    groups = []
    for _ in range(6):
        high, middle = draw(), draw() * 0.3
        groups.append(Group(int(draw() * 9 + 1) * 64, {4: high, 8: high * middle, 16: 0.0}))
    average = 4 + 8 * draw()
    weights = sum(group.weights for group in groups)

    def worth(bits: tuple[int, ...]) -> tuple[float, float]:
        spent = sum(group.weights * each for group, each in zip(groups, bits, strict=True)) / weights
        return spent, sum(group.cost[each] for group, each in zip(groups, bits, strict=True))

    found = worth(tuple(solve(groups, average)))
    assert found[0] <= average + 1e-9
    all_there_are = [worth(bits) for bits in itertools.product((4, 8, 16), repeat=6)]
    assert found[1] == pytest.approx(min(cost for spent, cost in all_there_are if spent <= average + 1e-9))


def test_sizes_without_a_common_measure_stay_within_the_budget() -> None:
    groups = [Group(1_000_003 + 7 * index, {4: 1.0 + index, 8: 0.1, 16: 0.0}) for index in range(40)]
    bits = solve(groups, 6.0)
    weights = [group.weights for group in groups]
    assert 5.85 < sum(w * b for w, b in zip(weights, bits, strict=True)) / sum(weights) <= 6.0
    assert bits == sorted(bits)  # the costlier a group, the more bits
    assert solve(groups, 4.0) == [4] * 40
    with pytest.raises(ValueError, match="less than the 4 bits"):
        solve(groups, 3.9)


def test_more_bits_round_less() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    errors = rounding_errors(weight, (4, 8, 16), group_size=32, symmetric=False)
    assert errors.keys() == {4, 8}
    assert errors[8].norm() < 0.1 * errors[4].norm() < 0.1 * weight.norm()
