"""Prompt and answer become the tokens of their whole text, whatever the form of the tokenizer."""

from itertools import product

import pytest
import torch

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.data import examples
from svd_engine.data.tokenization import encode_answers, encode_chat, encode_prompt
from svd_engine.evaluate.truthfulqa import PLAIN
from svd_engine.generation.passages import collect
from svd_engine.training import trainer
from tests import limits
from tests.data import forms, tokenizer_cases
from tests.data.tokenizer_cases import BEGUN, CHATML, QUESTIONS_ALONE
from tests.tiny import VOCAB, tiny_peft


@pytest.mark.parametrize("form, around", [*product(forms.FORMS, forms.AROUND)])
def test_prompt_and_answer_are_the_tokens_of_the_whole_text(form, around):
    assert tokenizer_cases.is_exact(form, around)


def test_the_table_in_the_documentation():
    rows = tokenizer_cases.found()
    assert {row.outcome for row in rows} == {"exact", "refused"}
    assert limits.table("tokenizers") == limits.tokenizers().splitlines()


def test_an_answer_has_no_space_of_its_own():
    tokenizer = forms.build("llama2", "bos, eos")
    alone = tokenizer(" Yes", add_special_tokens=False).tokens()
    assert alone == ["▁", "▁Yes"]  # the space that the tokenizer puts before every text
    prompt, (answer,) = encode_answers("Q: Why?\nA:", [" Yes"], tokenizer)
    assert tokenizer.convert_ids_to_tokens(answer) == ["▁Yes"]
    assert tokenizer.convert_ids_to_tokens(prompt)[:2] == ["<s>", "▁Q"] and prompt[-1] != 2


def test_the_prompts_last_space_goes_to_every_answer():
    tokenizer = forms.build("byte-level")
    prompt, answers = encode_answers("A: ", ["Yes", "42"], tokenizer)
    assert tokenizer.convert_ids_to_tokens(prompt) == ["A", ":"]
    assert [tokenizer.decode(answer) for answer in answers] == [" Yes", " 42"]
    assert encode_answers("A: ", ["42"], tokenizer)[0] == encode_prompt("A: ", tokenizer)


@pytest.mark.parametrize("form", forms.FORMS)
def test_token_ids_beside_text(form):
    tokenizer = forms.build(form, "bos, eos")
    prompt, texts = "Q: Why?\nA:", [" Yes", " Nobody"]
    ids = encode_prompt(prompt, tokenizer)
    assert encode_answers(ids, texts, tokenizer) == encode_answers(prompt, texts, tokenizer)
    assert encode_answers(prompt, [[7, 8]], tokenizer) == (ids, [[7, 8]])
    assert encode_answers([5, 6], [[7], [8]], None) == ([5, 6], [[7], [8]])


@pytest.mark.parametrize("form", ["llama2", "byte-level"])
def test_answers_cannot_be_encoded_with_token_ids_that_no_text_has(form):
    tokenizer = forms.build(form)
    ids = tokenizer.convert_tokens_to_ids(["t", "h", "e"])
    with pytest.raises(
        ValueError, match=r"of its text 'the', .* both as text or both as token ids"
    ):
        encode_answers(ids, [" Yes"], tokenizer)


def test_what_is_no_text_and_no_token_ids():
    tokenizer = forms.build("byte-level")
    for bad in ([1.5], [True], ["a"], torch.tensor([0.5]), 3):
        with pytest.raises(ValueError, match="token ids must"):
            encode_prompt(bad, tokenizer)
    with pytest.raises(ValueError, match="is not Unicode: surrogates not allowed"):
        encode_prompt("a\ud800", tokenizer)
    assert encode_prompt(torch.tensor([5, 6]), None) == [5, 6]


