"""Train a draft on what the target said: any of `losses.LOSSES`, mixed precision, resumable, on `accelerate`.

One process, or those that torchrun or `accelerate launch` started on one machine or several (DDP, or FSDP2 with
`--use_fsdp --fsdp_version 2`): each takes its rows of every batch, and the loss is the mean over the tokens of the
whole batch, so their number changes rounding and nothing else.
"""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from quantkit import ranks
from quantkit.checkpoint import Checkpoint, open_checkpoint, save_tensors
from quantkit.conversations import Exchange
from quantkit.draft import acceptance, teacher
from quantkit.draft.acceptance import Acceptance, Offline
from quantkit.draft.teacher import Said, Teacher
from quantkit.errors import QuantkitError
from quantkit.hardware import compute_dtype
from quantkit.losses import LOSSES, chunked
from quantkit.progress import Report, silent

CROSS_ENTROPY = "cross_entropy"  # with the target's tokens alone, whatever else it said
_SAVE_EVERY_S = 300.0  # besides after every epoch


class Plan(NamedTuple):
    """What decides the draft's bytes, besides the texts."""

    loss: str  # of losses.LOSSES, or CROSS_ENTROPY
    epochs: int
    batch_size: int  # exchanges a step, over all processes
    learning_rate: float  # peak; linear warm-up, then linear to zero
    warmup: float  # fraction of the steps
    patience: int  # epochs without a longer accepted length until it is given up
    replay: bool  # whether there is more to learn from in every epoch: what the draft said itself
    speculative_tokens: int
    seed: int


class Material(NamedTuple):
    """What is learned from, and the prompts that only say when to stop."""

    exchanges: list[Exchange]
    teacher: Teacher
    validation: list[Exchange]


class Training(NamedTuple):
    """What training saw, epoch by epoch; `weights` are those after the best one."""

    steps: int
    tokens: int  # of one epoch, that were learned
    losses: list[float]  # mean a token
    accepted_lengths: list[float]  # on the validation prompts
    best_epoch: int  # from 1
    weights: Path


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


def train(
    initial: Path, material: Material, plan: Plan, *, folder: Path, report: Report,
    replay: Callable[[int, Path], Material] | None = None,
) -> Training:  # fmt: skip
    """Train the draft that `initial` holds; embeddings and head stay as they are.

    `folder` keeps the state after each epoch and every few minutes: killed and started again, training goes on with the
    same order of batches, and its losses are those of a run that was never killed.

    replay: with `plan.replay`, asked on rank 0 before each epoch but the first for more to learn from in it; gets the
        epoch and a file with the draft's weights as they are.

    Raises:
        QuantkitError: the loss is no longer a number.
    """
    accelerator = _accelerator(plan.seed)
    draft = build_model(open_checkpoint(initial), dtype=torch.float32)
    for embedding in (draft.get_input_embeddings(), draft.get_output_embeddings()):
        embedding.weight.requires_grad_(False)
    learner = _Learner(draft)
    trainable = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=plan.learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    an_epoch = math.ceil(len(material.exchanges) / plan.batch_size)
    learner, optimizer = accelerator.prepare(learner, optimizer)
    progress = _Progress()
    accelerator.register_for_checkpointing(progress)
    state, best = folder / "state", folder / "best.safetensors"
    if (saved := _saved(state)) is not None:
        accelerator.load_state(str(saved))
    head_VC = material.teacher.head_VC.to(accelerator.device, compute_dtype(accelerator.device.type))
    while not progress.over(plan):
        sources = [material]
        if plan.replay and progress.epoch > 0:
            epoch, weights = progress.epoch, folder / f"on-policy-{progress.epoch:03d}.safetensors"
            if not weights.exists():
                _write(accelerator, learner, weights)
            sources.append(ranks.from_first(f"replay {epoch}", lambda: replay(epoch, weights)))  # type: ignore[misc]  # noqa: B023
        learner.train()
        saved_s = time.monotonic()
        batches = list(_batches(sources, plan.batch_size, seed=plan.seed + progress.epoch))
        for number in range(progress.batch, len(batches)):
            source, chosen = batches[number]
            rate = _linear(min(progress.epoch * an_epoch + number * an_epoch / len(batches), plan.epochs * an_epoch),
                           plan.epochs * an_epoch, plan.warmup)  # fmt: skip
            for group in optimizer.param_groups:
                group["lr"] = rate * plan.learning_rate
            summed, counted = _step(accelerator, learner, optimizer, sources[source], chosen, plan.loss, head_VC)
            if not math.isfinite(summed):
                raise QuantkitError(
                    f"the draft's loss ({plan.loss}) became {summed} in epoch {progress.epoch + 1}, step {number + 1}: "
                    f"lower draft.learning_rate ({plan.learning_rate:g}), or choose the loss forward_kl"
                )
            progress.add(summed, counted)
            what = f"training, epoch {progress.epoch + 1}, {plan.loss} {progress.mean():.2f}"
            report(what, progress.epoch * len(batches) + number + 1, plan.epochs * len(batches))
            if time.monotonic() - saved_s > _SAVE_EVERY_S and ranks.world_size() == 1:
                _save(accelerator, state)
                saved_s = time.monotonic()
        learner.eval()
        guesses = _guesses(accelerator, learner, material.validation, plan.batch_size)
        length = _greedy(guesses, material.validation, plan.speculative_tokens).length
        if progress.finish(length):
            _write(accelerator, learner, best)
        _save(accelerator, state)
    answered = sum(len(exchange.answer) for exchange in material.exchanges)
    return Training(
        progress.epoch * an_epoch, answered, progress.losses, progress.lengths, progress.best + 1, best
    )  # fmt: skip


