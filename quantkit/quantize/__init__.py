"""Quantization: which grid, which integers, which bits."""
