"""A whole plan: for each form of the weights and the cache what fits, how fast it can be, and what it would cost.

All of it is arithmetic on config.json, safetensors headers and a machine's figures: estimates, and bounds from below
for seconds. Only the bytes of the KV cache a token and the blocks that a cache of given bytes has are exact.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from quantkit import artifacts, speculation
from quantkit.capacity import cost, deployment, duration, latency, roofline, sizing, weights
from quantkit.capacity.cost import Cost
from quantkit.capacity.deployment import Form, Layout, Limits
from quantkit.capacity.duration import Duration, Work
from quantkit.capacity.latency import Point, Speculation
from quantkit.capacity.machines import Gpu
from quantkit.capacity.weights import Model, Weights
from quantkit.errors import QuantkitError
from quantkit.kv_scheme import KINDS

FORMULAS = {
    "KV bytes a token and rank": "2 * layers * ceil(kv_heads / TP) * head_dim * bytes, of target and draft together",
    "KV blocks": "floor(cache bytes / (block size * KV bytes a token)); contexts = blocks / ceil(context / block size)",
    "cache bytes": "memory * utilization - weights / TP - activations - runtime",
    "4-bit weights": "linears at 1/2 byte a weight and 2.5 bytes a group (scale, zero point); all else at 16 bits",
    "seconds of a pass": "max((weights + sequences * context * KV bytes) / bandwidth, operations / peak), a rank; "
    "waiting for other ranks, starting kernels and sampling are left out",
    "TTFT": "a pass over the prompt, nothing of it found in the prefix cache",
    "tokens a step": "(1 - a^(k+1)) / (1 - a) with acceptance a of k draft tokens (arXiv 2211.17192)",
    "speed-up": "tokens a step * pass(B) / (draft(B (k+2)) + (k-1) draft(B) + pass(B (k+1)))",
    "answer tokens/s": "replicas * B * answer / (answer * ITL(B) + B * TTFT), every user always served",
    "$ a 1M tokens": "price of all GPUs an hour / 3600 / (tokens/s) * 1e6",
    "max-num-queued-tokens": "TTFT limit * prompt / TTFT; max-num-queued-reqs: what runs, and what that limit has read",
}  # fmt: skip
MEASURED_FORMULA = (
    "(layers + 3) * 2.5 * seconds that starting a layer's kernels takes + sum over types of 2 * rows * weights / "
    "measured rate + sequences * context * KV bytes / bandwidth"
)


_DRAFT_SIZE = 0.02  # of the model, where none was named that is to be trained


class Question(BaseModel):
    """What is asked of a machine. `kv_caches` empty: those that make sense; tokens are of one request."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    gpus: int = 1
    context: int = 4096
    answer_tokens: int = 256
    users: int = 32
    kv_caches: tuple[str, ...] = ()
    acceptance: float | None = None
    draft_tokens: int | None = None
    price_per_hour: float | None = None  # of one GPU
    memory_utilization: float = 0.92
    ttft_limit_s: float = 2.0
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # a processor's activations

    @property
    def prompt_tokens(self) -> int:
        """Of a request: all but its answer."""
        return self.context - self.answer_tokens


class Draft(NamedTuple):
    """A draft to plan with; `accepted` how long its accepted lengths were, with 1, 2, ... tokens, where counted."""

    model: Model
    words: str
    hypothetical: bool
    accepted: Sequence[float] = ()


class Column(BaseModel):
    """One form of the model on the machine. Without `chosen` nothing fits, and only `why` and bytes are known."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    weights: str
    kv_cache: str
    stored_bytes: int
    chosen: Layout | None
    layouts: list[Layout]
    why: str
    ttft_s: float | None = None
    last_ttft_s: float | None = None
    points: list[Point] = []
    speculation_loses_from: int | None = None
    limits: Limits | None = None
    cost: Cost | None = None
    speculative_cost: Cost | None = None

    @property
    def name(self) -> str:
        """What heads the column."""
        return f"{self.weights}; {self.kv_cache} KV"


class Plan(BaseModel):
    """What the command says, for people and machines."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    model: str
    parameters: int
    gpu_name: str
    gpu: Gpu
    question: Question
    draft: str | None
    accepted_length: float | None
    accepted_from: str | None
    columns: list[Column]
    durations: list[Duration]  # of the stages, on some numbers of GPUs; none for a processor
    notes: list[str]
    formulas: dict[str, str]


