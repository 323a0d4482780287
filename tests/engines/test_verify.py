"""What an engine made is opened by our own unpacker: only the scheme that was asked for, whole and finite, is taken."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit import tokens
from quantkit.checkpoint import open_checkpoint
from quantkit.engines import verify
from quantkit.errors import QuantkitError
from quantkit.formats import Storage
from quantkit.progress import silent
from quantkit.quantize import stream
from quantkit.quantize.layer import Settings

GPTQ = Storage("gptq", 4, 32, True)


@pytest.fixture(scope="module")
def original(tiny_llama: Path, texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ checkpoint of the tiny model, symmetric, groups of 32."""
    folder = tmp_path_factory.mktemp("verify")
    source = open_checkpoint(tiny_llama)
    windows = tokens.tokenize([str(texts[0])], tokens.load_tokenizer(tiny_llama), samples=2, length=64, seed=0)
    settings = Settings("gptq", GPTQ.format, GPTQ.bits, GPTQ.group_size, GPTQ.symmetric, True, 0.01)
    stream.quantize_layers(source, windows, settings, folder=folder / "layers", device="cpu", report=silent)
    (folder / "made").mkdir()
    stream.write_checkpoint(source, settings, folder=folder / "layers", out=folder / "made")
    return folder / "made"


@pytest.fixture
def made(original: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(original, tmp_path / "made"))


def _take(made: Path, tiny_llama: Path, wanted: Storage = GPTQ) -> Path:
    out = made.with_name("out")
    out.mkdir()
    verify.take_over(
        made, out, source=open_checkpoint(tiny_llama), wanted=wanted, name="echo", report=silent
    )  # fmt: skip
    return out


def _config(made: Path, **changes: object) -> None:
    path = made / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_was_asked_for_is_moved_with_the_sources_tokenizer(made: Path, tiny_llama: Path) -> None:
    (made / "tokenizer.json").write_text("another")
    (made / "recipe.yaml").write_text("the engine's own")
    out = _take(made, tiny_llama)
    assert open_checkpoint(out, quantized=True).storage == GPTQ
    assert (out / "tokenizer.json").read_bytes() == (tiny_llama / "tokenizer.json").read_bytes()
    assert not (out / "recipe.yaml").exists(), "what was not checked is not taken"


@pytest.mark.parametrize(
    "change", [{"bits": 8}, {"group_size": 64}, {"symmetric": False}, {"format": "awq"}], ids=lambda c: next(iter(c))
)
def test_another_scheme_than_asked(made: Path, tiny_llama: Path, change: dict[str, object]) -> None:
    with pytest.raises(QuantkitError, match=r"engine echo made is not what was asked.*(?s:.*)asked for was"):
        _take(made, tiny_llama, GPTQ._replace(**change))  # type: ignore[arg-type]
    assert not list(made.with_name("out").iterdir())


def test_a_config_that_says_what_was_asked_is_not_enough(made: Path, tiny_llama: Path) -> None:
    config = json.loads((made / "config.json").read_text())
    _config(made, quantization_config=config["quantization_config"] | {"group_size": 64})
    with pytest.raises(QuantkitError, match="g_idx is out of order"):
        _take(made, tiny_llama, GPTQ._replace(group_size=64))


def _change(made: Path, name: str, to: object) -> None:
    tensors = load_file(made / "model.safetensors")
    assert callable(to)
    changed = to(tensors.pop(name))
    save_file(tensors | changed, made / "model.safetensors", metadata={"format": "pt"})


DOWN = "model.layers.1.mlp.down_proj"


def _nan(name: str) -> object:
    return lambda tensor: {name: tensor.clone().fill_(float("nan"))}


@pytest.mark.parametrize(
    ("name", "to", "said"),
    [
        (f"{DOWN}.scales", _nan(f"{DOWN}.scales"), f"{DOWN} holds NaN or Inf"),
        ("model.layers.0.input_layernorm.weight", _nan("model.layers.0.input_layernorm.weight"), "holds NaN or Inf"),
        ("model.embed_tokens.weight", _nan("model.embed_tokens.weight"), "embed_tokens.weight holds NaN or Inf"),
        (f"{DOWN}.qzeros", lambda tensor: {f"{DOWN}.qzeros": tensor + 1}, "zero points of its own"),
        (f"{DOWN}.qweight", lambda tensor: {}, "qweight are missing"),
        (f"{DOWN}.qweight", lambda tensor: {f"{DOWN}.weight": torch.zeros(64, 128)}, f"{DOWN} is not quantized"),
        (f"{DOWN}.qweight", lambda tensor: {f"{DOWN}.qweight": tensor[:8]}, f"{DOWN}: g_idx is out of order"),
    ],
    ids=["scale", "norm", "embedding", "zero point", "missing", "dense", "short"],
)
def test_tensors_that_are_not_right(made: Path, tiny_llama: Path, name: str, to: object, said: str) -> None:
    _change(made, name, to)
    with pytest.raises(QuantkitError, match=said):
        _take(made, tiny_llama)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}, "rotary embeddings are others"),
        ({"rms_norm_eps": 0.1}, "norm_epsilon 1e-06 became 0.1"),
        ({"quantization_config": None}, "not quantized"),
    ],
)
def test_a_config_of_another_model(made: Path, tiny_llama: Path, change: dict[str, object], said: str) -> None:
    _config(made, **change)
    with pytest.raises(QuantkitError, match=said):
        _take(made, tiny_llama)
