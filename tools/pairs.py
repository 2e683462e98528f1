"""Measure a released recognition network on pairs of images: the same person, or another? By LFW's protocol."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from paddle_reparam.deploy.pairs import evaluate_pairs, read_pairs
from paddle_reparam.deploy.recognition import FeatureExtractor
from paddle_reparam.errors import exit_code
from paddle_reparam.files import atomic_write


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code, 1 where the release, the list or an image is not what it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("release", help="the released folder of a recognition network, or an ONNX file of one")
    parser.add_argument("pairs", help="LFW's pairs.txt, or lines of two paths and 1 (the same) or 0, between tabs")
    parser.add_argument("--root", default=".", metavar="FOLDER", help="the folder that the paths start from (here)")
    parser.add_argument("--json", metavar="FILE", help="write the result there as well")
    given = parser.parse_args(arguments)
    with exit_code() as result:
        pairs = read_pairs(given.pairs, given.root)
        watch = functools.partial(tqdm, unit=" images", leave=False, disable=None)
        report = evaluate_pairs(FeatureExtractor(given.release), pairs, watch)
        print(report)
        if given.json is not None:
            atomic_write(given.json, lambda path: path.write_text(report.to_json(), encoding="utf-8"))
    return result[0]


if __name__ == "__main__":
    sys.exit(main())
