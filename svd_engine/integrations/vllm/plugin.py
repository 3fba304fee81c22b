"""What vLLM is told when it starts: names of architectures, and where their classes lie.

vLLM calls `register` in every process of every program in the environment, so it imports nothing
heavy and never raises.
"""

import logging
from importlib import import_module
from typing import Any

PACKAGE = "svd_engine.integrations.vllm"
SUPPORTED = "0.32"  # releases of vLLM whose interfaces this is written against
PREFIX = "Steered"
# Architectures, and the modules of vLLM that hold their classes.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
}
logger = logging.getLogger(__name__)


def register() -> None:
    """Add `Steered<architecture>` to vLLM's registry, and what checks a configuration of one."""
    try:
        from vllm import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        for name in ARCHITECTURES:
            ModelRegistry.register_model(PREFIX + name, f"{PACKAGE}.model:{PREFIX}{name}")
            MODELS_CONFIG_MAP[PREFIX + name] = _LazyConfig
    except Exception as error:  # of any kind: other programs of the environment go on
        logger.warning("svd-engine is not registered with this vLLM: %s", error)


class _LazyConfig:
    """Asked by vLLM about every configuration of a steered model, before any weight is read."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        import_module(f"{PACKAGE}.config").check_model_config(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        import_module(f"{PACKAGE}.config").check_config(vllm_config)


def check_version(version: str) -> None:
    """Raise ValueError for a release of vLLM that this is not written against."""
    if version.split("+")[0].split(".")[:2] != SUPPORTED.split("."):
        raise ValueError(
            f"vLLM {version} is not supported: svd-engine steers in {SUPPORTED}. Install it: "
            f'pip install "vllm=={SUPPORTED}.*".'
        )
