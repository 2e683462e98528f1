"""Eight bits instead of 32: what a fused network's kernels lose by it, and an ONNX file with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import numpy as np
from paddle import nn

from ..arithmetic.tensors import to_float64
from ..errors import ReparamError
from ..files import Folder, atomic_write
from ..report import Report, format_table
from .int8_check import check_int8
from .int8_onnx import write_int8
from .precision import Agreement, agreement, require_drop, require_images
from .runtimes.onnx_runtime import OnnxModel

#: A channel whose largest weight is so many times the median channel's stands out.
OUTLIER = 10.0
_LEVELS = 127


@dataclass
class KernelRange:
    """What a kernel's numbers are like. Its channels are its outputs; a channel of zeros alone does not count.

    `largest` is max|w|; `spread` the largest max|w| of a channel over the smallest; `outliers` the channels with more
    than ten times the median channel's; `error_per_tensor` and `error_per_channel` the root mean square of what
    rounding to int8 with one scale, or with a scale for each channel, changes, relative to that of the weights.
    """

    path: str
    shape: list[int]
    largest: float
    spread: float
    outliers: list[int]
    error_per_tensor: float
    error_per_channel: float


@dataclass
class QuantizationReport(Report):
    """The ranges of a fused network's kernels, in the order in which it holds them."""

    kernels: list[KernelRange]

    def __str__(self) -> str:
        return self.table(self.kernels)

    @staticmethod
    def table(kernels: list[KernelRange]) -> str:
        """Return kernels as a table, one a row."""
        return format_table(
            ["kernel", "shape", "largest", "spread", "outliers", "int8 error: per tensor", "per channel"],
            [
                [k.path, "x".join(map(str, k.shape)), f"{k.largest:.2e}", f"{k.spread:.1f}", len(k.outliers),
                 f"{k.error_per_tensor:.2%}", f"{k.error_per_channel:.2%}"]
                for k in kernels
            ],
        )  # fmt: skip

    def worst(self, count: int) -> str:
        """Return the kernels that lose most with one scale, as a table: a scale for each channel helps them most."""
        return self.table(sorted(self.kernels, key=lambda k: -k.error_per_tensor)[:count])


def quantization_report(model: nn.Layer) -> QuantizationReport:
    """Return the ranges of every weight of two or more dimensions in a network, best a fused one.

    Raises `ReparamError` where there is none.
    """
    weights = [(name, p) for name, p in model.named_parameters() if p.ndim > 1 and p.is_floating_point()]
    if not weights:
        raise ReparamError(f"{type(model).__name__} has no kernels; there is nothing to quantise")
    return QuantizationReport([kernel_range(name, to_float64(weight)) for name, weight in weights])


def kernel_range(name: str, weight: np.ndarray) -> KernelRange:
    """Return what a weight is like: of a Linear `[in, out]`, or with its outputs first.

    Raises `ReparamError` for numbers that are not finite.
    """
    if not np.isfinite(weight).all():
        raise ReparamError(f"{name}: it holds numbers that are not finite")
    weight = weight.astype(np.float64)
    channels = weight.T if weight.ndim == 2 else weight.reshape(len(weight), -1)
    ranges = np.abs(channels).max(axis=1)
    used = ranges[ranges > 0]
    return KernelRange(
        path=name.removesuffix(".weight"),
        shape=list(weight.shape),
        largest=float(ranges.max()),
        spread=float(used.max() / used.min()) if used.size else 1.0,
        outliers=np.flatnonzero(ranges > OUTLIER * np.median(used)).tolist() if used.size else [],
        error_per_tensor=_rounding_error(channels, ranges.max(keepdims=True)),
        error_per_channel=_rounding_error(channels, ranges),
    )


def _rounding_error(channels: np.ndarray, ranges: np.ndarray) -> float:
    steps = np.where(ranges > 0, ranges, 1.0)[:, None] / _LEVELS
    power = np.square(channels).mean()
    error = np.square(channels - np.round(channels / steps) * steps).mean()
    return float(np.sqrt(error / power)) if power else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# An ONNX file of eight bits


