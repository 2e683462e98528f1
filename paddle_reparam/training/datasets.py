"""Image folders in the form that PaddleClas reads: lists of paths and labels, and a file of the labels' names.

A tab stands behind a path, so that paths may hold blanks; a config for them has `delimiter: "\\t"`.
"""

from __future__ import annotations

import collections
import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Optional

import numpy as np

from ..errors import BY_FORCE, MissingFile, OutputExists, ReparamError, UsageError, printable
from ..files import atomic_write, new_folder
from ..images import IMAGE_SUFFIXES, images_below, left_out_sentence, others_below, why_unreadable
from ..report import Report

TRAIN_LIST, VAL_LIST, LABEL_NAMES = "train_list.txt", "val_list.txt", "label_names.txt"
DELIMITER = "\t"
#: Names of the folders for training and for validation, in small or large letters; of several the first counts.
TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("val", "valid", "validation", "test", "testing")
_CHECKED_AT_ONCE = 256
#: Pairs are drawn from so many images at most: all pairs of them are in the memory, 130 MB.
_COMPARED = 4_000

#: Pairs of an image and why it cannot be read, if so.
Checked = Iterable[tuple[Path, Optional[str]]]


@dataclass
class DatasetReport(Report):
    """What was written: where, the names of the classes, and how many images are for training and for validation.

    `counts` has these two numbers for each class, `left_out` how many files that are no images were found, by the
    ending of their names.
    """

    root: str
    classes: list[str]
    train: int
    val: int
    counts: list[tuple[int, int]] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        sums = [sum(pair) for pair in self.counts]
        lines = [
            f"{self.root}: {len(self.classes)} classes, {self.train} images for training, {self.val} for validation; "
            f"a class has {min(sums)} to {max(sums)}",
            f"wrote {TRAIN_LIST}, {VAL_LIST}, {LABEL_NAMES}; a config for them has class_num: {len(self.classes)} and "
            'delimiter: "\\t"',
        ]
        lacking = [name for name, (_, val) in zip(self.classes, self.counts) if not val]
        if lacking:
            lines.append(f"without an image for validation, as they have one only: {', '.join(lacking)}")
        if self.left_out:
            lines.append(left_out_sentence(self.left_out))
        return "\n".join(map(printable, lines))


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
    entries = [[(path, int(digits.target[i])) for path, i in part.items()] for part in (train, val)]
    lists = _lists(classes, *entries)
    _refuse_to_replace(output, force, lists[VAL_LIST])
    with new_folder(Path(os.path.realpath(output)), output, replace=output.exists()) as folder:
        for path, i in (train | val).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[i]).save(folder / path)
        _write_whole(folder, lists)
    return _report(output, classes, *entries, {})


def list_folder(
    root: str | os.PathLike[str],
    force: bool = False,
    check_images: bool = True,
    progress: Callable[[Checked, int], Checked] = lambda checked, count: checked,
    val_share: float = 0.2,
) -> DatasetReport:
    """Write PaddleClas' list files into `root`, which holds a folder for each class.

    Or it holds `train` and `val` (or what else `TRAIN_FOLDERS` and `VAL_FOLDERS` name) with such folders, whose images
    stay apart as they are. Otherwise `val_share` of each class are for validation, at least one image where there are
    two: always the same ones, and mostly the same when images were added.

    Classes are numbered in the order of their names. With `check_images` every image is decoded: PaddleClas puts a
    random other image in the place of one that it cannot read. `progress` shows how far that is, of so many images.
    Raises `OutputExists` where list files stand there already, unless `force`, and `ReparamError` for folders that are
    missing, empty or without images, classes that differ, and all the images that cannot be read or listed. Nothing is
    then written.
    """
    root = Path(root)
    existing = [name for name in (TRAIN_LIST, VAL_LIST, LABEL_NAMES) if (root / name).exists()]
    if existing and not force:
        raise OutputExists(f"{root / existing[0]} exists already and is kept; {BY_FORCE}")
    if not root.is_dir():
        raise UsageError(f"{root} is no folder; give the one that holds a folder of images for each class")
    given = _given_parts(root)
    if given:
        classes = _compare_classes(root, given)
        train, val = (_entries(root, name, classes) for name in given)
    else:
        classes = _class_names(root)
        train, val = _split(_entries(root, "", classes), val_share)
    _refuse_unlistable(root, [path for path, _ in (*train, *val)])
    if check_images:
        _check_images(sorted(root / path for path, _ in (*train, *val)), progress)
    _write_whole(root, _lists(classes, train, val))
    others = others_below([root / part / name for part in given or (".",) for name in classes])
    return _report(root, classes, train, val, others)


