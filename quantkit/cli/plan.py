"""`quantkit plan`."""

from pathlib import Path
from typing import Any

import click

from quantkit.cli import common


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--gpu", metavar="NAME[:N]", help="h100-80gb:4, my-gpu.yaml, or cpu: this processor, measured.")
@click.option("--context", type=click.IntRange(2), default=4096, show_default=True, help="Tokens of a request, all.")
@click.option("--answer-tokens", type=click.IntRange(1), default=256, show_default=True, help="Those of its answer.")
@click.option("--users", type=click.IntRange(1), default=32, show_default=True, help="Requests at once.")
@click.option(
    "--kv-cache", multiple=True, metavar="TYPE",
    help="auto, fp8, ...; may be repeated. If not given: auto, and fp8 beside it for 4-bit weights.",
)  # fmt: skip
@click.option("--draft", type=click.Path(path_type=Path), help="A draft; one of train-draft brings its acceptance.")
@click.option(
    "--draft-size", type=click.FloatRange(0, 1, min_open=True), help="Or a draft of such a part of the model."
)
@click.option("--acceptance", type=click.FloatRange(0, 1), help="What if each draft token were accepted so often?")
@click.option(
    "--draft-tokens", type=click.IntRange(1), help="Draft tokens a step; if not given 5, or what was counted."
)
@click.option("--price-per-hour", type=click.FloatRange(0, min_open=True), help="Dollars for an hour of one GPU.")
@click.option("--ttft-limit", "ttft_limit_s", type=click.FloatRange(0, min_open=True), default=2.0, show_default=True,
              help="Seconds to the first token that the limits of the queue keep.")  # fmt: skip
@click.option("--gpu-memory-utilization", "memory_utilization", type=click.FloatRange(0, 1), default=0.92,
              show_default=True)  # fmt: skip
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]),
              help="With --gpu cpu: of activations.  [default: as vLLM would be run on this processor]")  # fmt: skip
@click.option("--save-gpu", type=click.Path(path_type=Path), help="Keep the machine as FILE.yaml, for --gpu.")
@click.option("--json", "as_json", is_flag=True, help="The plan as JSON on standard output, and nothing else.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory for plan.json, plan.md and plan.html.")
@common.friendly
def plan(
    checkpoint: Path, gpu: str | None, save_gpu: Path | None, as_json: bool, out: Path | None, **asked: Any
) -> None:
    """What of CHECKPOINT fits on a GPU, as stored and in 4 bits: cache, users, limits, seconds a token, cost.

    Estimates from config.json and safetensors headers; CHECKPOINT may be a folder with config.json alone, or a recipe
    with a `plan` section, whose claims are then judged.

    \b
    Examples:
      quantkit plan Llama-3.1-8B-Instruct --gpu h100-80gb --context 4096 --users 32
      quantkit plan Llama-3.3-70B --gpu a100-80gb:4 --price-per-hour 2.5 --acceptance 0.7 --draft-size 0.02
      quantkit plan llama-w4 --draft draft --gpu my-gpu.yaml --out plan
      quantkit plan SmolLM2-135M --gpu cpu --save-gpu here.yaml
      quantkit plan recipes/llama-2-70b-h100.yaml
    """
    from quantkit import summary
    from quantkit.capacity import subject

    given = {name: value for name, value in asked.items() if common.was_given(name)}
    answer = subject.plan(checkpoint, gpu=gpu, given=given, save_gpu=save_gpu)
    if out is not None:
        from quantkit.capacity import page

        page.write(out, *answer)
    if as_json:
        click.echo(answer.plan.model_dump_json(indent=2))
        return
    summary.print_plan(*answer)
    if out is not None:
        click.echo(str(out / "plan.html"))
