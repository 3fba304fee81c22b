"""The settings that determine the results of an evaluation."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from svd_engine import __version__
from svd_engine.engine import SteeredEngine
from svd_engine.evaluate.run import Item
from svd_engine.model.layers.quantised import Codes

SAMPLES = 1 << 16  # values per weight in the fingerprint; a LoRA weight has fewer


def collect(engine: SteeredEngine, use: str, items: Sequence[Item], **more: Any) -> dict[str, Any]:
    """Return everything that the results depend on, for the journal's first line."""
    config = engine.steering.uses().get(use)
    steering = config and {
        "strength": config.strength,
        "alpha": config.alpha,
        "direction": config.direction,
        "penalty": str(config.penalty),  # JSON has no infinity
    }
    data = json.dumps([[item.question, item.answers] for item in items])
    return {
        **more,
        "questions": len(items),
        "data_sha256": hashlib.sha256(data.encode()).hexdigest(),
        "base": str(engine.model.get_base_model().name_or_path),
        "weights_sha256": weights_key(engine.model),
        "steering": steering,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "device": engine.model.device.type,
        "svd_engine": __version__,
    }


def folder_name(adapter: str, settings: Mapping[str, Any]) -> str:
    """A name for the results of an adapter under settings, however many questions there are."""
    of_questions = ("questions", "data_sha256", "overlap")
    kept = {key: value for key, value in settings.items() if key not in of_questions}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return f"{adapter}-{digest[:8]}"


def weights_key(model: nn.Module) -> str:
    """Return the sha256 of parameters and codes, adapter included; large ones are sampled."""
    digest = hashlib.sha256()
    codes = [(f"{k}.codes", m.codes) for k, m in model.named_modules() if isinstance(m, Codes)]
    for name, parameter in sorted([*model.named_parameters(), *codes], key=lambda named: named[0]):
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // SAMPLES)].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} ".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
