"""Blocks of PaddleClas and PaddleDetection that fuse themselves: by this library where it knows their parts."""

from __future__ import annotations

import copy
from typing import Any, Callable, NamedTuple

import numpy as np
import paddle
from paddle import nn

from ..arithmetic.geometry import BATCH_NORMS, ConvGeometry, is_convolution
from ..arithmetic.tensors import assign, to_float64, type_name
from ..errors import ReparamError, UnsupportedConv
from ..layers.base import FUSING_METHODS, ReparamLayer
from ..layers.branches import MiddleTap, fuse_branches
from ..layers.dbb import DBB2D
from .places import RewriteReport, places_of
from .tracing import relative_difference, visit_outputs, walk

#: How far a block may be from itself fused, relative to its largest output.
_TOLERANCES = {"float64": 1e-8, "float32": 1e-4}
#: Height and width of the maps that a block is tried with; one of them for both, as some blocks take square maps alone.
_SIDE = 9


class _Branches(NamedTuple):
    """What a block adds, where it looks for the convolution that they become, what is not needed then, and what stands
    behind the sum, in this order; and a layer of this library that adds the same, where the parts are more than that.
    """

    parts: list[nn.Layer]
    fused_as: str
    unused: list[str]
    behind: list[str]
    same: ReparamLayer | None = None


def fuse_foreign(model: nn.Layer, report: RewriteReport) -> list[nn.Layer]:
    """Fuse PaddleClas' and PaddleDetection's own blocks in place; return those that fused themselves.

    A block whose branches are known here is fused as the layers of this library are, in float64, and tried with maps:
    its own way may leave out what stands behind its branches, or the dilation. Every other block is asked to fuse
    itself, by its method among `FUSING_METHODS`; those of PaddleDetection are tried as well. What is inside of it has
    been fused before. Raises `ReparamError` where it cannot, or is another function then.
    """
    blocks = []
    for layer, paths in list(places_of(model).values()):
        method = next((m for name in FUSING_METHODS if callable(m := getattr(layer, name, None))), None)
        if isinstance(layer, ReparamLayer) or method is None or getattr(layer, "is_repped", False):
            continue
        converts = method.__name__ == "convert_to_deploy"
        if converts and not holds_norms(layer):
            # It does not say that it has been converted, and cannot be once more.
            continue
        try:
            count = _fuse_known(layer)
        except ReparamError as error:
            raise error.at(paths[0] or type(layer).__name__) from error
        if count:
            report.touched.append((paths[0], f"{type(layer).__name__}: {count} branches -> Conv2D"))
            continue
        # It forgets the bias of a convolution, which what is inside may have been fused to.
        x = _map_for(layer) if converts else None
        unfused = None if x is None else _output(layer, x)
        try:
            method()
        except Exception as error:
            raise ReparamError(
                f"{paths[0] or type(layer).__name__}: {type(layer).__name__}.{method.__name__}() of "
                f"{type(layer).__module__} failed: {error}"
            ) from error
        if unfused is not None and not _is_near(unfused, _output(layer, x)):
            raise ReparamError(
                f"{paths[0] or type(layer).__name__}: {type(layer).__name__}.{method.__name__}() of "
                f"{type(layer).__module__} makes another function of it; leave its convolutions as they are, by where"
            )
        # Some blocks have the method and, as they were built, nothing to fuse.
        if getattr(layer, "is_repped", True):
            report.touched.append((paths[0], f"{type(layer).__name__}.{method.__name__}()"))
            blocks.append(layer)
    return blocks


def _read_repvgg(block: nn.Layer) -> _Branches | None:
    """Read a RepVGG block: nonlinearity(se(dense + 1x1 + identity)), without an se in 2.4."""
    names = ["rbr_dense", "rbr_1x1", "rbr_identity"]
    parts = [part for name in names if isinstance(part := getattr(block, name, None), nn.Layer)]
    if len(parts) < 2 or not isinstance(getattr(block, "nonlinearity", None), nn.Layer):
        return None
    return _Branches(parts, "rbr_reparam", names, ["se", "nonlinearity"])


def _read_depthwise(block: nn.Layer) -> _Branches | None:
    """Read the depthwise convolution of a block of PP-LCNetV2: kernels of several sizes, the largest one first."""
    parts = getattr(block, "dw_conv_list", None)
    if not parts or not getattr(block, "use_rep", False):
        return None
    return _Branches(list(parts), "dw_conv", ["dw_conv_list"], [])


def _read_dbb(block: nn.Layer) -> _Branches | None:
    """Read a diverse branch block: nonlinear(the branches of a DBB2D), whose entries have the same names."""
    names = ["dbb_origin", "dbb_1x1", "dbb_1x1_kxk", "dbb_avg"]
    parts = [part for name in names if isinstance(part := getattr(block, name, None), nn.Layer)]
    try:
        geometry = ConvGeometry.of(block.dbb_origin.conv)
        same = DBB2D(geometry, internal_channels=block.dbb_1x1_kxk.conv2._in_channels)
    except (AttributeError, UnsupportedConv):
        return None
    if same.state_dict().keys() != block.state_dict().keys():
        return None
    same.set_state_dict(block.state_dict())
    same.eval()
    return _Branches(parts, "dbb_reparam", names, ["nonlinear"], same)


