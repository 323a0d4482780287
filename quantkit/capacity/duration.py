"""How long does each stage take on N GPUs: its operations by what shares them out, its bytes by what carries them.

Counts are of what the stages do; the rates are a data sheet's, times what is assumed of them here. Estimates.
"""

from collections.abc import Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from quantkit.architecture import INPUT_GROUPS, Architecture, linear_shapes
from quantkit.capacity import latency, roofline, weights
from quantkit.capacity.cost import sustained
from quantkit.capacity.deployment import Layout
from quantkit.capacity.machines import Gpu
from quantkit.capacity.roofline import Reads
from quantkit.capacity.weights import Model
from quantkit.recipe import Draft, Evaluate, Recipe, TextWindows

EFFICIENCY = 0.5  # of a data sheet's peak that large products reach
FLOAT32_SHARE = 1 / 15  # of the 16-bit peak that float32 products have: 67 of 989 TFLOP/s on an H100
LINK_BYTES_S = 25e9  # of a GPU's network, 200 Gbit/s
DISK_BYTES_S = 2e9  # that each process reads of a checkpoint

CURVATURE_ROWS = 2048  # of a block of the Fisher information: what rows further apart do to each other is left out
CURVATURE_TOKENS = 1 << 16  # that it is measured on; more tell little more, and their states fill the disk
ROUNDS = 1  # of coordinate descent after GPTQ, with effort default
WRITTEN = 1.35  # prompts asked for per prompt wanted: some are cut off, some come twice
_SEQUENCES = 128  # of an engine at once
_ASSUMED_PROMPTS = 400  # where a file holds them


class Operations(NamedTuple):
    """Of matrix products: in 16 bits and in float32 shared out over the ranks, and in float32 on every rank alike."""

    compute: float
    float32: float
    everywhere: float


class Work(NamedTuple):
    """What the stages are asked to do, by a recipe or by the commands' defaults."""

    calibration_tokens: int
    prompts: int
    held_out: int
    prompt_tokens: int
    answer_tokens: int
    epochs: int
    batch_size: int
    evaluation_tokens: int


class Duration(BaseModel):
    """Seconds of a stage on so many GPUs, in parts that are one after the other; None: it does not fit on them."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    stage: str
    work: str
    gpus: int
    shared_s: float | None  # each GPU does its part
    everywhere_s: float = 0.0  # each does all of it, or one does while the others wait
    links_s: float = 0.0
    disk_s: float = 0.0

    @property
    def seconds(self) -> float | None:
        """All of it."""
        return None if self.shared_s is None else self.shared_s + self.everywhere_s + self.links_s + self.disk_s


FORMULAS = {
    "seconds of a stage": "shared operations / (N * rate) + operations of every rank / rate + bytes / link + bytes / "
    f"disk; rate: {EFFICIENCY:g} of the 16-bit peak, float32 products at 1/{1 / FLOAT32_SHARE:.0f} of that; link "
    f"{LINK_BYTES_S / 1e9:g} GB/s a GPU, all-reduce 2 (N-1)/N of the bytes; disk {DISK_BYTES_S / 1e9:g} GB/s a process",
    "quantize": "16 bits, shared: (2 * 2 + 3 s) * 2 T W, and 4 s T C V of the head. float32, shared: 13/8 * 2 T "
    "sum(I^2) of Gram matrices, 5/8 * 2 s T F of curvature, 2 * rows * I * (5 I + 4 rows) of rounding "
    "(effort high: 17 I + 16 rows); on every rank: 6 sum(I^3) of factoring. Link: 4 (2 sum(I^2) + C I + F) "
    "bytes, and W broadcast. Disk: the weights 4 times. T tokens, W weights of linears, "
    "I inputs of a group of them, F elements of curvature, s the share of T that it is measured on",
    "answers": f"(prompts * {WRITTEN:g} * prompt tokens + (prompts + held out) * answer tokens) / (replicas * tokens/s "
    f"of {_SEQUENCES} sequences, or those that fit, in 4 bits, prompts read between)",
    "draft training": "shared: epochs * D * (6 W' + 4 V C' + 2 V C), D tokens, W' the draft's linears, head and its "
    "gradient, the target's head; once, on one GPU: 2 W D, the target reads its answers. Link: 4 W' bytes a step",
    "eval": "float32, shared: two models * 2 (W + V C) E, E tokens. Link: 4 * 2 C E * 2 bytes. Disk: both",
}  # fmt: skip


def work(recipe: Recipe | None) -> Work:
    """What a recipe asks for; without one, the commands' defaults."""
    calibration: TextWindows = recipe.calibration if recipe else TextWindows(text=("-",))
    draft = recipe.draft if recipe else Draft(keep_layers=1)
    evaluated = recipe.evaluate if recipe else Evaluate(text=("-",))
    kind, _, number = draft.prompts.partition(":")
    samples = evaluated.samples if isinstance(evaluated.samples, int) else 128
    return Work(
        calibration.samples * calibration.length,
        int(number) if kind == "self" and number.isdigit() else _ASSUMED_PROMPTS, draft.held_out_prompts,
        draft.prompt_tokens, draft.answer_tokens, draft.epochs, draft.batch_size, samples * evaluated.length,
    )  # fmt: skip


