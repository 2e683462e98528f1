"""Every test starts from the same seeds and leaves Paddle's default dtype as it was."""

import random

import numpy as np
import paddle
import pytest


@pytest.fixture(autouse=True, scope="module")
def module_seeded():
    """Seed what fixtures of a module draw, which is before its first test, and not with the numbers of the tests."""
    seed(1)


@pytest.fixture(autouse=True)
def seeded():
    """Seed Paddle, numpy and Python before each test."""
    seed(0)
    default_dtype = paddle.get_default_dtype()
    yield
    paddle.set_default_dtype(default_dtype)


def seed(number):
    random.seed(number)
    np.random.seed(number)
    paddle.seed(number)
