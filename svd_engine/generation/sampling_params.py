"""Sampling parameters and limits, with the names of `transformers.GenerationConfig`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from operator import index
from typing import Any, Literal

from transformers import GenerationConfig

from svd_engine.data.tokenization import as_list
from svd_engine.generation.constraints import Constraints
from svd_engine.ops import checks
from svd_engine.utils.arguments import count, number

NEW_TOKENS = 128  # unless max_new_tokens or max_length says otherwise
# The top_k of transformers when it samples and none is set.
TRANSFORMERS_TOP_K = 50
# Fields about how transformers computes, not which tokens result: accepted, without effect.
WITHOUT_EFFECT = {
    "bos_token_id", "pad_token_id", "transformers_version", "use_cache", "cache_implementation",
    "cache_config", "max_cache_len", "compile_config", "disable_compile", "prefill_chunk_size",
    "low_memory", "continuous_batching_config",
}  # fmt: skip
# Values that turn other fields off; None, False and 0 always do.
OFF = {
    "encoder_repetition_penalty": 1.0, "num_beam_groups": 1,
    "num_assistant_tokens": 20, "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4, "assistant_lookbehind": 10, "target_lookbehind": 10,
}  # fmt: skip
# What vLLM, llama.cpp, Ollama and OpenAI's API call our options.
OTHER_NAMES = {
    "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens", "stop": "stop_strings", "stop_token_ids": "eos_token_id",
    "ignore_eos": "eos_token_id=[]", "n": "num_return_sequences", "logprobs": "top_logprobs",
    "bad_words": "bad_words_ids", "allowed_token_ids": "prefix_allowed_tokens_fn",
    "logits_processors": "logits_processor", "sampling_params": "generation_config",
    "guided_regex": "regex", "guided_json": "json_schema", "response_format": "json_schema",
    "structured_outputs": "regex or json_schema", "guided_choice": "regex, as yes|no",
    "best_of": "num_beams or num_return_sequences", "repeat_penalty": "repetition_penalty",
    "n_predict": "max_new_tokens", "num_predict": "max_new_tokens",
}  # fmt: skip


@dataclass(frozen=True)
class SamplingParams(Constraints):
    """How tokens are chosen and when to stop; docs/engine.md describes each field.

    Raises ValueError for a value out of range, and for values that contradict each other.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None  # of prompt and completion; max_new_tokens wins
    max_time: float | None = None  # seconds
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | Sequence[int] = 0  # row i draws with seed + i; or one seed per prompt
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1
    eos_token_id: int | Sequence[int] | None = None  # None is the model's own
    stop_strings: str | Sequence[str] | Sequence[Sequence[str]] = ()
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("temperature", "top_p", "min_p", "length_penalty"):
            number(name, getattr(self, name))
        for name, least in (
            ("max_new_tokens", 0), ("max_length", 1), ("num_beams", 1), ("top_k", 0),
            ("num_return_sequences", 1), ("top_logprobs", 0),
        ):  # fmt: skip
            if (value := getattr(self, name)) is not None or not name.startswith("max"):
                object.__setattr__(self, name, count(name, value, least))
        checks.sampling(self.temperature, self.top_k, self.top_p, self.min_p)
        if self.max_time is not None and not number("max_time", self.max_time) > 0:
            raise ValueError(f"max_time must be > 0, in seconds; got {self.max_time}.")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(
                f"early_stopping must be True, False or 'never'; got {self.early_stopping!r}."
            )
        if self.num_beams > 1:
            self._check_beams()
        elif self.num_return_sequences > 1 and self.temperature == 0:
            raise ValueError(
                f"num_return_sequences = {self.num_return_sequences} would all be the same; "
                "set temperature > 0, or num_beams."
            )

    def _check_beams(self) -> None:
        if self.temperature > 0:
            raise ValueError(
                f"num_beams = {self.num_beams} searches without sampling; "
                f"got temperature = {self.temperature}. Leave one of them out."
            )
        if self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences = {self.num_return_sequences} must be at most "
                f"num_beams = {self.num_beams}."
            )
        if self.top_logprobs:
            raise ValueError("top_logprobs is not kept in beam search; leave out num_beams.")

    def limit(self, prompt: int) -> int:
        """The most new tokens that a prompt of `prompt` tokens may get."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return NEW_TOKENS if self.max_length is None else self.max_length - prompt

    def seeds(self, prompts: int) -> list[int]:
        """Each prompt's seed; its sequence j draws with seed + j."""
        seed: Any = self.seed
        if isinstance(seed, Integral) and not isinstance(seed, bool):
            seed = [int(seed) + i * self.num_return_sequences for i in range(prompts)]
        try:
            seed = [index(one) for one in as_list(seed, "seed", "an integer or a list of integers")]
        except TypeError as error:
            raise ValueError(f"seed must hold integers; got {seed!r}.") from error
        if len(seed) != prompts:
            raise ValueError(
                f"seed must be an integer or one per prompt; got {len(seed)} for {prompts}."
            )
        for one in seed:
            if not -(2**63) <= one < 2**63 - self.num_return_sequences:
                raise ValueError(f"seed must fit 64 bits; got {one}.")
        return seed

    @classmethod
    def from_arguments(
        cls, generation_config: GenerationConfig | None = None, **keywords: Any
    ) -> "SamplingParams":
        """Combine keywords with a GenerationConfig, as transformers reads it; keywords win.

        None means unset. Raises TypeError for an unknown keyword, ValueError for a contradiction
        and for a field of transformers that is set and not supported.
        """
        known = {field.name for field in fields(cls)}
        config: dict[str, Any] = {}
        if generation_config is not None:
            if not isinstance(generation_config, GenerationConfig):
                raise ValueError(
                    "generation_config must be a transformers.GenerationConfig; "
                    f"got {type(generation_config).__name__}."
                )
            config = {k: v for k, v in vars(generation_config).items() if not k.startswith("_")}
            config = _supported(config, known)
            config.setdefault("top_k", TRANSFORMERS_TOP_K)
        keywords = _supported(keywords, known)
        if "max_length" in keywords:
            if "max_new_tokens" in keywords:
                raise ValueError("give max_new_tokens or max_length, not both.")
            config.pop("max_new_tokens", None)
        temperature = _temperature(config, keywords)
        values = {k: v for k, v in {**config, **keywords}.items() if k != "do_sample"}
        return cls(**{**values, "temperature": temperature})


