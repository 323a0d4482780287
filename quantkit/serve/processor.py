"""What this processor cannot do of a bundle's CPU profile, and what stands for it."""

import json
from pathlib import Path
from typing import NamedTuple

import yaml

from quantkit import hardware
from quantkit.serve.settings import CONFIG_FILES, DRAFT_DIR, TARGET_DIR


class Substitute(NamedTuple):
    """flags: what to add to vLLM's command line; said: what is done instead of what, and why."""

    flags: tuple[str, ...]
    said: str


def substitutes(bundle: Path) -> list[Substitute]:
    """What `serve.cpu.yaml` asks for and x86 without AVX-512 cannot do; nothing on other processors."""
    if not hardware.lacks_avx512():
        return []
    found = []
    configs = [_config(bundle / role) for role in (TARGET_DIR, DRAFT_DIR)]
    if any("quantization_config" in config for config in configs):
        found.append(Substitute((), "4-bit linears: dequantized, in float32: no AVX-512 for vLLM's kernel"))
    flags = yaml.safe_load((bundle / CONFIG_FILES["cpu"]).read_text(encoding="utf-8")) or {}
    dtype = str(flags.get("kv-cache-dtype", "auto"))
    scheme = any((config.get("quantization_config") or {}).get("kv_cache_scheme") for config in configs)
    if dtype.startswith("fp8") or (dtype == "auto" and scheme):
        said = f"kv-cache-dtype {dtype}: bfloat16 instead: no AVX-512 for vLLM's FP8 cache"
        found.append(Substitute(("--kv-cache-dtype", "bfloat16"), said))
    return found


def _config(checkpoint: Path) -> dict[str, dict[str, object]]:
    path = checkpoint / "config.json"
    return json.loads(path.read_bytes()) if path.is_file() else {}
