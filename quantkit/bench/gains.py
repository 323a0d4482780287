"""What each technique gave: every variant against the one that lacks that technique alone, prompt by prompt."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from quantkit.bench import requests, variants
from quantkit.bench.measure import Measured
from quantkit.bench.requests import Middle, Request
from quantkit.bench.variants import Variant
from quantkit.bench.workload import Load
from quantkit.capacity import roofline, sizing
from quantkit.draft.acceptance import Acceptance
from quantkit.draft.plan import accepted_length
from quantkit.errors import QuantkitError
from quantkit.serve import bundle as bundles
from quantkit.serve.settings import TARGET_DIR
from quantkit.speculation import Load as PlannedLoad
from quantkit.speculation import Option, Plan, Profile

Measure = Literal["ttft", "tpot", "latency", "throughput"]
Verdict = Literal["gain", "loss", "no difference shown"]
Cell = tuple[str, float, int]  # kind of prompts, temperature, requests at once

# By which measure a technique is judged: what it is there for.
JUDGED_BY: dict[str, Measure] = {
    "continuous batching": "throughput", "4-bit weights": "tpot", "speculation": "tpot", "prefix caching": "ttft",
    "FP8 KV cache": "tpot",
}  # fmt: skip
IN_WORDS: dict[Measure, str] = {
    "ttft": "time to the first token", "tpot": "time a token", "latency": "time of a request",
    "throughput": "tokens a second in all",
}  # fmt: skip


class Gain(NamedTuple):
    """How many times as fast a variant is as the one without the technique, at one load; above 1 is faster."""

    technique: str
    variant: str
    without: str
    kind: str
    temperature: float
    concurrency: int
    ratios: dict[Measure, Middle]
    judged_by: Measure
    verdict: Verdict
    why: str


class Counted(NamedTuple):
    """The rounds of one load on one variant together."""

    rounds: list[list[Request]]
    tokens_per_s: list[float]
    counted: dict[str, float]
    kv_usage: float
    itl_s: list[float]

    @property
    def requests(self) -> list[Request]:
        """Of all rounds."""
        return [request for one in self.rounds for request in one]

    @property
    def drafted(self) -> Acceptance | None:
        """What the server counted of its draft; None where nothing was drafted."""
        drafts = self.counted.get("spec_decode_num_drafts", 0.0)
        if not drafts:
            return None
        places = sorted(
            (int(name.split("@")[1]), value)
            for name, value in self.counted.items()
            if name.startswith("spec_decode_num_accepted_tokens_per_pos@")
        )
        accepted, proposed = (self.counted[f"spec_decode_num_{what}"] for what in ("accepted_tokens", "draft_tokens"))
        return Acceptance(int(drafts), int(proposed), int(accepted), [int(value) for _, value in places])

    @property
    def hit_rate(self) -> float | None:
        """The share of prompt tokens whose KV were cached; None where nobody looked."""
        asked = self.counted.get("prefix_cache_queries", 0.0)
        return self.counted["prefix_cache_hits"] / asked if asked else None


def cells(measured: Measured) -> dict[Variant, dict[Cell, Counted]]:
    """Each variant's loads, their rounds put together."""
    found: dict[Variant, dict[Cell, Counted]] = {}
    by_round = sorted(measured.answers.items(), key=lambda item: item[0][1].round)
    for (variant, load), answered in by_round:
        cell = found.setdefault(variant, {}).setdefault(_cell(load), Counted([], [], {}, 0.0, []))
        cell.rounds.append(requests.of_client(answered.client))
        cell.tokens_per_s.append(answered.client["total_output_tokens"] / answered.client["duration"])
        cell.itl_s.extend(gap for one in answered.client["itls"] for gap in one)
        for name, value in answered.counted.items():
            cell.counted[name] = cell.counted.get(name, 0.0) + value
        found[variant][_cell(load)] = cell._replace(kv_usage=max(cell.kv_usage, answered.kv_usage))
    return found


