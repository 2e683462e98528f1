"""Masks of images by a released segmentation network: the number of the class of each pixel, and a picture of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import MissingFile, OutputExists, ReparamError
from ..files import Folder, atomic_write
from ..images import read_rgb
from .inference import InferenceModel
from .predict import Failed, NetworkOfImages
from .released import manifest_of_onnx, read_manifest

#: How much of an overlay is the mask.
_OPACITY = 0.6


def segments(release: Folder) -> bool:
    """Return whether a released folder, or an ONNX file of one, is of a network that labels pixels."""
    if not Path(release).exists():
        raise MissingFile(f"there is no release {release}")
    manifest = manifest_of_onnx(InferenceModel(release)) if Path(release).is_file() else read_manifest(release)
    return manifest.get("task") == "segmentation"


@dataclass
class Mask:
    """An image's file, its pixels `[H, W, 3]`, the number of the class of each, `[H, W]`, uint8, and their shares."""

    path: Path
    image: np.ndarray
    classes: np.ndarray
    shares: list[tuple[str, float]]


class Segmenter(NetworkOfImages):
    """A release that labels the pixels of images."""

    def __init__(self, release: Folder) -> None:
        """Raises `ReparamError` as its base does, and for what does not label pixels."""
        super().__init__(release)
        if self.manifest.get("task") != "segmentation":
            raise ReparamError(f"{release}: its network does not label pixels")
        self.labels = self.manifest.get("labels")

    def masks(self, paths: Iterable[Path], failed: Failed) -> Iterator[Mask]:
        """Yield the mask of each image file, as large as the image.

        `failed` is given the `ReparamError` of each image that cannot be read or labelled.
        """
        for batch in self.batches(paths, failed):
            try:
                classes = self._classes(np.stack([read.taken for read in batch]))
            except ReparamError as error:
                for read in batch:
                    failed(error.at(str(read.path)))
                continue
            for read, of_image in zip(batch, classes):
                yield self._mask(read.path, of_image)

    def _classes(self, images: np.ndarray) -> np.ndarray:
        """Return the numbers of the classes `[N, H, W]` of the pixels of images `[N, C, H, W]`."""
        outputs = self._network.run(images)[0]
        if self.manifest["output"]["activation"] != "argmax":
            outputs = outputs.argmax(axis=1)
        if outputs.ndim != 3 or outputs.min() < 0 or outputs.max() > 255:
            raise ReparamError(f"the network puts out {list(outputs.shape)}, no classes 0..255 of pixels")
        return outputs.astype(np.uint8)

    def _mask(self, path: Path, classes: np.ndarray) -> Mask:
        import cv2

        image = read_rgb(path)
        height, width = image.shape[:2]
        if classes.shape != (height, width):
            classes = cv2.resize(classes, (width, height), interpolation=cv2.INTER_NEAREST)
        counts = np.bincount(classes.reshape(-1))
        shares = [(self._label(int(i)), counts[i] / classes.size) for i in np.argsort(-counts, kind="stable")]
        return Mask(path, image, classes, [(name, share) for name, share in shares if share])

    def _label(self, number: int) -> str:
        name = self.labels[number] if self.labels and number < len(self.labels) else None
        return str(number) if name is None else name


def palette() -> np.ndarray:
    """Return a colour `[256, 3]`, RGB, uint8, for each class, as Pascal VOC's masks have them: 0 is black.

    The bits of a number, from the lowest on, go in turns to red, green and blue, there from the highest on.
    """
    bits = (np.arange(256)[:, None] >> np.arange(9)) & 1
    return (bits.reshape(256, 3, 3) << np.array([7, 6, 5])[:, None]).sum(axis=1).astype(np.uint8)


def empty_folder(folder: Folder) -> Path:
    """Return a folder for masks, made where it was not there; raises `OutputExists` for one that holds something."""
    place = Path(folder)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise OutputExists(f"{folder} exists already and is kept; name another folder for the masks")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReparamError(f"{folder}: it cannot be made ({error.strerror or error})") from error
    return place


def write_mask(mask: Mask, folder: Path) -> tuple[Path, Path]:
    """Write a mask, a PNG whose pixels are the numbers of their classes, and an overlay of it on the image.

    Returns both files. Raises `ReparamError` where another image of this name has been written there.
    """
    from PIL import Image

    files = folder / f"{mask.path.stem}.png", folder / f"{mask.path.stem}_overlay.png"
    taken = next((file for file in files if file.exists()), None)
    if taken is not None:
        raise ReparamError(f"{mask.path}: {taken} is of another image of this name; give them names of their own")
    colours = palette()
    indexed = Image.fromarray(mask.classes, mode="P")
    indexed.putpalette(colours.reshape(-1).tolist())
    share = _OPACITY * (mask.classes > 0)[:, :, None]
    overlay = Image.fromarray(np.rint(mask.image * (1 - share) + colours[mask.classes] * share).astype(np.uint8))
    for picture, file in zip((indexed, overlay), files):
        atomic_write(file, lambda temporary, picture=picture: picture.save(temporary, format="PNG"))
    return files
