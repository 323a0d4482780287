"""What flows: each stage as a function from directories to a directory, with what its manifest will say."""

from quantkit.stages.bundling import as_quantized, bundle, left_at_16_bits
from quantkit.stages.drafting import train_draft
from quantkit.stages.judging import evaluate
from quantkit.stages.quantizing import engine_problems, import_checkpoint, quantize
from quantkit.stages.serving import bench, serve_once
from quantkit.stages.stage import Stage, run_stage

__all__ = [
    "Stage", "as_quantized", "bench", "bundle", "engine_problems", "evaluate", "import_checkpoint", "left_at_16_bits",
    "quantize", "run_stage", "serve_once", "train_draft",
]  # fmt: skip
