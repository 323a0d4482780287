"""How quantization and draft training scale over processes: one on a core, and several on a core each, in turns.

Other work on the machine makes seconds of the clock say little, so each process's CPU seconds are taken between one
collective and the next. The slowest process of each such span is what an otherwise idle machine would wait for: their
sum is the critical path, and one process's CPU seconds divided by it are the scaling that the work allows. Time on a
network is not in it. With more processes than cores (`--ranks 4` on two) the figure is simulated in this sense.

    python benchmarks/scale.py runs/quickstart/checkpoint --out runs/scale --stage quantize --ranks 1 --ranks 2
    python benchmarks/scale.py runs/quickstart/checkpoint --out runs/scale --stage draft --ranks 1 --ranks 2 --ranks 4
"""

import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import click

_COLLECTIVES = ("all_reduce", "broadcast", "barrier", "broadcast_object_list", "all_gather_object")


class Spent(NamedTuple):
    """Of one run, in seconds."""

    wall_s: float
    cpu_s: float  # of all processes
    path_s: float  # CPU seconds along the critical path
    waiting_s: float  # of the clock, in collectives: the mean of the processes
    by_part: dict[str, float]  # critical path of each part that was named


class Watch:
    """CPU and clock seconds of this process, between collectives and in them."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, float, float]] = []  # name of the part, CPU seconds, clock seconds
        self.part = "other"
        self._cpu_s = self._wall_s = 0.0

    def begin(self) -> None:
        """Count from here."""
        self._cpu_s, self._wall_s = time.process_time(), time.monotonic()

    def end(self, name: str) -> None:
        """Close a span."""
        cpu_s, wall_s = time.process_time(), time.monotonic()
        self.spans.append((name, cpu_s - self._cpu_s, wall_s - self._wall_s))
        self._cpu_s, self._wall_s = cpu_s, wall_s

    def around(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """A collective that closes one span and makes another."""

        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.end(self.part)
            try:
                return function(*args, **kwargs)
            finally:
                self.end(f"in {name}")

        return watched

    def naming(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """What runs in it is of this part."""

        @wraps(function)
        def named(*args: Any, **kwargs: Any) -> Any:
            before = self.part
            self.end(before)
            self.part = part
            try:
                return function(*args, **kwargs)
            finally:
                self.end(part)
                self.part = before

        return named


def _work(stage: str, model: Path, out: Path, tokens: int, length: int, effort: str) -> None:
    """One process of a run."""
    number, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    import torch
    import torch.distributed as dist

    from quantkit import ranks

    torch.set_num_threads(1)
    watch = Watch()
    with ranks.joined("cpu"):
        work = _quantization(watch, model, out, tokens, length, effort) if stage == "quantize" else _training(
            model, out, tokens, length)  # fmt: skip
        ranks.barrier()
        for name in _COLLECTIVES:
            setattr(dist, name, watch.around(getattr(dist, name), name))
        watch.begin()
        work()
        watch.end(watch.part)
        (out / f"spans-{number}-of-{count}.json").write_text(json.dumps(watch.spans))
        ranks.barrier()


def _quantization(watch: Watch, model: Path, out: Path, tokens: int, length: int, effort: str) -> Callable[[], object]:
    import torch

    from quantkit import decoder, ranks
    from quantkit.checkpoint import open_checkpoint
    from quantkit.progress import silent
    from quantkit.quantize import layer, stream
    from quantkit.tokens import TokenSet

    checkpoint = open_checkpoint(model)
    decoder.rotation(checkpoint.config, length, dtype=torch.float32, device="cpu")  # imports transformers
    drawn = torch.Generator().manual_seed(1)
    windows = torch.randint(4, checkpoint.arch.vocab_size, (tokens // length, length), generator=drawn)
    settings = layer.Settings.of(
        effort=effort, format="compressed-tensors", bits=4, group_size=128, symmetric=False, act_order=False,
        damping=0.01,
    )  # fmt: skip
    # the calibration pass: what goes over tokens; the rest goes over weights
    for name in ("_observe", "_attend", "_add_attention", "outputs"):
        setattr(layer.Layer, name, watch.naming(getattr(layer.Layer, name), "calibration pass"))
    ranks.by_rows = watch.naming(ranks.by_rows, "integers")
    return lambda: stream.quantize_layers(
        checkpoint, TokenSet(windows, False), settings, folder=out / "layers", device="cpu", report=silent
    )


def _training(model: Path, out: Path, tokens: int, length: int) -> Callable[[], object]:
    import torch

    from quantkit import ranks
    from quantkit.checkpoint import open_checkpoint
    from quantkit.conversations import Exchange
    from quantkit.draft import initialize, teacher, train
    from quantkit.progress import silent

    target = open_checkpoint(model)
    drawn = torch.Generator().manual_seed(1)

    def text() -> list[int]:
        said: list[int] = torch.randint(4, target.arch.vocab_size, (length // 2,), generator=drawn).tolist()
        return said

    texts = [Exchange(text(), text()) for _ in range(tokens // length + 2)]
    initial = out / "initial"

    def prepare() -> Any:
        initialize.write_draft(initial, *initialize.from_layers(target, [0, target.arch.num_layers - 1]), model)
        return teacher.listen(target, texts[:-2], top_k=None, device="cpu", folder=out / "said", report=silent)

    train.build_model(target, dtype=torch.float32)  # imports transformers
    importlib.import_module("accelerate")
    material = train.Material(texts[:-2], ranks.from_first("what the target said", prepare), texts[-2:])
    plan = train.Plan("forward_kl", 1, 8, 1e-4, 0.1, 1, False, 3, 0)
    return lambda: train.train(initial, material, plan, folder=out, report=silent)


def _run(words: list[str], out: Path, ranks: int) -> Spent:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    command = [sys.executable, __file__, *words]
    if ranks > 1:
        command[:1] = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
                       "--nproc-per-node", str(ranks)]  # fmt: skip
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL)
    every = [json.loads((out / f"spans-{number}-of-{ranks}.json").read_text()) for number in range(ranks)]
    by_part: dict[str, float] = {}
    for spans in zip(*every, strict=True):  # the same of each process, one after the other
        name = spans[0][0] if not spans[0][0].startswith("in ") else "in collectives"
        by_part[name] = by_part.get(name, 0.0) + max(cpu_s for _, cpu_s, _ in spans)
    return Spent(
        max(sum(wall_s for *_, wall_s in spans) for spans in every),
        sum(cpu_s for spans in every for _, cpu_s, _ in spans), sum(by_part.values()),
        statistics.mean(sum(wall_s for name, _, wall_s in spans if name.startswith("in ")) for spans in every), by_part,
    )  # fmt: skip


@click.command()
@click.argument("tokenizer", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--stage", type=click.Choice(["quantize", "draft"]), required=True)
@click.option("--ranks", multiple=True, type=int, default=(1, 2), show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Each number of processes in turn, so often.")
@click.option("--weak", is_flag=True, help="So many tokens for each process, not for all together.")
@click.option("--tokens", default=16384, show_default=True)
@click.option("--length", default=512, show_default=True)
@click.option("--layers", default=2, show_default=True)
@click.option("--hidden", default=512, show_default=True)
@click.option("--vocabulary", default=4096, show_default=True)
@click.option("--effort", default="fast", show_default=True)
def main(
    tokenizer: Path, out: Path, stage: str, ranks: tuple[int, ...], rounds: int, weak: bool, tokens: int, length: int,
    layers: int, hidden: int, vocabulary: int, effort: str,
) -> None:  # fmt: skip
    """Print a row for each number of processes: medians over the rounds."""
    import random_llama

    model = out / f"model-{hidden}x{layers}"
    if not (model / "config.json").exists():
        shutil.rmtree(model, ignore_errors=True)
        random_llama.write(model, tokenizer, {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers,
            "hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_attention_heads": hidden // 64,
            "num_key_value_heads": hidden // 128, "vocab_size": vocabulary, "tie_word_embeddings": True,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "dtype": "float16",
        })  # fmt: skip
    spent: dict[int, list[Spent]] = {count: [] for count in ranks}
    for _ in range(rounds):
        for count in ranks:
            todo = tokens * count if weak else tokens
            words = ["--work", stage, str(model), str(out / "run"), str(todo), str(length), effort]
            spent[count].append(_run(words, out / "run", count))
    print("| processes | clock s | CPU s, all | critical path s | scaling | waiting s | critical path by part |")
    print("|---|---|---|---|---|---|---|")
    alone_s = statistics.median(each.path_s for each in spent[ranks[0]])
    for count, runs in spent.items():
        middle = [statistics.median(column) for column in zip(*(each[:4] for each in runs), strict=True)]
        wall_s, cpu_s, path_s, waiting_s = middle
        scaling = alone_s / path_s * (count / ranks[0] if weak else 1)
        parts = {name: statistics.median(each.by_part.get(name, 0.0) for each in runs) for name in runs[0].by_part}
        told = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items())
        print(f"| {count} | {wall_s:.1f} | {cpu_s:.1f} | {path_s:.2f} | {scaling:.2f} | {waiting_s:.1f} | {told} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        with suppress(KeyboardInterrupt):
            _work(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]), int(sys.argv[6]), sys.argv[7])
    else:
        main()
