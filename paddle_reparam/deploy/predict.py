"""Label images with a released folder, which carries the labels and says how its network's input is made."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MissingFile, ReparamError, UsageError, one_sentence, printable
from ..files import Folder
from ..report import format_table
from .export import THRESHOLD, InferenceModel
from .released import check_files, read_manifest

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
#: The steps of PaddleClas that are known here, in the order in which a config may have them.
STEPS = ("DecodeImage", "ResizeImage", "CropImage", "NormalizeImage", "ToCHWImage", "ToGray")

#: Images on one contact sheet.
_ON_A_SHEET = 48


@dataclass
class Prediction:
    """An image `[H, W, 3]` (RGB, uint8), its file, and its most probable (label, probability), the first the best.

    There is none where each label has a probability of its own, and none reaches the threshold.
    """

    path: Path
    image: np.ndarray
    labels: list[tuple[str, float]]


def find_images(place: Folder) -> list[Path]:
    """Return an image, or all images below a folder in order; raises `ReparamError` where there is none."""
    place = Path(place)
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise MissingFile(f"there is no image and no folder {place}")
    images = sorted(path for path in place.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise ReparamError(f"{place} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return images


def read_image(path: Path) -> np.ndarray:
    """Return an image as PaddleClas decodes it, `[H, W, 3]`, RGB, uint8; raises `ReparamError`."""
    import cv2

    try:
        data = np.frombuffer(path.read_bytes(), np.uint8)
        image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    except (OSError, cv2.error) as error:
        raise ReparamError(f"{path}: it cannot be read ({error})") from error
    if image is None:
        raise ReparamError(f"{path}: it is no image that can be read, or it is damaged")
    return image[:, :, ::-1]


def preprocess(image: np.ndarray, steps: Sequence[Mapping[str, Mapping[str, Any]]]) -> np.ndarray:
    """Return a network's input `[C, H, W]` for an RGB image, by the steps of a PaddleClas config."""
    for step in steps:
        [(name, options)] = step.items()
        if name == "ResizeImage":
            image = _resized(image, **options)
        elif name == "CropImage":
            image = _cropped(image, options["size"])
        elif name == "NormalizeImage":
            axes = (3, 1, 1) if options.get("order", "chw") == "chw" else (1, 1, 3)
            mean, std = (np.float32(options[key]).reshape(axes) for key in ("mean", "std"))
            image = (image.astype(np.float32) * np.float32(options["scale"]) - mean) / std
        elif name == "ToCHWImage":
            image = image.transpose(2, 0, 1)
        elif name == "ToGray":
            image = to_gray(image)
    return image


def to_gray(image: np.ndarray) -> np.ndarray:
    """Return the luma `[H, W, 1]` of an RGB image `[H, W, 3]`, float32; raises `ReparamError` for another shape."""
    if image.ndim != 3 or image.shape[2] != 3:
        raise ReparamError(f"ToGray takes an image [H, W, 3], not {list(image.shape)}; it stands before ToCHWImage")
    return (image.astype(np.float32) @ np.float32([0.299, 0.587, 0.114]))[:, :, None]


def _resized(
    image: np.ndarray,
    size: int | Sequence[int] | None = None,
    resize_short: int | None = None,
    interpolation: str | None = None,
    backend: str = "cv2",
    return_numpy: bool = True,
) -> np.ndarray:
    import cv2
    from PIL import Image

    height, width = image.shape[:2]
    if resize_short:
        factor = float(resize_short) / min(height, width)
        width, height = round(width * factor), round(height * factor)
    else:
        width, height = (size, size) if isinstance(size, int) else size
    if backend.lower() == "pil":
        names = {"nearest": Image.NEAREST, "bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC, "box": Image.BOX,
                 "lanczos": Image.LANCZOS, "hamming": Image.HAMMING}  # fmt: skip
        filtered = Image.fromarray(np.ascontiguousarray(image)).resize(
            (width, height), names[interpolation or "bilinear"]
        )
        return np.asarray(filtered)
    names = {"nearest": cv2.INTER_NEAREST, "bilinear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA,
             "bicubic": cv2.INTER_CUBIC, "lanczos": cv2.INTER_LANCZOS4}  # fmt: skip
    return cv2.resize(image, (width, height), interpolation=names[interpolation or "bilinear"])


