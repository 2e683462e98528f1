"""Walk a model: put layers in (`replace`), fuse them out (`reparameterize`); both report what, where, and why not."""

from __future__ import annotations

import copy
import difflib
import fnmatch
import re
import types
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Callable, Union

import paddle.nn.functional as F
from paddle import nn
from paddle.jit.dy2static.program_translator import StaticFunction

from ..arithmetic import kernels
from ..arithmetic.geometry import (
    BATCH_NORMS,
    FOLDABLE,
    ConvGeometry,
    affine_of_layer_norm,
    channel_axis,
    fold_into,
    is_convolution,
    read_bn_affine,
)
from ..arithmetic.tensors import assign, to_float64
from ..errors import ReparamError, UnsupportedConv, UsageError
from ..layers.base import FUSING_METHODS, InferenceForm, ReparamLayer
from ..registry import get_layer
from ..report import Report, format_table
from . import masks
from .tracing import (
    IMAGENET_INPUT,
    InputSpec,
    require_eval,
    sample_inputs,
    trace_flow,
    undisturbed_draws,
    visit_inputs,
    visit_outputs,
    walk,
)

Where = Union[str, Sequence[str], Callable[[str, nn.Conv2D], bool], None]


#: What stands behind one of these in a report is of one layer alone: its geometry, or where it went.
_ONE_LAYER = re.compile(r"\(|, this one | into |, \d")
#: Kinds of changes that a short report tells apart.
_KINDS = 12


@dataclass
class RewriteReport(Report):
    """What a walk did: (path, what became of it) and (path, why it was left), each in the order of the model.

    As text it has a row for each kind of change; `table` has one for each layer.
    """

    touched: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    #: What a fused model still carries: reason or kind -> count.
    left_over: dict[str, int] = field(default_factory=dict)

    @property
    def coverage(self) -> float:
        """Share of the convolutions found that were touched."""
        return len(self.touched) / max(1, len(self.touched) + len(self.skipped))

    def __str__(self) -> str:
        counts = Counter(_ONE_LAYER.split(what)[0] for _, what in self.touched)
        counts.update(f"skipped: {_ONE_LAYER.split(why)[0]}" for _, why in self.skipped)
        rows = [[count, kind] for kind, count in counts.items()]
        if len(rows) > _KINDS:
            rows = [*rows[: _KINDS - 1], [sum(count for count, _ in rows[_KINDS - 1 :]), "of other kinds"]]
        return f"{format_table(['layers', 'what / why'], rows)}\n{self._sums()}"

    def table(self) -> str:
        """Return the report with a row for each layer."""
        rows = [[path, "done", what] for path, what in self.touched]
        rows += [[path, "skipped", why] for path, why in self.skipped]
        return f"{format_table(['layer', '', 'what / why'], rows)}\n{self._sums()}"

    def _sums(self) -> str:
        text = f"{len(self.touched)} done, {len(self.skipped)} skipped ({self.coverage:.0%} done)"
        if self.left_over:
            text += "; left over: " + ", ".join(f"{count} {kind}" for kind, count in self.left_over.items())
        return text


# ---------------------------------------------------------------------------------------------------------------------
# Finding and swapping layers


def _places(model: nn.Layer) -> dict[int, tuple[nn.Layer, list[str]]]:
    """Return id -> (layer, all of its paths), in the order of the model."""
    places: dict[int, tuple[nn.Layer, list[str]]] = {}
    for path, layer in walk(model):
        places.setdefault(id(layer), (layer, []))[1].append(path)
    return places


