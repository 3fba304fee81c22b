"""Steered generation: arguments in, completions, events, scores and a strength out."""

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Unpack

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from svd_engine import loading, ops
from svd_engine.calibration import text_check
from svd_engine.calibration.calibrate import calibrate
from svd_engine.calibration.objectives import Answers
from svd_engine.calibration.options import CalibrationKeywords, CalibrationOptions
from svd_engine.calibration.report import CalibrationReport
from svd_engine.data import examples as example_files
from svd_engine.generation import logits_processors, scoring
from svd_engine.generation.call_lock import CallLock
from svd_engine.generation.completions import complete, events
from svd_engine.generation.inputs import Inputs, Prompt
from svd_engine.generation.options import GenerateOptions, SamplingOptions
from svd_engine.generation.outputs import Completion, Event
from svd_engine.generation.request import Request
from svd_engine.generation.sampling_params import SamplingParams
from svd_engine.model import cuda_graphs
from svd_engine.model.pair import (
    Decoder,
    ModelPair,
    SequentialRunner,
    adapted_runner,
    base_runner,
    pair_models,
)
from svd_engine.model.peft_adapter import Adapter
from svd_engine.model.probe import check as check_pair
from svd_engine.steering_config import Steering, SteeringConfig

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["Completion", "Event", "SteeredEngine"]
MODELS = ("steered", "adapted", "base")


