"""A small set for segmentation and detection, as PaddleSeg and PaddleDetection read it: digits on a canvas."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import BY_FORCE, OutputExists, printable
from ..files import new_folder
from ..report import Report

TRAIN_SCENES, VAL_SCENES, CLASS_NAMES = "train.txt", "val.txt", "class_names.txt"
#: The boxes of the digits, as COCO's annotations are written.
TRAIN_BOXES, VAL_BOXES = "train.json", "val.json"
#: Ink from which on a pixel belongs to its digit, of 255.
_INK = 96
#: How much larger than scikit-learn's 8x8 pixels the digits are.
_SCALES = (2, 3)


class _Box(NamedTuple):
    """A digit's place in pixels: its category, its left upper corner, and its size."""

    category: int
    left: int
    top: int
    width: int
    height: int


@dataclass
class ScenesReport(Report):
    """What was written: where, the names of the classes, how many scenes of which side, the share of the background."""

    root: str
    classes: list[str]
    train: int
    val: int
    side: int
    background: float

    def __str__(self) -> str:
        return printable(
            f"{self.root}: {self.train} scenes for training, {self.val} for validation, {self.side}x{self.side} "
            f"pixels of {len(self.classes)} classes, {self.background:.0%} of them background; wrote {TRAIN_SCENES}, "
            f"{VAL_SCENES}, {CLASS_NAMES}, {TRAIN_BOXES}, {VAL_BOXES}"
        )


def write_scenes(
    output: str | os.PathLike[str], force: bool = False, train: int = 240, val: int = 60, side: int = 64
) -> ScenesReport:
    """Write pictures of several digits, `images/<part>_NNNN.png`, with masks, PaddleSeg's list files, and their boxes
    in COCO's form.

    A mask, `masks/<part>_NNNN.png`, holds 0 for the background and 1 + d for a digit d, which is also the number of a
    box's category. The digits are scikit-learn's, two or three times as large, each scene in colours of its own with
    noise; a fifth of them is used in validation alone. The scenes are the same each time. The folder appears whole or
    not at all. Raises `OutputExists` where it stands there already, unless `force`: then an earlier one of this
    function is replaced.
    """
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    output = Path(output)
    if output.exists() and not (force and (output / CLASS_NAMES).is_file() and (output / "masks").is_dir()):
        raise OutputExists(
            f"{output} exists already and is kept; name another folder"
            + ("" if force else f", or {BY_FORCE} where it holds scenes of digits")
        )
    digits = load_digits()
    parts = train_test_split(np.arange(len(digits.images)), test_size=0.2, stratify=digits.target, random_state=0)
    classes = ["background", *(str(name) for name in digits.target_names)]
    background = []
    with new_folder(Path(os.path.realpath(output)), output, replace=output.exists()) as folder:
        for name in ("images", "masks"):
            (folder / name).mkdir()
        for part, count, some in zip(("train", "val"), (train, val), parts):
            lines, names, boxes = [], [], []
            for number in range(count):
                random = np.random.default_rng([part == "val", number])
                image, mask, of_digits = _scene(digits.images[some] * (255 / 16), digits.target[some], side, random)
                pair = [f"{kind}/{part}_{number:04d}.png" for kind in ("images", "masks")]
                for path, pixels in zip(pair, (image, mask)):
                    Image.fromarray(pixels).save(folder / path)
                lines.append(" ".join(pair))
                names.append(os.path.basename(pair[0]))
                boxes.append(of_digits)
                background.append(float((mask == 0).mean()))
            list_file, of_boxes = (TRAIN_SCENES, TRAIN_BOXES) if part == "train" else (VAL_SCENES, VAL_BOXES)
            (folder / list_file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            (folder / of_boxes).write_text(json.dumps(_annotations(names, boxes, classes, side)), encoding="utf-8")
        (folder / CLASS_NAMES).write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    return ScenesReport(str(output), classes, train, val, side, float(np.mean(background)))


def _scene(
    images: np.ndarray, labels: np.ndarray, side: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, list[_Box]]:
    """Return (picture `[side, side, 3]`, mask `[side, side]`, boxes), of a few digits that do not overlap, as uint8."""
    ink, mask, boxes = np.zeros((side, side)), np.zeros((side, side), "uint8"), []
    for _ in range(int(random.integers(6, 13))):
        index, scale = int(random.integers(len(images))), int(random.choice(_SCALES))
        digit = np.kron(images[index], np.ones((scale, scale)))
        top, left = random.integers(0, side - len(digit) + 1, 2)
        place = (slice(top, top + len(digit)), slice(left, left + len(digit)))
        if not ink[place].any():
            ink[place] = digit
            mask[place] = np.where(digit >= _INK, 1 + labels[index], 0)
            rows, columns = np.nonzero(digit >= _INK)
            corner = int(left + columns.min()), int(top + rows.min())
            boxes.append(_Box(1 + int(labels[index]), *corner, int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1))
    dark, light = random.uniform(0, 90, 3), random.uniform(150, 255, 3)
    picture = dark + (light - dark) * ink[..., None] / 255 + random.normal(0, 8, (side, side, 3))
    return np.clip(np.rint(picture), 0, 255).astype("uint8"), mask, boxes


def _annotations(names: list[str], boxes: list[list[_Box]], classes: list[str], side: int) -> dict[str, Any]:
    """Return what a file of COCO's form holds: images, their boxes, and the categories, which begin with 1."""
    images = [{"id": number, "file_name": name, "width": side, "height": side} for number, name in enumerate(names)]
    of_images = [(number, box) for number, some in enumerate(boxes) for box in some]
    annotations = [
        {"id": 1 + index, "image_id": number, "category_id": box.category, "bbox": list(box[1:]),
         "area": box.width * box.height, "iscrowd": 0}
        for index, (number, box) in enumerate(of_images)
    ]  # fmt: skip
    categories = [{"id": number, "name": name} for number, name in enumerate(classes) if number]
    return {"images": images, "annotations": annotations, "categories": categories}
