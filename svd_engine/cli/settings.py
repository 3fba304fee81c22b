"""Options of `SteeredEngine.generate` by their own names, from the command line or a file."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

# What has no form in JSON, or an option of the command.
NOT_IN_JSON = {"generation_config", "prefix_allowed_tokens_fn", "seed"}


def parse(settings: Sequence[str]) -> dict[str, Any]:
    """Read `NAME=VALUE` texts; a value is JSON, or else text. Raises ValueError."""
    found: dict[str, Any] = {}
    for setting in settings:
        name, is_set, text = setting.partition("=")
        if not is_set:
            raise ValueError(f"--set takes NAME=VALUE; got {setting!r}.")
        try:
            found[name] = json.loads(text)
        except (ValueError, RecursionError):
            found[name] = text
    return checked(found, "--set")


def checked(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the settings. Raises ValueError for a name that is not an option of `generate`."""
    from svd_engine.generation.options import SamplingOptions
    from svd_engine.generation.sampling_params import OTHER_NAMES

    for name in settings:
        if name in OTHER_NAMES:
            raise ValueError(f"{where}: {name!r} is {OTHER_NAMES[name]} here.")
        if name in NOT_IN_JSON or name not in SamplingOptions.__annotations__:
            raise ValueError(f"{where}: there is no option {name!r}; docs/engine.md lists them.")
    return dict(settings)
