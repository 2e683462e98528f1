"""Label images with a released folder: a table of labels and probabilities, and a contact sheet."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddle_reparam.errors import exit_code
from paddle_reparam.predict import ImageClassifier, draw_sheet, find_images, format_predictions


def main(arguments: "list[str] | None" = None) -> int:
    """Run the command; return its exit code, 1 where the folder or an image is not what it should be."""
    parser = argparse.ArgumentParser(description="Label images with a folder that tools/reparam.py made.")
    parser.add_argument("release", help="the released folder")
    parser.add_argument("images", help="an image, or a folder of images")
    parser.add_argument("--top", type=int, default=5, help="how many labels an image gets (5)")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="draw the images with their labels into this file")
    given = parser.parse_args(arguments)
    if given.top < 1:
        parser.error(f"--top is {given.top}; it is 1 or more")
    if given.sheet is not None and not (given.sheet.suffix == ".png" and given.sheet.parent.is_dir()):
        parser.error(f"--sheet is {given.sheet}; give a .png file in a folder that exists")
    with exit_code() as result:
        classifier = ImageClassifier(given.release)
        predictions = [classifier.predict(path, given.top) for path in find_images(given.images)]
        print(format_predictions(predictions))
        if given.sheet is not None:
            print(f"written: {given.sheet}, {draw_sheet(given.sheet, predictions)} of {len(predictions)} images")
    return result[0]


if __name__ == "__main__":
    sys.exit(main())
