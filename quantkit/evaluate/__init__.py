"""Evaluation that can say no: perplexity, divergence from FP16, and the gate."""
