"""DropPath: "Deep Networks with Stochastic Depth" (ECCV 2016, arXiv 1603.09382)."""

from __future__ import annotations

import paddle
from paddle import nn

from ..errors import ReparamError


class DropPath(nn.Layer):
    """In training, set the branch of a sample to zero with probability `rate`, and scale those kept by 1 / (1 - rate).

    `[N, ...]` in and out; in eval mode the identity. Raises `ReparamError` for a rate outside of 0 <= rate < 1.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ReparamError(f"a drop path rate is a probability below 1, not {rate!r}")
        self.rate = float(rate)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        if not self.training or self.rate == 0.0:
            return x
        kept = paddle.rand([x.shape[0]] + [1] * (x.ndim - 1)) >= self.rate
        return x * (kept.astype(x.dtype) / (1.0 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def drop_path_rates(last: float, blocks: int) -> list[float]:
    """Return the rate of each block: evenly spaced from 0 for the first one to `last`."""
    return [last * i / max(blocks - 1, 1) for i in range(blocks)]