def _cell(load: Load) -> Cell:
    return load.kind, load.temperature, load.concurrency


def gains(
    found: Mapping[Variant, Mapping[Cell, Counted]], measured: Measured, bundle: Path, baseline: Path
) -> list[Gain]:
    """Every technique at every load that was put on both a variant and the one without it."""
    told = []
    for technique, variant, lacking in variants.pairs(list(found)):
        for cell in found[variant]:
            if cell not in found[lacking] or (technique == "continuous batching" and cell[2] == 1):
                continue  # a batch of one is none
            with_, without = found[variant][cell], found[lacking][cell]
            ratios = _ratios(with_, without)
            judged_by = JUDGED_BY[technique]
            if judged_by not in ratios:
                continue
            verdict = _verdict(ratios[judged_by])
            why = _why(technique, variant, lacking, cell, found, measured, bundle, baseline)
            told.append(
                Gain(technique, variant.name, lacking.name, *cell, ratios, judged_by, verdict, why)
            )  # fmt: skip
    return sorted(told, key=lambda gain: (list(JUDGED_BY).index(gain.technique), gain.kind, gain.concurrency))


def _ratios(with_: Counted, without: Counted) -> dict[Measure, Middle]:
    pairs: dict[Measure, Middle | None] = {
        "ttft": requests.ratios([r.ttft_s for r in without.requests], [r.ttft_s for r in with_.requests]),
        "tpot": requests.ratios([r.tpot_s for r in without.requests], [r.tpot_s for r in with_.requests]),
        "latency": requests.ratios([r.latency_s for r in without.requests], [r.latency_s for r in with_.requests]),
        "throughput": _of_rounds(without.tokens_per_s, with_.tokens_per_s),
    }
    return {name: middle for name, middle in pairs.items() if middle is not None}


def _of_rounds(without: Sequence[float], with_: Sequence[float]) -> Middle:
    """Rounds are few: their spread stands for the interval."""
    found = [b / a for a, b in zip(without, with_, strict=True)]
    return Middle(statistics.median(found), (min(found), max(found)) if len(found) > 1 else None)


def _verdict(ratio: Middle) -> Verdict:
    low, high = ratio.interval or (0.0, float("inf"))
    return "gain" if low > 1 else "loss" if high < 1 else "no difference shown"


def _why(
    technique: str, variant: Variant, lacking: Variant, cell: Cell,
    found: Mapping[Variant, Mapping[Cell, Counted]], measured: Measured, bundle: Path, baseline: Path,
) -> str:  # fmt: skip
    """What was seen that explains it, in a sentence with numbers."""
    with_, without = found[variant][cell], found[lacking][cell]
    if technique == "continuous batching":
        longer = _tpot(with_) / _tpot(without)
        return f"up to {cell[2]} requests share a pass, and a token of each takes {longer:.2f} times as long as alone"
    if technique == "4-bit weights":
        sizes = [roofline.reads(path).weight_bytes for path in (baseline, bundle / TARGET_DIR)]
        instead = [line for line in measured.served[variant].substitutes if line.startswith("4-bit")]
        stored = f"a pass reads {sizes[1] / 1e6:.0f} MB of weights instead of {sizes[0] / 1e6:.0f}"
        return f"{instead[0]}, so nothing less is read" if instead else f"{stored}; 4 bits pay where memory bounds"
    if technique == "speculation":
        drafted = with_.drafted
        if drafted is None:
            return "nothing was drafted"
        step = _tpot(with_) * drafted.length / _tpot(without)
        return (
            f"a step yields {drafted.length:.2f} tokens and takes {step:.2f} times as long as one without: "
            f"{drafted.length:.2f} / {step:.2f}"
        )
    if technique == "prefix caching":
        rate = with_.hit_rate
        return "nothing of a prompt was cached" if rate is None else f"{rate:.0%} of the prompts' tokens were cached"
    config = sizing.read_config(bundle / TARGET_DIR)
    bytes_ = [sizing.kv_bytes_per_token(config, kind) for kind in ("float16", "fp8")]
    return f"a token takes {bytes_[1]} bytes of cache instead of {bytes_[0]}; it pays where the cache bounds"