class Order(NamedTuple):
    """What the other processes are told: where the draft begins, what it learns from, how."""

    initial: Path
    material: Material
    plan: Plan
    folder: Path

    def follow(self, device: str) -> None:
        """Train along; the device is accelerate's choice."""
        train(self.initial, self.material, self.plan, folder=self.folder, report=silent)


def offline_acceptance(
    draft: Any, texts: Sequence[Exchange], said: Teacher, *, temperature: float, k: int
) -> list[Offline]:  # fmt: skip
    """What the draft's logits say of its acceptance on each of these texts of the target at that temperature."""
    found, head_VC = [], said.head_VC.float()
    for number, text in enumerate(texts):
        input_ids, spans = _pad([text])
        with torch.no_grad():
            hidden_NC = draft.model(input_ids=input_ids, use_cache=False).last_hidden_state[0, spans[0]]
            logits_NV = draft.get_output_embeddings()(hidden_NC).float()
            target_NV = teacher.logits(said.read([number]), head_VC, slice(None))
            chances = acceptance.chances(logits_NV, target_NV, torch.tensor(text.answer), temperature)
        greedy, sampled = (acceptance.simulate(chances[how].tolist(), k) for how in ("greedy", "sampled"))
        overlap, top = (float(chances[how].mean()) for how in ("overlap", "top"))
        found.append(Offline(greedy, sampled, overlap, top, len(text.answer)))
    return found


class _Progress:
    """How far training is, kept beside the model in the saved state."""

    def __init__(self) -> None:
        self.losses: list[float] = []  # of whole epochs
        self.lengths: list[float] = []
        self.batch = 0  # batches done of the epoch that runs
        self.summed, self.counted = 0.0, 0

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return len(self.losses)

    @property
    def best(self) -> int:
        """The epoch with the longest accepted length."""
        return self.lengths.index(max(self.lengths))

    def over(self, plan: Plan) -> bool:
        """Whether all epochs are done, or nothing was gained for too many of them."""
        return self.epoch >= plan.epochs or (self.epoch > 0 and self.epoch - 1 - self.best >= plan.patience)

    def add(self, summed: float, counted: int) -> None:
        """Take in a batch."""
        self.batch, self.summed, self.counted = self.batch + 1, self.summed + summed, self.counted + counted

    def mean(self) -> float:
        """The running epoch's mean loss a token."""
        return self.summed / max(self.counted, 1)

    def finish(self, length: float) -> bool:
        """End the epoch; whether its accepted length is the longest so far."""
        self.losses.append(self.mean())
        self.lengths.append(length)
        self.batch, self.summed, self.counted = 0, 0.0, 0
        return self.best == self.epoch - 1

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class _Learner(nn.Module):
    """The draft and its loss as one module, so that whatever wraps it (DDP, FSDP2) sees a whole forward pass."""

    def __init__(self, draft: Any) -> None:
        super().__init__()
        self.draft = draft
        self._no_split_modules = draft._no_split_modules  # what FSDP gathers together: a layer

    def forward(
        self, input_ids_BT: Tensor, positions_N: Tensor, loss: Callable[[Tensor, slice], Tensor] | None = None
    ) -> Tensor:
        """The loss summed over N flat positions of [B, T], or without one the likeliest token at each of them, [N]."""
        states = self.draft.model(input_ids=input_ids_BT, use_cache=False).last_hidden_state.flatten(0, 1)[positions_N]
        head_VC = self.draft.get_output_embeddings().weight
        if loss is None:
            return torch.cat([(rows @ head_VC.T.to(rows.dtype)).argmax(-1) for rows in states.split(128)])
        return chunked(states.to(compute_dtype(states.device.type)), head_VC, loss)


