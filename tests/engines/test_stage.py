"""`quantkit quantize --engine` from the command line to the evaluation, with a worker that copies a checkpoint."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from quantkit import artifacts
from quantkit.checkpoint import open_checkpoint
from quantkit.cli import main
from quantkit.engines import environment, registry

COPY = """
import json, shutil, sys, pathlib
folder = pathlib.Path(sys.argv[1])
job = json.loads((folder / "job.json").read_bytes())
print("tokens", (pathlib.Path(job["tokens"]).stat().st_size), flush=True)
shutil.copytree({made!r}, job["out"])
result = {{"engine": "llmcompressor", "version": {version!r}, "method": job["method"], "format": "compressed-tensors",
          "import_cpu_s": 0.0, "notes": ["a note of the engine"]}}
(folder / "result.json").write_text(json.dumps(result))
"""


def _call(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return done.exit_code, done.stderr


def _quantize(checkpoint: Path, out: Path, text: Path, *more: object) -> tuple[int, str]:
    sizes = ("--samples", 4, "--length", 64, "--group-size", 32)
    return _call("quantize", checkpoint, "--out", out, "--calibration", text, *sizes, *more)


@pytest.fixture(scope="module")
def native(tiny_llama: Path, texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the native engine makes."""
    out = tmp_path_factory.mktemp("native") / "made"
    assert _quantize(tiny_llama, out, texts[0], "--effort", "fast")[0] == 0
    return out


@pytest.fixture
def engine(native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An llm-compressor that needs no environment and copies what the native engine made."""
    worker = tmp_path / "worker.py"
    worker.write_text(COPY.format(made=str(native), version=registry.ENGINES["llmcompressor"].version))
    monkeypatch.setattr(environment, "ensure", lambda name, report: None)
    monkeypatch.setattr(environment, "python", lambda name: Path(sys.executable))
    monkeypatch.setattr(registry, "worker", lambda name: worker)
    return worker


def test_from_the_command_line_to_the_evaluation(
    engine: Path, tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    out, asked = tmp_path / "out", ("--engine", "llmcompressor", "--method", "awq", "--engine-option", "steps=3")
    code, said = _quantize(tiny_llama, out, texts[0], *asked)
    assert code == 0 and "a note of the engine" in said, said
    manifest = artifacts.read_manifest(out)
    assert manifest is not None
    ran = manifest.results["engine"]
    assert (ran["name"], ran["method"], ran["options"]) == ("llmcompressor", "awq", {"steps": 3})
    assert ran["version"] == registry.ENGINES["llmcompressor"].version
    assert ran["wall_s"] > 0 and ran["peak_memory_bytes"] > 0
    assert open_checkpoint(out, quantized=True).storage is not None
    assert _quantize(tiny_llama, out, texts[0], *asked)[1].startswith("fresh")
    assert CliRunner().invoke(main, ["inspect", str(out)]).exit_code == 0

    code, said = _call(
        "eval", out, "--reference", tiny_llama, "--out", tmp_path / "report", "--text", texts[1], "--samples", 3,
        "--length", 64, "--chat", "no", "--profile", "none",
    )  # fmt: skip
    assert code == 0, said


def test_another_scheme_than_asked_is_no_artefact(
    engine: Path, tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, said = _quantize(tiny_llama, out, texts[0], "--engine", "llmcompressor", "--symmetric")
    assert code == 2 and "asked for was compressed-tensors, 4 bits, group size 32, symmetric" in said, said
    assert artifacts.read_manifest(out) is None
    engine.write_text("raise SystemExit('out of luck')")
    code, said = _quantize(tiny_llama, out, texts[0], "--engine", "llmcompressor", "--symmetric")
    assert code == 2 and "out of luck" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--engine", "autogptq", "--effort", "default", "--bits", "auto", "--average-bits", "5"], "3 problems"),
        (["--engine", "autoawq", "--memory-budget", "4GiB"], "takes no memory_budget"),
        (["--engine", "autoawq", "--override", "*.o_proj:group_size=64"], "takes no overrides"),
        (["--engine-option", "iters=20"], "native takes no engine_options (iters)"),
        (["--method", "gptaq"], "native has no method gptaq: choose gptq, awq, awq+gptq, or the engine gptqmodel"),
        (["--engine", "autogptq", "--symmetric", "--group-size", "48"], "choose one of -1, 32, 64, 128"),
    ],
)
def test_what_is_not_taken_is_refused_before_the_work(
    asked: list[str], said: str, engine: Path, tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    code, found = _quantize(tiny_llama, tmp_path / "out", texts[0], *asked)
    assert code == 2 and said in found, found
    assert not (tmp_path / "out" / ".partial" / "tokens.safetensors").exists()


def test_the_list_and_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    folder = environment.folder("autoround")
    folder.mkdir(parents=True)
    said = CliRunner().invoke(main, ["engines"]).stdout
    for name, engine in registry.EVERY.items():
        assert f"{name} {engine.version}" in said
    assert "half made" in said and said.count("not installed") == 5
    python = environment.python("autoround")
    python.parent.mkdir()
    python.write_text("")
    state = environment.State(engine="autoround", version="1", python="3", disk_bytes=1_500_000_000, seconds=1)
    (folder / "quantkit-engine.json").write_text(json.dumps(state.model_dump()))
    assert "installed, 1.5 GB" in CliRunner().invoke(main, ["engines"]).stdout
