"""A manifest means complete: written last, never over half a folder, never over somebody else's files."""

import subprocess
import sys
from pathlib import Path

import pytest

from quantkit import artifacts
from quantkit.errors import QuantkitError


def _make(out: Path, *, settings: dict[str, int] | None = None, replace: bool = False, text: str = "x") -> None:
    with artifacts.making(out, "report", inputs={"a": "1"}, settings=settings or {}, replace=replace) as work:
        (work.out / "report.json").write_text(text)
        work.results["answer"] = 42


def _key(settings: dict[str, int] | None = None) -> str:
    return artifacts.work_key("report", {"a": "1"}, settings or {})


def test_the_manifest_holds_results_files_and_cost(tmp_path: Path) -> None:
    _make(tmp_path / "out")
    manifest = artifacts.read_manifest(tmp_path / "out")
    assert manifest is not None and manifest.results == {"answer": 42}
    assert list(manifest.files) == ["report.json"] and manifest.files["report.json"].size == 1
    assert manifest.cost["peak_memory_bytes"] > 1_000_000 and manifest.versions["python"].startswith("3.")
    assert artifacts.is_fresh(tmp_path / "out", _key())
    assert not (tmp_path / "out" / artifacts.PARTIAL_NAME).exists()


def test_changed_settings_or_a_cut_file_are_not_fresh(tmp_path: Path) -> None:
    _make(tmp_path / "out")
    assert not artifacts.is_fresh(tmp_path / "out", _key({"bits": 3}))
    (tmp_path / "out" / "report.json").write_text("")
    assert not artifacts.is_fresh(tmp_path / "out", _key())


def test_an_interrupted_try_has_no_manifest_and_is_resumed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), artifacts.making(out, "report", inputs={"a": "1"}, settings={}) as work:
        (work.partial / "layer-0").write_text("done")
        raise RuntimeError
    assert artifacts.read_manifest(out) is None
    with artifacts.making(out, "report", inputs={"a": "1"}, settings={}) as work:
        assert (work.partial / "layer-0").read_text() == "done"
    assert artifacts.is_fresh(out, _key())


def test_other_work_in_the_folder_is_refused(tmp_path: Path) -> None:
    _make(tmp_path / "out")
    with pytest.raises(QuantkitError, match=r"another run \(report\): choose another --out, or pass --fresh"):
        _make(tmp_path / "out", settings={"bits": 3})
    _make(tmp_path / "out", settings={"bits": 3}, replace=True)
    assert artifacts.is_fresh(tmp_path / "out", _key({"bits": 3}))


def test_an_interrupted_try_of_other_work_is_replaced_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), artifacts.making(out, "report", inputs={}, settings={"bits": 1}) as work:
        (work.partial / "layer-0").write_text("done")
        raise RuntimeError
    with pytest.raises(QuantkitError, match="did not write"):
        _make(out)
    _make(out, replace=True)
    assert artifacts.is_fresh(out, _key())


def test_a_try_that_made_nothing_claims_nothing(tmp_path: Path) -> None:
    """Its input was not whole, say; mended, it is another input, and another work."""
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), artifacts.making(out, "report", inputs={}, settings={"bits": 1}):
        raise RuntimeError
    assert not list(out.iterdir())
    _make(out)


def test_files_that_quantkit_did_not_write_are_never_removed(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for replace in (False, True):
        with pytest.raises(QuantkitError, match="did not write"):
            _make(tmp_path, replace=replace)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_second_process_is_refused_at_once(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from quantkit import artifacts\n"
        f"with artifacts.making(Path({str(tmp_path / 'out')!r}), 'report', inputs={{'a': '1'}}, settings={{}}): pass"
    )
    with artifacts.making(tmp_path / "out", "report", inputs={"a": "1"}, settings={}):
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert second.returncode != 0 and "is being written by another quantkit" in second.stderr


def test_the_digest_of_an_artefact_is_that_of_its_files(tmp_path: Path) -> None:
    _make(tmp_path / "one")
    _make(tmp_path / "two", settings={"bits": 3})
    _make(tmp_path / "three", text="y")
    assert artifacts.digest(tmp_path / "one") == artifacts.digest(tmp_path / "two")
    assert artifacts.digest(tmp_path / "one") != artifacts.digest(tmp_path / "three")
    with pytest.raises(QuantkitError, match="is not there"):
        artifacts.digest(tmp_path / "four")


def test_a_broken_manifest_is_an_error_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / artifacts.MANIFEST_NAME).write_text('{"kind": "cake"}')
    with pytest.raises(QuantkitError, match="is not a manifest of this quantkit"):
        artifacts.read_manifest(tmp_path)
