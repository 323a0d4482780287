"""Are the KV scales that a running engine divides by those in the checkpoint? Read back, layer by layer.

vLLM takes 1.0 for a scale that it does not find, and for compressed-tensors says nothing of it.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors import safe_open

from quantkit.capacity import sizing
from quantkit.kv_scheme import has_kv_scheme, kv_scale_name
from quantkit.serve.settings import DRAFT_DIR, TARGET_DIR, ServeSettings
from quantkit.serve.verdict import Check
from quantkit.speculation import Profile

Scales = dict[str, list[float]]  # q, k, v
_LAYER = re.compile(r"layers\.(\d+)\.")
_WARNING = "Using KV cache scaling factor 1.0"


@contextmanager
def told() -> Iterator[Path]:
    """A folder for what vLLM's processes loaded: they write it down where SCALES_VARIABLE names it to them."""
    with TemporaryDirectory(prefix="quantkit-scales-") as folder:
        yield Path(folder)


def expected(checkpoint: Path) -> dict[int, Scales]:
    """Each layer's scales in the files, those of queries where there are any; empty where config.json promises none."""
    config = sizing.read_config(checkpoint)
    if not has_kv_scheme(config):
        return {}
    places = {name: path for path in sizing.safetensors_files(checkpoint) for name in sizing.tensor_shapes(path)}
    found: dict[int, Scales] = {}
    for index in range(int(config["num_hidden_layers"])):
        names = {which: name for which in "qkv" if (name := kv_scale_name(places, index, which))}
        found[index] = {which: _values(places[name], name) for which, name in names.items()}
        if len(found[index].get("q", [])) > 1:  # one a query head: an engine has one a key-value head
            found[index]["q"] = found[index]["q"][:: int(config["num_attention_heads"]) // sizing.kv_heads(config)]
    return found


def other_than_recorded(bundle: Path, record: Mapping[str, Any]) -> list[str]:
    """The target's scales that are not those that were calibrated, by what quantization said of each layer."""
    said = record["measured"].get(TARGET_DIR, {}).get("kv_cache") or {}
    found = expected(bundle / TARGET_DIR)
    problems = []
    for index, layer in enumerate(said.get("layers") or []):
        for name, note in layer.items():
            held, calibrated = found.get(index, {}).get(name.removesuffix("_scale"), []), note["scales"]
            if not np.isin(np.asarray(held, np.float32), np.asarray(calibrated, np.float32)).all():
                problems.append(f"layer {index}: {name} is {held}, calibrated was {calibrated}")
    return problems


def differences(bundle: Path, folder: Path, *, roles: Sequence[str]) -> tuple[list[str], str]:
    """What the engine loaded otherwise than the bundle's checkpoints say, a line each; and what was seen, in words."""
    told = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    problems, seen = [], []
    for role in roles:
        wanted = expected(bundle / role)
        loaded = [one for one in told if ("draft" in one["layer"]) == (role == "draft")]
        if not wanted:
            continue
        if not loaded:
            problems.append(f"{role}: the engine said of no layer what it loaded")
            continue
        problems += [f"{role}: {line}" for line in _differing(wanted, loaded)]
        kinds = ", ".join(sorted({one["cache"] for one in loaded}))
        seen.append(f"{role}: {len(loaded)} layers hold the file's scales, cache of type {kinds}")
    return problems, "; ".join(seen) or "no checkpoint brings any"


def check(bundle: Path, folder: Path, log: Path, *, settings: ServeSettings, profile: Profile) -> Check:
    """Whether the running engine divides by the bundle's scales; where it has none, whether that was asked for."""
    roles = [TARGET_DIR, DRAFT_DIR] if settings.draft_tokens(profile) else [TARGET_DIR]
    problems, seen = differences(bundle, folder, roles=roles)
    if _WARNING in log.read_text(encoding="utf-8", errors="replace") and not settings.uncalibrated_kv_cache:
        problems.append("vLLM says that an FP8 cache runs at scale 1.0")
    return Check(name="KV scales of the running engine", passed=not problems, detail="; ".join(problems) or seen)


def _differing(wanted: Mapping[int, Scales], loaded: list[dict[str, Any]]) -> Iterator[str]:
    layers: dict[int, list[dict[str, Any]]] = {}
    for one in loaded:
        match = _LAYER.search(one["layer"])
        if match:
            layers.setdefault(int(match.group(1)), []).append(one)
    for index, scales in wanted.items():
        if index not in layers:
            yield f"layer {index} was not loaded"
        for one in layers.get(index, []):
            for which, values in scales.items():
                if not _is_part(one[which], values):
                    yield f"layer {index} divides by {which}_scale {one[which]}, the file has {values}"


def _is_part(loaded: Sequence[float], values: Sequence[float]) -> bool:
    """Whether these are the scales, or those of neighbouring heads, which a rank of several has alone."""
    held, count = np.asarray(loaded, np.float32), len(loaded)
    file = np.asarray(values, np.float32)
    return any(np.array_equal(held, file[begin : begin + count]) for begin in range(len(file) - count + 1))


def _values(path: Path, name: str) -> list[float]:
    with safe_open(path, framework="numpy") as file:
        return [float(value) for value in np.asarray(file.get_tensor(name), dtype=np.float32).flatten()]