def test_score_is_that_of_plain_transformers_on_the_whole_text():
    tokenizer = forms.build("llama2", "bos, eos")
    model = tiny_peft()
    assert len(tokenizer) <= VOCAB
    engine = SteeredEngine(model, tokenizer, SteeringConfig(-1.0))
    prompt, answer = "Q: Why?\nA:", " Nobody can know."
    ids = tokenizer.backend_tokenizer.encode(prompt + answer).ids[:-1]
    own = len(tokenizer.backend_tokenizer.encode(prompt).ids) - 1
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    wanted = sum(float(logp[i - 1, ids[i]]) for i in range(own, len(ids)))
    assert engine.score(prompt, [answer], model="adapted") == pytest.approx([wanted], abs=1e-3)
    (labelled,) = trainer.labelled([dict(prompt=prompt, completion=answer)], tokenizer, 99)
    assert labelled["input_ids"] == [*ids, 2]
    assert labelled["labels"] == [-100] * own + [*ids[own:], 2]
    (example,) = examples.encode([dict(prompt=prompt, completion=answer)], tokenizer)
    assert (example.prompt, example.completion) == (ids[:own], ids[own:])
    (passage,) = collect(engine.inputs, prompt, [answer])
    assert passage == (ids[:own], ids[own:])
    assert engine.generate(prompt, max_new_tokens=1)[0].prompt_tokens == own
    question = PLAIN.format(question="Why?")
    assert engine.inputs.prompts([question]) == [ids[:own]]


TEMPLATE = (  # as Llama 2's: the template puts a space before an answer and </s> after it
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)


def test_the_answer_of_a_chat_is_encoded_as_its_template_writes_it():
    tokenizer = forms.build("byte-level", "bos, eos")
    tokenizer.chat_template = TEMPLATE
    asked = [{"role": "user", "content": "Why?"}]
    messages = [*asked, {"role": "assistant", "content": "Yes"}]
    plain = tokenizer.backend_tokenizer
    written = "<s>[INST] Why? [/INST] Yes"
    whole = plain.encode(written, add_special_tokens=False).ids
    (example,) = examples.encode([dict(messages=messages, rejected=["No"])], tokenizer)
    assert example.prompt + example.completion == whole
    assert tokenizer.decode(example.completion) == " Yes"
    assert tokenizer.decode(example.rejected[0]) == " No"
    assert encode_chat(asked, tokenizer) == example.prompt


def test_a_conversation_that_ends_with_the_assistant_is_continued():
    tokenizer = forms.build("byte-level", "bos, eos")
    tokenizer.chat_template = CHATML
    plain = tokenizer.backend_tokenizer
    engine = SteeredEngine(tiny_peft(), tokenizer)
    written = "<s>user\nWhy?</s>\n<s>assistant\nNobody can"
    begun = plain.encode(written, add_special_tokens=False).ids
    assert encode_chat(BEGUN, tokenizer) == begun
    opened = plain.encode("<s>user\nWhy?</s>\n<s>assistant\n", add_special_tokens=False).ids
    assert encode_chat(BEGUN[:1], tokenizer) == opened
    # `messages` of an example are whole turns; its `prompt` may end in a begun answer.
    last = {"role": "assistant", "content": " know."}
    (example,) = examples.encode([dict(prompt=BEGUN, completion=[last])], tokenizer)
    assert example.prompt == begun
    assert tokenizer.decode(example.completion) == " know."
    (example,) = examples.encode([dict(messages=[*BEGUN, last])], tokenizer)
    assert tokenizer.decode(example.prompt) == f"{written}</s>\n<s>assistant\n"
    assert engine.tokenizer is tokenizer


@pytest.mark.parametrize(
    "template, messages, message",
    [
        (
            QUESTIONS_ALONE, BEGUN,
            r"messages\[0\]: the chat template cannot continue the assistant's last message: ",
        ),
        (
            "{{ raise_exception('roles must alternate') }}", BEGUN[:1],
            r"messages\[0\]: the chat template cannot render the messages: roles must alternate",
        ),
        (CHATML, [[]], r"messages\[0\] must be a list"),
        (CHATML, [{"role": "user"}], r"messages\[0\]\[0\]: content must be text; got None"),
        (CHATML, [{"content": "a"}], r"messages\[0\]\[0\]: role must be text; got None"),
    ],
)  # fmt: skip
def test_conversations_that_cannot_be_rendered(words, template, messages, message):
    engine = SteeredEngine(tiny_peft(), words, SteeringConfig(-1.0))
    words.chat_template = template
    try:
        with pytest.raises(ValueError, match=message):
            engine.generate(messages=messages, max_new_tokens=1)
    finally:
        words.chat_template = None
