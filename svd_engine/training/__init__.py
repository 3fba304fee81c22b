"""Training: the warm start of an adapter."""
