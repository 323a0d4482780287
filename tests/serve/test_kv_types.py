"""The types of KV cache that are allowed, and the table in the docs, against the installed vLLM's own classes."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest

from quantkit.kv_scheme import KvCacheType
from quantkit.serve.settings import CPU_KV_CACHE_DTYPES

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kv_cache_types", ROOT / "benchmarks" / "kv_cache_types.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(script: ModuleType) -> dict[str, dict[str, list[str]]]:
    kept: dict[str, dict[str, list[str]]] = script.read()
    return kept


def test_every_type_that_is_offered_has_a_backend(found: dict[str, dict[str, list[str]]]) -> None:
    for kind in set(get_args(KvCacheType)) - {"auto", "float16", "bfloat16"}:
        assert any(kept.get(kind) for kept in found.values()), kind


def test_a_cpu_is_given_what_its_backend_knows(found: dict[str, dict[str, list[str]]]) -> None:
    assert set(CPU_KV_CACHE_DTYPES) - {"auto", "float16", "bfloat16"} == set(found["CPU_ATTN"])


def test_the_table_in_the_docs_is_that_of_this_vllm(script: ModuleType, found: dict[str, dict[str, list[str]]]) -> None:
    page = (ROOT / "docs" / "kv_cache.md").read_text()
    assert page.split("<!-- types -->\n")[1].split("\n<!-- end -->")[0] == script.table(found)
