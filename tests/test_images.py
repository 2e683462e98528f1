"""Image files of every kind: training, evaluation and prediction see the same picture, or refuse it with a reason."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from odd_images import PICTURE, READ, REFUSED, encoded

from paddle_reparam import images, ppcls
from paddle_reparam.errors import MissingFile, ReparamError


@pytest.fixture(scope="module")
def decode():
    """Return what PaddleClas' data sets and its Infer make of the bytes of a file."""
    ppcls.setup()
    from ppcls.data import preprocess

    return preprocess.DecodeImage(to_rgb=True, channel_first=False)


@pytest.mark.parametrize("name", READ)
def test_a_file_is_read_as_the_picture_that_it_shows(name, decode, tmp_path):
    data, picture = READ[name]
    (tmp_path / name).write_bytes(data)
    image = images.read_rgb(tmp_path / name)
    assert (image.dtype, image.shape) == (np.uint8, picture.shape)
    difference = np.abs(image.astype(int) - picture).mean()
    lossy = data[:2] == b"\xff\xd8" or name in ("rgb.webp", "two frames.webp")
    assert difference <= (5 if lossy else 0)
    np.testing.assert_array_equal(decode(data), image, "PaddleClas reads another picture")
    assert images.why_unreadable(tmp_path / name) is None
    assert images.images_below(tmp_path) == [tmp_path / name]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_rightly_is_refused_with_its_reason(name, decode, tmp_path):
    data, reason = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ReparamError, match=reason) as error:
        images.read_rgb(path)
    assert str(error.value) == f"{path}: {images.why_unreadable(path)}"
    assert "\n" not in str(error.value)
    with pytest.raises(Exception):  # noqa: B017, PT011 - which is PaddleClas' business; the run names the reason above
        decode(data)


def test_a_black_image_of_16_bits_is_one(tmp_path):
    (tmp_path / "black.png").write_bytes(encoded(np.zeros([4, 4], "uint16"), "PNG"))
    assert not images.read_rgb(tmp_path / "black.png").any()


def test_exif_that_is_none_turns_nothing(tmp_path):
    # One entry, the orientation, which is a text.
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abc\0\0\0\0\0"
    (tmp_path / "odd.webp").write_bytes(encoded(PICTURE, "WEBP", lossless=True, exif=exif))
    np.testing.assert_array_equal(images.read_rgb(tmp_path / "odd.webp"), PICTURE)


def test_what_a_newer_opencv_decodes_is_read(tmp_path, monkeypatch):
    """OpenCV 4.11 knows no GIF."""
    path = tmp_path / "gif.jpg"
    path.write_bytes(encoded(PICTURE, "GIF"))
    monkeypatch.setattr(cv2, "imdecode", lambda data, flag: None)
    assert images.why_unreadable(path) == "OpenCV does not decode this GIF (mode P); save it as PNG or JPEG"
    monkeypatch.setattr(cv2, "imdecode", lambda data, flag: PICTURE[:, :, ::-1])
    np.testing.assert_array_equal(images.read_rgb(path), PICTURE)


def test_files_that_are_not_there_or_not_for_us(tmp_path, monkeypatch):
    with pytest.raises(MissingFile, match="there is no such file"):
        images.read_rgb(tmp_path / "1.png")
    assert images.why_unreadable(tmp_path).startswith("it cannot be read (")
    (tmp_path / "1.png").write_bytes(READ["rgb.png"][0])

    def refuse(path):
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert images.why_unreadable(tmp_path / "1.png") == "it cannot be read (Permission denied)"


def test_images_below_a_folder_are_those_that_people_see(tmp_path):
    for name in ("b/2.JPG", "b/a b.webp", "1.tif", "notes.txt", "b/3.gif", "._1.jpg", ".thumbs/4.jpg", "猫/猫.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    found = [path.relative_to(tmp_path).as_posix() for path in images.images_below(tmp_path)]
    assert found == ["1.tif", "b/2.JPG", "b/a b.webp", "猫/猫.png"]
