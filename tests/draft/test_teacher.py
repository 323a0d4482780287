"""What the target says, read layer by layer and kept on the disk, against the whole model in memory."""

import shutil
from pathlib import Path

import pytest
import torch

from quantkit.checkpoint import open_checkpoint
from quantkit.conversations import Exchange
from quantkit.draft import teacher, train
from quantkit.errors import QuantkitError
from quantkit.progress import silent


def _whole(model: Path, exchange: Exchange) -> torch.Tensor:
    """Log-probabilities [answer tokens, V] where the answer is predicted."""
    whole = train.build_model(open_checkpoint(model), dtype=torch.float32)
    with torch.no_grad():
        logits_TV = whole(input_ids=torch.tensor([exchange.prompt + exchange.answer])).logits[0]
    found: torch.Tensor = logits_TV[len(exchange.prompt) - 1 : -1].log_softmax(-1)
    return found


# States are kept in bfloat16, of 8 bits, and logits of this model are up to 40. A processor that has bfloat16 computes
# in it as well.
@pytest.mark.parametrize(("compute", "within"), [(torch.float32, 0.05), (torch.bfloat16, 0.1)], ids=str)
def test_states_give_the_logits_of_the_whole_model(
    deep_llama: Path, exchanges: list[Exchange], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    compute: torch.dtype, within: float,
) -> None:  # fmt: skip
    monkeypatch.setattr(teacher, "compute_dtype", lambda device: compute)
    monkeypatch.setattr(teacher, "_STATES_BYTES", 64 * 4 * 60)  # so that it reads in several groups
    heard = teacher.listen(
        open_checkpoint(deep_llama), exchanges, top_k=None, device="cpu", folder=tmp_path, report=silent
    )
    assert len(set(heard.files)) > 2
    for chosen in ([3], [7, 0, 11]):
        said = heard.read(chosen)
        found = teacher.logits(said, heard.head_VC, slice(None)).log_softmax(-1)
        expected = torch.cat([_whole(deep_llama, exchanges[number]) for number in chosen])
        assert found.shape == expected.shape
        assert float((found.exp() - expected.exp()).abs().sum(-1).mean()) < within


def test_the_likeliest_tokens_are_those_of_the_whole_model(
    deep_llama: Path, exchanges: list[Exchange], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "compute_dtype", lambda device: torch.float32)
    heard = teacher.listen(
        open_checkpoint(deep_llama), exchanges, top_k=8, device="cpu", folder=tmp_path, report=silent
    )
    said, expected = heard.read([5]), _whole(deep_llama, exchanges[5])
    assert said.tokens_NK is not None and said.log_p_NK is not None and said.hidden_NC is None
    assert torch.equal(said.tokens_NK.long(), expected.topk(8).indices)
    assert torch.allclose(said.log_p_NK.float(), expected.topk(8).values, atol=5e-3)
    p_NV = teacher.logits(said, heard.head_VC, slice(None)).softmax(-1)
    kept = p_NV.gather(-1, said.tokens_NK.long())
    assert torch.allclose(kept.sum(-1), expected.topk(8).values.exp().sum(-1), atol=1e-2)
    assert torch.allclose(p_NV.sum(-1), torch.ones(len(p_NV)))


def test_what_was_heard_is_not_asked_again(
    deep_llama: Path, exchanges: list[Exchange], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after some groups, it goes on with the next one, and says the same."""
    monkeypatch.setattr(teacher, "_STATES_BYTES", 64 * 4 * 60)
    target, told = open_checkpoint(deep_llama), []

    def listen(folder: Path) -> teacher.Teacher:
        told.append(0)

        def report(what: str, done: int, total: int) -> None:
            told[-1] += 1

        return teacher.listen(target, exchanges, top_k=None, device="cpu", folder=folder, report=report)

    whole = listen(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    cut = sorted((tmp_path / "cut").iterdir())[-1]
    cut.unlink()
    again = listen(tmp_path / "cut")
    assert 0 < told[1] < told[0] / 2
    first, second = whole.read(range(12)).hidden_NC, again.read(range(12)).hidden_NC
    assert first is not None and second is not None and torch.equal(first, second)


def test_a_full_disk_is_said_before_the_work(
    deep_llama: Path, exchanges: list[Exchange], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = sum(len(exchange.answer) for exchange in exchanges)
    arch = open_checkpoint(deep_llama).arch
    assert teacher.bytes_needed(arch, answered, None) == answered * 64 * 2
    room = shutil.disk_usage(tmp_path)._replace(free=answered * 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    with pytest.raises(QuantkitError, match=r"needs 0\.0 GB .* likeliest tokens alone \(top_k 6\)"):
        teacher.listen(open_checkpoint(deep_llama), exchanges, top_k=None, device="cpu", folder=tmp_path, report=silent)
    assert not list(tmp_path.iterdir())
