"""What a forward pass really does: which layer feeds which, and what each of them puts out."""

from __future__ import annotations

import contextlib
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Callable, Union

import numpy as np
import paddle
from paddle import nn

from ..arithmetic.geometry import BATCH_NORMS
from ..errors import ReparamError, one_sentence

#: Shapes of the inputs of a forward pass, the batch (None) first; by name where the network takes one dict of tensors.
InputSpec = Union[Sequence[Any], Mapping[str, Any]]

IMAGENET_INPUT: InputSpec = ((None, 3, 224, 224),)

#: Numbers that one input may hold for each sample, which is a picture of 16,384 pixels a side.
_LARGEST_SAMPLE = 1 << 30


def input_shapes(input_spec: InputSpec) -> dict[str | int, list[int | None]]:
    """Return number or name -> shape, None for the batch, of a list or dict of shapes (or `paddle.static.InputSpec`).

    Names are in alphabetical order, in which Paddle writes them into an export. Raises `ReparamError` for what is none.
    """
    entries = dict(sorted(input_spec.items())) if isinstance(input_spec, Mapping) else None
    if entries is None and isinstance(input_spec, (list, tuple)):
        entries = dict(enumerate(input_spec))
    if not entries:
        raise ReparamError(f"input_spec is {input_spec!r}; give a list of shapes, such as [[None, 3, 224, 224]]")
    shapes = {}
    for name, entry in entries.items():
        shape = getattr(entry, "shape", entry)
        if not isinstance(shape, (list, tuple)):
            raise ReparamError(
                f"input_spec {input_spec!r} is no list of shapes: its entry {name!r} is {entry!r}; "
                "write a list for each input, as in [[None, 3, 224, 224]]"
            )
        shape = [None if n in (None, -1) and type(n) is not bool else n for n in shape]
        if shape and shape[0] is not None:
            raise ReparamError(
                f"the input shape {list(shape)} starts with {shape[0]!r}; its first size is the batch, which stays "
                "open: write None"
            )
        if not shape or any(n is not None and (type(n) is not int or n < 1) for n in shape):
            raise ReparamError(f"the input shape {list(shape)} has sizes that are none; give whole numbers from 1 on")
        if math.prod(n for n in shape[1:] if n) > _LARGEST_SAMPLE:
            raise ReparamError(f"the input shape {list(shape)} has more numbers than can be computed with")
        shapes[name] = shape
    return shapes


def sample_inputs(input_spec: InputSpec, batch: int, seed: int, like: nn.Layer) -> list[Any]:
    """Return seeded normal inputs, as a network takes them: `network(*inputs)`; for named shapes that is one dict.

    They have the dtype of the parameters of `like`. Raises `ReparamError` where another dimension than the batch is
    left open, and as `input_shapes` does.
    """
    dtype = next((p.dtype for p in like.parameters()), "float32")
    generator = np.random.default_rng(seed)
    inputs: dict[Any, paddle.Tensor] = {}
    for name, shape in input_shapes(input_spec).items():
        sizes = [batch if shape[0] is None else shape[0], *shape[1:]]
        if None in sizes:
            raise ReparamError(
                f"the input shape {shape} leaves more than the batch open; give every other size a number"
            )
        inputs[name] = paddle.to_tensor(generator.standard_normal(sizes)).astype(dtype)
    return [inputs] if isinstance(input_spec, Mapping) else list(inputs.values())


#: Layers that are another function in training mode, whatever the network around them is in.
_OTHERS_IN_TRAINING = (*BATCH_NORMS, nn.Dropout, nn.Dropout2D, nn.Dropout3D, nn.AlphaDropout)


def require_eval(model: nn.Layer, what: str, doing: str) -> None:
    """Raise `ReparamError` where a network is in training mode, or a layer inside it to which that matters."""
    for path, layer in walk(model):
        if layer.training and (not path or isinstance(layer, _OTHERS_IN_TRAINING)):
            where = f"{path}: {type(layer).__name__}" if path else what
            raise ReparamError(f"{where} is in training mode; call model.eval() before {doing}")