def _accelerator(seed: int) -> Any:
    """As the launcher's environment has it.

    Raises:
        QuantkitError: FSDP of the first version.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, set_seed

    set_seed(seed)
    on_gpu = torch.cuda.is_available()
    compute = compute_dtype("cuda" if on_gpu else "cpu")
    mixed = "bf16" if compute == torch.bfloat16 else "no"
    if os.environ.get("ACCELERATE_USE_FSDP") != "true" or ranks.world_size() == 1:
        return Accelerator(mixed_precision=mixed, cpu=not on_gpu)
    sharding = FullyShardedDataParallelPlugin()  # reads the environment too
    if sharding.fsdp_version != 2:
        raise QuantkitError(
            "training shards by FSDP2 alone: give accelerate launch --fsdp_version 2 besides --use_fsdp"
        )
    accelerator = Accelerator(mixed_precision=mixed, cpu=not on_gpu, fsdp_plugin=sharding)
    if not on_gpu:  # accelerate has FSDP on accelerators alone, though torch shards on processors as well
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = sharding
    # the loss and the sums of gradients are float32; autocast chooses the type of products, as without sharding
    sharding.mixed_precision_policy = None
    return accelerator


def _step(
    accelerator: Any, learner: Any, optimizer: Any, source: Material, chosen: list[int], loss: str, head_VC: Tensor
) -> tuple[float, int]:
    """One step on a batch, of which this process does its rows: the loss summed over the batch, and its tokens."""
    counted = sum(len(source.exchanges[index].answer) for index in chosen)
    mine = chosen[ranks.rank() :: ranks.world_size()]
    idle = not mine  # still takes part, with a row that weighs nothing
    mine = mine or chosen[:1]
    exchanges = [source.exchanges[index] for index in mine]
    input_ids, spans = _pad(exchanges)
    flat = torch.arange(input_ids.numel()).view_as(input_ids)
    positions = torch.cat([flat[row, span] for row, span in enumerate(spans)])
    device = accelerator.device
    if loss == CROSS_ENTROPY:
        tokens_N = torch.tensor([token for exchange in exchanges for token in exchange.answer], device=device)

        def compare(logits_NV: Tensor, part: slice) -> Tensor:
            return F.cross_entropy(logits_NV, tokens_N[part], reduction="none")
    else:
        said = Said(*(part if part is None else part.to(device) for part in source.teacher.read(mine)))

        def compare(logits_NV: Tensor, part: slice) -> Tensor:
            return LOSSES[loss](logits_NV, teacher.logits(said, head_VC, part))

    with accelerator.autocast():  # which it wraps around a model of DDP by itself, and not around one of FSDP2
        summed = learner(input_ids.to(device), positions.to(device), compare)
    # DDP and FSDP take the mean of gradients over processes; the sum over all tokens, divided by their number, is meant
    accelerator.backward(summed * (0.0 if idle else ranks.world_size() / counted))
    accelerator.clip_grad_norm_([p for p in learner.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    whole = summed.detach().float() * (0.0 if idle else 1.0)
    return float(accelerator.reduce(whole, "sum") if ranks.world_size() > 1 else whole), counted


def _guesses(accelerator: Any, learner: Any, texts: Sequence[Exchange], batch_size: int) -> list[Tensor]:
    """The draft's likeliest token at each answer token of each text; the texts are shared out over the processes."""
    own: dict[int, Tensor] = {}
    for begin in range(0, len(texts), batch_size):
        chosen = range(begin, min(begin + batch_size, len(texts)))
        mine = chosen[ranks.rank() :: ranks.world_size()]
        part = [texts[index] for index in mine or chosen[:1]]  # FSDP's processes take part in every pass
        input_ids, spans = _pad(part)
        flat = torch.arange(input_ids.numel()).view_as(input_ids)
        positions = torch.cat([flat[row, span] for row, span in enumerate(spans)])
        device = accelerator.device
        with torch.no_grad(), accelerator.autocast():
            best_N = learner(input_ids.to(device), positions.to(device)).cpu()
        own.update(zip(mine, best_N.split([len(text.answer) for text in part]), strict=False))
    found = {index: guess for every in ranks.of_all(own) for index, guess in every.items()}
    return [found[index] for index in range(len(texts))]


