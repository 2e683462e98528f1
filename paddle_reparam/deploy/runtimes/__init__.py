"""The runtimes that run what was exported: one file each, all under the protocol of `base.Runtime`.

A new one is a file with its `RUNTIMES`, and a place here: in `RUNTIMES` for checks and the benchmark, in `SERVING` for
prediction.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...files import Folder
from ...registry import Registry
from . import executor, onnx_runtime, openvino, paddle_inference
from .base import LoadedNetwork as LoadedNetwork
from .base import Runtime

#: In the order in which a release is compared in them: most memory first, as each leaves some behind.
RUNTIMES: tuple[Runtime, ...] = (
    *paddle_inference.RUNTIMES,
    *executor.RUNTIMES,
    *openvino.RUNTIMES,
    *onnx_runtime.RUNTIMES,
)

#: Those that a release can be used in. Where it does not say by which it is, it is by the first that has a file there.
SERVING: tuple[Runtime, ...] = (*paddle_inference.SERVING, *onnx_runtime.RUNTIMES, *openvino.RUNTIMES)

_by_name = Registry("runtime")
for _runtime in RUNTIMES:
    _by_name.add(_runtime.name, _runtime)


def get_runtime(name: str) -> Runtime:
    """Return a runtime by its name; raises `UnknownName` with the nearest ones."""
    return _by_name.get(name)


def proving(folder: Folder, precisions: Sequence[str] = ("float32",)) -> list[Runtime]:
    """Return the runtimes of some precisions that what a folder holds is compared in: those with a file there."""
    able = [runtime for runtime in RUNTIMES if runtime.proves and runtime.precision in precisions]
    return [runtime for runtime in able if runtime.file(folder) is not None]
