"""Write a network for Paddle Inference, run what was written, and check that it is still the same function."""

from __future__ import annotations

import contextlib
import json
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.inference import Config, create_predictor
from paddle.nn.utils.spectral_norm_hook import SpectralNorm
from paddle.nn.utils.weight_norm_hook import WeightNorm

from ..errors import NothingProven, ReparamError, one_sentence
from ..files import Folder
from ..measure.memory import give_back
from ..surgery.places import copy_model
from ..surgery.tracing import InputSpec, flatten_outputs, input_shapes, require_eval, walk
from ..surgery.verify import NETWORK_TOLERANCE, VerifyReport, verify
from .old_programs import HAS_NEW_PROGRAMS, old_programs

#: What the files are called before their suffixes, as in PaddleClas' exports.
FILE_NAME = "inference"
#: Which of them is the program depends on Paddle's version and its FLAGS_enable_pir_api.
PROGRAM_SUFFIXES = (".json", ".pdmodel")
WEIGHTS_SUFFIX = ".pdiparams"

#: Operators of Paddle that read or write files, or call functions: no export holds them.
ACTING_OPERATORS = {
    "load", "load_combine", "save", "save_combine", "read_file", "py_func", "py_layer", "run_program",
}  # fmt: skip

#: How `--format` names them.
FORMATS = ("json", "pdmodel")

#: Where each label has a probability of its own, an image has those that reach this, as in PaddleClas.
THRESHOLD = 0.5

#: MiB of a GPU's memory that Paddle takes at first; it takes more when it needs more.
_GPU_MEMORY = 256

#: The smallest probability whose logarithm is compared: Paddle's own softmax stops at e^-64, oneDNN's does not.
_SMALLEST_PROBABILITY = 1e-25


