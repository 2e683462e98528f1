"""Compare methods on a plain network and your own data: each trained by one recipe with several seeds, and measured."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddle_reparam.ppcls.compare import main

if __name__ == "__main__":
    sys.exit(main())