def _greedy(guesses: Sequence[Tensor], texts: Sequence[Exchange], k: int) -> Acceptance:
    pairs = zip(guesses, texts, strict=True)
    return acceptance.total([acceptance.simulate((g == torch.tensor(t.answer)).tolist(), k) for g, t in pairs])


def _pad(exchanges: Sequence[Exchange]) -> tuple[Tensor, list[slice]]:
    """Right-padded ids [B, T] and, for each row, the positions that predict the answer's tokens.

    Causal attention never looks to the right, so padding needs no mask; what it computes is not read.
    """
    rows = [exchange.prompt + exchange.answer for exchange in exchanges]
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    spans = [slice(len(exchange.prompt) - 1, len(exchange.prompt) + len(exchange.answer) - 1) for exchange in exchanges]
    return input_ids, spans


def _batches(sources: Sequence[Material], size: int, *, seed: int) -> Iterator[tuple[int, list[int]]]:
    """A source and indices into it, in batches of about equal lengths (little padding), in random order."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for number, source in enumerate(sources):
        exchanges = source.exchanges
        order = torch.randperm(len(exchanges), generator=generator).tolist()
        order.sort(key=lambda index: len(exchanges[index].prompt) + len(exchanges[index].answer))
        groups += [(number, order[begin : begin + size]) for begin in range(0, len(order), size)]
    for group in torch.randperm(len(groups), generator=generator).tolist():
        yield groups[group]


def _linear(step: float, steps: int, warmup: float) -> float:
    rising = max(round(steps * warmup), 1)
    return (step + 1) / rising if step < rising else max(steps - step, 0) / max(steps - rising, 1)


def _write(accelerator: Any, learner: Any, path: Path) -> None:
    """The draft's weights by their names in a checkpoint, float32; every process takes part, one writes."""
    whole = accelerator.get_state_dict(learner)
    if ranks.rank() == 0:
        weights = {name.removeprefix("draft."): tensor.cpu() for name, tensor in whole.items()}
        if accelerator.unwrap_model(learner).draft.config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        save_tensors(path, weights)
    ranks.barrier()


def load_weights(path: Path) -> dict[str, Tensor]:
    """What training wrote."""
    return dict(load_file(path))


def _save(accelerator: Any, state: Path) -> None:
    """Replace the saved state, by names alone: whenever this process is killed, `_saved` finds a whole one."""
    fresh, old = state.with_name("state.new"), state.with_name("state.old")
    if ranks.rank() == 0:
        shutil.rmtree(fresh, ignore_errors=True)
    ranks.barrier()
    accelerator.save_state(str(fresh), safe_serialization=False)  # safetensors tells of each tied head
    ranks.barrier()
    if ranks.rank() == 0:
        if state.is_dir():
            state.rename(old)
        fresh.rename(state)
        shutil.rmtree(old, ignore_errors=True)
    ranks.barrier()


def _saved(state: Path) -> Path | None:
    """The state to go on from; none is begun anew."""
    if ranks.rank() == 0:
        fresh, old = state.with_name("state.new"), state.with_name("state.old")
        if not state.is_dir() and old.is_dir():
            fresh.rename(state)  # the old one makes room when the new one is whole
        shutil.rmtree(old, ignore_errors=True)
    ranks.barrier()
    return state if state.is_dir() else None
