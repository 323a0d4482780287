"""Which types of KV cache the attention backends of the installed vLLM keep, and where.

    python benchmarks/kv_cache_types.py

Prints the table of docs/kv_cache.md, read from vLLM's own classes: `supported_kv_cache_dtypes`,
`supports_compute_capability`, and for FlashAttention, which asks further, `flash_attn_supports_kv_cache_dtype`.
"""

import ast
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast, get_args

from quantkit import vllm_environment
from quantkit.kv_scheme import KvCacheType

BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION", "ROCM_ATTN", "CPU_ATTN")
_CAPABILITIES = ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
_PLAIN = ("auto", "float16", "bfloat16")


def main() -> None:
    """Print the table."""
    print(table(read()))


def read() -> dict[str, dict[str, list[str]]]:
    """Backend -> type of cache -> where, as the installed vLLM says it in a process of its own.

    Raises:
        subprocess.CalledProcessError: vLLM's classes are not where they were.
    """
    command = [sys.executable, "-P", __file__, "--ask"]
    env = vllm_environment.process_environment(on_cpu=vllm_environment.is_cpu_build())
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=True)
    return cast("dict[str, dict[str, list[str]]]", json.loads(run.stdout.splitlines()[-1]))


def table(found: dict[str, dict[str, list[str]]]) -> str:
    """As Markdown: types down, backends across."""
    kinds = [kind for kind in get_args(KvCacheType) if kind not in _PLAIN]
    kinds += sorted({kind for kept in found.values() for kind in kept} - {*kinds, *_PLAIN})
    lines = ["| type | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for kind in kinds:
        cells = [", ".join(kept.get(kind, [])) or "-" for kept in found.values()]
        lines.append(f"| `{kind}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ask() -> dict[str, dict[str, list[str]]]:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    found = {}
    for name in BACKENDS:
        module, _, title = AttentionBackendEnum[name].value.rpartition(".")
        types, places = _types(module, title), _places(name, module, title)
        found[name] = {kind: places if name != "FLASH_ATTN" else _flash(kind) for kind in types if kind not in _PLAIN}
    return found


def _types(module: str, title: str) -> list[str]:
    """`supported_kv_cache_dtypes`; from the source where its module needs packages that are not here."""
    try:
        return list(getattr(importlib.import_module(module), title).supported_kv_cache_dtypes)
    except ImportError:
        return [str(kind) for kind in ast.literal_eval(_assigned(module, title, "supported_kv_cache_dtypes"))]


def _assigned(module: str, title: str, name: str) -> ast.expr:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    for node in ast.walk(ast.parse(Path(spec.origin).read_text())):
        if isinstance(node, ast.ClassDef) and node.name == title:
            for part in node.body:
                if isinstance(part, ast.AnnAssign) and ast.unparse(part.target) == name and part.value is not None:
                    return part.value
    raise LookupError(f"{module}.{title} has no {name}")


def _places(name: str, module: str, title: str) -> list[str]:
    if name == "CPU_ATTN":
        return ["x86 with AVX-512 or AMX"] if "AVX-512 or AMX" in _source(module) else ["CPU"]
    if name == "ROCM_ATTN":
        return ["ROCm"]
    from vllm.platforms.interface import DeviceCapability

    try:
        backend: Any = getattr(importlib.import_module(module), title)
    except ImportError:
        method = next(
            node for node in ast.walk(ast.parse(_source(module)))
            if isinstance(node, ast.FunctionDef) and node.name == "supports_compute_capability"
        )  # fmt: skip
        method.decorator_list = []
        scope: dict[str, Any] = {"DeviceCapability": DeviceCapability}
        exec(compile(ast.Module([method], []), module, "exec"), scope)
        asked = [cap for cap in _CAPABILITIES if scope[method.name](None, DeviceCapability(*cap))]
        return [".".join(map(str, cap)) for cap in asked]
    asked = [cap for cap in _CAPABILITIES if backend.supports_compute_capability(DeviceCapability(*cap))]
    return [".".join(map(str, cap)) for cap in asked]


def _flash(kind: str) -> list[str]:
    """What FlashAttention says of itself on each generation, in each of its versions."""
    from vllm.v1.attention.backends import fa_utils

    found = []
    for major, minor in _CAPABILITIES:
        for version in (2, 3, 4):

            class Platform:
                @staticmethod
                def is_xpu() -> bool:
                    return False

                @staticmethod
                def is_device_capability_family(family: int, major: int = major) -> bool:
                    return family // 10 == major

            kept = fa_utils.current_platform, fa_utils.get_flash_attn_version
            fa_utils.current_platform, fa_utils.get_flash_attn_version = Platform, lambda version=version, **_: version
            try:
                if fa_utils.flash_attn_supports_kv_cache_dtype(kind, head_size=128):
                    found.append(f"{major}.{minor} (version {version})")
            finally:
                fa_utils.current_platform, fa_utils.get_flash_attn_version = kept
    return found


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text()


if __name__ == "__main__":
    print(json.dumps(_ask())) if "--ask" in sys.argv else main()
