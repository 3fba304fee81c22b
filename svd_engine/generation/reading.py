"""Prompts on their way into the running batch, a chunk of tokens at a time."""

from collections.abc import Sequence

import torch

from svd_engine.model.pair import ModelPair, PerModel


class Reading:
    """Reads prompts together: one of any length, or several that make at most a chunk.

    pair: a fork, which holds the sequences that have been read until they are copied.
    """

    def __init__(self, pair: ModelPair, prompts: Sequence[list[int]], chunk: int) -> None:
        self.pair = pair
        self._prompts, self._chunk = prompts, chunk
        self._read = 0  # tokens of every prompt

    @torch.inference_mode()
    def advance(self) -> PerModel | None:
        """Read a chunk; return the logits after the prompts, or None if tokens are left."""
        start, self._read = self._read, self._read + self._chunk
        longest = max(map(len, self._prompts))
        part = [prompt[start : self._read] for prompt in self._prompts]
        if start == 0:
            hidden = self.pair.prefill(part, max(0, longest - self._chunk))
        else:
            tokens = torch.tensor(part, device=self.pair.device)
            hidden = tuple(h[:, -1] for h in self.pair.extend(tokens))
        return self.pair.logits(hidden) if self._read >= longest else None
