"""Steered generation: arguments in, completions, events, scores and a strength out."""

import threading
import weakref
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Unpack

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from svd_engine import loading, ops
from svd_engine.calibration.calibrate import calibrate
from svd_engine.calibration.objectives import Answers
from svd_engine.calibration.options import CalibrationKeywords, CalibrationOptions
from svd_engine.calibration.report import CalibrationReport
from svd_engine.data import examples as example_files
from svd_engine.generation import logits_processors, scoring
from svd_engine.generation.call_lock import CallLock
from svd_engine.generation.completions import complete, events
from svd_engine.generation.inputs import Inputs, Prompt
from svd_engine.generation.limits import Limits
from svd_engine.generation.options import GenerateOptions, SamplingOptions
from svd_engine.generation.outputs import Completion, Event
from svd_engine.generation.request import Request
from svd_engine.generation.sampling_params import SamplingParams
from svd_engine.generation.scheduler import Scheduler
from svd_engine.generation.stream import Stream
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
from svd_engine.steering_config import SteeringConfig

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["Completion", "Event", "SteeredEngine"]
MODELS = ("steered", "adapted", "base")


class SteeredEngine:
    """Decodes a PEFT model, steered by its difference from its own base model.

    model: a PEFT causal language model with one active adapter; it is not changed. The engine
    shares its base weights and copies its adapter, and refuses to decode once either has changed.
    steering: None decodes the adapted model alone; it may be set anew between calls.
    pairing: "paired" runs both models as one batch through shared weights, "sequential" one after
    the other, "auto" pairs them where the PEFT method allows it.
    cuda_graphs: on a GPU, replay decode steps from CUDA graphs.
    limits: of the batch that `submit` decodes in; they may be set before its first call.
    probe: try a few tokens and raise ValueError unless both models give what they give without the
    engine.
    """

    def __init__(
        self,
        model: "PeftModel",
        tokenizer: PreTrainedTokenizerBase | None = None,
        steering: SteeringConfig | None = None,
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
        self.limits = Limits()
        self._scheduler: Scheduler | None = None
        self._starting = threading.Lock()
        self._steering: SteeringConfig | None = None
        self.steering = steering

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        adapter: str | Path,
        *,
        steering: SteeringConfig | None = None,
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
            steering = SteeringConfig.from_pretrained(adapter)
        return cls(peft_model, tokenizer, steering, pairing, cuda_graphs, probe)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a SteeredEngine cannot be pickled or copied: in another process, make one there with "
            "SteeredEngine.from_pretrained; in this one, share it, since one call runs at a time."
        )

    @property
    def steering(self) -> SteeringConfig | None:
        return self._steering

    @steering.setter
    def steering(self, value: SteeringConfig | None) -> None:
        if value is not None:
            value.check_vocabulary(self.inputs.vocab_size)
        self._steering = value

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
        request = self._stream_request(prompts, options)
        stream = self.scheduler.submit(request)
        stream.engine = self
        return stream

    @property
    def scheduler(self) -> Scheduler:
        """What decodes the requests of `submit`, started by the first of them."""
        with self._starting:
            if self._scheduler is None:
                self._scheduler = Scheduler(
                    self.pair, self._lock, self.limits, self.inputs.virtual_tokens
                )
                weakref.finalize(self, self._scheduler.close)
            return self._scheduler

    def close(self, finish: bool = False) -> None:
        """End the requests of `submit`, or finish them first; it takes no more."""
        self.scheduler.close(finish)

    def warmup(self, batch_sizes: Sequence[int] = (1,), max_length: int = 1024) -> None:
        """Compile and record, ahead of the first request, what steered or adapted decoding needs.

        batch_sizes: rows of the requests to come; max_length: their tokens, prompt and completion.
        """
        _, pair, _ = self._decoded(None)
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
        """log P of each continuation of the prompt, in nats, under the distribution decoded.

        penalty 0 leaves tokens off the support as they are, so that an answer is not ranked by how
        many of its tokens fall outside.
        """
        passages = self.inputs.passages(prompt, continuations)
        _, pair, steering = self._decoded(model)
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
        """Fit the strength to examples and steer with it.

        examples: mappings with `prompt` and `completion`, and `rejected` to fit right against wrong
        answers, each text or token ids. options: objective, estimator, hessian, alpha (one or
        several), length_normalised, direction, folds and seed; see `CalibrationOptions`. If the
        interval of the held-out gain does not lie above 0, the strength is set to 0, unless forced.
        `svd_engine.calibration.save` keeps the result beside the adapter. Raises ValueError.
        """
        answers = Answers(example_files.encode(examples, self.tokenizer, self.inputs.vocab_size))
        places = [example_files.place(example, i) for i, example in enumerate(examples)]
        self.inputs.check_passages(answers.passages, [places[i] for i in answers.example_of()])
        checked = CalibrationOptions.checked(answers, **options)
        with self._lock.hold():
            report = calibrate(self.pair, answers, checked, progress)
        self.steering = report.to_steering_config(
            force=force,
            data_sha256=example_files.fingerprint(examples),
            vocab_size=self.inputs.vocab_size,
            base_model=str(self.model.get_base_model().name_or_path),
            base_revision=getattr(self.model.config, "_commit_hash", None),
        )
        return report

    def _decoded(
        self, model: str | None, steering: SteeringConfig | None = None
    ) -> tuple[str, ModelPair, SteeringConfig]:
        """Return which model is decoded, its runners and its steering (0 for a single model)."""
        if steering is not None and model not in (None, "steered"):
            raise ValueError(f"model={model!r} is decoded un-steered; leave out steering.")
        steering = steering or self.steering
        model = model or ("adapted" if steering is None else "steered")
        if model not in MODELS:
            raise ValueError(f"model must be one of {', '.join(MODELS)}; got {model!r}.")
        if model == "steered":
            if steering is None:
                raise ValueError("model='steered' needs engine.steering; set it or calibrate.")
            steering.check_vocabulary(self.inputs.vocab_size)
            return model, self.pair, steering
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
        model: str | None = None,
        steering: SteeringConfig | None = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        batch_size: int = 32,
        **options: Unpack[SamplingOptions],
    ) -> Request:
        """Validate all arguments and build the request."""
        sampling = SamplingParams.from_arguments(**options)
        prompt_ids = self.inputs.prompts(prompts, messages)
        sequences = self.inputs.sequences(prompt_ids, sampling, is_streamed=is_streamed)
        name, pair, steering = self._decoded(model, steering)
        return Request(
            decoder=self._decoder(pair),
            steering=steering,
            sampling=sampling,
            sequences=sequences,
            process_logits=logits_processors.build(sampling.repetition_penalty, logits_processor),
            model=name,
            batch_size=batch_size,
        )
