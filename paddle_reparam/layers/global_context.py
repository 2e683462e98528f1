"""GlobalContext2D: "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond" (ICCV workshops 2019,
arXiv 1904.11492)."""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ..arithmetic.initializers import init_fan_out_normal
from ..arithmetic.tensors import assign
from ..errors import ReparamError
from .base import WHOLE


class GlobalContext2D(nn.Layer):
    """A block behind a layer: adds one vector, made of the pixels that matter, to all; `[N, C, H, W]` to the same.

        out = x + mlp_add(sum_j softmax_j(conv_attn(x)_j) x_j)

    mlp_add is fc1, a LayerNorm over the channels, ReLU and fc2; fc1, fc2 and conv_attn are 1x1 convolutions. fc1 gives
    `inner` channels, a sixteenth of C in the paper. fc2 starts as zero: a network in which the block is put computes
    what it did. It is put in as `NonLocal2D` is; there is no BN in it, so fusing leaves it as it is.
    """

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        if not WHOLE.accepts(inner):
            raise ReparamError(f"GlobalContext2D has no inner={inner!r}; choose {WHOLE.allowed}")
        self.conv_attn = nn.Conv2D(channels, 1, 1)
        self.mlp_add = _NormedMlp(channels, inner)
        for conv in (self.conv_attn, self.mlp_add.fc1):
            init_fan_out_normal(conv)
        assign(self.mlp_add.fc2.weight, np.zeros(self.mlp_add.fc2.weight.shape))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        # No product reads maps as they are: Paddle Inference with oneDNN is silently wrong for that.
        attention = F.softmax(self.conv_attn(x).flatten(2), -1)
        context = paddle.matmul(x.flatten(2), attention, transpose_y=True)
        return x + self.mlp_add(context.unsqueeze(-1))


class _NormedMlp(nn.Layer):
    """fc1, a LayerNorm over the channels, ReLU, fc2; `[N, C, 1, 1]` in and out."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2D(channels, inner, 1)
        self.norm = nn.LayerNorm(inner, epsilon=1e-6)
        self.fc2 = nn.Conv2D(inner, channels, 1)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        normed = self.norm(self.fc1(x).flatten(1))
        return self.fc2(F.relu(normed).unsqueeze([2, 3]))
