"""Label images with a released folder: a table of labels and probabilities, and a contact sheet."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddle_reparam.deploy.export import THRESHOLD
from paddle_reparam.deploy.predict import ImageClassifier, draw_sheet, find_images, format_predictions
from paddle_reparam.errors import ReparamError, UsageError, exit_code


def main(arguments: "list[str] | None" = None) -> int:
    """Run the command; return its exit code, 1 where the folder or an image is not what it should be."""
    parser = argparse.ArgumentParser(description="Label images with a folder that tools/reparam.py made.")
    parser.add_argument("release", help="the released folder")
    parser.add_argument("images", help="an image, or a folder of images")
    parser.add_argument("--top", type=int, help="how many labels an image gets (5)")
    parser.add_argument(
        "--threshold",
        type=float,
        help=f"of networks with several labels an image: what a label must reach ({THRESHOLD})",
    )
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="draw the images with their labels into this file")
    given = parser.parse_args(arguments)
    if given.top is not None and given.top < 1:
        parser.error(f"--top is {given.top}; it is 1 or more")
    if given.threshold is not None and not 0 <= given.threshold <= 1:
        parser.error(f"--threshold is {given.threshold:g}; it is a probability, 0 to 1")
    if given.sheet is not None and not (given.sheet.suffix == ".png" and given.sheet.parent.is_dir()):
        parser.error(f"--sheet is {given.sheet}; give a .png file in a folder that exists")
    with exit_code() as result:
        classifier = ImageClassifier(given.release)
        paths = find_images(given.images)
        predictions, failed = [], []
        for path in paths:
            try:
                predictions.append(classifier.predict(path, given.top, given.threshold))
            except UsageError:
                raise
            except ReparamError as error:
                failed.append(error)
        if len(failed) == len(paths) == 1:
            raise failed[0]
        print(format_predictions(predictions))
        if given.sheet is not None and predictions:
            print(f"written: {given.sheet}, {draw_sheet(given.sheet, predictions)} of {len(predictions)} images")
        if failed:
            raise ReparamError(f"{len(failed)} of {len(paths)} images are not labelled, the first: {failed[0]}")
    return result[0]


if __name__ == "__main__":
    sys.exit(main())
