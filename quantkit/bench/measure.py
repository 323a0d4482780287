"""The loads put on the servers, round by round: what differs between two variants must not be the hour of the day.

Every round puts every load on every variant, in an order that moves on by one each round. Where there is memory for
all servers they stay up from the first round to the last; a GPU is one server's, so there each is started for its turn.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from quantkit import artifacts
from quantkit.bench import knee, variants, workload
from quantkit.bench.client import Answered, Asked, Client
from quantkit.bench.variants import Variant
from quantkit.bench.workload import Load
from quantkit.capacity import sizing
from quantkit.errors import QuantkitError
from quantkit.progress import LINE, Report
from quantkit.serve import launch
from quantkit.serve.settings import TARGET_DIR
from quantkit.speculation import Profile

_RUNTIME_BYTES = int(1.8e9)  # of the processes of one server on a CPU, beside weights and cache
# Servers that start at a time: the workers of vLLM's CPU build all compute on the same cores, and leave some to others.
_SIDE_BY_SIDE = 3
_STOP_S = 3.0  # nothing is under way: what has not ended by then is ended


class Plan(NamedTuple):
    """What will be measured: which variants, under which loads, with which prompts."""

    bundle: Path
    baseline: Path
    profile: Profile
    variants: Sequence[Variant]
    loads: Sequence[Load]
    prompts: Sequence[str]
    beginning: str
    output_tokens: int
    requests: int
    chat: bool
    knee: bool = False

    def asked_of(self, variant: Variant, load: Load) -> bool:
        """Prefix caching is for prompts that share their beginning; what it is compared with is asked both kinds."""
        if load.temperature > 0 and self.profile == "cpu" and variant.speculation:
            return False  # vLLM's CPU build answers noise there
        if load.kind == "unique":
            return not variant.prefix
        return variant.prefix or any(other._replace(prefix=False) == variant for other in self.variants if other.prefix)

    def count(self, load: Load) -> int:
        """Requests of a load."""
        return max(self.requests, load.concurrency)


class Served(NamedTuple):
    """How a variant was started: its flags, what the processor had instead, and after how many seconds it answered.

    Those that start side by side share the machine meanwhile.
    """

    flags: dict[str, Any]
    substitutes: list[str]
    ready_s: float | None
    failed: str | None = None


class Measured(NamedTuple):
    """Everything that was seen: each variant's start, and each load's answers by (variant, load)."""

    served: dict[Variant, Served]
    answers: dict[tuple[Variant, Load], Answered]
    commands: dict[str, str]
    knees: dict[Variant, dict[str, Any]]


def measure(
    plan: Plan, *, servers: Literal["auto", "together", "in turns"], folder: Path, report: Report
) -> Measured:  # fmt: skip
    """Put all loads on all variants. `folder` keeps all files: what is answered there is not asked again.

    Raises:
        QuantkitError: a server of the bundle does not start, or a request fails. A baseline that does not start is told
            in the result.
    """
    prompts = _write_prompts(plan, folder / "prompts")
    together = servers == "together" or (servers == "auto" and _fit_together(plan))
    seen = Measured({}, {}, {}, {})
    todo = [(variant, load) for load in plan.loads for variant in plan.variants if plan.asked_of(variant, load)]
    model = _served_name(plan)

    def run(up: Mapping[Variant, str], load: Load, order: Sequence[Variant], client: Client) -> None:
        for variant in order:
            if variant not in up or not plan.asked_of(variant, load):
                continue
            asked = Asked(
                up[variant], model, plan.bundle / TARGET_DIR, prompts[load], plan.count(load), load.concurrency,
                load.temperature, plan.chat,
            )  # fmt: skip
            report(f"{variant.name}, {_said(load)}", len(seen.answers), len(todo))
            seen.answers[variant, load] = _once(client, asked, folder / "loads" / f"{variant.name}-{load.name}.json")
            seen.commands.setdefault(load.kind, asked.command())

    def look_for_knee(up: Mapping[Variant, str]) -> None:
        last = plan.variants[-1]
        if plan.knee and last in up:
            asked = max((load for load in plan.loads if plan.asked_of(last, load)), key=lambda load: load.concurrency)
            report(f"{last.name}: guidellm looks for the knee", 0, 0)
            seen.knees[last] = knee.search(
                up[last], model, plan.bundle / TARGET_DIR, prompts[asked], profile=plan.profile,
                most=int(seen.served[last].flags["max-num-seqs"]), folder=folder / "knee",
            )  # fmt: skip

    with Client(folder / "client") as client:
        client.start()  # imports vLLM while the first servers do
        rounds = sorted({load.round for load in plan.loads})
        if together:
            with _up(plan, plan.variants, seen, folder, report) as up:
                for number in rounds:
                    for load in (load for load in plan.loads if load.round == number):
                        run(up, load, _moved(plan.variants, number), client)
                look_for_knee(up)
            return seen
        for number in rounds:
            for variant in _moved(plan.variants, number):
                if variant in seen.served and seen.served[variant].failed:
                    continue
                with _up(plan, [variant], seen, folder, report) as up:
                    for load in (load for load in plan.loads if load.round == number):
                        run(up, load, [variant], client)
                    if number == rounds[-1]:
                        look_for_knee(up)
    return seen


def _once(client: Client, asked: Asked, result: Path) -> Answered:
    """The answers to a load; those of an interrupted try are kept."""
    kept = result.with_suffix(".counted.json")
    if kept.is_file():
        told = json.loads(kept.read_bytes())
        return Answered(json.loads(result.read_bytes()), told["counted"], told["kv_usage"])
    result.parent.mkdir(parents=True, exist_ok=True)
    found = client.run(asked, result)
    artifacts.write_json(kept, {"counted": found.counted, "kv_usage": found.kv_usage})
    return found


@contextmanager
def _up(
    plan: Plan, wanted: Sequence[Variant], seen: Measured, folder: Path, report: Report
) -> Iterator[dict[Variant, str]]:
    """The servers of these variants, started side by side and each asked once; where they answer."""
    begin_s = time.monotonic()
    up: dict[Variant, str] = {}
    with ExitStack() as stack:
        starting: dict[Variant, launch.Starting] = {}

        def wait_for(variant: Variant) -> None:
            report("vLLM starts", len(up), len(wanted))
            try:
                starting[variant].wait()
            except QuantkitError as error:
                if variant.quantized:
                    raise
                seen.served[variant] = seen.served[variant]._replace(failed=str(error))
                report(f"{variant.name}: {error}", 0, LINE)
                return
            seen.served[variant] = seen.served[variant]._replace(ready_s=round(time.monotonic() - begin_s, 1))
            up[variant] = starting[variant].server.base_url

        for number, variant in enumerate(wanted):
            if number >= _SIDE_BY_SIDE:
                wait_for(wanted[number - _SIDE_BY_SIDE])
            found = variants.flags(variant, plan.bundle, plan.baseline, plan.profile)
            instead = variants.substitutes(variant, found, plan.bundle, plan.baseline) if plan.profile == "cpu" else []
            file = folder / "settings" / f"{variant.name}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            artifacts.write_text(file, yaml.safe_dump(found, sort_keys=False))
            settings = launch.Settings(file, plan.bundle, plan.profile, tuple(instead))
            log = folder / "logs" / f"{variant.name}.log"
            starting[variant] = stack.enter_context(launch.started(settings, log=log, stop_timeout_s=_STOP_S))
            seen.served[variant] = Served(found, [one.said for one in instead], None)
        for variant in wanted[-_SIDE_BY_SIDE:]:
            wait_for(variant)
        yield up


def _write_prompts(plan: Plan, folder: Path) -> dict[Load, Path]:
    """A file for each load; the prompts of a load are asked in no other one of its kind."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = {kind: workload.endless(plan.prompts) for kind in ("unique", "shared")}
    files = {}
    for load in plan.loads:
        asked = [next(sources[load.kind]) for _ in range(plan.count(load))]
        files[load] = folder / f"{load.name}.jsonl"
        beginning = plan.beginning if load.kind == "shared" else None
        workload.write(files[load], asked, beginning=beginning, output_tokens=plan.output_tokens)
    return files


def _fit_together(plan: Plan) -> bool:
    """Whether this machine's memory holds all servers at once: a GPU is one server's."""
    if plan.profile == "gpu":
        return False
    needed = 0
    for variant in plan.variants:
        found = variants.flags(variant, plan.bundle, plan.baseline, plan.profile)
        weights = sizing.weight_bytes(plan.bundle / TARGET_DIR if variant.quantized else plan.baseline)
        # 4-bit weights may lie there dequantized
        needed += _RUNTIME_BYTES + int(found["kv-cache-memory-bytes"]) + (8 if variant.quantized else 2) * weights
    told = Path("/proc/meminfo").read_text().splitlines()
    return needed < next(int(line.split()[1]) << 10 for line in told if line.startswith("MemAvailable"))


def _served_name(plan: Plan) -> str:
    return str(variants.flags(plan.variants[0], plan.bundle, plan.baseline, plan.profile)["served-model-name"])


def _moved(order: Sequence[Variant], number: int) -> list[Variant]:
    place = number % len(order)
    return [*order[place:], *order[:place]]


def _said(load: Load) -> str:
    heat = f", temperature {load.temperature:g}" if load.temperature else ""
    return f"{load.concurrency} at once, {load.kind} prompts{heat}, round {load.round + 1}"
