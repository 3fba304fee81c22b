"""What PEFT can put on a model: which methods are steered, and which are refused and why.

Only what tests have compared to plain models is accepted; docs/limits.md lists it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

STEERED = (
    "ADALORA", "ADAMSS", "BEFT", "BOFT", "BONE", "C3A", "CARTRIDGE", "CPT", "DEFT", "DELORA",
    "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR",
    "LORA", "MISS", "OFT", "OSF", "PEANUT", "PREFIX_TUNING", "PROMPT_TUNING", "PSOFT", "PVERA",
    "P_TUNING", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS",
    "UNILORA", "VBLORA", "VERA", "WAVEFT",
)  # fmt: skip
REFUSED = {
    "ADAPTION_PROMPT": "puts modules into the attention from which the base cannot be taken",
    "LILY": "routes by the mean over all tokens that are read at once",
    "MULTITASK_PROMPT_TUNING": "computes its virtual tokens from the task of each row",
    "POLY": "mixes its matrices by the task of each row",
    "SHADOW": "runs a second model beside the layers",
    "XLORA": "mixes adapters by a classifier over the tokens",
}
INITIALISATIONS = True, False, "gaussian", "orthogonal", "eva", "mica"
VARIANTS = "use_dora", "use_qalora", "use_bdlora", "velora_config", "monteclora_config"
OPTIONS = {
    "layer_replication": "repeats layers of the base model",
    "kasa_config": "truncates weights of the base model",
    "alora_invocation_tokens": "switches the adapter on at certain tokens (aLoRA)",
    "arrow_config": "mixes adapters by token",
    "sample_at_inference": "draws its weights anew in every pass",
}


def check(configs: Mapping[str, Any]) -> None:
    """Raise ValueError where the two models behind these adapters are not what they should be.

    configs: of all adapters on a model, by name, because one that is not active may have changed
    the base model too.
    """
    for name, config in configs.items():
        method = config.peft_type.value
        if reason := REFUSED.get(method):
            raise ValueError(f"adapter {name!r} uses {method}, which {reason}: {_NOT_STEERED}")
        if method not in STEERED:
            raise ValueError(f"adapter {name!r} uses {method}, which is not known: {_NOT_STEERED}")
        _check_base_is_kept(name, config)
        for option, reason in (OPTIONS | _unknown_variants(config)).items():
            if value := getattr(config, option, None):
                raise ValueError(
                    f"adapter {name!r} has {option}={value!r}, which {reason}: {_NOT_STEERED}"
                )


_NOT_STEERED = "it cannot be steered. docs/limits.md lists the methods that can."


def _check_base_is_kept(name: str, config: Any) -> None:
    if (bias := getattr(config, "bias", "none")) != "none":
        raise ValueError(
            f"adapter {name!r} was trained with bias={bias!r}, which changes the base model's own "
            "biases, so the base model is gone. Train with bias='none'."
        )
    init = getattr(config, "init_lora_weights", True)
    if (init.lower() if isinstance(init, str) else init) not in INITIALISATIONS:
        raise ValueError(
            f"adapter {name!r} has init_lora_weights={init!r}, which may change weights of the "
            "base model, so that the base model is gone. Convert it to a plain LoRA: "
            "save_pretrained(folder, path_initial_model_for_weight_conversion=the folder of the "
            "adapter before training)."
        )


def _unknown_variants(config: Any) -> dict[str, str]:
    """Return the fields that PEFT marks as variants of LoRA and nobody has tested here."""
    return {
        field.name: "is a variant of LoRA that is not known"
        for field in dataclasses.fields(config)
        if field.metadata.get("is_lora_variant") and field.name not in (*VARIANTS, *OPTIONS)
    }
