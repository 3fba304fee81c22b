"""A folder that transformers loads and serves, steered: base, adapter and `custom_generate/`."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from svd_engine import hub, loading
from svd_engine.engine import SteeredEngine
from svd_engine.integrations.custom_generate import ADAPTER
from svd_engine.steering_config import Steering
from svd_engine.utils.files import check_place, write_text

OF_BASE = ["config.json", "generation_config.json", "model*.safetensors*", "*.py"]
OF_ADAPTER = ["adapter_config.json", "adapter_model.*", "seen_prompts.json"]
GENERATE = '''"""Steered decoding in the place of `generate`; svd-engine must be installed."""

from svd_engine.integrations.custom_generate import generate

__all__ = ["generate"]
'''
README = """---
tags:
- custom_generate
---

A base model with an adapter and its steering, written by svd-engine.

    transformers serve {name} --trust-remote-code

```python
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
output = model.generate(**inputs, max_new_tokens=32)  # steered; strength= sets another
```
"""


def check(folder: Path) -> None:
    """Raise ValueError unless the folder can be made."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; choose another.")
    check_place(folder)


def export(
    folder: Path,
    base: str,
    adapter: str | Path,
    steering: Steering,
    *,
    copy: bool = False,
    **options: Any,
) -> Path:
    """Write the folder, whole or not at all, once an engine has decoded with what goes into it.

    copy: copy the files of the base instead of linking them. options: those of `load_base`; a base
    without safetensors files, or with a dtype to convert to, is written anew. Raises ValueError.
    """
    check(folder)
    source = hub.adapter_folder(adapter)
    model, tokenizer = loading.load_base(base, **options)
    with writing(folder) as made:
        files = _files(base) if options.get("dtype", "auto") == "auto" else []
        if any(path.suffix == ".safetensors" for path in files):
            for path in files:
                put(path, made / path.name, copy)
        else:
            model.save_pretrained(made)
        peft_model = loading.load_adapter(model, source)
        tokenizer = loading.adapter_tokenizer(source, model, tokenizer)
        SteeredEngine(peft_model, tokenizer, steering)  # refuses what would not be decoded exactly
        tokenizer.save_pretrained(made)
        put_adapter(source, steering, made)
        write_text(made / "custom_generate" / "generate.py", GENERATE)
        write_text(made / "README.md", README.format(name=folder.name))
    return folder


def _files(base: str) -> list[Path]:
    """The files of a base that transformers loads; none of the embedded one, which is GGUF."""
    if base == loading.SMOLLM2:
        return []
    folder = Path(base)
    if not folder.is_dir():
        folder = Path(snapshot_download(base, allow_patterns=OF_BASE, local_files_only=True))
    return matching(folder, OF_BASE)


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """Give a folder to fill, which takes its place when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing.") as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        yield made
        made.rename(folder)  # over an empty folder at most


def put_adapter(source: Path, steering: Steering, folder: Path) -> None:
    """Copy an adapter into an exported folder, and its steering if there is one."""
    for path in matching(source, OF_ADAPTER):
        put(path, folder / ADAPTER / path.name, copy=True)
    if steering.uses():
        steering.save_pretrained(folder / ADAPTER)


def matching(folder: Path, patterns: list[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def put(path: Path, target: Path, copy: bool) -> None:
    target.parent.mkdir(exist_ok=True)
    if copy:
        shutil.copy(path, target)
    else:
        os.symlink(path.resolve(), target)
