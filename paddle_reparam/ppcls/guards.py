"""What goes wrong in the middle of a training, as one sentence instead of a number that nobody reads.

PaddleClas trains on with a loss that is not a number, and takes another image at random for one that it cannot read.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import os
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddle.io.dataloader import dataloader_iter, fetcher
from ppcls.utils import logger

from ..errors import ReparamError, one_sentence
from ..images import why_unreadable
from ..surgery.tracing import all_finite, first_not_finite, not_finite, undisturbed_draws


def check_samples(loader: Any, class_num: int | None, split: str, channels: int | None = None) -> None:
    """Raise `ReparamError` for a data set without images, and for labels that the network has no output for.

    Where `channels` is given, also for images of another number of channels.
    """
    dataset = getattr(loader, "dataset", None)
    labels = getattr(dataset, "labels", None)
    if labels is None:
        return
    if len(labels) == 0:
        raise ReparamError(f"DataLoader.{split}: its list of images is empty")
    if len(loader) == 0:
        each = " of each process" if paddle.distributed.get_world_size() > 1 else ""
        raise ReparamError(
            f"DataLoader.{split}: {len(labels)} images do not fill one batch{each}; choose a smaller batch_size, or "
            "drop_last=False"
        )
    # Where none can be read, the loader would say so from another thread.
    with undisturbed_draws(), one_sentence(f"DataLoader.{split} cannot be read"):
        try:
            pixels = dataset[0][0]
        except ReparamError as error:
            raise error.at(f"DataLoader.{split}") from None
    if channels is not None and np.ndim(pixels) == 3 and len(pixels) != channels:
        gray = "; ToGray: {} behind NormalizeImage makes one of three" if channels == 1 else ""
        raise ReparamError(
            f"DataLoader.{split} makes images of {len(pixels)} channels, and Global.image_shape says {channels}{gray}"
        )
    if isinstance(labels[0], (list, tuple, np.ndarray)):
        _check_several(labels, class_num, split, getattr(dataset, "images", None))
        return
    values = np.asarray(labels)
    if class_num is None or values.dtype.kind not in "iu" or values.ndim != 1:
        return
    wrong = np.flatnonzero((values < 0) | (values >= class_num))
    if wrong.size:
        images = getattr(dataset, "images", None)
        name = f" ({images[wrong[0]]})" if images else ""
        raise ReparamError(
            f"DataLoader.{split}: {wrong.size} of {values.size} labels are none of 0 to {class_num - 1}, the first is "
            f"{values[wrong[0]]}{name}; set Arch.class_num, or mend the list"
        )


def _check_several(labels: Sequence[Any], class_num: int | None, split: str, images: Sequence[str] | None) -> None:
    """Raise `ReparamError` where an image has not 0, 1 or -1 (not known) for each of the network's labels."""
    count = class_num or len(labels[0])
    wrong = [i for i, values in enumerate(labels) if len(values) != count or not set(map(int, values)) <= {-1, 0, 1}]
    if wrong:
        name = f" ({images[wrong[0]]})" if images else ""
        raise ReparamError(
            f"DataLoader.{split}: {len(wrong)} of {len(labels)} images have not {count} labels, each 0, 1, or -1 for "
            f"not known; the first is {list(map(int, labels[wrong[0]]))}{name}; set Arch.class_num, or mend the list"
        )


class _Unreadable(Exception):
    """What a data set says of an image that it cannot read, in the place of reading another one."""


class _Logger:
    """PaddleClas' logger in the modules that read images: an error in the middle of reading an image ends that."""

    def __getattr__(self, name: str) -> Any:
        return getattr(logger, name)

    def error(self, message: str, *arguments: Any) -> None:
        if _reading.depth:
            raise _Unreadable(str(message))
        logger.error(message, *arguments)


class RaisingLogger:
    """PaddleClas' logger, where what it logs as an error ends the run."""

    def __getattr__(self, name: str) -> Any:
        return getattr(logger, name)

    def error(self, message: str, *arguments: Any) -> None:
        cause = sys.exc_info()[1]
        raise cause if isinstance(cause, ReparamError) else ReparamError(str(message))


class _Reading(threading.local):
    depth = 0


_reading = _Reading()


