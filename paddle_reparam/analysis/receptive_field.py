"""The effective receptive field, by the protocol released with RepLKNet (CVPR 2022) and used by SLaK (ICLR 2023).

What each input pixel contributes to the middle of the last map: the gradient, with respect to the input, of the sum
over channels of the middle pixel's positive values. Negative gradients count as zero, input channels are summed, images
averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ..arithmetic.layer_norm import mend_layer_norm
from ..errors import ReparamError
from ..surgery.tracing import Hooks, require_eval, run, unchanged, walk

#: Shares of the contributions whose areas the papers list.
SHARES = (0.2, 0.3, 0.5, 0.99)
#: Pixels that go through a network at once: more images at once where they are small.
_PIXELS = 1 << 16


@dataclass(frozen=True)
class FieldRow:
    """One form of a network: its last map of more than one pixel, `channels x height x width`, and which layer's it is.

    `area_*`: the share of the image that the smallest middle square takes that has more than so many percent of the
    contributions, of their logarithms as in the protocol; 1 where only the whole image has. `difference` is the
    relative one to the network's first form (None: this is it). `contributions` `[height, width]`.
    """

    network: str
    form: str
    layer: str
    last_map: str
    images: int
    area_20: float
    area_30: float
    area_50: float
    area_99: float
    difference: float | None
    contributions: np.ndarray


def last_map(model: nn.Layer, image: np.ndarray) -> tuple[str, list[int]]:
    """Return the path of the layer whose output is the last map of more than one pixel, and its shape.

    Layers are taken in the order in which they finish, so that this is a stage rather than its last convolution.
    image: `[1, C, H, W]`. Raises `ReparamError` where no layer gives a map.
    """
    require_eval(model, f"this {type(model).__name__}", "looking for its receptive field")
    found: dict[str, list[int]] = {}
    with unchanged(model), Hooks() as hooks, paddle.no_grad():
        for path, layer in walk(model):

            def look(_layer: nn.Layer, _given: Any, output: Any, path: str = path) -> None:
                if isinstance(output, paddle.Tensor) and is_map(output.shape, image.shape[2:]):
                    found.pop(path, None)
                    found[path] = list(output.shape)

            hooks.after(layer, look)
        run(model, [paddle.to_tensor(image)])
    if not found:
        raise ReparamError(
            f"no layer of this {type(model).__name__} puts out a map [N, C, H, W] of more than one pixel for images of "
            f"{'x'.join(map(str, image.shape[2:]))}; give larger ones"
        )
    return list(found.items())[-1]


def is_map(shape: Sequence[int], image: Sequence[int]) -> bool:
    """Tell whether a shape is that of maps `[N, C, H, W]` of more than one pixel, for images of a height and width.

    Maps have the proportions of the image, but for a pixel of rounding; with channels behind the pixels they have not.
    """
    if len(shape) != 4 or shape[2] * shape[3] == 1:
        return False
    return abs(shape[2] * image[1] - shape[3] * image[0]) <= max(image)


def middle_of(maps: Any) -> Any:
    """Return the sum over channels of the positive values in the middle of maps `[N, C, H, W]`, a scalar."""
    return F.relu(maps[:, :, maps.shape[2] // 2, maps.shape[3] // 2]).sum()


def input_gradients(model: nn.Layer, path: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return what gives the gradient of the middle of a layer's output with respect to images `[N, C, H, W]`."""
    layer = dict(walk(model))[path]
    mend_layer_norm()
    frozen = [parameter for parameter in model.parameters() if not parameter.stop_gradient]

    def gradients(images: np.ndarray) -> np.ndarray:
        x = paddle.to_tensor(images)
        x.stop_gradient = False
        middles: list[paddle.Tensor] = []
        for parameter in frozen:
            parameter.stop_gradient = True
        try:
            with unchanged(model), Hooks() as hooks:
                # At once: what follows may change the map in place.
                hooks.after(layer, lambda _layer, _given, output: middles.append(middle_of(output)))
                # Not the input itself, which a network may change too.
                model(x * 1.0)
            return paddle.grad(middles[-1], [x])[0].numpy()
        finally:
            for parameter in frozen:
                parameter.stop_gradient = False

    return gradients


def contributions(
    gradients: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    watch: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> np.ndarray:
    """Return what each pixel contributes, the mean over images `[N, C, H, W]`, as `[H, W]` in float64.

    `watch` gets where each batch begins and gives it one by one. Raises `ReparamError` where nothing contributes, and
    where a gradient is not finite.
    """
    height, width = images.shape[2:]
    batch = min(64, max(1, _PIXELS // (height * width)))
    total = np.zeros((height, width))
    for start in watch(range(0, len(images), batch)):
        total += np.maximum(gradients(images[start : start + batch]).astype(np.float64), 0).sum(axis=(0, 1))
    if not np.isfinite(total).all() or not total.any():
        what = "not finite" if total.any() else "zero everywhere"
        raise ReparamError(f"the gradient of the middle of the last map is {what}; was the network trained?")
    return total / len(images)


def displayed(matrix: np.ndarray) -> np.ndarray:
    """Return contributions on the protocol's scale: log10(1 + contribution), the largest as 1."""
    logarithms = np.log10(1 + matrix)
    return logarithms / logarithms.max()


def shares_within(matrix: np.ndarray) -> np.ndarray:
    """Return what the middle squares of sides 1, 3, 5, ... hold of the displayed contributions, as shares of all."""
    values = displayed(matrix)
    y, x = (size // 2 for size in values.shape)
    squares = [values[y - i : y + 1 + i, x - i : x + 1 + i].sum() for i in range(min(y, x))]
    return np.array(squares) / values.sum()


def high_contribution_area(matrix: np.ndarray, share: float) -> float:
    """Return how much of the image the smallest middle square takes that holds more than a share of the contributions.

    As in the protocol its side is 3 at least, and no square of an even side is tried; 1 where none holds so much.
    """
    enough = np.flatnonzero(shares_within(matrix)[1:] > share)
    return (2 * int(enough[0]) + 3) ** 2 / matrix.size if len(enough) else 1.0


def row_of(
    network: str, form: str, layer: str, shape: Sequence[int], images: int, matrix: np.ndarray, first: np.ndarray | None
) -> FieldRow:
    """Return the row of a form; `first` holds the contributions of the network's first form (None: this is it)."""
    return FieldRow(
        network,
        form,
        layer,
        "x".join(map(str, shape[1:])),
        images,
        *(high_contribution_area(matrix, share) for share in SHARES),
        None if first is None else float(np.abs(matrix - first).max() / np.abs(first).max()),
        matrix,
    )
