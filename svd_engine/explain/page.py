"""The page: texts as JSON, figures as columns in base64, and a template that draws them."""

import base64
import html
import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from svd_engine.explain.collect import TOP, Answer
from svd_engine.generation.detokenizer import Detokenizer
from svd_engine.steering_config import SteeringConfig

SMALLEST_STEP = 0.04  # of the slider
HERE = Path(__file__).parent


def render(
    prompts: Sequence[str],
    answers: Sequence[Sequence[Answer]],
    tokenizer: PreTrainedTokenizerBase,
    steering: SteeringConfig,
    title: str,
    calibration: dict[str, Any] | None = None,
) -> str:
    """Return the page. calibration: the contents of calibration.json, for its curve."""
    flat = [answer for group in answers for answer in group]
    positions = [position for answer in flat for position in answer.positions]
    known = sorted(
        {p.token for p in positions}
        | {token for p in positions for token, *_ in p.support}
        | {token for p in positions for token, _ in (*p.adapted, *p.base)}
    )
    place = {token: i for i, token in enumerate(known)}  # in the order of ids, as ties go
    wide = np.uint16 if len(known) < 2**16 else np.uint32
    text = _Texts(tokenizer)
    entries = [entry for p in positions for entry in p.support]
    tops = {
        name: [entry for p in positions for entry in getattr(p, name)]
        for name in ("adapted", "base")
    }
    columns = {
        "token": np.array([place[p.token] for p in positions], wide),
        "divergence": np.array([p.divergence for p in positions], np.float32),
        "start": np.array([0, *accumulate(len(p.support) for p in positions)], np.uint32),
        "supportToken": np.array([place[e[0]] for e in entries], wide),
        "p": np.array([e[1] for e in entries], np.float32),
        "delta": np.array([e[2] for e in entries], np.float32),
    }
    for name, listed in tops.items():
        columns[f"{name}Token"] = np.array([place[e[0]] for e in listed], wide)
        # 16 bits of a probability are enough to show it
        columns[f"{name}P"] = np.array([round(65535 * e[1]) for e in listed], np.uint16)
    data = {
        "strength": steering.strength, "alpha": steering.alpha, "direction": steering.direction,
        "step": _step(steering.strength), "top": len(positions[0].adapted) if positions else TOP,
        "vocabulary": [text.alone(token) for token in known],
        "special": [place[i] for i in sorted(set(tokenizer.all_special_ids)) if i in place],
        "prompts": list(prompts),
        "answers": [
            [
                {"model": a.model, "finish": a.finish_reason, "tokens": len(a.positions)}
                for a in group
            ]
            for group in answers
        ],
        "pieces": text.exceptions(flat, known, place),
        "calibration": calibration and {
            key: calibration[key] for key in ("curve", "strength", "interval", "objective")
        },
        "tokenBytes": wide(0).itemsize,
        "columns": {
            name: base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode()
            for name, values in columns.items()
        },
    }  # fmt: skip
    page = (HERE / "page.html").read_text(encoding="utf-8")
    for mark, content in (
        ("{title}", html.escape(title)),
        ("{style}", (HERE / "page.css").read_text(encoding="utf-8")),
        ("{script}", (HERE / "page.js").read_text(encoding="utf-8")),
        ("{data}", json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")),
    ):
        before, after = page.split(mark, 1)
        page = before + content + after
    return page


def _step(strength: float) -> float:
    """The slider's step: it has 100 to either side, and the strength is a whole number of them."""
    size = abs(strength)
    return size / min(50, max(1, round(size / SMALLEST_STEP))) if size else 0.1


class _Texts:
    """Texts of tokens, special ones included."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.decode = lambda ids: str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        self.before = tokenizer("a", add_special_tokens=False)["input_ids"]
        self.start = self.decode(self.before)

    def alone(self, token: int) -> str:
        """Text of a token inside a text: some tokenizers drop a space at the beginning."""
        whole = self.decode([*self.before, token])
        return whole[len(self.start) :] if whole.startswith(self.start) else self.decode([token])

    def exceptions(
        self, answers: Sequence[Answer], known: list[int], place: dict[int, int]
    ) -> dict[int, str]:
        """Position -> text, where it is not that of the token alone: parts of a character."""
        alone = {token: self.alone(token) for token in known}
        found, position = {}, 0
        for answer in answers:
            detokenizer = Detokenizer(self.decode)
            for i, token in enumerate(p.token for p in answer.positions):
                piece = detokenizer.add(token, last=i == len(answer.positions) - 1)
                if piece != alone[token]:
                    found[position] = piece
                position += 1
        return found
