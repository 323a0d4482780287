"""Environments are made by the real venv and pip, from wheels of a few bytes: whole, or not used."""

import threading
import time
import zipfile
from pathlib import Path

import pytest

from quantkit.engines import environment, registry
from quantkit.errors import QuantkitError
from quantkit.progress import LINE, silent

PINS = "# a head\nautoawq==0.2.9\nsetuptools==84.2.1\ntorch==2.13.0\n"


def _wheel(folder: Path, name: str, version: str) -> None:
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"version = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


@pytest.fixture
def pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pins of a small engine, its wheels in a folder, and no registry."""
    wheels, path = tmp_path / "wheels", tmp_path / "pins.txt"
    wheels.mkdir()
    for name, version in (("autoawq", "0.2.9"), ("setuptools", "84.2.1"), ("torch", "2.13.0")):
        _wheel(wheels, name, version)
    path.write_text(PINS)
    monkeypatch.setattr(registry, "requirements", lambda name: path)
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name in ("PIP", "UV"):
        monkeypatch.setenv(f"{name}_NO_INDEX", "1")
        monkeypatch.setenv(f"{name}_FIND_LINKS", str(wheels))
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    return path


def test_made_once_by_whoever_comes_first_and_only_when_whole(pins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison = pins.with_name("poison")
    poison.mkdir()
    (poison / "venv.py").write_text("raise SystemExit('another venv')")
    monkeypatch.setenv("PYTHONPATH", str(poison))
    half = environment.folder("autoawq")
    (half / "bin").mkdir(parents=True)
    (half / "bin" / "python").write_text("half of one")
    assert environment.state("autoawq") is None, "what has no state file is not used"

    said: list[str] = []
    found: list[environment.State] = []
    both = [
        threading.Thread(
            target=lambda: found.append(
                environment.ensure("autoawq", lambda what, done, total: said.append(what) if total == LINE else None)
            )
        )
        for _ in range(2)
    ]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert found[0] == found[1] == environment.state("autoawq"), "the second waited for the first"
    assert any("making it takes about" in line.lower() and "GB" in line for line in said)
    assert any("waiting for it" in line for line in said)
    assert list(half.glob("lib/*/site-packages/autoawq.py"))
    begin_s = time.monotonic()
    assert environment.ensure("autoawq", silent) == found[0]
    assert time.monotonic() - begin_s < 0.5, "later uses start at once"

    pins.write_text(PINS + "another==1\n")
    assert environment.folder("autoawq") != half and environment.state("autoawq") is None, "other pins, other folder"


def test_what_can_not_be_installed_is_said_and_not_used(pins: Path) -> None:
    pins.write_text(PINS.replace("0.2.9", "0.3"))
    with pytest.raises(QuantkitError, match=r"autoawq can not be made: installing autoawq.*autoawq==0\.3") as caught:
        environment.ensure("autoawq", silent)
    assert environment.state("autoawq") is None
    log = Path(str(caught.value).rpartition(" ")[2])
    assert log.is_file() and "torch" in log.read_text()