def _swap(model: nn.Layer, new_layers: dict[int, nn.Layer]) -> None:
    """Put each new layer at every place of the layer whose id it is listed under.

    Some models call their layers through a Python list that they keep beside the registered sublayers; those are
    followed too.
    """

    def swapped(value: Any) -> Any:
        if isinstance(value, nn.Layer):
            return new_layers.get(id(value), value)
        if type(value) is list:
            value[:] = [swapped(v) for v in value]
        elif type(value) is dict:
            value.update({k: swapped(v) for k, v in value.items()})
        elif type(value) is tuple:
            return tuple(swapped(v) for v in value)
        return value

    layers = [layer for _, layer in walk(model)]
    for layer in layers:
        for name, child in layer._sub_layers.items():
            layer._sub_layers[name] = new_layers.get(id(child), child)
        for name, value in vars(layer).items():
            # Paddle's own fields start with an underscore and hold no layers but the sublayers just done.
            if not name.startswith("_") and type(value) in (list, dict, tuple):
                vars(layer)[name] = swapped(value)


def _has_hooks(layer: nn.Layer) -> bool:
    return bool(layer._forward_pre_hooks or layer._forward_post_hooks)


def _refuse_compiled(model: nn.Layer) -> None:
    for path, layer in walk(model):
        if isinstance(vars(layer).get("forward"), StaticFunction):
            raise ReparamError(
                f"{path or type(layer).__name__} was compiled by paddle.jit.to_static, and would go on computing the "
                "layers that it had then; compile the network after its layers were replaced or fused"
            )


def _owners(model: nn.Layer) -> dict[int, set[int]]:
    """Return id of a parameter -> ids of the layers that hold it."""
    owners: dict[int, set[int]] = {}
    for _, layer in walk(model):
        for parameter in layer._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(id(layer))
    return owners


def _refuse_shared(layer: nn.Layer, owners: dict[int, set[int]]) -> None:
    for name, parameter in layer._parameters.items():
        if parameter is not None and len(owners[id(parameter)]) > 1:
            raise UnsupportedConv(f"its {name} is shared with another layer; a new layer would break the tie")


def copy_model(model: nn.Layer, share_tensors: bool = False) -> nn.Layer:
    """Return a deep copy whose hooks speak of the copy; with `share_tensors` it has the model's own tensors.

    `copy.deepcopy` keeps functions as they are, so a hook that is a closure over the model (as PaddleClas'
    return_patterns is) would go on changing the original.
    """
    tensors = (*model.parameters(), *model.buffers()) if share_tensors else ()
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    duplicate = copy.deepcopy(model, memo)

    def rebound(hook: Any) -> Any:
        cells = getattr(hook, "__closure__", None)
        if not isinstance(hook, types.FunctionType) or not cells:
            return hook
        new_cells = tuple(types.CellType(memo.get(id(c.cell_contents), c.cell_contents)) for c in cells)
        return types.FunctionType(hook.__code__, hook.__globals__, hook.__name__, hook.__defaults__, new_cells)

    for _, layer in walk(duplicate):
        for hooks in (layer._forward_pre_hooks, layer._forward_post_hooks):
            for key, hook in hooks.items():
                hooks[key] = rebound(hook)
    return duplicate


# ---------------------------------------------------------------------------------------------------------------------
# Putting layers in


def _selector(where: Where, paths: list[str]) -> Callable[[str, nn.Conv2D], bool]:
    if where is None:
        return lambda path, conv: True
    if callable(where) and not isinstance(where, nn.Layer):
        return where
    patterns = [where] if isinstance(where, str) else where
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
        raise UsageError(
            f"`where` is a pattern of paths, a list of them, or a function of (path, layer), not {where!r}"
        )
    for pattern in patterns:
        if paths and not fnmatch.filter(paths, pattern):
            near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.4) or paths[:3]
            raise UsageError(
                f"`where` has {pattern!r}, which no convolution's path matches; some are {', '.join(near)}"
            )
    return lambda path, conv: any(fnmatch.fnmatchcase(path, p) for p in patterns)


