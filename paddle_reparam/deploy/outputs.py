"""What an exported network takes and puts out, and what its output is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import nn

from ..errors import ReparamError

#: Where each label has a probability of its own, an image has those that reach this, as in PaddleClas.
THRESHOLD = 0.5


#: The share of numbers of classes, of pixels say, that may be others than those of the trained network: where two
#: classes are as good as each other, rounding decides.
LARGEST_SHARE = 1e-3

#: Features of this length, or shorter, have no direction.
SHORTEST = 1e-12

#: The smallest probability whose logarithm is compared: Paddle's own softmax stops at e^-64, oneDNN's does not.
_SMALLEST_PROBABILITY = 1e-25


@dataclass(frozen=True)
class OutputSpec:
    """What an exported network puts out: `keys` pick from a network's dicts, `activation` follows ("softmax" over the
    classes, which are axis 1; "argmax", the number of the largest of them, int32; "sigmoid"; "l2", which makes features
    along axis 1 of length 1; "identity" or None).
    Where either is asked for, the first entry of a list is taken, and of a dict before an activation "logits", as
    PaddleClas does. Without both, all that a network puts out.
    """

    activation: str | None = None
    keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.activation not in (None, "softmax", "argmax", "sigmoid", "l2", "identity"):
            raise ReparamError(
                "the activation of an exported network is softmax, argmax, sigmoid, l2, identity or None: "
                f"{self.activation}"
            )


#: The network's own output, unchanged.
AS_THE_NETWORK = OutputSpec()


@dataclass(frozen=True)
class Normalization:
    """What makes a network's input of the pixels 0..255 of an RGB image: `(pixels * scale - mean) / std` by channel.

    `dtype` is that of the pixels that an export with it takes, uint8 or float32.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float
    dtype: str = "uint8"

    def __post_init__(self) -> None:
        if self.dtype not in ("uint8", "float32"):
            raise ReparamError(f"pixels are exported as uint8 or float32: {self.dtype}")
        if len(self.mean) != len(self.std) or not all(np.isfinite([*self.mean, *self.std, self.scale])):
            raise ReparamError(f"a mean and a std for each channel, all finite, are needed: {self.mean}, {self.std}")
        if not all(self.std):
            raise ReparamError(f"a std of 0 cannot be divided by: {self.std}")

    @staticmethod
    def from_dict(entries: dict[str, Any] | None) -> Normalization | None:
        """Return what a manifest holds, or None for None."""
        if entries is None:
            return None
        return Normalization(tuple(entries["mean"]), tuple(entries["std"]), entries["scale"], entries["dtype"])

    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (factor, shift) by channel, float64: the input is `pixels * factor + shift`."""
        mean, std = np.float64(self.mean), np.float64(self.std)
        return self.scale / std, -mean / std

    def undo(self, images: np.ndarray) -> np.ndarray:
        """Return the pixels that these inputs `[N, C, H, W]` of a network were made of.

        Raises `ReparamError` where that gives no whole numbers 0..255: they were normalised in another way.
        """
        factor, shift = (v.reshape(-1, 1, 1) for v in self.affine())
        pixels = (images - shift) / factor
        whole = np.rint(pixels)
        if not (np.abs(pixels - whole).max() < 0.01 and whole.min() >= 0 and whole.max() <= 255):
            raise ReparamError(f"the images are no pixels 0..255 that were normalised by {self}")
        return whole.astype(self.dtype)


def first_of(outputs: Any) -> Any:
    return outputs[0] if isinstance(outputs, (list, tuple)) else outputs


def kept_outputs(outputs: Any, output: OutputSpec) -> dict[str, paddle.Tensor]:
    """Return path -> tensor of those parts of a network's output that are exported, before the activation.

    Paths are like `0` and `Student.logits`. Raises `ReparamError` for a key that the output lacks, and for what no
    activation can follow.
    """
    parts = _named_parts(outputs, ())
    if not parts:
        raise ReparamError(f"the network puts out {type(outputs).__name__} and no tensor; there is nothing to export")
    wanted = [*output.keys, *(["logits"] if output.activation is not None else [])]
    if not wanted:
        return {".".join(path): tensor for path, tensor in parts.items()}
    prefix, here = (), outputs
    for number, key in enumerate(["", *wanted]):
        if number and isinstance(here, dict):
            if key not in here:
                raise ReparamError(f"the network's output has no {key!r}; it has {', '.join(map(str, here))}")
            here, prefix = here[key], (*prefix, str(key))
        elif number and number <= len(output.keys):
            raise ReparamError(f"the network's output is no dict from which {key!r} could be taken")
        if isinstance(here, (list, tuple)) and here and (number == 0 or output.activation is not None):
            here, prefix = here[0], (*prefix, "0")
    kept = {".".join(path): tensor for path, tensor in parts.items() if path[: len(prefix)] == prefix}
    if output.activation is not None:
        for path, tensor in kept.items():
            if len(kept) > 1 or not tensor.is_floating_point() or tensor.ndim < 2:
                raise ReparamError(
                    f"{output.activation} follows one tensor of numbers [N, classes, ...]; the network's output "
                    f"{path or 'itself'} is {len(kept)} of the shape {list(tensor.shape)} and type {tensor.dtype}"
                )
    return kept


def left_out(outputs: Any, output: OutputSpec) -> list[str]:
    """Return the paths of what a network puts out and its export does not; raises as `kept_outputs` does."""
    kept = kept_outputs(outputs, output)
    return [path for parts in _named_parts(outputs, ()) if (path := ".".join(parts)) not in kept]


def _named_parts(outputs: Any, path: tuple[str, ...]) -> dict[tuple[str, ...], paddle.Tensor]:
    """Return path -> tensor, in the order of `flatten_outputs`."""
    if isinstance(outputs, paddle.Tensor):
        return {path: outputs}
    items: Any = ()
    if isinstance(outputs, dict):
        items = [(key, outputs[key]) for key in sorted(outputs, key=str)]
    elif isinstance(outputs, (list, tuple)):
        items = enumerate(outputs)
    return {key: tensor for name, item in items for key, tensor in _named_parts(item, (*path, str(name))).items()}


def reference_outputs(network: nn.Layer, inputs: Sequence[Any], output: OutputSpec) -> list[np.ndarray]:
    """Return what an export of a network is to put out, without the layer that is exported: `kept_outputs`, and the
    activation in float64.
    """
    with paddle.no_grad():
        kept = [tensor.numpy() for tensor in kept_outputs(network(*inputs), output).values()]
    if output.activation == "softmax":
        scores = [array.astype(np.float64) for array in kept]
        powers = [np.exp(array - array.max(axis=1, keepdims=True)) for array in scores]
        return [(p / p.sum(axis=1, keepdims=True)).astype(array.dtype) for p, array in zip(powers, kept)]
    if output.activation == "argmax":
        return [array.argmax(axis=1).astype(np.int32) for array in kept]
    if output.activation == "sigmoid":
        return [(0.5 * (1.0 + np.tanh(0.5 * array.astype(np.float64)))).astype(array.dtype) for array in kept]
    if output.activation == "l2":
        return [unit_length(array.astype(np.float64)).astype(array.dtype) for array in kept]
    return kept


def unit_length(features: np.ndarray) -> np.ndarray:
    """Return features `[N, C, ...]` divided by their lengths along axis 1, or by `SHORTEST` where they are shorter."""
    return features / np.maximum(np.sqrt(np.square(features).sum(axis=1, keepdims=True)), SHORTEST)


def comparable(outputs: Sequence[np.ndarray], output: OutputSpec) -> list[np.ndarray]:
    """Return a network's outputs, and behind probabilities their logarithms: the logits but for a constant a sample.

    A fault in the logits of unlikely classes hardly shows in the probabilities.
    """
    logarithms = [np.log(np.maximum(p, _SMALLEST_PROBABILITY)) for p in outputs if output.activation == "softmax"]
    return [*outputs, *logarithms]


def error_beside_spread(outputs: np.ndarray, expected: np.ndarray) -> float:
    """Return how far outputs are from the expected ones, beside how far these are from their mean; roots of squares."""
    expected = expected.astype(np.float64)
    power = np.square(expected - expected.mean()).sum()
    return float(np.sqrt(np.square(outputs - expected).sum() / power)) if power else 0.0


class OfPixels(nn.Layer):
    """A network behind a normalisation of its own, computed as PaddleClas does."""

    def __init__(self, network: nn.Layer, normalization: Normalization) -> None:
        super().__init__()
        self.network = network
        self.scale = normalization.scale
        self.mean, self.std = (
            paddle.to_tensor(np.float32(v).reshape(1, -1, 1, 1)) for v in (normalization.mean, normalization.std)
        )

    def forward(self, x: paddle.Tensor) -> Any:
        return self.network((x.astype("float32") * self.scale - self.mean) / self.std)
