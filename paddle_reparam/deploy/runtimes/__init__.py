"""The runtimes that run what was exported: one file each, all under the protocol of `base.Runtime`.

A new one is a file with its `RUNTIMES`, and a place here: in `RUNTIMES` for checks and the benchmark, in `SERVING` for
prediction.
"""

from __future__ import annotations

from ...errors import ReparamError
from ...files import Folder
from ...registry import Registry
from . import executor, onnx_runtime, paddle_inference
from .base import LoadedNetwork as LoadedNetwork
from .base import Runtime

#: In the order in which a release is compared in them: most memory first, as each leaves some behind.
RUNTIMES: tuple[Runtime, ...] = (*paddle_inference.RUNTIMES, *executor.RUNTIMES, *onnx_runtime.RUNTIMES)

#: Those that a release is used in: the first of them that has a file there.
SERVING: tuple[Runtime, ...] = (paddle_inference.WITH_ONEDNN, *onnx_runtime.RUNTIMES)

_by_name = Registry("runtime")
for _runtime in RUNTIMES:
    _by_name.add(_runtime.name, _runtime)


def get_runtime(name: str) -> Runtime:
    """Return a runtime by its name; raises `UnknownName` with the nearest ones."""
    return _by_name.get(name)


def proving(folder: Folder) -> list[Runtime]:
    """Return the runtimes that a release in a folder is compared in: those with a file there."""
    return [runtime for runtime in RUNTIMES if runtime.proves and runtime.file(folder) is not None]


def load_network(place: Folder, threads: int = 1, keep_shapes: bool = True) -> LoadedNetwork:
    """Load a folder, or a single file, to be used; without `keep_shapes` little is kept between inputs of other shapes.

    Raises `ReparamError` where it cannot be loaded.
    """
    runtime = next((runtime for runtime in SERVING if runtime.file(place) is not None), None)
    if runtime is None:
        raise ReparamError(f"{place}: no runtime has a file there; name a released folder, or a file made of one")
    return runtime.load(place, threads, keep_shapes)
