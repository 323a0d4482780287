"""Distil the draft on the target's answers: forward KL, mixed precision, resumable, on `accelerate`."""

import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quantkit.checkpoint import Checkpoint
from quantkit.conversations import Exchange
from quantkit.draft.acceptance import Acceptance, simulate_greedy, total
from quantkit.hardware import compute_dtype
from quantkit.losses import chunked_forward_kl
from quantkit.progress import Report


class Plan(NamedTuple):
    """What decides the draft's bytes."""

    epochs: int
    batch_size: int  # exchanges a step
    learning_rate: float  # peak; linear warm-up, then linear to zero
    warmup: float  # fraction of the steps
    seed: int


class Training(NamedTuple):
    """What training saw: the mean KL of each epoch in nats a token, and how much there was of it."""

    steps: int
    answer_tokens: int  # of one epoch
    epoch_losses: list[float]


def build_model(checkpoint: Checkpoint, *, dtype: torch.dtype) -> Any:
    """The checkpoint as a transformers model; quantized linears are dequantized."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype)
    weights = dict(checkpoint.dense_tensors(dtype=dtype))
    if checkpoint.arch.tied_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    # the rotary frequencies are no weights: they are computed again, off the meta device
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


def target_hidden_states(
    target: Any, exchanges: Sequence[Exchange], *, batch_size: int, report: Report
) -> list[Tensor]:
    """The target's last hidden states where it predicts each answer token: bfloat16 [answer tokens, C] each.

    They give its exact logits through its head at hidden-size bytes a token instead of vocabulary-size, so the target
    runs once and not in every epoch.
    """
    order = sorted(range(len(exchanges)), key=lambda index: len(exchanges[index].prompt) + len(exchanges[index].answer))
    found: dict[int, Tensor] = {}
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        input_ids, spans = _pad([exchanges[index] for index in chosen])
        with torch.no_grad():
            hidden = target.model(input_ids=input_ids.to(target.device), use_cache=False).last_hidden_state
        for row, (index, span) in enumerate(zip(chosen, spans, strict=True)):
            found[index] = hidden[row, span].to(torch.bfloat16).cpu()
        report("the target reads its answers", len(found), len(exchanges))
    return [found[index] for index in range(len(exchanges))]


def train(
    draft: Any, target_head_VC: Tensor, exchanges: Sequence[Exchange], hidden: Sequence[Tensor], plan: Plan,
    *, folder: Path, report: Report,
) -> Training:  # fmt: skip
    """Train the draft in place; embeddings and head stay as they are.

    `folder` keeps the state after each epoch: killed and started again, training goes on after the last whole epoch
    with the same order of batches.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    set_seed(plan.seed)
    compute = compute_dtype("cuda" if torch.cuda.is_available() else "cpu")
    mixed = "bf16" if compute == torch.bfloat16 else "no"
    accelerator = Accelerator(mixed_precision=mixed, cpu=not torch.cuda.is_available())
    draft.get_input_embeddings().weight.requires_grad_(False)
    draft.get_output_embeddings().weight.requires_grad_(False)
    trainable = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=plan.learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    steps_an_epoch = math.ceil(len(exchanges) / plan.batch_size)
    steps = steps_an_epoch * plan.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _linear(step, steps, plan.warmup))
    distiller = _Distiller(draft, target_head_VC.to(compute))
    model, optimizer, schedule = accelerator.prepare(distiller, optimizer, schedule)
    history = _History()
    accelerator.register_for_checkpointing(history)
    state = folder / "state"
    if state.is_dir():
        accelerator.load_state(str(state))
    for epoch in range(len(history.losses), plan.epochs):
        model.train()
        summed, counted = 0.0, 0
        for step, chosen in enumerate(_batches(exchanges, plan.batch_size, seed=plan.seed + epoch)):
            input_ids, spans = _pad([exchanges[index] for index in chosen])
            flat = torch.arange(input_ids.numel()).view_as(input_ids)
            positions = torch.cat([flat[row, span] for row, span in enumerate(spans)])
            known = torch.cat([hidden[index] for index in chosen]).to(compute)
            loss = model(*(part.to(accelerator.device) for part in (input_ids, positions, known)))
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            summed, counted = summed + float(loss.detach()) * len(positions), counted + len(positions)
            done = epoch * steps_an_epoch + step + 1
            report(f"training, epoch {epoch + 1}, KL {summed / counted:.2f}", done, steps)
        history.losses.append(summed / counted)
        _save_state(accelerator, state)
    return Training(steps, sum(len(exchange.answer) for exchange in exchanges), history.losses)


