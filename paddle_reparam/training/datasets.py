"""Image folders in the form that PaddleClas reads: list files of `path label` lines, and a file of label names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import BY_FORCE, OutputExists, ReparamError, UsageError
from ..files import atomic_write, new_folder
from ..images import IMAGE_SUFFIXES, images_below, why_unreadable
from ..report import Report

TRAIN_LIST, VAL_LIST, LABEL_NAMES = "train_list.txt", "val_list.txt", "label_names.txt"
VAL_FOLDERS = ("val", "test")
CHECKED_AT_ONCE = 256


@dataclass
class DatasetReport(Report):
    """What was written: where, the names of the classes, and how many images are for training and for validation."""

    root: str
    classes: list[str]
    train: int
    val: int

    def __str__(self) -> str:
        return (
            f"{self.root}: {len(self.classes)} classes, {self.train} images for training, {self.val} for validation; "
            f"wrote {TRAIN_LIST}, {VAL_LIST}, {LABEL_NAMES}"
        )


def write_digits(output: str | os.PathLike[str], force: bool = False) -> DatasetReport:
    """Write scikit-learn's digits, 1797 grey images of 8x8 pixels, as `train|val/<class>/NNNN.png` with list files.

    A fifth of each class is for validation, always the same images. The folder appears whole or not at all. Raises
    `OutputExists` where it stands there already, unless `force`: then an earlier one of this function is replaced.
    """
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    output = Path(output)
    digits = load_digits()
    # The values are counts of set pixels, 0 to 16.
    pixels = np.rint(digits.images * (255 / 16)).astype("uint8")
    classes = [str(name) for name in digits.target_names]
    train, val = (
        {f"{name}/{classes[digits.target[i]]}/{i:04d}.png": i for i in sorted(indices)}
        for name, indices in zip(
            ("train", "val"),
            train_test_split(np.arange(len(pixels)), test_size=0.2, stratify=digits.target, random_state=0),
        )
    )
    lists = _lists(classes, *([(path, digits.target[i]) for path, i in part.items()] for part in (train, val)))
    _refuse_to_replace(output, force, lists[VAL_LIST])
    with new_folder(Path(os.path.realpath(output)), output, replace=output.exists()) as folder:
        for path, i in (train | val).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[i]).save(folder / path)
        _write_whole(folder, lists)
    return DatasetReport(str(output), classes, len(train), len(val))


def list_folder(
    root: str | os.PathLike[str],
    force: bool = False,
    check_images: bool = True,
    progress: Callable[[Sequence[int]], Iterable[int]] = lambda starts: starts,
) -> DatasetReport:
    """Write PaddleClas' list files into `root`, which holds `train/<class>/...` and `val/<class>/...` (or `test`).

    Classes are numbered in the order of their names. With `check_images` every image is decoded: PaddleClas puts a
    random other image in the place of one that it cannot read. `progress` wraps the steps of `CHECKED_AT_ONCE` images.
    Raises `OutputExists` where list files stand there already, unless `force`, and `ReparamError` for folders that are
    missing, empty or without images, classes that differ, paths with blanks, and unreadable images. Nothing is then
    written.
    """
    root = Path(root)
    existing = [name for name in (TRAIN_LIST, VAL_LIST, LABEL_NAMES) if (root / name).exists()]
    if existing and not force:
        raise OutputExists(f"{root / existing[0]} exists already and is kept; {BY_FORCE}")
    if not root.is_dir():
        raise UsageError(f"{root} is no folder; give the one that holds train and {' or '.join(VAL_FOLDERS)}")
    for_validation = next((name for name in VAL_FOLDERS if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or for_validation is None:
        raise ReparamError(
            f"{root} must hold the folders train and {' or '.join(VAL_FOLDERS)}, with a folder per class"
        )
    classes = _class_names(root / "train")
    _compare_classes(root, classes, for_validation)
    train, val = _entries(root, "train", classes), _entries(root, for_validation, classes)
    if check_images:
        _check_images([root / path for path, _ in (*train, *val)], progress)
    _write_whole(root, _lists(classes, train, val))
    return DatasetReport(str(root), classes, len(train), len(val))


def _class_names(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise ReparamError(f"{folder} holds no folders; it needs one for each class, with the images of the class")
    return names


def _compare_classes(root: Path, classes: list[str], for_validation: str) -> None:
    train, val = set(classes), set(_class_names(root / for_validation))
    differences = [
        f"only {root / folder} has {', '.join(sorted(names))}"
        for folder, names in (("train", train - val), (for_validation, val - train))
        if names
    ]
    if differences:
        raise ReparamError(f"the classes differ: {'; '.join(differences)}: make both have the same folders")


def _entries(root: Path, name: str, classes: list[str]) -> list[tuple[str, int]]:
    entries = []
    for label, class_name in enumerate(classes):
        folder = root / name / class_name
        found = images_below(folder)
        if not found:
            raise ReparamError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}); fill it, or remove the class")
        entries += [(p.relative_to(root).as_posix(), label) for p in found]
    for path, _ in entries:
        if len(path.split()) != 1:
            raise ReparamError(
                f"{root / path}: a path with a blank; PaddleClas splits a line of a list at its blanks: rename it"
            )
    return entries


def _check_images(paths: list[Path], progress: Callable[[Sequence[int]], Iterable[int]]) -> None:
    broken: list[str] = []
    # OpenCV decodes without Python's lock, so threads help.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in progress(range(0, len(paths), CHECKED_AT_ONCE)):
            some = paths[start : start + CHECKED_AT_ONCE]
            broken += [f"{path}: {why}" for path, why in zip(some, pool.map(why_unreadable, some)) if why]
    if broken:
        named = "\n".join(broken)
        raise ReparamError(f"{len(broken)} of {len(paths)} images cannot be read; replace or remove:\n{named}")


def _lists(classes: list[str], train: list[tuple[str, int]], val: list[tuple[str, int]]) -> dict[str, str]:
    """Return the contents of the three files from pairs of path and label."""
    lines = {
        TRAIN_LIST: [f"{path} {label}" for path, label in train],
        VAL_LIST: [f"{path} {label}" for path, label in val],
        LABEL_NAMES: [f"{label} {name}" for label, name in enumerate(classes)],
    }
    return {name: "\n".join(of_file) + "\n" for name, of_file in lines.items()}


def _write_whole(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        atomic_write(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))


def _refuse_to_replace(output: Path, force: bool, val_list: str) -> None:
    """Let only an empty folder, or with `force` one that holds this very validation list, be replaced."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not force:
        raise OutputExists(f"{output} exists already and is kept; name another folder, or {BY_FORCE}")
    earlier = output / VAL_LIST
    if not earlier.is_file() or earlier.read_text(encoding="utf-8", errors="replace") != val_list:
        raise OutputExists(f"{output} is not what this command wrote, so it is kept; name another folder")
