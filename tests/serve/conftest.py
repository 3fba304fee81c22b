"""A tokenizer that servers under test share."""

import copy

import pytest

CHAT = "{% for m in messages %}{{ 'w010 ' + m['content'] + ' ' }}{% endfor %}w011"


@pytest.fixture(scope="session")
def chat_words(words):
    tokenizer = copy.deepcopy(words)
    tokenizer.chat_template = CHAT
    return tokenizer