def greedy_acceptance(draft: Any, held_out: Sequence[Exchange], *, k: int, batch_size: int = 8) -> Acceptance:
    """Acceptance of greedy speculation on the target's greedy answers, from one forward pass of the draft."""
    parts = []
    draft.eval()
    for begin in range(0, len(held_out), batch_size):
        chosen = held_out[begin : begin + batch_size]
        input_ids, spans = _pad(chosen)
        with torch.no_grad():
            guesses = draft(input_ids=input_ids.to(draft.device), use_cache=False).logits.argmax(-1).cpu()
        for row, (exchange, span) in enumerate(zip(chosen, spans, strict=True)):
            matches = guesses[row, span] == torch.tensor(exchange.answer)
            parts.append(simulate_greedy(matches.tolist(), k))
    return total(parts)


class _History:
    """The epochs' losses, kept beside the model in the saved state."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def state_dict(self) -> dict[str, list[float]]:
        return {"losses": self.losses}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.losses = list(state["losses"])


class _Distiller(nn.Module):
    """Draft and loss as one module, so that whatever wraps it (DDP, FSDP2) sees a whole forward pass."""

    def __init__(self, draft: Any, target_head_VC: Tensor) -> None:
        super().__init__()
        self.draft = draft
        self.target_head: Tensor
        self.register_buffer("target_head", target_head_VC, persistent=False)

    def forward(self, input_ids_BT: Tensor, positions_N: Tensor, target_hidden_NC: Tensor) -> Tensor:
        """Mean KL over the N flat positions of [B, T] that predict an answer's token, in nats."""
        states = self.draft.model(input_ids=input_ids_BT, use_cache=False).last_hidden_state.flatten(0, 1)
        head = self.draft.get_output_embeddings().weight
        answered = states[positions_N].to(target_hidden_NC.dtype)
        loss = chunked_forward_kl(answered, target_hidden_NC, head, self.target_head)
        return loss / len(positions_N)


def _pad(exchanges: Sequence[Exchange]) -> tuple[Tensor, list[slice]]:
    """Right-padded ids [B, T] and, for each row, the positions that predict the answer's tokens.

    Causal attention never looks to the right, so padding needs no mask; what it computes is not read.
    """
    rows = [exchange.prompt + exchange.answer for exchange in exchanges]
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    spans = [slice(len(exchange.prompt) - 1, len(exchange.prompt) + len(exchange.answer) - 1) for exchange in exchanges]
    return input_ids, spans


def _batches(exchanges: Sequence[Exchange], size: int, *, seed: int) -> Iterator[list[int]]:
    """Indices in batches of about equal lengths (little padding), the batches in random order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(exchanges), generator=generator).tolist()
    order.sort(key=lambda index: len(exchanges[index].prompt) + len(exchanges[index].answer))
    groups = [order[begin : begin + size] for begin in range(0, len(order), size)]
    for group in torch.randperm(len(groups), generator=generator).tolist():
        yield groups[group]


def _linear(step: int, steps: int, warmup: float) -> float:
    rising = max(round(steps * warmup), 1)
    return (step + 1) / rising if step < rising else max(steps - step, 0) / max(steps - rising, 1)


def _save_state(accelerator: Any, state: Path) -> None:
    """Replace the saved state; a kill in between costs what was trained, never gives half a state."""
    fresh = state.with_name("state.new")
    shutil.rmtree(fresh, ignore_errors=True)
    accelerator.save_state(str(fresh))
    shutil.rmtree(state, ignore_errors=True)
    fresh.rename(state)
