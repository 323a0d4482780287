"""Every pin has the hashes of its files; a file with another hash is not installed."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).parents[1] / "requirements"
PINS = sorted(
    path for folder in (REQUIREMENTS, REQUIREMENTS / "engines") for path in folder.glob("*.txt")
    if path.stem != "in" and not path.stem.startswith("overrides")
)  # fmt: skip


@pytest.mark.parametrize("pins", PINS, ids=lambda path: path.stem)
def test_every_pin_has_hashes(pins: Path) -> None:
    wanted = set(re.findall(r"^[a-z0-9._-]+==[^\s;]+", pins.read_text(), re.MULTILINE))
    text = (pins.parent / "hashes" / pins.name).read_text()
    hashed = set(re.findall(r"^(\S+==\S+) \\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE))
    assert wanted and wanted - hashed == set()
    assert "://" not in text  # which registry a machine takes them from is its own affair


def test_a_file_with_another_hash_is_refused(tmp_path: Path) -> None:
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    assert uv, "uv is in requirements/uv.txt"
    wheel = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("thing.py", "")
        file.writestr("thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
        file.writestr("thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("thing-1.0.dist-info/RECORD", "")
    (tmp_path / "pins.txt").write_text("thing==1.0\n")
    (tmp_path / "hashes.txt").write_text(f"thing==1.0 \\\n    --hash=sha256:{'0' * 64}\n")
    command = [uv, "pip", "install", "--no-config", "--offline", "--no-index", "--find-links", str(tmp_path)]
    command += ["--no-deps", "--target", str(tmp_path / "site"), "-r", str(tmp_path / "pins.txt")]
    refused = subprocess.run(
        [*command, "-c", str(tmp_path / "hashes.txt")], capture_output=True, text=True, check=False
    )
    assert refused.returncode and "ash mismatch" in refused.stderr
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0  # it was the hash alone
