"""A run's folder and recipe on a tiny Llama, and the command line called as a user calls it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture(scope="session")
def tiny_recipe() -> Callable[..., dict[str, Any]]:
    """A recipe for a tiny model, its sections changed by keyword."""

    def recipe(model: Path, calibration: Path, held_out: Path, prompts: Path, **changes: Any) -> dict[str, Any]:
        base: dict[str, Any] = {
            "name": "tiny",
            "model": str(model),
            "calibration": {"text": [str(calibration)], "samples": 8, "length": 64},
            "quantize": {"method": "gptq", "format": "compressed-tensors", "group_size": 32},
            "evaluate": {"text": [str(held_out)], "samples": 4, "length": 64, "profile": "none", "chat": "no",
                         "max_perplexity_drift": 0.5},
            "draft": {
                "keep_layers": 1, "prompts": str(prompts), "held_out_prompts": 4, "validation_prompts": 2,
                "answer_tokens": 24, "epochs": 2,
                "batch_size": 4, "speculative_tokens": 3,
            },
            "serve": {
                "served_model_name": "tiny", "max_model_len": 512, "max_num_seqs": 4, "max_num_batched_tokens": 512,
                "kv_cache_dtype": "auto", "speculate": "always", "speculative_tokens": 3,
            },
        }  # fmt: skip
        for section, values in changes.items():
            base[section] = base[section] | values if isinstance(values, dict) else values
        return base

    return recipe


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty short questions."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    things = ("harbour", "town", "ship", "library", "sentence", "colour", "thing", "count", "wind", "west")
    path.write_text(
        "".join(f'{{"prompt": "{start} the {thing}?"}}\n' for thing in things for start in ("Name", "What is"))
    )
    return path


def write_recipe(path: Path, data: dict[str, Any]) -> Path:
    """Write a recipe as YAML."""
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


@pytest.fixture(scope="session")
def save_recipe() -> Callable[[Path, dict[str, Any]], Path]:
    """The writer of recipe files."""
    return write_recipe
