"""Decode steps of a 4-bit target against the same shape in BF16, on this machine: seconds, their ratio, what bounds it.

Weights are random in the shape of Llama-3.2-1B (16 layers, hidden 2048, grouped-query attention), since seconds depend
on shapes alone; the tokenizer is that of `TOKENIZER`, a checkpoint directory. Engines take turns, so that a machine
that becomes slower slows both.

    python benchmarks/w4_decode.py runs/quickstart/checkpoint --out runs/w4-decode
"""

import json
import statistics
from pathlib import Path

import click
import random_llama
import torch

from quantkit import hardware
from quantkit.architecture import linear_shapes, read_architecture
from quantkit.capacity import roofline
from quantkit.offline import Session, Timing

_TOKENS = 16  # of context: what is read of its cache is nothing beside the weights


@click.command()
@click.argument("tokenizer", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--layers", default=16)
@click.option("--hidden", default=2048)
@click.option("--inner", default=8192)
@click.option("--heads", default=32)
@click.option("--kv-heads", default=8)
@click.option("--concurrency", "concurrencies", multiple=True, type=int, default=(1, 8))
@click.option("--rounds", default=3)
@click.option("--steps", default=4)
def main(
    tokenizer: Path, out: Path, layers: int, hidden: int, inner: int, heads: int, kv_heads: int,
    concurrencies: tuple[int, ...], rounds: int, steps: int,
) -> None:  # fmt: skip
    """Time the steps of both, in turns, and print a table."""
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers,
        "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "tie_word_embeddings": True,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "dtype": "bfloat16",
    }  # fmt: skip
    models = {"bf16": (out / "bf16", None), "w4": (out / "w4", 128)}
    for model, group_size in models.values():
        if not (model / "config.json").exists():
            random_llama.write(model, tokenizer, config, dtype=torch.bfloat16, group_size=group_size)
    most = max(concurrencies)
    prompts = [[(7919 * row + 31 * place) % vocabulary for place in range(_TOKENS)] for row in range(most)]
    seconds: dict[tuple[str, int], list[float]] = {}
    with Session() as session:
        for turn in range(rounds):
            for name, (model, _) in models.items():
                timing = Timing(
                    model=str(model), dtype="bfloat16", prompts=prompts, batches=[*concurrencies], steps=steps,
                    max_model_len=_TOKENS + 64, max_num_seqs=most, kv_cache_bytes=1 << 28,
                )  # fmt: skip
                found = session.time(timing, out / f"{name}-{turn}")
                for size, batch in zip(concurrencies, found.steps, strict=True):
                    seconds.setdefault((name, size), []).append(statistics.median(batch))
    print(f"{found.machine}; medians of {rounds} engines each, {steps} steps an engine\n")
    print("| sequences | BF16, ms a step | GB/s | W4, ms a step | GB/s | W4 against BF16 | by bytes |")
    print("|---|---|---|---|---|---|---|")
    read = {name: roofline.reads(model).weight_bytes for name, (model, _) in models.items()}
    if hardware.lacks_avx512():  # the linears lie there dequantized, in float32
        arch, _ = read_architecture(config)
        assert arch is not None
        weights = sum(rows * columns for rows, columns in linear_shapes(arch).values())
        read["w4"] = read["bf16"] + 2 * layers * weights
    for size in concurrencies:
        bf16, w4 = (statistics.median(seconds[name, size]) for name in models)
        rates = [read[name] / one / 1e9 for name, one in (("bf16", bf16), ("w4", w4))]
        told = f"{1e3 * bf16:.0f} | {rates[0]:.1f} | {1e3 * w4:.0f} | {rates[1]:.1f} | {bf16 / w4:.2f}"
        print(f"| {size} | {told} | {read['bf16'] / read['w4']:.2f} |")


if __name__ == "__main__":
    main()