def _temperature(config: Mapping[str, Any], keywords: Mapping[str, Any]) -> float:
    """Resolve temperature and do_sample; 0 is greedy.

    do_sample alone samples at 1; a temperature alone samples if it is above 0.
    """
    sampled = keywords.get("do_sample")
    if not isinstance(sampled, bool | None):
        raise ValueError(f"do_sample must be True or False; got {sampled!r}.")
    if sampled is None and "temperature" not in keywords:
        sampled = bool(config.get("do_sample"))
    if "temperature" in keywords:
        temperature = keywords["temperature"]
    else:
        temperature = config.get("temperature", 1.0) if sampled else 0.0
    if sampled is not None and sampled != (temperature != 0):
        raise ValueError(
            f"do_sample={sampled} contradicts temperature={temperature}; sampling needs a "
            "temperature above 0 and greedy choice none."
        )
    return temperature


def _supported(values: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """Keep the values that are set and supported; raise for set values that are not."""
    transformers_fields = vars(GenerationConfig())
    kept = {}
    for name, value in values.items():
        if name in known or name == "do_sample":
            if value is not None:
                kept[name] = value
        elif name in OTHER_NAMES:
            raise TypeError(
                f"unexpected keyword argument {name!r}; here it is {OTHER_NAMES[name]}."
            )
        elif name not in transformers_fields or name.startswith("_"):
            raise TypeError(f"unexpected keyword argument {name!r}.")
        elif name not in WITHOUT_EFFECT and value and value != OFF.get(name):
            raise ValueError(f"{name}={value!r} is not supported. Leave it out.")
    return kept
