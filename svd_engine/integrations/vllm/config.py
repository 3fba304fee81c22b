"""What vLLM's configuration must and must not hold for a steered model, checked before it loads."""

from pathlib import Path
from typing import Any

import vllm

from svd_engine.integrations.vllm import arguments, plugin

LEDGER = f"{plugin.PACKAGE}.ledger:Ledger"
LOADERS = (
    "auto", "hf", "safetensors", "pt", "npcache", "fastsafetensors", "mistral", "bitsandbytes",
    "gguf", "runai_streamer",
)  # fmt: skip
# An argument, what it is if it is off, and why it must be.
OFF: tuple[tuple[str, str, tuple[Any, ...], str], ...] = (
    ("lora_config", "enable_lora", (None,), "the adapter is a part of the model"),
    ("speculative_config", "speculative_config", (None,), "a draft knows one model of the two"),
    ("kv_transfer_config", "kv_transfer_config", (None,),
     "a connector counts the heads of one model"),
    ("parallel_config.enable_batch_sharded_sampling", "enable_batch_sharded_sampling",
     (None, False), "a rank sees a part of the vocabulary"),
    ("parallel_config.decode_context_parallel_size", "decode_context_parallel_size", (1,),
     "it counts the heads of one model"),
    ("parallel_config.prefill_context_parallel_size", "prefill_context_parallel_size", (1,),
     "it counts the heads of one model"),
    ("parallel_config.enable_dbo", "enable_dbo", (False,), "it cuts the batch by tokens"),
    ("model_config.enable_prompt_embeds", "enable_prompt_embeds", (False,),
     "an adapter may change the embeddings"),
    ("model_config.runner_type", "runner", ("generate",), "only generation is steered"),
)  # fmt: skip


def check_model_config(model_config: Any) -> None:
    """Raise ValueError for a version, base or adapter that cannot be steered; find the adapter.

    The adapter's digest becomes a part of the configuration, and so of vLLM's keys of what it has
    compiled: another adapter at the same place is another model.
    """
    plugin.check_version(vllm.__version__)
    values = getattr(model_config.hf_config, arguments.KEY, None)
    if not isinstance(values, dict) or not isinstance(values.get("adapter"), str):
        raise ValueError(
            f"config.json has no {arguments.KEY} object that names an adapter. Write the folder "
            "with `svd-engine export`, or use svd_engine.integrations.vllm.engine_args."
        )
    folder = Path(model_config.model, values["adapter"])  # an absolute path stays
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"adapter {str(folder)!r} has no adapter_config.json.")
    arguments.check_adapter(folder)
    steering = arguments.steering_of(values, folder)
    steering.check_vocabulary(model_config.get_vocab_size())
    found = {"adapter": str(folder.resolve()), "digest": arguments.digest(folder)}
    setattr(model_config.hf_config, arguments.KEY, values | found)


def check_config(vllm_config: Any) -> None:
    """Raise ValueError for a feature that does not go with two models, by its name."""
    for path, name, off, reason in OFF:
        value = vllm_config
        for part in path.split("."):
            value = getattr(value, part)
        if value not in off:
            raise ValueError(
                f"{name} is not supported with steering, since {reason}. Leave it out."
            )
    loader = str(vllm_config.load_config.load_format)
    if loader not in LOADERS:
        raise ValueError(
            f"load_format={loader!r} is not supported with steering, since it loads no adapter. "
            f"Use one of {', '.join(LOADERS)}."
        )
    model = vllm_config.model_config
    model.logits_processors = [*(model.logits_processors or ()), LEDGER]