def quantize_onnx(
    source: Folder,
    target: Folder,
    images: np.ndarray,
    metadata: Mapping[str, str] | None = None,
    drop: Callable[[Path], float] | None = None,
    largest_drop: float = 1.0,
    threads: int = 1,
) -> dict[str, Any]:
    """Write an ONNX file of float32 in int8, calibrated on images `[N, C, H, W]`; return the settings that were chosen.

    Weights have a scale for each channel, activations one each; the numbers are those of ONNX' QuantizeLinear, which
    any runtime can execute. Channels of very different size are equalised first. `drop` returns what a file loses, in
    percentage points: while that is more than `largest_drop`, the layers by which the output changes most stay float32,
    up to half of them. Without it all become int8. The file says `metadata` of itself, and has passed `check_int8`.

    The settings can be dumped as JSON: "activations" (uint8 or int8), "ranges" (minmax or mse), "error" (of the output,
    relative, on some of the images), "equalized" (tensors), "int8" and "float32" (layers; worst first those that
    stayed), and "drop" (None without that function). Raises `ReparamError` without images, without the extra `onnx`,
    where onnxruntime cannot quantise the network, and where it loses too much all the same.
    """
    if not len(images):
        raise ReparamError("the ranges of the activations are measured on images, and none was given")
    settings = write_int8(source, target, images, metadata, drop, largest_drop, threads)
    check_int8(source, target, images, threads)
    return settings


def drop_on(
    source: Folder, batches: Iterable[tuple[np.ndarray, np.ndarray]], largest_drop: float, threads: int = 1
) -> Callable[[Path], Agreement]:
    """Return what measures a file beside the float32 one, which is run on the images but once.

    `batches` are images with labels, as for `export_int8`. Raises `ReparamError` for too few images.
    """
    exact, images, outputs, labels = OnnxModel(source, threads), [], [], []
    for pixels, of_pixels in batches:
        images.append(pixels)
        outputs.append(exact.run(pixels)[0])
        labels.append(of_pixels)
    require_images(sum(map(len, labels)), largest_drop)

    def measured(file: Path) -> Agreement:
        model = OnnxModel(file, threads)
        found = np.concatenate([model.run(pixels)[0] for pixels in images])
        return agreement(np.concatenate(outputs), found, np.concatenate(labels), largest_drop)

    return measured


@dataclass
class Int8Report(Report):
    """What a network gives up in int8, measured on images, and the sizes of both files in bytes."""

    measured: Agreement
    calibration_images: int
    float_bytes: int
    int8_bytes: int
    #: What `quantize_onnx` chose.
    settings: dict[str, Any]

    def __str__(self) -> str:
        measured = self.measured
        table = format_table(
            ["network", measured.measure, "bytes"],
            [
                ["float32", f"{measured.reference_accuracy:.2%}", f"{self.float_bytes:,}"],
                ["int8", f"{measured.accuracy:.2%}", f"{self.int8_bytes:,}"],
            ],
        )
        changed = f"int8 {'loses' if measured.drop else 'gains'} {abs(measured.change):.2f} points"
        changed = changed if measured.change else "int8 is right as often"
        kept = self.settings["float32"]
        stayed = f"; in float32 stayed {', '.join(kept)}" if kept else ""
        return f"{table}\n{changed}, on {measured.images} images{stayed}"


def export_int8(
    source: Folder,
    target: Folder,
    calibration: np.ndarray,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    largest_drop: float = 1.0,
    metadata: Mapping[str, str] | None = None,
) -> Int8Report:
    """Write an ONNX file in int8 if it is as good: its accuracy on images may be `largest_drop` points lower at most.

    `calibration` is `[N, C, H, W]`, `batches` are images of that form with labels `[N]`, by which top-1 is measured, or
    `[N, labels]` of 0 and 1 (and -1 for what is not known). The first output is what scores the classes, in the second
    case by probabilities. The file says `metadata` of itself. Raises `ReparamError`, and leaves what stood at `target`,
    where more is lost and for too few images to show that, and `UsageError` for a `largest_drop` that is not 0 or more.
    """
    require_drop(largest_drop)
    source = Path(source)
    reports = []

    def write(temporary: Path) -> None:
        measure = drop_on(source, batches, largest_drop)
        settings = quantize_onnx(
            source, temporary, calibration, metadata, lambda file: measure(file).drop, largest_drop
        )
        sizes = [file.stat().st_size for file in (source, temporary)]
        reports.append(Int8Report(measure(temporary), len(calibration), *sizes, settings))

    atomic_write(target, write)
    return reports[0]
