"""The model "svd-engine" of lm-evaluation-harness: steered, adapted or base.

Without the package, the import raises ImportError: pip install "svd-engine[eval]".
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm.auto import tqdm

from svd_engine import ops
from svd_engine.data.tokenization import encode_prompt, located, render_chat
from svd_engine.engine import MODELS, SteeredEngine
from svd_engine.generation import scoring
from svd_engine.generation.distribution import Distribution, steered, unsteered
from svd_engine.model.pair import PerModel
from svd_engine.steering_config import Steering, SteeringConfig

logger = logging.getLogger(__name__)
KEPT_EVERY = 256  # requests between two writes to the harness's cache
CONTEXT = 2048  # of a model that does not say


@register_model("svd-engine")
class SVDEngineLM(TemplateLM):
    """An engine as the harness asks it.

    engine: one that exists; or else adapter and base, with strength and alpha instead of those of
    the steering beside the adapter. Log-likelihoods take the strength for ranking, texts that for
    generation. model: "steered" (the default), "adapted" or "base".
    batch_size: rows generated at once, 32 for "auto"; answers are scored in batches of equal
    memory. max_length: tokens of context and continuation, by default the model's own limit.
    """

    def __init__(
        self,
        adapter: str | Path | None = None,
        base: str | Path | None = None,
        *,
        engine: SteeredEngine | None = None,
        model: str = "steered",
        strength: float | None = None,
        alpha: float | None = None,
        dtype: str = "auto",
        device: str | None = None,
        pairing: str = "auto",
        trust_remote_code: bool = False,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
    ) -> None:
        super().__init__()
        if model not in MODELS:
            raise ValueError(f"model must be one of {', '.join(MODELS)}; got {model!r}.")
        self.batch_size = _rows(batch_size, max_batch_size)
        if (adapter is None) == (engine is None):
            raise ValueError("give adapter=, a folder or Hub name, or in Python engine=.")
        self.adapter = None if adapter is None else str(adapter)
        self.engine = engine or SteeredEngine.from_pretrained(
            base, adapter, dtype=dtype, device=_device(device), pairing=pairing,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        if self.engine.tokenizer is None:
            raise ValueError("the harness asks in text; give the engine a tokenizer.")
        self.tokenizer = self.engine.tokenizer
        self.model = model
        self.steering = self._steering(strength, alpha)
        self.max_length, self.max_gen_toks = self._max_length(max_length), max_gen_toks

    def _steering(self, strength: float | None, alpha: float | None) -> Steering | None:
        if self.model != "steered":
            if strength is not None or alpha is not None:
                raise ValueError(f"model={self.model!r} is not steered; leave out strength, alpha.")
            return None
        own = self.engine.steering
        if not own.uses() and strength is None:
            raise ValueError(
                "the adapter has no steering_config.json: run svd-engine calibrate, or give "
                "strength= or model=adapted."
            )
        given = {"strength": strength, "alpha": alpha}
        given = {k: v for k, v in given.items() if v is not None}

        def of_use(config: SteeringConfig | None) -> SteeringConfig | None:
            if config is None and strength is None:
                return None
            return replace(config or SteeringConfig(0.0), **given)  # type: ignore[arg-type]

        return Steering(of_use(own.generation), of_use(own.ranking))

    def _max_length(self, wanted: int | None) -> int:
        config = self.engine.inputs.model.config.get_text_config()
        most = (
            getattr(config, "max_position_embeddings", CONTEXT) - self.engine.inputs.virtual_tokens
        )
        if wanted is not None and not (isinstance(wanted, int) and 2 <= wanted <= most):
            raise ValueError(f"max_length must be an integer from 2 to {most}; got {wanted!r}.")
        return wanted or most

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    @property
    def device(self) -> torch.device:
        return self.engine.pair.device

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return render_chat(chat_history, self.tokenizer, continued=not add_generation_prompt)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness records beside its results."""
        info = {
            "base": str(self.engine.inputs.model.name_or_path), "adapter": self.adapter,
            "decoded": self.model, "model_dtype": str(self.engine.inputs.model.dtype),
        }  # fmt: skip
        if self.steering is not None:
            info["steering"] = self.steering.describe()
        return info

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; unless told, a text begins as the tokenizer begins every text, but once."""
        if add_special_tokens is None:
            start = str(self.tokenizer.decode([self.prefix_token_id]))
            add_special_tokens = not string.startswith(start)
        if add_special_tokens:
            return encode_prompt(string, self.tokenizer)
        return self.tokenizer(string, add_special_tokens=False)["input_ids"]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """log P of each continuation, and whether greedy decoding would give it.

        Tokens off the support are scored as they are, else one of them would make a text
        impossible; greedy decoding never takes them.
        """
        passages = [self._passage(*request[1:]) for request in requests]
        found: list[tuple[float, bool]] = []
        with tqdm(total=len(requests), desc="Scoring", disable=disable_tqdm) as bar:
            for start in range(0, len(requests), KEPT_EVERY):
                part = self._scored(passages[start : start + KEPT_EVERY])
                for request, result in zip(requests[start:], part, strict=False):
                    if request[0] is not None:
                        self.cache_hook.add_partial("loglikelihood", request[0], result)
                found += part
                bar.update(len(part))
        return found

    def _passage(self, context: list[int], continuation: list[int]) -> scoring.Passage:
        """Drop the beginning of a context that is too long; the last token is not fed."""
        if not continuation:
            raise ValueError("a continuation has no tokens of its own.")
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens; max_length is {self.max_length}."
            )
        passage = scoring.Passage(context[-room:], continuation)
        self.engine.inputs.check_room(
            "a context", len(passage.prompt), completion=len(continuation) - 1
        )
        return passage

    @torch.inference_mode()
    def _scored(self, passages: Sequence[scoring.Passage]) -> list[tuple[float, bool]]:
        total = torch.zeros(len(passages), dtype=torch.float64)
        is_greedy = torch.ones(len(passages), dtype=torch.bool)
        for logits, target, index in scoring.predictions(self.engine.pair, passages):
            values = scoring.scores(self._distribution(logits, penalty=0.0), target)
            total.index_add_(0, index, values.double().cpu())
            drawn_from = self._distribution(logits)
            chosen = ops.sample(*drawn_from.operands, **drawn_from.mask).token
            is_greedy[index[(chosen != target).cpu()]] = False
        return list(zip(total.tolist(), is_greedy.tolist(), strict=True))

    def _distribution(self, logits: PerModel, penalty: float | None = None) -> Distribution:
        if self.steering is not None:
            if self.steering.ranking is None:
                raise ValueError(
                    "the adapter has no strength for ranking: run svd-engine calibrate --use "
                    "ranking, or give strength= or model=adapted."
                )
            return steered(logits, self.steering.ranking, penalty)
        return unsteered(logits[0 if self.model == "adapted" else -1])

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log P of whole texts, in windows of max_length tokens where they are longer."""
        windows, text = [], []
        for i, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            ):  # fmt: skip
                windows.append((None, *make_disjoint_window(window)))
                text.append(i)
        totals = [0.0] * len(requests)
        for i, (value, _) in zip(
            text, self._loglikelihood_tokens(windows, disable_tqdm), strict=True
        ):
            totals[i] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Complete each context up to a stop string.

        Options that the engine lacks raise ValueError. A draw depends on the request's place: a
        context that comes again gets another one.
        """
        texts = [""] * len(requests)
        for numbers in _alike(requests):
            options = normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks)
            new = options.pop("max_gen_toks")
            if new >= self.max_length:
                raise ValueError(
                    f"max_gen_toks must be below max_length = {self.max_length}; got {new}."
                )
            room = self.max_length - new
            end = self.tokenizer.decode([self.eot_token_id])
            until = [text for text in (*options.pop("until"), end) if text]
            seed = options.pop("seed", 0)
            try:
                completions = self.engine.generate(
                    [self.tok_encode(requests[i].args[0])[-room:] for i in numbers],
                    model=self.model, steering=self.steering, max_new_tokens=new,
                    stop_strings=list(dict.fromkeys(until)), seed=[seed + i for i in numbers],
                    batch_size=self.batch_size, progress=not disable_tqdm, **options,
                )  # fmt: skip
            except TypeError as error:
                raise ValueError(f"gen_kwargs: {error}") from error
            for i, completion in zip(numbers, completions, strict=True):
                texts[i] = completion.text
                self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return texts


def _alike(requests: Sequence[Instance]) -> Iterator[list[int]]:
    """Group requests of the same options."""
    groups: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
    yield from groups.values()


def _device(name: str | None) -> str:
    """The harness asks for cuda:0 unless told otherwise, also where there is none."""
    if name is None or (name.startswith("cuda") and not torch.cuda.is_available()):
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
        if name is not None:
            logger.warning("device %s is not available; %s is used.", name, chosen)
        return chosen
    return name


def _rows(batch_size: int | str, most: int | None) -> int:
    if isinstance(batch_size, str) and batch_size.split(":")[0] == "auto":
        return most or 32
    with located("batch_size"):
        rows = int(batch_size)
        if rows < 1:
            raise ValueError(f"give auto or an integer >= 1; got {batch_size!r}.")
    return rows
