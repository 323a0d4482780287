"""A tiny target and texts that it wrote nothing of: enough to teach a draft."""

from pathlib import Path

import pytest
import torch

from quantkit.conversations import Exchange


@pytest.fixture(scope="session")
def exchanges() -> list[Exchange]:
    """Twelve, of several lengths."""
    generator = torch.Generator().manual_seed(5)

    def tokens(count: int) -> list[int]:
        return torch.randint(4, 320, (count,), generator=generator).tolist()

    return [Exchange([0, *tokens(3 + number % 4)], tokens(6 + 5 * number % 17)) for number in range(12)]


@pytest.fixture(scope="session")
def deep_llama(make_llama, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    """A target of four layers, whose second one leaves its input nearly as it is."""
    path: Path = make_llama(tmp_path_factory.mktemp("deep") / "model", layers=4)
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.1.{name}.weight"] *= 1e-3
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path
