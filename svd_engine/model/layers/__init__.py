"""Layers of the module tree. Linear layers and attention of few rows are native on the CPU."""