def make(
    model: Model, gpu_name: str, gpu: Gpu, question: Question, draft: Draft | None, asked: Work | None = None
) -> Plan:
    """Plan a model on a machine; `asked` is what the stages are to do, if not the commands' defaults.

    Raises:
        QuantkitError: what was asked contradicts itself, or no form of the model fits, with what would.
    """
    _check(model, gpu_name, gpu, question, draft)
    tokens, accepted, source = _accepted(question, draft)
    forms = _forms(model, gpu, question, draft)
    columns = [_column(model, form, gpu, question, tokens, accepted) for form in forms]
    if not any(column.chosen for column in columns):
        raise QuantkitError(
            f"{model.name} does not fit on {question.gpus} x {gpu_name}: "
            + "; ".join(f"{column.name}: {column.why}" for column in columns)
        )
    durations = _durations(model, forms, columns, gpu, question, draft, asked or duration.work(None))
    formulas = FORMULAS | (duration.FORMULAS if gpu.measured is None else {"seconds of a pass": MEASURED_FORMULA})
    return Plan(
        model=model.name, parameters=weights.elements(model.arch), gpu_name=gpu_name, gpu=gpu, question=question,
        draft=draft.words if draft else None, accepted_length=accepted, accepted_from=source, columns=columns,
        durations=durations, notes=_notes(model, gpu, question, draft), formulas=formulas,
    )  # fmt: skip


def _durations(
    model: Model, forms: Sequence[Form], columns: Sequence[Column], gpu: Gpu, question: Question, draft: Draft | None,
    asked: Work,
) -> list[Duration]:  # fmt: skip
    """Of the stages; the target answers in the last form that fits, which has the fewest bits."""
    if gpu.measured is not None or model.quantized:
        return []
    pairs = [(form, column.chosen) for form, column in zip(forms, columns, strict=True) if column.chosen]
    form, chosen = pairs[-1]
    assert chosen is not None
    learns = draft or draft_of_size(model, _DRAFT_SIZE)
    target = deployment.rank_reads(form.weights, model, chosen, gpu.roof(), question.dtype)
    counts = sorted({1, 2, 4, 8, question.gpus})
    return duration.durations(model, learns.model, gpu, chosen, target, asked, counts)


def real_draft(path: Path) -> Draft:
    """A draft checkpoint; one that `train-draft` made brings the accepted lengths that vLLM counted."""
    if sizing.speculative_method(sizing.read_config(path)) == "eagle3":
        raise QuantkitError(
            f"{path} is an EAGLE-3 head, which has no plan yet: give --draft-size and --acceptance instead"
        )
    model = weights.open_model(path)
    manifest = artifacts.read_manifest(path)
    words = f"{model.name}, {weights.elements(model.arch) / 1e6:,.0f}M weights"
    if manifest is None or manifest.kind != "draft":
        return Draft(model, words, hypothetical=False)
    results = manifest.results
    plans = speculation.read(results)
    if plans:
        return Draft(model, words, False, max((plan.accepted_length for plan in plans.values()), key=len))
    shares = results["acceptance"][results["kept"]]["0"]["vllm"]["per_position"]
    return Draft(model, words, False, [1 + sum(shares[:place]) for place in range(1, len(shares) + 1)])


