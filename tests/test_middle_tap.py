"""RepVGG2D and MobileOne2D beside loops over pixels and taps; what they refuse; what they start from."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from contract import Case, check_traces, randomise
from helpers import as_array, relative_error
from paddle import nn

from paddle_reparam.arithmetic.geometry import BATCH_NORMS
from paddle_reparam.errors import ReparamError, UnknownName, UnsupportedConv
from paddle_reparam.layers.mobileone import MobileOne2D
from paddle_reparam.layers.repvgg import RepVGG2D

#: numpy's names of Paddle's padding modes.
MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
CASES = [
    Case(4, 6, 3, {"padding": 1}),
    Case(4, 4, 3, {"padding": 1}),
    Case(4, 4, 3, {"padding": 2, "dilation": 2}),
    Case(4, 4, 5, {"padding": [2, 4], "dilation": (1, 2), "groups": 2}),
    Case(4, 8, (3, 5), {"padding": [1, 2], "stride": (2, 3), "groups": 4}),
    Case(4, 4, 3, {"padding": 3, "groups": 4}),
    Case(4, 4, 5, {"padding": [0, 1, 3, 2]}),
    Case(4, 4, 3, {"padding": 0, "dilation": 2}),
    Case(4, 4, 3, {"padding": "SAME"}),
    Case(4, 4, 3, {"padding": 2, "padding_mode": "reflect"}),
    Case(4, 4, 5, {"padding": 1, "padding_mode": "circular", "stride": 2}),
    Case(4, 4, (1, 3), {"padding": [0, 1], "data_format": "NHWC"}),
]


def affine(bn, y):
    """Normalise `[N, C, H, W]` by the running statistics."""
    weight, bias, mean, variance = (as_array(v)[:, None, None] for v in (bn.weight, bn.bias, bn._mean, bn._variance))
    return (y - mean) / np.sqrt(variance + float(np.float32(bn._epsilon))) * weight + bias


def by_loops(layer, case: Case, x: np.ndarray) -> np.ndarray:
    """Return what the layer is to put out for `[N, C, H, W]`, pixel by pixel and tap by tap."""
    conv = layer.whole()[0].conv
    height, width = conv.weight.shape[2:]
    padding, stride = case.options.get("padding", 0), np.broadcast_to(case.options.get("stride", 1), 2)
    dilation, groups = np.broadcast_to(case.options.get("dilation", 1), 2), case.options.get("groups", 1)
    if padding == "SAME":
        top, left = (height - 1) // 2, (width - 1) // 2
        sides = [(top, height - 1 - top), (left, width - 1 - left)]
    else:
        flat = np.ravel(padding).tolist()
        sides = [flat[:2], flat[2:]] if len(flat) == 4 else [[each] * 2 for each in np.broadcast_to(flat, 2)]
    padded = np.pad(x, [(0, 0), (0, 0), *sides], mode=MODES[case.options.get("padding_mode", "zeros")])
    rows = (padded.shape[2] - dilation[0] * (height - 1) - 1) // stride[0] + 1
    columns = (padded.shape[3] - dilation[1] * (width - 1) - 1) // stride[1] + 1

    def tap(row: int, column: int) -> np.ndarray:
        top, left = row * dilation[0], column * dilation[1]
        return padded[:, :, top : top + stride[0] * rows : stride[0], left : left + stride[1] * columns : stride[1]][
            :, :, :rows, :columns
        ]

    def convolved(kernel: np.ndarray, row: int, column: int) -> np.ndarray:
        inputs, out = kernel.shape[1], np.zeros([len(x), len(kernel), rows, columns])
        for channel in range(len(kernel)):
            first = channel // (len(kernel) // groups) * inputs
            for i in range(inputs):
                out[:, channel] += kernel[channel, i] * tap(row, column)[:, first + i]
        return out

    total = 0.0
    for branch in layer.whole():
        kernel = as_array(branch.conv.weight)
        taps = [convolved(kernel[:, :, i, j], i, j) for i in range(height) for j in range(width)]
        total = total + affine(branch.bn, sum(taps))
    middle = (height // 2, width // 2)
    for branch in layer.on_the_middle():
        if isinstance(branch, BATCH_NORMS):
            total = total + affine(branch, tap(*middle))
        else:
            total = total + affine(branch.bn, convolved(as_array(branch.conv.weight)[:, :, 0, 0], *middle))
    return total


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("cls", "options"), [(RepVGG2D, {}), (MobileOne2D, {"num_conv_branches": 2})])
def test_what_it_computes(cls, options, case):
    layer = randomise(cls.from_conv(case.conv(), **options))
    layer.eval()
    x = np.random.default_rng(1).standard_normal([2, case.inputs, 9, 10])
    expected = by_loops(layer, case, x)
    axes = (0, 2, 3, 1) if case.options.get("data_format") == "NHWC" else (0, 1, 2, 3)
    given = paddle.to_tensor(x.transpose(axes))
    for form in (layer, layer.reparameterize()):
        assert relative_error(form(given), expected.transpose(axes)) < 1e-12


@pytest.mark.parametrize("cls", [RepVGG2D, MobileOne2D])
@pytest.mark.parametrize("case", [CASES[4], CASES[5], CASES[6]], ids=str)
def test_it_is_traced_where_the_middle_tap_meets_other_pixels(cls, case):
    check_traces(cls, case)


def test_the_identity_is_there_where_the_size_is_kept():
    def has_one(cls, *arguments, **options):
        return any(isinstance(b, BATCH_NORMS) for b in cls.from_conv(nn.Conv2D(*arguments, **options)).on_the_middle())

    for cls in (RepVGG2D, MobileOne2D):
        assert has_one(cls, 8, 8, 3, padding=1, groups=4)
        assert not has_one(cls, 8, 8, 3, padding=1, stride=2)
        assert not has_one(cls, 8, 8, 3, padding=1, stride=(1, 2))
        assert not has_one(cls, 8, 6, 3, padding=1)
    assert has_one(MobileOne2D, 8, 8, 1)
    assert len(MobileOne2D.from_conv(nn.Conv2D(8, 6, 1)).on_the_middle()) == 0
    assert len(MobileOne2D.from_conv(nn.Conv2D(8, 6, 1)).whole()) == 4


@pytest.mark.parametrize("cls", [RepVGG2D, MobileOne2D])
def test_what_it_cannot_stand_in_for(cls):
    for options, why in [
        ({"kernel_size": 4, "padding": 1}, "an even kernel has none: 4->6, 4x4"),
        ({"kernel_size": (3, 2)}, "an even kernel has none"),
        (
            {"kernel_size": 3, "padding": "SAME", "stride": 2},
            "padding='SAME' with a stride.*give the padding in pixels",
        ),
    ]:
        with pytest.raises(UnsupportedConv, match=f"{cls.__name__} .*{why}"):
            cls.from_conv(nn.Conv2D(4, 6, **options))


def test_wrong_options():
    conv = nn.Conv2D(4, 4, 3, padding=1)
    with pytest.raises(UnsupportedConv, match="RepVGG2D puts a 1x1 kernel beside a larger one"):
        RepVGG2D.from_conv(nn.Conv2D(4, 4, 1))
    with pytest.raises(ReparamError, match="RepVGG2D has no init='zeros'; choose one of random, zero"):
        RepVGG2D.from_conv(conv, init="zeros")
    with pytest.raises(
        ReparamError, match="MobileOne2D has no num_conv_branches=0; choose a whole number of 1 or more"
    ):
        MobileOne2D.from_conv(conv, num_conv_branches=0)
    with pytest.raises(UnknownName, match="option of MobileOne2D named 'branches'"):
        MobileOne2D.from_conv(conv, branches=2)


def test_the_start_is_the_published_one():
    """Kernels within 1 / sqrt(fan-in), BNs of weight 1; with "zero", all branches but the first are silent."""
    layer = MobileOne2D.from_conv(nn.Conv2D(16, 16, 3, padding=1, groups=2), num_conv_branches=2)
    for branch in [layer.conv_kxk[1], layer.conv_scale]:
        bound = 1 / np.sqrt(np.prod(branch.conv.weight.shape[1:]))
        assert 0.95 * bound < np.abs(as_array(branch.conv.weight)).max() <= bound * (1 + 1e-6)
        assert (as_array(branch.bn.weight) == 1).all()
    silent = MobileOne2D.from_conv(nn.Conv2D(16, 16, 3, padding=1), num_conv_branches=2, init="zero")
    for bn in (silent.conv_kxk[1].bn, silent.conv_scale.bn, silent.identity):
        assert (as_array(bn.weight) == 0).all()
