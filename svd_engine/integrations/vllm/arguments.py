"""The engine arguments of a steered model, and what the model reads of them."""

import hashlib
import json
from pathlib import Path
from typing import Any

from svd_engine import hub, loading
from svd_engine.integrations.vllm import plugin
from svd_engine.steering_config import FILE_NAME, Steering, SteeringConfig
from svd_engine.utils.files import read_object

KEY = "svd_engine"  # of an object in the model's config.json
METHODS = (
    "ADALORA",
    "DELORA",
    "IA3",
    "LORA",
    "MISS",
    "PVERA",
    "TINYLORA",
    "UNILORA",
    "VBLORA",
    "VERA",
)


def engine_args(
    base: str | Path | None = None,
    adapter: str | Path | None = None,
    *,
    steering: Steering | SteeringConfig | None = None,
    **others: Any,
) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` or `vllm.AsyncEngineArgs` for a steered model.

    base, adapter: folders or Hub names; by default the base that the adapter names. steering:
    instead of the file beside the adapter. others: further arguments of vLLM, given back with
    these. Raises ValueError.
    """
    if adapter is None:
        raise ValueError("adapter is missing: give the folder or Hub name of a PEFT adapter.")
    folder = hub.adapter_folder(adapter).resolve()
    base = loading.base_of(folder, base)
    check_adapter(folder)
    overrides = others.pop("hf_overrides", {})
    if not isinstance(overrides, dict):
        raise ValueError("hf_overrides must be a dictionary here; got a function.")
    values: dict[str, Any] = {"adapter": str(folder)}
    if steering is not None:
        values["steering"] = json.loads(Steering.of(steering).to_json())
    architecture = steered_architecture(base_config(base))
    return {
        "model": str(base),
        **others,
        "hf_overrides": overrides | {"architectures": [architecture], KEY: values},
    }


def base_config(base: str) -> dict[str, Any]:
    """The `config.json` of a base. Raises ValueError."""
    if base == loading.SMOLLM2:
        raise ValueError(
            "base 'smollm2' is a GGUF file, which vLLM does not read: make a folder for vLLM with "
            "`svd-engine export`."
        )
    path = Path(base) / "config.json"
    if not Path(base).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(base, "config.json"))
        except Exception as error:  # of any kind: network, rights, names
            raise ValueError(f"base {base!r} cannot be loaded: {error}") from error
    if not path.is_file():
        raise ValueError(f"base {base!r} has no config.json.")
    return read_object(path, "the configuration of a model")


def steered_architecture(config: dict[str, Any]) -> str:
    """Return the name under which the base's architecture is steered. Raises ValueError."""
    names = config.get("architectures") or []
    for name in names:
        if name in plugin.ARCHITECTURES:
            return plugin.PREFIX + name
    raise ValueError(
        f"the base's architecture {', '.join(names) or 'is not named'} cannot be steered in vLLM: "
        f"{', '.join(plugin.ARCHITECTURES)} can. SteeredEngine knows more."
    )


def check_adapter(folder: Path) -> None:
    """Raise ValueError for an adapter that is no change to single layers."""
    config = read_object(folder / "adapter_config.json", "the configuration of an adapter")
    method = config.get("peft_type")
    if method not in METHODS:
        raise ValueError(
            f"adapter {str(folder)!r} uses {method}, which vLLM's layers cannot take: "
            f"{', '.join(METHODS)} can. SteeredEngine knows more."
        )
    if kept := config.get("modules_to_save"):
        raise ValueError(
            f"adapter {str(folder)!r} has modules_to_save={kept!r}, whole layers that vLLM would "
            "need twice. Use SteeredEngine."
        )


def steering_of(values: dict[str, Any], folder: Path) -> Steering:
    """The steering in the model's configuration, or else beside the adapter; maybe none."""
    if "steering" in values:
        return Steering.from_values(values["steering"])
    if (folder / FILE_NAME).is_file():
        return Steering.from_pretrained(folder)
    return Steering()


def digest(folder: Path) -> str:
    """A hash of the adapter: its configuration, and the bytes of its weights."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("adapter_*")):
        total.update(f"{path.name}\n{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
