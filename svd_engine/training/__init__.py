"""The warm start: train an adapter briefly."""
