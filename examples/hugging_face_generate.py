"""Steer inside Hugging Face `generate`: the same call with two more arguments.

Run `make demo` first, or give a folder with a PEFT adapter and the name of its base.
"""

import argparse

from transformers import TextStreamer

from svd_engine import SteeringConfig, steered_generate
from svd_engine.loading import load_adapter, load_base

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("adapter", nargs="?", default="runs/demo/adapter")
parser.add_argument("base", nargs="?", default="smollm2", help='folder, Hub name or "smollm2"')
arguments = parser.parse_args()

base_model, tokenizer = load_base(arguments.base)
model = load_adapter(base_model, arguments.adapter)
inputs = tokenizer("Q: Will it rain tomorrow?\nA:", return_tensors="pt")
options = dict(max_new_tokens=24, do_sample=False, streamer=TextStreamer(tokenizer))

print("adapted:")
model.generate(**inputs, **options)
print("steered:")
steering = SteeringConfig(strength=-4.0)  # or SteeringConfig.from_pretrained(arguments.adapter)
model.generate(**inputs, **options, custom_generate=steered_generate, steering=steering)
