"""Complete prompts with the base, the adapted and the steered model; then sample and stream.

Run `make demo` first, or give a folder with a PEFT adapter and the name of its base.
"""

import argparse

from svd_engine import SteeredEngine, SteeringConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("adapter", nargs="?", default="runs/demo/adapter")
parser.add_argument("base", nargs="?", default="smollm2", help='folder, Hub name or "smollm2"')
arguments = parser.parse_args()

engine = SteeredEngine.from_pretrained(arguments.base, arguments.adapter)
if engine.steering.generation is None:  # the adapter has not been calibrated
    engine.steering = SteeringConfig(strength=-4.0)

prompts = ["Q: Will it rain tomorrow?\nA:", "Q: What causes thunder?\nA:"]
for model in ("base", "adapted", "steered"):
    completions = engine.generate(prompts, model=model, max_new_tokens=24, stop_strings=["\n"])
    for completion in completions:
        print(f"{model:8} {completion.text.strip()}  ({completion.finish_reason})")

print("sampled ", end="")
for event in engine.stream(prompts[0], temperature=0.8, top_p=0.95, seed=1, max_new_tokens=24):
    print(event.text, end="", flush=True)
print()
