"""Evaluation: benchmarks of base, adapted and steered, with intervals, resumable by question."""
