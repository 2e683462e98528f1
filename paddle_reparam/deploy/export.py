"""Write a network for Paddle Inference, with the input and the output that its users are to meet."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import nn

from ..arithmetic.geometry import ConvGeometry
from ..arithmetic.tensors import assign, to_float64, type_name
from ..errors import ReparamError, one_sentence
from ..files import Folder
from ..surgery.computed_weights import store_computed_weights
from ..surgery.places import copy_model
from ..surgery.tracing import InputSpec, input_shapes, require_eval, walk
from .old_programs import HAS_NEW_PROGRAMS
from .outputs import AS_THE_NETWORK, SHORTEST, Normalization, OutputSpec, first_of
from .programs import (
    FILE_NAME,
    FORMATS,
    WEIGHTS_SUFFIX,
    add_biases_by_axis,
    keep_activations_apart,
    program_file,
    programs_of,
)
from .replacements import replaced_operators


class ExportedNetwork(nn.Layer):
    """A network with the input and the output that its export is to have.

    The normalisation is an affine in front of the network. In the first convolution it would be another function where
    that one pads: zeros are padded behind the normalisation, not before.
    """

    def __init__(self, network: nn.Layer, output: OutputSpec, normalization: Normalization | None = None) -> None:
        super().__init__()
        self.network = network
        self.keys = output.keys
        self.activation = output.activation
        self.training = network.training
        self.takes_pixels = normalization is not None
        if normalization is not None:
            factor, shift = (v.astype("float32").reshape(1, -1, 1, 1) for v in normalization.affine())
            self.register_buffer("factor", paddle.to_tensor(factor))
            self.register_buffer("shift", paddle.to_tensor(shift))

    def forward(self, x: Any) -> Any:
        if self.takes_pixels:
            x = x.astype("float32") * self.factor + self.shift
        # Several inputs come as one list; a dict is what the network itself takes.
        outputs = self.network(*x) if isinstance(x, (list, tuple)) else self.network(x)
        if self.keys or self.activation is not None:
            outputs = first_of(outputs)
        for key in self.keys:
            outputs = (outputs if self.activation is None else first_of(outputs))[key]
        if self.activation is not None:
            outputs = first_of(outputs)
            if isinstance(outputs, dict):
                outputs = first_of(outputs["logits"])
            if self.activation == "softmax":
                outputs = F.softmax(outputs, axis=1)
            elif self.activation == "argmax":
                outputs = paddle.argmax(outputs, axis=1, dtype="int32")
            elif self.activation == "sigmoid":
                outputs = F.sigmoid(outputs)
            elif self.activation == "l2":
                length = paddle.sqrt(paddle.sum(outputs * outputs, axis=1, keepdim=True))
                outputs = outputs / paddle.clip(length, min=SHORTEST)
        return _apart(outputs, x)


#: Taps in a row, or in a column, from which on a depthwise convolution in bfloat16 has no fast kernel with a bias.
_LARGE_KERNEL = 15


class _AddingConv2D(nn.Conv2D):
    """`nn.Conv2D` that adds its bias as a parameter of the shape that this takes, `[1, C, 1, 1]`."""

    # Paddle's own writes a reshape of `bias`, which is then made again in every run; in bfloat16 it stands between two
    # conversions. Measured in Paddle Inference 3.3.1, bfloat16 on one thread, batch 1: ResNet50 with folded BNs is 63
    # operators instead of 275, and takes 0.56 of the time. In float32 it takes 0.99.
    #
    # With a bias, oneDNN 3.6 convolves large depthwise kernels in bfloat16 by a slow way: 31x31 on 128 maps of 28x28
    # pixels takes 45 ms instead of 3.3, 5x27 8.4 instead of 1.1, 51x5 on 124 maps of 56x56 5.9 instead of 3.6; 13x13
    # 1.5 instead of 2.0. Paddle leaves a bias apart that stands first in the sum: 3.7 ms for 31x31, 1.0 for 5x27.
    def take_bias(self, number: int) -> None:
        self.geometry = ConvGeometry.of(self)
        self.__class__ = _AddingConv2D
        # By a name of its own: what Paddle would call it may be taken in a network that was built in parts.
        attributes = paddle.ParamAttr(name=f"{self.bias.name}.added{number}")
        self.added = self.create_parameter([1, self._out_channels, 1, 1], attributes, dtype=self.bias.dtype)
        assign(self.added, to_float64(self.bias).reshape(self.added.shape))
        self.apart = self.geometry.is_depthwise and max(self.geometry.kernel_size) >= _LARGE_KERNEL

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        y = self.geometry.convolve(x, self.weight, None)
        return self.added + y if self.apart else y + self.added


def _with_added_biases(model: nn.Layer) -> nn.Layer:
    """Let the convolutions of a network, in place, add their biases where oneDNN takes them into the convolution."""
    # Paddle keeps a list of the names that were given, and in here another one: a network may be exported again.
    with paddle.utils.unique_name.guard():
        for number, (_, layer) in enumerate(walk(model)):
            if type(layer) is nn.Conv2D and layer.bias is not None and layer._data_format == "NCHW":
                _AddingConv2D.take_bias(layer, number)
    return model


@paddle.jit.not_to_static
def _apart(outputs: Any, inputs: Any) -> Any:
    """Return outputs of which no two are one tensor, and none is an input: an exported program loses such ones."""
    times: Counter[int] = Counter()

    def visit(value: Any, copied: bool) -> Any:
        if isinstance(value, dict):
            return {key: visit(value[key], copied) for key in sorted(value, key=str)}
        if isinstance(value, (list, tuple)):
            return [visit(item, copied) for item in value]
        if not hasattr(value, "shape"):
            return value
        times[id(value)] += 1
        # One copy of it more each time: two like copies would be made one again.
        tensor = value
        for _ in range(times[id(value)] - 1 if copied else 0):
            tensor = paddle.assign(tensor)
        return tensor

    visit(inputs, False)
    return visit(outputs, True)


@dataclass(frozen=True)
class ExportOptions:
    """How an export is written: `file_format` json (Paddle 3), pdmodel, or None for what the running Paddle writes;
    `normalization` goes into it, so that it takes pixels; with `dynamic_size` it takes images of every size;
    with `onnx` a release has an ONNX file too.
    """

    file_format: str | None = None
    normalization: Normalization | None = None
    dynamic_size: bool = False
    onnx: bool = False

    def __post_init__(self) -> None:
        if self.file_format not in (None, *FORMATS):
            raise ReparamError(f"the format of an export is {' or '.join(FORMATS)}: {self.file_format}")
        if self.file_format == "json" and not HAS_NEW_PROGRAMS:
            raise ReparamError(f"Paddle {paddle.__version__} cannot write .json programs, Paddle 3 can; use pdmodel")

    def input_dtype(self, model: nn.Layer) -> str:
        """Return the dtype of the export's input: that of the pixels, or of the model's parameters."""
        if self.normalization is not None:
            return self.normalization.dtype
        return next((type_name(p) for p in model.parameters()), "float32")


DEFAULT_OPTIONS = ExportOptions()


def export_inference(
    model: nn.Layer,
    folder: Folder,
    input_spec: InputSpec,
    output: OutputSpec = AS_THE_NETWORK,
    options: ExportOptions = DEFAULT_OPTIONS,
) -> list[Path]:
    """Write a network in eval mode for Paddle Inference, with a dynamic batch, and return the files written.

    `input_spec` holds a shape for each input with None for the batch, e.g. `[[None, 3, 224, 224]]`, or name -> shape
    for a network that takes one dict; inputs have the dtype of the parameters, or of the pixels where `options` has a
    normalisation. They are called x, or x0, x1 and so on, or as in the dict. The files are called `inference` with the
    suffixes of the format. The model stays as it is.
    Raises `ReparamError` for a model in training mode and where the network cannot be exported.
    """
    require_eval(model, "the model", "exporting")
    specs = _paddle_specs(input_spec, options, options.input_dtype(model))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Paddle's tracing puts rewritten forward methods on the layers, so it gets copies of those.
    network = store_computed_weights(copy_model(model, share_tensors=True))
    if HAS_NEW_PROGRAMS and options.file_format != "pdmodel":
        network = _with_added_biases(network)
    network = ExportedNetwork(network, output, options.normalization)
    with one_sentence(f"{type(model).__name__} cannot be exported"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with programs_of(options.file_format), _naming_inputs(input_spec), replaced_operators():
            paddle.jit.save(network, str(folder / FILE_NAME), input_spec=[specs])
    program = program_file(folder)
    # A pickle, for training on: `paddle.jit.load` would run what it says, Paddle Inference does not read it.
    program.with_suffix(f"{WEIGHTS_SUFFIX}.info").unlink(missing_ok=True)
    if program.suffix == ".pdmodel":
        with programs_of("pdmodel"):
            add_biases_by_axis(program)
            keep_activations_apart(program)
    return sorted(path for path in folder.iterdir() if path.name.startswith(f"{FILE_NAME}."))


@contextlib.contextmanager
def _naming_inputs(input_spec: InputSpec) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "not involved in the target_vars" not in str(error):
            raise
        raise ReparamError(
            f"what the network puts out does not depend on all of its inputs ({', '.join(input_names(input_spec))}); "
            "leave out of input_spec what it does not use"
        ) from error


def input_names(input_spec: InputSpec) -> list[str]:
    """Return what the inputs of an export are called, in the order of `input_shapes`."""
    names = list(input_shapes(input_spec))
    if isinstance(input_spec, Mapping):
        return [str(name) for name in names]
    return ["x"] if len(names) == 1 else [f"x{number}" for number in names]


def _paddle_specs(input_spec: InputSpec, options: ExportOptions, dtype: str) -> Any:
    """Return the inputs of an export as Paddle describes them: one, a list of several, or a dict."""
    if options.normalization is not None and len(input_shapes(input_spec)) != 1:
        raise ReparamError("pixels can be normalised for a network with one input; this one has several")
    specs = {}
    for name, (key, shape) in zip(input_names(input_spec), input_shapes(input_spec).items()):
        sizes = [*shape[:2], *([None] * len(shape[2:]) if options.dynamic_size else shape[2:])]
        specs[key] = paddle.static.InputSpec(shape=sizes, dtype=dtype, name=name)
    if isinstance(input_spec, Mapping):
        return specs
    return specs[0] if len(specs) == 1 else list(specs.values())
