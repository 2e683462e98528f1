"""What the layers do while they train, for VisualDL or whatever has its methods: numbers, histograms and pictures.

Nothing here changes a training: modes and the state of every random generator are put back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from .. import analysis
from ..analysis import dcd, refconv, repmlp, slak, spconv
from ..arithmetic.geometry import BATCH_NORMS
from ..arithmetic.tensors import to_float64
from ..errors import ReparamError, printable
from ..fonts import pillow_font, shortened
from ..layers.base import ReparamLayer
from ..surgery.masks import masked_places
from ..surgery.tracing import undisturbed_draws
from .sparsity import SIXTEEN_BITS, SparseTraining

#: Histograms and pictures cost more than numbers: they are written once in so many times.
PICTURES_EVERY = 10
#: Columns of a caption's lines, a Chinese character taking two.
_COLUMNS = 32
#: Images whose predictions are shown, and the side that small ones are enlarged to, in pixels.
SHOWN, SIDE = 8, 64

#: Paper -> the numbers of its rows that are worth a curve.
CURVES = {
    "refconv": (refconv.KINDS, ("relative_change",)),
    "slak": (slak.KINDS, ("density",)),
    "dcd": (dcd.KINDS, ("lambda_spread", "phi_spread")),
    "spconv": (spconv.KINDS, ("gate", "spread_of_images")),
    "repmlp": (repmlp.KINDS, ("share_of_fc3", "share_of_convolutions")),
}


class Writer(Protocol):
    """As much of `visualdl.LogWriter` as is used."""

    def add_scalar(self, tag: str, value: float, step: int) -> None: ...

    def add_histogram(self, tag: str, values: np.ndarray, step: int, buckets: int = 10) -> None: ...

    def add_image(self, tag: str, img: np.ndarray, step: int) -> None: ...

    def add_hparams(self, hparams_dict: dict[str, Any], metrics_list: list[str]) -> None: ...


# ---------------------------------------------------------------------------------------------------------------------
# Pure functions


def churn(before: np.ndarray, after: np.ndarray) -> float:
    """Return the share of the weights active after a mask update, bool `after`, that were not so before it."""
    return float((after & ~before).sum() / max(1, after.sum()))


def scale_of(norm: nn.Layer) -> float:
    """Return the root mean square over channels of gamma / sqrt(var + eps): how loud a branch's BN makes it."""
    variance = to_float64(norm._variance)
    gamma = np.ones_like(variance) if norm.weight is None else to_float64(norm.weight)
    return float(np.sqrt(np.mean(np.square(gamma) / (variance + norm._epsilon))))


