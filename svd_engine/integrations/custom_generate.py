"""What `custom_generate/generate.py` of an exported folder runs: steered decoding by `generate`.

transformers calls it in the place of `generate` where a model is loaded from the folder with
`trust_remote_code=True`, as `transformers serve` does, and for `custom_generate="./folder"`.
"""

import copy
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from huggingface_hub import snapshot_download
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)

from svd_engine import loading
from svd_engine.integrations.hugging_face import steered_generate
from svd_engine.steering_config import FILE_NAME, SteeringConfig

ADAPTER = "adapter"  # folder of the adapter and its steering
_lock = Lock()
_steerings: WeakKeyDictionary[PreTrainedModel, SteeringConfig | None] = WeakKeyDictionary()


def generate(
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    model: PreTrainedModel,
    strength: float | None = None,
    alpha: float | None = None,
    **arguments: Any,
) -> Any:
    """`model.generate(inputs, **arguments)`, steered.

    strength, alpha: instead of the exported ones.
    model: one that was loaded from the folder, into which the adapter is put at the first call; or
    a model with an adapter, which then takes a strength. Raises ValueError.
    """
    with _lock:
        if model not in _steerings:
            _steerings[model] = _steering(model)
    steering = _steerings[model]
    if steering is None and strength is None:
        raise ValueError(
            f"model {model.name_or_path!r} was not loaded from an exported folder, so its strength "
            "is not known; load it from the folder or give strength."
        )
    given: dict[str, Any] = {"strength": strength, "alpha": alpha}
    steering = replace(
        steering or SteeringConfig(0.0), **{k: v for k, v in given.items() if v is not None}
    )
    # Of the class: transformers has put this function in the place of the model's own method.
    how: dict[str, Any] = dict(custom_generate=steered_generate, steering=steering)
    arguments = _with_stop_strings(arguments, generation_config)
    of_transformers: Any = type(model)
    return of_transformers.generate(model, inputs, **how, **arguments)


def _steering(model: PreTrainedModel) -> SteeringConfig | None:
    """The steering of the model's folder, whose adapter is put into the model if it has none."""
    name = str(model.name_or_path)
    folder = Path(name)
    if not folder.is_dir() and not _is_adapted(model):
        folder = Path(snapshot_download(name, allow_patterns=[f"{ADAPTER}/*"]))
    folder /= ADAPTER
    is_exported = loading.has_steering(folder)
    if not _is_adapted(model):
        if not is_exported:
            raise ValueError(
                f"model {name!r} was not loaded from an exported folder: there is no "
                f"{ADAPTER}/{FILE_NAME}. Load it from the folder that svd-engine export wrote."
            )
        peft_model = loading.load_adapter(model, folder)
        # As PEFT does while a prompt method generates; the adapter is found by it.
        model.prepare_inputs_for_generation = peft_model.prepare_inputs_for_generation
    return SteeringConfig.from_pretrained(folder) if is_exported else None


def _is_adapted(model: PreTrainedModel) -> bool:
    owner = getattr(model.prepare_inputs_for_generation, "__self__", None)
    return isinstance(owner, PeftModel) or any(
        isinstance(module, BaseTunerLayer) for module in model.modules()
    )


def _with_stop_strings(
    arguments: dict[str, Any], config: GenerationConfig | None
) -> dict[str, Any]:
    """Make stopping criteria of stop strings: a callable does not get the tokenizer."""
    arguments = {**arguments, "generation_config": config}
    tokenizer = arguments.pop("tokenizer", None)
    strings = arguments.get("stop_strings") or getattr(config, "stop_strings", None)
    if tokenizer is None or not strings:
        return arguments
    arguments.pop("stop_strings", None)
    if config is not None:
        arguments["generation_config"] = config = copy.deepcopy(config)
        config.stop_strings = None
    stopping = [*(arguments.get("stopping_criteria") or []), StopStringCriteria(tokenizer, strings)]
    return arguments | {"stopping_criteria": StoppingCriteriaList(stopping)}