def watch_readers() -> None:
    """Let every data set of PaddleClas note in `failures` which images it cannot read.

    On such an image they log an error and read another one at random, for ever where there is none to read. Here the
    next one that can be read stands in, so that a run gets to where it looks at `failures`. A reader never waits.
    """
    for name, module in list(sys.modules.items()):
        if not name.startswith("ppcls.data.dataloader."):
            continue
        if hasattr(module, "logger"):
            module.logger = _Logger()
        for value in list(vars(module).values()):
            if inspect.isclass(value) and issubclass(value, paddle.io.Dataset) and "__getitem__" in vars(value):
                _watch(value)
    _watch_fetching()


def _watch(dataset: type) -> None:
    read = dataset.__getitem__
    if hasattr(read, "__wrapped__") or not hasattr(dataset, "__len__"):
        return

    def attempt(self: Any, place: Any) -> Any:
        """Return a sample, or the error that came in its place."""
        _reading.depth += 1
        try:
            return read(self, place)
        except ReparamError:
            raise
        except Exception as error:
            return _Failure(_reason((error.__context__ or error) if isinstance(error, _Unreadable) else error))
        finally:
            _reading.depth -= 1

    @functools.wraps(read)
    def watched(self: Any, place: Any) -> Any:
        sample = attempt(self, place)
        if not isinstance(sample, _Failure):
            return sample
        # Some places are (width, height, number).
        *shape, first = place if isinstance(place, tuple) else (place,)
        failures.note(_file_of(self, int(first)), sample.reason)
        for step in range(len(self)):
            # Once one was found it serves for all.
            number = (getattr(self, "_readable", first) + step) % len(self)
            sample = attempt(self, (*shape, number) if shape else number)
            if not isinstance(sample, _Failure):
                self._readable = number
                return sample
        raise ReparamError(f"none of {len(self)} images can be read, the first is {failures.first()}")

    dataset.__getitem__ = watched


@dataclass
class _Failure:
    """Why a sample could not be read."""

    reason: str


def _reason(error: BaseException) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200)


def _file_of(dataset: Any, number: int) -> str:
    for name in ("images", "samples"):
        entries = getattr(dataset, name, None)
        if entries is not None and number < len(entries):
            entry = entries[number]
            entry = entry[0] if isinstance(entry, (list, tuple)) else entry
            return entry if isinstance(entry, str) else f"number {number}"
    return f"number {number}"


class _Notes:
    """Values that this process, or the workers that it started, wrote down.

    They are lines of a file without a name: writing to one does not wait for a reader, as a pipe's would.
    """

    def __init__(self) -> None:
        # Opened before the workers, which inherit it; in this mode every line is written behind the last one.
        descriptor, path = tempfile.mkstemp()
        os.close(descriptor)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND)
        with contextlib.suppress(OSError):  # Windows removes no file that is open.
            os.unlink(path)

    def clear(self) -> None:
        """Forget all of them."""
        os.ftruncate(self._file, 0)

    def add(self, value: Any) -> None:
        """Write down what JSON can hold."""
        os.write(self._file, json.dumps(value).encode() + b"\n")

    def all(self) -> list[Any]:
        """Return what was written down."""
        return [json.loads(line) for line in os.pread(self._file, os.fstat(self._file).st_size, 0).splitlines()]


class ImageFailures:
    """The images that could not be read, by this process or by the workers that it started."""

    def __init__(self) -> None:
        self._notes = _Notes()
        self.clear = self._notes.clear

    def note(self, image: str, reason: str) -> None:
        """Add an image, and what went wrong with it; called in readers."""
        if os.path.isfile(image):
            # Of a file that is no image a transform would only say that there is nothing to transform.
            reason = why_unreadable(image) or reason
        self._notes.add([image, reason])

    def found(self) -> dict[str, str]:
        """Return image -> why it could not be read."""
        found: dict[str, str] = {}
        for image, reason in self._notes.all():
            found.setdefault(image, reason)
        return found

    def first(self) -> str:
        """Return the first of them and the reason."""
        return next(f"{image} ({reason})" for image, reason in self.found().items())

    def raise_any(self, of: int | None = None) -> None:
        """Raise `ReparamError` with how many images, of so many, could not be read, and the first."""
        count = len(self.found())
        if count:
            share = f"{count} of {of} images" if of else "an image" if count == 1 else f"{count} images"
            raise ReparamError(f"{share} cannot be read, and none stands in for another: {self.first()}")


