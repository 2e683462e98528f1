"""Fuse a trained network, export it for Paddle Inference and check every step: a folder that can be shipped."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddle_reparam.ppcls.reparam import main

if __name__ == "__main__":
    sys.exit(main())
