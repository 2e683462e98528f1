"""The gradient of an exported network with respect to its input, which Paddle Inference does not give."""

from __future__ import annotations

import warnings

import numpy as np
import paddle

from ..analysis.receptive_field import is_map, middle_of
from ..errors import ReparamError, one_sentence
from ..files import Folder
from .programs import program_file
from .runtimes.executor import LoadedProgram


class DifferentiatedProgram(LoadedProgram):
    """An exported network up to the middle of its last map of more than one pixel, and what that depends on.

    `shape` is that of the map, the batch first.
    """

    def __init__(self, folder: Folder) -> None:
        """Load a program of Paddle 3.

        Raises `ReparamError` for what cannot be loaded or is none, has no such map, or takes images of any size.
        """
        if program_file(folder).suffix != ".json":
            # Those of Paddle 2 lose, as they are written, what the gradients of reshape and transpose need.
            raise ReparamError(
                f"{folder}: its program is a .pdmodel, which has no gradients; release the network as json"
            )
        super().__init__(folder)
        with one_sentence(f"{folder}: it cannot be differentiated"), self._inside(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._differentiate(folder)

    def _differentiate(self, folder: Folder) -> None:
        block = self._program.global_block()
        # What is fetched is the gradient.
        for op in [op for op in block.ops if op.name() == "pd_op.fetch"]:
            block.remove_op(op)
        inputs = [op for op in block.ops if op.name() == "pd_op.data"]
        x = inputs[0].result(0)
        if len(inputs) > 1 or len(x.shape) != 4 or -1 in x.shape[1:]:
            raise ReparamError(f"{folder}: it does not take images of one size; release the network for one")
        values = [value for op in block.ops if op.name() != "pd_op.data" for value in op.results()]
        maps = [value for value in values if -1 not in value.shape[1:] and is_map(value.shape, x.shape[2:])]
        if not maps:
            raise ReparamError(f"{folder}: it computes no map of more than one pixel")
        # In what is saved for inference nothing asks for a gradient. Parameters are among the values: without the
        # gradient of its weight a LayerNorm's is wrong, as in `receptive_field.input_gradients`.
        for value in [x, *values]:
            value.stop_gradient = False
        self.shape = list(maps[-1].shape)
        with paddle.static.program_guard(self._program):
            self._outputs = paddle.static.gradients([middle_of(maps[-1])], [x])

    def gradients(self, images: np.ndarray) -> np.ndarray:
        """Return the gradient of the middle of the last map with respect to images `[N, C, H, W]`."""
        [gradient] = self.run(images)
        return gradient
