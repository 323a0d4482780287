"""A bundle checked, started with the real vLLM on this machine, asked what it promises, and stopped again."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from quantkit import artifacts
from quantkit.errors import QuantkitError, raise_all
from quantkit.progress import Report
from quantkit.serve import bundle as bundles
from quantkit.serve import check, kv_scales, launch, smoke
from quantkit.serve.settings import ServeSettings
from quantkit.serve.verdict import Check


def prove(bundle: Path, *, out: Path, report: Report) -> dict[str, Any]:
    """Check the bundle, serve it, probe it; smoke.json and server.log go to `out`.

    Returns every check with what was seen, the probe's counts, and the seconds until the server was ready.

    Raises:
        QuantkitError: the folder is no bundle, or its server does not start.
    """
    report("checking digests and flags", 0, 0)
    checks = check.check(bundle, ask_vllm=False)  # starting it asks more
    record = bundles.read_bundle(bundle)
    begin_s = time.monotonic()
    with launch.serving(
        bundle, log=out / "server.log", on_wait=lambda waited_s, line: report("vLLM starts", 0, 0)
    ) as server:
        ready_s = time.monotonic() - begin_s
        report("asking the server", 0, 0)
        model = str(record["settings"]["served_model_name"])
        probed = _probe(bundle, server, model)
        scales = _scales(bundle, server)
    told = dataclasses.asdict(probed) | {"checks": [one._asdict() for one in probed.checks]}
    artifacts.write_json(out / "smoke.json", told)
    every = [*checks, *_processor_checks(server), scales, *_asked(probed)]
    return {
        "checks": [one.model_dump() for one in every],
        "ready_s": round(ready_s, 1),
        "probe": {name: value for name, value in told.items() if name != "checks"},
    }


def probe_once(bundle: Path, *, profile: Literal["auto", "gpu", "cpu"], port: int | None, log: Path) -> Sequence[Check]:
    """Start the bundle's server, ask it what it promises, stop it.

    Raises:
        QuantkitError: the folder is no bundle, something in it has changed, or its server does not start.
    """
    _refuse_damage(bundle)
    model = str(bundles.read_bundle(bundle)["settings"]["served_model_name"])
    with launch.serving(bundle, profile=profile, port=port, log=log) as server:
        probed = _probe(bundle, server, model)
        return [*_processor_checks(server), _scales(bundle, server), *_asked(probed)]


def _probe(bundle: Path, server: launch.Server, model: str) -> smoke.SmokeResult:
    try:
        return smoke.probe(server.base_url, model, speculation=_speculates(bundle, server))
    except smoke.NotAnswered as error:
        raise QuantkitError(f"{error}; the server's log is {server.log}") from error


def _asked(probed: smoke.SmokeResult) -> list[Check]:
    return [Check(**one._asdict()) for one in probed.checks]


def _speculates(bundle: Path, server: launch.Server) -> bool:
    settings = ServeSettings.of(bundles.read_bundle(bundle)["settings"])
    return settings.draft_tokens(server.profile) > 0


def stay_up(
    bundle: Path, *, profile: Literal["auto", "gpu", "cpu"], port: int | None, log: Path, say: Callable[[str], None]
) -> None:
    """Start the bundle's server and keep it until Ctrl-C, having said where it is.

    Raises:
        QuantkitError: the folder is no bundle, something in it has changed, its server does not start, or it ends by
            itself.
    """
    _refuse_damage(bundle)

    def ready(server: launch.Server) -> None:
        scales = _scales(bundle, server)
        if not scales.passed:
            raise QuantkitError(f"{bundle} is not served as it was made: {scales.detail}")
        try:
            smoke.completes(server.base_url, str(bundles.read_bundle(bundle)["settings"]["served_model_name"]))
        except smoke.NotAnswered as error:
            raise QuantkitError(f"{error}; the server's log is {server.log}") from error
        for line in server.substitutes:
            say(f"on this processor: {line}")
        say(f"serving on {server.base_url}/v1 ({server.profile} profile); log: {log}; Ctrl-C stops it")

    launch.foreground(bundle, profile=profile, port=port, log=log, on_ready=ready)


def _refuse_damage(bundle: Path) -> None:
    """Start nothing of a bundle in which a file has changed: a second, or the time to read all of it."""
    failed = [one for one in check.check(bundle, ask_vllm=False) if not one.passed]
    raise_all([f"{bundle} is not started, {one.name}: {one.detail}" for one in failed])


def _scales(bundle: Path, server: launch.Server) -> Check:
    settings = ServeSettings.of(bundles.read_bundle(bundle)["settings"])
    return kv_scales.check(bundle, server.told, server.log, settings=settings, profile=server.profile)


def _processor_checks(server: launch.Server) -> list[Check]:
    """What was done instead on this processor: no failure, but it must be seen."""
    return [Check(name="on this processor", passed=True, detail=line) for line in server.substitutes]
