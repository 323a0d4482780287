"""Each format as vLLM's own kernels read it: the log-probabilities of the dequantized model, within 0.01."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit import offline, tokens
from quantkit.checkpoint import open_checkpoint
from quantkit.draft.train import build_model
from quantkit.progress import silent
from quantkit.quantize import stream
from quantkit.quantize.layer import Settings
from quantkit.quantize.schemes import Override

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

_SOME_DENSE = ("model.layers.0.self_attn.[qkv]_proj", "*.1.mlp.down_proj")
_SOME_OTHERWISE = (Override("re:.*[.]1[.]mlp[.](gate|up)_proj", group_size=64), Override("*.o_proj", group_size=-1))
_CASES: dict[str, dict[str, Any]] = {
    "compressed-tensors, asymmetric": {"format": "compressed-tensors"},
    "compressed-tensors, symmetric, per channel": {
        "method": "awq", "format": "compressed-tensors", "symmetric": True, "group_size": -1,
    },
    "compressed-tensors, several schemes": {
        "method": "awq+gptq", "format": "compressed-tensors", "ignore": _SOME_DENSE,
        "overrides": (*_SOME_OTHERWISE, Override("*.0.self_attn.o_proj", symmetric=True)),
    },
    "gptq": {"format": "gptq", "symmetric": True, "group_size": 64},
    "gptq, several schemes": {
        "format": "gptq", "symmetric": True, "ignore": _SOME_DENSE, "overrides": _SOME_OTHERWISE,
    },
    "awq": {"format": "awq"},
    "awq, some dense": {"method": "awq+gptq", "format": "awq", "ignore": _SOME_DENSE},
    "awq, bits auto": {"format": "awq", "average_bits": 8.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def mild_llama(make_llama, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    """A float16 model with logits of the size that trained models have: rounding errors scale with them."""
    path: Path = make_llama(tmp_path_factory.mktemp("mild") / "model", initializer_range=0.12, dtype=torch.float16)
    return path


@pytest.fixture(scope="module")
def session() -> Iterator[offline.Session]:
    with offline.Session() as opened:
        yield opened


@pytest.mark.parametrize("case", _CASES)
def test_vllm_computes_what_the_packed_weights_say(
    case: str, mild_llama: Path, texts: tuple[Path, Path], session: offline.Session, tmp_path: Path
) -> None:
    source = open_checkpoint(mild_llama)
    windows = tokens.tokenize([str(texts[0])], tokens.load_tokenizer(mild_llama), samples=6, length=64, seed=0)
    usual = {"method": "gptq", "bits": 4, "group_size": 32, "symmetric": False, "act_order": True, "damping": 0.01}
    settings = Settings(**usual | _CASES[case])
    out = tmp_path / "quantized"
    out.mkdir()
    stream.quantize_layers(source, windows, settings, folder=tmp_path / "layers", device="cpu", report=silent)
    stream.write_checkpoint(source, settings, folder=tmp_path / "layers", out=out)
    job = offline.windows_job(out, windows.input_ids_ST.tolist(), dtype="float16", kv_cache_bytes=64 << 20)
    results, _ = session.run(job, tmp_path / "vllm")
    served = torch.tensor([result.prompt_logprobs for result in results])
    expected, original = (_logprobs(path, windows) for path in (out, mild_llama))
    assert (served - expected).abs().mean() < 0.01
    assert (served - original).abs().mean() > 0.02, "the test must be able to tell the two apart"


def _logprobs(path: Path, windows: tokens.TokenSet) -> torch.Tensor:
    ids = windows.input_ids_ST
    with torch.no_grad():
        logits = build_model(open_checkpoint(path), dtype=torch.float32)(ids).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]  # type: ignore[no-any-return]
