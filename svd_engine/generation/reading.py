"""Prompts on their way into the running batch, a chunk of tokens at a time."""

import torch

from svd_engine.model.pair import ModelPair, PerModel, Prompts


class Reading:
    """Reads prompts together: one of any length, or several that make at most a chunk.

    pair: a fork, which holds the sequences that have been read until they are copied. contrast:
    what the base reads in the place of the prompts. Their lengths differ, so they have no chunks
    in common, and are read at once.
    """

    def __init__(
        self, pair: ModelPair, prompts: Prompts, contrast: Prompts | None, chunk: int
    ) -> None:
        self.pair = pair
        self._prompts, self._contrast = prompts, contrast
        self._chunk = chunk if contrast is None else max(map(len, prompts))
        self._read = 0  # tokens of every prompt

    @torch.inference_mode()
    def advance(self) -> PerModel | None:
        """Read a chunk; return the logits after the prompts, or None if tokens are left."""
        start, self._read = self._read, self._read + self._chunk
        longest = max(map(len, self._prompts))
        part = [prompt[start : self._read] for prompt in self._prompts]
        if start == 0:
            hidden = self.pair.prefill(part, max(0, longest - self._chunk), 0, self._contrast)
        else:
            tokens = torch.tensor(part, device=self.pair.device)
            hidden = tuple(h[:, -1] for h in self.pair.extend(tokens))
        return self.pair.logits(hidden) if self._read >= longest else None
