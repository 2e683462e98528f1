"""Writes the weight files of this folder as the Paddle that runs it writes them: python write_paddle_weights.py"""

from pathlib import Path

import numpy as np
import paddle


def expected() -> dict:
    """Return what every one of the files holds, as `load` gives it: bfloat16 as its bits."""
    return {
        "conv.weight": np.arange(12, dtype=np.float32).reshape(2, 3, 2, 1) / 8,
        "conv.bias": np.array([-1.5, 2.25], dtype=np.float64),
        "bn._mean": np.array([0.5, -3.0], dtype=np.float16),
        "bn.weight": np.array([0x3F80, 0xC000], dtype=np.uint16),
        "steps": np.array(7, dtype=np.int64),
        "mask": np.array([[True], [False]]),
        "none": np.zeros((0, 3), dtype=np.float32),
    }


def main() -> None:
    folder, version = Path(__file__).parent, paddle.__version__
    tensors = {name: paddle.to_tensor(array) for name, array in expected().items()}
    paddle.save(tensors, str(folder / f"tensors-{version}.pdparams"))
    paddle.save(tensors, str(folder / f"protocol2-{version}.pdparams"), protocol=2)
    paddle.save(expected(), str(folder / f"arrays-{version}.pdparams"))
    paddle.save(expected(), str(folder / f"arrays-protocol2-{version}.pdparams"), protocol=2)
    # Tensors, DenseTensors and arrays side by side are stored as tuples, as eval('data', ...) and as they are.
    mixed = {**tensors, "conv.weight": tensors["conv.weight"].value().get_tensor(), "steps": expected()["steps"]}
    paddle.save(mixed, str(folder / f"mixed-{version}.pdparams"))
    paddle.save(mixed, str(folder / f"mixed-protocol2-{version}.pdparams"), protocol=2)


if __name__ == "__main__":
    main()
