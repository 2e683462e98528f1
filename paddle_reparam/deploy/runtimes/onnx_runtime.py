"""onnxruntime: an ONNX file on the CPU; needs the packages of the extra `onnx`."""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np

from ...errors import ReparamError, one_sentence
from ...files import Folder
from ...measure.processors import lacks_vnni
from ..programs import FILE_NAME, in_order
from .base import LoadedNetwork, OfOneFile

ONNX_FILE = f"{FILE_NAME}.onnx"
INT8_ONNX_FILE = f"{FILE_NAME}_int8.onnx"


def need(package: str) -> ModuleType:
    """Import a package of the extra `onnx`; raises `ReparamError` where it is missing or does not fit this Paddle."""
    try:
        return importlib.import_module(package)
    except (ImportError, ValueError) as error:  # paddle2onnx raises the latter on Paddle 2
        raise ReparamError(
            f"ONNX needs the package {package} ({error}); pip install 'paddle-reparam[onnx]', on Paddle 3"
        ) from error


class OnnxModel(LoadedNetwork):
    """An ONNX file on the CPU, run by onnxruntime."""

    runtime = "onnxruntime"

    def __init__(self, model: Folder | bytes, threads: int = 1) -> None:
        """Load a file, or what one would hold; raises `ReparamError` where onnxruntime is missing or cannot load it."""
        onnxruntime = need("onnxruntime")
        name = "a graph" if isinstance(model, bytes) else str(model)
        with one_sentence(f"{name}: onnxruntime cannot load it"):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.log_severity_level = 3
            if lacks_vnni():
                # Without it, sums of products of eight bits overflow there. With VNNI it is not needed, and onnxruntime
                # 1.32 cannot load some graphs of signed activations with it.
                options.add_session_config_entry("session.x64quantprecision", "1")
            self._session = onnxruntime.InferenceSession(
                model if isinstance(model, bytes) else name, options, providers=["CPUExecutionProvider"]
            )
        self.output_shapes = [node.shape for node in self._session.get_outputs()]
        #: What the file says of itself, name -> text.
        self.metadata = self._session.get_modelmeta().custom_metadata_map
        super().__init__(name, in_order([node.name for node in self._session.get_inputs()]))

    def outputs_of(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs for arrays by the names of the inputs."""
        return self._session.run(None, inputs)


class OnnxRuntime(OfOneFile):
    """onnxruntime on the CPU, with the file of one precision."""

    def version(self) -> str:
        """Return the package that runs it, with its version; raises `ReparamError` where it is missing."""
        return f"onnxruntime {need('onnxruntime').__version__}"

    def require(self) -> None:
        """Raise `ReparamError` where onnxruntime is missing."""
        need("onnxruntime")

    def load(self, folder: Folder, threads: int = 1, keep_shapes: bool = True) -> OnnxModel:
        """Load the ONNX file of a folder, or a file; raises `ReparamError` where it cannot be loaded."""
        return OnnxModel(self.place(folder), threads)


RUNTIMES = (
    OnnxRuntime("onnxruntime", "onnxruntime", "float32", ONNX_FILE),
    OnnxRuntime("onnxruntime-int8", "onnxruntime, int8", "int8", INT8_ONNX_FILE),
)
