"""Do two images show the same person? The accuracy over a list of pairs, by LFW's protocol.

The list is LFW's own `pairs.txt`, or has lines of two paths and 1 for the same or 0 for another, between tabs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MissingFile, NothingProven, ReparamError
from ..files import Folder
from ..images import IMAGE_SUFFIXES
from ..report import Report, format_table
from .recognition import FeatureExtractor

#: As many as LFW has.
FOLDS = 10


@dataclass(frozen=True)
class Pair:
    """Two images, whether they show the same, and the number of the fold that the list puts them in, or None."""

    first: Path
    second: Path
    same: bool
    fold: int | None = None


@dataclass
class PairsReport(Report):
    """`accuracy` is the mean over the folds, each by the threshold that is best on all others, and `standard_error`
    that of the mean. `threshold` is the best one on all pairs: to be used, and not to be measured by.
    """

    pairs: int
    same: int
    accuracy: float
    standard_error: float
    threshold: float
    thresholds: list[float]
    accuracies: list[float]

    def __str__(self) -> str:
        rows = [
            [number, f"{threshold:.4f}", f"{accuracy:.2%}"]
            for number, (threshold, accuracy) in enumerate(zip(self.thresholds, self.accuracies), 1)
        ]
        table = format_table(["fold", "threshold of the others", "accuracy"], rows)
        return (
            f"{table}\n{self.pairs} pairs, {self.same} of the same: {self.accuracy:.2%} +- {self.standard_error:.2%} "
            f"(mean and standard error of {len(rows)} folds)\nthe best threshold on all pairs: {self.threshold:.4f}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The list


def read_pairs(path: Folder, root: Folder) -> list[Pair]:
    """Return the pairs of a list, whose images lie below `root`.

    Raises `MissingFile` for a list or an image that is not there, and `ReparamError`, with the line, for a list that
    is none.
    """
    if not Path(path).is_file():
        raise MissingFile(f"there is no list of pairs {path}")
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ReparamError(f"{path}: it cannot be read as text in UTF-8") from error
    numbered = [(number, line.split("\t") if "\t" in line else line.split()) for number, line in enumerate(lines, 1)]
    numbered = [(number, cells) for number, cells in numbered if any(cells)]
    if not numbered:
        raise ReparamError(f"{path} holds no pair")
    head = numbered[0][1]
    of_lfw = len(head) in (1, 2) and all(cell.strip().isdecimal() for cell in head)
    pairs = []
    for place, (number, cells) in enumerate(numbered[1:] if of_lfw else numbered):
        cells = [cell.strip() for cell in cells]
        # A fold of LFW's has as many pairs of one person as of two.
        fold = place // (2 * max(1, int(head[1]))) if of_lfw and len(head) == 2 else None
        pair = _of_lfw(cells, Path(root), fold) if of_lfw else _of_paths(cells, Path(root))
        if pair is None:
            what = "NAME 1 2, or NAME 1 OTHER 2" if of_lfw else "PATH, PATH and 1 or 0, between tabs"
            raise ReparamError(f"{path}, line {number}: it is no {what}")
        for image in (pair.first, pair.second):
            if not image.is_file():
                raise MissingFile(f"{path}, line {number}: there is no image {image}")
        pairs.append(pair)
    return pairs


def _of_paths(cells: Sequence[str], root: Path) -> Pair | None:
    if len(cells) != 3 or cells[2] not in ("0", "1"):
        return None
    return Pair(root / cells[0], root / cells[1], cells[2] == "1")


def _of_lfw(cells: Sequence[str], root: Path, fold: int | None) -> Pair | None:
    if len(cells) not in (3, 4) or not (cells[1].isdecimal() and cells[-1].isdecimal()):
        return None
    other = cells[0] if len(cells) == 3 else cells[2]
    first, second = _image_of_lfw(root, cells[0], cells[1]), _image_of_lfw(root, other, cells[-1])
    return Pair(first, second, len(cells) == 3, fold)


def _image_of_lfw(root: Path, name: str, number: str) -> Path:
    """Return the image `NAME/NAME_0001` of a person with the suffix that it has; LFW's is .jpg, aligned copies vary."""
    path = root / name / f"{name}_{int(number):04}.jpg"
    return next((found for suffix in IMAGE_SUFFIXES if (found := path.with_suffix(suffix)).is_file()), path)


# ---------------------------------------------------------------------------------------------------------------------
# The measure


def folds_of(pairs: Sequence[Pair]) -> np.ndarray:
    """Return the fold of each pair: the list's own, or ten with as many pairs of the same, in the list's order.

    Raises `NothingProven` where a fold would have no pair of the same, or none of others.
    """
    same = np.array([pair.same for pair in pairs], bool)
    if pairs and all(pair.fold is not None for pair in pairs):
        folds = np.array([pair.fold for pair in pairs])
    else:
        folds = np.zeros(len(pairs), int)
        for kind in (same, ~same):
            folds[kind] = np.arange(kind.sum()) * FOLDS // max(1, kind.sum())
    kinds = [{bool(kind) for kind in same[folds == fold]} for fold in np.unique(folds)]
    if len(kinds) < 2 or any(len(kind) < 2 for kind in kinds):
        raise NothingProven(
            f"{int(same.sum())} pairs of the same and {int((~same).sum())} of others fill no folds with both; "
            f"list {FOLDS} of each, or more"
        )
    return folds


def best_threshold(cosines: np.ndarray, same: np.ndarray) -> float:
    """Return the cosine from which on two images count as the same, with the fewest errors; the lowest of several.

    It lies midway between two that were measured.
    """
    values = np.unique(cosines)
    candidates = np.concatenate([[values[0]], (values[1:] + values[:-1]) / 2, [values[-1] + 1e-6]])
    # Of the same, those below a threshold are wrong; of others, those from it on.
    wrong = np.searchsorted(np.sort(cosines[same]), candidates, "left")
    wrong = wrong + (~same).sum() - np.searchsorted(np.sort(cosines[~same]), candidates, "left")
    return float(candidates[wrong.argmin()])


def measure_pairs(cosines: np.ndarray, same: np.ndarray, folds: np.ndarray) -> PairsReport:
    """Return the accuracy over pairs with these cosines: each fold by the threshold that is best on all others."""
    thresholds, accuracies = [], []
    for fold in np.unique(folds):
        here = folds == fold
        thresholds.append(best_threshold(cosines[~here], same[~here]))
        accuracies.append(float(((cosines[here] >= thresholds[-1]) == same[here]).mean()))
    error = float(np.std(accuracies, ddof=1)) / math.sqrt(len(accuracies))
    return PairsReport(
        len(same), int(same.sum()), float(np.mean(accuracies)), error, best_threshold(cosines, same), thresholds,
        accuracies,
    )  # fmt: skip


def evaluate_pairs(
    extractor: FeatureExtractor,
    pairs: Sequence[Pair],
    watch: Callable[[Iterable[Any]], Iterable[Any]] = lambda paths: paths,
) -> PairsReport:
    """Return the accuracy of a released network over pairs; `watch` is given all images, to show how far it is.

    Raises `ReparamError` for an image that cannot be read, and `NothingProven` for too few pairs.
    """
    folds = folds_of(pairs)
    images = list(dict.fromkeys(path for pair in pairs for path in (pair.first, pair.second)))

    def failed(error: ReparamError) -> None:
        raise error

    features = dict(extractor.features(watch(images), failed))
    cosines = np.array([features[pair.first] @ features[pair.second] for pair in pairs], np.float64)
    return measure_pairs(cosines, np.array([pair.same for pair in pairs]), folds)
