"""Write the ONNX file of a release in int8, and measure what that costs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddle_reparam.ppcls.quantize import main

if __name__ == "__main__":
    sys.exit(main())
