"""What a Sequence guarantees, from the validated request through the decode loop."""

import pytest
import torch

from svd_engine import SteeredEngine, SteeringConfig
from svd_engine.generation.completions import events
from svd_engine.generation.decode_loop import Batch
from svd_engine.generation.detokenizer import Detokenizer
from svd_engine.generation.request import Request
from svd_engine.generation.sampling_params import SamplingParams
from svd_engine.generation.sequence import Sequence
from tests.tiny import PROMPTS, tiny_peft

WORDS = ["a ", "b ", "sto", "p ", "c "]


def decode(token_ids):
    return "".join(WORDS[i] for i in token_ids)


def sequence(max_new_tokens=4, stop_strings=(), is_text_incremental=True, **options):
    detokenizer = Detokenizer(decode, stop_strings)
    return Sequence(
        3, [9, 9], max_new_tokens, detokenizer=detokenizer,
        is_text_incremental=is_text_incremental, **options,
    )  # fmt: skip


def append(sequence, token_ids):
    """Append until the sequence is finished, as the decode loop does."""
    got = []
    for token in token_ids:
        if sequence.is_finished:
            break
        got.append(sequence.append(token, -0.5))
    return got


def test_the_limit_finishes_a_sequence():
    s = sequence(max_new_tokens=2)
    got = append(s, [0, 1, 4])
    assert (s.token_ids, s.logprobs, s.all_ids) == ([0, 1], [-0.5, -0.5], [9, 9, 0, 1])
    assert (s.finish_reason, s.stop_reason, s.text) == ("length", None, "a b ")
    assert [(e.row, e.token_id, e.text, e.finish_reason) for e in got] == [
        (3, 0, "a ", None), (3, 1, "b ", "length"),
    ]  # fmt: skip


def test_an_end_of_sequence_finishes_it_and_wins_over_the_limit():
    s = sequence(max_new_tokens=2, eos_token_ids={1})
    assert append(s, [0, 1, 4])[-1].stop_reason == 1
    assert (s.token_ids, s.finish_reason, s.stop_reason) == ([0, 1], "stop", 1)


@pytest.mark.parametrize("eos_token_ids", [set(), {3}])
def test_a_stop_string_finishes_it_cuts_the_text_and_wins(eos_token_ids):
    s = sequence(stop_strings=["stop"], eos_token_ids=eos_token_ids)
    got = append(s, [0, 2, 3, 4])
    assert [e.text for e in got] == ["a ", "", ""]  # "sto" is held back
    assert (s.token_ids, s.text) == ([0, 2, 3], "a ")
    assert (s.finish_reason, s.stop_reason) == ("stop", "stop")


def test_events_hold_all_of_the_text():
    for tokens in ([0, 1, 2, 4], [2, 2, 3], [0, 2]):
        s = sequence(max_new_tokens=len(tokens), stop_strings=["stop c"])
        assert "".join(e.text for e in append(s, tokens)) == s.text == decode(tokens)


def test_text_once_at_the_end_is_that_of_all_tokens():
    s = sequence(max_new_tokens=3, is_text_incremental=False)
    assert [e.text for e in append(s, [0, 2, 3])] == ["", "", ""]
    assert s.text == "a stop "


def test_no_room_is_finished_from_the_start():
    s = sequence(max_new_tokens=0)
    assert s.is_finished and s.completion().finish_reason == "length"
    assert Batch(Request(None, SteeringConfig(1.0), SamplingParams(), [s]), [s]).is_finished


def test_what_would_stop_a_beam():
    s = sequence(stop_strings=["stop"], eos_token_ids={4})
    assert [s.find_stop(ids) for ids in ([0], [0, 4], [0, 2, 3], [2, 3, 4])] == [None, 4, "stop", 4]
    assert s.token_ids == [] and not s.is_finished


