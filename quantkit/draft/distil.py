"""The whole way from a target to its draft: prompts, answers, acceptance before, training, acceptance after."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from quantkit import conversations, hardware, vllm_environment
from quantkit.checkpoint import Checkpoint, open_checkpoint, save_tensors, write_dense
from quantkit.draft import acceptance, initialize, train
from quantkit.errors import QuantkitError
from quantkit.offline import Session
from quantkit.progress import Report
from quantkit.recipe import Draft

# vLLM takes the kind of speculation from these words anywhere in a draft's path, whatever `method` says
PATH_TRAPS = ("eagle-", "eagle3", "dflash", "dspark")


def train_draft(
    target_path: Path, *, settings: Draft, seed: int, out: Path, folder: Path, report: Report
) -> dict[str, Any]:
    """Write a trained draft into `out` and return what its manifest says; `folder` keeps what a resumed run needs.

    Raises:
        QuantkitError: a draft of another vocabulary, too few prompts, a path that vLLM would misread, no vLLM.
    """
    _check_path(out)
    target = open_checkpoint(target_path)
    initial = folder / "initial"
    origin = _initialize(target, settings, initial)
    speaking = _speaking_target(target, folder)
    measure = {"k": settings.speculative_tokens, "longest": settings.answer_tokens}
    with Session() as session:  # one process for all of vLLM's work: importing it takes longer than a job
        train_set, held_out = _exchanges(session, speaking, settings, seed, folder, report)
        before = acceptance.measure(
            session, speaking, initial, held_out, **measure, folder=folder / "before", report=report,
            what="acceptance before",
        )  # fmt: skip
        draft = train.build_model(open_checkpoint(initial), dtype=torch.float32)
        simulated_before = train.greedy_acceptance(draft, held_out, k=settings.speculative_tokens)
        target_head, hidden = _target_states(target, train_set, folder, report)
        plan = train.Plan(settings.epochs, settings.batch_size, settings.learning_rate, settings.warmup, seed)
        trained = train.train(draft, target_head, train_set, hidden, plan, folder=folder, report=report)
        simulated_after = train.greedy_acceptance(draft, held_out, k=settings.speculative_tokens)
        config = open_checkpoint(initial).config
        initialize.write_draft(out, config, _weights(draft, target), companions=target_path)
        del draft, target_head, hidden
        after = acceptance.measure(
            session, speaking, out, held_out, **measure, folder=folder / "after", report=report,
            what="acceptance after",
        )  # fmt: skip
    conversations.save_exchanges(out / "held_out.jsonl", held_out)
    return {
        "origin": origin,
        "train_prompts": len(train_set),
        "held_out_prompts": len(held_out),
        "answer_tokens": trained.answer_tokens,
        "steps": trained.steps,
        "epoch_kl_nats": [round(loss, 4) for loss in trained.epoch_losses],
        "speculative_tokens": settings.speculative_tokens,
        "temperature": 0,
        "target_weights": "as stored" if speaking == target_path else "dequantized, as a CPU runs them faster",
        "vllm": {"before": before.summary(), "after": after.summary()},
        "simulated": {"before": simulated_before.summary(), "after": simulated_after.summary()},
    }


def _speaking_target(target: Checkpoint, folder: Path) -> Path:
    """The checkpoint that vLLM runs to hear the target: itself, or on a CPU a dequantized copy.

    vLLM's 4-bit CPU kernel is made for a few sequences at once: with 128 of them the dequantized weights in bfloat16
    finished prompts at about twice its rate.
    """
    if target.storage is None or not vllm_environment.is_cpu_build():
        return target.path
    dense = folder / "dense-target"
    if not (dense / "config.json").exists():
        write_dense(target, dense)
    return dense


def _check_path(out: Path) -> None:
    for word in PATH_TRAPS:
        if word in str(out.resolve()).lower():
            raise QuantkitError(
                f"{out.resolve()} has {word!r} in its path, and vLLM would take the draft for another kind of "
                "speculator: choose another --out"
            )


def _initialize(target: Checkpoint, settings: Draft, initial: Path) -> str:
    if settings.keep_layers is not None:
        initialize.check_keep_layers(target, settings.keep_layers)
        kept = initialize.evenly_spaced(target.arch.num_layers, settings.keep_layers)
        origin = f"layers {', '.join(map(str, kept))} of the target"
        if not (initial / "config.json").exists():
            config, weights, _ = initialize.from_layers(target, settings.keep_layers)
            initialize.write_draft(initial, config, weights, companions=target.path)
        return origin
    assert settings.init is not None
    source = open_checkpoint(Path(settings.init))
    initialize.check_family(target, source)
    if not (initial / "config.json").exists():
        config, weights = initialize.from_checkpoint(target, source)
        initialize.write_draft(initial, config, weights, companions=target.path)
    return f"checkpoint {source.path.name}"


def _exchanges(
    session: Session, target: Path, settings: Draft, seed: int, folder: Path, report: Report
) -> tuple[list[conversations.Exchange], list[conversations.Exchange]]:
    kept = folder / "exchanges.jsonl"
    if not kept.exists():
        prompts = conversations.prompts(
            session, settings.prompts, target, longest=settings.prompt_tokens, seed=seed, folder=folder, report=report,
            held_out=settings.held_out_prompts,
        )  # fmt: skip
        answered = conversations.answers(
            session, target, prompts, longest=settings.answer_tokens, seed=seed, folder=folder, report=report
        )
        if len(answered) <= settings.held_out_prompts:
            raise QuantkitError(f"the target answered only {len(answered)} prompts: give more, or other ones")
        conversations.save_exchanges(kept, answered)
    return conversations.split(conversations.load_exchanges(kept), settings.held_out_prompts, seed=seed)


def _target_states(
    target: Checkpoint, exchanges: list[conversations.Exchange], folder: Path, report: Report
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The target's head, and its hidden states at the answers' tokens."""
    head_name = "model.embed_tokens.weight" if target.arch.tied_embeddings else "lm_head.weight"
    head = target.read([head_name])[head_name]
    kept = folder / "hidden.safetensors"
    if not kept.exists():
        model = train.build_model(target, dtype=hardware.compute_dtype("cpu"))
        states = train.target_hidden_states(model, exchanges, batch_size=8, report=report)
        save_tensors(kept, {"hidden": torch.cat(states)})
    flat = load_file(kept)["hidden"]
    return head, list(flat.split([len(exchange.answer) for exchange in exchanges]))


def _weights(draft: Any, target: Checkpoint) -> dict[str, torch.Tensor]:
    weights = {name: tensor.detach() for name, tensor in draft.state_dict().items()}
    if draft.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return weights