def as_picture(values: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Return a grey picture `[H, W, 3]` of a matrix, uint8, the largest white; enlarged to about `side` pixels."""
    grey = (255 * values / max(float(values.max()), 1e-30)).astype(np.uint8)
    return enlarged(np.repeat(grey[:, :, None], 3, axis=2), side)


def enlarged(picture: np.ndarray, side: int) -> np.ndarray:
    """Return a picture `[H, W, 3]` with each pixel repeated until the larger side has about `side` of them."""
    times = max(1, side // max(picture.shape[:2]))
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def captioned(pixels: np.ndarray, captions: list[str]) -> np.ndarray:
    """Return images `[N, C, H, W]` side by side, `[H', W', 3]` uint8, each with its caption below."""
    from PIL import Image, ImageDraw

    font, missing = pillow_font("".join(captions).replace("\n", ""))
    captions = ["\n".join(shortened(line, missing, _COLUMNS) for line in each.split("\n")) for each in captions]
    low, high = float(pixels.min()), float(pixels.max())
    scaled = (255 * (pixels - low) / max(high - low, 1e-30)).astype(np.uint8).transpose(0, 2, 3, 1)
    pictures = [enlarged(each if each.shape[2] == 3 else each[:, :, :1].repeat(3, axis=2), SIDE) for each in scaled]
    height, width = pictures[0].shape[:2]
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [measure.multiline_textbbox((0, 0), caption, font=font) for caption in captions]
    cell = max(width, *(round(box[2]) for box in boxes)) + 8
    strip = Image.new("RGB", (cell * len(pictures), height + max(round(box[3]) for box in boxes) + 6), "white")
    draw = ImageDraw.Draw(strip)
    for i, (picture, caption) in enumerate(zip(pictures, captions)):
        strip.paste(Image.fromarray(picture), (i * cell, 0))
        draw.text((i * cell + 2, height + 2), caption, fill="black", font=font)
    return np.asarray(strip)


# ---------------------------------------------------------------------------------------------------------------------
# A model that is being trained


@contextlib.contextmanager
def undisturbed(model: nn.Layer) -> Iterator[None]:
    """Put a model in eval mode, without gradients and mixed precision; afterwards all modes and random states are back.

    Fusing makes new layers, and what they are first filled with is drawn.
    """
    modes = [(layer, layer.training) for layer in model.sublayers(include_self=True)]
    model.eval()
    try:
        with (
            undisturbed_draws(),
            paddle.no_grad(),
            paddle.amp.auto_cast(enable=False),
            paddle.utils.unique_name.guard(),
        ):
            yield
    finally:
        for layer, mode in modes:
            layer.training = mode


class MaskHistory:
    """Follows the masks of a sparse training: when each weight became active, and how many were exchanged last.

    Ages count from when this object was made: a resumed run starts them anew.
    """

    def __init__(self, training: SparseTraining) -> None:
        self.training = training
        self.masks = {place.path: place.read_mask() for place in training.places}
        self.since = {path: np.full(mask.shape, training.step) for path, mask in self.masks.items()}
        self.churn: dict[str, float] = {}
        self._plain_update, training.update_masks = training.update_masks, self._update

    def _update(self, dense: Sequence[np.ndarray] | None = None) -> None:
        self._plain_update(dense)
        for place in self.training.places:
            before, after = self.masks[place.path], place.read_mask()
            self.churn[place.path] = churn(before, after)
            self.since[place.path][after & ~before] = self.training.step
            self.masks[place.path] = after

    def ages(self) -> dict[str, float]:
        """Return the mean number of steps that each parameter's active weights have been active."""
        return {path: float(self.training.step - self.since[path][mask].mean()) for path, mask in self.masks.items()}


class Monitor:
    """Writes what the layers of a model do, over fixed images `[N, C, H, W]`.

    Their labels are classes `[N]`, or 0 or 1 for each of several labels `[N, labels]`; `names` are those of the classes
    or labels, None for one that has none and is called by its number.

    Raises `ReparamError` where there is nothing to show: no layer of this library in train form, and no masks; and for
    weights of 16 bits.
    """

    def __init__(
        self,
        model: nn.Layer,
        writer: Writer,
        images: np.ndarray,
        labels: np.ndarray,
        masks: MaskHistory | None = None,
        names: Sequence[str | None] | None = None,
    ) -> None:
        self.model, self.writer, self.images, self.labels, self.masks = model, writer, images, labels, masks
        self.names = names or ()
        layers = [(path, each) for path, each in model.named_sublayers() if isinstance(each, ReparamLayer)]
        self.layers = {path: layer for path, layer in layers if not layer.is_repped}
        if not self.layers and not masked_places(model):
            raise ReparamError(
                f"Monitor has nothing to show: this {type(model).__name__} has no layer of this library and no masks; "
                "leave the section Monitor out"
            )
        if any(parameter.dtype in SIXTEEN_BITS for parameter in model.parameters()):
            raise ReparamError(
                "Monitor takes no weights of 16 bits: make them float32 (AMP.level: O1), or leave the section out"
            )
        self._count = 0

    def write_settings(self, settings: Mapping[str, Any], metrics: list[str]) -> None:
        """Write hyperparameters, once; `metrics` are the tags of the curves to compare runs by."""
        self.writer.add_hparams(dict(settings), metrics)

    def write(self, step: int, pictures: bool = False) -> None:
        """Write all that belongs to a step; histograms and pictures one time in `PICTURES_EVERY`, or if asked."""
        pictures = pictures or self._count % PICTURES_EVERY == 0
        self._count += 1
        with undisturbed(self.model):
            self._write_papers(step, pictures)
            self._write_branches(step)
            self._write_masks(step)
            if pictures:
                self._write_histograms(step)
                self._write_predictions(step)

    def _write_papers(self, step: int, pictures: bool) -> None:
        for paper, (kinds, names) in CURVES.items():
            if not any(isinstance(layer, kinds) for layer in self.layers.values()):
                continue
            for row in analysis.PAPERS[paper][1](self.model, self.images):
                for name in names:
                    if getattr(row, name) is not None:
                        self.writer.add_scalar(f"{paper}_{name}/{row.path}", getattr(row, name), step)
                if pictures and paper == "refconv" and row.connectivity.size:
                    self.writer.add_image(f"refconv_connectivity/{row.path}", as_picture(row.connectivity), step)

    def _write_branches(self, step: int) -> None:
        for path, layer in self.layers.items():
            norms = [(name, each) for name, each in layer.named_sublayers() if isinstance(each, BATCH_NORMS)]
            for name, norm in norms if len(norms) > 1 else []:
                self.writer.add_scalar(f"branch_scale/{path}.{name}", scale_of(norm), step)

    def _write_masks(self, step: int) -> None:
        for place in masked_places(self.model):
            self.writer.add_scalar(f"mask_density/{place.path}", float(place.read_mask().mean()), step)
        if self.masks is not None:
            for name, values in (("churn", self.masks.churn), ("age", self.masks.ages())):
                for path, value in values.items():
                    self.writer.add_scalar(f"mask_{name}/{path}", value, step)

    def _write_histograms(self, step: int) -> None:
        for path, layer in self.layers.items():
            for name, weight in layer.reparameterize().named_parameters():
                values = to_float64(weight).reshape(-1)
                if len(weight.shape) > 1 and np.isfinite(values).all():
                    self.writer.add_histogram(f"fused/{path}.{name}", values, step, buckets=50)

    def _write_predictions(self, step: int) -> None:
        output = self.model(paddle.to_tensor(self.images[:SHOWN]))
        output = output.get("logits", output.get("output")) if isinstance(output, dict) else output
        output = output[0] if isinstance(output, (list, tuple)) else output
        captions = [self._caption(*of_one) for of_one in zip(output.astype("float32"), self.labels)]
        self.writer.add_image("predictions", captioned(self.images[:SHOWN], captions), step)

    def _caption(self, scores: paddle.Tensor, label: np.ndarray) -> str:
        """Return what an image is and what the scores `[classes]` say of it."""
        if np.ndim(label):
            said = F.sigmoid(scores).numpy() >= 0.5
            return "\n".join(
                f"{verb} {', '.join(map(self._name, np.flatnonzero(which))) or 'none'}"
                for verb, which in (("is", label > 0), ("says", said))
            )
        shares = F.softmax(scores).numpy()
        return f"is {self._name(int(label))}\nsays {self._name(shares.argmax())} ({shares.max():.2f})"

    def _name(self, number: int) -> str:
        name = self.names[number] if 0 <= number < len(self.names) else None
        return str(number) if name is None else printable(name)
