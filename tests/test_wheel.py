"""The wheel works where there is no checkout: templates, profiles, recipes, engines' workers and pins are in it."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import write_tiny_llama

_ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel; what it depends on is that of this one."""
    made = tmp_path_factory.mktemp("wheel")
    _run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", made / "dist"], cwd=_ROOT)
    (wheel,) = (made / "dist").glob("*.whl")
    _run([sys.executable, "-m", "venv", "--without-pip", made / "venv"], cwd=made)
    python = made / "venv" / "bin" / "python"
    into = Path(_run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=made).strip())
    # An editable quantkit of this environment is a .pth file of its own, which is not read through another.
    (into / "pinned.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel],
        cwd=made,
    )
    return python


def test_everything_that_is_no_module_is_in_it(installed: Path, tmp_path: Path) -> None:
    program = (
        "import quantkit; from pathlib import Path; root = Path(quantkit.__file__).parent; print(root)\n"
        "print(*sorted(str(path.relative_to(root)) for path in root.rglob('*') if path.is_file()), sep='\\n')"
    )
    root, *files = _run([installed, "-c", program], cwd=tmp_path).splitlines()
    assert Path(root).is_relative_to(installed.parents[1])
    for room, inside in [
        ("serve", "serve/templates"), ("eval", "evaluate/data"), ("recipes", "recipes"),
        ("requirements/engines", "engines/requirements"), ("quantkit/engines/workers", "engines/workers"),
    ]:  # fmt: skip
        wanted = [
            f"{inside}/{path.relative_to(_ROOT / room)}"
            for path in (_ROOT / room).rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        ]
        assert wanted and not set(wanted) - set(files)


def test_commands_work_in_another_folder(installed: Path, tmp_path: Path) -> None:
    command = [installed.with_name("quantkit")]
    model = write_tiny_llama(tmp_path / "model")
    assert "serve" in _run([*command, "--help"], cwd=tmp_path)
    assert "h100" in _run([*command, "plan", "model", "--gpu", "h100-80gb", "--context", "1024"], cwd=tmp_path).lower()
    assert "gptqmodel" in _run([*command, "engines"], cwd=tmp_path)
    _run([*command, "serve", "bundle", "--target", model, "--out", "bundle"], cwd=tmp_path)
    assert (tmp_path / "bundle" / "bundle.json").is_file() and (tmp_path / "bundle" / "README.md").is_file()


def test_profiles_and_recipes_are_found_by_name(installed: Path, tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; import quantkit\n"
        "from quantkit.evaluate import gates; from quantkit.recipe import load_recipe\n"
        "print(gates.profile('strict'))\n"
        "print(load_recipe(Path(quantkit.__file__).parent / 'recipes' / 'quickstart.yaml'))"
    )
    assert _run([installed, "-c", program], cwd=tmp_path)


def _run(command: list[object], *, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout
