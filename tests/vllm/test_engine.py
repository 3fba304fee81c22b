"""Steered models inside vLLM, on its CPU runner, against plain PEFT: tokens and scores."""

import pytest
import torch

from svd_engine import SteeredEngine
from svd_engine.integrations.vllm import engine_args
from svd_engine.kernels import reference
from tests.tiny import assert_same_tokens, teacher_forced_two_pass
from tests.vllm import models

NEW = 24
TIE = 1e-4
TIE_IN_BFLOAT16 = 0.5
TIE_IF_ROUNDED = 0.05  # to 8 bits, where inputs fall on different sides of a half
MOST_BAD_WORDS = 128  # that vLLM takes
REQUESTS = {}, {"strength": 2.0}, {"strength": 0.0}, {"model": "adapted"}, {}, {"model": "base"}


def generate(vllm, llm, prompts, requests=None, **params):
    """Greedy tokens of each prompt, to the full length."""
    params = dict(temperature=0.0, max_tokens=NEW, ignore_eos=True, detokenize=False) | params
    requests = requests or [{}] * len(prompts)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [vllm.SamplingParams(**params, extra_args=extra or None) for extra in requests],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def truth(model, prompt, tokens, extra):
    """What plain PEFT answers to each step of these tokens, and its gap to the runner-up."""
    if "model" not in extra:
        generation = models.STEERING.generation
        strength = extra.get("strength", generation.strength)
        return teacher_forced_two_pass(model, prompt, tokens, strength, generation.alpha)
    with torch.no_grad():
        row = torch.tensor([prompt + tokens[:-1]])
        if extra["model"] == "base":
            with model.disable_adapter():
                logits = model(row).logits
        else:
            logits = model(row).logits
    best = logits[0, -len(tokens) :].topk(2)
    gaps = best.values[:, 0] - best.values[:, 1]
    return list(zip(best.indices[:, 0].tolist(), gaps.tolist(), strict=True))


def assert_equal(model, prompts, got, requests, tie=TIE):
    for prompt, tokens, extra in zip(prompts, got, requests, strict=True):
        assert len(tokens) == NEW
        assert_same_tokens(tokens, truth(model, prompt, tokens, extra), tie)


@pytest.mark.parametrize(
    ("architecture", "adapter"),
    [
        ("llama", None), ("mistral", None), ("qwen2", None), ("qwen3", None), ("gemma2", None),
        ("llama", "head"), ("gemma2", "head"),
    ],
)  # fmt: skip
def test_tokens_are_those_of_plain_peft(vllm, engine, folder_of, prompts, architecture, adapter):
    """A ragged batch, with chunked prefill, of requests with strengths and models of their own."""
    root, model = folder_of(architecture, adapter)
    with engine(**engine_args(root / "base", root / "adapter")) as llm:
        got = generate(vllm, llm, prompts, REQUESTS)
        assert_equal(model, prompts, got, REQUESTS)
        again = generate(vllm, llm, prompts)  # steered all; the cache has their beginnings
        assert_equal(model, prompts, again, [{}] * len(prompts))
        assert again[1] != got[1] or again[2] != got[2] or again[5] != got[5]


class TestOneEngine:
    """What one engine of a tiny Llama does."""

    @pytest.fixture(scope="class")
    def llm(self, engine, folder_of):
        root, _ = folder_of("llama")
        arguments = engine_args(root / "base", root / "adapter", max_logprobs=models.VOCAB)
        with engine(**arguments) as llm:
            yield llm

    def test_prompt_logprobs_are_scores(self, vllm, llm, folder_of, prompts):
        """They have the strength for ranking and no penalty, in the same step as steered tokens."""
        _, model = folder_of("llama")
        params = [
            vllm.SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, prompt_logprobs=n)
            for n in (0, None, 0)
        ]
        chosen = [prompts[2], prompts[0], prompts[4]]
        outputs = llm.generate([{"prompt_token_ids": p} for p in chosen], params, use_tqdm=False)
        reference = SteeredEngine(model, None, models.STEERING)
        for prompt, output in zip(chosen, outputs, strict=True):
            tokens = list(output.outputs[0].token_ids)
            assert_same_tokens(tokens, truth(model, prompt, tokens, {}), TIE)
            if output.prompt_logprobs is not None:
                got = [
                    logprobs[token].logprob
                    for token, logprobs in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
                ]
                assert sum(got) == pytest.approx(reference.score(prompt)[0], abs=1e-2)

    def test_a_grammar_that_leaves_nothing_of_the_support(self, vllm, llm, folder_of):
        """It gets the adapted model's order below the support, and not token 0."""
        _, model = folder_of("llama")
        for prompt in ([5, 17, 40], [9, 9, 30, 7]):
            row = model(torch.tensor([prompt])).logits[0, -1]
            first, second = row.argsort()[:2].tolist()  # the least likely tokens
            choices = [f"w{first:03}w{second:03}", f"w{second:03}w{first:03}"]
            params = vllm.SamplingParams(
                temperature=0.0, max_tokens=8, detokenize=False,
                structured_outputs=vllm.sampling_params.StructuredOutputsParams(choice=choices),
            )  # fmt: skip
            output = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
            tokens = list(output[0].outputs[0].token_ids)[:2]
            assert tokens == [second, first]

    def test_min_tokens_bad_words_and_banned_tokens(self, vllm, llm, folder_of):
        """Only allowed tokens come, and of these the best, even if it is off the support."""
        _, model = folder_of("llama")
        prompt = [5, 17, 40]
        with torch.no_grad():
            adapted = model(torch.tensor([prompt])).logits[0, -1:]
            with model.disable_adapter():
                base = model(torch.tensor([prompt])).logits[0, -1:]
        config = models.STEERING.generation
        steered = reference.steer(adapted, base, config.strength, alpha=config.alpha)[0]
        steered = torch.where(steered == -torch.inf, adapted[0] - 1e4, steered)
        kept = int((steered > -1e3).sum())
        order = steered.argsort(descending=True).tolist()
        assert generate(vllm, llm, [prompt], logprobs=None)[0][0] == order[0]
        for banned in (order[:1], order[: kept + 1]):  # the best; the whole support and one more
            params = [
                dict(min_tokens=8, max_tokens=8, stop_token_ids=banned),
                dict(logit_bias=dict.fromkeys(banned, -1e6)),
                dict(bad_words=[f"w{token:03}" for token in banned]),
            ]
            for given in params[: 3 if len(banned) <= MOST_BAD_WORDS else 2]:
                tokens = generate(vllm, llm, [prompt], **given)[0]
                assert tokens[0] == order[len(banned)] and not set(tokens) & set(banned)

    def test_logprobs_are_finite_and_sum_to_one(self, vllm, llm):
        params = vllm.SamplingParams(temperature=0.0, max_tokens=1, logprobs=models.VOCAB)
        output = llm.generate([{"prompt_token_ids": [5, 17]}], params, use_tqdm=False)
        values = torch.tensor([x.logprob for x in output[0].outputs[0].logprobs[0].values()])
        assert values.isfinite().all()
        assert values.double().exp().sum() == pytest.approx(1, abs=1e-5)

    def test_seeded_draws_repeat_in_any_batch(self, vllm, llm, prompts):
        params = dict(temperature=1.5, seed=7)
        alone = generate(vllm, llm, prompts[:1], **params)
        few = [*prompts[:4], prompts[5]]  # read at once: vLLM's seeds on a CPU cannot wait
        batched = generate(vllm, llm, few, **params)
        assert batched[0] == alone[0]

    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            ({"strength": "x"}, "strength must be a number"),
            ({"strength": True}, "strength must be a number"),
            ({"strength": float("nan")}, "strength must be finite"),
            ({"model": "other"}, "model must be one of base, adapted, steered"),
            ({"model": "base", "strength": 1.0}, "leave out strength"),
        ],
    )
    def test_a_bad_request_is_refused_by_name(self, vllm, llm, extra, message):
        with pytest.raises(vllm.exceptions.VLLMValidationError, match=message):
            generate(vllm, llm, [[5, 6]], [extra])

    def test_prompt_logprobs_have_no_strength_of_their_own(self, vllm, llm):
        with pytest.raises(vllm.exceptions.VLLMValidationError, match="steering for ranking"):
            generate(vllm, llm, [[5, 6]], [{"strength": 1.0}], prompt_logprobs=1)


def test_bfloat16(vllm, engine, folder_of, prompts):
    """Up to ties, which are wider."""
    root, model = folder_of("llama")
    with engine(**engine_args(root / "base", root / "adapter"), dtype="bfloat16") as llm:
        got = generate(vllm, llm, prompts, REQUESTS)
    assert_equal(model, prompts, got, REQUESTS, TIE_IN_BFLOAT16)


def test_a_quantised_base(vllm, engine, tmp_path, words, prompts):
    """Of 8 bits: the base's tokens are those of vLLM alone, and an adapter adds what PEFT adds."""
    model = models.build("llama")
    models.save(model, tmp_path)
    models.quantise(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    x = torch.randn(3, 96)

    def rows_of_both(steered):
        layer = steered.model.layers[1].mlp.down_proj
        return layer.quant_method.apply(layer, torch.cat((x, x)))

    with engine(**engine_args(tmp_path / "base", tmp_path / "adapter")) as llm:
        base, adapted = llm.apply_model(rows_of_both)[0].chunk(2)
        got = generate(vllm, llm, prompts, [{"model": "base"}] * len(prompts))
        assert generate(vllm, llm, prompts) != got
    lora = model.get_base_model().model.layers[1].mlp.down_proj
    term = lora.lora_B["default"](lora.lora_A["default"](x)) * lora.scaling["default"]
    torch.testing.assert_close(adapted - base, term, rtol=1e-4, atol=1e-4)
    params = vllm.SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, logprobs=2)
    with engine(model=str(tmp_path / "base")) as llm:
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        for tokens, output in zip(got, llm.generate(given, params, use_tqdm=False), strict=True):
            assert_same_tokens(tokens, with_gaps(output.outputs[0]), TIE_IF_ROUNDED)


def with_gaps(completion):
    """Its tokens, each with its distance to the runner-up."""
    ranked = [sorted(x.logprob for x in step.values()) for step in completion.logprobs]
    gaps = [values[-1] - values[-2] for values in ranked]
    return list(zip(completion.token_ids, gaps, strict=True))


def test_preemption(vllm, engine, folder_of, prompts):
    """A cache too small for the batch: requests are thrown out, and come back to their tokens."""
    root, model = folder_of("llama")
    arguments = engine_args(root / "base", root / "adapter")
    with engine(**arguments, block_size=32, num_gpu_blocks_override=7) as llm:
        chosen, requests = (
            [prompts[3], *prompts[:3]],
            [{}, {"strength": 2.0}, {}, {"model": "base"}],
        )
        chosen = [prompt + prompts[3][:20] for prompt in chosen]
        got = generate(vllm, llm, chosen, requests)
        assert_equal(model, chosen, got, requests)
        found = {metric.name: metric for metric in llm.get_metrics()}
        assert found["vllm:num_preemptions"].value > 0


def test_compiled(vllm, engine, folder_of, prompts, monkeypatch):
    """Traced by Dynamo in one graph, as the CPU runner does; what a size is stays free."""
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # no Inductor: it takes minutes
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    root, model = folder_of("llama")
    with engine(**engine_args(root / "base", root / "adapter", enforce_eager=False)) as llm:
        got = generate(vllm, llm, prompts, REQUESTS)
        assert_equal(model, prompts, got, REQUESTS)


def test_a_plain_model_in_the_same_environment(vllm, engine, folder_of, prompts):
    """The plugin changes nothing for it."""
    root, model = folder_of("llama")
    with engine(model=str(root / "base")) as llm:
        assert_equal(model, prompts, generate(vllm, llm, prompts), [{"model": "base"}] * 6)