def replace(
    model: nn.Layer, layer_name: str, where: Where = None, dry_run: bool = False, **options: Any
) -> RewriteReport:
    """Put a registered layer in the place of the model's convolutions, in place, and report every convolution.

    `where` selects by name pattern (`"blocks.*.conv2"`, or a list of patterns) or by a function of (path, convolution);
    `options` go to the layer's `from_conv`. With `dry_run` nothing changes. Raises `ReparamError` where no convolution
    was replaced.

    An optimizer that was built before holds the old parameters: build it afterwards. A weight with `stop_gradient`
    stays as it is while what the layer puts around it trains; a learning-rate multiplier (0: nothing moves), a
    regularizer and the exemption from clipping hold for both. Parameters get new names: a rule by name
    (`apply_decay_param_fun`) is to be written for them.
    """
    if not isinstance(model, nn.Layer):
        raise UsageError(f"{layer_name} is put into a network, a paddle.nn.Layer, not into {model!r}; build it first")
    _refuse_compiled(model)
    layer_class = get_layer(layer_name).layer
    layer_class.check_options(**options)
    if isinstance(model, nn.Conv2D):
        raise ReparamError(f"the model is itself a convolution; use {layer_name}.from_conv(conv) for a single one")
    convolutions = [path for path, layer in walk(model) if is_convolution(layer)]
    selected, owners = _selector(where, convolutions), _owners(model)
    report, new_layers, inside = RewriteReport(), {}, {}
    for layer, paths in _places(model).values():
        path = paths[0]
        closed = isinstance(layer, ReparamLayer) and (layer.is_repped or not layer.is_block)
        if closed or isinstance(layer, InferenceForm):
            inside.update({id(child): type(layer).__name__ for _, child in walk(layer)})
        if isinstance(layer, (ReparamLayer, InferenceForm)) or not is_convolution(layer):
            continue
        try:
            if id(layer) in inside:
                raise UnsupportedConv(f"it is part of a {inside[id(layer)]}")
            if not any(selected(p, layer) for p in paths):
                raise UnsupportedConv("not selected by `where`")
            if _has_hooks(layer):
                raise UnsupportedConv("it has forward hooks, which would be lost; remove them first")
            _refuse_shared(layer, owners)
            new_layers[id(layer)] = layer_class.from_conv(layer, **options)
        except UnsupportedConv as reason:
            report.skipped.append((path, str(reason)))
        except ReparamError as error:
            raise error.at(path) from error
        else:
            also = f", also at {', '.join(paths[1:])}" if paths[1:] else ""
            report.touched.append((path, f"{layer_name}({ConvGeometry.of(layer)}){also}"))
    if not report.touched:
        reasons = sorted({reason for _, reason in report.skipped})
        found = (
            f"its {len(report.skipped)} convolutions were skipped: {'; '.join(reasons)}" if reasons else "it has none"
        )
        raise ReparamError(f"{layer_name} was put in the place of no convolution of {type(model).__name__}: {found}")
    if not dry_run:
        _swap(model, new_layers)
    return report


# ---------------------------------------------------------------------------------------------------------------------
# Fusing layers out


def _fuse_layers(model: nn.Layer, report: RewriteReport) -> nn.Layer:
    """Fuse all layers that keep the contract; return the model, which is another one where the root itself is fused."""
    inside: set[int] = set()
    places = _places(model)
    for key in list(places):
        # Each train form goes as soon as its fused form is there: the two of a whole network need twice its memory.
        layer, paths = places.pop(key)
        if not isinstance(layer, ReparamLayer) or key in inside:
            continue
        inside.update(id(child) for _, child in walk(layer))
        try:
            if _has_hooks(layer):
                raise ReparamError("it has forward hooks, which fusing would lose; remove them first")
            fused = layer.reparameterize()
        except ReparamError as error:
            raise error.at(paths[0] or type(layer).__name__) from error
        report.touched.append((paths[0], f"{type(layer).__name__} -> {type(fused).__name__}"))
        if layer is model:
            return fused
        _swap(model, {key: fused})
    return model


def _fuse_foreign(model: nn.Layer, report: RewriteReport) -> list[nn.Layer]:
    """Call the fusing methods of PaddleClas' own blocks, `re_parameterize` (2.6) or `rep` (2.4); return the blocks."""
    blocks = []
    for layer, paths in list(_places(model).values()):
        method = next((m for name in FUSING_METHODS if callable(m := getattr(layer, name, None))), None)
        if isinstance(layer, ReparamLayer) or method is None or getattr(layer, "is_repped", False):
            continue
        try:
            method()
        except Exception as error:
            raise ReparamError(
                f"{paths[0] or type(layer).__name__}: {type(layer).__name__}.{method.__name__}() of "
                f"{type(layer).__module__} failed: {error}"
            ) from error
        report.touched.append((paths[0], f"{type(layer).__name__}.{method.__name__}()"))
        blocks.append(layer)
    return blocks


