"""Run a script of a PaddleClas checkout, unchanged, with the layers and models of paddle_reparam registered."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddle_reparam.ppcls.command import launch

if __name__ == "__main__":
    sys.exit(launch())
