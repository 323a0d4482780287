"""What a bundle's server is asked with: `smoke/`, whether it keeps what was promised, and `load/`, real prompts."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.serve import rendering
from quantkit.serve.settings import ServeSettings
from quantkit.serve.verdict import Check, of_problems

SMOKE, LOAD, PROMPTS = "smoke/smoke.py", "load/load.sh", "load/prompts.jsonl"


def files(settings: ServeSettings, record: Mapping[str, Any]) -> dict[str, str]:
    """Path in the bundle -> text."""
    most = settings.max_num_seqs * settings.replicas
    streams = [count for count in (1, 2, 4, 8, 16, 32, 64, 128) if count < most] + [most]
    return {
        SMOKE: Path(__file__).with_name("smoke.py").read_text(encoding="utf-8"),
        LOAD: rendering.render("load/load.sh.j2", model=shlex.quote(settings.served_model_name), streams=streams),
        PROMPTS: (rendering.templates() / "load" / "prompts.jsonl").read_text(encoding="utf-8"),
    }


def checks(bundle: Path) -> list[Check]:
    """Whether they are there; what they hold is in SHA256SUMS."""
    missing = [name for name in (SMOKE, LOAD, PROMPTS) if not (bundle / name).is_file()]
    return [
        of_problems("smoke and load", [f"{name} is missing: build the bundle again" for name in missing], good="there")
    ]
