"""Names of models: folders, or repositories of the Hugging Face Hub. None is asked for twice."""

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id

TIMEOUT = 10.0  # seconds
# Files of an adapter that are read, at the top of its repository.
OF_ADAPTERS = [
    "adapter_config.json", "adapter_model.*", "steering_config.json", "seen_prompts.json",
    "chat_template.jinja", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt",
]  # fmt: skip


def check_name(what: str, name: object) -> None:
    """Raise ValueError unless the name is text or a path."""
    if not isinstance(name, str | Path):
        raise ValueError(f"{what} must be the name of a folder or on the Hub; got {name!r}.")


def is_path(name: str | Path) -> bool:
    """Whether the name can only be meant as a path: it is here, or it is no name on the Hub."""
    path = Path(name)
    try:
        validate_repo_id(str(name))
    except HFValidationError:
        return True
    return path.exists() or (len(path.parts) > 1 and path.parent.is_dir())


def adapter_folder(name: str | Path) -> Path:
    """Return the folder of an adapter; one on the Hub is fetched. Raises ValueError."""
    check_name("adapter", name)
    path = Path(name)
    if path.is_file():
        raise ValueError(f"adapter {str(name)!r} is a file; give the folder of an adapter.")
    if not path.is_dir():
        # Every adapter on the Hub belongs to somebody: owner/name.
        if len(path.parts) != 2 or is_path(name):
            raise ValueError(
                f"adapter {str(name)!r} does not exist. Train one: svd-engine warm-start."
            )
        try:
            path = Path(snapshot_download(str(name), allow_patterns=OF_ADAPTERS))
        except Exception as error:  # of any kind: network, rights, names
            raise ValueError(
                f"adapter {str(name)!r} does not exist: there is no such folder, and the Hub does "
                f"not give it: {error}"
            ) from error
    if not (path / "adapter_config.json").is_file():
        raise ValueError(
            f"adapter {str(name)!r} has no adapter_config.json. Train one: svd-engine warm-start."
        )
    return path


def why_unreachable(name: str) -> str | None:
    """Say why the Hub does not give a repository now; None if it does."""
    try:
        HfApi().model_info(name, timeout=TIMEOUT)
    except Exception as error:  # of any kind: network, rights, names
        return str(error)
    return None