def draft_of_size(model: Model, fraction: float) -> Draft:
    """A draft that does not exist: embedding, head and so many of the target's layers that it is this part of it."""
    arch = model.arch
    a_layer = roofline.multiplied(arch._replace(num_layers=1))[0]
    outer = weights.elements(arch) - a_layer * arch.num_layers
    layers = max(1, round((fraction * weights.elements(arch) - outer) / a_layer))
    config = model.config | {"num_hidden_layers": layers, "quantization_config": None}
    made = weights.described(f"a draft of {layers} of the target's layers", config)
    size = weights.elements(made.arch)
    share = size / weights.elements(arch)
    return Draft(made, f"{made.name} (hypothetical, {size / 1e6:,.0f}M weights, {share:.1%})", hypothetical=True)


def _check(model: Model, gpu_name: str, gpu: Gpu, question: Question, draft: Draft | None) -> None:
    if gpu.measured is not None and question.dtype not in gpu.measured.products:
        raise QuantkitError(
            f"{gpu_name} was measured in {', '.join(gpu.measured.products)}, not in {question.dtype}: measure it "
            f"again with --gpu cpu --dtype {question.dtype}"
        )
    if question.answer_tokens >= question.context:
        raise QuantkitError(
            f"answer tokens {question.answer_tokens} leave no prompt in a context of {question.context}: lower them"
        )
    limit = model.arch.max_position_embeddings
    if question.context > limit:
        raise QuantkitError(f"context {question.context} exceeds the {limit} positions of {model.name}: lower it")
    eight = [kind for kind in question.kv_caches if kind in KINDS and KINDS[kind].bytes == 1]
    if eight and gpu.measured is not None and not gpu.measured.fp8_cache:
        raise QuantkitError(f"KV cache {eight[0]}: vLLM has none of 8 bits on {gpu_name}; use auto")
    for kind in question.kv_caches:
        if kind != "auto" and kind not in KINDS:
            raise QuantkitError(f"KV cache {kind!r} is not known: use auto or one of {', '.join(KINDS)}")
    if draft is None and question.acceptance is not None:
        raise QuantkitError(f"acceptance {question.acceptance} without a draft: give --draft DIR or --draft-size 0.02")
    if draft is not None and draft.model.arch.vocab_size != model.arch.vocab_size:
        raise QuantkitError(
            f"vocab_size of {model.name} ({model.arch.vocab_size}) and {draft.model.name} "
            f"({draft.model.arch.vocab_size}) differ: vLLM wants them equal, padding included"
        )
    if draft is not None and not draft.accepted and question.acceptance is None:
        raise QuantkitError(
            f"nobody counted how often {draft.model.name} is accepted: give --acceptance 0.7 for a what-if, or a draft "
            "that quantkit train-draft made"
        )


def _accepted(question: Question, draft: Draft | None) -> tuple[int, float | None, str | None]:
    """Draft tokens, tokens a step, and where that is from; what the user says goes before what was counted."""
    if draft is None:
        return 0, None, None
    if question.acceptance is not None:
        tokens = question.draft_tokens or 5
        length = latency.accepted_length(question.acceptance, tokens)
        return tokens, length, f"an acceptance of {question.acceptance:.0%} that was assumed, by the formula"
    known = len(draft.accepted)
    tokens = question.draft_tokens or min(4, known)
    if tokens > known:
        raise QuantkitError(
            f"draft tokens {tokens}: the draft's manifest knows up to {known}; give --acceptance besides"
        )
    return tokens, draft.accepted[tokens - 1], "the draft's manifest: counted by vLLM at temperature 0"