def test_its_completion():
    best = {"steered": [(0, -0.1)]}
    s = sequence(max_new_tokens=1)
    event = s.append(0, -0.1, best)
    got = s.completion()
    assert event.top_logprobs == best and got.top_logprobs == [best]
    assert (got.token_ids, got.logprobs, got.text) == ([0], [-0.1], "a ")
    assert (got.prompt_tokens, got.completion_tokens, got.score) == (2, 1, None)


# in a request


@pytest.fixture(scope="module")
def engine(words):
    return SteeredEngine(tiny_peft(), words, SteeringConfig(-4.0, alpha=0.01))


def test_a_request_makes_them_once_with_limits_and_seeds(engine):
    request = engine._request(
        PROMPTS, False, max_length=20, temperature=1.0, num_return_sequences=2, seed=[9, 0, 4, 7],
        stop_strings=[["w1"], [], None, "w2"], eos_token_id=[5, 6],
    )  # fmt: skip
    sequences = request.sequences
    assert [s.index for s in sequences] == list(range(8))
    assert [s.prompt_ids for s in sequences[::2]] == [s.prompt_ids for s in sequences[1::2]]
    assert [s.max_new_tokens for s in sequences[::2]] == [20 - len(p) for p in PROMPTS]
    assert [s.seed for s in sequences] == [9, 10, 0, 1, 4, 5, 7, 8]
    assert all(s.eos_token_ids == {5, 6} for s in sequences)
    assert [s.detokenizer.stop_strings for s in sequences[1::2]] == [("w1",), (), (), ("w2",)]
    assert len({id(s.detokenizer) for s in sequences}) == 8


def test_groups_hold_every_sequence_once_and_keep_copies_together(engine):
    request = engine._request(
        PROMPTS, False, temperature=1.0, num_return_sequences=2, batch_size=5, max_new_tokens=3
    )
    groups = [[s.index for s in group] for group in request.groups()]
    assert groups == [[0, 1, 4, 5], [2, 3, 6, 7]]  # the longest prompts first


def test_the_same_sequences_go_through_decoding(engine):
    request = engine._request(PROMPTS, True, max_new_tokens=6, eos_token_id=list(range(2, 60, 3)))
    got = list(events(request))
    for i, s in enumerate(request.sequences):
        own = [event for event in got if event.row == i]
        assert s.token_ids == [e.token_id for e in own] and s.text == "".join(e.text for e in own)
        assert s.is_finished and own[-1].finish_reason == s.finish_reason
        assert [e.finish_reason for e in own[:-1]] == [None] * (len(own) - 1)


def test_a_sequence_finished_from_outside_leaves_the_batch(engine):
    request = engine._request(PROMPTS, True, max_new_tokens=6, eos_token_id=[])
    whole = engine.generate(PROMPTS, max_new_tokens=6, eos_token_id=[])
    batch = Batch(request, request.sequences)
    assert [event.row for event in batch.step()] == [0, 1, 2, 3]
    request.sequences[1].finish("stop")
    while not batch.is_finished:
        assert [event.row for event in batch.step()] == [0, 2, 3]
    tokens = [completion.token_ids for completion in whole]
    assert [s.token_ids for s in request.sequences] == [tokens[0], tokens[1][:1], *tokens[2:]]


@pytest.mark.parametrize("options", [{}, dict(temperature=1.0, num_return_sequences=2)])
def test_a_decoder_that_overlaps_the_host_makes_no_step_too_many(engine, options, monkeypatch):
    """It steps before the tokens are read, but not after the last."""
    options = dict(max_new_tokens=5, eos_token_id=[], **options)
    whole, calls = engine.generate(PROMPTS, **options), []
    step = engine.pair.step
    monkeypatch.setattr(engine.pair, "overlaps_host", True)
    monkeypatch.setattr(engine.pair, "step", lambda tokens: calls.append(1) or step(tokens))
    assert engine.generate(PROMPTS, **options) == whole
    assert len(calls) == 4
    stream = engine.stream(PROMPTS, **options)
    next(stream)
    assert len(calls) == 5  # under way before the first token is out
    stream.close()
    assert torch.is_inference_mode_enabled() is False
