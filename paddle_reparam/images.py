"""Image files: which ones count as images, and how one is read, everywhere in the same way.

PaddleClas decodes by OpenCV, in training and where it serves a network, so what OpenCV makes of a file is what the
network sees: grey values and palettes as three equal or looked-up channels, CMYK as RGB, the upper 8 of 16 bits, the
colours under a transparent pixel as they are stored, and of several frames the first. What it decodes to another
picture than the one that was taken is refused here.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from .errors import MissingFile, ReparamError

#: Endings of the names of image files, in small letters.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff")

#: Images of 16 bits that use no value from here on are read as nearly black.
_DARK = 1 << 12
_ORIENTATION = 0x0112  # in EXIF


def images_below(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the image files below a folder in order of their paths; nothing that is hidden, nor in a hidden folder."""
    folder = Path(folder)
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def others_below(folders: Iterable[str | os.PathLike[str]]) -> dict[str, int]:
    """Return ending of a name -> how many files with it below the folders are no images; hidden ones do not count."""
    endings = collections.Counter(
        path.suffix.lower() or path.name
        for folder in folders
        for path in Path(folder).rglob("*")
        if path.suffix.lower() not in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    return dict(sorted(endings.items()))


def left_out_sentence(others: Mapping[str, int]) -> str:
    """Return what `others_below` found as a sentence."""
    kinds = ", ".join(f"{count} {ending}" for ending, count in others.items())
    return f"left out, as no images that are read here: {kinds}"


def read_rgb(path: str | os.PathLike[str]) -> np.ndarray:
    """Return an image file as `[H, W, 3]`, RGB, uint8; raises `ReparamError` with the path and the reason."""
    path = Path(path)
    try:
        return decode_rgb(path.read_bytes())
    except FileNotFoundError as error:
        raise MissingFile(f"{path}: there is no such file") from error
    except OSError as error:
        raise ReparamError(f"{path}: it cannot be read ({error.strerror or error})") from error
    except ReparamError as error:
        raise error.at(str(path)) from error


def decode_rgb(data: bytes) -> np.ndarray:
    """Return the bytes of an image file as `[H, W, 3]`, RGB, uint8; raises `ReparamError` with the reason alone."""
    import cv2

    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    except cv2.error:
        image = None
    reason = _why_not_decoded(data) if image is None else why_misread(data)
    if reason:
        raise ReparamError(reason)
    return image[:, :, ::-1]


def why_unreadable(path: str | os.PathLike[str]) -> str | None:
    """Return why an image file cannot be read, or None where it can be."""
    try:
        read_rgb(path)
    except ReparamError as error:
        return str(error).removeprefix(f"{Path(path)}: ")
    return None


def why_misread(data: bytes) -> str | None:
    """Return why OpenCV decodes the bytes of a file to another picture than it shows, or None where it does not."""
    import cv2

    tiff = data[:4] in (b"II*\0", b"MM\0*")
    if tiff or (data[:4] == b"\x89PNG" and data[24:25] == b"\x10"):
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if values is not None and values.dtype not in (np.uint8, np.uint16):
            return f"its values are {values.dtype}, which have no fixed range; save it with 8 or 16 bits a channel"
        if values is not None and values.dtype == np.uint16 and 0 < values.max() < _DARK:
            return (
                f"it has 16 bits a channel and no value above {values.max()} of 65535, so it would be read as nearly "
                "black; save it with 8 bits"
            )
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and b"EXIF" in data and _orientation(data) > 1:
        return "its EXIF says that it is to be turned, which OpenCV leaves out in WEBP files; save it upright"
    return None


def _orientation(data: bytes) -> int:
    import io

    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # What is no EXIF, of an image that OpenCV decodes, says nothing.
        return 1


def _why_not_decoded(data: bytes) -> str:
    """Return what Pillow, which says more than OpenCV, has to say of what that cannot decode."""
    import io
    import warnings

    from PIL import Image

    if not data:
        return "it is empty"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                kind = image.format
                image.load()
    except Image.UnidentifiedImageError:
        return "it is no image"
    except Exception as error:  # Pillow's decoders raise whatever comes up.
        return f"it is damaged ({' '.join(str(error).split())})"
    if kind in ("JPEG", "PNG", "BMP", "WEBP"):
        return "it is damaged (its end is missing)" if kind == "PNG" else "it is damaged"
    return f"OpenCV does not decode this {kind} (mode {image.mode}); save it as PNG or JPEG"
