"""What every runtime keeps to, so that checks, the benchmark and prediction know none of them by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np
import paddle

from ...errors import ReparamError, one_sentence
from ...files import Folder

#: The fewer bits, the further down.
PRECISIONS = ("float32", "bfloat16", "int8")


class LoadedNetwork(ABC):
    """A network that a runtime has loaded. Call it with Tensors, as a layer; `run` takes and returns arrays."""

    #: What runs it, for errors.
    runtime: str
    #: What its file says of itself beside the network, name -> text.
    metadata: Mapping[str, str] = MappingProxyType({})

    def __init__(self, name: str, inputs: Sequence[str]) -> None:
        """Keep what was loaded, by `name`, and the names of its inputs in the order in which `run` takes them."""
        self.name, self.inputs = name, list(inputs)

    def run(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """Return the outputs for the inputs, in the order of `inputs`, their names."""
        if len(self.inputs) != len(inputs):
            raise ReparamError(f"{self.name}: it takes {len(self.inputs)} inputs ({self.inputs}), not {len(inputs)}")
        with one_sentence(f"{self.name}: {self.runtime} cannot run it"):
            return self.outputs_of(dict(zip(self.inputs, inputs)))

    @abstractmethod
    def outputs_of(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs for arrays by the names of the inputs."""

    def __call__(self, *inputs: paddle.Tensor) -> list[paddle.Tensor]:
        return [paddle.to_tensor(array) for array in self.run(*(x.numpy() for x in inputs))]


def file_of(place: Folder, name: str) -> Path | None:
    """Return the file of that name in a folder, or the place itself where it is a file of that kind; else None."""
    path = Path(place) / name if Path(place).is_dir() else Path(place)
    return path if path.is_file() and path.suffix == Path(name).suffix else None


@dataclass(frozen=True)
class OfOneFile:
    """What runtimes share that load one file of a folder, in one precision."""

    name: str
    title: str
    precision: str
    file_name: str
    proves = True

    def file(self, folder: Folder) -> Path | None:
        """Return the file of a folder that it loads, or the file itself; None where there is none."""
        return file_of(folder, self.file_name)

    def place(self, folder: Folder) -> Path:
        """Return the file that it is to load, whether it is there or not."""
        return self.file(folder) or Path(folder) / self.file_name


class Runtime(Protocol):
    """A way to run what an export's folder holds, in one precision."""

    #: What commands call it.
    name: str
    #: What reports and manifests call it.
    title: str
    #: In which of `PRECISIONS` it computes.
    precision: str
    #: The file of a folder that it loads; None: the program of an export.
    file_name: str | None
    #: Whether what is released is compared in it, wherever it is installed: below float32 where it is to serve.
    proves: bool

    def version(self) -> str:
        """Return the package that runs it, with its version; raises as `require` does."""

    def require(self) -> None:
        """Raise `ReparamError` with what this machine lacks to run it."""

    def file(self, folder: Folder) -> Path | None:
        """Return the file of a folder that it loads, or the file itself; None where there is none."""

    def load(self, folder: Folder, threads: int = 1, keep_shapes: bool = True) -> LoadedNetwork:
        """Load a folder, or a single file; without `keep_shapes`, keep little between inputs of different shapes.

        Raises `ReparamError` where it cannot be loaded.
        """
