"""Eight bits instead of 32: what a fused network's kernels lose by it, and an ONNX file with it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from paddle import nn

from ..arithmetic.tensors import to_float64
from ..errors import ReparamError, one_sentence
from ..files import Folder, atomic_write
from ..report import Report, format_table
from .precision import Agreement, agreement, require_drop, require_images
from .runtimes.onnx_runtime import OnnxModel, need

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
    source: Folder, target: Folder, images: np.ndarray, batch: int = 16, metadata: Mapping[str, str] | None = None
) -> None:
    """Write an ONNX file of float32 in int8, with the ranges that its activations have on images `[N, C, H, W]`.

    Weights have a scale for each channel, activations one each; the numbers are those of ONNX' QuantizeLinear, which
    any runtime can execute. The file says `metadata` of itself. Raises `ReparamError` without images, without the extra
    `onnx`, and where onnxruntime cannot quantise the network.
    """
    if not len(images):
        raise ReparamError("the ranges of the activations are measured on images, and none was given")
    runtime, tool = need("onnxruntime"), need("onnxruntime.quantization")
    [name] = OnnxModel(source).inputs

    class Reader(tool.CalibrationDataReader):
        batches = iter([{name: images[i : i + batch]} for i in range(0, len(images), batch)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder, one_sentence(f"{source}: onnxruntime cannot quantise it"):
        prepared = Path(folder) / "prepared.onnx"
        runtime.set_default_logger_severity(3)  # errors; it would warn of each constant that nothing reads
        # It folds constants into initialisers, which alone can be quantised.
        tool.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        tool.quantize_static(
            str(prepared), str(target), Reader(), quant_format=tool.QuantFormat.QDQ, per_channel=True,
            activation_type=tool.QuantType.QInt8, weight_type=tool.QuantType.QInt8,
        )  # fmt: skip
        if metadata:
            onnx = need("onnx")
            model = onnx.load(str(target))
            onnx.helper.set_model_props(model, {**{each.key: each.value for each in model.metadata_props}, **metadata})
            onnx.save(model, str(target))


@dataclass
class Int8Report(Report):
    """What a network gives up in int8, measured on images, and the sizes of both files in bytes."""

    measured: Agreement
    calibration_images: int
    float_bytes: int
    int8_bytes: int

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
        return f"{table}\n{changed if measured.change else 'int8 is right as often'}, on {measured.images} images"


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
        quantize_onnx(source, temporary, calibration, metadata=metadata)
        models = [OnnxModel(file) for file in (source, temporary)]
        measured = [([model.run(pixels)[0] for model in models], labels) for pixels, labels in batches]
        require_images(sum(len(labels) for _, labels in measured), largest_drop)
        outputs = [np.concatenate(parts) for parts in zip(*(outputs for outputs, _ in measured))]
        lost = agreement(*outputs, np.concatenate([labels for _, labels in measured]), largest_drop)
        if not lost.passed:
            raise ReparamError(
                f"int8 loses {lost.drop:.2f} points of {lost.measure} ({lost.reference_accuracy:.2%} -> "
                f"{lost.accuracy:.2%} on {lost.images} images), more than the {largest_drop:g} that are allowed; "
                "nothing is written"
            )
        sizes = [file.stat().st_size for file in (source, temporary)]
        reports.append(Int8Report(lost, len(calibration), *sizes))

    atomic_write(target, write)
    return reports[0]
