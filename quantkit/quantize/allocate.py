"""`bits: auto`: which linears get more bits, so that the loss rises least for an average of bits.

What rounding a linear costs is the mean over the calibration tokens of (g . dW x)^2 / 2, KL(original || quantized) to
second order with g the probes of `fisher` and dW what rounding to nearest changes: its empirical Fisher, seen along the
error itself. Costs of different linears add up, and the choice of least cost within a budget is a multiple-choice
knapsack, solved exactly by dynamic programming.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.formats import QuantizedWeight, dequantize
from quantkit.quantize.grid import fit_grid, round_to_grid

CHOICES = {"compressed-tensors": (4, 8, 16), "gptq": (4, 8, 16), "awq": (4, 16)}
MAX_UNITS = 1 << 17  # of the budget; past them sizes are rounded up


class Group(NamedTuple):
    """Linears that share a scheme: how many weights, and the cost in nats a token by bits; 16 bits cost nothing."""

    weights: int
    cost: Mapping[int, float]


def choices(format: str, given: Sequence[int] | None) -> tuple[int, ...]:
    """Bits that a linear may get, ascending: those given, or all that the format stores.

    Raises ValueError for bits that the format does not store, with what to choose instead.
    """
    stored = CHOICES[format]
    if given is None:
        return stored
    if missing := sorted(set(given) - set(stored)):
        others = [name for name, bits in CHOICES.items() if set(given) <= set(bits)]
        remedy = f", or the format {' or '.join(others)}" if others else ""
        raise ValueError(
            f"bit_choices: {format} stores no linear in {' or '.join(map(str, missing))} bits beside 4: choose of "
            f"{', '.join(map(str, stored))}{remedy}"
        )
    return tuple(sorted(set(given)))


def rounding_errors(
    weight_OI: Tensor, choices: Sequence[int], *, group_size: int, symmetric: bool
) -> dict[int, Tensor]:
    """What rounding to nearest changes, by bits below 16; past 4 bits the grid is symmetric, as vLLM loads it."""
    size = group_size if group_size > 0 else weight_OI.shape[1]
    errors = {}
    for bits in choices:
        if bits < 16:
            grid = fit_grid(weight_OI, None, bits=bits, group_size=size, symmetric=symmetric or bits > 4)
            errors[bits] = dequantize(QuantizedWeight(round_to_grid(weight_OI, grid), grid)).sub_(weight_OI)
    return errors


def solve(groups: Sequence[Group], average_bits: float) -> list[int]:
    """Bits for each group: the least total cost with at most that many bits a weight on average.

    Raises ValueError when even the fewest bits are more.
    """
    fewest = [min(group.cost) for group in groups]
    total = sum(group.weights for group in groups)
    room = average_bits * total - sum(group.weights * bits for group, bits in zip(groups, fewest, strict=True))
    if room < 0:
        raise ValueError(f"average_bits {average_bits:g} is less than the {min(fewest)} bits that all need")
    unit = math.gcd(
        *(group.weights * (bits - low) for group, low in zip(groups, fewest, strict=True) for bits in group.cost)
    )
    unit = max(unit, 1) * max(math.ceil(room / max(unit, 1) / MAX_UNITS), 1)
    units = int(room // unit)
    best_U = torch.zeros(units + 1, dtype=torch.float64)  # least cost with at most so many units
    chosen = []
    for group, low in zip(groups, fewest, strict=True):
        options = sorted(group.cost)
        costs = torch.full((len(options), units + 1), torch.inf, dtype=torch.float64)
        for row, bits in enumerate(options):
            taken = math.ceil(group.weights * (bits - low) / unit)
            if taken <= units:
                costs[row, taken:] = best_U[: units + 1 - taken] + group.cost[bits]
        best_U, choice_U = costs.min(0)
        chosen.append((options, choice_U))
    bits_by_group: list[int] = []
    left = units
    for group, low, (options, choice_U) in reversed(list(zip(groups, fewest, chosen, strict=True))):
        bits = options[int(choice_U[left])]
        left -= math.ceil(group.weights * (bits - low) / unit)
        bits_by_group.append(bits)
    return bits_by_group[::-1]
