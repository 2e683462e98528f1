"""A file of eight bits for OpenVINO, made of an ONNX file by NNCF; needs the packages of the extra `openvino`."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ReparamError, one_sentence
from ..files import Folder
from .outputs import error_beside_spread
from .runtimes.openvino import METADATA, need_openvino

#: Operators that multiply, and are worth eight bits.
_ARITHMETIC = ("Convolution", "GroupConvolution", "MatMul")
#: Images that ranges are measured on at once, that settings are compared on, and layers, whose maps are all held.
_BATCH, _COMPARED, _COMPARED_BY_LAYER = 16, 32, 4
#: Zero points take time where they are not needed: they have to take so much of the error away.
_WORTH_ZERO_POINTS = 0.9
#: Biases are corrected one layer after the other, each with what comes before it: of more layers that takes minutes.
_MOST_CORRECTED = 128


@dataclass(frozen=True)
class _Settings:
    """How a network is quantised.

    `ranges` of activations are the "largest" ones, or the "mean" of those of batches, which cut outliers off. With
    `zero_points` they need not lie around 0. With `corrected` biases what rounding moves on average is taken out of the
    biases, map by map. `float_layers` are left as they are.
    """

    ranges: str = "largest"
    zero_points: bool = False
    corrected: bool = False
    float_layers: tuple[str, ...] = ()


def quantize_openvino(
    source: Folder,
    target: Folder,
    images: np.ndarray,
    metadata: Mapping[str, str] | None = None,
    drop: Callable[[Path], float] | None = None,
    largest_drop: float = 1.0,
    threads: int = 1,
) -> dict[str, Any]:
    """Write an ONNX file of float32 in int8 for OpenVINO, calibrated on images `[N, C, H, W]`; return the settings.

    Two files are written: the network, which ends in `.xml`, and its weights beside it, which end in `.bin`; the same
    ones each time. Weights have a scale for each channel, activations one each; the settings are those by which the
    output changes least. `drop` returns what a file loses, in percentage points: while that is more than
    `largest_drop`, the layers that round worst stay in float32, up to half of them. The file says `metadata` of itself.
    Raises `ReparamError` without images, without the extra `openvino`, and where NNCF cannot quantise the network.
    """
    if not len(images):
        raise ReparamError("the ranges of the activations are measured on images, and none was given")
    need_openvino("nncf").set_log_level(logging.ERROR)
    target = Path(target)
    with one_sentence(f"{source}: NNCF cannot quantise it"), contextlib.redirect_stdout(io.StringIO()):
        network = _Network(source, images, threads)
        settings = network.best_settings()
        quantized = network.quantized(settings)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            written = Path(folder) / target.name
            _save(quantized, written, metadata or {})
            worst: list[str] = []
            count = 1
            while drop is not None and drop(written) > largest_drop:
                worst = worst or network.worst_first(quantized)
                if count > len(worst) // 2:
                    break
                settings = replace(settings, float_layers=tuple(worst[:count]))
                _save(network.quantized(settings), written, metadata or {})
                count *= 2
            for suffix in (".bin", ".xml"):
                os.replace(written.with_suffix(suffix), target.with_suffix(suffix))
    return asdict(settings)


class _Network:
    """A network in float32, its calibration images, and what it puts out for some of them."""

    def __init__(self, source: Folder, images: np.ndarray, threads: int) -> None:
        self.source, self.threads = source, threads
        self.batches = [np.array(images[i : i + _BATCH]) for i in range(0, len(images), _BATCH)]
        self.compared = np.array(images[:: -(-len(images) // _COMPARED)])
        #: Those that ranges are measured on while settings are compared.
        self.few = [self.compared[i : i + _BATCH] for i in range(0, len(self.compared), _BATCH)]
        self.model = self._read()
        [self.expected] = _outputs(self.model, [self.compared], self.threads)[:1]

    def _read(self) -> Any:
        # Not by `read_model`: it leaves the kernels of grouped convolutions behind a reshape, and NNCF then measures
        # another range for each column of a kernel and leaves the convolution in float32.
        return need_openvino().convert_model(str(self.source))

    def quantized(self, settings: _Settings, batches: Sequence[np.ndarray] | None = None) -> Any:
        """Return the network in int8, with ranges measured on batches, or on all images."""
        batches = self.batches if batches is None else batches
        nncf = need_openvino("nncf")
        # The quick way to correct biases, which is the default, made the error of networks 4 times as large.
        ranges = need_openvino("nncf.quantization.range_estimator").RangeEstimatorParametersSet
        presets = nncf.QuantizationPreset
        return nncf.quantize(
            self._read(),
            nncf.Dataset(batches),
            subset_size=len(batches),
            preset=presets.MIXED if settings.zero_points else presets.PERFORMANCE,
            fast_bias_correction=False,
            ignored_scope=nncf.IgnoredScope(names=list(settings.float_layers)),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                disable_bias_correction=not settings.corrected,
                activations_range_estimator_params=ranges.MINMAX
                if settings.ranges == "largest"
                else ranges.MEAN_MINMAX,
            ),
        )

    def best_settings(self) -> _Settings:
        """Return the settings by which the output changes least, tried one after the other."""
        best = _Settings()
        least = self._error(best)
        changes = [({"ranges": "mean"}, 1.0), ({"zero_points": True}, _WORTH_ZERO_POINTS), ({"corrected": True}, 1.0)]
        layers = sum(op.get_type_name() in _ARITHMETIC for op in self.model.get_ops())
        for change, worth in changes if layers <= _MOST_CORRECTED else changes[:-1]:
            settings = replace(best, **change)
            error = self._error(settings)
            if error < worth * least:
                best, least = settings, error
        return best

    def _error(self, settings: _Settings) -> float:
        quantized = self.quantized(settings, self.few)
        return error_beside_spread(_outputs(quantized, [self.compared], self.threads)[0], self.expected)

    def worst_first(self, quantized: Any) -> list[str]:
        """Return the layers in int8, by how much farther from float32 their outputs are than their inputs."""
        layers = {op.friendly_name: op for op in self.model.get_ops() if op.get_type_name() in _ARITHMETIC}
        images = self.compared[:_COMPARED_BY_LAYER]
        exact = _maps(self.model, list(layers), images, self.threads)
        # One after the other: where OpenVINO 2026.4 puts out what a convolution in int8 gives before its bias, all that
        # comes behind that convolution is wrong.
        maps = {name: _maps(quantized, [name], images, self.threads)[name] for name in layers}
        errors = {name: error_beside_spread(maps[name], exact[name]) ** 2 for name in layers}
        growth = {name: errors[name] - max((errors[each] for each in _before(op)), default=0.0)
                  for name, op in layers.items()}  # fmt: skip
        return sorted(growth, key=lambda name: -growth[name])


def _before(layer: Any) -> set[str]:
    """Return the names of the layers whose outputs reach a layer through no other layer."""
    found, seen, open_ends = set(), set(), [each.get_node() for each in layer.input_values()]
    while open_ends:
        node = open_ends.pop()
        if node.friendly_name in seen:
            continue
        seen.add(node.friendly_name)
        if node.get_type_name() in _ARITHMETIC:
            found.add(node.friendly_name)
        else:
            open_ends += [each.get_node() for each in node.input_values()]
    return found


def _maps(model: Any, layers: Sequence[str], images: np.ndarray, threads: int) -> dict[str, np.ndarray]:
    """Return what layers of a model put out for images."""
    model = model.clone()
    model.add_outputs([(name, 0) for name in layers])
    # What a model puts out anyway is not there twice.
    made_by = [each.node.input_value(0).get_node().friendly_name for each in model.outputs]
    return {name: output for name, output in zip(made_by, _outputs(model, [images], threads)) if name in layers}


def _outputs(model: Any, batches: Sequence[np.ndarray], threads: int) -> list[np.ndarray]:
    """Return what a model puts out in float32, or in int8 where it has that, for batches of images."""
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    request = need_openvino().Core().compile_model(model, "CPU", options)
    parts = [list(request(batch).to_tuple()) for batch in batches]
    return [np.concatenate(each) for each in zip(*parts)]


def _save(quantized: Any, path: Path, metadata: Mapping[str, str]) -> None:
    # What has no name of its own is called by how many there were before it in this process.
    for index, operation in enumerate(quantized.get_ordered_ops()):
        kind = operation.get_type_name()
        if re.fullmatch(rf"{kind}_\d+", operation.friendly_name):
            operation.friendly_name = f"{kind}_{index}"
    for name, text in metadata.items():
        quantized.set_rt_info(text, [METADATA, name])
    need_openvino().save_model(quantized, str(path), compress_to_fp16=False)
