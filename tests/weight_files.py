"""What the tests of weight files share: what the files in tests/data hold, and how a refusal is worded."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from paddle_reparam.errors import CheckpointError
from paddle_reparam.weights.checkpoints import load

DATA = Path(__file__).parent / "data"


def expected() -> dict[str, np.ndarray]:
    """What the files in tests/data hold: float32, float64, float16, bfloat16, int64 (0-D), bool, and no numbers."""
    sys.path.insert(0, str(DATA))
    try:
        from write_paddle_weights import expected as written
    finally:
        sys.path.remove(str(DATA))
    return written()


def assert_same(actual: dict, wanted: dict) -> None:
    assert set(actual) == set(wanted)
    for name, array in wanted.items():
        assert type(actual[name]) is np.ndarray
        assert (actual[name].dtype, actual[name].shape) == (array.dtype, array.shape), name
        assert actual[name].tobytes() == array.tobytes(), name


def refusal(path: Path) -> str:
    """Return the one sentence that reading a file ends with; it starts with the path."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith((f"{path}: it ", f"{path}: its "))
    assert "\n" not in message
    assert len(message) < len(str(path)) + 400
    return message[len(str(path)) + 2 :]


def read_or_refuse(path: Path) -> dict | None:
    try:
        return load(path)
    except CheckpointError:
        return None
