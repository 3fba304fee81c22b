"""Steering inside `model.generate`, against the engine and the plain two-pass loop."""

import gc
import weakref
from threading import Thread

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from tokenizers import Tokenizer, decoders, models
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StopStringCriteria,
    TextIteratorStreamer,
    TextStreamer,
    TopKLogitsWarper,
    pipeline,
)

from svd_engine import SteeredEngine, SteeringConfig, SteeringLogitsProcessor, steered_generate
from svd_engine.integrations import pair_cache
from svd_engine.kernels import reference
from svd_engine.model.pair import pair_models
from tests.test_docs import snippets
from tests.tiny import VOCAB, assert_same_tokens, tiny_base, tiny_peft, two_pass

PROMPTS = [[5, 17, 40, 9, 33], [101], [7, 7, 120, 3, 88, 61, 14, 90, 55], [200, 4]]
WIDTH = max(map(len, PROMPTS))
METHODS = {
    "lora": None,
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "prompt": PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "p-tuning": PromptEncoderConfig(
        num_virtual_tokens=5, encoder_hidden_size=16, task_type="CAUSAL_LM"
    ),
    "prefix": PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
}  # fmt: skip
STEERING = SteeringConfig(-4.0)
WIDE = SteeringConfig(-4.0, alpha=0.01)  # leaves sampling a choice


@pytest.fixture(scope="module")
def model():
    return tiny_peft()


def padded(prompts=PROMPTS):
    """As a tokenizer with padding_side="left" gives them."""
    width = max(map(len, prompts))
    return dict(
        input_ids=torch.tensor([[0] * (width - len(p)) + p for p in prompts]),
        attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    )


def steered(model, prompts=PROMPTS, steering=STEERING, max_new_tokens=12, **options):
    options = dict(custom_generate=steered_generate, max_new_tokens=max_new_tokens, **options)
    return model.generate(**padded(prompts), steering=steering, **options)


def assert_rows(output, completions, prompts=PROMPTS):
    """Prompts as given, then what the engine completed, then pads."""
    given = padded(prompts)["input_ids"]
    assert torch.equal(output[:, : given.shape[1]], given)
    longest = max(len(c.token_ids) for c in completions)
    assert output[:, given.shape[1] :].tolist() == [
        c.token_ids + [0] * (longest - len(c.token_ids)) for c in completions
    ]


class Naive(LogitsProcessor):
    """The steered logits, the base model reading each row anew."""

    def __init__(self, model, steering=STEERING, pad=0):
        self.model, self.steering, self.pad = model, steering, pad

    def __call__(self, input_ids, scores):
        rows = []
        for ids, score in zip(input_ids.tolist(), scores, strict=True):
            while len(ids) > 1 and ids[0] == self.pad:
                ids.pop(0)
            with self.model.disable_adapter():
                base = self.model(input_ids=torch.tensor([ids])).logits[:, -1]
            strength, alpha = self.steering.strength, self.steering.alpha
            rows.append(reference.steer(score[None], base, strength, alpha=alpha)[0])
        return torch.stack(rows)


class StopAfter(StoppingCriteria):
    """Ends the first row once it has so many tokens."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.arange(len(input_ids)) < (input_ids.shape[1] >= self.length)


# steered_generate


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize("method", METHODS)
def test_a_padded_batch_equals_the_engine_and_two_pass(method):
    model = tiny_peft("llama", METHODS[method])
    output = steered(model)
    completions = SteeredEngine(model, steering=STEERING).generate(PROMPTS, max_new_tokens=12)
    assert_rows(output, completions)
    got = steered(model, PROMPTS[:1])[0, len(PROMPTS[0]) :].tolist()
    assert_same_tokens(got, two_pass(model, PROMPTS[0], 12, -4.0), tie=1e-3)


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "gemma2"])
def test_other_architectures(architecture):
    model = tiny_peft(architecture)
    got = steered(model, PROMPTS[:1])[0, len(PROMPTS[0]) :].tolist()
    assert_same_tokens(got, two_pass(model, PROMPTS[0], 12, -4.0), tie=1e-3)


def test_layers_without_a_peft_model_around_them(model):
    """As transformers' own `load_adapter` leaves a model."""
    own = inject_adapter_in_model(model.peft_config["default"], tiny_base("llama"))
    weights = get_peft_model_state_dict(model)
    weights = {name.removeprefix("base_model.model."): w for name, w in weights.items()}
    set_peft_model_state_dict(own, weights)
    assert torch.equal(steered(own), steered(model))


def test_ends_of_sequence(model):
    full = SteeredEngine(model, steering=STEERING).generate(
        PROMPTS, max_new_tokens=12, eos_token_id=[]
    )
    ends = [full[0].token_ids[2], full[1].token_ids[5]]
    stopped = SteeredEngine(model, steering=STEERING).generate(
        PROMPTS, max_new_tokens=12, eos_token_id=ends
    )
    assert_rows(steered(model, eos_token_id=ends), stopped)


@pytest.mark.parametrize("cuts", [{}, dict(top_k=20), dict(top_p=0.9), dict(min_p=0.05)])
def test_sampling_is_the_engines_with_a_seed_from_torch(model, cuts):
    cuts = dict(top_k=0) | cuts
    torch.manual_seed(3)
    seed = int(torch.randint(2**62, ()))
    engine = SteeredEngine(model, steering=WIDE)
    truth = engine.generate(PROMPTS, max_new_tokens=12, temperature=1.3, seed=seed, **cuts)
    torch.manual_seed(3)
    options = dict(steering=WIDE, do_sample=True, temperature=1.3, **cuts)
    assert_rows(steered(model, **options), truth)
    assert not torch.equal(steered(model, **options), steered(model, **options))


def test_return_sequences_differ(model):
    output = steered(
        model, PROMPTS[:2], WIDE, do_sample=True, temperature=1.5, num_return_sequences=3
    )
    assert len({tuple(row) for row in output.tolist()}) == 6
    assert output[:3, :5].tolist() == [PROMPTS[0]] * 3


def test_processors_change_the_steered_logits(model):
    options = dict(max_new_tokens=12, do_sample=False)
    order = [Naive(model), RepetitionPenaltyLogitsProcessor(1.5), NoRepeatNGramLogitsProcessor(2)]
    plain = model.generate(
        **padded(PROMPTS[:1]), logits_processor=LogitsProcessorList(order), **options
    )
    got = steered(model, PROMPTS[:1], repetition_penalty=1.5, no_repeat_ngram_size=2)
    assert torch.equal(got, plain)
    assert not torch.equal(got, steered(model, PROMPTS[:1]))


def test_processors_know_rows_by_their_place(model):
    """Though rows leave the batch when they end."""
    options = dict(prefix_allowed_tokens_fn=lambda row, ids: [row + 10, row + 20, 14])
    finite = SteeringConfig(-4.0, penalty=-50.0)
    full = steered(model, steering=finite, **options)[:, WIDTH:].tolist()
    ended = steered(model, steering=finite, eos_token_id=10, pad_token_id=0, **options)
    for row, (tokens, whole) in enumerate(zip(ended[:, WIDTH:].tolist(), full, strict=True)):
        assert set(whole) <= {row + 10, row + 20, 14}
        end = whole.index(10) + 1 if 10 in whole else 12
        assert tokens[:end] == whole[:end] and not any(tokens[end:])
    with pytest.raises(ValueError, match="removed every token that steering left"):
        steered(model, suppress_tokens=list(range(2, VOCAB)))


def test_warpers_of_the_configuration_are_applied_once(model):
    """One's own come on top; scores are those after all of them, as transformers has them."""
    options = dict(
        steering=WIDE, do_sample=True, temperature=0.5, top_k=40, return_dict_in_generate=True
    )
    result = steered(model, output_scores=True, output_logits=True, **options)
    assert len(result.scores) == len(result.logits) == result.sequences.shape[1] - WIDTH
    for logits, scores in zip(result.logits, result.scores, strict=True):
        cut = logits / 0.5
        cut[cut < cut.topk(40).values[:, -1:]] = -torch.inf
        assert torch.equal(scores, cut)
    best = steered(model, logits_processor=[TopKLogitsWarper(1)], **options).sequences
    assert torch.equal(best, steered(model, steering=WIDE))
    assert len(steered(model, typical_p=0.9, **options).sequences) == len(PROMPTS)


def test_recorded_logits_are_the_steered(model):
    result = steered(
        model, PROMPTS[:1], return_dict_in_generate=True, output_logits=True, output_scores=True
    )
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        truth = Naive(model)(ids, model(input_ids=ids).logits[:, -1])
    torch.testing.assert_close(result.logits[0], truth, atol=1e-4, rtol=0)
    assert torch.equal(result.logits[0], result.scores[0])
    assert not result.logits[0].is_inference()


def letters():
    """A tokenizer of one character a token."""
    alphabet = ["~", "\n", *(chr(i) for i in range(600) if chr(i).isprintable() and i != ord("~"))]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet[:VOCAB])}, []))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="~")


def test_stopping_criteria_end_rows_with_pads(model):
    full = steered(model, eos_token_id=[], pad_token_id=0)
    got = steered(model, pad_token_id=0, stopping_criteria=[StopAfter(WIDTH + 3)])
    assert torch.equal(got[0, : WIDTH + 3], full[0, : WIDTH + 3])
    assert not got[0, WIDTH + 3 :].any() and got.shape[1] > WIDTH + 3

    tokenizer, answer = letters(), full[0, WIDTH:].tolist()
    stop = StopStringCriteria(tokenizer, [tokenizer.decode(answer[2:4])])
    got = steered(model, PROMPTS[:1], stopping_criteria=[stop])[0].tolist()
    assert got == PROMPTS[0] + answer[:4]
    assert steered(model, max_time=1e-9).shape[1] == WIDTH + 1
    assert steered(model, stopping_criteria=[MaxTimeCriteria(60.0)]).shape == full.shape


def test_streamers(model, words, capsys):
    whole = steered(model, PROMPTS[:1])[0]
    output = steered(model, PROMPTS[:1], streamer=TextStreamer(words))
    assert capsys.readouterr().out == words.decode(whole) + "\n"
    assert torch.equal(output[0], whole)

    streamer = TextIteratorStreamer(words, skip_prompt=True, timeout=60)
    thread = Thread(target=steered, args=(model, PROMPTS[:1]), kwargs=dict(streamer=streamer))
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == words.decode(whole[len(PROMPTS[0]) :])
    assert len(pieces) > 3


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_pipeline(method, words, capsys):
    model = tiny_peft("llama", METHODS[method])
    words = PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer, pad_token="w000")
    words.padding_side = "left"
    run = pipeline("text-generation", model=model, tokenizer=words)
    texts = [words.decode(prompt) for prompt in PROMPTS]
    options = dict(
        custom_generate=steered_generate, steering=STEERING, max_new_tokens=8, do_sample=False,
        return_full_text=False,
    )  # fmt: skip
    truth = SteeredEngine(model, steering=STEERING).generate(PROMPTS, max_new_tokens=8)
    for answers, completion in zip(run(texts, batch_size=2, **options), truth, strict=True):
        assert answers[0]["generated_text"].split() == words.decode(completion.token_ids).split()
    run(texts[0], streamer=TextStreamer(words, skip_prompt=True), **options)
    assert capsys.readouterr().out.split() == words.decode(truth[0].token_ids).split()