def _forms(model: Model, gpu: Gpu, question: Question, draft: Draft | None) -> list[Form]:
    """The columns: as stored and, where that is not quantized yet, in 4 bits, with each cache."""
    forms: list[Weights] = [weights.as_stored(model)]
    if not model.quantized:
        forms.append(weights.at_4_bits(model))
    fp8_runs = gpu.measured is None or gpu.measured.fp8_cache
    caches = question.kv_caches or (("auto", "fp8") if fp8_runs else ("auto",))
    if not fp8_runs:  # where a checkpoint brings scales, auto would be FP8
        caches = tuple(question.dtype if cache == "auto" else cache for cache in caches)

    def drafted(form: Weights) -> tuple[Model, Weights] | None:
        if draft is None:
            return None
        four = draft.hypothetical and form.linears == "4 bits"
        return draft.model, weights.at_4_bits(draft.model) if four else weights.as_stored(draft.model)

    return [
        Form(form, cache, drafted(form))
        for form in forms for cache in caches
        # what nobody asked for: the original with the cache that its 4-bit form would be calibrated for
        if question.kv_caches or cache != "fp8" or form.linears == "4 bits"
    ]  # fmt: skip


def _column(model: Model, form: Form, gpu: Gpu, question: Question, tokens: int, accepted: float | None) -> Column:
    layouts = _layouts(model, form, gpu, question, tokens, question.gpus)
    chosen = deployment.choose(layouts, question.users)
    whole = Column(
        weights=form.weights.name, kv_cache=layouts[0].sizing.kv_cache_dtype, stored_bytes=form.weights.stored_bytes,
        chosen=chosen, layouts=layouts, why=_why(model, form, gpu, question, tokens, layouts, chosen),
    )  # fmt: skip
    if chosen is None:
        return whole
    machine = gpu.roof(fp8=form.weights.linears == "FP8")
    target = deployment.rank_reads(form.weights, model, chosen, machine, question.dtype)
    speculated = None
    if form.draft is not None and accepted is not None:
        draft_model, draft_weights = form.draft
        read = deployment.rank_reads(draft_weights, draft_model, chosen, machine, question.dtype, draft=True)
        speculated = Speculation(read, tokens, accepted)
    decoding = question.prompt_tokens + question.answer_tokens // 2

    def at(sequences: int) -> Point:
        return latency.point(target, machine, speculated, sequences=sequences, context_tokens=decoding)

    prefill_s = latency.prefill_s(target, machine, question.prompt_tokens)
    limits = deployment.limits(
        chosen, gpu, users=question.users, drafted=tokens, ttft_limit_s=question.ttft_limit_s, prefill_s=prefill_s,
        prompt=question.prompt_tokens,
    )  # fmt: skip
    here = at(limits.max_num_seqs)

    def costs(itl_s: float | None) -> Cost | None:
        return None if itl_s is None else cost.sustained(
            sequences=here.sequences, itl_s=itl_s, prefill_s=prefill_s, prompt_tokens=question.prompt_tokens,
            answer_tokens=question.answer_tokens, replicas=chosen.replicas, gpus=question.gpus,
            price_per_hour=question.price_per_hour,
        )  # fmt: skip

    sizes = latency.batch_sizes(limits.max_num_seqs, math.floor(chosen.sizing.concurrency))
    return whole.model_copy(update={
        "ttft_s": prefill_s, "last_ttft_s": prefill_s * math.ceil(question.users / chosen.replicas),
        "points": [at(size) for size in sizes],
        "speculation_loses_from": latency.turns_negative(at) if speculated else None,
        "limits": limits, "cost": costs(here.itl_s), "speculative_cost": costs(here.speculative_itl_s),
    })  # fmt: skip


def _layouts(model: Model, form: Form, gpu: Gpu, question: Question, drafted: int, gpus: int) -> list[Layout]:
    choices = deployment.rank_choices(model, [form.draft[0]] if form.draft else [], gpu, gpus)
    return [
        deployment.layout(
            model, form, gpu, ranks=ranks, replicas=gpus // ranks, context=question.context, users=question.users,
            drafted=drafted, memory_utilization=question.memory_utilization, dtype=question.dtype,
        ) for ranks in choices
    ]  # fmt: skip


