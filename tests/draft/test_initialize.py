"""Where a draft starts: which layers are kept, and that they are the target's own."""

from pathlib import Path

import pytest
import torch

from quantkit.checkpoint import open_checkpoint
from quantkit.draft import initialize


@pytest.mark.parametrize(("layers", "keep"), [(30, 12), (4, 2), (32, 31), (5, 1)])
def test_evenly_spaced_layers_rise_from_the_first_to_the_last(layers: int, keep: int) -> None:
    kept = initialize.evenly_spaced(layers, keep)
    assert len(set(kept)) == keep and kept == sorted(kept) and kept[0] == 0
    assert keep == 1 or kept[-1] == layers - 1


def test_a_draft_has_the_layers_that_were_kept(deep_llama: Path, tmp_path: Path) -> None:
    target = open_checkpoint(deep_llama)
    config, weights = initialize.from_layers(target, [0, 3])
    initialize.write_draft(tmp_path / "draft", config, weights, companions=deep_llama)
    draft = open_checkpoint(tmp_path / "draft")
    assert draft.arch.num_layers == 2
    for place, layer in enumerate((0, 3)):
        for name, tensor in target.layer(layer).items():
            assert torch.equal(draft.layer(place)[name], tensor.half().float())
