"""A detector up to what its heads put out: what two forms of it are compared by.

Behind the heads the largest scores are chosen and boxes are dropped, where the least rounding may choose others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import paddle
from paddle import nn
from ppdet.modeling.architectures.meta_arch import BaseArch

from ..errors import ReparamError
from ..surgery.tracing import Hooks

#: Where the boxes lie that stand in for proposed ones, as shares of an image: left, top, right, bottom.
_BOXES = ((0.0, 0.0, 1.0, 1.0), (0.1, 0.2, 0.5, 0.5), (0.4, 0.3, 0.9, 0.6), (0.2, 0.5, 0.4, 0.95), (0.6, 0.0, 1.0, 0.4))


class UpToHeads(nn.Layer):
    """images `[N, 3, H, W]` -> what the last head of a detector puts out for them; in evaluation alone.

    Of one in two stages that is what the first one puts out everywhere, and the second one for boxes that are always
    the same. Raises `ReparamError` for what is no detector.
    """

    def __init__(self, detector: nn.Layer) -> None:
        super().__init__()
        heads = [name for name, _ in detector.named_children() if name.endswith("head")]
        heads = [name for name in heads if name not in ("rpn_head", "mask_head", "aux_head")]
        if not isinstance(detector, BaseArch) or not heads:
            raise ReparamError(f"{type(detector).__name__} is no detector with a head")
        self.detector = detector
        self._head = heads[-1]
        if not detector.training:
            self.eval()

    def forward(self, images: paddle.Tensor) -> list[Any]:
        count, _, height, width = images.shape
        inputs = {
            "image": images,
            "im_shape": paddle.to_tensor([[float(height), float(width)]] * count),
            "scale_factor": paddle.ones([count, 2]),
        }
        outputs: list[Any] = []

        def stop(_layer: nn.Layer, _inputs: Any, output: Any) -> None:
            outputs.append(output)
            raise _Enough

        with Hooks() as hooks, _same_boxes(self.detector, outputs), contextlib.suppress(_Enough):
            hooks.after(getattr(self.detector, self._head), stop)
            self.detector(inputs)
        return outputs


class _Enough(Exception):
    """What is needed has been computed."""


@contextlib.contextmanager
def _same_boxes(detector: nn.Layer, outputs: list[Any]) -> Iterator[None]:
    """Let the first stage of a detector, where it has two, add what it puts out to `outputs`, and propose the same."""
    first = getattr(detector, "rpn_head", None)
    if not hasattr(first, "_gen_proposal"):
        yield
        return

    def propose(scores: list[Any], deltas: list[Any], _anchors: Any, inputs: dict[str, Any]) -> Any:
        outputs.extend([*scores, *deltas])
        sizes = inputs["im_shape"].flip(1).tile([1, 2])
        boxes = [paddle.to_tensor(_BOXES) * size for size in sizes]
        return boxes, paddle.full([len(boxes)], len(_BOXES), "int32")

    with patch.object(first, "_gen_proposal", propose):
        yield