def _why(
    model: Model, form: Form, gpu: Gpu, question: Question, drafted: int, layouts: Sequence[Layout],
    chosen: Layout | None,
) -> str:  # fmt: skip
    """What was chosen and why, or what is too large and what would fit instead."""
    if chosen is not None and chosen.sequences >= question.users:
        shape = "one replica" if chosen.replicas == 1 else f"{chosen.replicas} replicas"
        if chosen.ranks > 1:
            narrower = [one.ranks for one in layouts if one.ranks < chosen.ranks]
            return f"{shape} of {chosen.ranks} GPUs: {', '.join(map(str, narrower))} would not hold the users"
        return f"{shape}: every user's whole context fits"
    remedies = _remedies(model, form, gpu, question, drafted, chosen)
    instead = f"; would do: {', or '.join(remedies)}" if remedies else ""
    if chosen is not None:
        return f"{chosen.sequences} of {question.users} users fit with {question.context} tokens each{instead}"
    widest = layouts[-1]
    room = math.ceil(gpu.memory_bytes * question.memory_utilization)
    taken = widest.sizing.target_weight_bytes + widest.sizing.draft_weight_bytes
    return (
        f"weights {taken / 1e9:.1f} GB and {widest.sizing.reserved_bytes / 1e9:.1f} GB besides leave "
        f"{widest.sizing.kv_cache_bytes / 1e9:.1f} of {room / 1e9:.1f} GB a GPU for the cache, too little for one "
        f"sequence of {question.context} tokens{instead}"
    )


def _remedies(model: Model, form: Form, gpu: Gpu, question: Question, drafted: int, chosen: Layout | None) -> list[str]:
    """Changes, one at a time, with which all users fit."""

    def enough(form: Form, gpus: int) -> bool:
        best = deployment.choose(_layouts(model, form, gpu, question, drafted, gpus), question.users)
        return best is not None and best.sequences >= question.users

    found = []
    more = [gpus for gpus in (1, 2, 4, 8, 16) if gpus > question.gpus and gpu.measured is None]
    if (gpus := next((gpus for gpus in more if enough(form, gpus)), None)) is not None:
        found.append(f"{gpus} GPUs")
    fp8_runs = gpu.measured is None or gpu.measured.fp8_cache
    if form.kv_cache != "fp8" and fp8_runs and enough(form._replace(kv_cache="fp8"), question.gpus):
        found.append("an FP8 KV cache")
    if form.weights.linears not in weights.QUANTIZED and enough(
        form._replace(weights=weights.at_4_bits(model)), question.gpus
    ):
        found.append("4-bit weights")
    if chosen is not None:
        found.append(f"{chosen.sequences} users")
        sized = chosen.sizing
        tokens = sized.num_blocks // math.ceil(question.users / chosen.replicas) * sized.block_size
        if tokens:
            found.append(f"a context of {tokens} tokens")
    return found


def _notes(model: Model, gpu: Gpu, question: Question, draft: Draft | None) -> list[str]:
    notes = []
    if not model.quantized and (group := weights.at_4_bits(model).name.rpartition(" ")[2]) != str(
        weights.GROUP_SIZES[0]
    ):
        notes.append(f"groups of {group}: {weights.GROUP_SIZES[0]} does not divide the inputs of every linear")
    if model.checkpoint is None:
        notes.append("the weights are not there: their bytes are by config.json and its dtype")
    if draft is not None and question.acceptance is not None and draft.accepted:
        notes.append("the acceptance that was given stands before what the draft's manifest counted")
    if gpu.measured is not None:
        seen = gpu.measured
        notes.append(
            f"{seen.processor}, {seen.threads} thread{'s' if seen.threads > 1 else ''}: products measured with "
            f"{' and '.join(map(str, seen.inputs))} inputs, "
            f"activations in {question.dtype}, 4-bit linears in "
            + (question.dtype if seen.four_bit_in == "activations" else seen.four_bit_in)
            + ("" if seen.fp8_cache else "; no FP8 KV cache on it")
        )
    return notes
