"""The warm start: trains an ordinary PEFT adapter briefly."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
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
# method -> learning rate of "auto", which changes the model visibly in about 30 steps
RATES = {"lora": 5e-4, "ia3": 5e-3, "prompt": 1e-2, "p-tuning": 1e-2, "prefix": 1e-2}
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
    learning_rate: float | str = PAPER_RATE,
    max_length: int = 512,
    seed: int = 0,
    checkpoint_every: int = 20,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Train an adapter on completions (and further accepted answers) and write it to `output`.

    The defaults are the paper's (Table 7). method: lora, ia3, prompt, p-tuning or prefix (the
    paper's P-Tuning v2). steps overrides epochs; a step takes batch_size x accumulation answers.
    learning_rate: "auto" takes the method's rate of `RATES`. The base keeps its dtype; the adapter
    is float32. The folder appears only when training is complete; after an interruption the same
    call resumes from the last checkpoint. overwrite replaces an adapter, and nothing else. Raises
    ValueError.
    """
    output = Path(output)
    if method not in RATES:
        raise ValueError(f"method must be one of {', '.join(RATES)}; got {method!r}.")
    rate = RATES[method] if learning_rate == "auto" else learning_rate
    checks.options(
        learning_rate=rate, dropout=dropout, epochs=epochs, lora_alpha=lora_alpha, rank=rank,
        virtual_tokens=virtual_tokens, steps=steps, batch_size=batch_size,
        accumulation=accumulation, checkpoint_every=checkpoint_every, max_length=max_length,
        seed=seed,
    )  # fmt: skip
    checks.output(output, overwrite)
    vocab_size = model.config.get_text_config().vocab_size
    sequences = trainer.labelled(examples, tokenizer, max_length, vocab_size)
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
        curve = json.dumps(dict(settings=settings, losses=losses), indent=1)
        contents = {finished / CURVE_FILE: curve.encode()}
        if plot := plots.training(losses):
            contents[finished / "warm_start.png"] = plot
        write_together(contents)
        partial_folder.publish(finished, output, overwrite)
    return output


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
