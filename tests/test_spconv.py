"""SPConv2D: the paper's formula in numpy, the fused form with an affine inside, odd sizes, and what is refused."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from helpers import as_array, randomise_batch_norms, relative_error
from paddle import nn

from paddle_reparam.arithmetic.geometry import ConvGeometry
from paddle_reparam.deploy.export import export_inference
from paddle_reparam.deploy.runtimes.executor import LoadedProgram
from paddle_reparam.deploy.runtimes.paddle_inference import LoadedPredictor
from paddle_reparam.errors import UnsupportedConv
from paddle_reparam.layers.spconv import SPConv2D, SPConv2DFused

OPTIONS = [
    {},
    {"ratio": 0.25},
    {"ratio": 0.75, "bias": True},
    {"dilation": 2},
    {"dilation": 3, "ratio": 0.25, "bias": True},
    {"stride": 2},
    {"stride": 2, "ratio": 0.25, "bias": True},
]
EVEN_AND_ODD = [(6, 8), (7, 8), (6, 5), (7, 9)]


def make(in_channels: int = 8, out_channels: int = 6, dtype: str = "float64", **options) -> SPConv2D:
    layer = SPConv2D(in_channels, out_channels, **options)
    for conv in (layer.gwc, layer.pwc, layer.conv1x1):
        if conv.bias is not None:
            conv.bias.set_value(paddle.randn([out_channels]))
    randomise_batch_norms(layer)
    layer.to(dtype=dtype)
    layer.eval()
    return layer


# --- The paper's formula ------------------------------------------------------------------------------------------


def convolve(x: np.ndarray, kernel: np.ndarray, groups: int = 1, stride: int = 1, dilation: int = 1) -> np.ndarray:
    """3x3 with a padding of its dilation, or 1x1; `x` [N, C, H, W]."""
    pad = dilation if kernel.shape[2] == 3 else 0
    height, width = x.shape[2:]
    x = np.pad(x, [(0, 0), (0, 0), (pad, pad), (pad, pad)])
    y = 0.0
    for i in range(kernel.shape[2]):
        for j in range(kernel.shape[3]):
            taps = x[:, :, i * dilation :, j * dilation :][:, :, :height:stride, :width:stride]
            parts = zip(np.split(taps, groups, axis=1), np.split(kernel[:, :, i, j], groups, axis=0))
            y = y + np.concatenate([np.einsum("nchw,oc->nohw", t, k) for t, k in parts], axis=1)
    return y


def halve(x: np.ndarray) -> np.ndarray:
    """2x2 averages; zeros at the end of an odd side count."""
    x = np.pad(x, [(0, 0), (0, 0), (0, x.shape[2] % 2), (0, x.shape[3] % 2)])
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4


def formula(layer: SPConv2D, x: np.ndarray, stride: int = 1, ratio: float = 0.5, dilation: int = 1, bias=False):
    state = {name: as_array(value) for name, value in layer.state_dict().items()}

    def column(name: str) -> np.ndarray:
        return state[name][:, None, None]

    def normalise(bn: str, y: np.ndarray) -> np.ndarray:
        y = (y - column(f"{bn}._mean")) / np.sqrt(column(f"{bn}._variance") + 1e-5)
        return y * column(f"{bn}.weight") + column(f"{bn}.bias")

    representative = int(x.shape[1] * ratio)
    x3, x1 = x[:, :representative], x[:, representative:]
    p3, p1 = (halve(x3), halve(x1)) if stride == 2 else (x3, x1)
    u3 = convolve(x3, state["gwc.weight"], 2, stride, dilation) + convolve(p3, state["pwc.weight"])
    if bias:
        u3 = u3 + column("gwc.bias") + column("pwc.bias")
    u3 = normalise("bn1", u3)
    u1 = normalise("bn2", convolve(p1, state["conv1x1.weight"]) + column("conv1x1.bias"))
    e3, e1 = (np.exp(u.mean(axis=(2, 3), keepdims=True)) for u in (u3, u1))
    return (e3 * u3 + e1 * u1) / (e3 + e1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_formula(options):
    layer = make(**options)
    fused = layer.reparameterize()
    assert isinstance(fused, SPConv2DFused)
    for size in EVEN_AND_ODD:
        x = np.random.randn(2, 8, *size)
        expected = formula(layer, x, **options)
        assert relative_error(layer(paddle.to_tensor(x)), expected) < 1e-10, size
        assert relative_error(fused(paddle.to_tensor(x)), expected) < 1e-10, size


def test_a_map_of_one_pixel():
    layer = make(stride=2)
    x = np.random.randn(2, 8, 1, 1)
    assert relative_error(layer.reparameterize()(paddle.to_tensor(x)), formula(layer, x, stride=2)) < 1e-10


def test_narrow_groups_become_one():
    """Groups that do not fill vectors have no fast kernel; wide ones stay."""
    assert make(64, 64).reparameterize().spatial._groups == 2
    assert make(64, 64, ratio=0.25).reparameterize().spatial._groups == 1


# --- A BN that follows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"stride": 2}], ids=str)
def test_an_affine_goes_inside(options):
    fused = make(**options).reparameterize()
    x = paddle.randn([2, 8, 7, 6], dtype="float64")
    expected = as_array(fused(x))
    # Either sign, none, and more than one affine; float32 could not divide by the last one.
    for scale in (
        [1.5, -0.7, 0.3, -2.0, 1.0, 1e-3],
        [0.4, 2.0, 0.0, -1.0, 1.0, -3.0],
        [1.0, 1.0, 1.0, 1.0, 1.0, 1e-45],
    ):
        scale, shift = np.array(scale), np.random.randn(6)
        expected = expected * scale[:, None, None] + shift[:, None, None]
        fused.absorb_affine(scale, shift)
        assert relative_error(fused(x), expected) < 1e-10


def test_a_vanishing_scale_in_float32():
    fused = make(dtype="float32").reparameterize()
    fused.absorb_affine(np.array([1.0, 0.0, 1e-45, 1e-20, -1.0, 1.0]), np.arange(6.0))
    y = as_array(fused(paddle.randn([2, 8, 5, 5])))
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y[:, 1:4], np.broadcast_to(np.array([1.0, 2.0, 3.0])[:, None, None], (2, 3, 5, 5)), 1e-6)


# --- Exported -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
def test_every_runtime_agrees_on_every_size(tmp_path, stride):
    layer = make(dtype="float32", stride=stride)
    fused = layer.reparameterize()
    fused.absorb_affine(np.linspace(-1.0, 2.0, 6), np.linspace(1.0, -1.0, 6))
    for name, form in (("train", layer), ("fused", fused)):
        export_inference(form, tmp_path / name, [[None, 8, None, None]])
        runtimes = [LoadedProgram(tmp_path / name)]
        runtimes += [LoadedPredictor(tmp_path / name, onednn=onednn) for onednn in (True, False)]
        for size in EVEN_AND_ODD:
            for batch in (1, 3):
                x = paddle.randn([batch, 8, *size])
                for runtime in runtimes:
                    y = runtime(x)
                    assert relative_error(y[0] if isinstance(y, list) else y, form(x)) < 1e-5, (name, size, runtime)


# --- Built from a convolution -------------------------------------------------------------------------------------


def test_weights_start_from_fan_out():
    layer = SPConv2D(64, 128)
    for conv, fan_out in ((layer.gwc, 128 * 9), (layer.pwc, 128), (layer.conv1x1, 128)):
        assert abs(float(conv.weight.std()) * np.sqrt(fan_out / 2) - 1) < 0.1
        assert abs(float(conv.weight.mean())) * np.sqrt(fan_out) < 0.2


def test_built_from_what_the_convolution_says():
    geometry = ConvGeometry.of(nn.Conv2D(8, 6, 3, padding=2, dilation=2))
    layer = SPConv2D.build(geometry, ratio=0.25, bias=True)
    assert layer.gwc.weight.shape == [6, 1, 3, 3]
    assert layer.conv1x1.weight.shape == [6, 6, 1, 1]
    assert layer.pwc.bias is not None
    assert ConvGeometry.of(layer.gwc).dilation == (2, 2)
    assert SPConv2D.build(ConvGeometry.of(nn.Conv2D(8, 6, 3, stride=2, padding=1))).gwc._stride == [2, 2]


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        ((8, 6, 5, 1, 2), "3x3 kernels only, this one is 8->6, 5x5"),
        ((8, 6, 3, 1, 1, 1, 2), "without groups only, this one is 8->6, 3x3, groups=2"),
        ((8, 6, 3, (2, 1), 1), r"one stride and one dilation.*stride=\(2, 1\)"),
        ((8, 6, 3, 1, (1, 2), (1, 2)), r"one stride and one dilation.*dilation=\(1, 2\)"),
        ((8, 6, 3, 1, 0), r"pads by its dilation \(1\) with zeros, this one has padding \(0, 0, 0, 0\)"),
        ((8, 6, 3, 1, 1, 2), r"pads by its dilation \(2\)"),
        ((8, 6, 3, 2, "SAME"), "padding SAME"),
        ((8, 6, 3, 3, 1), "stride=3 with dilation=1 is neither"),
        ((8, 6, 3, 2, 2, 2), "stride=2 with dilation=2 is neither"),
        ((6, 6, 3, 1, 1), "in_channels=6 with ratio=0.5 gives 3 representative channels for 6 output.*must be even"),
        ((8, 7, 3, 1, 1), "gives 4 representative channels for 7 output channels.*must be even"),
        ((1, 6, 3, 1, 1), "in_channels=1 with ratio=0.5 gives 0 representative channels of 1"),
    ],
)
def test_convolutions_that_are_refused(conv, reason):
    geometry = ConvGeometry.of(nn.Conv2D(*conv))
    with pytest.raises(UnsupportedConv, match=reason):
        SPConv2D.build(geometry)


def test_other_refusals():
    with pytest.raises(UnsupportedConv, match="in mode 'reflect'"):
        SPConv2D.build(ConvGeometry.of(nn.Conv2D(8, 6, 3, padding=1, padding_mode="reflect")))
    with pytest.raises(UnsupportedConv, match="takes NCHW, this one takes NHWC"):
        SPConv2D.build(ConvGeometry.of(nn.Conv2D(8, 6, 3, padding=1, data_format="NHWC")))
    with pytest.raises(UnsupportedConv, match="ratio=1.0 gives 8 representative channels of 8"):
        SPConv2D(8, 6, ratio=1.0)
    with pytest.raises(UnsupportedConv, match="ratio=-0.5 gives -4 representative channels"):
        SPConv2D(8, 6, ratio=-0.5)
