"""Seconds a decode step that `quantkit plan --gpu cpu` estimates, beside those of the real vLLM on the same processor.

    python benchmarks/plan_on_cpu.py CHECKPOINT... [--dtype bfloat16 --dtype float32] [--rounds 3]

The processor is measured before, between and after the rounds of vLLM, in one run: medians of both stand in the table.
Seconds of either are those that the computing thread took; other work on the machine slows both alike.
"""

import statistics
import tempfile
from pathlib import Path
from typing import get_args

import click

from quantkit import vllm_environment
from quantkit.capacity import latency, measure, sizing, weights
from quantkit.capacity.machines import Gpu
from quantkit.capacity.weights import Model
from quantkit.offline import Dtype, Session, Timing

SEQUENCES = (1, 8)
PROMPT, STEPS = 32, 6


@click.command()
@click.argument("checkpoints", nargs=-1, type=click.Path(path_type=Path), required=True)
@click.option(
    "--dtype", "dtypes", type=click.Choice(get_args(Dtype)), multiple=True, default=("bfloat16", "float32"),
    show_default=True,
)  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
def main(checkpoints: tuple[Path, ...], dtypes: tuple[Dtype, ...], rounds: int) -> None:
    """Print the table."""
    print("| checkpoint | activations | at once | vLLM, ms a step | estimated | estimated / vLLM |")
    print("|---|---|---|---|---|---|")
    with Session() as session, tempfile.TemporaryDirectory() as folder:
        for checkpoint in checkpoints:
            for dtype in dtypes:
                model = weights.open_model(checkpoint)
                seen, machines = _in_turn(session, model, dtype, rounds, Path(folder) / f"{model.name}-{dtype}")
                for sequences in SEQUENCES:
                    real = statistics.median(seen[sequences])
                    guess = statistics.median(_step_s(model, gpu, dtype, sequences) for gpu in machines)
                    print(
                        f"| {model.name}, {weights.as_stored(model).name} | {dtype} | {sequences} | {real * 1e3:.0f} | "
                        f"{guess * 1e3:.0f} | {guess / real:.2f} |", flush=True,
                    )  # fmt: skip


def _in_turn(
    session: Session, model: Model, dtype: Dtype, rounds: int, folder: Path
) -> tuple[dict[int, list[float]], list[Gpu]]:
    """Seconds of vLLM's steps by number of sequences, and the processor as it was measured around each round."""
    threads = int(vllm_environment.one_process(on_cpu=True)["OMP_NUM_THREADS"])
    vocabulary = model.arch.vocab_size
    prompts = [[(7919 * row + 31 * place) % vocabulary for place in range(PROMPT)] for row in range(max(SEQUENCES))]
    seen: dict[int, list[float]] = {sequences: [] for sequences in SEQUENCES}
    machines = [measure.processor(model.arch, dtype=dtype, threads=threads)]
    for round_ in range(rounds):
        timing = Timing(
            model=str(model.checkpoint), dtype=dtype, prompts=prompts, batches=[*SEQUENCES] * 2, steps=STEPS,
            max_model_len=512, max_num_seqs=max(SEQUENCES), kv_cache_bytes=256 << 20, seed=round_,
        )  # fmt: skip
        for place, steps in enumerate(session.time(timing, folder / str(round_)).steps):
            seen[SEQUENCES[place % len(SEQUENCES)]] += steps
        machines.append(measure.processor(model.arch, dtype=dtype, threads=threads))
    return seen, machines


def _step_s(model: Model, gpu: Gpu, dtype: str, sequences: int) -> float:
    """Seconds from token to token by the plan's arithmetic."""
    cache = sizing.kv_bytes_per_token(model.config, dtype)
    read = weights.reads(weights.as_stored(model), model, gpu.roof(), cache_bytes=cache, dtype=dtype)
    return latency.point(read, gpu.roof(), None, sequences=sequences, context_tokens=PROMPT + STEPS).itl_s


if __name__ == "__main__":
    main()
