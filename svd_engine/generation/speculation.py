"""What a call guesses from: its own text, an assistant model, or both."""

from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from transformers import PreTrainedModel

from svd_engine.generation.inputs import Inputs
from svd_engine.generation.pace import Costs
from svd_engine.generation.sampling_params import SamplingParams
from svd_engine.generation.sequence import Sequence
from svd_engine.model.pair import Decoder, ModelPair, SequentialRunner, base_runner
from svd_engine.model.peft_adapter import Adapter
from svd_engine.utils.arguments import count

PROMPT, ADAPTED = "prompt", "adapted"
MOST = 10  # guesses per row and step


@dataclass(frozen=True)
class Speculation:
    """Guesses that a step of both models verifies; the tokens are those without.

    looks_up: guess what followed the latest tokens where they came before. assistant: guess what
    this model would write. ahead: the pair whose adapted model guesses, before its base reads.
    most: guesses per row and step. costs, assisted_costs: of steps with
    guesses of either kind, which outlive a call.
    """

    looks_up: bool
    assistant: ModelPair | None
    ahead: SequentialRunner | None
    most: int
    costs: Costs
    assisted_costs: Costs

    @property
    def all_costs(self) -> tuple[Costs, Costs]:
        return self.costs, self.assisted_costs


def parse(value: Any) -> tuple[bool, bool, PreTrainedModel | None, int]:
    """Read `speculate`: look-up, the adapted model, the assistant, the most guesses.

    It is "prompt", "adapted", a model, the most guesses per step, or a list of these. Raise
    ValueError.
    """
    kinds: set[str] = set()
    assistant, most = None, MOST
    for item in value if isinstance(value, list | tuple) and value else [value]:
        if isinstance(item, str) and item in (PROMPT, ADAPTED):
            kinds.add(item)
        elif isinstance(item, PreTrainedModel) and assistant in (None, item):
            assistant = item
        elif isinstance(item, Integral) and not isinstance(item, bool):
            most = count("the guesses of speculate", int(item), 1)
        else:
            found = item if isinstance(item, str) else type(item).__name__
            raise ValueError(
                'speculate must be "prompt", "adapted", an assistant model, a number of guesses, '
                f"or a list of these; got {found!r}."
            )
    if ADAPTED in kinds and assistant is not None:
        raise ValueError('speculate takes "adapted" or an assistant model, not both.')
    looks_up = PROMPT in kinds or (not kinds and assistant is None)
    return looks_up, ADAPTED in kinds, assistant, most


class Speculations:
    """What outlives an engine's calls: the runner of its latest assistant, and what steps cost."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._model: PreTrainedModel | None = None
        self._assistant: ModelPair | None = None
        self._costs: dict[tuple[Decoder, bool], tuple[Costs, Costs]] = {}

    def build(
        self,
        value: Any,
        sampling: SamplingParams,
        sequences: ListOf[Sequence],
        decoder: Decoder,
        how: str,
    ) -> Speculation | None:
        """Check `speculate` against the rest of a call; None if it is off. Raise ValueError.

        how: how the decoder's steps run.
        """
        if value is None or value is False:
            return None
        looks_up, goes_ahead, model, most = parse(value)
        if sampling.num_beams > 1:
            raise ValueError(
                f"speculate guesses one continuation, and num_beams = {sampling.num_beams} keeps "
                "several. Leave one of them out."
            )
        if decoder.most_new(1) < 2:
            raise ValueError(
                "speculate needs steps in which several tokens have the bits of one, and here "
                f"they run {how}. Leave it out."
            )
        ahead = decoder if isinstance(decoder, SequentialRunner) else None
        if goes_ahead and (ahead is None or len(ahead.runners) < 2):
            raise ValueError(
                'speculate="adapted" lets the adapted model go ahead of its base, which needs a '
                'pass of each on a CPU: pairing="sequential" or two checkpoints, steered. Leave it '
                "out."
            )
        if model is not None and model is not self._model:
            self._assistant, self._model = self._runner(model), model
            self._costs.clear()
        if model is not None:
            room = Inputs(model, None)
            for s in sequences:
                room.check_room(
                    "what the assistant of speculate reads", len(s.prompt_ids), s.max_new_tokens
                )
        costs = self._costs.setdefault((decoder, goes_ahead), (Costs(), Costs()))
        assistant = None if model is None else self._assistant
        return Speculation(looks_up, assistant, ahead if goes_ahead else None, most, *costs)

    def _runner(self, model: PreTrainedModel) -> ModelPair:
        if model.get_output_embeddings() is None:
            raise ValueError(
                "the assistant of speculate must be a causal language model; "
                f"{type(model).__name__} has no head."
            )
        size, own = model.config.get_text_config().vocab_size, self._inputs.vocab_size
        if size != own:
            raise ValueError(
                f"the assistant of speculate must have the engine's vocabulary of {own} tokens; "
                f"it has {size}."
            )
        if model.device != self._inputs.model.device:
            raise ValueError(
                f"the assistant of speculate is on {model.device} and the engine on "
                f"{self._inputs.model.device}; move it with .to()."
            )
        return SequentialRunner(base_runner(Adapter.none(model)))
