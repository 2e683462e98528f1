"""Label images with a released folder: a table of labels and probabilities, and a contact sheet."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddle_reparam.deploy.outputs import THRESHOLD
from paddle_reparam.deploy.predict import ImageClassifier, Prediction, find_images, format_predictions
from paddle_reparam.deploy.sheet import ON_A_SHEET, draw_sheet
from paddle_reparam.errors import ReparamError, exit_code, printable
from paddle_reparam.images import left_out_sentence, others_below


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code, 1 where the release or an image is not what it should be."""
    parser = argparse.ArgumentParser(
        description="Label images with a folder that tools/reparam.py made, or an ONNX file of one, of float32 or int8."
    )
    parser.add_argument("release", help="the released folder, or the ONNX file")
    parser.add_argument("images", nargs="+", help="images, and folders of images")
    parser.add_argument("--top", type=int, help="how many labels an image gets (5)")
    parser.add_argument(
        "--threshold",
        type=float,
        help=f"of networks with several labels an image: what a label must reach ({THRESHOLD})",
    )
    parser.add_argument(
        "--sheet", type=Path, metavar="PNG", help=f"draw the first {ON_A_SHEET} images with their labels into this file"
    )
    given = parser.parse_args(arguments)
    if given.top is not None and given.top < 1:
        parser.error(f"--top is {given.top}; it is 1 or more")
    if given.threshold is not None and not 0 <= given.threshold <= 1:
        parser.error(f"--threshold is {given.threshold:g}; it is a probability, 0 to 1")
    if given.sheet is not None and (
        given.sheet.suffix.lower() != ".png" or given.sheet.is_dir() or not given.sheet.parent.is_dir()
    ):
        parser.error(f"--sheet is {given.sheet}; give a .png file in a folder that exists")
    with exit_code() as result:
        _predict(given)
    return result[0]


def _predict(given: argparse.Namespace) -> None:
    classifier = ImageClassifier(given.release)
    failed: list[ReparamError] = []
    on_the_sheet: list[Prediction] = []
    labelled = 0

    def predictions() -> Iterator[Prediction]:
        nonlocal labelled
        for prediction in classifier.predict(paths, given.top, given.threshold, failed.append):
            labelled += 1
            if given.sheet is not None and len(on_the_sheet) < ON_A_SHEET:
                on_the_sheet.append(prediction)
            yield prediction

    for title, why in classifier.passed_over.items():
        print(printable(f"{given.release} is fastest by {title}, which is passed over: {why}"), file=sys.stderr)
    paths = find_images(given.images, failed.append)
    for line in format_predictions(predictions(), paths):
        print(line, flush=True)
    if on_the_sheet:
        undrawn = draw_sheet(given.sheet, on_the_sheet)
        first = f"the first {len(on_the_sheet)} of " if len(on_the_sheet) < labelled else ""
        print(f"written: {given.sheet}, {first}{labelled} images")
        if undrawn:
            some = printable(undrawn[:20])
            print(
                f"no font here has {some}, so the sheet has \\u and a number in their place; install one that "
                "has, such as Noto Sans CJK",
                file=sys.stderr,
            )
    others = others_below(place for place in given.images if Path(place).is_dir())
    if others:
        print(printable(left_out_sentence(others)), file=sys.stderr)
    if failed and not labelled and len(failed) == 1:
        raise failed[0]
    if failed:
        lines = "".join(f"\n  {printable(str(error))}" for error in failed)
        raise ReparamError(f"{len(failed)} of {labelled + len(failed)} are not labelled:{lines}")


if __name__ == "__main__":
    sys.exit(main())
