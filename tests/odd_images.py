"""Image files of every kind that people have, and what they show."""

from __future__ import annotations

import io

import cv2
import numpy as np
from PIL import Image

_generator = np.random.default_rng(0)
#: `[H, W, 3]`, RGB, uint8: what the files of `READ` show, in grey where they are grey.
PICTURE = cv2.resize(_generator.integers(0, 256, (4, 6, 3), dtype=np.uint8), (60, 40))
GREY = np.asarray(Image.fromarray(PICTURE).convert("L"))
_EXIF_TURNED = Image.Exif()
_EXIF_TURNED[0x0112] = 6


def encoded(pixels: np.ndarray, kind: str, mode: str | None = None, **options) -> bytes:
    """Return an image file; `mode` is Pillow's, which the pixels are turned into first."""
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


def _see_through() -> np.ndarray:
    """Return the picture with a share of it transparent, the colours below it still there."""
    alpha = np.full(GREY.shape, 255, "uint8")
    alpha[:20], alpha[20:30] = 0, 128
    return np.dstack([PICTURE, alpha])


def _wide(suffix: str) -> bytes:
    """Return the picture with 16 bits a channel, which Pillow cannot write."""
    return cv2.imencode(suffix, PICTURE[:, :, ::-1].astype("uint16") * 257)[1].tobytes()


def _two_frames(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, kind, save_all=True, append_images=[Image.fromarray(255 - PICTURE)])
    return buffer.getvalue()


#: Name of a file -> its bytes, and the picture that it shows. JPEG and lossy WEBP show nearly that.
READ: dict[str, tuple[bytes, np.ndarray]] = {
    "rgb.png": (encoded(PICTURE, "PNG"), PICTURE),
    "rgb.JPG": (encoded(PICTURE, "JPEG", quality=95), PICTURE),
    "progressive.jfif": (encoded(PICTURE, "JPEG", quality=95, progressive=True), PICTURE),
    "turned.jpeg": (encoded(PICTURE, "JPEG", quality=95, exif=_EXIF_TURNED), np.rot90(PICTURE, -1)),
    "cmyk.jpg": (encoded(PICTURE, "JPEG", "CMYK", quality=95), PICTURE),
    "cmyk.tif": (encoded(PICTURE, "TIFF", "CMYK"), PICTURE),
    "rgb.bmp": (encoded(PICTURE, "BMP"), PICTURE),
    "rgb.webp": (encoded(PICTURE, "WEBP", quality=95), PICTURE),
    "lossless.webp": (encoded(PICTURE, "WEBP", lossless=True), PICTURE),
    "rgb.tiff": (encoded(PICTURE, "TIFF", compression="tiff_lzw"), PICTURE),
    "two pages.tif": (_two_frames("TIFF"), PICTURE),
    "two frames.webp": (_two_frames("WEBP"), PICTURE),
    "grey.png": (encoded(GREY, "PNG"), np.dstack([GREY] * 3)),
    "grey.jpg": (encoded(GREY, "JPEG", quality=95), np.dstack([GREY] * 3)),
    "grey 16 bits.png": (encoded(GREY.astype("uint16") * 257, "PNG"), np.dstack([GREY] * 3)),
    "grey 16 bits.tif": (encoded(GREY.astype("uint16") * 257, "TIFF"), np.dstack([GREY] * 3)),
    "16 bits.png": (_wide(".png"), PICTURE),
    "16 bits.tiff": (_wide(".tiff"), PICTURE),
    "grey and alpha.png": (encoded(GREY, "PNG", "LA"), np.dstack([GREY] * 3)),
    "rgba.png": (encoded(_see_through(), "PNG"), PICTURE),
    "rgba.webp": (encoded(_see_through(), "WEBP", lossless=True, exact=True), PICTURE),
    "palette.png": (
        encoded(PICTURE, "PNG", "P"),
        np.asarray(Image.fromarray(PICTURE).convert("P").convert("RGB")),
    ),
    "猫 的 照片.png": (encoded(PICTURE, "PNG"), PICTURE),
}

#: Name of a file -> its bytes, and what is wrong with it.
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty.jpg": (b"", "it is empty"),
    "text.jpg": (b"<html>not found</html>", "it is no image"),
    "cut.jpg": (encoded(PICTURE, "JPEG")[:-200], r"it is damaged \(image file is truncated"),
    # Pillow reads it.
    "no end.png": (encoded(PICTURE, "PNG")[:-12], "it is damaged"),
    "turned.webp": (encoded(PICTURE, "WEBP", exif=_EXIF_TURNED), "to be turned, .* save it upright"),
    "float.tif": (encoded(GREY.astype("float32") / 255, "TIFF"), "does not decode this TIFF .*; save it as"),
    "float rgb.tif": (
        cv2.imencode(".tiff", PICTURE.astype("float32") / 255)[1].tobytes(),
        "its values are float32, .* save it with 8 or 16 bits",
    ),
    "12 bits.png": (encoded(GREY.astype("uint16") * 16, "PNG"), r"no value above \d+ of 65535, .*black; save it"),
}
