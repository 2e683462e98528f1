"""OpenVINO on the CPU, in float32, bfloat16 and int8; needs the packages of the extra `openvino`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ...errors import ReparamError, one_sentence
from ...files import Folder
from ...measure.processors import require_bfloat16
from ..programs import FILE_NAME, in_order
from .base import LoadedNetwork, OfOneFile
from .onnx_runtime import ONNX_FILE

#: The network in int8; its weights are in the file of the same name that ends in `.bin`.
INT8_OPENVINO_FILE = f"{FILE_NAME}_int8.xml"

#: Where a file of OpenVINO keeps what an ONNX file keeps as metadata.
METADATA = "framework"

#: Which of OpenVINO's readers reads a file. Left to itself it tries all of them on a damaged one.
_READERS = {".onnx": "onnx", ".xml": "ir", ".pdmodel": "paddle"}

#: How many shapes of the inputs a network is compiled for. Of ResNet50 each of them takes 60 MB in bfloat16.
_MOST_SHAPES = 4


def need_openvino(package: str = "openvino") -> ModuleType:
    """Import a package of the extra `openvino`; raises `ReparamError` where it is missing."""
    # Both packages tell their makers of each use by way of this one, and do without it where it is missing.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ReparamError(
            f"OpenVINO needs the package {package} ({error}); pip install 'paddle-reparam[openvino]'"
        ) from error


def read_model(path: Folder) -> Any:
    """Return the `openvino.Model` of a file; raises `ReparamError` where OpenVINO is missing or cannot read it."""
    openvino = need_openvino()
    with one_sentence(f"{path}: OpenVINO cannot load it"):
        reader = openvino.frontend.FrontEndManager().load_by_framework(_READERS[Path(path).suffix])
        model = reader.convert(reader.load(str(path)))
        if not model.inputs or not model.outputs:
            raise ValueError("there is no network in it")
    return model


def _require_bfloat16() -> None:
    require_bfloat16(lambda: "BF16" in need_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


class OpenVinoModel(LoadedNetwork):
    """A network on the CPU, run by OpenVINO.

    It is compiled for each shape of the inputs, which is up to 1.5 times as fast as one form for all of them, for a few
    shapes; all that come later share a form that takes every shape. With `keep_shapes=False` there is one at a time, as
    each holds the weights: that of the first shape until another comes, and then the one for all.
    """

    runtime = "OpenVINO"

    def __init__(self, path: Folder, hint: str = "f32", threads: int = 1, keep_shapes: bool = True) -> None:
        """Load a file; `hint` is the precision of what the file has in float32, in OpenVINO's word.

        Raises `ReparamError` where OpenVINO is missing or cannot load it.
        """
        self._model = read_model(path)
        with one_sentence(f"{path}: OpenVINO cannot load it"):
            self._core = need_openvino().Core()
            self._options = {
                "INFERENCE_PRECISION_HINT": hint,
                "INFERENCE_NUM_THREADS": threads,
                "PERFORMANCE_HINT": "LATENCY",
            }
            told = self._model.get_rt_info([METADATA]).value if self._model.has_rt_info([METADATA]) else {}
            self.metadata = {name: self._model.get_rt_info([METADATA, name]).astype(str) for name in told}
            names = [each.node.friendly_name for each in self._model.inputs]
        self._keep_shapes = keep_shapes
        self._compiled: dict[tuple[tuple[int, ...], ...] | None, Any] = {}
        super().__init__(str(path), in_order(names))

    def outputs_of(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs for arrays by the names of the inputs."""
        arrays = []
        for each in self._model.inputs:
            array = np.ascontiguousarray(inputs[each.node.friendly_name])
            arrays.append(array)
            # A model takes every shape that it is told to, where it was made for one alone as well.
            if not each.partial_shape.compatible(need_openvino().PartialShape(list(array.shape))):
                raise ReparamError(f"{self.name}: it takes {each.partial_shape}, not {list(array.shape)}")
            if array.dtype != each.element_type.to_dtype():
                raise ReparamError(f"{self.name}: it takes {each.element_type.to_dtype()}, not {array.dtype}")
        shapes = tuple(array.shape for array in arrays)
        if shapes not in self._compiled and len(self._compiled) >= (_MOST_SHAPES if self._keep_shapes else 1):
            shapes = None
        if shapes not in self._compiled:
            if not self._keep_shapes:
                self._compiled.clear()
            self._compiled[shapes] = self._compile(shapes)
        results = self._compiled[shapes].infer(arrays, share_inputs=True, share_outputs=False)
        return [results[index] for index in range(len(self._model.outputs))]

    def _compile(self, shapes: tuple[tuple[int, ...], ...] | None) -> Any:
        """Return what runs the network, for inputs of these shapes or for all."""
        model = self._model
        if shapes is not None:
            model = model.clone()
            model.reshape({index: list(shape) for index, shape in enumerate(shapes)})
        return self._core.compile_model(model, "CPU", self._options).create_infer_request()


class OpenVino(OfOneFile):
    """OpenVINO on the CPU, in one precision."""

    def version(self) -> str:
        """Return the package that runs it, with its version; raises `ReparamError` where it is missing."""
        return f"openvino {need_openvino().__version__.split('-')[0]}"

    def require(self) -> None:
        """Raise `ReparamError` where OpenVINO is missing, or the processor does not multiply in bfloat16."""
        need_openvino()
        if self.precision == "bfloat16":
            _require_bfloat16()

    def load(self, folder: Folder, threads: int = 1, keep_shapes: bool = True) -> OpenVinoModel:
        """Load the file of a folder, or a file; raises `ReparamError` where it cannot be loaded."""
        path = self.place(folder)
        return OpenVinoModel(path, self._hint(), threads, keep_shapes)

    def _hint(self) -> str:
        """Return the precision of what has no other in the file, in OpenVINO's word."""
        if self.precision == "int8":
            try:
                _require_bfloat16()
            except ReparamError:
                return "f32"
        return "f32" if self.precision == "float32" else "bf16"


RUNTIMES = (
    OpenVino("openvino", "OpenVINO", "float32", ONNX_FILE),
    OpenVino("openvino-bfloat16", "OpenVINO, bfloat16", "bfloat16", ONNX_FILE),
    OpenVino("openvino-int8", "OpenVINO, int8", "int8", INT8_OPENVINO_FILE),
)
