"""An export, run in every way that this machine can, against the network in train form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import paddle
from paddle import nn

from ..errors import NothingProven, ReparamError
from ..files import Folder
from ..measure.memory import give_back
from ..surgery.tracing import InputSpec, flatten_outputs
from ..surgery.verify import NETWORK_TOLERANCE, VerifyReport, verify
from .outputs import AS_THE_NETWORK, Normalization, OfPixels, OutputSpec, comparable, reference_outputs
from .runtimes import proving


class _Comparable(nn.Layer):
    """`comparable` outputs for random inputs, which become pixels where those are taken.

    `outputs_of` returns the arrays that a network or an export gives for its inputs.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        outputs_of: Callable[[Any, Sequence[Any]], list[np.ndarray]],
        output: OutputSpec,
        dtype: str | None,
    ) -> None:
        super().__init__()
        self.function, self.outputs_of, self.output = function, outputs_of, output
        self.dtype_of_pixels = dtype

    def forward(self, *inputs: Any) -> list[paddle.Tensor]:
        if self.dtype_of_pixels is not None:
            inputs = (paddle.clip(paddle.round(127.5 + 64.0 * inputs[0]), 0.0, 255.0).astype(self.dtype_of_pixels),)
        arrays = self.outputs_of(self.function, inputs)
        return [paddle.to_tensor(array) for array in comparable(arrays, self.output)]


def _exported_outputs(function: Callable[..., Any], inputs: Sequence[Any]) -> list[np.ndarray]:
    return [tensor.numpy() for tensor in flatten_outputs(function(*flatten_outputs(inputs)))]


def check_export(
    folder: Folder,
    model: nn.Layer,
    input_spec: InputSpec,
    output: OutputSpec = AS_THE_NETWORK,
    batch_sizes: Sequence[int] = (1, 3),
    tolerance: float = NETWORK_TOLERANCE,
    must_depend: bool = True,
    normalization: Normalization | None = None,
) -> dict[str, VerifyReport]:
    """Compare what an export's folder holds with the model in eval mode that it was made of, for each batch size.

    It is run in each runtime that proves something, has a file there, and is installed; returns the report of each. An
    export with a normalisation gets pixels, and the model what PaddleClas makes of them. Raises `ReparamError` where it
    cannot be loaded or run, and `NothingProven` where the outputs hardly depend on the input, unless `must_depend` is
    False, and where nothing there can be run.
    """
    behind = model if normalization is None else OfPixels(model, normalization)
    behind.eval()
    reference = _Comparable(
        behind,
        lambda network, inputs: reference_outputs(network, inputs, output),
        output,
        None if normalization is None else "float32",
    )
    reference.eval()
    taken = None if normalization is None else normalization.dtype
    if not batch_sizes:
        raise NothingProven("there are no batch sizes to compare an export at")
    reports = {}
    for runtime in proving(folder):
        try:
            runtime.require()
        except ReparamError:
            continue
        # One after the other, as each holds the weights.
        compared = _Comparable(runtime.load(folder, keep_shapes=False), _exported_outputs, output, taken)
        give_back()  # what loading took beside
        for size in batch_sizes:
            reports[f"{runtime.title}, batch {size}"] = verify(
                reference, lambda *inputs, f=compared: f(*inputs), input_spec, 2, size, tolerance, must_depend
            )
        del compared
        give_back()
    if not reports:
        raise NothingProven(f"{folder} holds nothing that was exported, or nothing that this machine can run")
    return reports
