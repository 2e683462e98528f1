"""A geometry read from a convolution computes what the convolution computes, bit for bit."""

import numpy as np
import paddle
import pytest
from helpers import as_array, randomise_batch_norms, relative_error
from paddle import nn

from paddle_reparam.arithmetic.geometry import (
    BATCH_NORMS,
    ConvGeometry,
    absorb_affine_into,
    as_pair,
    linear_behind,
    read_bn_affine,
)
from paddle_reparam.arithmetic.tensors import assign, to_float64
from paddle_reparam.errors import ReparamError, UnsupportedConv

# in, out, kernel, what else Conv2D is given
CONVS = [
    # Every form of padding that Conv2D takes
    (3, 4, 3, {}),
    (3, 4, 3, {"padding": 1}),
    (3, 4, 3, {"padding": (1, 2)}),
    (3, 4, (3, 5), {"padding": [1, 2]}),
    (3, 4, 3, {"padding": [0, 1, 2, 3]}),
    (3, 4, 3, {"padding": [1, 1, 2, 2]}),
    (3, 4, 3, {"padding": [[0, 0], [0, 0], [0, 1], [2, 3]]}),
    (3, 4, 3, {"padding": [(0, 0), (0, 0), (1, 1), (2, 2)]}),
    (3, 4, 3, {"padding": "VALID"}),
    (3, 4, 3, {"padding": "valid", "dilation": 2}),
    # "SAME": with a stride the padding depends on the input's size, and Paddle leaves the dilation out
    (3, 4, 3, {"padding": "SAME"}),
    (3, 4, 4, {"padding": "same"}),
    (3, 4, (4, 3), {"padding": "SAME", "stride": 2}),
    (3, 4, 3, {"padding": "SAME", "stride": (1, 2)}),
    (3, 4, 3, {"padding": "same", "dilation": 2}),
    (3, 4, 3, {"padding": "SAME", "stride": 2, "dilation": 2}),
    (4, 4, 5, {"padding": "SAME", "groups": 4}),
    # Other paddings than zeros
    (3, 4, 3, {"padding": 1, "padding_mode": "reflect"}),
    (3, 4, 5, {"padding": 2, "padding_mode": "replicate", "stride": 2}),
    (3, 4, (3, 5), {"padding": 3, "padding_mode": "circular", "dilation": 2}),
    (4, 4, 3, {"padding": 1, "padding_mode": "reflect", "groups": 2, "bias_attr": False}),
    (3, 4, 3, {"padding": 0, "padding_mode": "reflect"}),
    # Stride, dilation, groups
    (3, 4, 3, {"padding": 1, "stride": (2, 1)}),
    (3, 4, 3, {"padding": 2, "dilation": (2, 1)}),
    (4, 8, 3, {"padding": 1, "groups": 2}),
    (4, 4, 3, {"padding": 1, "groups": 4}),
    (4, 12, 3, {"padding": [1, 0], "groups": 4, "stride": 2}),
    (4, 6, 1, {"bias_attr": False}),
    (1, 3, 7, {"padding": 3}),
    # Channels last
    (3, 4, 3, {"padding": 1, "data_format": "NHWC"}),
    (3, 4, 3, {"padding": [0, 1, 2, 3], "data_format": "NHWC"}),
    (3, 4, 3, {"padding": [[0, 0], [0, 1], [2, 3], [0, 0]], "data_format": "NHWC"}),
    (3, 4, 3, {"padding": "SAME", "stride": 2, "data_format": "NHWC"}),
    (3, 4, 3, {"padding": 2, "padding_mode": "reflect", "data_format": "NHWC"}),
    (4, 4, 3, {"padding": 1, "groups": 4, "data_format": "NHWC"}),
]
IDS = [f"{i}->{o},{k},{','.join(f'{n}={v}' for n, v in options.items())}" for i, o, k, options in CONVS]


def make(case, dtype="float64"):
    inputs, outputs, size, options = case
    conv = nn.Conv2D(inputs, outputs, size, **options)
    if conv.bias is not None:
        conv.bias.set_value(paddle.randn([outputs]))
    conv.to(dtype=dtype)
    return conv