def test_the_pair_is_kept_while_the_adapter_is_what_it_was(monkeypatch):
    model, built = tiny_peft(), []
    build = pair_models
    monkeypatch.setattr(pair_cache, "pair_models", lambda *args: built.append(args) or build(*args))

    def assert_fresh(count):
        output = steered(model)
        assert len(built) == count
        truth = SteeredEngine(model, steering=STEERING).generate(PROMPTS, max_new_tokens=12)
        assert_rows(output, truth)

    before = steered(model)
    assert_fresh(1)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.3)
    model(input_ids=torch.tensor([PROMPTS[0]]), labels=torch.tensor([PROMPTS[0]])).loss.backward()
    optimizer.step()
    assert_fresh(2)
    assert not torch.equal(steered(model), before)
    weights[0].data.mul_(-1)  # unseen by autograd
    assert_fresh(3)
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 2
    assert_fresh(4)
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    assert_fresh(5)


@pytest.mark.parametrize("method", METHODS)
def test_the_pair_does_not_outlive_the_model(method):
    model = tiny_peft("llama", METHODS[method])
    steered(model, PROMPTS[:1], max_new_tokens=1)
    seen = weakref.ref(model.get_base_model())
    del model
    gc.collect()
    assert seen() is None


def test_two_calls_at_a_time_have_a_pair_each(model):
    base = model.get_base_model()
    with pair_cache.borrow(base) as one, pair_cache.borrow(base) as other:
        assert one is not other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(steering=None), "steering must be a SteeringConfig; got None"),
        (dict(steering=SteeringConfig(1.0, vocab_size=7)), "vocabulary of 7 tokens"),
        (dict(num_beams=2), "ask for beam_search.*SteeringLogitsProcessor"),
        (dict(output_attentions=True, return_dict_in_generate=True), "output_attentions"),
        (dict(position_ids=torch.arange(3, 8)[None]), "position_ids must count"),
        (dict(inputs_embeds=torch.zeros(1, 5, 32)), "inputs_embeds"),
    ],
)
def test_refusals(model, options, message):
    with pytest.raises(ValueError, match=message):
        steered(model, PROMPTS[:1], **options)


def test_rows_with_adapters_of_their_own_are_refused():
    with pytest.raises(ValueError, match="adapter_names is not supported"):
        steered(tiny_peft(), PROMPTS[:1], adapter_names=["__base__"])


def test_models_without_a_base_are_refused(model):
    with pytest.raises(ValueError, match="must be a PeftModel; got LlamaForCausalLM"):
        steered(tiny_base("llama"))
    with model.disable_adapter(), pytest.raises(ValueError, match="disabled adapter"):
        steered(model)
    empty = padded()
    empty["attention_mask"][1] = 0
    with pytest.raises(ValueError, match="row without tokens"):
        model.generate(**empty, custom_generate=steered_generate, steering=STEERING)


# SteeringLogitsProcessor


def processed(model, processor, prompts=PROMPTS, **options):
    options = dict(max_new_tokens=12, do_sample=False) | options
    return model.generate(
        **padded(prompts), logits_processor=LogitsProcessorList([processor]), **options
    )


def is_right_in_generate(model):
    """Whether PEFT's own `generate` decodes what its forward pass says."""
    ids = torch.tensor([[5, 17, 40, 9]])
    got = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=[])
    for _ in range(6):
        with torch.no_grad():
            token = model(input_ids=ids).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, token[:, None]], 1)
    return torch.equal(got, ids)


@pytest.mark.slow
@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize("method", METHODS)
def test_the_processor_equals_two_pass(method):
    model = tiny_peft("llama", METHODS[method])
    if not is_right_in_generate(model):
        with pytest.raises(ValueError, match="model has virtual tokens, which generate"):
            SteeringLogitsProcessor(model, STEERING)
        return
    processor = SteeringLogitsProcessor(model, STEERING)
    for prompt in PROMPTS:  # each call after the first begins anew
        got = processed(model, processor, [prompt])[0, len(prompt) :].tolist()
        assert_same_tokens(got, two_pass(model, prompt, 12, -4.0), tie=1e-3)