def _read_weighed(block: nn.Layer) -> _Branches | None:
    """Read a RepVGG block of PaddleDetection: act(conv1 + alpha * conv2), where there is an alpha."""
    names = ["conv1", "conv2"]
    parts = [part for name in names if isinstance(part := getattr(block, name, None), nn.Layer)]
    if len(parts) < 2 or not hasattr(block, "convert_to_deploy") or not hasattr(parts[1], "bn"):
        return None
    # An alpha of zero is left out there, and not what it weighs.
    alpha = float(block.alpha) if getattr(block, "alpha", None) is not None else 0.0
    if alpha:
        bn = copy.deepcopy(parts[1].bn)
        for weight in (bn.weight, bn.bias):
            assign(weight, alpha * to_float64(weight))
        parts[1] = nn.Sequential(("conv", parts[1].conv), ("bn", bn))
    return _Branches(parts, "conv", names, [])


_KNOWN: list[Callable[[nn.Layer], Any]] = [_read_repvgg, _read_depthwise, _read_dbb, _read_weighed]


def _fuse_known(block: nn.Layer) -> int:
    """Fuse a block in place whose branches are known; return how many they were, 0 for every other block."""
    branches = next((found for read in _KNOWN if (found := read(block)) is not None), None)
    if branches is None or not (branches.same or _meet(branches.parts)):
        return 0
    conv = branches.same.fuse() if branches.same else fuse_branches(branches.parts)
    x = _map_for(conv)
    before, unfused = dict(block._sub_layers), _output(block, x)
    setattr(block, branches.fused_as, conv)
    behind = [name for name in branches.behind if isinstance(before.get(name), nn.Layer)]
    if len(behind) > 1:
        # The fused block of PaddleClas 2.6 calls the last one alone, so all of them go there.
        setattr(block, behind[-1], nn.Sequential(*[before[name] for name in behind]))
    for name in [*branches.unused, *behind[:-1]]:
        if isinstance(before.get(name), nn.Layer):
            setattr(block, name, nn.Identity())
    block.is_repped = True
    if unfused is not None and _is_near(unfused, _output(block, x)):
        return len(branches.parts)
    # It does more than its parts tell.
    block._sub_layers.clear()
    block._sub_layers.update(before)
    block.is_repped = False
    if branches.same and unfused is not None:
        # Depthwise, its average is divided by fewer pixels at the borders, and what it fuses itself to is not.
        raise ReparamError(
            f"this {type(block).__name__} computes no convolution, as where it averages without the padding; train it "
            "with DBB2D in the place of the convolution"
        )
    return 0


def _meet(parts: list[nn.Layer]) -> bool:
    """Tell whether branches read the same pixels: BNs behind convolutions of one stride, on one middle tap."""
    try:
        geometries = [ConvGeometry.of(part.conv) for part in parts if not isinstance(part, BATCH_NORMS)]
        taps = [MiddleTap(geometry, "a block") for geometry in geometries]
    except (AttributeError, UnsupportedConv):
        return False
    first = geometries[0]
    return all(
        (each.stride, each.groups, each.weight_shape[:2]) == (first.stride, first.groups, first.weight_shape[:2])
        and each.dilation == (first.dilation if each.kernel_size != (1, 1) else each.dilation)
        and not any(tap.more + tap.less)
        for each, tap in zip(geometries, taps)
    )


def holds_norms(block: nn.Layer) -> bool:
    """Tell whether some layer in a block is a BN."""
    return any(isinstance(layer, BATCH_NORMS) for _, layer in walk(block))


def _map_for(block: nn.Layer) -> paddle.Tensor | None:
    """Return a map to try a block with, None where it has no convolution that says of how many channels."""
    conv = next((layer for _, layer in walk(block) if is_convolution(layer)), None)
    if conv is None:
        return None
    shape = [2, conv._in_channels, _SIDE, _SIDE]
    return paddle.to_tensor(np.random.default_rng(0).standard_normal(shape).astype(type_name(conv.weight)))


def _is_near(unfused: paddle.Tensor, fused: paddle.Tensor | None) -> bool:
    tolerance = _TOLERANCES.get(type_name(unfused), 0.0)
    return fused is not None and relative_difference([unfused], [fused]) <= tolerance


def _output(block: nn.Layer, x: paddle.Tensor) -> paddle.Tensor | None:
    """Return what a block puts out for a map, None where it takes none of this size."""
    try:
        with paddle.no_grad():
            y = block(x)
    except Exception:
        return None
    return y if isinstance(y, paddle.Tensor) else None


def drop_unused(model: nn.Layer, blocks: list[nn.Layer], inputs: list[Any], report: RewriteReport) -> None:
    """Drop the training branches that PaddleClas' blocks keep, with their parameters, after they were fused.

    Dropped is what a forward pass does not call. An Identity stays in its place, for blocks that ask for it by name.
    """
    paths = {id(layer): places[0] for layer, places in places_of(model).values()}
    called: set[str] = set()
    visit_outputs(model, inputs, lambda path, _: called.add(path))
    for block in blocks:
        for name, child in list(block._sub_layers.items()):
            branch = [layer for _, layer in walk(child)] if child is not None else []
            count = sum(p.size for layer in branch for p in layer._parameters.values() if p is not None)
            if count and not any(paths[id(layer)] in called for layer in branch):
                block._sub_layers[name] = nn.Identity()
                report.touched.append((paths[id(child)], f"training branch dropped, {count} parameters"))
