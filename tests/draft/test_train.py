"""Training: what a kill, a second process, a bad learning rate or nothing to gain do to it."""

import multiprocessing
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantkit import ranks
from quantkit.checkpoint import open_checkpoint
from quantkit.conversations import Exchange
from quantkit.draft import acceptance, initialize, teacher, train
from quantkit.errors import QuantkitError
from quantkit.progress import Report, silent

PLAN = train.Plan("forward_kl", 3, 4, 2e-3, 0.1, 3, False, 3, 0)


def _begin(target: Path, exchanges: list[Exchange], folder: Path) -> tuple[Path, train.Material]:
    """A draft of two layers and what it learns from."""
    checkpoint, initial = open_checkpoint(target), folder / "initial"
    config, weights = initialize.from_layers(checkpoint, [0, 3])
    initialize.write_draft(initial, config, weights, companions=target)
    said = teacher.listen(checkpoint, exchanges[:9], top_k=None, device="cpu", folder=folder / "said", report=silent)
    return initial, train.Material(exchanges[:9], said, exchanges[9:])


def _train(target: Path, exchanges: list[Exchange], folder: Path, report: Report = silent) -> train.Training:
    torch.set_num_threads(1)
    initial, material = _begin(target, exchanges, folder)
    return train.train(initial, material, PLAN, folder=folder, report=report)


def _train_and_die(target: Path, exchanges: list[Exchange], folder: Path, at: int) -> None:
    """In a process of its own, which kills itself after so many steps."""
    train._SAVE_EVERY_S = 0.0  # after every step, where training saves every few minutes

    def report(what: str, done: int, total: int) -> None:
        if done == at:
            os.kill(os.getpid(), signal.SIGKILL)

    _train(target, exchanges, folder, report)


def _start(*arguments: object, of: object = _train_and_die) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=of, args=arguments)  # type: ignore[arg-type]
    process.start()
    return process


@pytest.mark.parametrize("at", [4, 7], ids=["in the midst of an epoch", "at the start of one"])
def test_killed_and_started_again_it_has_the_same_losses(
    deep_llama: Path, exchanges: list[Exchange], tmp_path: Path, at: int
) -> None:
    whole = _train(deep_llama, exchanges, tmp_path / "whole")
    killed = _start(deep_llama, exchanges, tmp_path / "killed", at)
    killed.join(600)
    assert killed.exitcode == -signal.SIGKILL
    steps: list[int] = []
    again = _train(deep_llama, exchanges, tmp_path / "killed", lambda what, done, total: steps.append(done))
    assert steps and steps[0] >= at, "what was done was done again"
    assert again.losses == whole.losses and again.accepted_lengths == whole.accepted_lengths
    one, two = load_file(whole.weights), load_file(again.weights)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert whole.losses[-1] < whole.losses[0]


def _train_with_others(target: Path, exchanges: list[Exchange], folder: Path, rank: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    torch.set_num_threads(1)
    with ranks.joined("cpu") as device:
        if ranks.rank() > 0:
            ranks.follow(device)
            return
        with ranks.leading() as hand_out:
            initial, material = _begin(target, exchanges, folder)
            hand_out(train.Order(initial, material, PLAN, folder))
            train.train(initial, material, PLAN, folder=folder, report=silent)


def test_two_processes_learn_what_one_does(deep_llama: Path, exchanges: list[Exchange], tmp_path: Path) -> None:
    """With rows of batches shared, three of which are not a multiple of two."""
    alone = _train(deep_llama, exchanges, tmp_path / "alone")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [_start(deep_llama, exchanges, tmp_path / "both", rank, port, of=_train_with_others) for rank in (0, 1)]
    for process in both:
        process.join(600)
        assert process.exitcode == 0
    one, two = load_file(alone.weights), load_file(tmp_path / "both" / "best.safetensors")
    assert one.keys() == two.keys()
    for name, tensor in one.items():  # sums in another order; Adam's first steps are signs of gradients near 0
        assert float((tensor - two[name]).norm()) < 0.01 * float(tensor.norm()), name


def test_a_loss_that_is_no_number_says_what_to_lower(
    deep_llama: Path, exchanges: list[Exchange], tmp_path: Path
) -> None:
    initial, material = _begin(deep_llama, exchanges, tmp_path)
    with pytest.raises(QuantkitError, match=r"became (nan|inf) in epoch \d+, step \d+: lower draft.learning_rate"):
        train.train(initial, material, PLAN._replace(learning_rate=1e30), folder=tmp_path, report=silent)


@pytest.mark.parametrize(
    ("left", "kept"),
    [
        (["state"], "state"), (["state", "state.new"], "state"), (["state.new", "state.old"], "state.new"),
        (["state", "state.old"], "state"), (["state.new"], None), ([], None),
    ],
    ids=lambda left: " and ".join(left) or "none" if isinstance(left, list) else None,
)  # fmt: skip
def test_whenever_it_is_killed_a_whole_state_is_found(left: list[str], kept: str | None, tmp_path: Path) -> None:
    """What a kill between two steps of replacing the state leaves: a new one may be half, unless the old made room."""
    for name in left:
        (tmp_path / name).mkdir()
        (tmp_path / name / "was").write_text(name)
    found = train._saved(tmp_path / "state")
    assert (found and (found / "was").read_text()) == kept
    assert not (tmp_path / "state.old").exists()


def test_it_stops_where_nothing_is_gained_and_keeps_the_best(
    deep_llama: Path, exchanges: list[Exchange], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    initial, material = _begin(deep_llama, exchanges, tmp_path)
    monkeypatch.setattr(train, "_linear", lambda step, steps, warmup: 0.0)  # nothing is learned, so nothing is gained
    plan = PLAN._replace(epochs=9, patience=2)
    found = train.train(initial, material, plan, folder=tmp_path, report=silent)
    assert len(found.losses) == 3 and found.best_epoch == 1
    before = dict(open_checkpoint(initial).dense_tensors(dtype=torch.float32))
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(found.weights).items())


@pytest.mark.parametrize("loss", ["reverse_kl", "total_variation", "tvd++", "lk_alpha", "lk_hybrid"])
def test_every_loss_brings_the_draft_nearer(
    loss: str, deep_llama: Path, exchanges: list[Exchange], tmp_path: Path
) -> None:
    """By the chance that what it samples is accepted, on the very texts: the value of some losses says nothing."""
    initial, material = _begin(deep_llama, exchanges, tmp_path)
    plan = PLAN._replace(loss=loss, epochs=6, patience=6)
    found = train.train(initial, material, plan, folder=tmp_path, report=silent)
    model = train.build_model(open_checkpoint(initial), dtype=torch.float32)

    def overlap() -> float:
        texts, said = material.exchanges, material.teacher
        return acceptance.together(train.offline_acceptance(model, texts, said, temperature=1.0, k=3)).overlap

    before = overlap()
    model.load_state_dict(load_file(found.weights))
    assert overlap() > before + 0.02


def test_cross_entropy_learns_the_tokens_whatever_the_target_says(
    deep_llama: Path, exchanges: list[Exchange], tmp_path: Path
) -> None:
    initial, material = _begin(deep_llama, exchanges, tmp_path)
    plan = PLAN._replace(loss=train.CROSS_ENTROPY, epochs=6, patience=6)
    found = train.train(initial, material, plan, folder=tmp_path, report=silent)
    assert found.losses[-1] < found.losses[0] - 0.5
