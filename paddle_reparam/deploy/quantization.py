"""Eight bits instead of 32: what a fused network's kernels lose by it, and an ONNX file with it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from paddle import nn

from ..arithmetic.tensors import to_float64
from ..errors import ReparamError, UsageError, one_sentence
from ..files import Folder, atomic_write
from ..report import Report, format_table
from .outputs import THRESHOLD
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
    """What a network gives up in int8: what both files are right about on so many images, and their sizes in bytes.

    `measure` is "top-1", or for networks of several labels an image "label accuracy": the share of all labels that are
    on the right side of 0.5.
    """

    measure: str
    images: int
    calibration_images: int
    float_accuracy: float
    int8_accuracy: float
    float_bytes: int
    int8_bytes: int

    @property
    def drop(self) -> float:
        """Accuracy that is lost, in percentage points; 0 where int8 is right as often, or more often."""
        return max(0.0, -self._change)

    @property
    def _change(self) -> float:
        return round(100 * (self.int8_accuracy - self.float_accuracy), 6)

    def __str__(self) -> str:
        table = format_table(
            ["network", self.measure, "bytes"],
            [
                ["float32", f"{self.float_accuracy:.2%}", f"{self.float_bytes:,}"],
                ["int8", f"{self.int8_accuracy:.2%}", f"{self.int8_bytes:,}"],
            ],
        )
        changed = f"int8 {'loses' if self.drop else 'gains'} {abs(self._change):.2f} points"
        return f"{table}\n{changed if self._change else 'int8 is right as often'}, on {self.images} images"


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
    where more is lost, and `UsageError` for a `largest_drop` that is not 0 or more.
    """
    if not largest_drop >= 0:
        raise UsageError(f"what int8 may lose is {largest_drop:g} percentage points; give 0 or more")
    source = Path(source)
    reports = []

    def write(temporary: Path) -> None:
        quantize_onnx(source, temporary, calibration, metadata=metadata)
        models = [OnnxModel(file) for file in (source, temporary)]
        right, answers, images, measure = np.zeros(2, int), 0, 0, "top-1"
        for pixels, labels in batches:
            images += len(labels)
            known = labels >= 0
            answers += int(known.sum())
            if labels.ndim > 1:
                measure = "label accuracy"
            right += [int((_answers(model.run(pixels)[0], labels) == labels)[known].sum()) for model in models]
        if not answers:
            raise ReparamError("there are no images to measure the accuracy on")
        float_accuracy, int8_accuracy = (right / answers).tolist()
        sizes = [file.stat().st_size for file in (source, temporary)]
        report = Int8Report(measure, images, len(calibration), float_accuracy, int8_accuracy, *sizes)
        if not report.drop <= largest_drop:
            raise ReparamError(
                f"int8 loses {report.drop:.2f} points of {measure} ({float_accuracy:.2%} -> {int8_accuracy:.2%} on "
                f"{images} images), more than the {largest_drop:g} that are allowed; nothing is written"
            )
        reports.append(report)

    atomic_write(target, write)
    return reports[0]


def _answers(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return what scores `[N, classes]` say, in the form of the labels: a class an image, or 0 or 1 for each label."""
    if scores.shape[0] != len(labels) or scores.ndim != 2 or labels.shape[1:] not in ((), scores.shape[1:]):
        raise ReparamError(f"the network puts out {list(scores.shape)} for labels {list(labels.shape)}")
    return (scores >= THRESHOLD) if labels.ndim > 1 else scores.argmax(1)
