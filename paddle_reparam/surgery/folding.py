"""Affines of BNs and LayerNorms, folded into the layer before them or behind them."""

from __future__ import annotations

from typing import Any

import paddle.nn.functional as F
from paddle import nn

from ..arithmetic import kernels
from ..arithmetic.geometry import (
    BATCH_NORMS,
    FOLDABLE,
    ConvGeometry,
    absorb_affine_into,
    affine_of_layer_norm,
    channel_axis,
    fold_into,
    is_convolution,
    linear_behind,
    read_bn_affine,
)
from ..arithmetic.tensors import to_float64
from ..errors import ReparamError, UnsupportedConv
from ..layers.base import InferenceForm
from .places import RewriteReport, has_hooks, owners_of, places_of, refuse_shared, swap
from .tracing import trace_flow, visit_outputs, walk


class Activation(nn.Layer):
    """What is left of an `nn.BatchNorm` with an activation, once the normalisation is folded away."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Any) -> Any:
        return getattr(F, self.name)(x)


def fold_batch_norms(model: nn.Layer, report: RewriteReport, inputs: list[Any]) -> None:
    """Fold every BN that alone reads what a convolution, an `nn.Linear` or an inference form puts out into that."""
    places = places_of(model)
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
    owners = owners_of(model)
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
            if has_hooks(bn) or has_hooks(producer):
                raise UnsupportedConv("forward hooks on it or on its convolution would be lost; remove them first")
            refuse_shared(producer, owners)
            scale, shift = read_bn_affine(bn)
            if isinstance(producer, InferenceForm):
                producer.absorb_affine(scale, shift)
            elif isinstance(producer, nn.Conv2D):
                new_layers[id(producer)] = ConvGeometry.of(producer).make_conv(*fold_into(producer, scale, shift))
            else:
                absorb_affine_into(producer, scale, shift)
        except ReparamError as reason:
            report.skipped.append((path, str(reason)))
        else:
            act = getattr(bn, "_act", None)
            new_layers[id(bn)] = Activation(act) if act else nn.Identity()
            report.touched.append((path, f"folded into {producer_paths[0]}"))
    for layer in new_layers.values():
        layer.eval()
    swap(model, new_layers)


def fold_into_readers(model: nn.Layer, report: RewriteReport, inputs: list[Any]) -> None:
    """Fold the affine of a norm that one linear layer alone reads into that layer.

    That is a BN before a 1x1 convolution without padding, and a LayerNorm over the last axis before an `nn.Linear`.
    What stays of the norm is marked with `affine_moved_on`: its output is no longer what it was.
    """
    places = places_of(model)
    inside = {id(c) for layer, _ in places.values() if isinstance(layer, InferenceForm) for _, c in walk(layer)}
    owners = owners_of(model)

    def free(layer: nn.Layer) -> bool:
        return id(layer) not in inside and not has_hooks(layer)

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
            refuse_shared(reader, owners)
            if isinstance(norm, nn.LayerNorm):
                new_layers[id(reader)] = linear_behind(reader, *affine_of_layer_norm(norm))
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
    swap(model, new_layers)


def _is_pointwise(conv: nn.Conv2D) -> bool:
    geometry = ConvGeometry.of(conv) if "weight" in conv._parameters else None
    return geometry is not None and geometry.kernel_size == (1, 1) and geometry.padding in ((0, 0, 0, 0), "SAME")


def _pointwise_behind(conv: nn.Conv2D, scale: Any, shift: Any) -> nn.Conv2D:
    weight, bias = to_float64(conv.weight), to_float64(conv.bias)
    return ConvGeometry.of(conv).make_conv(*kernels.fold_input_affine(weight, bias, scale, shift, conv._groups))