@dataclass(frozen=True)
class OutputSpec:
    """What an exported network puts out: `keys` pick from a network's dicts, `activation` follows ("softmax" over the
    classes, which are axis 1; "sigmoid"; "identity" or None). Where either is asked for, the first entry of a list is
    taken, and of a dict before an activation "logits", as PaddleClas does. Without both, all that a network puts out.
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

    def forward(self, x: Any) -> Any:
        if self.takes_pixels:
            x = x.astype("float32") * self.factor + self.shift
        # Several inputs come as one list; a dict is what the network itself takes.
        outputs = self.network(*x) if isinstance(x, (list, tuple)) else self.network(x)
        if self.keys or self.activation is not None:
            outputs = _first(outputs)
        for key in self.keys:
            outputs = (outputs if self.activation is None else _first(outputs))[key]
        if self.activation is not None:
            outputs = _first(outputs)
            if isinstance(outputs, dict):
                outputs = _first(outputs["logits"])
            if self.activation == "softmax":
                outputs = F.softmax(outputs, axis=1)
            elif self.activation == "sigmoid":
                outputs = F.sigmoid(outputs)
        return _apart(outputs, x)


def _first(outputs: Any) -> Any:
    return outputs[0] if isinstance(outputs, (list, tuple)) else outputs


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


def kept_outputs(outputs: Any, output: OutputSpec) -> dict[str, paddle.Tensor]:
    """Return path -> tensor of those parts of a network's output that are exported, before the activation.

    Paths are like `0` and `Student.logits`. Raises `ReparamError` for a key that the output lacks, and for what no
    activation can follow.
    """
    parts = _named_parts(outputs, ())
    if not parts:
        raise ReparamError(f"the network puts out {type(outputs).__name__} and no tensor; there is nothing to export")
    wanted = [*output.keys, *(["logits"] if output.activation is not None else [])]
    if not wanted:
        return {".".join(path): tensor for path, tensor in parts.items()}
    prefix, here = (), outputs
    for number, key in enumerate(["", *wanted]):
        if number and isinstance(here, dict):
            if key not in here:
                raise ReparamError(f"the network's output has no {key!r}; it has {', '.join(map(str, here))}")
            here, prefix = here[key], (*prefix, str(key))
        elif number and number <= len(output.keys):
            raise ReparamError(f"the network's output is no dict from which {key!r} could be taken")
        if isinstance(here, (list, tuple)) and here and (number == 0 or output.activation is not None):
            here, prefix = here[0], (*prefix, "0")
    kept = {".".join(path): tensor for path, tensor in parts.items() if path[: len(prefix)] == prefix}
    if output.activation is not None:
        for path, tensor in kept.items():
            if len(kept) > 1 or not tensor.is_floating_point() or tensor.ndim < 2:
                raise ReparamError(
                    f"{output.activation} follows one tensor of numbers [N, classes, ...]; the network's output "
                    f"{path or 'itself'} is {len(kept)} of the shape {list(tensor.shape)} and type {tensor.dtype}"
                )
    return kept


def left_out(outputs: Any, output: OutputSpec) -> list[str]:
    """Return the paths of what a network puts out and its export does not; raises as `kept_outputs` does."""
    kept = kept_outputs(outputs, output)
    return [path for parts in _named_parts(outputs, ()) if (path := ".".join(parts)) not in kept]


def _named_parts(outputs: Any, path: tuple[str, ...]) -> dict[tuple[str, ...], paddle.Tensor]:
    """Return path -> tensor, in the order of `flatten_outputs`."""
    if isinstance(outputs, paddle.Tensor):
        return {path: outputs}
    items: Any = ()
    if isinstance(outputs, dict):
        items = [(key, outputs[key]) for key in sorted(outputs, key=str)]
    elif isinstance(outputs, (list, tuple)):
        items = enumerate(outputs)
    return {key: tensor for name, item in items for key, tensor in _named_parts(item, (*path, str(name))).items()}


def reference_outputs(network: nn.Layer, inputs: Sequence[Any], output: OutputSpec) -> list[np.ndarray]:
    """Return what an export of a network is to put out, without the layer that is exported: `kept_outputs`, and the
    activation in float64.
    """
    with paddle.no_grad():
        kept = [tensor.numpy() for tensor in kept_outputs(network(*inputs), output).values()]
    if output.activation == "softmax":
        scores = [array.astype(np.float64) for array in kept]
        powers = [np.exp(array - array.max(axis=1, keepdims=True)) for array in scores]
        return [(p / p.sum(axis=1, keepdims=True)).astype(array.dtype) for p, array in zip(powers, kept)]
    if output.activation == "sigmoid":
        return [(0.5 * (1.0 + np.tanh(0.5 * array.astype(np.float64)))).astype(array.dtype) for array in kept]
    return kept


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


@contextlib.contextmanager
def _static_mode() -> Iterator[None]:
    was_dynamic = paddle.in_dynamic_mode()
    paddle.enable_static()
    try:
        yield
    finally:
        if was_dynamic:
            paddle.disable_static()


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
    network = ExportedNetwork(_with_plain_weights(copy_model(model, share_tensors=True)), output, options.normalization)
    with one_sentence(f"{type(model).__name__} cannot be exported"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _programs_of(options.file_format), _naming_inputs(input_spec):
            paddle.jit.save(network, str(folder / FILE_NAME), input_spec=[specs])
    program = program_file(folder)
    # A pickle, for training on: `paddle.jit.load` would run what it says, Paddle Inference does not read it.
    program.with_suffix(f"{WEIGHTS_SUFFIX}.info").unlink(missing_ok=True)
    if program.suffix == ".pdmodel":
        with _programs_of("pdmodel"):
            _add_biases_by_axis(program)
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


def in_order(names: Sequence[str]) -> list[str]:
    """Return the names of an export's inputs in the order in which `run` takes them, that of `input_names`."""
    numbered = all(name[:1] == "x" and name[1:].isdigit() for name in names)
    return sorted(names, key=(lambda name: int(name[1:])) if numbered else None)


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


def _add_biases_by_axis(path: Path) -> None:
    """Rewrite a `.pdmodel` so that oneDNN takes the biases of convolutions into them.

    Paddle writes a bias as a reshape of the parameter and an addition, a pair that its oneDNN passes do not know; they
    know the addition of the parameter itself along an axis. Without it a MobileNetV2 with folded BNs takes 1.33 times
    as long.
    """
    with _static_mode():
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


def program_file(folder: Folder) -> Path:
    """Return the file of an export that holds the program, whatever Paddle wrote it; raises `ReparamError`."""
    found = [path for suffix in PROGRAM_SUFFIXES if (path := Path(folder) / f"{FILE_NAME}{suffix}").is_file()]
    if len(found) != 1:
        names = " or ".join(FILE_NAME + suffix for suffix in PROGRAM_SUFFIXES)
        raise ReparamError(f"{folder}: it must hold one exported program ({names}), it holds {len(found)}")
    return found[0]


