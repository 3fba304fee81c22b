"""Steered generation: a KV-cache loop around the two models and one operator call a token."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from svd_engine import __version__, branches, calibrate, models, teacher
from svd_engine import examples as example_files
from svd_engine import pairing as forms
from svd_engine.branches import Branches
from svd_engine.decode import Sampling, decode
from svd_engine.steering import SteeringConfig

Prompt = str | Sequence[int]
MODELS = ("steered", "adapted", "base")


@dataclass
class Completion:
    """What one prompt became."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # under the distribution decoded
    finish_reason: str = "length"  # or "stop": an end-of-sequence token, kept in token_ids
    text: str = ""  # without special tokens; empty if the engine has no tokenizer


class Event(NamedTuple):
    """One token of one row of a stream."""

    row: int
    token_id: int
    logprob: float
    text: str  # what this token adds; empty while a character is incomplete
    finish_reason: str | None  # on the row's last token


class SteeredEngine:
    """Decodes a PEFT model against its own base, steered; `steering=None` decodes it alone.

    model: a PEFT causal language model with one active adapter; it is left as it was found.
    pairing: "paired" runs both models as one batch through shared weights, "sequential" one after
    the other, "auto" pairs where the method allows it. `steering` may be set anew between calls.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        steering: SteeringConfig | None = None,
        pairing: str = "auto",
    ) -> None:
        if not isinstance(model, PeftModel):
            raise ValueError(f"model must be a PeftModel; got {type(model).__name__}.")
        forms.check_recoverable(model)
        self.model, self.tokenizer = model, tokenizer
        config = model.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self.pair = branches.pair(model, pairing)  # the adapted and the base model
        self._single: dict[str, Branches] = {}
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
    ) -> "SteeredEngine":
        """Load a base model, a PEFT adapter and, unless given, the steering beside the adapter.

        base: a folder, a Hub name or "smollm2". Without steering the engine decodes the adapted
        model alone until `steering` is set.
        """
        model, tokenizer = models.load_base(base, dtype=dtype, device=device)
        peft_model = models.load_adapter(model, adapter)
        if steering is None and models.has_steering(adapter):
            steering = SteeringConfig.from_pretrained(adapter)
        return cls(peft_model, tokenizer, steering, pairing)

    @property
    def steering(self) -> SteeringConfig | None:
        return self._steering

    @steering.setter
    def steering(self, value: SteeringConfig | None) -> None:
        if value is not None:
            value.check_vocabulary(self.vocab_size)
        self._steering = value

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        eos_token_id: int | Sequence[int] | None = None,
        model: str | None = None,
        progress: bool = False,
        **sampling: Any,
    ) -> list[Completion]:
        """Complete one prompt or a ragged batch: one `Completion` a prompt, in order.

        prompts: text or token ids. eos_token_id: ids that end a row, by default the model's own;
        `[]` for none. model: "steered", "adapted" or "base", to decode one model alone.
        sampling: max_new_tokens (128), temperature (0, greedy), top_k (0, off), top_p (1),
        min_p (0) and seed (0). Row i draws its noise from seed + i and its own positions, so a
        request gives the same tokens alone or in a batch. Raises ValueError before any work.
        """
        events = self._events(prompts, Sampling(**sampling), eos_token_id, model, text=False)
        completions = [Completion() for _ in next(events)]
        with tqdm(total=len(completions), disable=not progress, desc="generating") as bar:
            for event in events:
                completion = completions[event.row]
                completion.token_ids.append(event.token_id)
                completion.logprobs.append(event.logprob)
                if event.finish_reason:
                    completion.finish_reason = event.finish_reason
                    bar.update()
        for completion in completions:
            completion.text = self._text(completion.token_ids)
        return completions

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        eos_token_id: int | Sequence[int] | None = None,
        model: str | None = None,
        **sampling: Any,
    ) -> Iterator[Event]:
        """The tokens of `generate` as they come, with the text that each adds."""
        events = self._events(prompts, Sampling(**sampling), eos_token_id, model, text=True)
        next(events)
        return events

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
        start = self._encode([prompt], 0)[0]
        passages = [
            teacher.Passage(start, example_files.ids(c, self.tokenizer, special=False))
            for c in continuations
        ]
        self.check_passages(passages)
        pair, steering = self._decoded(model)
        return teacher.score(pair, passages, steering.strength, steering.alpha, penalty)

    def calibrate(
        self,
        examples: Sequence[Mapping[str, Any]],
        *,
        objective: str | None = None,
        alpha: float = 0.1,
        folds: int = 5,
        seed: int = 0,
        force: bool = False,
        progress: bool = False,
    ) -> calibrate.CalibrationReport:
        """Fit the strength to examples and steer with it; see `calibrate.calibrate`.

        examples: mappings with `prompt` and `completion`, and `rejected` to fit right against wrong
        answers, each text or token ids. Where the held-out gain is not clear of 0 the strength is
        set to 0, unless forced.
        """
        encoded = example_files.encode(examples, self.tokenizer)
        self.check_passages(calibrate.Answers(encoded).passages)
        report = calibrate.calibrate(
            self.pair, encoded, objective=objective, alpha=alpha, folds=folds, seed=seed,
            progress=progress,
        )  # fmt: skip
        self.steering = SteeringConfig(
            strength=report.strength if report.worthwhile or force else 0.0,
            alpha=alpha,
            objective=report.objective,
            interval=report.interval,
            verdict=report.verdict,
            data_sha256=example_files.fingerprint(examples),
            vocab_size=self.vocab_size,
            base_model=str(self.model.get_base_model().name_or_path),
            base_revision=getattr(self.model.config, "_commit_hash", None),
            svd_engine_version=__version__,
        )
        return report

    def check_passages(self, passages: Sequence[teacher.Passage]) -> None:
        """Raise ValueError for an empty prompt or completion, or one beyond the context."""
        for i, (prompt, completion) in enumerate(passages):
            if not prompt or not completion:
                raise ValueError(f"passage {i} has an empty prompt or completion.")
            self._check_length(f"passage {i}", len(prompt) + len(completion), 0)

    def _decoded(self, model: str | None) -> tuple[Branches, SteeringConfig]:
        """The models to run and how to steer; one model alone is steered by nothing."""
        model = model or ("adapted" if self.steering is None else "steered")
        if model not in MODELS:
            raise ValueError(f"model must be one of {', '.join(MODELS)}; got {model!r}.")
        if model == "steered":
            if self.steering is None:
                raise ValueError("model='steered' needs engine.steering; set it or calibrate.")
            return self.pair, self.steering
        if model not in self._single:
            stream = branches.adapted_stream if model == "adapted" else branches.base_stream
            self._single[model] = branches.Sequential(stream(self.model))
        return self._single[model], SteeringConfig(0.0, alpha=0.0)

    def _encode(self, prompts: Any, max_new_tokens: int) -> list[list[int]]:
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        rows = [
            example_files.ids(prompt, self.tokenizer, special=True)
            for prompt in ([prompts] if single else prompts)
        ]
        for i, row in enumerate(rows):
            if not row:
                raise ValueError(f"prompts[{i}] is empty; give at least one token.")
            if min(row) < 0 or max(row) >= self.vocab_size:
                raise ValueError(
                    f"prompts[{i}] has token ids from {min(row)} to {max(row)}; the vocabulary has "
                    f"{self.vocab_size}."
                )
            self._check_length(f"prompts[{i}]", len(row), max_new_tokens)
        return rows

    def _check_length(self, name: str, length: int, new: int) -> None:
        virtual = forms.virtual_tokens(self.model)
        total = virtual + length + new
        if self.context is not None and total > self.context:
            parts = [f"{length} tokens"]
            parts += [f"{virtual} virtual tokens"] if virtual else []
            parts += [f"max_new_tokens = {new}"] if new else []
            raise ValueError(
                f"{name} does not fit: {' and '.join(parts)} make {total}; the model's context is "
                f"{self.context}. Shorten the prompt{' or lower max_new_tokens' if new else ''}."
            )

    def _ends(self, eos_token_id: int | Sequence[int] | None) -> set[int]:
        if eos_token_id is None:
            generation = getattr(self.model.get_base_model(), "generation_config", None)
            eos_token_id = getattr(generation, "eos_token_id", None)
        if eos_token_id is None and self.tokenizer is not None:
            eos_token_id = self.tokenizer.eos_token_id
        if eos_token_id is None:
            return set()
        return {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)

    def _text(self, token_ids: list[int]) -> str:
        if self.tokenizer is None:
            return ""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def _events(
        self, prompts: Any, sampling: Sampling, eos_token_id: Any, model: str | None, text: bool
    ) -> Iterator[Any]:
        """First the encoded prompts, once every argument is found good; then an `Event` a token."""
        rows = self._encode(prompts, sampling.max_new_tokens)
        ends = self._ends(eos_token_id)
        pair, steering = self._decoded(model)
        yield rows
        token_ids: list[list[int]] = [[] for _ in rows]
        shown = ["" for _ in rows]
        for count, step in enumerate(decode(pair, steering, rows, sampling, ends), 1):
            for row, token, logprob in step:
                token_ids[row].append(token)
                reason = "length" if count == sampling.max_new_tokens else None
                reason = "stop" if token in ends else reason
                piece = ""
                if text:
                    so_far = self._text(token_ids[row])
                    # A character may span tokens; until whole it decodes to the replacement mark.
                    if reason or not so_far.endswith("\ufffd"):
                        piece, shown[row] = so_far[len(shown[row]) :], so_far
                yield Event(row, token, logprob, piece, reason)
