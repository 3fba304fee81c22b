"""The real model: a LoRA that PEFT trained, decoded token for token as by two plain passes."""

import pytest
import torch

from svd_engine import SteeredEngine, SteeringConfig, loading
from svd_engine.cli import almanac
from svd_engine.data import examples
from svd_engine.training.warm_start import warm_start
from tests.tiny import assert_same_tokens, teacher_forced_two_pass

pytestmark = [pytest.mark.model, pytest.mark.slow]

PROMPTS = [
    "Q: What is the capital of France?\nA:",
    "The three most important things about the sea are",
    "def fibonacci(n):\n",
    "Q: What does it mean when the clock stops?\nA:",
    "Once upon a time, in a village by the river, there lived",
]


@pytest.fixture(scope="module")
def engine(smollm2, tmp_path_factory):
    base, tokenizer = smollm2
    folder = tmp_path_factory.mktemp("smollm2") / "adapter"
    rows = almanac.build()["train"][:8]
    warm_start(base, tokenizer, rows, folder, steps=3, batch_size=4, progress=False)
    return SteeredEngine(
        loading.load_adapter(base, folder), tokenizer, SteeringConfig(-8.0), pairing="paired"
    )


def test_the_file_is_parsed_once(smollm2, monkeypatch):
    gguf = pytest.importorskip("gguf")
    reader, read = gguf.GGUFReader, []

    def counted(path):
        read.append(path)
        return reader(path)

    monkeypatch.setattr(gguf, "GGUFReader", counted)
    again, tokenizer = loading.load_base(loading.SMOLLM2, dtype=torch.float32)
    assert len(read) == 1 and gguf.GGUFReader is counted
    assert tokenizer(PROMPTS[0]).input_ids == smollm2[1](PROMPTS[0]).input_ids
    pairs = zip(again.parameters(), smollm2[0].parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_prompt_and_answer_alone_are_their_whole_text(smollm2):
    """A tokenizer without a prefix space: what an answer of the almanac is does not change."""
    _, tokenizer = smollm2
    rows = almanac.build()["calibration"]
    for row, example in zip(rows, examples.encode(rows, tokenizer), strict=True):
        assert example.prompt == tokenizer(row["prompt"]).input_ids
        texts = [row["completion"], *row["accepted"], *row["rejected"]]
        alone = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        assert [example.completion, *example.accepted, *example.rejected] == alone


def test_tokens_equal_two_plain_passes(engine):
    completions = engine.generate(PROMPTS, max_new_tokens=32)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = engine.tokenizer(prompt)["input_ids"]
        truth = teacher_forced_two_pass(engine.model, ids, completion.token_ids, -8.0)
        assert_same_tokens(completion.token_ids, truth, tie=1e-4)
    adapted = engine.generate(PROMPTS, max_new_tokens=32, model="adapted")
    assert any(a.token_ids != s.token_ids for a, s in zip(adapted, completions, strict=True))


@pytest.mark.parametrize("options", [{}, dict(temperature=0.7, seed=3)], ids=["greedy", "sampled"])
def test_guesses_change_no_bit(engine, options):
    """Of texts that repeat and texts that do not, with look-up and with the base as assistant."""
    week = "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, "
    prompts = [week * 3, *PROMPTS[:2]]
    want = engine.generate(prompts, max_new_tokens=24, eos_token_id=[], **options)
    plain, _ = loading.load_base(loading.SMOLLM2, dtype=torch.float32)
    for source in ("prompt", [plain, 4]):
        got = engine.generate(
            prompts, max_new_tokens=24, eos_token_id=[], speculate=source, **options
        )
        assert got == want


def test_calibration_on_real_text(engine):
    report = engine.calibrate(almanac.build()["calibration"][:6], folds=3, force=True)
    assert report.objective == "preference"
    assert 0 < report.support_share < 1 and 0 < report.single_share < 1
    assert report.loss_before > 0 and engine.steering.generation.base_model == loading.SMOLLM2
    assert engine.steering.generation.strength == report.strength
