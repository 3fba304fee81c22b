"""Steered decoding in vLLM against vLLM's own LoRA and the bare base."""