def _program_to_run(folder: Folder) -> Path:
    """Return an export's program; raises `ReparamError` where it would do more than compute."""
    path = program_file(folder)
    found = set()
    with one_sentence(f"{folder}: Paddle cannot load it"):
        if path.suffix == ".pdmodel":
            description = paddle.framework.core.ProgramDesc(path.read_bytes())
            for block in map(description.block, range(description.num_blocks())):
                found |= {block.op(i).type() for i in range(block.op_size())}
        else:

            def look(entries: dict[str, Any]) -> dict[str, Any]:
                found.add(str(entries.get("#")).rsplit(".", 1)[-1])
                return entries

            json.loads(path.read_text(encoding="utf-8"), object_hook=look)
    if found & ACTING_OPERATORS:
        raise ReparamError(
            f"{path}: it holds the operator {min(found & ACTING_OPERATORS)}, which does not only compute"
        )
    return path


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
        program = _program_to_run(folder)
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
            self.inputs = in_order(self._predictor.get_input_names())

    def run(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """Return the outputs for the inputs, in the order of `inputs`, their names."""
        names = self.inputs
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


class LoadedProgram:
    """An exported network, run by Paddle's Executor: operator by operator, without the passes of Paddle Inference.

    Called and run as an `InferenceModel` is. `paddle.jit.load` would read a program too, but it unpickles a file
    `inference.pdiparams.info` where one lies beside it, and keeps threads for each program for ever.
    """

    def __init__(self, folder: Folder) -> None:
        """Load what `export_inference` wrote into `folder`; raises `ReparamError` where it cannot be loaded."""
        path = _program_to_run(folder)
        self.name = str(folder)
        self._format = path.suffix[1:]
        self._scope = paddle.static.Scope()
        with one_sentence(f"{folder}: Paddle cannot load it"), self._inside():
            self._executor = paddle.static.Executor(paddle.CPUPlace())
            self._program, names, self._outputs = paddle.static.load_inference_model(
                str(path.with_suffix("")), self._executor
            )
            self._inputs = in_order(names)
            weights = _weights_of(self._program)
        # Paddle keeps a scope for ever, and all that is in it.
        weakref.finalize(self, _clear, self._scope, weights).atexit = False

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        with _programs_of(self._format), _static_mode(), paddle.static.scope_guard(self._scope):
            yield

    def run(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """Return the outputs for the inputs, in the order in which the network takes them."""
        if len(self._inputs) != len(inputs):
            raise ReparamError(f"{self.name}: it takes {len(self._inputs)} inputs ({self._inputs}), not {len(inputs)}")
        with one_sentence(f"{self.name}: Paddle cannot run it"), self._inside():
            return self._executor.run(self._program, dict(zip(self._inputs, inputs)), self._outputs)

    def __call__(self, *inputs: paddle.Tensor) -> list[paddle.Tensor]:
        return [paddle.to_tensor(array) for array in self.run(*(x.numpy() for x in inputs))]


def comparable(outputs: Sequence[np.ndarray], output: OutputSpec) -> list[np.ndarray]:
    """Return a network's outputs, and behind probabilities their logarithms: the logits but for a constant a sample.

    A fault in the logits of unlikely classes hardly shows in the probabilities.
    """
    logarithms = [np.log(np.maximum(p, _SMALLEST_PROBABILITY)) for p in outputs if output.activation == "softmax"]
    return [*outputs, *logarithms]


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


class OfPixels(nn.Layer):
    """A network behind a normalisation of its own, computed as PaddleClas does."""

    def __init__(self, network: nn.Layer, normalization: Normalization) -> None:
        super().__init__()
        self.network = network
        self.scale = normalization.scale
        self.mean, self.std = (
            paddle.to_tensor(np.float32(v).reshape(1, -1, 1, 1)) for v in (normalization.mean, normalization.std)
        )

    def forward(self, x: paddle.Tensor) -> Any:
        return self.network((x.astype("float32") * self.scale - self.mean) / self.std)


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

    Run by Paddle's Executor, and by the Predictor with and without oneDNN; returns the report of each. An export
    with a normalisation gets pixels, and the model what PaddleClas makes of them. `more` load other functions to
    compare in the same way, such as an `OnnxModel`. Raises
    `ReparamError` where it cannot be loaded or run, and `NothingProven` where the outputs hardly depend on the input,
    unless `must_depend` is False.
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
    ways: dict[str, Callable[[], Callable[..., Any]]] = {
        "Executor": lambda: LoadedProgram(folder),
        "Predictor, oneDNN": lambda: InferenceModel(folder, onednn=True, keep_shapes=False),
        "Predictor, no oneDNN": lambda: InferenceModel(folder, onednn=False),
        **(more or {}),
    }
    reports = {}
    for name, load in ways.items():
        # One after the other, as each holds the weights.
        compared = _Comparable(load(), _exported_outputs, output, taken)
        for size in batch_sizes:
            reports[f"{name}, batch {size}"] = verify(
                reference, lambda *inputs, f=compared: f(*inputs), input_spec, 2, size, tolerance, must_depend
            )
        del compared
        give_back()
    return reports