def _tpot(cell: Counted) -> float:
    return statistics.median(r.tpot_s for r in cell.requests if r.tpot_s is not None)


def turns_negative(told: Sequence[Gain], variant: Variant) -> str | None:
    """At which numbers of requests at once a variant's speculation costs time, in words; None where it has none."""
    loads = [g for g in told if g.technique == "speculation" and g.variant == variant.name and g.kind == "unique"]
    loads = sorted((g for g in loads if g.temperature == 0), key=lambda gain: gain.concurrency)
    if not loads:
        return None
    losing = [gain.concurrency for gain in loads if gain.verdict == "loss"]
    measured = ", ".join(str(gain.concurrency) for gain in loads)
    if not losing:
        return f"nowhere: at {measured} at once it costs no time that could be shown"
    if len(losing) == len(loads):
        return f"at every load: already {losing[0]} at once is slower with it"
    return f"at {', '.join(map(str, losing))} at once (measured: {measured})"


def plan(
    found: Mapping[Variant, Mapping[Cell, Counted]], told: Sequence[Gain], bundle: Path, *, profile: Profile,
    machine: str,
) -> Plan | None:  # fmt: skip
    """What a draft's plan would say, from served requests: the speed-up of each number of draft tokens at each load.

    None where no variant with the bundle's draft was measured beside the same without it, at temperature 0.
    """
    options: dict[int, dict[int, Option]] = {}
    steps: dict[int, float] = {}
    drafted: dict[int, Acceptance] = {}
    prompt_tokens = 0.0
    for variant, loads in found.items():
        if variant.speculation != "draft" or variant.prefix or variant.fp8:
            continue
        lacking = variant._replace(speculation=None, tokens=None)
        tokens = variant.tokens or _own_tokens(bundle, profile)
        for gain in told:
            if (gain.technique, gain.variant, gain.kind, gain.temperature) != (
                "speculation", variant.name, "unique", 0.0
            ):  # fmt: skip
                continue
            cell = (gain.kind, gain.temperature, gain.concurrency)
            ratio = gain.ratios["tpot"]
            low, high = ratio.interval or (0.0, 2 * ratio.value)
            options.setdefault(gain.concurrency, {})[tokens] = Option(
                tokens=tokens, speedup=round(ratio.value, 4), standard_error=round((high - low) / 3.92, 4)
            )
            steps[gain.concurrency] = _tpot(found[lacking][cell])
            if seen := loads[cell].drafted:
                drafted[tokens] = max(seen, drafted.get(tokens, seen), key=lambda one: one.drafts)
            asked = loads[cell].counted.get("prompt_tokens", 0.0) / len(loads[cell].requests)
            prompt_tokens = max(prompt_tokens, asked)
    if not options or not drafted:
        return None
    longest = drafted[max(drafted)]
    lengths = [accepted_length(longest, k + 1) for k in range(len(longest.per_position))]
    return Plan(
        profile=profile, origin="measured", machine=machine, context_tokens=round(prompt_tokens),
        measured_positions=len(lengths), accepted_length=[round(length.value, 4) for length in lengths],
        accepted_length_standard_error=[round(length.standard_error, 4) for length in lengths],
        loads=[
            PlannedLoad(
                concurrency=concurrency, step_s=round(steps[concurrency], 6),
                options=[option for _, option in sorted(options[concurrency].items())],
            )
            for concurrency in sorted(options)
        ],
    )  # fmt: skip


def _own_tokens(bundle: Path, profile: Profile) -> int:
    own = bundles.read_flags(bundle, profile).get("speculative-config")
    if own is None:
        raise QuantkitError(f"{bundle} drafts nothing by itself: write the number of tokens, w4+draft:4")
    return int(own["num_speculative_tokens"])
