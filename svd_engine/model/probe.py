"""A trial of a new pair: a few tokens through it must give what the plain models compute.

Layers that differ in nothing but their weights are tried once, which takes a fraction of the time
and leaves less rounding. Where a model does not run without the others, the whole is tried.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from svd_engine.model import masks
from svd_engine.model.layers.linear import PLAIN
from svd_engine.model.module_tree import plain_trees
from svd_engine.model.pair import (
    ModelPair,
    PairedRunner,
    SequentialRunner,
    adapted_runner,
    base_runner,
)
from svd_engine.model.peft_adapter import Adapter

LENGTHS = (7, 2)  # of the prompts, both beginnings of one text; a step follows
ROUNDINGS = 4  # of a layer, which those of a model may add up to
TRIALS = 3  # of other texts: rounding may send a token to another expert


@torch.inference_mode()
def check(pair: ModelPair, adapter: Adapter, model: nn.Module) -> None:
    """Compare both halves of a pair with the plain models, forward without a cache.

    model: what the adapter was read from: a PEFT model, or one that PEFT put layers into.
    The pair reads two prompts of different length and takes a step. Raise ValueError if it fails or
    its logits differ by more than rounding explains. Windows and position rules that begin beyond
    the trial are not seen, except windows that stand in masks.
    """
    name, dtype = type(adapter.base_model).__name__, adapter.base_model.dtype
    eps = torch.finfo(dtype).eps
    try:
        quantised = ROUNDINGS * _rounding_of_quantised(adapter)
        try:
            allowed = max(1e-3, 8 * eps, quantised)
            size, where = _trial(*_short_trial(pair, adapter, model), allowed)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a model may refer to layers that are left out
            allowed = max(2e-3, 32 * eps, quantised)
            size, where = _trial(pair, adapter, plain_trees(model, adapter, {}), allowed)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        told = (str(error).strip() or "no message").splitlines()[0]
        known = isinstance(error, ValueError | AttributeError)
        kind = "" if known else f"{type(error).__name__}: "
        raise ValueError(f"{name} cannot be decoded: {kind}{told}") from error
    if size > allowed:
        what = str(dtype).removeprefix("torch.") if allowed > quantised else "quantised layers"
        raise ValueError(
            f"{name} cannot be decoded: in a trial the logits of {where} differ from the model's "
            f"own by {size:.2g} of their spread; rounding in {what} explains {allowed:.2g}. "
            "probe=False decodes it all the same."
        )


def _rounding_of_quantised(adapter: Adapter) -> float:
    """Return how far quantised layers are from linear: some round what they read to 8 bits."""
    layers = {
        (type(module), type(module.weight)): module
        for module in adapter.base_model.modules()
        if isinstance(module, nn.Linear) and type(module.weight) not in PLAIN
    }
    worst = 0.0
    for layer in layers.values():
        generator = torch.Generator().manual_seed(0)
        a, b = torch.randn(2, 1, layer.in_features, generator=generator).to(
            adapter.base_model.device, adapter.base_model.dtype
        )
        first, second, both, none = (layer(x).float() for x in (a, b, a + b, 0 * a))
        error = (first + second - both - none).norm() / (both - none).norm()
        worst = max(worst, float(error))
    return worst


def _short_trial(
    pair: ModelPair, adapter: Adapter, model: nn.Module
) -> tuple[ModelPair, Adapter, tuple[nn.Module, nn.Module]]:
    short = adapter.short
    plain = plain_trees(model, short, {adapter.base_model: short.base_model})
    if isinstance(pair, PairedRunner):
        return PairedRunner(short), short, plain
    runners = adapted_runner(short, native=False), base_runner(short, native=False)
    return SequentialRunner(*runners), short, plain


def _trial(
    pair: ModelPair, adapter: Adapter, plain: tuple[nn.Module, nn.Module], allowed: float
) -> tuple[float, str]:
    """Return the largest error and its place, of the first text whose errors are allowed."""
    masks.check(adapter)
    for seed in range(TRIALS):
        worst = max(_errors(pair, adapter, plain, seed))
        if worst[0] <= allowed:
            break
    return worst


def _errors(
    pair: ModelPair, adapter: Adapter, plain: tuple[nn.Module, nn.Module], seed: int
) -> Iterator[tuple[float, str]]:
    """Yield how far the pair is from each model, as a share of the spread of the logits."""
    text = _text(adapter, seed)
    lengths = torch.tensor(LENGTHS)
    prompts = [text[:length].tolist() for length in LENGTHS]
    first = pair.logits(pair.prefill(prompts, max_new_tokens=1))
    second = pair.step(text[lengths])
    for half, tree, *got in zip(("adapted", "base"), plain, first, second, strict=True):
        whole = tree(input_ids=text[None], use_cache=False).logits[0]
        whole = whole[-len(text) :].float()  # after those of virtual tokens
        places = (lengths - 1, lengths)
        for stage, logits, index in zip(("prompt", "step"), got, places, strict=True):
            want = whole[index]
            spread = (want - want.mean(-1, keepdim=True)).norm(dim=-1)
            size = ((logits.float() - want).norm(dim=-1) / spread).max()
            yield float(size.nan_to_num(torch.inf)), f"the {half} model after a {stage}"


def _text(adapter: Adapter, seed: int) -> Tensor:
    """Draw a text of ordinary tokens."""
    config = adapter.base_model.config.get_text_config()
    special = {value for key, value in config.to_dict().items() if key.endswith("token_id")}
    ordinary = [token for token in range(min(config.vocab_size, 1000)) if token not in special]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(ordinary), (max(LENGTHS) + 1,), generator=generator)
    return torch.tensor(ordinary)[drawn].to(adapter.base_model.device)
