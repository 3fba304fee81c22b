"""The training loop of a warm start: loss on answer tokens only, exact resumption."""

import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from svd_engine.data import examples as example_files
from svd_engine.utils.files import read_object

STATE_FILE = "trainer_state.json"  # the Trainer writes it last
WEIGHTS_FILE = "trained.safetensors"
Labelled = dict[str, list[int]]  # input_ids and labels of one sequence


class AdapterTrainer(Trainer):
    """A Trainer whose checkpoints store the trained parameters themselves.

    PEFT's own files store the output of P-tuning's encoder, not the encoder.
    """

    def _save_checkpoint(self, *arguments: Any, **keywords: Any) -> None:
        with saving(Path(str(self.args.output_dir))):
            super()._save_checkpoint(*arguments, **keywords)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {k: v.detach().contiguous() for k, v in self._trained().items()}, folder / WEIGHTS_FILE
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / WEIGHTS_FILE)
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(saved[name])

    def _trained(self) -> dict[str, torch.Tensor]:
        assert self.model is not None
        return {k: v for k, v in self.model.named_parameters() if v.requires_grad}


def train(
    model: torch.nn.Module,
    sequences: Sequence[Labelled],
    folder: Path,
    progress: bool,
    **arguments: Any,
) -> list[tuple[int, float]]:
    """Train the parameters that require a gradient; return (step, loss) of every step.

    arguments: of `TrainingArguments`. A checkpoint in `folder` is resumed and leads to the same
    weights as an uninterrupted run.
    """
    device = next(model.parameters()).device
    bar = _Progress()
    trainer = AdapterTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="steps",
            save_total_limit=2,
            report_to=[],
            disable_tqdm=True,
            logging_nan_inf_filter=False,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            **arguments,
        ),
        train_dataset=sequences,  # type: ignore[arg-type]
        data_collator=pad,
        callbacks=[_Finite(), *([bar] if progress else [])],
    )
    trainer.remove_callback(PrinterCallback)  # it would print every log as a dictionary
    start = newest_checkpoint(folder)
    state = read_object(start / STATE_FILE, "the state of a trainer") if start else {}
    if start and state["global_step"] >= state["max_steps"]:
        trainer._load_from_checkpoint(str(start))  # the Trainer would take one step more
        history = state["log_history"]
    else:
        with closing(bar):
            trainer.train(resume_from_checkpoint=str(start) if start else None)
        history = trainer.state.log_history
    return [(int(log["step"]), float(log["loss"])) for log in history if "loss" in log]


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint."""
    found = {
        int(path.name.partition("-")[2]): path
        for path in folder.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d{1,9}", path.name)
    }
    for _, path in sorted(found.items(), reverse=True):
        try:
            state = read_object(path / STATE_FILE, "the state of a trainer")
            with safe_open(path / WEIGHTS_FILE, "pt"):
                pass
        except (OSError, ValueError, SafetensorError):
            continue
        if {"global_step", "max_steps", "log_history"} <= set(state):
            return path
    return None


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Turn the errors of torch and safetensors on a full disk into one that names the folder."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise OSError(f"{folder} cannot be written: {reason}") from error


def labelled(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    vocab_size: int | None = None,
) -> list[Labelled]:
    """Return one sequence per answer, labelled on the answer and its end-of-sequence token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = []
    for i, example in enumerate(example_files.encode(examples, tokenizer, vocab_size)):
        for answer in (example.completion, *example.accepted):
            ids = [*example.prompt, *answer, *end]
            if len(ids) > max_length:
                raise ValueError(
                    f"{example_files.place(examples[i], i)} has {len(ids)} tokens; max_length is "
                    f"{max_length}. Shorten it or raise max_length."
                )
            labels = [-100] * len(example.prompt) + [*answer, *end]
            found.append({"input_ids": ids, "labels": labels})
    return found


def pad(sequences: Sequence[Labelled]) -> dict[str, torch.Tensor]:
    """Pad sequences on the right to the longest, and return them with their attention mask."""
    longest = max(len(sequence["input_ids"]) for sequence in sequences)
    lengths = torch.tensor([len(sequence["input_ids"]) for sequence in sequences])

    def fill(key: str, filler: int) -> torch.Tensor:
        rows = [s[key] + [filler] * (longest - len(s[key])) for s in sequences]
        return torch.tensor(rows)

    return {
        "input_ids": fill("input_ids", 0),
        "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
        "labels": fill("labels", -100),
    }


class _Finite(TrainerCallback):
    """Stops a training that cannot come to anything, without a checkpoint to go on from."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = float((logs or {}).get("loss", 0.0))
        if not math.isfinite(loss):
            for checkpoint in Path(args.output_dir).glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
            raise ValueError(
                f"the loss is {loss} at step {state.global_step}: nothing is written. Give a "
                f"learning rate below {args.learning_rate:g}, or dtype float32."
            )


class _Progress(TrainerCallback):
    """A progress bar that shows the loss."""

    def __init__(self) -> None:
        self.bar = tqdm(disable=True)

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="warm start",
            unit="step",
            disable=False,
        )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def close(self) -> None:
        self.bar.close()
