"""The loss around trained weights: "Visualizing the Loss Landscape of Neural Nets" (NeurIPS 2018, arXiv 1712.09913).

RefConv's figure 8 is one. The filters of a random direction have the norms of the network's own, and BNs normalise by
the images at every point.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import nn

from ..arithmetic.geometry import BATCH_NORMS
from ..arithmetic.tensors import assign, to_float64
from ..errors import ReparamError
from ..surgery.tracing import require_eval, walk

#: Images that are normalised together: all of them where there are no more.
BATCH = 256

#: Number of a direction -> how far along it.
Place = Mapping[int, float]
#: Path of a parameter -> one step along a direction.
Direction = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class LandscapeRow:
    """The loss around one network's weights.

    `loss` is that of the weights themselves. `sharpness`: by how much it rises half way to the edge of the picture, the
    mean over both ways of each direction, and over directions; `spread`: the standard deviation over these. `sharper`:
    in how many directions by more than the first network's, by the same draws (None: it is the first, or another one).
    `surface[i, j]` is the loss at `axis[i]` along the second direction and `axis[j]` along the first, `[points,
    points]`; `cuts[k]` along direction k alone, `[directions, points]`.
    """

    network: str
    parameters: int
    loss: float
    sharpness: float
    spread: float
    sharper: int | None
    axis: np.ndarray
    surface: np.ndarray
    cuts: np.ndarray


def moved_parameters(model: nn.Layer) -> dict[str, tuple[paddle.Tensor, int]]:
    """Return path -> (parameter, axis of its filters) of what a direction moves: trainable, of two axes or more.

    Biases and norms have one, and stay; so does what is frozen, a `RefConv2D`'s base among it.
    """
    found: dict[int, tuple[str, paddle.Tensor, int]] = {}
    for path, layer in walk(model):
        for name, parameter in layer._parameters.items():
            if parameter is not None and parameter.ndim > 1 and not parameter.stop_gradient:
                # An `nn.Linear` has the weights of one output in a column.
                axis = parameter.ndim - 1 if isinstance(layer, nn.Linear) else 0
                found.setdefault(id(parameter), (f"{path}.{name}" if path else name, parameter, axis))
    return {path: (parameter, axis) for path, parameter, axis in found.values()}


def weights_of(model: nn.Layer) -> dict[str, tuple[np.ndarray, int]]:
    """Return path -> (weight, axis of its filters) of what a direction moves."""
    return {path: (to_float64(parameter), axis) for path, (parameter, axis) in moved_parameters(model).items()}


def draw_direction(weights: Mapping[str, tuple[np.ndarray, int]], seed: Sequence[int]) -> dict[str, np.ndarray]:
    """Return a random direction in which each filter has the norm of the weights' own; for a seed the same draws.

    A weight that is zero stays so: a mask holds it there.
    """
    generator, direction = np.random.default_rng(seed), {}
    for path, (weight, axis) in weights.items():
        drawn = generator.standard_normal(weight.shape) * (weight != 0)
        others = tuple(i for i in range(weight.ndim) if i != axis)
        wanted, norms = (np.sqrt(np.square(each).sum(axis=others, keepdims=True)) for each in (weight, drawn))
        direction[path] = drawn * np.divide(wanted, norms, out=np.zeros_like(norms), where=norms > 0)
    return direction


@contextlib.contextmanager
def batch_statistics(model: nn.Layer) -> Iterator[None]:
    """Let the BNs, and nothing else, do as in training while the `with` block runs; then all is as it was."""
    norms = [layer for _, layer in walk(model) if isinstance(layer, BATCH_NORMS)]
    kept = [(layer, layer.training, layer._mean.clone(), layer._variance.clone()) for layer in norms]
    try:
        for layer in norms:
            layer.training = True
        yield
    finally:
        # The last first: a shared BN is there several times.
        for layer, training, mean, variance in reversed(kept):
            layer.training = training
            layer._mean.set_value(mean)
            layer._variance.set_value(variance)


def losses(
    model: nn.Layer, places: Iterable[Place], direction: Callable[[int], Direction], loss: Callable[[], float]
) -> np.ndarray:
    """Return the loss at each place, counted from the weights as they are; BNs normalise by what they get there.

    `direction` gives one by its number, and `loss` that of the model as it is. The model, in eval mode, is the same
    afterwards.
    """
    require_eval(model, f"this {type(model).__name__}", "drawing its loss")
    parameters, start, found = moved_parameters(model), weights_of(model), []
    try:
        with paddle.no_grad(), batch_statistics(model):
            for place in places:
                for path, (parameter, _) in parameters.items():
                    assign(parameter, start[path][0] + sum(step * direction(k)[path] for k, step in place.items()))
                found.append(loss())
    finally:
        for path, (parameter, _) in parameters.items():
            assign(parameter, start[path][0])
    return np.array(found)


def mean_loss(
    model: nn.Layer,
    images: np.ndarray,
    labels: np.ndarray,
    loss: Callable[[paddle.Tensor, paddle.Tensor], paddle.Tensor],
) -> float:
    """Return the mean over images `[N, C, H, W]` of `loss(output, labels)`, which is the mean of a batch."""
    # As equal as can be: a BN that saw a few images only would give another loss.
    parts, total = -(-len(images) // BATCH), 0.0
    for pixels, wanted in zip(np.array_split(images, parts), np.array_split(labels, parts)):
        total += float(loss(model(paddle.to_tensor(pixels)), paddle.to_tensor(wanted))) * len(pixels)
    return total / len(images)


def analyze(
    networks: Mapping[str, tuple[nn.Layer, Callable[[], float]]],
    radius: float = 1.0,
    points: int = 21,
    directions: int = 10,
    seed: int = 0,
    watch: Callable[[Sequence[Place]], Iterable[Place]] = iter,
) -> list[LandscapeRow]:
    """Return a row for each network: name -> (network in eval mode, what gives its loss as it is).

    The plane of the first two of so many random directions, and a cut along each of them, at `points` (5, 9, 13, ...)
    places from -`radius` to `radius`, where 1 is as far as the filters are long. Networks whose parameters have the
    same shapes get the same draws. `watch` gets all places of a network and gives them one by one.

    Raises `ReparamError` for a network with nothing to move, and where the loss is not finite half way to the edge.
    """
    axis = np.linspace(-radius, radius, points)
    places: list[Place] = [{1: y, 0: x} for y in axis for x in axis]
    # The cuts along the first two are the middle lines of the plane.
    places += [{k: x} for k in range(2, directions) for x in axis]
    rows: list[LandscapeRow] = []
    shapes: list[list[tuple[int, ...]]] = []
    for name, (model, loss) in networks.items():
        weights = weights_of(model)
        if not weights:
            raise ReparamError(f"{name}: this {type(model).__name__} has no trainable weights that a direction moves")
        # Two at a time: each takes twice the memory of the network.
        direction = functools.lru_cache(2)(lambda k, weights=weights: draw_direction(weights, [seed, k]))
        found = losses(model, watch(places), direction, loss)
        surface = found[: points**2].reshape(points, points)
        middle = surface[points // 2], surface[:, points // 2]
        cuts = np.concatenate([*[line[None] for line in middle], found[points**2 :].reshape(-1, points)])
        rises = rises_half_way(cuts)
        if not np.isfinite(rises).all():
            raise ReparamError(
                f"{name}: its loss is not finite {radius / 2:g} of the filters' lengths from the weights, or at them; "
                "look for weights that are not finite, or choose a smaller radius"
            )
        shapes.append([weight.shape for weight, _ in weights.values()])
        row = LandscapeRow(
            network=name,
            parameters=sum(weight.size for weight, _ in weights.values()),
            loss=float(cuts[0, points // 2]),
            sharpness=float(rises.mean()),
            spread=float(rises.std(ddof=1)),
            sharper=int((rises > rises_half_way(rows[0].cuts)).sum()) if rows and shapes[0] == shapes[-1] else None,
            axis=axis,
            surface=surface,
            cuts=cuts,
        )
        rows.append(row)
    return rows


def rises_half_way(cuts: np.ndarray) -> np.ndarray:
    """Return by how much the loss rises half way to the edge, the mean of both ways, for cuts `[directions, points]`.

    points: 5, 9, 13, ...
    """
    quarter = cuts.shape[1] // 4
    return (cuts[:, quarter] + cuts[:, -1 - quarter]) / 2 - cuts[:, 2 * quarter]
