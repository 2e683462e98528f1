"""Write a network for Paddle Inference, run what was written, and check that it is still the same function."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.inference import Config, create_predictor
from paddle.nn.utils.spectral_norm_hook import SpectralNorm
from paddle.nn.utils.weight_norm_hook import WeightNorm

from .errors import ReparamError
from .memory import give_back
from .old_programs import HAS_NEW_PROGRAMS, old_programs
from .rewrite import copy_model
from .tracing import InputSpec, flatten_outputs, walk
from .verify import NETWORK_TOLERANCE, VerifyReport, verify

Folder = Union[str, "os.PathLike[str]"]

#: What the files are called before their suffixes, as in PaddleClas' exports.
FILE_NAME = "inference"
#: Which of them is the program depends on Paddle's version and its FLAGS_enable_pir_api.
PROGRAM_SUFFIXES = (".json", ".pdmodel")
WEIGHTS_SUFFIX = ".pdiparams"

#: How `--format` names them.
FORMATS = ("json", "pdmodel")

#: MiB of a GPU's memory that Paddle takes at first; it takes more when it needs more.
_GPU_MEMORY = 256

#: The smallest probability whose logarithm is compared: Paddle's own softmax stops at e^-64, oneDNN's does not.
_SMALLEST_PROBABILITY = 1e-25


@dataclass(frozen=True)
class OutputSpec:
    """What an exported network puts out: `keys` pick from a network's dicts, `activation` follows ("softmax",
    "sigmoid", "identity" or None). Of a list the first entry is taken, and of a dict before an activation "logits", as
    PaddleClas does; None leaves a dict as it is.
    """

    activation: str | None = None
    keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.activation not in (None, "softmax", "sigmoid", "identity"):
            raise ReparamError(
                f"the activation of an exported network is softmax, sigmoid, identity or None: {self.activation}"
            )


#: The network's own output, unchanged.
AS_THE_NETWORK = OutputSpec()


@dataclass(frozen=True)
class Normalization:
    """What makes a network's input of the pixels 0..255 of an RGB image: `(pixels * scale - mean) / std` by channel.

    `dtype` is that of the pixels that an export with it takes, uint8 or float32.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float
    dtype: str = "uint8"

    def __post_init__(self) -> None:
        if self.dtype not in ("uint8", "float32"):
            raise ReparamError(f"pixels are exported as uint8 or float32: {self.dtype}")
        if len(self.mean) != len(self.std) or not all(np.isfinite([*self.mean, *self.std, self.scale])):
            raise ReparamError(f"a mean and a std for each channel, all finite, are needed: {self.mean}, {self.std}")
        if not all(self.std):
            raise ReparamError(f"a std of 0 cannot be divided by: {self.std}")

    @staticmethod
    def from_dict(entries: dict[str, Any] | None) -> Normalization | None:
        """Return what a manifest holds, or None for None."""
        if entries is None:
            return None
        return Normalization(tuple(entries["mean"]), tuple(entries["std"]), entries["scale"], entries["dtype"])

    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (factor, shift) by channel, float64: the input is `pixels * factor + shift`."""
        mean, std = np.float64(self.mean), np.float64(self.std)
        return self.scale / std, -mean / std

    def undo(self, images: np.ndarray) -> np.ndarray:
        """Return the pixels that these inputs `[N, C, H, W]` of a network were made of.

        Raises `ReparamError` where that gives no whole numbers 0..255: they were normalised in another way.
        """
        factor, shift = (v.reshape(-1, 1, 1) for v in self.affine())
        pixels = (images - shift) / factor
        whole = np.rint(pixels)
        if not (np.abs(pixels - whole).max() < 0.01 and whole.min() >= 0 and whole.max() <= 255):
            raise ReparamError(f"the images are no pixels 0..255 that were normalised by {self}")
        return whole.astype(self.dtype)


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

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        if self.takes_pixels:
            x = x.astype("float32") * self.factor + self.shift
        outputs = self.network(x)
        if isinstance(outputs, (list, tuple)):
            outputs = outputs[0]
        for key in self.keys:
            outputs = outputs[key]
        if self.activation is not None:
            if isinstance(outputs, dict):
                outputs = outputs["logits"]
            if self.activation != "identity":
                outputs = getattr(F, self.activation)(outputs)
        return outputs


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
        return next((str(p.dtype).rsplit(".", 1)[-1] for p in model.parameters()), "float32")


DEFAULT_OPTIONS = ExportOptions()


def _programs_of(file_format: str | None) -> contextlib.AbstractContextManager[None]:
    return old_programs() if file_format == "pdmodel" else contextlib.nullcontext()


@paddle.no_grad()
def _with_plain_weights(model: nn.Layer) -> nn.Layer:
    """Give layers under weight norm or spectral norm, in place, the weight that these compute as a parameter.

    Paddle's tracing would store that of the last forward pass, which a weight file that was loaded since has not seen.
    """
    for _, layer in walk(model):
        for key, hook in list(layer._forward_pre_hooks.items()):
            if isinstance(hook, (WeightNorm, SpectralNorm)):
                hook(layer, ())
                weight = getattr(layer, hook.name)
                del layer._forward_pre_hooks[key]
                delattr(layer, hook.name)
                for suffix in ("_g", "_v", "_u", "_orig"):
                    layer._parameters.pop(hook.name + suffix, None)
                    layer._buffers.pop(hook.name + suffix, None)
                parameter = layer.create_parameter(weight.shape, dtype=weight.dtype)
                parameter.set_value(weight)
                layer.add_parameter(hook.name, parameter)
    return model


def export_inference(
    model: nn.Layer,
    folder: Folder,
    input_spec: InputSpec,
    output: OutputSpec = AS_THE_NETWORK,
    options: ExportOptions = DEFAULT_OPTIONS,
) -> list[Path]:
    """Write a network in eval mode for Paddle Inference, with a dynamic batch, and return the files written.

    `input_spec` holds one shape with None for the batch, e.g. `[[None, 3, 224, 224]]`; the input has the dtype of the
    parameters, or of the pixels where `options` has a normalisation. The files are called `inference` with the suffixes
    of the format. The model stays as it is.
    Raises `ReparamError` for a model in training mode and where the network cannot be exported.
    """
    if model.training:
        raise ReparamError("the model is in training mode; call model.eval() before exporting")
    if len(input_spec) != 1:
        raise ReparamError(f"a network with one input can be exported, this one has {len(input_spec)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shape = list(getattr(input_spec[0], "shape", input_spec[0]))
    if options.dynamic_size:
        shape[2:] = [None] * len(shape[2:])
    # Paddle's tracing puts rewritten forward methods on the layers, so it gets copies of those.
    network = ExportedNetwork(_with_plain_weights(copy_model(model, share_tensors=True)), output, options.normalization)
    spec = paddle.static.InputSpec(shape=shape, dtype=options.input_dtype(model), name="x")
    with one_sentence(f"{type(model).__name__} cannot be exported"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _programs_of(options.file_format):
            paddle.jit.save(network, str(folder / FILE_NAME), input_spec=[spec])
    program = program_file(folder)
    if program.suffix == ".pdmodel":
        with _programs_of("pdmodel"):
            _add_biases_by_axis(program)
    return sorted(path for path in folder.iterdir() if path.name.startswith(f"{FILE_NAME}."))


def _add_biases_by_axis(path: Path) -> None:
    """Rewrite a `.pdmodel` so that oneDNN takes the biases of convolutions into them.

    Paddle writes a bias as a reshape of the parameter and an addition, a pair that its oneDNN passes do not know; they
    know the addition of the parameter itself along an axis. Without it a MobileNetV2 with folded BNs takes 1.33 times
    as long.
    """
    was_dynamic = paddle.in_dynamic_mode()
    paddle.enable_static()
    try:
        program = paddle.static.Program.parse_from_string(path.read_bytes())
        block = program.global_block()
        parameters = {
            op.output("Out")[0]: op.input("X")[0]
            for op in block.ops
            if op.type == "reshape2" and block.var(op.input("X")[0]).persistable
            if list(op.attr("shape")) == [1, *block.var(op.input("X")[0]).shape, 1, 1]
        }
        readers = Counter(name for op in block.ops for name in op.input_arg_names)
        added = [
            op
            for op in block.ops
            if op.type == "elementwise_add" and op.input("Y")[0] in parameters and readers[op.input("Y")[0]] == 1
        ]
        reshaped = {op.input("Y")[0] for op in added}
        for op in added:
            op._rename_input(op.input("Y")[0], parameters[op.input("Y")[0]])
            op._set_attr("axis", 1)
        for index in reversed(range(len(block.ops))):
            if block.ops[index].type == "reshape2" and block.ops[index].output("Out")[0] in reshaped:
                block._remove_op(index)
        path.write_bytes(program.desc.serialize_to_string())
    finally:
        if was_dynamic:
            paddle.disable_static()


def program_file(folder: Folder) -> Path:
    """Return the file of an export that holds the program, whatever Paddle wrote it; raises `ReparamError`."""
    found = [path for suffix in PROGRAM_SUFFIXES if (path := Path(folder) / f"{FILE_NAME}{suffix}").is_file()]
    if len(found) != 1:
        names = " or ".join(FILE_NAME + suffix for suffix in PROGRAM_SUFFIXES)
        raise ReparamError(f"{folder}: it must hold one exported program ({names}), it holds {len(found)}")
    return found[0]


@contextlib.contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """Raise whatever is raised in the `with` block as a `ReparamError` that says what, and why in one line."""
    try:
        yield
    except ReparamError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # Paddle prints its call stack first; what happened is in the line that names an error, or the last one.
        last = ": ".join([type(error).__name__, *lines[-1:]])
        reason = next((line for line in lines if "Error:" in line), last)
        raise ReparamError(f"{what}: {reason}") from error


def require_gpu() -> None:
    """Raise `ReparamError` where this Paddle finds no GPU."""
    if not paddle.is_compiled_with_cuda() or paddle.device.cuda.device_count() == 0:
        raise ReparamError("Paddle finds no GPU here; one needs a GPU of NVIDIA, its driver, and paddlepaddle-gpu")


class InferenceModel:
    """An exported network, run by Paddle Inference's Predictor: on the CPU, or with `gpu` on the first GPU.

    Call it with Tensors, as a layer; `run` takes and returns arrays.
    """

    def __init__(
        self, folder: Folder, onednn: bool = True, threads: int = 1, gpu: bool = False, keep_shapes: bool = True
    ) -> None:
        """Load what `export_inference` wrote into `folder`; raises `ReparamError` where it cannot be loaded.

        For every shape of the input that it was given, oneDNN keeps another copy of the weights. Without `keep_shapes`
        it keeps one, for the last shape given to any network of this thread.
        """
        program = program_file(folder)
        if gpu:
            require_gpu()
        self.name = str(folder)
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

    def run(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """Return the outputs for the inputs, in the order in which the network takes them."""
        names = self._predictor.get_input_names()
        if len(names) != len(inputs):
            raise ReparamError(f"{self.name}: it takes {len(names)} inputs ({names}), not {len(inputs)}")
        with one_sentence(f"{self.name}: Paddle Inference cannot run it"):
            for name, array in zip(names, inputs):
                handle = self._predictor.get_input_handle(name)
                handle.reshape(array.shape)
                handle.copy_from_cpu(np.ascontiguousarray(array))
            self._predictor.run()
            return [self._predictor.get_output_handle(n).copy_to_cpu() for n in self._predictor.get_output_names()]

    def __call__(self, *inputs: paddle.Tensor) -> list[paddle.Tensor]:
        return [paddle.to_tensor(array) for array in self.run(*(x.numpy() for x in inputs))]


def load_program(folder: Folder) -> nn.Layer:
    """Return an export as `paddle.jit.load` reads it, in eval mode; raises `ReparamError` where it cannot."""
    path = program_file(folder)
    with one_sentence(f"{folder}: paddle.jit.load cannot load it"), _programs_of(path.suffix[1:]):
        layer = paddle.jit.load(str(path.with_suffix("")))
        layer.eval()
        return layer


def comparable(outputs: Sequence[np.ndarray], output: OutputSpec) -> list[np.ndarray]:
    """Return a network's outputs, and behind probabilities their logarithms: the logits but for a constant a sample.

    A fault in the logits of unlikely classes hardly shows in the probabilities.
    """
    logarithms = [np.log(np.maximum(p, _SMALLEST_PROBABILITY)) for p in outputs if output.activation == "softmax"]
    return [*outputs, *logarithms]


class _Comparable(nn.Layer):
    """A function's `comparable` outputs for random inputs, which become pixels where it takes those."""

    def __init__(
        self, function: Callable[..., Any], output: OutputSpec, normalization: Normalization | None, dtype: str
    ) -> None:
        super().__init__()
        self.function = function
        self.output = output
        self.takes_pixels = normalization is not None
        self.dtype = dtype

    def forward(self, x: paddle.Tensor) -> list[paddle.Tensor]:
        if self.takes_pixels:
            x = paddle.clip(paddle.round(127.5 + 64.0 * x), 0.0, 255.0).astype(self.dtype)
        outputs = [tensor.numpy() for tensor in flatten_outputs(self.function(x))]
        return [paddle.to_tensor(array) for array in comparable(outputs, self.output)]


