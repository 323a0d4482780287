"""The command line: one short function a command; what the user did wrong becomes a line and an exit code."""

import click

from quantkit import __version__
from quantkit.cli import bench, evaluate, plan, quantize, run, serve, train_draft


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="quantkit")
def main() -> None:
    """From an FP16 Llama checkpoint to a 4-bit, speculative vLLM serving bundle, with the evidence in it."""
    import os
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)


for _command in (
    run.run, quantize.quantize, quantize.engines, evaluate.evaluate, train_draft.train_draft, serve.serve, bench.bench,
    plan.plan, run.inspect,
):  # fmt: skip
    main.add_command(_command)
