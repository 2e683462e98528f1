"""Bring images into the form that PaddleClas, PaddleSeg or PaddleDetection reads: lists of paths and labels, names."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddle_reparam.errors import exit_code
from paddle_reparam.training.datasets import Checked, draw_pairs, list_folder, write_digits
from paddle_reparam.training.scenes import write_scenes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for wrong usage, 1 where the data are not as they must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    digits = kinds.add_parser("digits", help="write scikit-learn's 1797 digits as image files, with list files")
    digits.add_argument("--output", required=True, help="the folder to make")
    folder = kinds.add_parser(
        "folder", help="write list files for images in <class>/, or train/<class>/ and val/<class>/"
    )
    folder.add_argument("--root", required=True, help="the folder that holds a folder for each class, or train and val")
    folder.add_argument(
        "--val-share",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="how much of each class is for validation, unless there are train and val (0.2)",
    )
    folder.add_argument("--skip-check", action="store_true", help="do not decode every image")
    pairs = kinds.add_parser("pairs", help="draw pairs of images of one class and of two, for tools/pairs.py")
    pairs.add_argument("--list", required=True, help="a list file, such as val_list.txt")
    pairs.add_argument("--output", required=True, help="the file to write")
    pairs.add_argument("--count", type=int, default=6000, help="how many pairs, half of them of one class (6000)")
    scenes = kinds.add_parser(
        "scenes", help="write scenes of several digits, with masks for segmentation and boxes for detection"
    )
    scenes.add_argument("--output", required=True, help="the folder to make")
    for kind in (digits, folder, pairs, scenes):
        kind.add_argument("--force", action="store_true", help="replace what an earlier run wrote")
    given = parser.parse_args(arguments)
    if given.kind == "folder" and not 0 < given.val_share < 1:
        parser.error(f"--val-share is {given.val_share:g}; it is a share, between 0 and 1")
    if given.kind == "pairs" and (given.count < 2 or given.count % 2):
        parser.error(f"--count is {given.count}; it is an even number, 2 or more")
    with exit_code() as result:
        if given.kind == "digits":
            print(write_digits(given.output, given.force))
        elif given.kind == "pairs":
            print(draw_pairs(given.list, given.output, given.count, given.force))
        elif given.kind == "scenes":
            print(write_scenes(given.output, given.force))
        else:
            print(list_folder(given.root, given.force, not given.skip_check, _show_progress, given.val_share))
    return result[0]


def _show_progress(checked: Checked, count: int) -> Checked:
    from tqdm import tqdm

    return tqdm(checked, "decode every image", count, unit=" images")


if __name__ == "__main__":
    sys.exit(main())