class SteeredEngine:
    """Decodes a PEFT model, steered by its difference from its own base model.

    model: a PEFT causal language model with one active adapter; it is not changed. The engine
    shares its base weights and copies its adapter, and refuses to decode once either has changed.
    steering: a strength for both uses, or a `Steering` with one for generation and one for ranking;
    None decodes the adapted model alone. It may be set anew between calls.
    pairing: "paired" runs both models as one batch through shared weights, "sequential" one after
    the other, "auto" pairs them where the PEFT method allows it.
    cuda_graphs: on a GPU, replay decode steps from CUDA graphs.
    probe: try a few tokens and raise ValueError unless both models give what they give without the
    engine.
    """

    def __init__(
        self,
        model: "PeftModel",
        tokenizer: PreTrainedTokenizerBase | None = None,
        steering: Steering | SteeringConfig | None = None,
        pairing: str = "auto",
        cuda_graphs: bool = True,
        probe: bool = True,
    ) -> None:
        self._adapter = adapter = Adapter.read(model)
        self.model, self.tokenizer = model, tokenizer
        self.inputs = Inputs(adapter.base_model, tokenizer, adapter.virtual_tokens)
        self._pair = pair_models(adapter, pairing)
        if probe:
            check_pair(self._pair, adapter, model)
        self._single: dict[str, ModelPair] = {}
        self._decoders: dict[ModelPair, Decoder] = {}
        self._cuda_graphs = cuda_graphs
        self._lock = CallLock()
        self._steering = Steering()
        self.steering = steering

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        adapter: str | Path,
        *,
        steering: Steering | SteeringConfig | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
        pairing: str = "auto",
        cuda_graphs: bool = True,
        probe: bool = True,
        trust_remote_code: bool = False,
    ) -> "SteeredEngine":
        """Load a base model, a PEFT adapter and, unless given, the steering beside the adapter.

        base: a folder, a Hub name or "smollm2". Without steering the engine decodes the adapted
        model alone until `steering` is set. A tokenizer or chat template beside the adapter is used
        where its vocabulary fits the base; the log says so. trust_remote_code: run Python code that
        comes with the base.
        """
        model, tokenizer = loading.load_base(
            base, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
        peft_model = loading.load_adapter(model, adapter)
        tokenizer = loading.adapter_tokenizer(adapter, model, tokenizer)
        if steering is None and loading.has_steering(adapter):
            steering = Steering.from_pretrained(adapter)
        return cls(peft_model, tokenizer, steering, pairing, cuda_graphs, probe)

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
    def pair(self) -> ModelPair:
        """The adapted and the base model. Raise ValueError if the PEFT model has changed."""
        self._adapter.state.check()
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
        model="steered", "adapted" or "base": the last two decode that model only.
        steering=: instead of the engine's. generation_config=, and the fields of `SamplingParams`
        and do_sample, which win over it: max_new_tokens, temperature (0, greedy), top_k, top_p,
        min_p, seed, num_beams, stop_strings, ... logits_processor=: applied to the steered logits.
        batch_size=: rows decoded at once (32). A prompt gets the same tokens alone or in a batch.
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

    def warmup(self, batch_sizes: Sequence[int] = (1,), max_length: int = 1024) -> None:
        """Compile and record, ahead of the first request, what steered or adapted decoding needs.

        batch_sizes: rows of the requests to come; max_length: their tokens, prompt and completion.
        """
        _, pair, _ = self._decoded("generation", None)
        with self._lock.hold():
            ops.warmup(self.inputs.vocab_size, (self.model.dtype,), pair.device)
            decoder = self._decoder(pair)
            for rows in batch_sizes:
                if isinstance(decoder, cuda_graphs.GraphedRunner):
                    decoder.warmup(rows, max_length)
                else:
                    decoder.prefill([[0]] * rows, 1)
                    decoder.step(torch.zeros(rows, dtype=torch.int64, device=decoder.device))

    def score(
        self,
        prompt: Prompt,
        continuations: Sequence[Prompt],
        *,
        penalty: float = 0.0,
        model: str | None = None,
    ) -> list[float]:
        """log P of each continuation of the prompt, in nats, with the strength for ranking.

        penalty 0 leaves tokens off the support as they are, so that an answer is not ranked by how
        many of its tokens fall outside.
        """
        passages = self.inputs.passages(prompt, continuations)
        _, pair, steering = self._decoded("ranking", model)
        with self._lock.hold():
            return scoring.score(pair, passages, steering, penalty)

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
        answers = Answers(example_files.encode(examples, self.tokenizer, self.inputs.vocab_size))
        places = [example_files.place(example, i) for i, example in enumerate(examples)]
        self.inputs.check_passages(answers.passages, [places[i] for i in answers.example_of()])
        checked = CalibrationOptions.checked(answers, **options)
        with self._lock.hold():
            report = calibrate(self.pair, answers, checked, progress)
        config = report.to_steering_config(
            force=force,
            data_sha256=example_files.fingerprint(examples),
            vocab_size=self.inputs.vocab_size,
            base_model=str(self.model.get_base_model().name_or_path),
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
        if model not in MODELS:
            raise ValueError(f"model must be one of {', '.join(MODELS)}; got {model!r}.")
        if model == "steered":
            if use not in uses:
                raise ValueError(
                    f"model='steered' needs engine.steering with a strength for {use}; set it or "
                    "calibrate."
                )
            uses[use].check_vocabulary(self.inputs.vocab_size)
            return model, self.pair, uses[use]
        self._adapter.state.check()
        if model not in self._single:
            runner = adapted_runner if model == "adapted" else base_runner
            self._single[model] = SequentialRunner(runner(self._adapter))
        return model, self._single[model], SteeringConfig(0.0, alpha=0.0)

    def _decoder(self, pair: ModelPair) -> Decoder:
        if not self._cuda_graphs:
            return pair
        if pair not in self._decoders:
            self._decoders[pair] = cuda_graphs.decoder(pair)
        return self._decoders[pair]

    def _events(self, prompts: Any, options: GenerateOptions) -> Generator[Event, None, None]:
        request = self._request(prompts, True, **options)
        if request.sampling.num_beams > 1:
            raise ValueError("beams cannot be streamed; use generate, or leave out num_beams.")
        return events(request)

    def _request(
        self,
        prompts: Any,
        is_streamed: bool,
        /,
        *,
        messages: Any = None,
        model: str | None = None,
        steering: Steering | SteeringConfig | None = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        batch_size: int = 32,
        **options: Unpack[SamplingOptions],
    ) -> Request:
        """Validate all arguments and build the request."""
        sampling = SamplingParams.from_arguments(**options)
        prompt_ids = self.inputs.prompts(prompts, messages)
        sequences = self.inputs.sequences(prompt_ids, sampling, is_streamed=is_streamed)
        name, pair, config = self._decoded("generation", model, steering)
        return Request(
            decoder=self._decoder(pair),
            steering=config,
            sampling=sampling,
            sequences=sequences,
            process_logits=logits_processors.build(sampling.repetition_penalty, logits_processor),
            model=name,
            batch_size=batch_size,
        )