def _drop_unused(model: nn.Layer, blocks: list[nn.Layer], inputs: list[Any], report: RewriteReport) -> None:
    """Drop the training branches that PaddleClas' blocks keep, with their parameters, after they were fused.

    Dropped is what a forward pass does not call. An Identity stays in its place, for blocks that ask for it by name.
    """
    paths = {id(layer): places[0] for layer, places in _places(model).values()}
    called: set[str] = set()
    visit_outputs(model, inputs, lambda path, _: called.add(path))
    for block in blocks:
        for name, child in list(block._sub_layers.items()):
            branch = [layer for _, layer in walk(child)] if child is not None else []
            count = sum(p.size for layer in branch for p in layer._parameters.values() if p is not None)
            if count and not any(paths[id(layer)] in called for layer in branch):
                block._sub_layers[name] = nn.Identity()
                report.touched.append((paths[id(child)], f"training branch dropped, {count} parameters"))


class Activation(nn.Layer):
    """What is left of an `nn.BatchNorm` with an activation, once the normalisation is folded away."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Any) -> Any:
        return getattr(F, self.name)(x)


def _fold_batch_norms(model: nn.Layer, report: RewriteReport, inputs: list[Any]) -> None:
    """Fold every BN that alone reads what a convolution, an `nn.Linear` or an inference form puts out into that."""
    places = _places(model)
    inside = {id(c) for layer, _ in places.values() if isinstance(layer, InferenceForm) for _, c in walk(layer)}
    producers = [
        layer
        for layer, _ in places.values()
        if isinstance(layer, (InferenceForm, *FOLDABLE)) or is_convolution(layer)
        if id(layer) not in inside or isinstance(layer, InferenceForm)
    ]
    axes: dict[str, int] = {}
    visit_outputs(model, inputs, lambda path, output: axes.update({path: output.ndim}))
    norms = [layer for layer, _ in places.values() if isinstance(layer, BATCH_NORMS)]
    flow = trace_flow(model, producers, norms, inputs)
    followed = {consumer: producer for producer, consumer in flow.followed_by.items()}
    owners = _owners(model)
    new_layers: dict[int, nn.Layer] = {}
    for bn in norms:
        path = places[id(bn)][1][0]
        try:
            if flow.calls[id(bn)] != 1:
                raise UnsupportedConv(f"this BN is called {flow.calls[id(bn)]} times in a forward pass")
            if id(bn) not in followed:
                raise UnsupportedConv("this BN is not the only reader of one convolution's or linear layer's output")
            producer, producer_paths = places[followed[id(bn)]]
            plain = type(producer) in FOLDABLE or getattr(producer, "computes_plain_convolution", False)
            if not (plain or isinstance(producer, InferenceForm)):
                raise UnsupportedConv(
                    f"{producer_paths[0]}, which it follows, is a {type(producer).__name__}, whose forward may do more "
                    "than Paddle's own layers"
                )
            if len({channel_axis(layer, axes[path]) for layer in (producer, bn)}) > 1:
                raise UnsupportedConv(
                    f"it normalises along another axis than that of the channels of {producer_paths[0]}"
                )
            if _has_hooks(bn) or _has_hooks(producer):
                raise UnsupportedConv("forward hooks on it or on its convolution would be lost; remove them first")
            _refuse_shared(producer, owners)
            scale, shift = read_bn_affine(bn)
            if isinstance(producer, InferenceForm):
                producer.absorb_affine(scale, shift)
            else:
                weight, bias = fold_into(producer, scale, shift)
                if isinstance(producer, nn.Conv2D):
                    new_layers[id(producer)] = ConvGeometry.of(producer).make_conv(weight, bias)
                else:
                    assign(producer.weight, weight)
                    if producer.bias is None:
                        producer.bias = producer.create_parameter(
                            [bias.size], dtype=producer.weight.dtype, is_bias=True
                        )
                    assign(producer.bias, bias)
        except ReparamError as reason:
            report.skipped.append((path, str(reason)))
        else:
            act = getattr(bn, "_act", None)
            new_layers[id(bn)] = Activation(act) if act else nn.Identity()
            report.touched.append((path, f"folded into {producer_paths[0]}"))
    for layer in new_layers.values():
        layer.eval()
    _swap(model, new_layers)


def _fold_into_readers(model: nn.Layer, report: RewriteReport, inputs: list[Any]) -> None:
    """Fold the affine of a norm that one linear layer alone reads into that layer.

    That is a BN before a 1x1 convolution without padding, and a LayerNorm over the last axis before an `nn.Linear`.
    What stays of the norm is marked with `affine_moved_on`: its output is no longer what it was.
    """
    places = _places(model)
    inside = {id(c) for layer, _ in places.values() if isinstance(layer, InferenceForm) for _, c in walk(layer)}
    owners = _owners(model)

    def free(layer: nn.Layer) -> bool:
        return id(layer) not in inside and not _has_hooks(layer)

    layers = [layer for layer, _ in places.values() if free(layer)]
    batch_norms = [n for n in layers if isinstance(n, BATCH_NORMS) and not getattr(n, "_act", None)]
    pointwise = [c for c in layers if type(c) is nn.Conv2D and _is_pointwise(c)]
    layer_norms = [n for n in layers if type(n) is nn.LayerNorm and len(n._normalized_shape) == 1]
    layer_norms = [n for n in layer_norms if n.weight is not None or n.bias is not None]
    linears = [c for c in layers if type(c) is nn.Linear]
    followed_by = {
        **trace_flow(model, batch_norms, pointwise, inputs).followed_by,
        **trace_flow(model, layer_norms, linears, inputs).followed_by,
    }
    new_layers: dict[int, nn.Layer] = {}
    for norm in batch_norms + layer_norms:
        reader, reader_paths = places[followed_by[id(norm)]] if id(norm) in followed_by else (None, [])
        path = places[id(norm)][1][0]
        try:
            if reader is None:
                continue
            _refuse_shared(reader, owners)
            if isinstance(norm, nn.LayerNorm):
                new_layers[id(reader)] = _linear_behind(reader, *affine_of_layer_norm(norm))
                remains = nn.LayerNorm(norm._normalized_shape, norm._epsilon, weight_attr=False, bias_attr=False)
            else:
                new_layers[id(reader)] = _pointwise_behind(reader, *read_bn_affine(norm))
                remains = nn.Identity()
        except ReparamError as reason:
            report.skipped.append((path, str(reason)))
            continue
        remains.affine_moved_on = True
        new_layers[id(norm)] = remains
        report.skipped[:] = [entry for entry in report.skipped if entry[0] != path]
        report.touched.append((path, f"folded into {reader_paths[0]}, which reads it"))
    for layer in new_layers.values():
        layer.eval()
    _swap(model, new_layers)


def _is_pointwise(conv: nn.Conv2D) -> bool:
    geometry = ConvGeometry.of(conv) if "weight" in conv._parameters else None
    return geometry is not None and geometry.kernel_size == (1, 1) and geometry.padding in ((0, 0, 0, 0), "SAME")


def _pointwise_behind(conv: nn.Conv2D, scale: Any, shift: Any) -> nn.Conv2D:
    weight, bias = to_float64(conv.weight), to_float64(conv.bias)
    return ConvGeometry.of(conv).make_conv(*kernels.fold_input_affine(weight, bias, scale, shift, conv._groups))


def _linear_behind(linear: nn.Linear, scale: Any, shift: Any) -> nn.Linear:
    kernel = to_float64(linear.weight).T[:, :, None, None]
    kernel, bias = kernels.fold_input_affine(kernel, to_float64(linear.bias), scale, shift, 1)
    folded = nn.Linear(*linear.weight.shape, weight_attr=nn.initializer.Constant(0.0))
    folded.to(dtype=linear.weight.dtype)
    assign(folded.weight, kernel[:, :, 0, 0].T)
    assign(folded.bias, bias)
    return folded


def _fit_to_size(model: nn.Layer, report: RewriteReport, inputs: list[Any]) -> None:
    """Let every inference form become what is best for the one size of map that it gets."""
    sizes: dict[str, tuple[int, int]] = {}
    visit_inputs(model, inputs, lambda path, x: sizes.update({path: tuple(x.shape[2:])}))
    new_layers: dict[int, nn.Layer] = {}
    for layer, paths in _places(model).values():
        seen = {sizes[path] for path in paths if path in sizes}
        fitted = layer.for_size(*seen.pop()) if isinstance(layer, InferenceForm) and len(seen) == 1 else None
        if fitted is not None:
            fitted.eval()
            new_layers[id(layer)] = fitted
            what = f"{type(fitted).__name__}({fitted.extra_repr()})"
            report.touched.append((paths[0], f"for maps of {sizes[paths[0]][0]}x{sizes[paths[0]][1]}: {what}"))
    _swap(model, new_layers)


def _count_left_over(model: nn.Layer) -> dict[str, int]:
    layers = [layer for layer, _ in _places(model).values()]
    counts = {
        "BNs": sum(isinstance(layer, BATCH_NORMS) for layer in layers),
        "inference forms": sum(isinstance(layer, InferenceForm) for layer in layers),
        "layers in train form": sum(isinstance(layer, ReparamLayer) for layer in layers),
    }
    return {kind: count for kind, count in counts.items() if count}


@undisturbed_draws()
def reparameterize(
    model: nn.Layer, fold_bn: bool = False, input_spec: InputSpec | None = None, fixed_size: bool = False
) -> tuple[nn.Layer, RewriteReport]:
    """Return a new model in eval mode with every fusable layer fused, and the report; the model itself stays as it is.

    Fuses the layers of this library and PaddleClas' own (`re_parameterize`, `rep`). With `fold_bn`, also every BN that
    in a forward pass on `input_spec` (shapes with None for the batch; [None, 3, 224, 224] unless told) is the only
    reader of the output of a convolution of any kind or of an `nn.Linear`, and every BN or LayerNorm that one 1x1
    convolution or `nn.Linear` alone reads. With `fixed_size`, layers also take the form that is best for the height and
    width of `input_spec`; the new model is then right for images of that size only. What is fused has Paddle's defaults
    for training, nothing frozen.
    Raises `ReparamError` for a model in training mode and where nothing was fused.
    """
    if not isinstance(model, nn.Layer):
        raise UsageError(f"only a network, a paddle.nn.Layer, can be fused, not {model!r}")
    require_eval(model, "the model", "fusing")
    _refuse_compiled(model)
    report = RewriteReport()
    duplicate = copy_model(model)
    # Masks are for training: the weights behind them are zero.
    masks.remove_masks(duplicate)
    fused = _fuse_layers(duplicate, report)
    blocks = _fuse_foreign(fused, report)
    if fold_bn or fixed_size:
        inputs = sample_inputs(IMAGENET_INPUT if input_spec is None else input_spec, batch=1, seed=0, like=fused)
    if fold_bn:
        if blocks:
            _drop_unused(fused, blocks, inputs, report)
        _fold_batch_norms(fused, report, inputs)
        _fold_into_readers(fused, report, inputs)
    if fixed_size:
        _fit_to_size(fused, report, inputs)
    if not report.touched:
        raise ReparamError(
            f"{type(model).__name__} has nothing to fuse: no layer of this library or of PaddleClas in train form"
            + (
                ", and no BN that could be folded" + "".join(f"; {path}: {why}" for path, why in report.skipped[:5])
                if fold_bn
                else "; fold_bn=True would fold plain conv + BN pairs"
            )
        )
    fused.eval()
    report.left_over = _count_left_over(fused)
    return fused, report
