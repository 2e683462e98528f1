"""Paddle's Executor: an exported program operator by operator."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from ...errors import one_sentence
from ...files import Folder
from ..programs import in_order, program_file, program_to_run, programs_in, programs_of, static_mode
from .base import LoadedNetwork


def _weights_of(program: Any) -> list[str]:
    """Return the names of the parameters and buffers of a loaded program, an old one or one of Paddle 3."""
    if isinstance(program, paddle.base.framework.Program):
        return [variable.name for variable in program.list_vars() if variable.persistable]
    from paddle.static.pir_io import get_pir_parameters

    return [variable.name for group in get_pir_parameters(program) for variable in group]


def _clear(scope: Any, names: Sequence[str]) -> None:
    for variable in filter(None, map(scope.find_var, names)):
        with contextlib.suppress(ValueError):  # where it holds no tensor
            variable.get_tensor()._clear()


class LoadedProgram(LoadedNetwork):
    """An exported network, run by Paddle's Executor: operator by operator, without the passes of Paddle Inference.

    `paddle.jit.load` would read a program too, but it unpickles a file
    `inference.pdiparams.info` where one lies beside it, and keeps threads for each program for ever.
    """

    runtime = "Paddle"

    def __init__(self, folder: Folder) -> None:
        """Load what `export_inference` wrote into `folder`; raises `ReparamError` where it cannot be loaded."""
        path = program_to_run(folder)
        self._format = path.suffix[1:]
        self._scope = paddle.static.Scope()
        with one_sentence(f"{folder}: Paddle cannot load it"), self._inside():
            self._executor = paddle.static.Executor(paddle.CPUPlace())
            self._program, names, self._outputs = paddle.static.load_inference_model(
                str(path.with_suffix("")), self._executor
            )
            weights = _weights_of(self._program)
        super().__init__(str(folder), in_order(names))
        # Paddle keeps a scope for ever, and all that is in it.
        weakref.finalize(self, _clear, self._scope, weights).atexit = False

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        with programs_of(self._format), static_mode(), paddle.static.scope_guard(self._scope):
            yield

    def outputs_of(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs for arrays by the names of the inputs."""
        with self._inside():
            return self._executor.run(self._program, inputs, self._outputs)


class Executor:
    """Paddle's Executor, by which an export is compared without the passes that make it fast."""

    name, title = "executor", "Executor"
    precision = "float32"
    file_name = None
    proves = True

    def version(self) -> str:
        """Return the package that runs it, with its version."""
        return f"paddle {paddle.__version__}"

    def require(self) -> None:
        """Ask for nothing: wherever Paddle is, it runs."""

    def file(self, folder: Folder) -> Path | None:
        """Return the program of an export; None where there is none. Raises `ReparamError` for two of them."""
        return program_file(folder) if programs_in(folder) else None

    def load(self, folder: Folder, threads: int = 1, keep_shapes: bool = True) -> LoadedProgram:
        """Load what `export_inference` wrote into `folder`; raises `ReparamError` where it cannot be loaded.

        How many threads it takes is Paddle's to say, for the whole process.
        """
        return LoadedProgram(folder)


RUNTIMES = (Executor(),)
