"""Steered generation: arguments in, completions, events, scores and a strength out."""

import math
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Unpack, overload

from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from svd_engine import hub, loading, ops
from svd_engine.calibration import text_check
from svd_engine.calibration.calibrate import calibrate
from svd_engine.calibration.objectives import Answers
from svd_engine.calibration.options import CalibrationKeywords, CalibrationOptions
from svd_engine.calibration.report import CalibrationReport
from svd_engine.data import examples as example_files
from svd_engine.data.tokenization import as_list
from svd_engine.generation import constrained, logits_processors, passages, scoring
from svd_engine.generation.call_lock import CallLock
from svd_engine.generation.completions import complete, events
from svd_engine.generation.grammar import Grammars
from svd_engine.generation.inputs import Inputs, Prompt
from svd_engine.generation.limits import Limits
from svd_engine.generation.options import GenerateOptions, SamplingOptions, ScoreOptions
from svd_engine.generation.outputs import Completion, Event, Score
from svd_engine.generation.prefix_cache import PrefixCache
from svd_engine.generation.request import Request
from svd_engine.generation.sampling_params import SamplingParams
from svd_engine.generation.scheduler import Scheduler
from svd_engine.generation.speculation import Speculations
from svd_engine.generation.stream import Stream
from svd_engine.loading import LoadOptions
from svd_engine.model import cuda_graphs
from svd_engine.model.layers import quantised
from svd_engine.model.models import Models
from svd_engine.model.pair import Decoder, ModelPair, PairedRunner
from svd_engine.steering_config import Steering, SteeringConfig
from svd_engine.utils.arguments import count

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["Completion", "Event", "Score", "SteeredEngine"]
MODELS = ("steered", "adapted", "base")


