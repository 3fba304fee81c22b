"""One PEFT model as two models in one batch; the only room that knows how PEFT is built."""
