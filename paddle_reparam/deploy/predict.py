"""Label images with a released folder, which carries the labels and says how its network's input is made."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import numpy as np

from ..errors import MissingFile, ReparamError, UsageError, one_sentence, printable
from ..files import Folder
from ..images import IMAGE_SUFFIXES, images_below, read_rgb
from ..report import format_row, shown_width
from .inference import InferenceModel
from .outputs import THRESHOLD
from .released import check_files, manifest_of_onnx, read_manifest

#: The steps of PaddleClas that are known here, in the order in which a config may have them.
STEPS = ("DecodeImage", "ResizeImage", "CropImage", "NormalizeImage", "ToCHWImage", "ToGray")

#: Images that a network is given at once, and the numbers that they hold together at most.
_IMAGES_AT_ONCE, _NUMBERS_AT_ONCE = 16, 2**22
#: The longer side of a thumbnail, in pixels.
_THUMBNAIL = 220


@dataclass
class Prediction:
    """An image's file, a small picture of it `[H, W, 3]` (RGB, uint8), and its most probable (label, probability), the
    first the best.

    There is none where each label has a probability of its own, and none reaches the threshold.
    """

    path: Path
    thumbnail: np.ndarray
    labels: list[tuple[str, float]]


#: What is told of an image or a folder that cannot be labelled, while the others are.
Failed = Callable[[ReparamError], None]


def find_images(places: Iterable[Folder], failed: Failed | None = None) -> list[Path]:
    """Return images, and all images below folders in order, each once.

    Raises `MissingFile` for a place that does not exist. A folder without images is a `ReparamError`, which `failed` is
    given; without it, it is raised.
    """
    places, images = [Path(place) for place in places], []
    for place in places:
        if not place.exists():
            raise MissingFile(f"there is no image and no folder {place}")
    for place in places:
        if place.is_dir():
            found = images_below(place)
            images += found
            if not found:
                (failed or _raise)(ReparamError(f"{place} holds no image ({', '.join(IMAGE_SUFFIXES)})"))
        else:
            images.append(place)
    return list(dict.fromkeys(images))


def _raise(error: ReparamError) -> None:
    raise error


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


def _thumbnail(image: np.ndarray) -> np.ndarray:
    import cv2

    factor = min(1.0, _THUMBNAIL / max(image.shape[:2]))
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


@dataclass
class _Read:
    """An image that was read: its file, its thumbnail, and what the network takes of it, `[C, H, W]`."""

    path: Path
    thumbnail: np.ndarray
    taken: np.ndarray


class NetworkOfImages:
    """A released folder, or an ONNX file of one, whose network takes one image.

    A folder's files are checked against their hashes first.
    """

    def __init__(self, release: Folder) -> None:
        """Raises `ReparamError` for what is no release, is damaged, or does not say how it reads an image."""
        in_one_file = Path(release).is_file()
        if in_one_file:
            network = InferenceModel(release)
            manifest = manifest_of_onnx(network)
        else:
            manifest = read_manifest(release)
            check_files(release, manifest)
        self.shape, self.size = manifest["input"]["shape"][0][1:], manifest["input"]["size"]
        if len(manifest["input"]["shape"]) != 1:
            raise ReparamError(f"{release}: its network takes several inputs, and no image alone")
        self.dtype = manifest["input"]["dtype"]
        self.steps = manifest["input"].get("preprocessing")
        if self.steps is None:
            raise ReparamError(f"{release}: its manifest does not say how its input is made of an image; release again")
        self.manifest = manifest
        # Photographs have many sizes: without `keep_shapes`, as a folder of them would fill the memory.
        self._network = network if in_one_file else InferenceModel(release, keep_shapes=False)

    @property
    def passed_over(self) -> dict[str, str]:
        """Runtime -> why this machine cannot run the release by it, though it is faster than the one that is used."""
        return self._network.passed_over

    def batches(self, paths: Iterable[Path], failed: Failed) -> Iterator[list[_Read]]:
        """Yield images that follow each other and have one size: a few, or one where they are large."""
        batch: list[_Read] = []
        for path in paths:
            try:
                read = self._read(path)
            except ReparamError as error:
                failed(error)
                continue
            full = len(batch) == _IMAGES_AT_ONCE or (len(batch) + 1) * read.taken.size > _NUMBERS_AT_ONCE
            if batch and (full or read.taken.shape != batch[0].taken.shape):
                yield batch
                batch = []
            batch.append(read)
        if batch:
            yield batch

    def _read(self, path: Path) -> _Read:
        image = read_rgb(path)
        with one_sentence(f"{path}: it cannot be read as the network takes it"):
            try:
                # A copy: a view would keep all of a photograph.
                taken = np.array(preprocess(image, self.steps), self.dtype, order="C")
                if self.size == "fixed" and list(taken.shape) != self.shape:
                    raise ReparamError(f"the network takes images of {self.shape}, this one is {list(taken.shape)}")
            except ReparamError as error:
                raise error.at(str(path)) from error
            return _Read(path, _thumbnail(image), taken)


class ImageClassifier(NetworkOfImages):
    """A release that labels images."""

    def __init__(self, release: Folder) -> None:
        """Raises `ReparamError` as its base does, and for what cannot label images."""
        super().__init__(release)
        activation = self.manifest["output"]["activation"]
        if activation not in ("softmax", "sigmoid"):
            raise ReparamError(f"{release}: its network puts out no probabilities, so it cannot label images")
        #: Whether each label has a probability of its own.
        self.several_labels = activation == "sigmoid"
        self.labels = self.manifest.get("labels")

    def predict(
        self,
        paths: Iterable[Path],
        top: int | None = None,
        threshold: float | None = None,
        failed: Failed | None = None,
    ) -> Iterator[Prediction]:
        """Yield the `top` most probable labels of each image file (5), while the files are read.

        Where each label has a probability of its own, all that reach the `threshold` (0.5) count, or `top` of those.
        `failed` is given the `ReparamError` of each image that cannot be read or labelled; without it, it is raised.
        Raises `UsageError` for a threshold where the classes exclude each other.
        """
        if threshold is not None and not self.several_labels:
            raise UsageError(
                "the classes of this network exclude each other, so no threshold applies; ask for the top ones"
            )
        if self.several_labels:
            floor, most = THRESHOLD if threshold is None else threshold, top
        else:
            floor, most = 0.0, 5 if top is None else top
        failed = failed or _raise
        for batch in self.batches(paths, failed):
            try:
                rows = self._probabilities(np.stack([read.taken for read in batch]))
            except ReparamError as error:
                if self.size == "fixed":
                    raise
                for read in batch:
                    failed(error.at(str(read.path)))
                continue
            for read, row in zip(batch, rows):
                best = [i for i in np.argsort(-row, kind="stable") if row[i] >= floor][:most]
                yield Prediction(read.path, read.thumbnail, [(self._label(int(i)), float(row[i])) for i in best])

    def _probabilities(self, images: np.ndarray) -> np.ndarray:
        """Return the probabilities `[N, classes]` of images `[N, C, H, W]`."""
        probabilities = self._network.run(images)[0]
        if probabilities.ndim != 2 or len(probabilities) != len(images):
            raise ReparamError(
                f"the network puts out {list(probabilities.shape)} for {len(images)} images, no class probabilities"
            )
        return probabilities

    def _label(self, number: int) -> str:
        name = self.labels[number] if self.labels and number < len(self.labels) else None
        return str(number) if name is None else name


def format_predictions(predictions: Iterable[Prediction], paths: Sequence[Path]) -> Iterator[str]:
    """Yield the lines of a table with a row for each label of each image, as the predictions come.

    `paths` are all that may come: they say how wide the table is.
    """
    head = ["image", "probability", "label"]
    widths = [max(shown_width(printable(os.fspath(path))) for path in [*paths, head[0]]), *map(len, head[1:])]
    right = [False, True, False]
    for number, prediction in enumerate(predictions):
        if number == 0:
            yield from (format_row(row, widths, right) for row in (head, ["-" * width for width in widths]))
        for place, (label, probability) in enumerate(prediction.labels or [("none", None)]):
            path = "" if place else os.fspath(prediction.path)
            yield format_row([path, "-" if probability is None else f"{probability:.2%}", label], widths, right)
