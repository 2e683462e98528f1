"""The validation images of a config, as PaddleClas reads and transforms them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from ..export import one_sentence


@dataclass
class Images:
    """Validation images as the config reads them: names, labels `[N]` and normalised pixels `[N, C, H, W]`."""

    names: list[str]
    labels: np.ndarray
    pixels: np.ndarray


def read_validation_images(config: dict[str, Any], most: int | None = None) -> Images:
    """Return the images of `DataLoader.Eval`, or `most` of them, evenly from the whole list.

    `setup` must have run. Raises `ConfigError` where the config names no such images or files that are not there, and
    `ReparamError` where they cannot be read.
    """
    from ppcls.data import build_dataloader

    from .engine import check_dataset

    check_dataset(config, "Eval")
    config["DataLoader"]["class_num"] = config["Arch"].get("class_num")
    with one_sentence("DataLoader.Eval cannot be read"):
        dataset = build_dataloader(config["DataLoader"], "Eval", paddle.set_device("cpu")).dataset
        count = len(dataset) if most is None else min(most, len(dataset))
        chosen = np.linspace(0, len(dataset) - 1, count).round().astype(int)
        pixels, labels = zip(*(dataset[int(i)][:2] for i in chosen))
        return Images([dataset.images[i] for i in chosen], np.asarray(labels).reshape(-1), np.stack(pixels))
