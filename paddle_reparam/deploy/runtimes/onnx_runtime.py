"""onnxruntime: an ONNX file on the CPU; needs the packages of the extra `onnx`."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np

from ...errors import ReparamError, one_sentence
from ...files import Folder
from ..programs import FILE_NAME, in_order
from .base import LoadedNetwork

ONNX_FILE = f"{FILE_NAME}.onnx"


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

    def __init__(self, path: Folder, threads: int = 1) -> None:
        """Load a file; raises `ReparamError` where onnxruntime is missing or cannot load it."""
        onnxruntime = need("onnxruntime")
        with one_sentence(f"{path}: onnxruntime cannot load it"):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.log_severity_level = 3
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.output_shapes = [node.shape for node in self._session.get_outputs()]
        #: What the file says of itself, name -> text.
        self.metadata = self._session.get_modelmeta().custom_metadata_map
        super().__init__(str(path), in_order([node.name for node in self._session.get_inputs()]))

    def outputs_of(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs for arrays by the names of the inputs."""
        return self._session.run(None, inputs)


class OnnxRuntime:
    """onnxruntime on the CPU."""

    name = title = "onnxruntime"
    precisions = ("float32",)
    reads_onnx = True
    proves = True

    def version(self) -> str:
        """Return the package that runs it, with its version; raises `ReparamError` where it is missing."""
        return f"onnxruntime {need('onnxruntime').__version__}"

    def require(self) -> None:
        """Raise `ReparamError` where onnxruntime is missing."""
        need("onnxruntime")

    def file(self, folder: Folder) -> Path | None:
        """Return the ONNX file of a folder, or a file itself; None where there is none."""
        path = Path(folder) / ONNX_FILE if Path(folder).is_dir() else Path(folder)
        return path if path.is_file() else None

    def load(self, folder: Folder, threads: int = 1, keep_shapes: bool = True) -> OnnxModel:
        """Load the ONNX file of a folder, or a file; raises `ReparamError` where it cannot be loaded."""
        return OnnxModel(self.file(folder) or Path(folder) / ONNX_FILE, threads)


RUNTIMES = (OnnxRuntime(),)
