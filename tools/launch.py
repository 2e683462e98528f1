"""Run a script of a PaddleClas or PaddleSeg checkout, unchanged, with the layers and models of paddle_reparam."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddle_reparam.ppcls import command as of_paddleclas
from paddle_reparam.ppseg import checkout_of
from paddle_reparam.ppseg import command as of_paddleseg


def launch(arguments: Sequence[str] | None = None) -> int:
    """Run the script that comes first with the arguments behind it; return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and checkout_of(given[0]) is not None:
        return of_paddleseg.launch(given)
    return of_paddleclas.launch(given)


if __name__ == "__main__":
    sys.exit(launch())