def draw_pairs(listed: str | os.PathLike[str], output: str | os.PathLike[str], count: int, force: bool = False) -> str:
    """Write `count` pairs of the images of a list file, half of one class and half of two, and say what was written.

    Lines are two paths and 1 or 0, between tabs. No pair is there twice, and the same list gives the same pairs.
    Raises `UsageError` for a file that would be replaced, `ReparamError` for a list that is none or has too few images.
    """
    if os.path.lexists(output) and not force:
        raise OutputExists(f"{output} exists already and is kept; name another file, or {BY_FORCE}")
    if not os.path.isfile(listed):
        raise MissingFile(f"there is no list file {listed}")
    lines = Path(listed).read_text(encoding="utf-8", errors="replace").splitlines()
    entries = [line.rpartition(DELIMITER)[::2] for line in lines if line.strip()]
    if not all(path and label for path, label in entries):
        raise ReparamError(f"{listed} is no list file: its lines are a path, a tab and the number of a class")
    generator = np.random.default_rng(0)
    if len(entries) > _COMPARED:
        entries = [entries[i] for i in sorted(generator.choice(len(entries), _COMPARED, replace=False))]
    labels = np.array([label for _, label in entries])
    pairs: dict[tuple[int, int], bool] = {}
    for same in (True, False):
        possible = np.argwhere(np.triu((labels[:, None] == labels) == same, 1))
        if len(possible) < count // 2:
            kind = "of one class" if same else "of two classes"
            raise ReparamError(f"{listed}: there are {len(possible)} pairs {kind}, not {count // 2}; ask for fewer")
        drawn = generator.choice(len(possible), count // 2, replace=False)
        pairs.update(((int(a), int(b)), same) for a, b in possible[drawn])
    text = "".join(
        DELIMITER.join([entries[a][0], entries[b][0], str(int(same))]) + "\n" for (a, b), same in pairs.items()
    )
    atomic_write(output, lambda path: path.write_text(text, encoding="utf-8"))
    return printable(f"wrote {output}: {len(pairs)} pairs, half of them of one class")


def _report(
    root: Path, classes: list[str], train: list[tuple[str, int]], val: list[tuple[str, int]], left_out: dict[str, int]
) -> DatasetReport:
    counts = [collections.Counter(label for _, label in part) for part in (train, val)]
    of_each = [(counts[0][label], counts[1][label]) for label in range(len(classes))]
    return DatasetReport(str(root), classes, len(train), len(val), of_each, left_out)


def _given_parts(root: Path) -> tuple[str, str] | None:
    """Return the names of the folders for training and validation, or None where the folders are those of classes.

    A class may have such a name as well, as trains do.
    """
    folders = {name.lower(): name for name in _folders(root)}
    train, val = ([folders[name] for name in names if name in folders] for names in (TRAIN_FOLDERS, VAL_FOLDERS))
    if train and val:
        return train[0], val[0]
    lone = [name for name in train + val if _folders(root / name)]
    if lone:
        raise ReparamError(
            f"{root} has the folder {lone[0]} with folders in it, and needs both {TRAIN_FOLDERS[0]} and "
            f"{VAL_FOLDERS[0]}; to have its images split give {root / lone[0]} itself"
        )
    return None


def _folders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _class_names(folder: Path) -> list[str]:
    names = _folders(folder)
    if not names:
        raise ReparamError(f"{folder} holds no folders; it needs one for each class, with the images of the class")
    if len(names) == 1:
        raise ReparamError(f"{folder} holds one folder only, {names[0]}; a class is told from another, so give two")
    return names


def _compare_classes(root: Path, parts: tuple[str, str]) -> list[str]:
    """Return the classes of both folders; raises `ReparamError` where they differ."""
    train, val = (_class_names(root / part) for part in parts)
    differences = [
        f"only {root / part} has {', '.join(sorted(names))}"
        for part, names in zip(parts, (set(train) - set(val), set(val) - set(train)))
        if names
    ]
    if differences:
        raise ReparamError(f"the classes differ: {'; '.join(differences)}: make both have the same folders")
    return train


def _entries(root: Path, part: str, classes: list[str]) -> list[tuple[str, int]]:
    """Return the path in `root` and the label of each image of the classes, whose folders are in a part of it."""
    entries = []
    for label, class_name in enumerate(classes):
        folder = root / part / class_name
        found = images_below(folder)
        if not found:
            raise ReparamError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}); fill it, or remove the class")
        entries += [(path.relative_to(root).as_posix(), label) for path in found]
    return entries


