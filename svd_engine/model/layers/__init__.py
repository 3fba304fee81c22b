"""Layers of a decode step, each with a native kernel for few rows on the CPU.

Linear, RMSNorm, rotary embedding and attention fall back to PyTorch for other inputs.
"""
