"""Paddle Inference: its Predictor on the CPU, with oneDNN and without, and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
from paddle.inference import Config, create_predictor

from ...errors import ReparamError, one_sentence
from ...files import Folder
from ...measure.processors import require_bfloat16
from ..programs import WEIGHTS_SUFFIX, in_order, program_file, program_to_run, programs_in
from .base import LoadedNetwork

#: MiB of a GPU's memory that Paddle takes at first; it takes more when it needs more.
_GPU_MEMORY = 256


def require_gpu() -> None:
    """Raise `ReparamError` where this Paddle finds no GPU."""
    if not paddle.is_compiled_with_cuda() or paddle.device.cuda.device_count() == 0:
        raise ReparamError("Paddle finds no GPU here; one needs a GPU of NVIDIA, its driver, and paddlepaddle-gpu")


class LoadedPredictor(LoadedNetwork):
    """An exported network, run by Paddle Inference's Predictor: on the CPU, or with `gpu` on the first GPU."""

    runtime = "Paddle Inference"

    def __init__(
        self,
        folder: Folder,
        onednn: bool = True,
        threads: int = 1,
        gpu: bool = False,
        keep_shapes: bool = True,
        bfloat16: bool = False,
    ) -> None:
        """Load what `export_inference` wrote into `folder`; raises `ReparamError` where it cannot be loaded.

        For every shape of the input that it was given, oneDNN keeps another copy of the weights. Without `keep_shapes`
        it keeps one, for the last shape given to any network of this thread.
        """
        program = program_to_run(folder)
        if gpu:
            require_gpu()
        with one_sentence(f"{folder}: Paddle Inference cannot load it"):
            config = Config(str(program), str(program.with_suffix(WEIGHTS_SUFFIX)))
            if gpu:
                config.enable_use_gpu(_GPU_MEMORY, 0)
            else:
                config.disable_gpu()
            config.disable_glog_info()
            config.set_cpu_math_library_num_threads(threads)
            if onednn and not gpu:
                config.enable_mkldnn()
                if bfloat16:
                    config.enable_mkldnn_bfloat16()
                if not keep_shapes:
                    config.set_mkldnn_cache_capacity(1)
            else:
                config.disable_mkldnn()
            if program.suffix == ".json":
                # A program of Paddle 3 cannot be run with enable_memory_optim unless these two come first.
                config.enable_new_executor()
                config.enable_new_ir(True)
            config.enable_memory_optim()
            self._predictor = create_predictor(config)
            names = in_order(self._predictor.get_input_names())
        super().__init__(str(folder), names)

    def outputs_of(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs for arrays by the names of the inputs."""
        for name, array in inputs.items():
            handle = self._predictor.get_input_handle(name)
            handle.reshape(array.shape)
            handle.copy_from_cpu(np.ascontiguousarray(array))
        self._predictor.run()
        return [self._predictor.get_output_handle(n).copy_to_cpu() for n in self._predictor.get_output_names()]


@dataclass(frozen=True)
class PaddleInference:
    """Paddle Inference in one of its ways to run a program."""

    name: str
    title: str
    onednn: bool = False
    gpu: bool = False
    #: A GPU rounds in another way: what comes out there has not been compared yet.
    proves: bool = True
    precision: str = "float32"
    file_name = None

    def version(self) -> str:
        """Return the package that runs it, with its version."""
        return f"paddle {paddle.__version__}"

    def require(self) -> None:
        """Raise `ReparamError` where what is needed, a GPU or a processor with bfloat16, is not there."""
        if self.gpu:
            require_gpu()
        if self.precision == "bfloat16":
            require_bfloat16()

    def file(self, folder: Folder) -> Path | None:
        """Return the program of an export; None where there is none. Raises `ReparamError` for two of them."""
        return program_file(folder) if programs_in(folder) else None

    def load(self, folder: Folder, threads: int = 1, keep_shapes: bool = True) -> LoadedPredictor:
        """Load what `export_inference` wrote into `folder`; raises `ReparamError` where it cannot be loaded."""
        return LoadedPredictor(folder, self.onednn, threads, self.gpu, keep_shapes, self.precision == "bfloat16")


#: Those that are as fast as Paddle is.
SERVING = (
    PaddleInference("onednn", "Predictor, oneDNN", onednn=True),
    PaddleInference("onednn-bfloat16", "Predictor, oneDNN, bfloat16", onednn=True, precision="bfloat16"),
    PaddleInference("gpu", "Predictor, GPU, not tried yet", gpu=True, proves=False),
)

RUNTIMES = (*SERVING, PaddleInference("no-onednn", "Predictor, no oneDNN"))
