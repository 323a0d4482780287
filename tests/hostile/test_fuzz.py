"""The short form of the fuzzer, and random bytes and JSON by hypothesis; the long form is run by hand."""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantkit import artifacts, foreign, headers
from quantkit.errors import QuantkitError
from quantkit.recipe import load_recipe
from tests.hostile.fuzz import problem_of

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)
_QUICK = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def test_mutated_files_of_every_format_are_read_or_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.hostile.fuzz", "--inputs", "60", "--seed", "1", "--scratch", str(tmp_path)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]


@_QUICK
@given(st.binary(max_size=200))
def test_any_bytes_as_safetensors(data: bytes) -> None:
    _refused_or_read("model.safetensors", data, headers.header)


@_QUICK
@given(_JSON)
def test_any_weight_map(value: object) -> None:
    data = json.dumps({"weight_map": value}).encode()
    _refused_or_read(headers.INDEX_NAME, data, lambda path: headers.weight_map(path.parent))


@_QUICK
@given(_JSON)
def test_any_json_as_a_manifest(value: object) -> None:
    _refused_or_read(
        artifacts.MANIFEST_NAME, json.dumps(value).encode(), lambda path: artifacts.read_manifest(path.parent)
    )


@_QUICK
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_as_a_recipe(data: bytes) -> None:
    _refused_or_read("recipe.yaml", data, load_recipe)


def test_a_message_of_several_lines_or_with_an_escape_is_noticed() -> None:
    assert problem_of("a: b\nc") and problem_of("a: \x1b[31m") and problem_of("") and not problem_of("a: get it again")


@pytest.mark.parametrize("depth", [1000, 100_000])
def test_deep_json_is_refused(tmp_path: Path, depth: int) -> None:
    file = tmp_path / "config.json"
    file.write_text("[" * depth + "]" * depth)
    with pytest.raises(QuantkitError, match=r"nested more than 64 deep|is not JSON"):
        foreign.json_value(file, remedy="get it again")


def _refused_or_read(name: str, data: bytes, read: object) -> None:
    assert callable(read)
    with TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(data)
        try:
            read(file)
        except QuantkitError as error:
            assert not problem_of(str(error)), str(error)
