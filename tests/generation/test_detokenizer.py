"""Incremental text and stop strings, in the detokenizer and in the engine."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor, StopStringCriteria

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.generation.detokenizer import Detokenizer, first_stop, special_in
from tests.data import forms
from tests.tiny import PROMPTS, tiny_peft


def run(pieces, stops):
    """The text released per piece, and the stop string; token ids are indices of pieces."""

    def decode(ids):
        return b"".join(pieces[i] for i in ids).decode(errors="replace")

    detokenizer, released = Detokenizer(decode, stops), []
    for token in range(len(pieces)):
        released.append(detokenizer.add(token, last=token + 1 == len(pieces)))
        if detokenizer.stop_string is not None:
            break
    return released, detokenizer.stop_string


def test_what_may_begin_a_stop_string_is_held_back():
    given, stop = run([b"one", b" STO", b"RE ST", b"OP two"], ["STOP"])
    assert given == ["one", " ", "STORE ", ""] and stop == "STOP"
    given, stop = run([b"one", b" STO"], ["STOP"])
    assert given == ["one", " STO"] and stop is None  # the last token gives out all
    given, stop = run([b"a", b"ab", b"a", b"bc"], ["ababc"])
    assert given == ["", "a", "", ""] and stop == "ababc"
    assert run([b"x", b"\n", b"\nQ"], ["\n\n", "\nQ"]) == (["x", "", ""], "\n\n")


def test_a_character_of_several_tokens_comes_whole():
    snow = "\N{SNOWMAN}".encode()
    given, _ = run([b"a", snow[:1], snow[1:2], snow[2:], b"b"], [])
    assert given == ["a", "", "", "\N{SNOWMAN}", "b"]
    given, stop = run([b"a", snow[:1], snow[1:2], snow[2:], b"b"], ["\N{SNOWMAN}b"])
    assert given == ["a", "", "", "", ""] and stop == "\N{SNOWMAN}b"
    given, _ = run([b"a", snow[:1]], [])
    assert given == ["a", "\ufffd"]


def test_which_stop_string():
    assert first_stop("xcab", ["b", "cab"]) == (1, "cab")  # complete together: the longest
    assert first_stop("xabcd", ["abcd", "bc"]) == (2, "bc")  # the one complete first
    assert first_stop("xyz", ["a"]) is None and first_stop("xyz", []) is None


@settings(max_examples=300, deadline=None)
@given(
    st.text("ab\N{SNOWMAN}", max_size=14),
    st.lists(st.text("ab\N{SNOWMAN}", min_size=1, max_size=4), max_size=3),
    st.data(),
)
def test_tokens_do_not_matter(text, stops, data):
    """However a text is cut into tokens, the released text ends at the same place."""
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(raw) - 1, 1)), max_size=len(raw))))
    ends = [0, *(c for c in cuts if c < len(raw)), len(raw)]
    pieces = [raw[a:b] for a, b in pairwise(ends)]
    given, stop = run(pieces, stops)
    found = first_stop(text, stops)
    assert "".join(given) == (text if found is None else text[: found[0]])
    assert stop == (found and found[1])
    whole = Detokenizer(lambda ids: text, stops).decode_to_stop([0])
    assert whole == ("".join(given), stop)


@pytest.fixture(scope="module")
def engine(words):
    return SteeredEngine(tiny_peft(), words, SteeringConfig(-4.0))


def test_stop_strings_of_the_engine(engine):
    free = engine.generate(PROMPTS, max_new_tokens=9, eos_token_id=[])
    words = [c.text.split() for c in free]
    # over two tokens, ending inside the second; of the first row only
    stop = f"{words[0][3]} {words[0][4][:2]}"
    got = engine.generate(PROMPTS, max_new_tokens=9, eos_token_id=[], stop_strings=[stop])
    for a, b in zip(got, free, strict=True):
        assert a.text == b.text.split(stop)[0]
        assert (a.finish_reason, a.stop_reason) == (
            ("stop", stop) if stop in b.text else ("length", None)
        )
    assert got[0].token_ids == free[0].token_ids[:5]
    assert {c.finish_reason for c in got} == {"stop", "length"}
    each = engine.generate(
        PROMPTS, max_new_tokens=9, eos_token_id=[],
        stop_strings=[[], [words[1][1]], None, words[3][2]],
    )  # fmt: skip
    assert each[0] == free[0] or each[0].token_ids == free[0].token_ids
    assert [c.stop_reason for c in each] == [None, words[1][1], None, words[3][2]]
    assert [c.completion_tokens for c in each] == [9, 2, 9, 3]


def test_streams_hold_back_and_give_the_same(engine):
    free = engine.generate(PROMPTS, max_new_tokens=9, eos_token_id=[])
    stops = [free[0].text[5:18], free[2].text[10:11], "w0", "never"]
    for options in (dict(stop_strings=stops), dict(stop_strings=[[s] for s in stops])):
        options |= dict(max_new_tokens=9, eos_token_id=[])
        whole = engine.generate(PROMPTS, **options)
        texts, last = [""] * 4, {}
        for event in engine.stream(PROMPTS, **options):
            texts[event.row] += event.text
            assert whole[event.row].text.startswith(texts[event.row])
            assert event.row not in last
            if event.finish_reason:
                last[event.row] = event
        assert texts == [c.text for c in whole]
        for row, completion in enumerate(whole):
            assert last[row].finish_reason == completion.finish_reason
            assert last[row].stop_reason == completion.stop_reason


def test_an_end_of_sequence_is_told_by_its_id(engine):
    free = engine.generate(PROMPTS[0], max_new_tokens=9, eos_token_id=[])[0]
    end = free.token_ids[2]
    got = engine.generate(PROMPTS[0], max_new_tokens=9, eos_token_id=end, stop_strings="never")[0]
    assert (got.finish_reason, got.stop_reason) == ("stop", end)
    assert got.token_ids[-1] == end


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ValueError, match="stop_strings need a tokenizer"):
        SteeredEngine(tiny_peft()).generate([5], max_new_tokens=2, stop_strings="a")


# special tokens in stop strings


@pytest.fixture(scope="module")
def byte_level():
    return forms.build("byte-level")


STOPS = ["</s>", "<s>", "</s>\n", "?</s>", "\n<s>A", "</s></s>", "it", "\nA:", " the", "Q"]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_special_tokens_in_stop_strings_end_where_transformers_ends(byte_level, data):
    """The same tokens as `StopStringCriteria` of transformers; the text is what stands before."""
    tokenizer = byte_level
    drawn = data.draw(
        st.lists(st.sampled_from(["</s>", "<s>", "\n", "?", "A", ":", " the", "Q", "i", "t"]))
    )
    ids = tokenizer("".join(drawn)).input_ids
    stops = data.draw(st.lists(st.sampled_from(STOPS), min_size=1, max_size=3, unique=True))
    stops = [stop for stop in stops if any(s in stop for s in ("</s>", "<s>"))] or ["</s>"]
    detokenizer = Detokenizer(
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True), stops,
        special_in(stops, tokenizer),
    )  # fmt: skip
    criterion = StopStringCriteria(tokenizer, stops)
    text = ""
    for n in range(1, len(ids) + 1):
        text += detokenizer.add(ids[n - 1], last=n == len(ids))
        is_stopped = bool(criterion(torch.tensor([ids[:n]]), None))
        assert (detokenizer.stop_string is not None) == is_stopped
        if is_stopped:
            break
    else:
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
        return
    raw = tokenizer.decode(ids[:n])
    before, stop = raw, None
    if found := first_stop(raw, stops):
        before, stop = raw[: found[0]], found[1]
    assert text == before.replace("</s>", "").replace("<s>", "") and stop == detokenizer.stop_string
    anew = Detokenizer(detokenizer.decode, stops, detokenizer.special)
    assert anew.decode_to_stop(ids) == (text, stop)


def test_special_tokens_count_where_a_stop_string_holds_one(byte_level):
    assert special_in(["a</s>b", "<s"], byte_level) == {0: "<unk>", 1: "<s>", 2: "</s>"}
    assert special_in(["Q", "\n"], byte_level) == special_in([], byte_level) == {}
    assert special_in(["</s>"], None) == {}
    stops = ["<"]  # of the text: special tokens are not in it
    detokenizer = Detokenizer(
        lambda ids: byte_level.decode(ids, skip_special_tokens=True), stops,
        special_in(stops, byte_level),
    )  # fmt: skip
    assert [detokenizer.add(token, False) for token in byte_level("A</s>:").input_ids] == [
        "A", "", ":",
    ]  # fmt: skip


class Forced(LogitsProcessor):
    """Leaves one token at each place after a prompt of one token."""

    def __init__(self, ids):
        self.ids = ids

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids[input_ids.shape[1] - 1]] = 0.0
        return forced


def test_the_engine_stops_at_special_tokens(engine):
    forced = [Forced([5, 17, 2, 40, 41])]
    options = dict(max_new_tokens=5, model="adapted", logits_processor=forced, eos_token_id=[])
    (free,) = engine.generate([9], **options)
    assert free.text == "w005 w017 w040 w041" and free.finish_reason == "length"
    for stop, text, tokens in (
        ("w002", "w005 w017", 3), ("w002 w04", "w005 w017", 4), ("w040", "w005 w017 ", 4),
    ):  # fmt: skip
        (got,) = engine.generate([9], stop_strings=[stop, "never"], **options)
        assert (got.text, got.stop_reason, len(got.token_ids)) == (text, stop, tokens)
        events = list(engine.stream([9], stop_strings=stop, **options))
        assert "".join(event.text for event in events) == text
        assert events[-1].stop_reason == stop
    (got,) = engine.generate([9], stop_strings=["w002"], **options | dict(eos_token_id=2))
    assert (got.text, got.stop_reason) == ("w005 w017", "w002")
    beams = dict(options, num_beams=2)
    (got,) = engine.generate([9], stop_strings=["w002"], **beams)
    assert (got.text, got.stop_reason) == ("w005 w017", "w002")
