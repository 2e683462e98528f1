"""Walk a model: put layers in (`replace`), fuse them out (`reparameterize`); both report what, where, and why not."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from typing import Any, Callable, Union

from paddle import nn

from ..arithmetic.geometry import (
    BATCH_NORMS,
    ConvGeometry,
    is_convolution,
)
from ..errors import NothingToFuse, ReparamError, UnsupportedConv, UsageError
from ..layers.base import InferenceForm, ReparamLayer
from ..registry import get_layer
from . import masks
from .computed_weights import store_computed_weights
from .folding import fold_batch_norms, fold_into_readers
from .foreign import drop_unused, fuse_foreign
from .places import RewriteReport, copy_model, has_hooks, owners_of, places_of, refuse_compiled, refuse_shared, swap
from .tracing import (
    IMAGENET_INPUT,
    InputSpec,
    require_eval,
    sample_inputs,
    undisturbed_draws,
    visit_inputs,
    walk,
)

Where = Union[str, Sequence[str], Callable[[str, nn.Conv2D], bool], None]


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
    refuse_compiled(model)
    layer_class = get_layer(layer_name).layer
    layer_class.check_options(**options)
    if isinstance(model, nn.Conv2D):
        raise ReparamError(f"the model is itself a convolution; use {layer_name}.from_conv(conv) for a single one")
    convolutions = [path for path, layer in walk(model) if is_convolution(layer)]
    selected, owners = _selector(where, convolutions), owners_of(model)
    report, new_layers, inside = RewriteReport(), {}, {}
    for layer, paths in places_of(model).values():
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
            geometry = ConvGeometry.of(layer)
            if has_hooks(layer):
                raise UnsupportedConv("it has forward hooks, which would be lost; remove them first")
            refuse_shared(layer, owners)
            new_layers[id(layer)] = layer_class.from_conv(layer, **options)
        except UnsupportedConv as reason:
            report.skipped.append((path, str(reason)))
        except ReparamError as error:
            raise error.at(path) from error
        else:
            also = f", also at {', '.join(paths[1:])}" if paths[1:] else ""
            report.touched.append((path, f"{layer_name}({geometry}){also}"))
    if not report.touched:
        reasons = sorted({reason for _, reason in report.skipped})
        found = (
            f"its {len(report.skipped)} convolutions were skipped: {'; '.join(reasons)}" if reasons else "it has none"
        )
        raise ReparamError(f"{layer_name} was put in the place of no convolution of {type(model).__name__}: {found}")
    if not dry_run:
        swap(model, new_layers)
    return report


# ---------------------------------------------------------------------------------------------------------------------
# Fusing layers out


def _fuse_layers(model: nn.Layer, report: RewriteReport) -> nn.Layer:
    """Fuse all layers that keep the contract; return the model, which is another one where the root itself is fused."""
    inside: set[int] = set()
    places = places_of(model)
    for key in list(places):
        # Each train form goes as soon as its fused form is there: the two of a whole network need twice its memory.
        layer, paths = places.pop(key)
        if not isinstance(layer, ReparamLayer) or key in inside:
            continue
        inside.update(id(child) for _, child in walk(layer))
        try:
            if has_hooks(layer):
                raise ReparamError("it has forward hooks, which fusing would lose; remove them first")
            fused = layer.reparameterize()
        except ReparamError as error:
            raise error.at(paths[0] or type(layer).__name__) from error
        report.touched.append((paths[0], f"{type(layer).__name__} -> {type(fused).__name__}"))
        if layer is model:
            return fused
        swap(model, {key: fused})
    return model


def forms_of(fused: nn.Layer) -> list[str]:
    """Return the names of the forms, beside the layers' own choice, that a fused network can take for one size."""
    return sorted({form for _, layer in walk(fused) if isinstance(layer, InferenceForm) for form in layer.forms})


def _fit_to_size(model: nn.Layer, report: RewriteReport, inputs: list[Any], form: str | None) -> None:
    """Let every inference form become what is best for the one size of map that it gets, or the form that it has."""
    if form is not None and form not in forms_of(model):
        known = ", ".join(forms_of(model)) or "none"
        raise UsageError(f"no layer of {type(model).__name__} has a form {form!r}; there are: {known}")
    sizes: dict[str, tuple[int, int]] = {}
    visit_inputs(model, inputs, lambda path, x: sizes.update({path: tuple(x.shape[2:])}))
    new_layers: dict[int, nn.Layer] = {}
    for layer, paths in places_of(model).values():
        seen = {sizes[path] for path in paths if path in sizes}
        fitted = None
        if isinstance(layer, InferenceForm) and len(seen) == 1:
            fitted = layer.for_size(*seen.pop(), form if form in layer.forms else None)
        if fitted is not None:
            fitted.eval()
            new_layers[id(layer)] = fitted
            what = f"{type(fitted).__name__}({fitted.extra_repr()})"
            report.touched.append((paths[0], f"for maps of {sizes[paths[0]][0]}x{sizes[paths[0]][1]}: {what}"))
    swap(model, new_layers)


def _count_left_over(model: nn.Layer) -> dict[str, int]:
    layers = [layer for layer, _ in places_of(model).values()]
    counts = {
        "BNs": sum(isinstance(layer, BATCH_NORMS) for layer in layers),
        "inference forms": sum(isinstance(layer, InferenceForm) for layer in layers),
        "layers in train form": sum(isinstance(layer, ReparamLayer) for layer in layers),
    }
    return {kind: count for kind, count in counts.items() if count}


@undisturbed_draws()
def reparameterize(
    model: nn.Layer,
    fold_bn: bool = False,
    input_spec: InputSpec | None = None,
    fixed_size: bool = False,
    form: str | None = None,
) -> tuple[nn.Layer, RewriteReport]:
    """Return a new model in eval mode with every fusable layer fused, and the report; the model itself stays as it is.

    Fuses the layers of this library and PaddleClas' own (`re_parameterize`, `rep`), and makes what Paddle's
    `weight_norm` and `spectral_norm` compute a parameter. With `fold_bn`, also every BN that
    in a forward pass on `input_spec` (shapes with None for the batch; [None, 3, 224, 224] unless told) is the only
    reader of the output of a convolution of any kind or of an `nn.Linear`, and every BN or LayerNorm that one 1x1
    convolution or `nn.Linear` alone reads. With `fixed_size`, layers also take the form that is best for the height and
    width of `input_spec`; the new model is then right for images of that size only. Layers that have a `form` of that
    name (`forms_of`) then take it. What is fused has Paddle's defaults
    for training, nothing frozen.
    Raises `ReparamError` for a model in training mode and where nothing was fused.
    """
    if not isinstance(model, nn.Layer):
        raise UsageError(f"only a network, a paddle.nn.Layer, can be fused, not {model!r}")
    require_eval(model, "the model", "fusing")
    refuse_compiled(model)
    report = RewriteReport()
    duplicate = copy_model(model)
    # Masks are for training: the weights behind them are zero.
    masks.remove_masks(duplicate)
    store_computed_weights(duplicate, report)
    fused = _fuse_layers(duplicate, report)
    blocks = fuse_foreign(fused, report)
    if fold_bn or fixed_size:
        inputs = sample_inputs(IMAGENET_INPUT if input_spec is None else input_spec, batch=1, seed=0, like=fused)
    if fold_bn:
        if blocks:
            drop_unused(fused, blocks, inputs, report)
        fold_batch_norms(fused, report, inputs)
        fold_into_readers(fused, report, inputs)
    if fixed_size:
        _fit_to_size(fused, report, inputs, form)
    if not report.touched:
        raise NothingToFuse(
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
