"""A folder that `vllm serve` runs without flags: the base's files, the adapter, one config."""

import json
import os
import shutil
from pathlib import Path

from svd_engine import hub, loading
from svd_engine.integrations.vllm import arguments
from svd_engine.utils.files import check_place, write_text

ADAPTER = "adapter"  # the adapter's folder in the one that is written
NOT_LINKED = "config.json", ".git", ".gitattributes"


def export_folder(folder: str | Path, adapter: str | Path, base: str | Path | None = None) -> Path:
    """Write the folder: links to the base's files, a copy of the adapter's, and `config.json`.

    base: a folder, a Hub name or "smollm2", by default the one that the adapter names. The
    `steering_config.json` in it is read when an engine starts. Raises ValueError; nothing is
    written if the folder exists and is not empty.
    """
    target = Path(folder)
    source = hub.adapter_folder(adapter)
    name = loading.base_of(source, base)
    arguments.check_adapter(source)
    check_place(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder: choose another.")
    if name != loading.SMOLLM2:
        arguments.steered_architecture(arguments.base_config(name))
    if loading.has_steering(source):
        arguments.steering_of({}, source)  # refused here rather than by vLLM
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".writing.{target.name}")
    partial.mkdir()
    try:
        _write(partial, source, name)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial)
        raise
    return target


def _write(folder: Path, adapter: Path, base: str) -> None:
    if base == loading.SMOLLM2:
        model, tokenizer = loading.load_base(base)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        config = arguments.base_config(str(folder))
    else:
        files = _files(base)
        config = arguments.base_config(str(files))
        for path in sorted(files.iterdir()):
            if path.name not in NOT_LINKED and path.is_file():
                os.symlink(path.resolve(), folder / path.name)
    shutil.copytree(adapter, folder / ADAPTER, ignore=shutil.ignore_patterns("checkpoint*", ".*"))
    for path in adapter.glob("tokenizer*"):  # saved beside an adapter, it wins
        link = folder / path.name
        link.unlink(missing_ok=True)
        shutil.copy(path, link)
    config["architectures"] = [arguments.steered_architecture(config)]
    config[arguments.KEY] = {"adapter": ADAPTER}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _files(base: str) -> Path:
    """Return the folder of a base; one on the Hub is fetched."""
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base, ignore_patterns=["*.bin", "*.pth", "*.gguf", "*.onnx"]))
    except Exception as error:  # of any kind: network, rights, names
        raise ValueError(f"base {base!r} cannot be loaded: {error}") from error
