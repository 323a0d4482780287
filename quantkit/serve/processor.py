"""What this processor cannot do of vLLM's settings, and what stands for it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from quantkit import foreign, hardware
from quantkit.kv_scheme import has_kv_scheme
from quantkit.serve import bundle as bundles
from quantkit.serve.settings import DRAFT_DIR, TARGET_DIR


class Substitute(NamedTuple):
    """flags: what to add to vLLM's command line; said: what is done instead of what, and why."""

    flags: tuple[str, ...]
    said: str


def substitutes(bundle: Path) -> list[Substitute]:
    """What `serve.cpu.yaml` asks for and x86 without AVX-512 cannot do; nothing on other processors."""
    return substitutes_for(
        bundles.read_flags(bundle, "cpu"), [_config(bundle / role) for role in (TARGET_DIR, DRAFT_DIR)]
    )


def substitutes_for(flags: Mapping[str, Any], configs: Sequence[Mapping[str, Any]]) -> list[Substitute]:
    """What these flags of vLLM's ask for with these models, the target's config.json first."""
    if not hardware.lacks_avx512():
        return []
    found = []
    quantizations = [config["quantization_config"] for config in configs if config.get("quantization_config")]
    if quantizations:
        found.append(Substitute((), "4-bit linears: dequantized, in float32: no AVX-512 for vLLM's kernel"))
    cache, dtype = str(flags.get("kv-cache-dtype", "auto")), str(flags.get("dtype", "auto"))
    wide = all(map(_runs_in_float32, quantizations))
    if wide and dtype != "float32":
        found.append(Substitute(("--dtype", "float32"), f"dtype {dtype}: float32 instead: no 16-bit products"))
    scheme = has_kv_scheme(configs[0])
    if not wide and (cache.startswith("fp8") or (cache == "auto" and any(map(has_kv_scheme, configs)))):
        # the model's own type: with another one vLLM's CPU attention reads noise, and says nothing
        stored = str(configs[0].get("dtype") or configs[0].get("torch_dtype"))
        kept = "float16" if dtype == "float16" or (dtype == "auto" and stored != "bfloat16") else "bfloat16"
        found.append(_cache_instead(cache, kept, "--kv-cache-dtype", kept))
    elif wide and (cache != "auto" or scheme):
        # the model's own float32 has no name: it is what auto means where the checkpoint promises no FP8
        more = ("--hf-overrides", json.dumps({"quantization_config": _bare(configs[0])})) if scheme else ()
        found.append(_cache_instead(cache, "float32", "--kv-cache-dtype", "auto", *more))
    return found


def _cache_instead(asked: str, kept: str, *flags: str) -> Substitute:
    why = "no AVX-512 for vLLM's FP8 cache" if asked == "auto" or asked.startswith("fp8") else "the model's own type"
    return Substitute(flags, f"kv-cache-dtype {asked}: {kept} instead: {why}")


def _runs_in_float32(quantization: Mapping[str, Any]) -> bool:
    """vLLM refuses float32 for awq and gptq; and scales a head are loaded for an FP8 cache alone."""
    strategy = (quantization.get("kv_cache_scheme") or {}).get("strategy", "tensor")
    return quantization.get("quant_method") == "compressed-tensors" and strategy == "tensor"


def _bare(config: Mapping[str, Any]) -> dict[str, Any]:
    return dict(config["quantization_config"]) | {"kv_cache_scheme": None}


def _config(checkpoint: Path) -> dict[str, Any]:
    try:
        return foreign.json_object(checkpoint / "config.json", remedy="build the bundle again", within=checkpoint)
    except FileNotFoundError:
        return {}