@pytest.mark.parametrize("pads", ["attention_mask", "pad_token_id"])
def test_the_processor_equals_the_engine_in_a_padded_batch(model, pads):
    known = dict(attention_mask=padded()["attention_mask"], pad_token_id=0)
    processor = SteeringLogitsProcessor(model, STEERING, **{pads: known[pads]})
    truth = steered(model)
    for _ in range(2):
        assert torch.equal(processed(model, processor), truth)
    other = [*PROMPTS[1:], [9] * WIDTH]
    if pads == "pad_token_id":
        assert torch.equal(processed(model, processor, other), steered(model, other))
    else:
        with pytest.raises(ValueError, match=r"attention_mask is \[4, 9\]; input_ids came as"):
            processed(model, processor, PROMPTS[:1])


@pytest.mark.slow
@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize(
    "mode",
    [dict(num_beams=2), dict(num_beams=3, num_return_sequences=3, renormalize_logits=True)],
)
def test_the_processor_follows_beams(model, mode):
    # WIDE: with fewer tokens left than twice the beams, transformers expands impossible ones.
    calls = []
    processor = SteeringLogitsProcessor(model, WIDE, pad_token_id=0)
    prefill = processor._base.prefill
    processor._base.prefill = lambda *args: calls.append(1) or prefill(*args)
    got = processed(model, processor, **mode)
    assert torch.equal(got, processed(model, Naive(model, WIDE), **mode))
    assert len(calls) == 1  # beams were re-gathered, not read anew


def test_the_processor_samples(model):
    options = dict(do_sample=True, temperature=1.2, num_return_sequences=2)
    runs = []
    for processor in (SteeringLogitsProcessor(model, WIDE, pad_token_id=0), Naive(model, WIDE)):
        torch.manual_seed(5)
        runs.append(processed(model, processor, **options))
    assert torch.equal(*runs)


def test_the_processor_reads_anew_what_it_does_not_know(model):
    """Other histories, more rows, and a text that outgrows the cache."""
    processor = SteeringLogitsProcessor(model, STEERING)
    naive = Naive(model, pad=None)
    torch.manual_seed(0)
    text = torch.randint(3, 200, (3, 12))
    for ids in (text[:2, :4], text[:2, :5], text[1:, :6], text[:, :7], text[:, :7], text[[2], :8]):
        processor._steps = min(processor._steps, 1)
        scores = torch.randn(len(ids), VOCAB)
        torch.testing.assert_close(processor(ids, scores), naive(ids, scores), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "mask", [[[1, 1, 0]], [[0, 0, 0]], [1, 1], [[1, 0, 1]]], ids=["right", "empty", "flat", "hole"]
)
def test_a_mask_must_pad_on_the_left(model, mask):
    with pytest.raises(ValueError, match="zeros on the left"):
        SteeringLogitsProcessor(model, STEERING, attention_mask=torch.tensor(mask))


def test_the_processor_refuses(model):
    with pytest.raises(ValueError, match="must be a PeftModel"):
        SteeringLogitsProcessor(tiny_base("llama"), STEERING)
    with pytest.raises(ValueError, match="got both"):
        SteeringLogitsProcessor(model, STEERING, attention_mask=torch.ones(1, 3), pad_token_id=0)
    with pytest.raises(ValueError, match="vocabulary of 7"):
        SteeringLogitsProcessor(model, SteeringConfig(1.0, vocab_size=7))


def test_the_documentation(model, capsys):
    names = dict(model=model, tokenizer=letters())
    for snippet in snippets("docs/hugging-face.md"):
        exec(snippet, names)
    prompts = [row[row != 0].tolist() for row in names["inputs"]["input_ids"]]
    truth = SteeredEngine(model, steering=STEERING).generate(prompts, max_new_tokens=32)
    assert_rows(names["output"], truth, prompts)
    assert len(names["drawn"]) == len(names["beams"]) == 2
    assert names["tokenizer"].decode(truth[0].token_ids) in capsys.readouterr().out
