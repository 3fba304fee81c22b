"""Tokenizers of the forms in use, trained on a few lines, with special tokens around a text."""

import json

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEXT = [
    "Q: Will it rain tomorrow?\nA: Nobody can know.\n", "Q: Why do cats purr?\nA: Yes: to heal.\n",
    "### Instruction:\nIs it so?\n\n### Response:\nthe correct answer is true", "1 + 2 = 3; (42)",
    "the thing and the other thing", "def f(x):\n    return x", "Yes No Nobody to the is It it",
]  # fmt: skip
SPECIAL = ["<unk>", "<s>", "</s>"]
AROUND = {"nothing": "$A", "bos": "<s> $A", "bos, eos": "<s> $A </s>", "eos": "$A </s>"}


def llama2() -> Tokenizer:
    """SentencePiece's BPE as in Llama 2: a space before every text, no pre-tokenizer."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = spaces
    # Pieces do not cross words.
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?\w+|▁?[^\w▁]|▁"), "isolated")
    trained.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=180, special_tokens=SPECIAL, show_progress=False)
    )
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    tokenizer = Tokenizer(models.BPE(trained.get_vocab(), merges, unk_token="<unk>", fuse_unk=True))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def byte_level() -> Tokenizer:
    """GPT-2's form: no space before a text, words with the space before them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=380, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return tokenizer


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        TEXT, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    )
    return tokenizer


def unigram() -> Tokenizer:
    """SentencePiece's unigram model as in T5: a space before every text, cut at spaces."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        TEXT,
        trainers.UnigramTrainer(
            vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        ),
    )
    return tokenizer


FORMS = {"llama2": llama2, "byte-level": byte_level, "word-level": word_level, "unigram": unigram}


def build(form: str, around: str = "nothing") -> PreTrainedTokenizerFast:
    tokenizer = FORMS[form]()
    template = AROUND[around]
    if template != "$A":
        used = [(t, tokenizer.token_to_id(t)) for t in SPECIAL]
        extra = processors.TemplateProcessing(single=template, special_tokens=used)
        tokenizer.post_processor = extra
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