def _split(entries: list[tuple[str, int]], share: float) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Return the entries for training and for validation, in each class by the order of their paths' hashes."""
    of_class = collections.defaultdict(list)
    for path, label in entries:
        of_class[label].append((hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest(), path))
    chosen = set()
    for hashed in of_class.values():
        count = min(max(1, round(share * len(hashed))), len(hashed) - 1)
        chosen |= {path for _, path in sorted(hashed)[:count]}
    if not chosen:
        raise ReparamError("no class has two images, so none is left to validate with; add images")
    return [entry for entry in entries if entry[0] not in chosen], [entry for entry in entries if entry[0] in chosen]


def _refuse_unlistable(root: Path, paths: list[str]) -> None:
    wrong = []
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError:
            wrong.append(path)
        else:
            if DELIMITER in path or len(path.splitlines()) != 1:
                wrong.append(path)
    if wrong:
        named = "\n".join(printable(str(root / path)) for path in wrong)
        raise ReparamError(
            f"{len(wrong)} paths hold a tab, the end of a line or what is no UTF-8, which no list can; rename:\n{named}"
        )


def _check_images(paths: list[Path], progress: Callable[[Checked, int], Checked]) -> None:
    import cv2

    def checked() -> Iterator[tuple[Path, str | None]]:
        # OpenCV decodes without Python's lock, so threads help.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(paths), _CHECKED_AT_ONCE):
                some = paths[start : start + _CHECKED_AT_ONCE]
                yield from zip(some, pool.map(why_unreadable, some))

    # OpenCV would print what each of them is named with below.
    level = cv2.setLogLevel(0)
    try:
        broken = [f"{path}: {why}" for path, why in progress(checked(), len(paths)) if why]
    finally:
        cv2.setLogLevel(level)
    if broken:
        named = "\n".join(broken)
        raise ReparamError(f"{len(broken)} of {len(paths)} images cannot be read; replace or remove:\n{named}")


def _lists(classes: list[str], train: list[tuple[str, int]], val: list[tuple[str, int]]) -> dict[str, str]:
    """Return the contents of the three files from pairs of path and label."""

    def listed(entries: list[tuple[str, int]]) -> list[str]:
        # PaddleClas strips each line, so a path does not begin with a blank.
        return [f"{path if path == path.lstrip() else f'./{path}'}{DELIMITER}{label}" for path, label in entries]

    lines = {
        TRAIN_LIST: listed(train),
        VAL_LIST: listed(val),
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
    if not earlier.is_file() or earlier.read_text(encoding="utf-8", errors="replace").split() != val_list.split():
        raise OutputExists(f"{output} is not what this command wrote, so it is kept; name another folder")
