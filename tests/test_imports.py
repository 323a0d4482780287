"""Imports run one way: each module may import only what stands before it."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "quantkit"

# Lower rooms first. A module may import modules of lower rooms and of its own, never of a higher one.
ROOMS = [
    {"errors", "__init__"},
    {"provenance", "progress", "formats", "hardware", "losses", "shards", "patterns", "foreign"},
    {"speculation", "quantization_config", "vllm_support", "processes", "keeper", "headers", "chat_template_worker"},
    {"artifacts", "architecture", "ranks", "chat_template"},
    {
        "kv_scheme",
        "kv_cache",
        "recipe",
        "checkpoint",
        "decoder",
        "text",
        "gguf",
        "vllm_environment",
        "vllm_plugin",
        "vllm_kernel",
    },
    {"capacity", "pages", "tokens", "offline", "offline_worker", "cluster"},
    {"conversations"},
    {"quantize", "draft", "evaluate", "serve", "engines"},
    {"bench"},
    {"stages"},
    {"pipeline", "summary"},
    {"cli"},
]
# What is pure maths imports torch, the standard library, and each other.
PURE = {"formats", "quantization_config", "vllm_support", "quantize.grid", "quantize.gptq", "quantize.awq"}
PURE |= {"losses", "quantize.gram", "quantize.smooth", "patterns"}


def _modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in ROOT.rglob("*.py")
        if "templates" not in path.parts
    }


def _imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "quantkit" else set()
            found.add(node.module)
    return found


def _room(module: str) -> int:
    top = module.split(".")[0]
    levels = [level for level, room in enumerate(ROOMS) if top in room]
    assert levels, f"{module} stands in no room: add it to the order of tests/test_imports.py"
    return levels[0]


def test_imports_run_one_way() -> None:
    modules = _modules()
    for module, path in modules.items():
        for name in _imports(path):
            inner = name.removeprefix("quantkit.")
            if not name.startswith("quantkit.") or (
                inner not in modules
                and inner.split(".")[0] not in modules
                and not (ROOT / inner.split(".")[0]).is_dir()
            ):
                continue
            assert _room(inner) <= _room(module), f"{module} imports {inner}, which stands above it"
            if _room(inner) == _room(module) and _room(module) == _room("quantize"):
                assert inner.split(".")[0] == module.split(".")[0], f"{module} imports {inner}: they meet on disk only"


def test_pure_maths_imports_torch_alone() -> None:
    import sys

    for module in PURE:
        for name in _imports(_modules()[module]):
            top = name.split(".")[0]
            pure = name.removeprefix("quantkit.")
            outside = top in sys.stdlib_module_names or top in ("torch", "regex")
            assert outside or any(pure.startswith(p) for p in PURE), f"{module} imports {name}"


def test_no_module_is_imported_in_a_circle() -> None:
    modules = _modules()
    edges = {
        module: {
            inner for name in _imports(path) if (inner := name.removeprefix("quantkit.")) in modules and inner != module
        }
        for module, path in modules.items()
    }
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"imported in a circle: {' -> '.join((*way, module))}"
        if module not in done:
            for inner in edges[module]:
                visit(inner, (*way, module))
            done.add(module)

    for module in modules:
        visit(module, ())
