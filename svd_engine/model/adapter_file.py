"""Adapters in a folder or Hub repository: refused unless they are whole and fit the base model."""

from collections.abc import Collection
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers import PreTrainedModel

PREFIX = "base_model.model."  # of a name in the base model, in an adapter's file
SHOWN = 3  # names in a message
_REMEDY = "Save the adapter again, or load its own base."


def read_config(folder: str | Path) -> PeftConfig:
    return PeftConfig.from_pretrained(str(folder))


def load(model: PreTrainedModel, folder: str | Path, config: PeftConfig) -> PeftModel:
    """Put the adapter on top of `model`. Raise ValueError if its tensors are not those expected."""
    mapping = getattr(model, "_checkpoint_conversion_mapping", None) or None
    tensors = load_peft_weights(str(folder), device="cpu", key_mapping=mapping)
    base = model.state_dict()
    # PEFT saves embeddings beside an adapter that targets them; loading overwrites the base's own.
    own = {name for name in tensors if _in_base(name) in base}
    equal = {
        name
        for name in own
        if base[_in_base(name)].shape == tensors[name].shape
        and torch.equal(tensors[name].to(base[_in_base(name)]), base[_in_base(name)])
    }
    try:
        peft_model = PeftModel.from_pretrained(model, str(folder), config=config).eval()
    except KeyError as error:  # of a module that was trained as a whole
        raise ValueError(f"its tensor {error} is missing. {_REMEDY}") from error
    expected = get_peft_model_state_dict(peft_model, save_embedding_layers=False).keys()
    unexpected = tensors.keys() - expected
    if others := (own - equal) & unexpected:
        raise ValueError(
            f"it holds weights of another base model: {_listed(others)}. Load the base that it was "
            "trained on, in the same dtype, or save it with save_embedding_layers=False."
        )
    faults = [
        f"{len(names)} {what}: {_listed(names)}"
        for names, what in (
            (expected - tensors.keys(), f"of its {len(expected)} tensors are missing"),
            (unexpected - equal, "of its tensors are unknown"),
        )
        if names
    ]
    if faults:
        raise ValueError(f"{'; '.join(faults)}. {_REMEDY}")
    return peft_model


def _in_base(name: str) -> str:
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def _listed(names: Collection[str]) -> str:
    shown = sorted(names)[:SHOWN]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")