@pytest.mark.parametrize("case", CONVS, ids=IDS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_convolve_and_make_conv_equal_the_conv(case, dtype):
    conv = make(case, dtype)
    geometry = ConvGeometry.of(conv)
    assert geometry.dtype == dtype
    assert geometry.bias is (conv.bias is not None)
    assert geometry.weight_shape == tuple(conv.weight.shape)
    copy = geometry.make_conv(to_float64(conv.weight), to_float64(conv.bias))
    assert type(copy) is nn.Conv2D
    assert not copy.training
    # A conv that was made from a geometry reads back as the same one: nothing is lost on the way.
    assert ConvGeometry.of(copy) == geometry
    for height, width in [(9, 10), (8, 7)]:
        shape = [2, conv._in_channels, height, width]
        x = paddle.randn(shape if geometry.data_format == "NCHW" else [2, height, width, conv._in_channels], dtype)
        expected = conv(x).numpy()
        np.testing.assert_array_equal(geometry.convolve(x, conv.weight, conv.bias).numpy(), expected)
        np.testing.assert_array_equal(copy(x).numpy(), expected)


@pytest.mark.parametrize("case", CONVS, ids=IDS)
def test_the_padding_is_read_in_pixels(case):
    """`padding` is what layers build on: a conv of the padded input without padding equals the conv."""
    conv = make(case)
    geometry = ConvGeometry.of(conv)
    if geometry.padding == "SAME":
        assert geometry.stride != (1, 1)
        assert geometry.dilation == (1, 1)
        return
    top, bottom, left, right = geometry.padding
    x = np.random.standard_normal((2, conv._in_channels, 9, 10))
    mode = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}[geometry.padding_mode]
    padded = np.pad(x, [(0, 0), (0, 0), (top, bottom), (left, right)], mode=mode)
    if geometry.data_format == "NHWC":
        x, padded = x.transpose(0, 2, 3, 1), padded.transpose(0, 2, 3, 1)
    actual = paddle.nn.functional.conv2d(
        paddle.to_tensor(padded), conv.weight, conv.bias, geometry.stride, 0, geometry.dilation, geometry.groups,
        geometry.data_format,
    )  # fmt: skip
    np.testing.assert_allclose(as_array(actual), as_array(conv(paddle.to_tensor(x))), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_make_conv_keeps_the_dtype_and_every_bit_of_the_weights(dtype):
    conv = make((3, 4, 3, {}), dtype)
    geometry = ConvGeometry.of(conv)
    copy = geometry.make_conv(to_float64(conv.weight), to_float64(conv.bias))
    assert copy.weight.dtype == copy.bias.dtype == conv.weight.dtype
    np.testing.assert_array_equal(as_array(copy.weight), as_array(conv.weight))
    np.testing.assert_array_equal(as_array(copy.bias), as_array(conv.bias))


def test_make_conv_under_another_default_dtype():
    conv = make((3, 4, 3, {}), "float32")
    geometry = ConvGeometry.of(conv)
    paddle.set_default_dtype("float64")
    assert geometry.make_conv(to_float64(conv.weight), None).weight.dtype == paddle.float32


def test_make_conv_gives_a_bias_to_a_conv_without_and_none_where_none_is_asked_for():
    conv = make((3, 4, 3, {"bias_attr": False}))
    bias = np.arange(4.0)
    np.testing.assert_array_equal(ConvGeometry.of(conv).make_conv(to_float64(conv.weight), bias).bias.numpy(), bias)
    assert ConvGeometry.of(make((3, 4, 3, {}))).make_conv(to_float64(conv.weight), None).bias is None


def test_assign_keeps_the_dtype_and_refuses_another_shape():
    parameter = paddle.zeros([2], dtype="float32")
    assign(parameter, np.array([1.0, 1.0 + 2.0**-30]))
    assert parameter.dtype == paddle.float32
    np.testing.assert_array_equal(parameter.numpy(), [1.0, 1.0])
    with pytest.raises((AssertionError, ValueError), match="shape"):
        assign(parameter, np.zeros(3))


def test_an_even_same_convolution_pads_more_at_the_bottom_and_right():
    assert ConvGeometry.of(make((1, 1, (4, 3), {"padding": "SAME"}))).padding == (1, 2, 1, 1)


@pytest.mark.parametrize("padding", [(0, 1, 0, 1), "SAME"])
def test_a_geometry_that_no_convolution_has_is_refused(padding):
    with pytest.raises(UnsupportedConv, match=r"in mode 'reflect' is no convolution of Paddle's"):
        ConvGeometry(3, 4, (3, 3), padding=padding, padding_mode="reflect")


def test_depthwise_with_any_multiplier():
    assert ConvGeometry.of(make((4, 8, 3, {"groups": 4}))).is_depthwise
    assert not ConvGeometry.of(make((4, 8, 3, {"groups": 2}))).is_depthwise


def test_as_pair():
    assert as_pair(3) == as_pair([3, 3]) == (3, 3)
    assert as_pair((2, 1)) == (2, 1)


def test_the_text_names_what_is_not_the_default():
    conv = make((4, 8, (3, 5), {"groups": 2, "stride": 2, "dilation": (1, 2)}))
    assert str(ConvGeometry.of(conv)) == "4->8, 3x5, groups=2, stride=(2, 2), dilation=(1, 2)"


class Subclass(nn.Conv2D):
    pass


@pytest.mark.parametrize(
    ("conv", "words"),
    [
        (lambda: Subclass(3, 4, 3), r"Subclass is not paddle\.nn\.Conv2D itself"),
        (lambda: nn.Conv2DTranspose(3, 4, 3), r"Conv2DTranspose is not paddle\.nn\.Conv2D itself; layers stand in for"),
        (lambda: nn.Linear(3, 4), r"Linear is not paddle\.nn\.Conv2D itself"),
        (lambda: nn.utils.weight_norm(nn.Conv2D(3, 4, 3)), r"by a hook \(WeightNorm\).*reparameterize\(model\)"),
        (lambda: nn.utils.spectral_norm(nn.Conv2D(3, 4, 3)), r"by a hook \(SpectralNorm\).*reparameterize\(model\)"),
    ],
    ids=["subclass", "transposed", "linear", "weight_norm", "spectral_norm"],
)
def test_what_is_no_plain_convolution_is_refused(conv, words):
    with pytest.raises(UnsupportedConv, match=words):
        ConvGeometry.of(conv())


def test_a_conv_whose_weight_norm_was_removed_is_plain_again():
    conv = nn.Conv2D(3, 4, 3)
    weight = conv.weight.numpy()
    nn.utils.remove_weight_norm(nn.utils.weight_norm(conv))
    assert ConvGeometry.of(conv).weight_shape == weight.shape


# --- Batch norms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_class", BATCH_NORMS)
@pytest.mark.parametrize("options", [{}, {"weight_attr": False, "bias_attr": False}, {"use_global_stats": True}])
def test_the_affine_of_a_batch_norm_is_what_it_computes(norm_class, options):
    if norm_class is nn.BatchNorm:
        options = {"param_attr" if name == "weight_attr" else name: value for name, value in options.items()}
    if norm_class is nn.SyncBatchNorm:
        options = {name: value for name, value in options.items() if name != "use_global_stats"}
    norm = norm_class(4, epsilon=1e-3, **options)
    norm.to(dtype="float64")
    assert randomise_batch_norms(norm, 3) == 1
    norm.eval()
    scale, shift = read_bn_affine(norm)
    spatial = {"BatchNorm1D": [5], "BatchNorm3D": [2, 3, 2]}.get(norm_class.__name__, [3, 2])
    x = paddle.randn([2, 4, *spatial], dtype="float64")
    channels = [4] + [1] * len(spatial)
    # A SyncBatchNorm has no kernel on the CPU; what it computes in eval mode is what a BatchNorm2D computes.
    y = norm(x) if norm_class is not nn.SyncBatchNorm else as_batch_norm_2d(norm)(x)
    assert relative_error(as_array(x) * scale.reshape(channels) + shift.reshape(channels), y) < 1e-12


def as_batch_norm_2d(norm):
    plain = nn.BatchNorm2D(4, epsilon=norm._epsilon)
    plain.to(dtype="float64")
    for name, value in norm.state_dict().items():
        plain.state_dict()[name].set_value(value)
    plain.eval()
    return plain


@pytest.mark.parametrize(
    "norm",
    [lambda: nn.BatchNorm2D(4, use_global_stats=False), lambda: nn.BatchNorm(4, trainable_statistics=True)],
    ids=["use_global_stats", "trainable_statistics"],
)
def test_a_batch_norm_that_uses_the_batch_in_eval_mode_is_refused(norm):
    with pytest.raises(ReparamError, match="statistics of the batch in eval mode"):
        read_bn_affine(norm())


@pytest.mark.parametrize("with_shift", [True, False])
@pytest.mark.parametrize("bias", [None, False])
@pytest.mark.parametrize("kind", [nn.Conv2D, nn.Conv2DTranspose])
def test_an_affine_behind_a_convolution_is_absorbed_in_place(kind, bias, with_shift):
    conv = kind(4, 6, 3, groups=2, bias_attr=bias).to(dtype="float64")
    x = paddle.to_tensor(np.random.default_rng(0).normal(size=(2, 4, 5, 6)))
    scale, shift = np.random.default_rng(1).normal(size=(2, 6))
    before = conv(x).numpy()
    absorb_affine_into(conv, scale, shift if with_shift else None)
    assert (conv.bias is None) == (bias is False and not with_shift)
    expected = before * scale[:, None, None] + (shift[:, None, None] if with_shift else 0.0)
    assert relative_error(conv(x), expected) < 1e-14


@pytest.mark.parametrize("places", [1, 3])
def test_an_affine_before_a_linear_layer_moves_into_it(places):
    linear = nn.Linear(4 * places, 5).to(dtype="float64")
    x = np.random.default_rng(0).normal(size=(2, 4, places))
    scale, shift = np.random.default_rng(1).normal(size=(2, 4))
    moved = linear_behind(linear, scale, shift)
    expected = linear(paddle.to_tensor((x * scale[:, None] + shift[:, None]).reshape(2, -1)))
    assert relative_error(moved(paddle.to_tensor(x.reshape(2, -1))), expected) < 1e-14
