"""NonLocal2D: "Non-local Neural Networks" (CVPR 2018, arXiv 1711.07971)."""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ..arithmetic.initializers import init_fan_out_normal
from ..arithmetic.tensors import assign, sides
from ..errors import ReparamError
from .base import WHOLE


class NonLocal2D(nn.Layer):
    """A block behind a layer: each pixel gets what all pixels hold, by how well they match; `[N, C, H, W]` to the same.

        out = x + BN(z(y)),  y_i = sum_j softmax_j(t(x)_i . p(x)_j / sqrt(C)) g(x)_j

    t, p, g and z are 1x1 convolutions; the first three give `inner` channels, half of C in the paper. Memory grows with
    (H * W)^2. BN starts with weights of zero: a network in which the block is put computes what it did.

    It stands in for no convolution; the end of an `nn.Sequential` takes it under a name of its own, as in
    `network.layer3.add_sublayer("non_local", NonLocal2D(256, 128))`, and the names of all others stay.
    """

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        if not WHOLE.accepts(inner):
            raise ReparamError(f"NonLocal2D has no inner={inner!r}; choose {WHOLE.allowed}")
        self.scale = channels**-0.5
        self.t, self.p, self.g = (nn.Conv2D(channels, inner, 1) for _ in range(3))
        self.z = nn.Conv2D(inner, channels, 1)
        self.norm = nn.BatchNorm2D(channels)
        for conv in (self.t, self.p, self.g, self.z):
            init_fan_out_normal(conv)
        assign(self.norm.weight, np.zeros(channels))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        # No product reads maps as they are, and none is transposed on its way: Paddle Inference with oneDNN is silently
        # wrong for the one, and raises in bfloat16 for the other.
        t, p, g = self.t(x).flatten(2), self.p(x).flatten(2), self.g(x).flatten(2)
        matches = F.softmax(paddle.matmul(t * self.scale, p, transpose_x=True), -1)
        pixels = paddle.matmul(g, matches, transpose_y=True)
        return x + self.norm(self.z(pixels.reshape([-1, pixels.shape[1], *sides(x)])))
