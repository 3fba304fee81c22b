"""What becomes of prompts, answers and chats with each form of tokenizer."""

from typing import NamedTuple

from svd_engine.data.tokenization import encode_answers, encode_chat, encode_prompt
from tests.data import forms

PAIRS = [
    ("Q: Why do cats purr?\nA:", (" Yes", " Nobody can know.", " 42")),
    ("Q: Why do cats purr?\nA: ", ("Yes", "Nobody", "42", "(x)")),  # a token spans the end
    ("### Response:\n", ("the correct answer is true", "Nobody")),
    ("The", (" thing", "re", ": 1")),
    ("Q: Why", ("?", "?\nA:")),
    ("</s>Q: Why?", (" Yes</s>", " No")),  # special tokens in the text are the text's own
]
CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
QUESTIONS_ALONE = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
ASKED = [{"role": "user", "content": "Why?"}]
BEGUN = [*ASKED, {"role": "assistant", "content": "Nobody can"}]


class Found(NamedTuple):
    case: str
    outcome: str  # "exact", "wrong" or "refused"
    reason: str = ""


def whole_text(tokenizer, around, text):
    """What the tokenizer itself makes of the whole text, without the </s> that it puts after it."""
    ids = tokenizer.backend_tokenizer.encode(text).ids
    return ids[:-1] if around in ("bos, eos", "eos") else ids


def is_exact(form, around):
    """Whether every prompt and answer together are the tokens of their whole text."""
    tokenizer = forms.build(form, around)
    for prompt, answers in PAIRS:
        if form == "word-level":
            answers = [answer for answer in answers if answer != "re"]  # "There" is one <unk>
        ids, encoded = encode_answers(prompt, answers, tokenizer)
        own = whole_text(tokenizer, around, prompt)
        if encode_prompt(prompt, tokenizer) != own or own[: len(ids)] != ids:
            return False
        for answer, tokens in zip(answers, encoded, strict=True):
            if not tokens or ids + tokens != whole_text(tokenizer, around, prompt + answer):
                return False
        # The split is at the end of the prompt or, where a token spans it, just before that token.
        if ids != own and not any(t[0] != own[len(ids)] for t in encoded):
            return False
    return True


def _token_ids_without_text():
    tokenizer = forms.build("byte-level")
    encode_answers(tokenizer.convert_tokens_to_ids(["t", "h", "e"]), [" Yes"], tokenizer)


def _chat(template, messages):
    tokenizer = forms.build("byte-level")
    tokenizer.chat_template = template
    plain = tokenizer.backend_tokenizer
    opened = "<s>user\nWhy?</s>\n<s>assistant\n"
    text = opened if messages is ASKED else f"{opened}Nobody can"
    want = plain.encode(text, add_special_tokens=False).ids
    return encode_chat(messages, tokenizer) == want


OTHERS = {
    "no tokenizer: text": lambda: encode_prompt("Why?", None),
    "no tokenizer: token ids": lambda: encode_answers([5, 6], [[7]], None) == ([5, 6], [[7]]),
    "token ids that no text has, with a text as answer": _token_ids_without_text,
    "messages, with a chat template": lambda: _chat(CHATML, ASKED),
    "messages that end with the assistant: continued": lambda: _chat(CHATML, BEGUN),
    "the same, with a template that leaves the assistant out": lambda: _chat(
        QUESTIONS_ALONE, BEGUN
    ),
    "messages, without a chat template": lambda: _chat(None, ASKED),
}


def found():
    """An entry per form of tokenizer and what it puts around a text, and per other case."""
    rows = []
    for form in forms.FORMS:
        for around, template in forms.AROUND.items():
            outcome = "exact" if is_exact(form, around) else "wrong"
            rows.append(Found(f"{form}, `{template.replace('$A', 'text')}`", outcome))
    for case, run in OTHERS.items():
        try:
            rows.append(Found(case, "exact" if run() else "wrong"))
        except ValueError as error:
            rows.append(Found(case, "refused", str(error).partition(":")[0].rstrip(".")))
    return rows
