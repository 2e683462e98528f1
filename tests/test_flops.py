"""Counting: the shapes are those that Paddle computes, and the counts those that the formulas give."""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
import pytest
from helpers import as_array
from paddle import nn
from test_export import SPEC, small_net

from paddle_reparam.errors import ReparamError
from paddle_reparam.layers.refconv import RefConv2D
from paddle_reparam.surgery.flops import _watch, measure
from paddle_reparam.surgery.rewrite import reparameterize, replace

CONVS = [
    {}, {"padding": 1}, {"padding": [1, 2]}, {"padding": [0, 1, 2, 1]}, {"padding": "SAME", "stride": 2},
    {"padding": "VALID", "stride": 2}, {"stride": [2, 1], "padding": 1}, {"dilation": 2, "padding": 2},
    {"dilation": [2, 1], "stride": 2}, {"groups": 2, "padding": 1}, {"groups": 4, "padding": 1, "stride": 2},
    {"groups": 4, "dilation": 2}, {"padding": 1, "data_format": "NHWC"}, {"groups": 4, "data_format": "NHWC"},
]  # fmt: skip


@pytest.mark.parametrize("options", CONVS, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_convolutions_have_the_shape_that_paddle_computes(options, with_bias):
    groups = options.get("groups", 1)
    x = paddle.randn([2, 9, 8, 4] if options.get("data_format") == "NHWC" else [2, 4, 9, 8])
    weight, bias = paddle.randn([8, 4 // groups, 3, 3]), paddle.randn([8]) if with_bias else None
    expected = F.conv2d(x, weight, bias, **options)
    macs = []
    with _watch(macs.append):
        output = F.conv2d(x, weight, bias, **options)
    assert output.shape == expected.shape
    assert macs == [expected.size * 4 // groups * 9]
    assert as_array(F.conv2d(x, weight, bias, **options) - expected).max() == 0  # and all is as it was


TRANSPOSED = [
    {}, {"padding": 1}, {"padding": [0, 1, 2, 1], "stride": 2}, {"padding": "SAME", "stride": 2},
    {"padding": "SAME", "dilation": 2}, {"padding": "VALID", "stride": 3}, {"dilation": 2, "padding": 2},
    {"stride": [2, 1], "output_padding": [1, 0]}, {"groups": 2, "stride": 2, "padding": 1, "output_padding": 1},
    {"stride": 2, "data_format": "NHWC"},
]  # fmt: skip


@pytest.mark.parametrize("options", TRANSPOSED, ids=str)
def test_transposed_convolutions_have_the_shape_that_paddle_computes(options):
    x = paddle.randn([2, 9, 8, 4] if options.get("data_format") == "NHWC" else [2, 4, 9, 8])
    layer = nn.Conv2DTranspose(4, 6, 3, **options)
    macs = []
    with _watch(macs.append):
        output = layer(x)
    assert output.shape == layer(x).shape
    assert macs == [x.size * 6 // options.get("groups", 1) * 9]


def test_convolutions_of_one_and_three_axes_are_counted():
    layers = [
        (nn.Conv1D(4, 6, 3), [4, 9], 7 * 6 * 4 * 3),
        (nn.Conv1DTranspose(4, 6, 3, stride=2), [4, 9], 9 * 6 * 4 * 3),
        (nn.Conv2DTranspose(4, 4, 3, groups=4), [4, 9, 8], 9 * 8 * 4 * 9),
        (nn.Conv3D(4, 6, 3), [4, 5, 5, 5], 27 * 6 * 4 * 27),
        (nn.Conv3DTranspose(4, 6, 3), [4, 5, 5, 5], 125 * 6 * 4 * 27),
    ]
    for layer, shape, macs in layers:
        layer.eval()
        size = measure(layer, [[None, *shape]])
        assert (size.macs_per_image, size.uncounted) == (macs, []), type(layer).__name__


@pytest.mark.parametrize(
    ("x", "y", "options", "inner"),
    [
        ([5, 3], [3, 2], {}, 3), ([2, 5, 3], [3, 4], {}, 3), ([2, 1, 5, 3], [4, 3, 2], {}, 3), ([3], [3], {}, 3),
        ([5, 3], [3], {}, 3), ([3], [2, 3, 4], {}, 3), ([3, 5], [3, 2], {"transpose_x": True}, 3),
        ([2, 5, 3], [2, 4, 3], {"transpose_y": True}, 3),
        ([3, 5], [4, 3], {"transpose_x": True, "transpose_y": True}, 3),
    ],
)  # fmt: skip
def test_products_have_the_shape_that_paddle_computes(x, y, options, inner):
    x, y = paddle.randn(x), paddle.randn(y)
    expected = paddle.matmul(x, y, **options)
    macs = []
    with _watch(macs.append):
        output = paddle.matmul(x, y, **options)
        assert options or (x @ y).shape == expected.shape
    assert output.shape == expected.shape
    assert macs == [max(expected.size, 1) * inner] * (1 if options else 2)


@pytest.mark.parametrize(
    ("name", "macs", "parameters"),
    [("resnet50", 4_089_184_256, 25_557_032), ("mobilenet_v2", 300_774_272, 3_504_872)],
)
def test_the_counts_of_known_networks(name, macs, parameters):
    net = getattr(paddle.vision.models, name)()
    net.eval()
    size = measure(net, [[None, 3, 224, 224]])
    assert (size.macs_per_image, size.macs_per_pass, size.parameters) == (macs, 0, parameters)
    assert size.uncounted == []


def test_functions_are_counted_like_layers_and_what_is_not_counted_is_named():
    class Functional(nn.Layer):
        def __init__(self):
            super().__init__()
            self.kernel = self.create_parameter([4, 3, 3, 3])
            self.a = nn.Linear(4, 6)
            self.b = nn.Linear(6, 2)
            self.embedding = nn.Embedding(10, 4)
            self.scale = nn.BatchNorm2D(4)

        def forward(self, x):
            x = self.scale(F.conv2d(x, self.kernel, padding=1)).mean(axis=[2, 3])
            x = x + self.embedding(paddle.zeros([1], dtype="int64"))
            x = self.a(x) @ self.b.weight
            return paddle.matmul(x, paddle.ones([5, 2]), transpose_y=True) + paddle.matmul(
                paddle.ones([3, 4]), paddle.ones([3, 5]), transpose_x=True
            ).sum(axis=0)

    net = Functional()
    net.eval()
    size = measure(net, SPEC)
    assert size.macs_per_image == 4 * 16 * 16 * 3 * 9 + 4 * 6 + 6 * 2 + 2 * 5
    assert size.macs_per_pass == 4 * 5 * 3
    assert size.uncounted == ["embedding"]
    assert size.parameters == 4 * 27 + 4 * 6 + 6 + 6 * 2 + 2 + 40 + 8


def test_the_transform_of_weights_is_counted_once_a_pass():
    net = small_net()
    plain = measure(net, SPEC)
    replace(net, "RefConv2D", where="3")
    assert type(net[3]) is RefConv2D
    train = measure(net, SPEC)
    # Wr [8, 8, 3, 3] against the 3x3 patches of 8 planes of 3x3.
    assert train.macs_per_pass == 8 * 8 * 9 * 9
    assert train.macs_per_image == plain.macs_per_image
    assert (train.trainable_parameters, train.frozen_parameters) == (plain.parameters - 72 + 576, 72)
    assert train.uncounted == []
    fused, _ = reparameterize(net, fold_bn=True, input_spec=SPEC)
    assert measure(fused, SPEC).macs_per_image == plain.macs_per_image
    assert measure(fused, SPEC).layers == plain.layers - 2


def test_counting_leaves_paddle_as_it_was():
    before = paddle._C_ops.conv2d, paddle._C_ops.matmul, paddle.Tensor.__matmul__
    net = small_net()
    with pytest.raises(ReparamError, match=r"kernel of shape \[8, 3, 3, 3\] in 1 groups got an input of shape \[1, 4"):
        measure(net, [[None, 4, 16, 16]])
    assert (paddle._C_ops.conv2d, paddle._C_ops.matmul, paddle.Tensor.__matmul__) == before
    assert not any(layer._forward_pre_hooks or layer._forward_post_hooks for layer in net.sublayers(include_self=True))
