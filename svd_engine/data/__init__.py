"""Data: files of examples, and records of the prompts that an adapter has seen."""
