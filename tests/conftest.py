"""Every test starts from the same seeds and leaves Paddle's default dtype as it was."""

import random

import numpy as np
import paddle
import pytest


@pytest.fixture(autouse=True)
def seeded():
    """Seed Paddle, numpy and Python before each test."""
    random.seed(0)
    np.random.seed(0)
    paddle.seed(0)
    default_dtype = paddle.get_default_dtype()
    yield
    paddle.set_default_dtype(default_dtype)
