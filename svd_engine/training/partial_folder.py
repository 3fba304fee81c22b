"""The folder `.<output>.partial` of an unfinished warm start, used by one run at a time."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from svd_engine.training import checks, trainer
from svd_engine.utils.files import naming, write_text

LOCK_FILE, RECIPE_FILE, REPLACED = "lock", "settings.json", "replaced"
logger = logging.getLogger(__name__)


@contextmanager
def opened(output: Path, overwrite: bool) -> Iterator[Path]:
    """Lock the folder for this run; delete it afterwards unless it has a checkpoint to go on from.

    Raises ValueError if another run has it, or if `output` cannot be written.
    """
    partial = output.with_name(f".{output.name}.partial")
    with naming(partial):
        partial.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(partial / LOCK_FILE, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"output {output}: another run is writing it ({partial}).") from error
    with lock:
        try:
            _restore(partial / REPLACED, output)
            shutil.rmtree(partial / REPLACED, ignore_errors=True)  # its successor is there
            checks.output(output, overwrite)  # another run may have finished meanwhile
            yield partial
        except BaseException:
            kept = trainer.newest_checkpoint(partial)
            if kept is not None:
                step = kept.name.partition("-")[2]
                logger.warning("Stopped. The same call goes on after step %s (%s).", step, partial)
                raise
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(partial)


def prepare(partial: Path, settings: dict[str, Any]) -> None:
    """Keep what an interrupted run with the same settings left in the folder; delete the rest."""
    recipe, wanted = partial / RECIPE_FILE, json.dumps(settings, sort_keys=True)
    if recipe.is_file() and recipe.read_bytes() == wanted.encode():
        if checkpoint := trainer.newest_checkpoint(partial):
            logger.warning("Going on after step %s.", checkpoint.name.partition("-")[2])
        return
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()
    write_text(recipe, wanted)


def publish(finished: Path, output: Path, overwrite: bool) -> None:
    """Rename the finished adapter to `output`; an adapter there is kept until then.

    Raises ValueError if `output` appeared meanwhile and is not to be overwritten.
    """
    replaced = finished.with_name(REPLACED)
    try:
        checks.output(output, overwrite)
        if output.exists():
            os.rename(output, replaced)
        os.rename(finished, output)  # fails if a file or a folder with content is there
    except (OSError, ValueError) as error:
        _restore(replaced, output)
        raise ValueError(f"{error} The new adapter is kept in {finished}.") from error


def _restore(replaced: Path, output: Path) -> None:
    """Put an adapter back that was moved away when its replacement was interrupted."""
    if replaced.exists() and not output.exists():
        os.rename(replaced, output)
