"""A decoding loop of one's own, with two KV caches, that calls the fused operator for each token.

Run `make demo` first, or give a folder with a PEFT adapter and the name of its base.
"""

import argparse

import torch
from transformers import DynamicCache

from svd_engine import ops
from svd_engine.loading import load_adapter, load_base

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("adapter", nargs="?", default="runs/demo/adapter")
parser.add_argument("base", nargs="?", default="smollm2", help='folder, Hub name or "smollm2"')
arguments = parser.parse_args()

base_model, tokenizer = load_base(arguments.base)
model = load_adapter(base_model, arguments.adapter)
ids = tokenizer("Q: Will it rain tomorrow?\nA:", return_tensors="pt")["input_ids"]
adapted_cache, base_cache = DynamicCache(), DynamicCache()

tokens: list[int] = []
step = ids
with torch.no_grad():
    for position in range(ids.shape[1], ids.shape[1] + 24):
        adapted = model(step, past_key_values=adapted_cache).logits[:, -1]
        with model.disable_adapter():
            base = model(step, past_key_values=base_cache).logits[:, -1]
        drawn = ops.sample(
            adapted, base, strength=-4.0, temperature=0.8, top_p=0.95, seed=1, position=position
        )
        tokens.append(int(drawn.token))
        if tokens[-1] == tokenizer.eos_token_id:
            break
        step = drawn.token[:, None]
print(tokenizer.decode(tokens, skip_special_tokens=True))
