"""Texts that were read: a prompt that begins like one of them is read from where they part."""

from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from svd_engine.generation.sequence import Sequence
from svd_engine.model.kept_rows import Beginning, KeptRow
from svd_engine.model.pair import Decoder
from svd_engine.utils.arguments import count

MAX_BYTES = 256 << 20
LEAST = 64  # tokens that are worth keeping


class Holder(Protocol):
    """What has rows of keys and values, such as a decoder."""

    def take(self, row: int, tokens: int, hidden: tuple[Tensor, ...]) -> KeptRow: ...


@dataclass(eq=False)
class _Text:
    decoder: Decoder
    token_ids: list[int]
    prompt: int  # tokens
    kept: KeptRow


class PrefixCache:
    """Keys and values of an engine's latest texts, up to `max_bytes` of them; 0 turns it off.

    hits: prompts of which the beginning was not read again. tokens: in these beginnings. bytes: in
    use. Texts that were not used for longest make room.
    """

    def __init__(self) -> None:
        self.hits = self.tokens = self.bytes = 0
        self._max_bytes = MAX_BYTES
        self._texts: list[_Text] = []  # the latest used comes last

    def __repr__(self) -> str:
        return (
            f"PrefixCache(hits={self.hits}, tokens={self.tokens}, bytes={self.bytes}, "
            f"max_bytes={self.max_bytes})"
        )

    @property
    def max_bytes(self) -> int:
        return self._max_bytes

    @max_bytes.setter
    def max_bytes(self, value: int) -> None:
        self._max_bytes = count("max_bytes", value, most=2**63 - 1)
        self._make_room()

    def clear(self) -> None:
        """Forget all texts."""
        self._texts, self.bytes = [], 0

    def find(self, decoder: Decoder, prompts: ListOf[list[int]]) -> list[Beginning] | None:
        """Find how each prompt begins; None unless each begins like a text for half its length.

        A long rest is better read as a prompt, by attention that needs no mask.
        """
        found = [self._find(decoder, prompt) for prompt in prompts]
        texts = [text for text in found if text is not None]
        if len(texts) < len(found):
            return None
        beginnings = []
        for text, prompt in zip(texts, prompts, strict=True):
            tokens = alike(text.token_ids, prompt)
            if tokens == len(prompt) != text.prompt:
                tokens -= 1  # hidden states after the last one are needed
            if 2 * tokens < len(prompt):
                return None
            beginnings.append(Beginning(text.kept, tokens))
        self._texts = [x for x in self._texts if x not in texts] + [*dict.fromkeys(texts)]
        self.hits += len(prompts)
        self.tokens += sum(beginning.tokens for beginning in beginnings)
        return beginnings

    def keep(
        self,
        decoder: Decoder,
        row: int,
        sequence: Sequence,
        hidden: tuple[Tensor, ...],
        holder: Holder | None = None,
    ) -> None:
        """Keep what a row of a decoder has read: the sequence but its last token.

        hidden: `[H]` of each model, after the prompt. holder: of the row, if it is another one over
        the same models.
        """
        ids = sequence.all_ids[:-1]
        if len(ids) < LEAST or self.max_bytes == 0:
            return
        for text in [x for x in self._texts if x.decoder is decoder]:
            if ids[: len(text.token_ids)] == text.token_ids:
                self._remove(text)
        kept = (holder or decoder).take(row, len(ids), hidden)
        self._texts.append(_Text(decoder, ids, len(sequence.prompt_ids), kept))
        self.bytes += kept.bytes
        self._make_room()

    def _find(self, decoder: Decoder, prompt: list[int]) -> _Text | None:
        best, longest = None, LEAST - 1
        for text in self._texts:
            if text.decoder is decoder and prompt[:LEAST] == text.token_ids[:LEAST]:
                tokens = alike(text.token_ids, prompt) + (text.prompt == len(prompt))
                if tokens > longest:
                    best, longest = text, tokens
        return best

    def _make_room(self) -> None:
        while self.bytes > self.max_bytes:
            self._remove(self._texts[0])

    def _remove(self, text: _Text) -> None:
        self._texts.remove(text)
        self.bytes -= text.kept.bytes


def alike(a: list[int], b: list[int]) -> int:
    """Return how many tokens two texts begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
