"""The validation images of a config, as PaddleClas reads and transforms them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from ..deploy.outputs import Normalization
from .errors import ConfigError


@dataclass
class Images:
    """Validation images as the config reads them: names, labels and normalised pixels `[N, C, H, W]`.

    Labels are `[N]`, or `[N, labels]` where an image has several.
    """

    names: list[str]
    labels: np.ndarray
    pixels: np.ndarray


def read_validation_images(config: dict[str, Any], most: int | None = None) -> Images:
    """Return the images of `DataLoader.Eval`, or `most` of them, evenly from the whole list.

    `setup` must have run. Raises `ConfigError` where the config names no such images or files that are not there, and
    `ReparamError` where they cannot be read.
    """
    dataset = _validation_dataset(config)
    count = len(dataset) if most is None else min(most, len(dataset))
    return _read(dataset, np.linspace(0, len(dataset) - 1, count).round().astype(int))


def validation_batches(config: dict[str, Any], size: int = 64) -> Iterator[Images]:
    """Yield all images of `DataLoader.Eval`, so many at a time; errors are those of `read_validation_images`."""
    dataset = _validation_dataset(config)
    for start in range(0, len(dataset), size):
        yield _read(dataset, range(start, min(start + size, len(dataset))))


def read_training_images(config: dict[str, Any], most: int) -> Images:
    """Return `most` images of `DataLoader.Train`, evenly from the whole list, transformed as those of Eval are.

    Errors are those of `read_validation_images`.
    """
    from .validation import check_loader

    for part in ("Train", "Eval"):
        check_loader(config, part)
    config = copy.deepcopy(config)
    sections = config["DataLoader"]
    transforms = sections["Eval"]["dataset"].get("transform_ops")
    sections["Eval"]["dataset"] = {**sections["Train"]["dataset"], "transform_ops": transforms}
    return read_validation_images(config, most)


def require_classes_of(images: Images, activation: str | None) -> None:
    """Raise `ConfigError` for images of several labels where the classes of a network exclude each other."""
    if images.labels.ndim > 1 and activation != "sigmoid":
        raise ConfigError(
            "the images of DataLoader.Eval have several labels, and the classes of the released network exclude each "
            "other; release it with Global.use_multilabel=True"
        )


def as_taken(pixels: np.ndarray, normalization: Normalization | None) -> np.ndarray:
    """Return normalised images as an export takes them: as they are, or as the pixels that they were."""
    return pixels if normalization is None else normalization.undo(pixels)


def _validation_dataset(config: dict[str, Any]) -> Any:
    from ppcls.data import build_dataloader

    from .sentences import explained
    from .validation import check_loader

    check_loader(config, "Eval")
    config["DataLoader"]["class_num"] = config["Arch"].get("class_num")
    with explained("DataLoader.Eval cannot be read"):
        return build_dataloader(config["DataLoader"], "Eval", paddle.set_device("cpu")).dataset


def _read(dataset: Any, indices: Iterable[int]) -> Images:
    from .guards import failures
    from .sentences import explained

    failures.clear()
    with explained("DataLoader.Eval cannot be read"):
        pixels, labels = zip(*(dataset[int(i)][:2] for i in indices))
        failures.raise_any(len(pixels))
        labels = np.stack(labels)
        # Behind several labels PaddleClas may put how common each is.
        return Images(
            [dataset.images[i] for i in indices], labels[:, 0] if labels.ndim == 3 else labels, np.stack(pixels)
        )
