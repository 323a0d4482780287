"""All of a bench in order: which variants and loads, measured, put together, and shown."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from quantkit import artifacts, hardware
from quantkit.bench import knee, measure, page, results, variants, workload
from quantkit.bench.measure import Plan
from quantkit.bench.variants import Variant
from quantkit.bench.workload import Load
from quantkit.errors import QuantkitError, raise_all
from quantkit.progress import LINE, Report
from quantkit.recipe import Bench
from quantkit.serve import bundle as bundles
from quantkit.serve import launch
from quantkit.serve.settings import TARGET_DIR
from quantkit.speculation import RESULTS_KEY, Profile


class Size(NamedTuple):
    """What a kind of machine is asked where nobody says otherwise."""

    concurrencies: tuple[int, ...]
    requests: int
    output_tokens: int


# A processor takes seconds for what a GPU does in milliseconds.
SIZES: dict[Profile, Size] = {"cpu": Size((1, 8), 2, 12), "gpu": Size((1, 4, 16, 64), 32, 128)}


def bench(bundle: Path, baseline: Path, *, settings: Bench, out: Path, folder: Path, report: Report) -> dict[str, Any]:
    """Measure, and write bench.json, bench.md and bench.html into `out`; what the manifest says.

    Raises:
        QuantkitError: wrong input, all of it at once; a server of the bundle that does not start; a failed request.
    """
    record = bundles.read_bundle(bundle)
    profile = launch.resolve_profile("auto")
    asked, left_out = _variants(bundle, settings, profile)
    for name, why in left_out.items():
        report(f"{name} is left out: {why}", 0, LINE)
    size, own = SIZES[profile], record["settings"]
    temperatures = [_temperature(each, bundle) for each in settings.temperatures]
    kinds: Sequence[workload.Kind] = ("unique", "shared") if any(one.prefix for one in asked) else ("unique",)
    concurrencies = sorted(set(settings.concurrencies or size.concurrencies))
    # long prompts are what a processor takes longest for: one load of them is enough where nobody asks for more
    shared_at = concurrencies[-1:] if profile == "cpu" and not settings.concurrencies else concurrencies
    plan = Plan(
        bundle=bundle, baseline=baseline, profile=profile, variants=asked,
        loads=[
            Load(kind, temperature, concurrency, number)
            for number in range(settings.rounds)
            for kind in kinds
            for temperature in dict.fromkeys(temperatures)
            for concurrency in (shared_at if kind == "shared" else concurrencies)
        ],
        prompts=workload.prompts(settings.prompts, bundle),
        beginning=workload.system_prompt(Path(settings.system_prompt) if settings.system_prompt else None),
        output_tokens=settings.output_tokens or size.output_tokens, requests=settings.requests or size.requests,
        chat=bundles.has_chat_template(bundle / TARGET_DIR), knee=settings.knee,
    )  # fmt: skip
    measured = measure.measure(plan, servers=settings.servers, folder=folder, report=report)
    report("putting it together", 0, 0)
    found = results.assemble(
        plan, measured, left_out=left_out, price_per_hour=settings.price_per_hour,
        ttft_limit_s=settings.ttft_limit_s or own["ttft_limit_s"],
        tpot_limit_s=settings.tpot_limit_s or own["itl_limit_s"],
    )  # fmt: skip
    found["bundle"] = {"path": str(bundle), "model": own["served_model_name"], "digests": record["digests"]}
    found["baseline"] = str(baseline)
    artifacts.write_json(out / "bench.json", found)
    artifacts.write_text(out / "bench.md", page.markdown(found))
    artifacts.write_text(out / "bench.html", page.html(found))
    for part in ("settings", "prompts", "loads", *(["knee"] if settings.knee else [])):
        _keep(folder / part, out / part)
    return {
        "summary": page.summary(found), "digests": record["digests"], "gains": found["gains"],
        "turns_negative": found["turns_negative"], "at_the_limits": found["at_the_limits"],
        "left_out": left_out, RESULTS_KEY: [found["speculation"]] if found["speculation"] else [],
    }  # fmt: skip


def _variants(bundle: Path, settings: Bench, profile: Profile) -> tuple[list[Variant], dict[str, str]]:
    """What is measured, and what is not and why; what was asked for by name and cannot be is refused."""
    without_fp8 = hardware.lacks_avx512()
    named = [variants.parse(name) for name in settings.variants]
    if settings.what_if is not None and named:
        named.append(Variant(True, speculation="what-if", acceptance=settings.what_if))
    wanted = list(dict.fromkeys(named or variants.ladder(bundle, what_if=settings.what_if)))
    reasons = {one: variants.unavailable(one, bundle, profile, without_fp8=without_fp8) for one in wanted}
    refused = [f"{one.name}: {why}" for one, why in reasons.items() if why and (named or one.speculation == "what-if")]
    raise_all(refused)
    if settings.knee:
        knee.find()
    left_out = {one.name: why for one, why in reasons.items() if why}
    asked = [one for one, why in reasons.items() if not why]
    if not asked:
        raise QuantkitError(f"{bundle}: no variant is left to measure: {'; '.join(left_out.values())}")
    return asked, left_out


def _temperature(asked: float | Literal["deployment"], bundle: Path) -> float:
    if asked != "deployment":
        return asked
    path = bundle / TARGET_DIR / "generation_config.json"
    own = json.loads(path.read_bytes()) if path.is_file() else {}
    return float(own.get("temperature", 1.0)) if own.get("do_sample", "temperature" in own) else 0.0


def _keep(source: Path, destination: Path) -> None:
    """The settings that were served and the client's own results, beside the page that is made of them."""
    destination.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        artifacts.link_or_copy(file, destination / file.name)
