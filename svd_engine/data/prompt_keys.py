"""Keys of prompts: one question has one key, however it is written."""

import hashlib
import json
import re
import unicodedata

from svd_engine.data.tokenization import Text

PREFIX = "signs:"  # of the keys of this version; those of earlier ones have none
# Words, blanks, the point of .5, the prime of f'(x) and all symbols; but no sentence punctuation.
SIGN = re.compile(r"[^\W_]+|_+|!=|(?<![^\W\d_])\.(?=\d)|(?<=\w)'+(?=\()|[^\w\s.,;:!?'\"`]")
WRITTEN = {
    **dict.fromkeys([*range(0x2018, 0x2020), 0xAB, 0xBB, 0x2039, 0x203A], "'"),  # quotes
    **dict.fromkeys([*range(0x2010, 0x2014), 0x2212], "-"),  # hyphens and minus
    **dict.fromkeys([0x2014, 0x2015], " "),  # dashes
    # Spanish, Arabic, Indic and Chinese sentence punctuation
    **dict.fromkeys([0xA1, 0xBF, 0x60C, 0x61B, 0x61F, 0x964, 0x3001, 0x3002], " "),
    **dict.fromkeys(range(0xFE00, 0xFE10), ""),  # variants of a symbol
}
WORD = re.compile(r"[^\W\d_]{2,}")  # between two of them, a hyphen is punctuation


def prompt_key(text: Text) -> str:
    """Return a key of the question, without case, spaces and sentence punctuation.

    Symbols count: "3 + 4" and "3 - 4", "C" and "C++" have two keys. A question has the same key
    inside `Q: ... A:`, after solved examples, and in a template with `### Instruction:`. Token ids
    are hashed as they are.
    """
    if not isinstance(text, str):
        return PREFIX + _digest(json.dumps([int(token) for token in text]))
    return PREFIX + _digest(" ".join(_signs(_question(text))) or text)


def words_key(text: Text) -> str:
    """Return the key of records of earlier versions, which are of words alone."""
    if not isinstance(text, str):
        return _digest(json.dumps([int(token) for token in text]))
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", _question(text)).casefold())
    return _digest(" ".join(words) or text)  # a prompt may be only punctuation


def _signs(text: str) -> list[str]:
    """Words and symbols of a text in a form that does not depend on how they are written."""
    if not text.isascii():
        text = "".join(_plain(character) for character in text)
    text = unicodedata.normalize("NFKC", text).casefold().translate(WRITTEN)
    signs = SIGN.findall(text)
    return [
        sign
        for before, sign, after in zip(["", *signs], signs, [*signs[1:], ""], strict=False)
        if not (sign == "-" and WORD.fullmatch(before) and WORD.fullmatch(after))
    ]


def _plain(character: str) -> str:
    """Return ^2 for a superscript 2, and nothing for an invisible character."""
    if unicodedata.decomposition(character).startswith("<super>"):
        return f"^{character}"
    return "" if unicodedata.category(character) == "Cf" else character


def _question(prompt: str) -> str:
    """Strip an instruction template or solved examples from around the question."""
    if "### Instruction:" in prompt:
        prompt = prompt.partition("### Instruction:")[2].partition("### Response:")[0]
    before, _, last = ("\n" + prompt.strip()).rpartition("\n")
    if last == "A:" and "\nQ:" in before:
        return before.rpartition("\nQ:")[2]
    return prompt


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