#: What could not be read since it was last cleared.
failures = ImageFailures()
_reader_errors = _Notes()


class Loader:
    """A loader of PaddleClas whose errors end the run, as `ReparamError`.

    Paddle raises them in a thread of its own, while the run waits for the next batch: for ever where there are no
    workers. Here the reader notes what went wrong and hands over a batch that nobody sees.
    """

    def __init__(self, loader: paddle.io.DataLoader, split: str) -> None:
        self._loader, self._split = loader, split
        self._error: ReparamError | None = None
        loader.dataset._errors_are_noted = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        # Newer Engines begin anew after any error.
        if self._error is not None:
            raise self._error
        _reader_errors.clear()
        batches = iter(self._loader)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except SystemError:
                messages = [
                    "its workers ended without a word, as where memory runs out; the system may say why. Fewer of them "
                    "need less (num_workers)"
                ]
            else:
                messages = _reader_errors.all()
            if messages:
                self._error = ReparamError(f"DataLoader.{self._split}: {messages[0]}")
                raise self._error
            yield batch


def _watch_fetching() -> None:
    fetch = fetcher._MapDatasetFetcher.fetch
    if hasattr(fetch, "__wrapped__"):
        return
    # Paddle's handler raises wherever the main thread is when a worker dies, be it while a checkpoint is written. Its
    # loader looks at its workers by itself, a little later.
    dataloader_iter._set_SIGCHLD_handler = lambda: None

    @functools.wraps(fetch)
    def watched(self: Any, *arguments: Any) -> Any:
        try:
            return fetch(self, *arguments)
        except Exception as error:
            if not getattr(self.dataset, "_errors_are_noted", False):
                raise
            reason = str(error) if isinstance(error, ReparamError) else f"no batch can be made ({_reason(error)})"
            _reader_errors.add(reason)
            return [np.zeros([1], "float32")]

    fetcher._MapDatasetFetcher.fetch = watched


def readable_images(paths: list[str], steps: list[Any]) -> list[str]:
    """Return the files that can be read and transformed, and note the others; `ReparamError` where there is none."""
    readable = []
    for path in paths:
        try:
            image = Path(path).read_bytes()
            for step in steps:
                image = step(image)
        except Exception as error:
            failures.note(path, _reason(error))
        else:
            readable.append(path)
    if not readable:
        failures.raise_any(len(paths))
    return readable


def check_weights(model: nn.Layer, config: Mapping[str, Any]) -> None:
    """Raise `ReparamError` for weights or statistics that are not finite."""
    wrong = not_finite(model.state_dict())
    if wrong:
        file = config["Global"].get("pretrained_model")
        raise ReparamError(f"{f'{file}: ' if file else ''}{wrong}; take weights from before they became so")


def watch_outputs(model: nn.Layer) -> None:
    """Raise `ReparamError`, with the layer where it starts, for outputs in eval mode that are not finite.

    An accuracy is counted from them as from any others.
    """

    def check(layer: nn.Layer, inputs: tuple[Any, ...], outputs: Any) -> None:
        if layer.training or all_finite(outputs) or getattr(layer, "_looking_for_it", False):
            return
        layer._looking_for_it = True
        try:
            path = first_not_finite(layer, inputs)
        finally:
            del layer._looking_for_it
        where = "its input is not" if path is None else f"it starts at {path or 'the network itself'}"
        raise ReparamError(f"the network's output is not finite: {where}")

    model.register_forward_post_hook(check)


def check_loss(losses: dict[str, Any], epoch: int, step: int) -> None:
    """Raise `ReparamError` for a loss that is not finite; `step` counts from the start of the run."""
    for name, value in losses.items():
        number = float(value)
        if not math.isfinite(number):
            raise ReparamError(
                f"the {name} is {number} in epoch {epoch}, at step {step}; the last checkpoint is from before that. "
                "Train with a smaller learning rate, or look for a broken image or label"
            )


def check_states(states: Iterable[Mapping[str, Any]], step: int) -> None:
    """Raise `ReparamError` for weights, or what an optimizer keeps of them, that are not finite and would be saved."""
    for state in states:
        wrong = not_finite(state)
        if wrong:
            raise ReparamError(
                f"after step {step} {wrong}, and nothing is saved; the last checkpoint is from before that. "
                "Train with a smaller learning rate"
            )
