"""Whatever PaddleClas raises, as one sentence that says in which part of a config; the traceback goes to the log."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from ppcls.utils import logger

from ..errors import ReparamError, reason_of
from .errors import ConfigError

#: Functions of PaddleClas -> the part of a config that they make something of; the innermost one that failed counts.
_PARTS = {
    "build_dataloader": "DataLoader",
    "build_loss": "Loss",
    "build_metrics": "Metric",
    "build_model": "Arch",
    "build_optimizer": "Optimizer",
    "build_lr_scheduler": "Optimizer.lr",
    "build_postprocess": "Infer.PostProcess",
    "create_operators": "the transforms",
}


@contextlib.contextmanager
def explained(what: str, wrong_config: bool = False) -> Iterator[None]:
    """Raise whatever is raised in the `with` block as a `ReparamError`: what was done, in which part, and why.

    With `wrong_config` it is a `ConfigError`, unless images or their lists are the reason.
    """
    try:
        yield
    except (ReparamError, BrokenPipeError):
        raise
    except (Exception, SystemExit) as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        found = [frame for frame in frames if frame.f_code.co_name in _PARTS]
        part = _PARTS[found[-1].f_code.co_name] if found else ""
        reading = next((f for f in frames if f.f_code.co_name == "build_dataloader"), None)
        wrong_list = reading and _wrong_list(reading)
        if re.search("gloo|TCP (connection|receive|send)", str(error)):
            raise ReparamError(
                f"{what}: another process of this training has ended, or was silent for half a minute; its own output "
                f"says why ({reason_of(error)})"
            ) from error
        reason = wrong_list or f"{what}{part and f', {part}'}: {reason_of(error)}{_log(error)}"
        kind = ConfigError if wrong_config and not wrong_list else ReparamError
        raise kind(reason) from error


def _log(error: BaseException) -> str:
    """Write a traceback to the log file of the run; return where it is, or nothing where there is no such file."""
    handlers = getattr(logger._logger, "handlers", [])
    files = [handler for handler in handlers if isinstance(handler, logging.FileHandler)]
    if not files or not os.path.isfile(files[-1].baseFilename):
        return ""
    record = logging.LogRecord(
        logger._logger.name, logging.ERROR, __file__, 0, "it ended with this error", (),
        (type(error), error, error.__traceback__),
    )  # fmt: skip
    files[-1].handle(record)
    return f" (traceback in {os.path.relpath(files[-1].baseFilename)})"


def _wrong_list(building: FrameType) -> str | None:
    """Return what is wrong with the list of images that a data set was being made from."""
    split = building.f_locals.get("mode")
    dataset = building.f_locals.get("config", {}).get(split, {}).get("dataset")
    if not isinstance(dataset, Mapping) or not isinstance(dataset.get("cls_label_path"), str):
        return None
    try:
        wrong = _wrong_lines(dataset)
    except (OSError, UnicodeDecodeError) as error:
        wrong = f"it cannot be read: {error}"
    return wrong and f"DataLoader.{split}: {dataset['cls_label_path']}: {wrong}"


def _wrong_lines(dataset: Mapping[str, Any]) -> str | None:
    several = str(dataset.get("name")).startswith(("MultiLabel", "MLCls"))
    delimiter = dataset.get("delimiter") or ("\t" if several else " ")
    root = dataset.get("image_root") or ""
    lines = Path(dataset["cls_label_path"]).read_text().splitlines()
    missing = []
    for number, line in enumerate(lines, 1):
        path, *labels = line.strip().split(delimiter)
        try:
            [int(label) for label in (labels[0].split(",") if several else labels[:1])]
            assert labels
        except (ValueError, IndexError, AssertionError):
            other = "\t" if delimiter == " " else " "
            in_config = {"\t": r'"\t"', " ": "null"}[other]
            hint = f", or in the data set delimiter: {in_config}" if line.rpartition(other)[2].isdecimal() else ""
            return f"line {number} is {line[:80]!r}; it takes a path, {delimiter!r} and a whole number{hint}"
        if not os.path.exists(os.path.join(root, path)):
            missing.append(path)
    if missing:
        return f"{len(missing)} of {len(lines)} images are not in image_root, {root}; the first is {missing[0]}"
    return None
