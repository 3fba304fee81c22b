"""A folder that `vllm serve` runs without flags: base, adapter, steering and one configuration."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer

from svd_engine import hub, loading
from svd_engine.integrations.custom_generate import ADAPTER
from svd_engine.integrations.export import check, matching, put, put_adapter, writing
from svd_engine.integrations.vllm import arguments
from svd_engine.steering_config import Steering
from svd_engine.utils.files import write_text

OF_BASE = ["generation_config.json", "*quant*_config.json", "model*.safetensors*"]


def export_folder(
    folder: str | Path,
    base: str,
    adapter: str | Path,
    steering: Steering,
    *,
    copy: bool = False,
) -> Path:
    """Write the folder, whole or not at all.

    copy: copy the files of the base instead of linking them. An engine reads the steering in it
    when it starts. Raises ValueError, and for a folder that exists and is not empty.
    """
    folder = Path(folder)
    check(folder)
    source = hub.adapter_folder(adapter)
    arguments.check_adapter(source)
    if base != loading.SMOLLM2:
        arguments.steered_architecture(arguments.base_config(base))
    with writing(folder) as made:
        config, tokenizer = _put_base(made, base, copy)
        steering.check_vocabulary(config["vocab_size"])
        model: Any = SimpleNamespace(config=AutoConfig.for_model(**config))
        loading.adapter_tokenizer(source, model, tokenizer).save_pretrained(made)
        put_adapter(source, steering, made)
        config["architectures"] = [arguments.steered_architecture(config)]
        config[arguments.KEY] = {"adapter": ADAPTER}
        write_text(made / "config.json", json.dumps(config, indent=2) + "\n")
    return folder


def _put_base(folder: Path, base: str, copy: bool) -> tuple[dict[str, Any], Any]:
    """Put the weights of a base into the folder; return its configuration and its tokenizer."""
    if base == loading.SMOLLM2:  # GGUF, which vLLM does not read
        model, tokenizer = loading.load_base(base)
        model.save_pretrained(folder)
        return arguments.base_config(str(folder)), tokenizer
    source = Path(base)
    if not source.is_dir():
        patterns = [*OF_BASE, "config.json", "tokenizer*", "*.model", "vocab*", "merges.txt"]
        source = Path(snapshot_download(base, allow_patterns=patterns))
    files = matching(source, OF_BASE)
    if not any(path.suffix == ".safetensors" for path in files):
        raise ValueError(f"base {base!r} has no safetensors files, which the folder would link to.")
    for path in files:
        put(path, folder / path.name, copy)
    return arguments.base_config(str(source)), AutoTokenizer.from_pretrained(source)