class SteeredEngine:
    """Decodes a PEFT model, steered by its difference from its own base model.

    model: a PEFT causal language model with one active adapter; it is not changed. The engine
    shares its base weights and copies its adapter, and refuses to decode once either has changed.
    Other pairs come from `from_checkpoints` and `from_model`.
    steering: a strength for both uses, or a `Steering` with one for generation and one for ranking;
    None decodes the adapted model alone. It may be set anew between calls.
    pairing: "paired" runs both models as one batch through shared weights, "sequential" one after
    the other, "auto" pairs them where the PEFT method allows it.
    cuda_graphs: on a GPU, replay decode steps from CUDA graphs.
    limits: of the batch that `submit` decodes in; they may be set before its first call.
    probe: try a few tokens and raise ValueError unless both models give what they give without the
    engine.
    """

    def __init__(
        self,
        model: "PeftModel | Models",
        tokenizer: PreTrainedTokenizerBase | None = None,
        steering: Steering | SteeringConfig | None = None,
        pairing: str = "auto",
        cuda_graphs: bool = True,
        probe: bool = True,
    ) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerBase | None):
            raise ValueError(f"tokenizer must be one of transformers; got {tokenizer!r}.")
        self._models = models = model if isinstance(model, Models) else Models.of_peft(model)
        self._adapter_name = models.adapted.name
        self.model, self.tokenizer = models.model, tokenizer
        adapted, base = models.adapted, models.base
        self.inputs = Inputs(adapted.base_model, tokenizer, adapted.virtual_tokens, base.base_model)
        self._pair = models.pair(pairing)
        quantised.check_steps(models.model, self._pair.most_new(1) > 1, self._pair.how)
        if probe:
            models.probe(self._pair)
        self._single: dict[str, ModelPair] = {}
        self._decoders: dict[ModelPair, Decoder] = {}
        self._speculations = Speculations(self.inputs)
        self._prefix_cache = PrefixCache()
        self._grammars = Grammars(tokenizer, self.inputs.vocab_size)
        self._cuda_graphs = cuda_graphs
        self._lock = CallLock()
        self.limits = Limits()
        self._scheduler: Scheduler | None = None
        self._starting = threading.Lock()
        self._steering = Steering()
        self.steering = steering

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path | None = None,
        adapter: str | Path | None = None,
        *,
        steering: Steering | SteeringConfig | None = None,
        pairing: str = "auto",
        cuda_graphs: bool = True,
        probe: bool = True,
        **options: Unpack[LoadOptions],
    ) -> "SteeredEngine":
        """Load a base model, a PEFT adapter and, unless given, the steering beside the adapter.

        `from_pretrained(adapter)`, or `(base, adapter)` for another base than the adapter names.
        Each is a folder or a Hub name, a base also "smollm2". Without steering the engine decodes
        the adapted model alone until `steering` is set. A tokenizer or chat template beside the
        adapter is used where its vocabulary fits the base; the log says so. options: dtype, device,
        trust_remote_code and weights, as `loading.load_base` takes them. Raises ValueError.
        """
        given = [name for name in (base, adapter) if name is not None]
        if not given:
            raise ValueError("give the folder or the Hub name of an adapter.")
        folder = hub.adapter_folder(given[-1])
        base = loading.base_of(folder, given[0] if len(given) > 1 else None)
        if steering is None and loading.has_steering(folder):
            steering = Steering.from_pretrained(folder)
        loading.check_no_saved_modules(options.get("weights"), folder)
        model, tokenizer = loading.load_base(base, **options)
        peft_model = loading.load_adapter(model, folder)
        tokenizer = loading.adapter_tokenizer(folder, model, tokenizer)
        engine = cls(peft_model, tokenizer, steering, pairing, cuda_graphs, probe)
        engine._adapter_name = str(given[-1])
        return engine

    def __repr__(self) -> str:
        pairing = "paired" if isinstance(self._pair, PairedRunner) else "sequential"
        return (
            f"SteeredEngine({self._models.describe(self._adapter_name)}, pairing={pairing!r}, "
            f"step={self.step!r}, steering={self.steering.describe()})"
        )

    @classmethod
    def from_checkpoints(
        cls,
        adapted: str | Path | PreTrainedModel,
        base: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        steering: Steering | SteeringConfig | None = None,
        cuda_graphs: bool = True,
        probe: bool = True,
        **options: Unpack[LoadOptions],
    ) -> "SteeredEngine":
        """Pair two models over one vocabulary, such as a full fine-tune and what it began from.

        adapted, base: models, or folders, Hub names or "smollm2", which are loaded. tokenizer: by
        default the adapted checkpoint's. Steering comes from beside it, unless given. Each token
        takes a pass of each model. Raises ValueError, for two vocabularies too.
        """
        adapted_model, own = loading.loaded("adapted", adapted, **options)
        base_model, other = loading.loaded("base", base, **options)
        if own is not None and other is not None:
            loading.check_one_vocabulary(own, other, adapted_model)
        if steering is None and isinstance(adapted, str | Path) and loading.has_steering(adapted):
            steering = Steering.from_pretrained(adapted)
        models = Models.of_two(adapted_model, base_model)
        return cls(models, tokenizer or own, steering, "auto", cuda_graphs, probe)

    @classmethod
    def from_model(
        cls,
        model: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        steering: Steering | SteeringConfig | None = None,
        cuda_graphs: bool = True,
        probe: bool = True,
        **options: Unpack[LoadOptions],
    ) -> "SteeredEngine":
        """Steer one model by the difference between two prompts, which `generate` takes.

        model: a model, or a folder, Hub name or "smollm2", which is loaded. Both prompts are read
        as one batch, through each weight once. With `direction="difference"` and `alpha=0` in the
        steering this is classifier-free guidance, of scale 1 - strength. Raises ValueError.
        """
        loaded, own = loading.loaded("model", model, **options)
        return cls(Models.of_one(loaded), tokenizer or own, steering, "auto", cuda_graphs, probe)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a SteeredEngine cannot be pickled or copied: in another process, make one there with "
            "SteeredEngine.from_pretrained; in this one, share it, since one call runs at a time."
        )

    @property
    def steering(self) -> Steering:
        """The steering of each use: `generate` and `stream` take one, `score` the other."""
        return self._steering

    @steering.setter
    def steering(self, value: Steering | SteeringConfig | None) -> None:
        steering = Steering.of(value)
        steering.check_vocabulary(self.inputs.vocab_size)
        self._steering = steering

    @property
    def step(self) -> str:
        """How a decode step runs: "one native call", or "module by module" and why."""
        return self._pair.how

    @property
    def prefix_cache(self) -> PrefixCache:
        """The latest texts that were decoded; prompts that begin like one go on from it.

        It says hits, tokens and bytes, and takes `max_bytes`; 0 turns it off.
        """
        return self._prefix_cache

    @property
    def pair(self) -> ModelPair:
        """The adapted and the base model. Raise ValueError if one has changed."""
        self._models.check()
        return self._pair

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        *,
        progress: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> list[Completion]:
        """Complete prompts or chats: one `Completion` per prompt and sequence, in order.

        prompts: text or token ids, one or a ragged batch; or messages=, a conversation or several.
        contrast=: what the base reads in the place of the prompts, in the same form, one for all or
        one per prompt; an engine of `from_model` needs it to steer.
        model="steered", "adapted" or "base": the last two decode that model only.
        steering=: instead of the engine's. generation_config=, and the fields of `SamplingParams`
        and do_sample, which win over it: max_new_tokens, temperature (0, greedy), top_k, top_p,
        min_p, seed, num_beams, stop_strings, ... logits_processor=: applied to the steered logits.
        batch_size=: rows decoded at once (32). A prompt gets the same tokens alone or in a batch.
        speculate="prompt", "adapted", an assistant model, the most guesses per step, or several:
        verify several guessed tokens in one step; the tokens stay the same.
        Raises ValueError before any work. One call runs at a time; other threads wait.
        """
        request = self._request(prompts, False, **options)
        with self._lock.hold():
            return complete(request, progress)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generator[Event, None, None]:
        """Yield the tokens of `generate` as they come, with the same options except num_beams.

        Other calls wait until the stream is exhausted, closed or garbage-collected.
        """
        return self._lock.stream(self._events(prompts, options))

    def astream(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerator[Event, None]:
        """`stream` for coroutines: decode in a thread, and stop when the reader is cancelled."""
        return self._lock.astream(self._events(prompts, options))

    def submit(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Stream:
        """Decode beside what was submitted before; return at once, with a stream of the events.

        The options are those of `stream`; each completion equals the one of the same call alone.
        From any thread or coroutine. Raises ValueError before any work, and BusyError where too
        many prompts wait.
        """
        stream = self.scheduler.submit(self._stream_request(prompts, options))
        stream.engine = self
        return stream

    @property
    def scheduler(self) -> Scheduler:
        """What decodes the requests of `submit`, started by the first of them."""
        with self._starting:
            if self._scheduler is None:
                how = self._lock, self.limits, self.inputs.virtual_tokens, self._prefix_cache
                self._scheduler = Scheduler(self.pair, self._decoder(self._pair), *how)
                weakref.finalize(self, self._scheduler.close)
            return self._scheduler

    def close(self, finish: bool = False) -> None:
        """End the requests of `submit`, or finish them first; it takes no more."""
        self.scheduler.close(finish)

    def warmup(self, batch_sizes: Sequence[int] = (1,), max_length: int = 1024) -> None:
        """Compile and record, ahead of the first request, what steered or adapted decoding needs.

        batch_sizes: rows of the requests to come; max_length: their tokens, prompt and completion.
        """
        _, pair, _ = self._decoded("generation", None)
        sizes = [count("batch_sizes", n, 1) for n in as_list(batch_sizes, "batch_sizes")]
        count("max_length", max_length, 1)
        with self._lock.hold():
            ops.warmup(self.inputs.vocab_size, (self.model.dtype,), pair.device)
            decoder = self._decoder(pair)
            for rows in sizes:
                cuda_graphs.warmup(decoder, rows, max_length)

    @overload
    def score(
        self, prompts: Any = None, continuations: Any = None, *,
        details: Literal[False] = False, **options: Unpack[ScoreOptions],
    ) -> list[float]: ...  # fmt: skip
    @overload
    def score(
        self, prompts: Any = None, continuations: Any = None, *,
        details: Literal[True], **options: Unpack[ScoreOptions],
    ) -> list[Score]: ...  # fmt: skip
    def score(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        continuations: Prompt | Sequence[Prompt] | None = None,
        *,
        messages: Any = None,
        penalty: float = 0.0,
        model: str | None = None,
        steering: Steering | SteeringConfig | None = None,
        top_logprobs: int = 0,
        details: bool = False,
    ) -> list[float] | list[Score]:
        """log P of continuations, in nats, with the strength for ranking.

        prompts: one, with one continuation or several; or a list, with one continuation for each.
        messages=: a conversation or several, in their place. Without continuations, the prompts
        themselves are scored after their first token. penalty 0 leaves tokens off the support as
        they are, so that an answer is not ranked by how many of its tokens fall outside. steering:
        instead of the engine's. details: return `Score`s: token ids, their log-probabilities, the
        `top_logprobs` best tokens in the place of each, and whether greedy decoding would write
        them. Raises ValueError before any work.
        """
        found = passages.collect(self.inputs, prompts, continuations, messages)
        name, pair, config = self._decoded("ranking", model, steering)
        if name == "steered":
            self._refuse_one("score")
        replace(config, penalty=penalty)  # checks it
        self.inputs.check_top_logprobs(top_logprobs)
        if top_logprobs and not details:
            raise ValueError("top_logprobs needs details=True.")
        with self._lock.hold():
            if details:
                return scoring.detailed(pair, found, config, penalty, top_logprobs)
            return scoring.score(pair, found, config, penalty)

    def calibrate(
        self,
        examples: Sequence[Mapping[str, Any]],
        *,
        force: bool = False,
        progress: bool = False,
        **options: Unpack[CalibrationKeywords],
    ) -> CalibrationReport:
        """Fit the strength of one use to examples and steer with it; the other use's stays.

        examples: mappings with `prompt` and `completion`, and `rejected` to fit right against wrong
        answers, each text or token ids. options: use, objective, estimator, hessian, alpha (one or
        several), length_normalised, direction, folds and seed; see `CalibrationOptions`. If the
        verdict is not "use it", the strength is set to 0, unless forced. For generation the report
        holds a few greedy texts at the strength.
        `svd_engine.calibration.save` keeps the result beside the adapter. Raises ValueError.
        """
        self._refuse_one("calibrate")
        answers = Answers(example_files.encode(examples, self.tokenizer, self.inputs.vocab_size))
        places = [example_files.place(example, i) for i, example in enumerate(examples)]
        self.inputs.check_passages(answers.passages, [places[i] for i in answers.example_of()])
        checked = CalibrationOptions.checked(answers.wrong, **options)
        with self._lock.hold():
            report = calibrate(self.pair, answers, checked, progress)
        config = report.to_steering_config(
            force=force,
            data_sha256=example_files.fingerprint(examples),
            vocab_size=self.inputs.vocab_size,
            base_model=str(self._models.base_model.name_or_path),
            base_revision=getattr(self.model.config, "_commit_hash", None),
        )
        self.steering = replace(self.steering, **{report.use: config})
        if report.use == "generation" and report.strength:
            tried = SteeringConfig(report.strength, report.alpha, direction=report.direction)
            prompts = [answers.passages[right[0]].prompt for right in answers.right]
            roomy = [ids for ids in prompts if self.inputs.has_room(len(ids), text_check.TOKENS)]
            if roomy:
                first = roomy[: text_check.PROMPTS]
                report.texts = text_check.check(self.generate, first, tried)
        return report

    def _decoded(
        self, use: str, model: str | None, steering: Steering | SteeringConfig | None = None
    ) -> tuple[str, ModelPair, SteeringConfig]:
        """Return which model is decoded, its runners and its steering (0 for a single model)."""
        if steering is not None and model not in (None, "steered"):
            raise ValueError(f"model={model!r} is decoded un-steered; leave out steering.")
        uses = (self.steering if steering is None else Steering.of(steering)).uses()
        model = model or ("steered" if use in uses else "adapted")
        if not isinstance(model, str) or model not in MODELS:
            raise ValueError(f"model must be one of {', '.join(MODELS)}; got {model!r}.")
        if model == "steered":
            if use not in uses:
                raise ValueError(
                    f"model='steered' needs engine.steering with a strength for {use}; set it or "
                    "calibrate."
                )
            uses[use].check_vocabulary(self.inputs.vocab_size)
            return model, self.pair, uses[use]
        self._models.check()
        if model not in self._single:
            self._single[model] = self._models.single(model)
        return model, self._single[model], SteeringConfig(0.0, alpha=0.0)

    def _refuse_one(self, call: str) -> None:
        if self._models.is_one:
            raise ValueError(
                f"{call} needs two models, since its examples have one prompt each. Use "
                "SteeredEngine(peft_model) or from_checkpoints."
            )

    def _contrast(
        self, contrast: Any, are_messages: bool, count: int, model: str
    ) -> list[list[int]] | None:
        if contrast is not None:
            if model != "steered":
                raise ValueError(f"contrast is for steering; model={model!r} is decoded alone.")
            return self.inputs.contrast(contrast, are_messages, count)
        if model == "steered" and self._models.is_one:
            raise ValueError(
                "contrast is missing: one model is steered by a second prompt. Give contrast=, or "
                "model='adapted' to decode un-steered."
            )
        return None

    def _decoder(self, pair: ModelPair) -> Decoder:
        if not self._cuda_graphs:
            return pair
        if pair not in self._decoders:
            self._decoders[pair] = cuda_graphs.decoder(pair)
        return self._decoders[pair]

    def _events(self, prompts: Any, options: GenerateOptions) -> Generator[Event, None, None]:
        return events(self._stream_request(prompts, options))

    def _stream_request(self, prompts: Any, options: GenerateOptions) -> Request:
        request = self._request(prompts, True, **options)
        if request.sampling.num_beams > 1:
            raise ValueError("beams cannot be streamed; use generate, or leave out num_beams.")
        return request

    def _request(
        self,
        prompts: Any,
        is_streamed: bool,
        /,
        *,
        messages: Any = None,
        contrast: Any = None,
        model: str | None = None,
        steering: Steering | SteeringConfig | None = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        batch_size: int = 32,
        speculate: Any = None,
        prefill_chunk: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Request:
        """Validate all arguments and build the request."""
        sampling = SamplingParams.from_arguments(**options)
        prompt_ids = self.inputs.prompts(prompts, messages)
        name, pair, config = self._decoded("generation", model, steering)
        other_ids = self._contrast(contrast, messages is not None, len(prompt_ids), name)
        sequences = self.inputs.sequences(
            prompt_ids, sampling, is_streamed=is_streamed, contrast=other_ids
        )
        deadline = (
            math.inf if sampling.max_time is None else time.perf_counter() + sampling.max_time
        )
        decoder, grammar = self._decoder(pair), self._grammars.build(sampling.form, sequences)
        return Request(
            decoder=decoder,
            steering=config,
            sampling=sampling,
            sequences=sequences,
            process_logits=logits_processors.build(logits_processor, sampling.repetition_penalty),
            constrain=constrained.build(sampling, sequences, grammar),
            deadline=deadline,
            model=name,
            batch_size=batch_size,
            prefix_cache=self._prefix_cache,
            prefill_chunk=prefill_chunk,
            speculation=self._speculations.build(speculate, sampling, sequences, decoder, pair.how),
        )