def run(function: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """Return what a network or another function gives for copies of the inputs, which it may change in place.

    Raises `ReparamError` with the inputs' shapes where it cannot be run on them.
    """
    name = type(function).__name__ if isinstance(function, nn.Layer) else "the function"
    with one_sentence(f"{name} cannot be run on inputs {map_tensors(lambda x: list(x.shape), list(inputs))}"):
        return function(*map_tensors(lambda x: x.clone(), inputs))


def map_tensors(function: Callable[[paddle.Tensor], Any], value: Any) -> Any:
    """Return nested lists and dicts with a function's value in the place of every tensor."""
    if isinstance(value, paddle.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [map_tensors(function, item) for item in value]
    return value


@contextlib.contextmanager
def unchanged(*models: Any) -> Iterator[None]:
    """Give the layers of networks the attributes again that they had before the `with` block.

    A network that keeps its input as an attribute would keep ours, and take nothing but tensors afterwards.
    """
    layers = {id(layer): layer for model in models if isinstance(model, nn.Layer) for _, layer in walk(model)}
    kept = []
    for layer in layers.values():
        attributes = dict(vars(layer))
        # Paddle keeps parameters, buffers, sublayers and hooks in dicts and sets of the layer.
        inner = {name: value.copy() for name, value in attributes.items() if isinstance(value, (dict, set, list))}
        kept.append((layer, attributes, inner))
    try:
        yield
    finally:
        for layer, attributes, inner in kept:
            vars(layer).clear()
            vars(layer).update(attributes)
            for name, value in inner.items():
                attributes[name].clear()
                (attributes[name].extend if isinstance(value, list) else attributes[name].update)(value)


def flatten_outputs(outputs: Any) -> list[paddle.Tensor]:
    """Return the tensors of a network's output out of its lists, tuples and dicts, in a fixed order."""
    if isinstance(outputs, paddle.Tensor):
        return [outputs]
    if isinstance(outputs, dict):
        return [t for key in sorted(outputs, key=str) for t in flatten_outputs(outputs[key])]
    if isinstance(outputs, (list, tuple)):
        return [t for item in outputs for t in flatten_outputs(item)]
    return []


def all_finite(outputs: Any) -> bool:
    """Tell whether all numbers of a network's output are finite."""
    tensors = [tensor for tensor in flatten_outputs(outputs) if tensor.is_floating_point()]
    return all(bool(paddle.isfinite(tensor).all()) for tensor in tensors)


def not_finite(state: Mapping[str, Any]) -> str | None:
    """Return which entry of a state dict holds numbers that are not finite, and how many, or None."""
    for name, value in state.items():
        if isinstance(value, paddle.Tensor) and value.is_floating_point() and value.size:
            count = value.size - int(paddle.isfinite(value).sum())
            if count:
                return f"{name} holds {count} of {value.size} numbers that are not finite"
    return None


def first_not_finite(model: nn.Layer, inputs: Sequence[Any]) -> str | None:
    """Return the path of the first layer to finish whose output is not finite while its input is; None: there is none.

    The layer is as far inside as can be: the network itself ("") only where none of its layers is at fault.
    """
    found: list[str] = []
    with unchanged(model), Hooks() as hooks, paddle.no_grad():
        for path, layer in walk(model):

            def check(_layer: nn.Layer, given: Any, output: Any, path: str = path) -> None:
                if not found and all_finite(list(given)) and not all_finite(output):
                    found.append(path)

            hooks.after(layer, check)
        run(model, inputs)
    return found[0] if found else None


@contextlib.contextmanager
def undisturbed_draws() -> Iterator[None]:
    """Give Python's, numpy's and Paddle's generators the state again that they had before the `with` block."""
    states = random.getstate(), np.random.get_state(), paddle.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        paddle.set_rng_state(states[2])


def walk(root: nn.Layer) -> Iterator[tuple[str, nn.Layer]]:
    """Yield (path, layer) for every place of the model, the root ("") first, a shared layer at each of its places."""

    def visit(layer: nn.Layer, path: str, ancestors: tuple[int, ...]) -> Iterator[tuple[str, nn.Layer]]:
        yield path, layer
        for name, child in layer._sub_layers.items():
            if child is not None and id(child) not in ancestors:
                yield from visit(child, f"{path}.{name}" if path else name, (*ancestors, id(child)))

    yield from visit(root, "", (id(root),))


class Hooks:
    """Forward hooks that are gone when the `with` block ends."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def before(self, layer: nn.Layer, hook: Any) -> None:
        self._handles.append(layer.register_forward_pre_hook(hook))

    def after(self, layer: nn.Layer, hook: Any) -> None:
        self._handles.append(layer.register_forward_post_hook(hook))

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()


def visit_outputs(
    model: nn.Layer, inputs: Sequence[paddle.Tensor], visit: Callable[[str, paddle.Tensor], None]
) -> None:
    """Call `visit` with the path and the first output tensor of every layer's first call, as the layers finish."""
    seen: set[str] = set()
    with unchanged(model), Hooks() as hooks, paddle.no_grad():
        for path, layer in walk(model):

            def record(_layer: nn.Layer, _inputs: Any, output: Any, path: str = path) -> None:
                tensors = flatten_outputs(output)
                if tensors and path not in seen:
                    seen.add(path)
                    visit(path, tensors[0])

            hooks.after(layer, record)
        run(model, inputs)


def visit_inputs(model: nn.Layer, inputs: Sequence[paddle.Tensor], visit: Callable[[str, paddle.Tensor], None]) -> None:
    """Call `visit` with the path and the first input tensor of every call of every layer that has one."""
    with unchanged(model), Hooks() as hooks, paddle.no_grad():
        for path, layer in walk(model):

            def record(_layer: nn.Layer, inputs: Any, path: str = path) -> None:
                if inputs and isinstance(inputs[0], paddle.Tensor):
                    visit(path, inputs[0])

            hooks.before(layer, record)
        run(model, inputs)


@dataclass
class Flow:
    """Who follows whom in a forward pass, by the ids of the layers."""

    #: producer -> the one consumer that alone receives the producer's output, unchanged.
    followed_by: dict[int, int] = field(default_factory=dict)
    calls: Counter = field(default_factory=Counter)


def trace_flow(
    model: nn.Layer, producers: Sequence[nn.Layer], consumers: Sequence[nn.Layer], inputs: Sequence[paddle.Tensor]
) -> Flow:
    """Run the model and find the producers whose output goes to one consumer and nowhere else, and stays as it is.

    Each producer's output is handed on as a copy, made by adding a zero that autograd knows as a leaf, while a consumer
    that is called with this very copy gets the original. A leaf that the network's outputs still depend on shows that
    the copy has another reader. Autograd does not see all of them (a comparison, an index, `detach`), so the model is
    run again with other numbers in the copies.
    """
    flow = Flow()
    copies: dict[int, tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor, int]] = {}
    reached: dict[int, int] = {}
    # Of every tensor that a producer took or handed on: it, its version, and the producer.
    watched: list[tuple[paddle.Tensor, int, int]] = []

    def hand_on_copy(layer: nn.Layer, taken: Any, output: Any) -> Any:
        flow.calls[id(layer)] += 1
        if not isinstance(output, paddle.Tensor):
            return None
        leaf = paddle.zeros([1], output.dtype)
        leaf.stop_gradient = False
        copy = output + leaf
        copies[id(copy)] = (copy, leaf, output, id(layer))
        watched.extend((tensor, tensor.inplace_version, id(layer)) for tensor in (copy, *flatten_outputs(list(taken))))
        return copy

    def take_original(layer: nn.Layer, args: tuple) -> Any:
        flow.calls[id(layer)] += 1
        if not args or id(args[0]) not in copies:
            return None
        copy, _, original, producer = copies[id(args[0])]
        if copy.inplace_version != 0:
            return None
        reached[producer] = id(layer)
        return (original, *args[1:])

    layers = {id(layer): layer for layer in (*producers, *consumers)}
    with unchanged(model), Hooks() as hooks, paddle.enable_grad():
        for layer in {id(p): p for p in producers}.values():
            hooks.after(layer, hand_on_copy)
        for layer in {id(c): c for c in consumers}.values():
            hooks.before(layer, take_original)
        outputs = flatten_outputs(run(model, inputs))
    read_elsewhere = _read_by_autograd(outputs, {leaf_of: leaf for _, leaf, _, leaf_of in copies.values()})
    # A layer that only hands on, as folding leaves one, would hand on what was changed in place after it was read.
    read_elsewhere |= {producer for tensor, version, producer in watched if tensor.inplace_version != version}
    expected = [output.detach() for output in outputs]
    del outputs
    copies.clear()
    watched.clear()
    found = {
        producer: consumer
        for producer, consumer in reached.items()
        if producer not in read_elsewhere and flow.calls[producer] == 1 and flow.calls[consumer] == 1
    }
    noise: list[float] = []

    def differs(some: list[int]) -> bool:
        pairs = [(layers[producer], layers[found[producer]]) for producer in some]
        difference = relative_difference(expected, _run_with_others(model, pairs, inputs))
        if difference == 0.0:
            return False
        if not noise:
            noise.append(relative_difference(expected, _run_with_others(model, [], inputs)))
        return not difference <= 10.0 * noise[0]

    def read_unseen(some: list[int]) -> set[int]:
        if not some or not differs(some):
            return set()
        if len(some) == 1:
            return set(some)
        middle = len(some) // 2
        return (read_unseen(some[:middle]) | read_unseen(some[middle:])) or set(some)

    unseen = read_unseen(list(found))
    flow.followed_by = {producer: consumer for producer, consumer in found.items() if producer not in unseen}
    return flow


def _read_by_autograd(outputs: Sequence[paddle.Tensor], leaves: Mapping[int, paddle.Tensor]) -> set[int]:
    """Return the keys of those leaves that the outputs depend on, as far as autograd knows."""
    # A network may hand out one tensor under several names.
    ends = list({id(output): output for output in outputs if not output.stop_gradient}.values())
    if not ends or not leaves:
        return set()
    try:
        gradients = paddle.grad(ends, list(leaves.values()), allow_unused=True)
    except RuntimeError:
        # Something was changed in place that a gradient needs: this network is for inference only.
        return set()
    return {key for key, gradient in zip(leaves, gradients) if gradient is not None}


def _run_with_others(
    model: nn.Layer, pairs: Sequence[tuple[nn.Layer, nn.Layer]], inputs: Sequence[Any]
) -> list[paddle.Tensor]:
    """Return the outputs where all but the consumer of each pair get other numbers than the producer put out.

    There are none where the model cannot be run with them.
    """
    handed: dict[int, tuple[paddle.Tensor, paddle.Tensor]] = {}

    def hand_on_others(_layer: nn.Layer, _inputs: Any, output: paddle.Tensor) -> paddle.Tensor:
        numbers = np.random.default_rng(len(handed)).standard_normal(output.shape)
        others = (3.0 * paddle.to_tensor(numbers).astype(output.dtype) + 1.0) * output.abs().max()
        handed[id(others)] = (others, output)
        return others

    def take_original(_layer: nn.Layer, args: tuple) -> Any:
        return (handed[id(args[0])][1], *args[1:]) if args and id(args[0]) in handed else None

    with unchanged(model), Hooks() as hooks, paddle.no_grad():
        for producer, consumer in pairs:
            hooks.after(producer, hand_on_others)
            hooks.before(consumer, take_original)
        try:
            return flatten_outputs(run(model, inputs))
        except ReparamError:
            return []


def relative_difference(expected: Sequence[paddle.Tensor], actual: Sequence[paddle.Tensor]) -> float:
    """Return how far tensors are apart, relative to the largest number of each; infinite for other shapes."""
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in actual]:
        return math.inf
    largest = 0.0
    for a, b in zip(expected, actual):
        a, b = (np.nan_to_num(tensor.astype("float64").numpy()) for tensor in (a, b))
        difference = np.abs(a - b).max(initial=0.0)
        if difference:
            largest = max(largest, float(difference / np.abs(a).max(initial=1e-300)))
    return largest
