"""The warm start: a short PEFT training of an ordinary adapter."""

import os
import shutil
import tempfile
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
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from svd_engine import examples as example_files

VIRTUAL_TOKENS = 20
# method -> (configuration, learning rate)
METHODS: dict[str, tuple[type[PeftConfig], dict[str, Any], float]] = {
    "lora": (
        LoraConfig,
        dict(r=8, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear"),
        5e-4,
    ),
    "ia3": (IA3Config, {}, 5e-3),
    "prompt": (PromptTuningConfig, dict(num_virtual_tokens=VIRTUAL_TOKENS), 1e-2),
    "p-tuning": (
        PromptEncoderConfig,
        dict(num_virtual_tokens=VIRTUAL_TOKENS, encoder_hidden_size=128),
        1e-2,
    ),
    "prefix": (PrefixTuningConfig, dict(num_virtual_tokens=VIRTUAL_TOKENS), 1e-2),
}


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    output: str | Path,
    *,
    method: str = "lora",
    steps: int | None = None,
    epochs: float = 1.0,
    batch_size: int = 16,
    learning_rate: float | None = None,
    max_length: int = 512,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Train an adapter on completions (and further accepted answers) and write it to `output`.

    The base keeps its dtype; the adapter's weights are float32. `steps` wins over `epochs`. The
    folder appears whole at the end or not at all. Raises ValueError for arguments that do not fit.
    """
    output = Path(output)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}.")
    if output.exists() and not overwrite:
        raise ValueError(f"output {output} exists. Choose another folder or overwrite it.")
    for name, value in (("steps", steps), ("epochs", epochs), ("batch_size", batch_size)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be above 0; got {value}.")
    rows = _training_rows(examples, tokenizer, max_length)
    config, arguments, default_rate = METHODS[method]
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, config(task_type="CAUSAL_LM", **arguments))
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        trainer = Trainer(
            model=peft_model,
            args=TrainingArguments(
                output_dir=str(temporary / "trainer"),
                per_device_train_batch_size=batch_size,
                max_steps=steps or -1,
                num_train_epochs=epochs,
                learning_rate=learning_rate or default_rate,
                lr_scheduler_type="constant_with_warmup",
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                seed=seed,
                use_cpu=model.device.type == "cpu",
                dataloader_pin_memory=False,
                remove_unused_columns=False,
            ),
            train_dataset=rows,  # type: ignore[arg-type]
            data_collator=_pad,
            callbacks=[_Progress()] if progress else [],
        )
        _quiet(trainer)
        trainer.train()
        peft_model.eval()
        finished = temporary / "adapter"
        # Asking whether the embedding was resized would go to the network.
        peft_model.save_pretrained(str(finished), save_embedding_layers=False)
        if output.exists():
            os.replace(output, temporary / "replaced")
        os.replace(finished, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not peft_model.active_peft_config.is_prompt_learning:
            peft_model.unload()  # the base is handed back without the adapter
    return output


def _training_rows(
    examples: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[dict[str, list[int]]]:
    """One row an answer: the loss looks at the answer and the end-of-sequence token after it."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = []
    for i, example in enumerate(example_files.encode(examples, tokenizer)):
        for answer in (example.completion, *example.accepted):
            ids = [*example.prompt, *answer, *end]
            if len(ids) > max_length:
                raise ValueError(
                    f"examples[{i}] has {len(ids)} tokens; max_length is {max_length}. "
                    "Shorten it or raise max_length."
                )
            rows.append(
                {"input_ids": ids, "labels": [-100] * len(example.prompt) + [*answer, *end]}
            )
    return rows


def _pad(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[key] + [filler] * (longest - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(r["labels"]) + [0] * (longest - len(r["labels"])) for r in rows])
    return {"input_ids": pad("input_ids", 0), "attention_mask": mask, "labels": pad("labels", -100)}


class _Progress(TrainerCallback):
    """A progress bar with the loss beside it."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, desc="warm start", unit="step")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def _quiet(trainer: Trainer) -> None:
    """Drop the callback that prints every log as a dictionary."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
