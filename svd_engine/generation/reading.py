"""Prompts on their way into the running batch, a chunk of tokens at a time."""

from collections.abc import Sequence

import torch

from svd_engine.model.kept_rows import Beginning
from svd_engine.model.pair import ModelPair, PerModel, Prompts


class Reading:
    """Reads prompts together: one of any length, or several that make at most a chunk.

    pair: a fork, which holds the sequences that have been read until they are copied. beginnings:
    what needs no reading of each prompt. contrast: what the base reads in the place of the prompts.
    Their lengths differ, so they have no chunks in common, and are read at once.
    """

    def __init__(
        self,
        pair: ModelPair,
        prompts: Prompts,
        beginnings: Sequence[Beginning] | None,
        contrast: Prompts | None,
        chunk: int,
    ) -> None:
        self.pair = pair
        self.hidden: PerModel = ()  # after the tokens read
        self._prompts, self._beginnings, self._contrast = prompts, beginnings, contrast
        self._chunk = chunk if contrast is None else max(map(len, prompts))
        self._read = 0  # tokens of every prompt

    @torch.inference_mode()
    def advance(self) -> PerModel | None:
        """Read a chunk; return the logits after the prompts, or None if tokens are left."""
        start, longest = self._read, max(map(len, self._prompts))
        begun = max((x.tokens for x in self._beginnings or ()), default=0)
        self._read = max(start, begun) + self._chunk
        part, room = [p[start : self._read] for p in self._prompts], max(0, longest - self._read)
        if start > 0:
            tokens = torch.tensor(part, device=self.pair.device)
            self.hidden = tuple(h[:, -1] for h in self.pair.extend(tokens))
        elif self._beginnings is not None:
            self.hidden = self.pair.resume(part, self._beginnings, room)
        else:
            self.hidden = self.pair.prefill(part, room, 0, self._contrast)
        return self.pair.logits(self.hidden) if self._read >= longest else None