def quantizing(
    arch: Architecture, tokens: int, *, streams: int, drift: bool, curvature: int, seen: int, rounds: int = 0
) -> Operations:  # fmt: skip
    """Of quantizing all layers on so many tokens.

    curvature: elements of a layer's Fisher information, 0 for none, measured on `seen` tokens.
    rounds: of coordinate descent over integers and scales, each of which reads errors and matrices three times; once
        more before the first.
    """
    shapes = linear_shapes(arch)
    forward = 2 * tokens * sum(rows * columns for rows, columns in shapes.values())  # of a layer
    widths = [shapes[names[0]][1] for names in INPUT_GROUPS]
    gram = 2 * tokens * sum(width * width for width in widths) * (5 / 8 + drift)
    gone_over = 1 + 3 * rounds
    rounding = sum(
        2 * rows * columns * ((1 + gone_over) * columns + gone_over * bool(curvature) * min(rows, CURVATURE_ROWS))
        for rows, columns in shapes.values()
    )
    factoring = sum(3 * width**3 for width in widths) * (2 if drift else 1)
    compute, float32 = 2.0 * streams * forward * arch.num_layers, (gram + rounding) * arch.num_layers
    if curvature:
        head = 2 * 2 * seen * arch.hidden_size * arch.vocab_size
        compute += 3 * forward * seen / tokens * arch.num_layers + head
        float32 += arch.num_layers * 2 * seen * curvature * 5 / 8
    return Operations(compute, float32, float(factoring * arch.num_layers))


def curvature_elements(arch: Architecture) -> int:
    """Elements of a layer's Fisher information, as the blocks that are kept of it."""
    return sum(size * size for rows, _ in linear_shapes(arch).values() for size in block_sizes(rows))


