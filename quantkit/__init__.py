"""quantkit: from an FP16 Llama checkpoint to a 4-bit, speculative vLLM serving bundle, with the evidence in it."""

__version__ = "0.1.0"
