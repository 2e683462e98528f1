"""Label images, or their pixels, with a released folder, or compare them by the features that it makes of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddle_reparam.deploy.outputs import THRESHOLD
from paddle_reparam.deploy.predict import ImageClassifier, Prediction, find_images, format_predictions
from paddle_reparam.deploy.recognition import FeatureExtractor, cosine_of_two, gives_features, read_gallery
from paddle_reparam.deploy.segmentation import Segmenter, empty_folder, segments, write_mask
from paddle_reparam.deploy.sheet import ON_A_SHEET, draw_sheet
from paddle_reparam.errors import MissingFile, ReparamError, UsageError, exit_code, printable
from paddle_reparam.images import left_out_sentence, others_below
from paddle_reparam.report import format_table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code, 1 where the release or an image is not what it should be."""
    parser = argparse.ArgumentParser(
        description="Label images with a folder that tools/reparam.py made, or an ONNX file of one, of float32 or "
        "int8. With one of a recognition network, compare two images, or find each in a gallery; with one that "
        "tools/segment.py exported, write their masks."
    )
    parser.add_argument("release", help="the released folder, or the ONNX file")
    parser.add_argument("images", nargs="*", help="images, and folders of images")
    parser.add_argument("--top", type=int, help="how many labels, or images of the gallery, an image gets (5)")
    parser.add_argument(
        "--threshold",
        type=float,
        help=f"of networks with several labels an image: what a label must reach ({THRESHOLD}); of two images: what "
        "their cosine must reach to be of the same",
    )
    parser.add_argument(
        "--sheet", type=Path, metavar="PNG", help=f"draw the first {ON_A_SHEET} images with their labels into this file"
    )
    parser.add_argument(
        "--masks", metavar="FOLDER", help="of segmentation networks: write each mask, and an overlay, into this folder"
    )
    searching = parser.add_argument_group("of recognition networks")
    searching.add_argument("--gallery", metavar="PLACE", help="the known images: a folder, or an index file of one")
    searching.add_argument(
        "--index", metavar="FILE.npz", help="write the gallery's features there, for the next --gallery"
    )
    given = parser.parse_args(arguments)
    if not given.images and given.index is None:
        parser.error("give images, and folders of images")
    if given.index is not None and (given.gallery is None or not Path(given.gallery).is_dir()):
        parser.error("--index is made of a folder of images; name it with --gallery")
    if given.top is not None and given.top < 1:
        parser.error(f"--top is {given.top}; it is 1 or more")
    if given.threshold is not None and not 0 <= given.threshold <= 1:
        parser.error(f"--threshold is {given.threshold:g}; it is a probability, 0 to 1")
    if given.sheet is not None and (
        given.sheet.suffix.lower() != ".png" or given.sheet.is_dir() or not given.sheet.parent.is_dir()
    ):
        parser.error(f"--sheet is {given.sheet}; give a .png file in a folder that exists")
    with exit_code() as result:
        if segments(given.release):
            _segment(given)
        elif given.masks is not None:
            raise UsageError("--masks is for segmentation networks, and this one says nothing of pixels")
        elif gives_features(given.release):
            _compare(given)
        else:
            _predict(given)
    return result[0]


def _compare(given: argparse.Namespace) -> None:
    """Compare two images by their features, or find the nearest ones of a gallery."""
    if given.sheet is not None:
        raise UsageError("--sheet shows labels, and this network gives features")
    if given.gallery is None and (len(given.images) != 2 or given.top is not None):
        raise UsageError(
            f"a recognition network compares two images, and {len(given.images)} places are given; to find images "
            "among others, name a folder with --gallery"
        )
    if given.gallery is not None and given.threshold is not None:
        raise UsageError("--threshold is for two images; of a gallery the nearest ones are shown")
    extractor = FeatureExtractor(given.release)
    if given.gallery is None:
        for place in given.images:
            if not Path(place).is_file():
                raise MissingFile(f"there is no image {place}; two images are compared")
        cosine = cosine_of_two(extractor, [Path(place) for place in given.images])
        said = "" if given.threshold is None else "  the same" if cosine >= given.threshold else "  another"
        print(f"cosine {cosine:.4f}{said}")
        return
    failed: list[ReparamError] = []
    gallery = read_gallery(given.gallery, extractor, failed.append)
    if given.index is not None and not failed:
        gallery.write(given.index)
        print(printable(f"written: {given.index}, {len(gallery.names)} images"))
    rows = [
        ["" if place else path, f"{cosine:.4f}", name]
        for path, features in extractor.features(find_images(given.images, failed.append), failed.append)
        for place, (name, cosine) in enumerate(gallery.nearest(features, given.top or 5))
    ]
    if given.images:
        print(format_table(["image", "cosine", "image of the gallery"], rows))
    _raise_failed(failed, len(rows) > 0 or not given.images, "have no features")


def _segment(given: argparse.Namespace) -> None:
    """Write the masks of images; print a line for each with what it holds."""
    unused = [name for name in ("top", "threshold", "sheet", "gallery") if getattr(given, name) is not None]
    if unused:
        raise UsageError(f"--{unused[0]} is not for segmentation networks, which write --masks")
    if given.masks is None:
        raise UsageError("a segmentation network labels pixels; name a folder for the masks with --masks")
    segmenter = Segmenter(given.release)
    failed: list[ReparamError] = []
    paths = find_images(given.images, failed.append)
    folder = empty_folder(given.masks)
    written = 0
    for mask in segmenter.masks(paths, failed.append):
        try:
            write_mask(mask, folder)
        except ReparamError as error:
            failed.append(error)
            continue
        written += 1
        print(printable(f"{mask.path}  {', '.join(f'{name} {share:.1%}' for name, share in mask.shares)}"), flush=True)
    print(printable(f"written: {folder}, {written} masks and as many overlays"))
    _raise_failed(failed, written > 0, f"of {written + len(failed)} have no mask")


def _raise_failed(failed: list[ReparamError], some: bool, what: str) -> None:
    if failed and not some and len(failed) == 1:
        raise failed[0]
    if failed:
        lines = "".join(f"\n  {printable(str(error))}" for error in failed)
        raise ReparamError(f"{len(failed)} {what}:{lines}")


def _predict(given: argparse.Namespace) -> None:
    if given.gallery is not None:
        raise UsageError("--gallery is for recognition networks, and this one gives labels")
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
    _raise_failed(failed, labelled > 0, f"of {labelled + len(failed)} are not labelled")


if __name__ == "__main__":
    sys.exit(main())
