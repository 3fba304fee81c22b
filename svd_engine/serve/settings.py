"""How a server is set up."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Names, limits and the key of a server."""

    name: str = "svd-engine"  # of the model
    api_key: str | None = None
    max_tokens: int = 1024  # of one completion; what a chat gets that names none
    max_body: int = 1 << 20  # bytes