def _cropped(image: np.ndarray, size: int | Sequence[int]) -> np.ndarray:
    width, height = (size, size) if isinstance(size, int) else size
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    if top < 0 or left < 0:
        raise ReparamError(f"an image of {image.shape[0]}x{image.shape[1]} pixels is cropped to {height}x{width}")
    return image[top : top + height, left : left + width]


class ImageClassifier:
    """A released folder that labels images. Its files are checked against their hashes first."""

    def __init__(self, folder: Folder) -> None:
        """Raises `ReparamError` for what is no release, is damaged, or cannot label images."""
        manifest = read_manifest(folder)
        check_files(folder, manifest)
        self.shape, self.size = manifest["input"]["shape"][0][1:], manifest["input"]["size"]
        if len(manifest["input"]["shape"]) != 1:
            raise ReparamError(f"{folder}: its network takes several inputs, and no image alone")
        self.dtype = manifest["input"]["dtype"]
        self.steps, self.labels = manifest["input"].get("preprocessing"), manifest.get("labels")
        if self.steps is None:
            raise ReparamError(f"{folder}: its manifest does not say how its input is made of an image; release again")
        activation = manifest["output"]["activation"]
        if activation not in ("softmax", "sigmoid"):
            raise ReparamError(f"{folder}: its network puts out no probabilities, so it cannot label images")
        #: Whether each label has a probability of its own.
        self.several_labels = activation == "sigmoid"
        self._model = InferenceModel(folder)

    def probabilities(self, image: np.ndarray) -> np.ndarray:
        """Return the probabilities `[classes]` for an RGB image `[H, W, 3]` of any size, uint8."""
        x = preprocess(image, self.steps)
        if self.size == "fixed" and list(x.shape) != self.shape:
            raise ReparamError(f"the network takes images of {self.shape}, this one is {list(x.shape)}")
        probabilities = self._model.run(x[None].astype(self.dtype))[0][0]
        if probabilities.ndim != 1:
            raise ReparamError(f"the network puts out {list(probabilities.shape)} for an image, no class probabilities")
        return probabilities

    def predict(self, path: Path, top: int | None = None, threshold: float | None = None) -> Prediction:
        """Return the `top` most probable labels of an image file (5).

        Where each label has a probability of its own, all that reach the `threshold` (0.5) count, or `top` of those.
        Raises `UsageError` for a threshold where they have not.
        """
        if threshold is not None and not self.several_labels:
            raise UsageError(
                "the classes of this network exclude each other, so no threshold applies; ask for the top ones"
            )
        image = read_image(path)
        with one_sentence(f"{path}: it cannot be labelled"):
            try:
                probabilities = self.probabilities(image)
            except ReparamError as error:
                raise error.at(str(path)) from error
        if self.several_labels:
            floor, most = THRESHOLD if threshold is None else threshold, top
        else:
            floor, most = 0.0, 5 if top is None else top
        best = [i for i in np.argsort(-probabilities, kind="stable") if probabilities[i] >= floor][:most]
        return Prediction(path, image, [(self._label(int(i)), float(probabilities[i])) for i in best])

    def _label(self, number: int) -> str:
        name = self.labels[number] if self.labels and number < len(self.labels) else None
        return str(number) if name is None else name


def format_predictions(predictions: Sequence[Prediction]) -> str:
    """Return a table with a row for each label of each image."""
    rows = [
        [
            "" if place else os.fspath(prediction.path),
            label,
            ("-" if probability is None else f"{probability:.2%}").rjust(7),
        ]
        for prediction in predictions
        for place, (label, probability) in enumerate(prediction.labels or [("none", None)])
    ]
    return format_table(["image", "label", "probability"], rows)


def draw_sheet(path: Path, predictions: Sequence[Prediction]) -> int:
    """Write a contact sheet with the first images and their best labels; return how many of them are on it."""
    from matplotlib.figure import Figure

    shown = predictions[:_ON_A_SHEET]
    columns = min(8, math.ceil(math.sqrt(len(shown))))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(2.2 * columns, 2.6 * rows), facecolor="white", layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid:
        axes.axis("off")
    for axes, prediction in zip(grid, shown):
        axes.imshow(prediction.image)
        best = "".join(f"{printable(label[:24])}\n{probability:.1%}" for label, probability in prediction.labels[:1])
        axes.set_title(best or "none", fontsize=9, parse_math=False)
    with one_sentence(f"{path}: it cannot be written"):
        figure.savefig(path, dpi=100)
    return len(shown)
