"""Evaluate a model's weights with PaddleClas' Engine."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddle_reparam.ppcls.command import main

if __name__ == "__main__":
    sys.exit(main("eval"))