class _OfPixels(nn.Layer):
    """A network behind a normalisation of its own, computed as PaddleClas does."""

    def __init__(self, network: nn.Layer, normalization: Normalization) -> None:
        super().__init__()
        self.network = network
        self.scale = normalization.scale
        self.mean, self.std = (
            paddle.to_tensor(np.float32(v).reshape(1, -1, 1, 1)) for v in (normalization.mean, normalization.std)
        )

    def forward(self, x: paddle.Tensor) -> Any:
        return self.network((x * self.scale - self.mean) / self.std)


def check_export(
    folder: Folder,
    model: nn.Layer,
    input_spec: InputSpec,
    output: OutputSpec = AS_THE_NETWORK,
    batch_sizes: Sequence[int] = (1, 3),
    tolerance: float = NETWORK_TOLERANCE,
    must_depend: bool = True,
    normalization: Normalization | None = None,
    more: Mapping[str, Callable[[], Callable[..., Any]]] | None = None,
) -> dict[str, VerifyReport]:
    """Compare what an export's folder holds with the model in eval mode that it was made of, for each batch size.

    Loaded with `paddle.jit.load`, and in the Predictor with and without oneDNN; returns the report of each. An export
    with a normalisation gets pixels, and the model what PaddleClas makes of them. `more` load other functions to
    compare in the same way, such as an `OnnxModel`. Raises
    `ReparamError` where it cannot be loaded or run, and `NothingProven` where the outputs hardly depend on the input,
    unless `must_depend` is False.
    """
    behind = model if normalization is None else _OfPixels(model, normalization)
    behind.eval()
    reference = _Comparable(ExportedNetwork(behind, output), output, normalization, "float32")
    reference.eval()
    taken = "" if normalization is None else normalization.dtype
    ways: dict[str, Callable[[], Callable[..., Any]]] = {
        "paddle.jit.load": lambda: load_program(folder),
        "Predictor, oneDNN": lambda: InferenceModel(folder, onednn=True, keep_shapes=False),
        "Predictor, no oneDNN": lambda: InferenceModel(folder, onednn=False),
        **(more or {}),
    }
    reports = {}
    for name, load in ways.items():
        # One after the other, as each holds the weights.
        compared = _Comparable(load(), output, normalization, taken)
        for size in batch_sizes:
            reports[f"{name}, batch {size}"] = verify(
                reference, lambda x, f=compared: f(x), input_spec, 2, size, tolerance, must_depend
            )
        del compared
        give_back()
    return reports
