"""Segmentation with PaddleSeg: train, evaluate and release a network of it with the layers of paddle_reparam."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddle_reparam.frameworks import tool
from paddle_reparam.ppseg import command, exporting


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for wrong usage, 1 where data, weights or a check are wrong."""
    return tool.run(__doc__, command, exporting, arguments)


if __name__ == "__main__":
    sys.exit(main())