def block_sizes(out_features: int, most: int = CURVATURE_ROWS) -> list[int]:
    """Rows of each diagonal block that a linear's Fisher information is kept as."""
    blocks = -(-out_features // most)
    return [out_features // blocks + (number < out_features % blocks) for number in range(blocks)]


def durations(
    model: Model, draft: Model, gpu: Gpu, layout: Layout | None, target: Reads | None, asked: Work, gpus: Sequence[int]
) -> list[Duration]:
    """Each stage on each number of GPUs; the answers by replicas of that layout, whose rank reads `target` a pass."""
    return [
        stage for count in gpus for stage in (
            _quantize(model, gpu, asked, count), _answers(gpu, layout, target, asked, count),
            _training(model, draft, gpu, asked, count), _evaluation(model, gpu, asked, count),
        )
    ]  # fmt: skip


def _rate(gpu: Gpu) -> float:
    return gpu.bf16_tflops * 1e12 * EFFICIENCY


def _all_reduce_s(num_bytes: float, gpus: int) -> float:
    return 2 * (gpus - 1) / gpus * num_bytes / LINK_BYTES_S


def _quantize(model: Model, gpu: Gpu, asked: Work, gpus: int) -> Duration:
    arch, tokens = model.arch, asked.calibration_tokens
    curvature = curvature_elements(arch)
    done = quantizing(
        arch, tokens, streams=2, drift=True, curvature=curvature, seen=min(tokens, CURVATURE_TOKENS),
        rounds=ROUNDS,
    )  # fmt: skip
    narrow = _rate(gpu) * FLOAT32_SHARE
    shapes = linear_shapes(arch)
    widths = [shapes[names[0]][1] for names in INPUT_GROUPS]
    summed = 2 * sum(width * width for width in widths) + arch.hidden_size * (widths[1] + widths[3]) + curvature
    linears = sum(rows * columns for rows, columns in shapes.values())
    links = _all_reduce_s(4 * summed * arch.num_layers, gpus)
    links += (gpus - 1) / gpus * linears * arch.num_layers / LINK_BYTES_S
    return Duration(
        stage="quantize", work=f"{tokens:,} tokens, effort default", gpus=gpus,
        shared_s=(done.compute / _rate(gpu) + done.float32 / narrow) / gpus, everywhere_s=done.everywhere / narrow,
        links_s=links, disk_s=4 * weights.as_stored(model).stored_bytes / DISK_BYTES_S,
    )  # fmt: skip


def _answers(gpu: Gpu, layout: Layout | None, target: Reads | None, asked: Work, gpus: int) -> Duration:
    said = asked.prompts + asked.held_out
    tokens = round(asked.prompts * WRITTEN) * asked.prompt_tokens + said * asked.answer_tokens
    seconds = None
    if layout is not None and target is not None and gpus >= layout.ranks:
        context = asked.prompt_tokens + asked.answer_tokens
        fitting = layout.sizing.num_blocks * layout.sizing.block_size // context
        sequences = max(min(_SEQUENCES, fitting), 1)
        machine, replicas = gpu.roof(), gpus // layout.ranks
        step = latency.point(target, machine, None, sequences=sequences, context_tokens=context)
        rate = sustained(
            sequences=sequences, itl_s=step.itl_s, prefill_s=latency.prefill_s(target, machine, asked.prompt_tokens),
            prompt_tokens=asked.prompt_tokens, answer_tokens=asked.answer_tokens, replicas=replicas, gpus=gpus,
            price_per_hour=None,
        ).answer_tokens_per_s  # fmt: skip
        rounds = max(sequences * replicas / said, 1.0)  # fewer prompts than sequences: the last round is not full
        seconds = tokens / rate * rounds
    return Duration(
        stage="answers", work=f"{tokens:,} tokens to {asked.prompts:,} prompts", gpus=gpus, shared_s=seconds
    )


def _training(model: Model, draft: Model, gpu: Gpu, asked: Work, gpus: int) -> Duration:
    tokens = asked.prompts * (asked.prompt_tokens + asked.answer_tokens)
    linears, head = roofline.multiplied(draft.arch)
    target_linears, target_head = roofline.multiplied(model.arch)
    learned = asked.epochs * tokens * (6 * linears + 4 * head + 2 * target_head)
    steps = asked.epochs * -(-asked.prompts // asked.batch_size)
    return Duration(
        stage="draft training", work=f"{asked.epochs} times {tokens:,} tokens, a draft of {linears + head:,} weights",
        gpus=gpus, shared_s=learned / _rate(gpu) / gpus, everywhere_s=2 * target_linears * tokens / _rate(gpu),
        links_s=_all_reduce_s(4 * linears * steps, gpus), disk_s=weights.as_stored(model).stored_bytes / DISK_BYTES_S,
    )  # fmt: skip


def _evaluation(model: Model, gpu: Gpu, asked: Work, gpus: int) -> Duration:
    done = 2 * 2 * sum(roofline.multiplied(model.arch)) * asked.evaluation_tokens
    moved = 2 * 2 * 4 * model.arch.hidden_size * asked.evaluation_tokens
    return Duration(
        stage="eval", work=f"{asked.evaluation_tokens:,} tokens, twice", gpus=gpus,
        shared_s=done / (_rate(gpu) * FLOAT32_SHARE) / gpus, links_s=(gpus - 1) / gpus * moved / LINK_BYTES_S,
        disk_s=1.25 * weights.as_stored(model).stored_bytes / DISK_BYTES_S,
    )  # fmt: skip
