"""Run a script of a checkout of PaddleClas, PaddleSeg or PaddleDetection, unchanged, with this library's layers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddle_reparam import ppcls, ppdet, ppseg
from paddle_reparam.frameworks import scripts


def launch(arguments: Sequence[str] | None = None) -> int:
    """Run the script that comes first with the arguments behind it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("script", help="such as PaddleClas/tools/train.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own arguments")
    given = parser.parse_args(arguments)
    return scripts.launch(given.script, given.arguments, _setup)


def _setup(script: Path) -> None:
    """Set up what a script is of; one that is of no checkout gets the PaddleClas that is installed."""
    for framework in (ppseg, ppdet):
        if (checkout := framework.checkout_of(script)) is not None:
            framework.setup(checkout)
            return
    ppcls.setup(ppcls.checkout_of(script))


if __name__ == "__main__":
    sys.exit(launch())
