"""VisualDL's log of a training: whole after a resume, and with the losses of each evaluation.

VisualDL shows the newest file of a folder alone. So a resumed training begins its own with the records that were there
when its checkpoint was saved, byte by byte. The older file stays as it is.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ppcls.utils import logger

from ..files import atomic_write

#: The size of a record stands before it, in so many bytes.
_SIZE = 8


class Log:
    """The `visualdl.LogWriter` of a training, and what a checkpoint has to know of it."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._evaluations: set[tuple[str, int]] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def add_scalar(self, tag: str, value: float, step: int, **options: Any) -> None:
        """Write a number, unless it is one of an evaluation that `add_evaluation` has written."""
        if (tag, step) not in self._evaluations:
            self._writer.add_scalar(tag, value, step, **options)

    def add_evaluation(self, tag: str, value: float, epoch: int) -> None:
        """Write a number of an evaluation, before its network may be saved as the best one.

        PaddleClas writes it afterwards: a run that is killed in between would not have it.
        """
        self.add_scalar(tag, value, epoch)
        self._evaluations.add((tag, epoch))

    def position(self) -> dict[str, Any] | None:
        """Return how far the log is: the name of its file, and its bytes; None where somebody took it away."""
        self._writer.flush()
        path = Path(self._writer.file_name)
        with contextlib.suppress(OSError):
            return {"file": path.name, "bytes": path.stat().st_size}
        return None

    def go_on(self, before: Any, checkpoint: str, output_dir: str) -> bool:
        """Begin with what was recorded until a checkpoint was saved; `before` is what `position` returned then.

        Returns whether it is there. Where the earlier log is not found, or cannot be read, the log is as it was.
        """
        source = self._earlier(before, checkpoint, output_dir)
        if source is None:
            return False
        target = Path(self._writer.file_name)
        self._writer.close()
        try:
            recorded = source.read_bytes()[: before["bytes"]]
            atomic_write(target, lambda path: path.write_bytes(recorded[: _whole(recorded)]))
        except Exception as error:  # A log stops no training, whatever is in it.
            logger.warning(f"VisualDL's curves begin anew: {source} cannot be gone on with ({error})")
            return False
        finally:
            # It prints that it goes on with a file.
            with contextlib.redirect_stdout(io.StringIO()):
                self._writer = type(self._writer)(logdir=str(target.parent), file_name=target.name)
        return True

    def _earlier(self, before: Any, checkpoint: str, output_dir: str) -> Path | None:
        """Return the log that a checkpoint knows, in the folder that was trained into then; it may be another one."""
        name, size = (before.get(key) for key in ("file", "bytes")) if isinstance(before, dict) else (None, None)
        if not (isinstance(name, str) and re.fullmatch(r"vdlrecords\.\d+\.log", name)):
            return None
        if not (isinstance(size, int) and size > 0):
            return None
        # PaddleClas has a folder for the checkpoints of a network, or none.
        below = os.path.relpath(self._writer.logdir, output_dir)
        folders = (Path(checkpoint).parent, Path(checkpoint).parent.parent)
        return next((path for path in (folder / below / name for folder in folders) if path.is_file()), None)


def _whole(log: bytes) -> int:
    """Return the bytes of the whole records that a log begins with; after a crash the last one may be cut short."""
    end = 0
    while end + _SIZE <= len(log):
        following = end + _SIZE + int.from_bytes(log[end : end + _SIZE], "little")
        if following > len(log):
            break
        end = following
    return end


@contextlib.contextmanager
def evaluation(engine: Any, epoch: int) -> Iterator[dict[str, float]]:
    """Log the mean losses of an evaluation in the `with` block as `eval_*`, and what is put into the dict.

    Nothing is logged where the Engine has no log.
    """
    plain, log = getattr(engine, "eval_loss_func", None), engine.vdl_writer
    measured: dict[str, float] = {}
    sums: dict[str, float] = {}
    count = 0

    def counted(outputs: Any, labels: Any) -> Any:
        nonlocal count
        losses = plain(outputs, labels)
        count += labels.shape[0]
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + float(value) * labels.shape[0]
        return losses

    if log is None:
        yield measured
        return
    engine.eval_loss_func = None if plain is None else counted
    try:
        yield measured
    finally:
        engine.eval_loss_func = plain
    # Newer Engines evaluate the moving average as well.
    average = getattr(engine, "ema", False) and engine.model is engine.model_ema.module
    means = {name: total / count for name, total in sums.items()}
    for name, value in {**means, **measured}.items():
        log.add_evaluation(f"eval_{name}{'_ema' if average else ''}", value, epoch)
