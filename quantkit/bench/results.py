"""The bench as one JSON value: what ran, what it took, what each technique gave, what it costs."""

from collections.abc import Mapping, Sequence
from typing import Any

from quantkit import provenance
from quantkit.bench import gains, requests
from quantkit.bench.gains import Cell, Counted, Gain
from quantkit.bench.measure import Measured, Plan
from quantkit.bench.variants import Variant
from quantkit.capacity.cost import dollars_per_million

SHARE = 0.95  # of the requests that must keep both limits, for a load to count as served within them


def assemble(
    plan: Plan, measured: Measured, *, ttft_limit_s: float, tpot_limit_s: float, price_per_hour: float | None,
    left_out: Mapping[str, str],
) -> dict[str, Any]:  # fmt: skip
    """What bench.json says.

    price_per_hour: of all that one server runs on, in whatever money the user counts in.
    left_out: variants that were not run, and why.
    """
    found = gains.cells(measured)
    told = gains.gains(found, measured, plan.bundle, plan.baseline)
    limits = {"ttft_s": ttft_limit_s, "tpot_s": tpot_limit_s}
    rows = [
        _cell(variant, cell, counted, limits, price_per_hour)
        for variant, loads in found.items()
        for cell, counted in sorted(loads.items())
    ]
    machine = provenance.machine()
    speculation = gains.plan(found, told, plan.bundle, profile=plan.profile, machine=_named(machine))
    return {
        "format": 1,
        "profile": plan.profile,
        "made": {
            "machine": machine, "versions": provenance.versions(), "command": provenance.command(), "seed": 0,
            "clients": measured.commands,
        },
        "limits": limits | {"share": SHARE},
        "price_per_hour": price_per_hour,
        "workload": {
            "rounds": 1 + max(load.round for load in plan.loads), "requests": plan.requests,
            "output_tokens": plan.output_tokens, "prompts": len(plan.prompts), "beginning": plan.beginning,
        },
        "variants": [_variant(variant, measured) for variant in plan.variants],
        "left_out": dict(left_out),
        "cells": rows,
        "at_the_limits": [_at_the_limits(variant, rows) for variant in found],
        "gains": [_gain(gain) for gain in told],
        "turns_negative": {
            variant.name: words for variant in found if (words := gains.turns_negative(told, variant)) is not None
        },
        "knees": {variant.name: seen for variant, seen in measured.knees.items()},
        "speculation": None if speculation is None else speculation.model_dump(mode="json"),
    }  # fmt: skip


def _named(machine: Mapping[str, Any]) -> str:
    cores = machine["cores"]
    return f"{machine['processor']}, {cores} core{'s' if cores > 1 else ''}, as served"


def _variant(variant: Variant, measured: Measured) -> dict[str, Any]:
    served = measured.served.get(variant)
    assert served is not None
    return {"name": variant.name, "words": variant.words, **served._asdict()}


def _cell(
    variant: Variant, cell: Cell, counted: Counted, limits: Mapping[str, float], price_per_hour: float | None
) -> dict[str, Any]:
    kind, temperature, concurrency = cell
    asked, drafted = counted.requests, counted.drafted
    kept = sum(requests.within(one, **limits) for one in asked) / len(asked)
    tokens_per_s = sorted(counted.tokens_per_s)
    middle = requests.percentiles(tokens_per_s)["p50"]
    seconds: dict[str, Sequence[float]] = {
        "ttft_s": [one.ttft_s for one in asked],
        "tpot_s": [one.tpot_s for one in asked if one.tpot_s is not None],
        "itl_s": counted.itl_s,
        "latency_s": [one.latency_s for one in asked],
    }
    per_user = [1 / value for value in seconds["tpot_s"] if value > 0]
    return {
        "variant": variant.name, "kind": kind, "temperature": temperature, "concurrency": concurrency,
        "requests": len(asked),
        **{name: requests.percentiles(values) for name, values in seconds.items()},
        "tokens_per_s": {"median": middle, "rounds": [round(each, 3) for each in counted.tokens_per_s]},
        "tokens_per_s_per_user": requests.percentiles(per_user).get("p50"),
        "within_limits": kept,
        "kv_usage": counted.kv_usage,
        "preemptions": counted.counted.get("num_preemptions", 0.0),
        "prefix_hit_rate": counted.hit_rate,
        "prompt_tokens": counted.counted.get("prompt_tokens", 0.0) / len(asked),
        "output_tokens": sum(one.output_tokens for one in asked) / len(asked),
        "acceptance": None if drafted is None else drafted.summary(),
        "price_per_million_tokens": None if price_per_hour is None else dollars_per_million(price_per_hour, middle),
    }  # fmt: skip


def _at_the_limits(variant: Variant, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The most requests at once that a variant serves within the limits, and what a million tokens cost then."""
    own = [row for row in rows if row["variant"] == variant.name]
    kept = [row for row in own if row["within_limits"] >= SHARE]
    most = max(kept, key=lambda row: (row["concurrency"], row["tokens_per_s"]["median"]), default=None)
    return {
        "variant": variant.name,
        "concurrency": most["concurrency"] if most else 0,
        "kind": most["kind"] if most else None,
        "tokens_per_s": most["tokens_per_s"]["median"] if most else None,
        "price_per_million_tokens": most["price_per_million_tokens"] if most else None,
    }


def _gain(gain: Gain) -> dict[str, Any]:
    ratios = {name: {"value": middle.value, "interval": middle.interval} for name, middle in gain.ratios.items()}
    return gain._asdict() | {"ratios": ratios}
