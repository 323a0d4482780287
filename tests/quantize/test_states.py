"""Hidden states in mapped files: found again, of the right size only, and gone when they are of no more use."""

from pathlib import Path

import torch

from quantkit.quantize import states


def test_what_was_written_is_found_by_another_reader(tmp_path: Path) -> None:
    made = states.make(tmp_path, 3, "quantized", (2, 4, 8))
    made.copy_(torch.arange(64.0).view(2, 4, 8))
    states.commit(tmp_path, 3)
    found = states.find(tmp_path, 3, "quantized", (2, 4, 8))
    assert found is not None and torch.equal(found, made)
    assert states.find(tmp_path, 3, "quantized", (2, 4, 9)) is None
    assert states.find(tmp_path, 2, "quantized", (2, 4, 8)) is None


def test_only_earlier_ones_are_dropped(tmp_path: Path) -> None:
    for index in (1, 2, 3):
        states.make(tmp_path, index, "original", (1, 1, 1))
    states.drop_before(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["states-00003-original.f32"]
