"""The warm start: trains an ordinary PEFT adapter briefly."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from svd_engine.data import contamination
from svd_engine.data import examples as example_files
from svd_engine.training import checks, partial_folder, trainer
from svd_engine.utils import plots
from svd_engine.utils.files import write_together

PAPER_RATE = 5e-5
SHORT = 200  # steps
logger = logging.getLogger(__name__)
CURVE_FILE = "warm_start.json"


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    output: str | Path,
    *,
    method: str = "lora",
    rank: int = 8,
    lora_alpha: float = 16,
    dropout: float = 0.1,
    virtual_tokens: int = 20,
    steps: int | None = None,
    epochs: float = 1.0,
    batch_size: int = 16,
    accumulation: int = 1,
    learning_rate: float | str | None = PAPER_RATE,
    max_length: int = 512,
    seed: int = 0,
    checkpoint_every: int = 20,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Train an adapter on completions (and further accepted answers) and write it to `output`.

    The defaults are the paper's (Table 7). method: lora, ia3, prompt, p-tuning or prefix (the
    paper's P-Tuning v2). steps overrides epochs; a step takes batch_size x accumulation answers.
    learning_rate: "auto" takes the method's rate of `checks.RATES`, which suits short runs; None
    does so for at most `SHORT` steps, and takes the paper's for more. The base keeps its dtype; the
    adapter is float32. The folder appears only when training is complete; after an interruption the
    same call resumes from the last checkpoint. overwrite replaces an adapter, and nothing else.
    Raises ValueError, for a loss that is not finite too; one that does not fall is logged.
    """
    output = Path(output)
    checks.loaded(model, tokenizer)
    rate = checks.options(
        method=method, learning_rate=learning_rate, dropout=dropout, epochs=epochs,
        lora_alpha=lora_alpha, rank=rank, virtual_tokens=virtual_tokens, steps=steps,
        batch_size=batch_size, accumulation=accumulation, checkpoint_every=checkpoint_every,
        max_length=max_length, seed=seed,
    )  # fmt: skip
    checks.output(output, overwrite)
    vocab_size = model.config.get_text_config().vocab_size
    sequences = trainer.labelled(examples, tokenizer, max_length, vocab_size)
    if learning_rate is None:
        answers = batch_size * accumulation
        is_short = (steps or math.ceil(epochs * len(sequences) / answers)) <= SHORT
        rate = rate if is_short else PAPER_RATE
    settings = dict(
        method=method, rank=rank, lora_alpha=lora_alpha, dropout=dropout,
        virtual_tokens=virtual_tokens, steps=steps, epochs=epochs, batch_size=batch_size,
        accumulation=accumulation, learning_rate=rate, max_length=max_length, seed=seed,
        base_model=str(model.name_or_path), dtype=str(model.dtype),
        data_sha256=example_files.fingerprint(examples),
    )  # fmt: skip
    torch.manual_seed(seed)
    config = _config(method, rank, lora_alpha, dropout, virtual_tokens)
    with partial_folder.opened(output, overwrite) as partial:
        partial_folder.prepare(partial, settings)
        peft_model = get_peft_model(model, config)
        try:
            losses = trainer.train(
                peft_model,
                sequences,
                partial,
                progress,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                max_steps=steps or -1,
                num_train_epochs=epochs,
                learning_rate=rate,
                save_steps=checkpoint_every,
                seed=seed,
            )
            peft_model.eval()
            finished = partial / "adapter"
            with trainer.saving(finished):
                # Otherwise PEFT would query the Hub to see whether the embedding was resized.
                peft_model.save_pretrained(str(finished), save_embedding_layers=False)
        finally:
            if not config.is_prompt_learning:
                peft_model.unload()  # give the base back without the adapter
        contamination.record(finished, "training", contamination.prompts(examples))
        _remark(losses, rate)
        curve = json.dumps(dict(settings=settings, losses=losses), indent=1)
        contents = {finished / CURVE_FILE: curve.encode()}
        if plot := plots.training(losses):
            contents[finished / "warm_start.png"] = plot
        write_together(contents)
        partial_folder.publish(finished, output, overwrite)
    return output


def _remark(losses: Sequence[tuple[int, float]], rate: float) -> None:
    """Log a loss that did not fall, from the first quarter of the steps to the last."""
    some = len(losses) // 4 or 1
    first, last = (mean(loss for _, loss in part) for part in (losses[:some], losses[-some:]))
    if len(losses) > 1 and not last < first:
        logger.warning(
            "The loss did not fall: %.3f at first, %.3f at last. Give more steps, or another "
            "learning rate than %g.", first, last, rate,
        )  # fmt: skip


def _config(
    method: str, rank: int, lora_alpha: float, dropout: float, virtual_tokens: int
) -> PeftConfig:
    tokens: dict[str, Any] = dict(task_type="CAUSAL_LM", num_virtual_tokens=virtual_tokens)
    if method == "prompt":
        return PromptTuningConfig(**tokens)
    if method == "p-tuning":
        return PromptEncoderConfig(**tokens, encoder_hidden_size=128)
    if method == "prefix":
        return PrefixTuningConfig(**tokens)
    if method == "ia3":
        return IA3Config(task_type="CAUSAL_LM")
    return LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=lora_alpha,  # type: ignore[arg-type]
        lora_dropout=dropout, target_modules="all-linear",
    )  # fmt: skip
