"""Train a plain network and refocus it: RefConv's two stages, or a control of the second, up to plain weights."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddle_reparam.ppcls.refocus import main

if __name__ == "__main__":
    sys.exit(main())
