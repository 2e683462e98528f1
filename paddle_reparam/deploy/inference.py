"""What was released, loaded to be used: in the fastest of its runtimes that this machine can run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ReparamError, UnknownName
from ..files import Folder
from .released import MANIFEST, read_manifest
from .runtimes import SERVING, LoadedNetwork, Runtime, get_runtime


class InferenceModel(LoadedNetwork):
    """A released folder, an export, or a single file of one, in the first of its runtimes that this machine can run.

    `passed_over` says of each faster one why it cannot: title -> reason.
    """

    def __init__(self, place: Folder, threads: int = 1, keep_shapes: bool = True) -> None:
        """Load it; raises `ReparamError` where it cannot be loaded, and warns of each runtime that is passed over.

        Without `keep_shapes`, little is kept between inputs of different shapes.
        """
        manifest = read_manifest(place) if (Path(place) / MANIFEST).is_file() else {}
        chosen, self.passed_over = choose_runtime(place, manifest)
        for title, why in self.passed_over.items():
            warnings.warn(f"{place} is fastest by {title}, which is passed over: {why}", stacklevel=2)
        self._network = chosen.load(place, threads, keep_shapes)
        self.runtime, self.metadata = chosen.title, self._network.metadata
        super().__init__(self._network.name, self._network.inputs)

    def outputs_of(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs for arrays by the names of the inputs."""
        return self._network.outputs_of(inputs)


def choose_runtime(place: Folder, manifest: Mapping[str, Any]) -> tuple[Runtime, dict[str, str]]:
    """Return the first runtime of a release, or of a file, that this machine can run, and why each before it cannot.

    A manifest with `serving` says which there are, the fastest first. Raises `ReparamError` where there is none.
    """
    passed_over = {}
    for entry in manifest.get("serving", [{"runtime": runtime.name} for runtime in SERVING]):
        try:
            runtime = get_runtime(entry["runtime"])
            if runtime.file(place) is None:
                continue
            runtime.require()
        except UnknownName:
            passed_over[entry["runtime"]] = "this version of the library does not know it"
        except ReparamError as missing:
            passed_over[runtime.title] = str(missing)
        else:
            return runtime, passed_over
    reasons = "".join(f"; {title}: {why}" for title, why in passed_over.items())
    raise ReparamError(
        f"{place}: nothing there can be run here; name a released folder, or a file made of one{reasons}"
    )
