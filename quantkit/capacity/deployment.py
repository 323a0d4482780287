"""What fits on how many GPUs: weights, activations, KV blocks, sequences; one wide replica or several narrow ones."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from quantkit.capacity import sizing, weights
from quantkit.capacity.machines import Gpu
from quantkit.capacity.roofline import Machine, Reads, on_one_rank
from quantkit.capacity.sizing import Sizing
from quantkit.capacity.weights import Model, Weights

# What a rank takes besides weights, activations and cache: CUDA context, NCCL, CUDA graphs. vLLM measures its own at
# start; this stands for it.
RUNTIME_BYTES = 1536 << 20
_CPU_RUNTIME_BYTES = 1 << 30


class Form(NamedTuple):
    """Weights of the target and, with a draft, of the draft, and the type of the KV cache: a column of a plan."""

    weights: Weights
    kv_cache: str
    draft: tuple[Model, Weights] | None = None


class Layout(BaseModel):
    """A form on some GPUs: `replicas` of `sizing.tensor_parallel_size` GPUs each; bytes are of one rank."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    replicas: int
    activation_bytes: int
    runtime_bytes: int
    sizing: Sizing

    @property
    def ranks(self) -> int:
        """GPUs of a replica."""
        return self.sizing.tensor_parallel_size

    @property
    def sequences(self) -> int:
        """Whole sequences of the plan's context that all replicas hold at once."""
        return self.replicas * math.floor(self.sizing.concurrency)


class Limits(BaseModel):
    """vLLM's limits for one replica."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_queued_reqs: int
    max_num_queued_tokens: int


def activation_bytes(model: Model, ranks: int, *, batched_tokens: int, sequences: int) -> int:
    """Of one rank at the peak of a pass: an estimate.

    2 bytes for each batched token's residual stream (twice), its widest linear's outputs and what they become, and
    4 + 4 + 2 for each sequence's logits (in 16 bits, in float32 and once more sorted by the sampler).
    """
    arch = model.arch
    widest = max(2 * arch.intermediate_size, (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim)
    token = 2 * (2 * arch.hidden_size + math.ceil(1.5 * widest / ranks))
    return batched_tokens * token + sequences * arch.vocab_size * 10


def batched_tokens(gpu: Gpu, sequences: int, drafted: int) -> int:
    """max-num-batched-tokens: as vLLM's server has it for such a memory, with room for all sequences and drafts."""
    # vllm/engine/arg_utils.py: an A100 of 80 GB is kept at the smaller one
    usual = 8192 if gpu.memory_mib >= 70 << 10 and "A100" not in gpu.title else 2048
    usual = 16384 if gpu.memory_mib >= 160 << 10 else usual
    return max(usual if gpu.measured is None else 2048, sequences * (drafted + 1))


def layout(
    model: Model, form: Form, gpu: Gpu, *, ranks: int, replicas: int, context: int, users: int, drafted: int,
    memory_utilization: float, dtype: str,
) -> Layout:  # fmt: skip
    """A form on `replicas` times `ranks` GPUs."""
    on_cpu = gpu.measured is not None
    sequences = math.ceil(users / replicas)
    batched = batched_tokens(gpu, sequences, drafted)
    machine = gpu.roof()
    activations = activation_bytes(model, ranks, batched_tokens=batched, sequences=sequences)
    runtime = _CPU_RUNTIME_BYTES if on_cpu else RUNTIME_BYTES
    draft, draft_weights = form.draft or (None, None)
    sized = sizing.fit(
        model.config, weights.held_bytes(form.weights, model, machine, dtype),
        draft.config if draft else None,
        weights.held_bytes(draft_weights, draft, machine, dtype) if draft and draft_weights else 0,
        gpu_memory_bytes=gpu.memory_bytes, gpu_memory_utilization=memory_utilization,
        reserved_bytes=activations + runtime, tensor_parallel_size=ranks, kv_cache_dtype=form.kv_cache,
        dtype=dtype if on_cpu else "auto", block_size=32 if on_cpu else 16, max_model_len=context,
    )  # fmt: skip
    return Layout(replicas=replicas, activation_bytes=activations, runtime_bytes=runtime, sizing=sized)


def rank_choices(model: Model, drafts: Sequence[Model], gpu: Gpu, gpus: int) -> list[int]:
    """GPUs a replica may have: divisors of all of them, inside a node, that share out the heads of every model."""
    found = [ranks for ranks in range(1, min(gpus, gpu.gpus_per_node) + 1) if gpus % ranks == 0]
    return [
        ranks for ranks in found
        if not any(sizing.head_problems(each.config, ranks, each.name) for each in (model, *drafts))
    ]  # fmt: skip


def choose(layouts: Sequence[Layout], users: int) -> Layout | None:
    """The narrowest replicas that hold all users, or where none does, the layout that holds most; None: nothing fits.

    More replicas rather than wider ones, once it fits: each rank reads less weight, but all wait for each other in
    every layer, and a replica that is down takes fewer users with it.
    """
    fitting = [one for one in layouts if one.sizing.fits]
    enough = [one for one in fitting if one.sequences >= users]
    if enough:
        return min(enough, key=lambda one: one.ranks)
    return max(fitting, key=lambda one: (one.sequences, -one.ranks), default=None)


def limits(chosen: Layout, gpu: Gpu, *, users: int, drafted: int, ttft_limit_s: float, prefill_s: float, prompt: int
           ) -> Limits:  # fmt: skip
    """vLLM's limits for a replica: as many sequences as fit, and a queue whose last prompt is read in time."""
    sequences = max(1, min(math.ceil(users / chosen.replicas), math.floor(chosen.sizing.concurrency)))
    waiting = math.floor(ttft_limit_s / prefill_s)
    return Limits(
        max_model_len=chosen.sizing.max_model_len, max_num_seqs=sequences,
        max_num_batched_tokens=batched_tokens(gpu, sequences, drafted),
        # vLLM counts what runs, too
        max_num_queued_reqs=sequences + max(waiting, 1),
        max_num_queued_tokens=max(math.floor(ttft_limit_s * prompt / prefill_s), prompt),
    )  # fmt: skip


def rank_reads(form_weights: Weights, model: Model, chosen: Layout, machine: Machine, dtype: str, *, draft: bool = False
               ) -> Reads:  # fmt: skip
    """What a rank of a layout reads and computes for the target, or for the draft."""
    cache = chosen.sizing.draft_kv_bytes_per_token if draft else chosen.sizing.target_kv_bytes_per_token
    whole = weights.reads(form_weights, model, machine, cache_bytes=cache, dtype=dtype)
    return on_one_rank(whole, chosen.ranks, cache)
