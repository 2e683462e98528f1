"""The plain networks for CIFAR-10, and every registered layer put into one of them, trained a step, fused, verified."""

from __future__ import annotations

import math

import numpy as np
import paddle
import pytest
from network_contract import count, macs, randomise_and_settle

from paddle_reparam.errors import ReparamError
from paddle_reparam.registry import create_model, get_layer, list_layers
from paddle_reparam.surgery.rewrite import reparameterize, replace
from paddle_reparam.surgery.tracing import sample_inputs
from paddle_reparam.surgery.verify import verify

#: Small, so that every layer can be tried; a ResNet-20 halves it twice.
SHAPE = [None, 3, 16, 16]
#: What a layer needs to know to stand in a ResNet-20 for images of that size.
OPTIONS = {"RepMLP": {"where": "layer1.0.*", "height": 16, "width": 16}}
#: The stem and a stage: of each kind of convolution that a ResNet-20 has, one at least.
WHERE = ["conv1", "layer2.*"]
#: Layers for depthwise convolutions or for classifiers: a ResNet-20 has no convolution for them.
FOR_OTHERS = {
    "DCDDepthwiseConv2D", "DCDLinear", "DecomposedLargeKernelConv2D", "RepMLPBlock", "ReparamLargeKernelConv2D",
}  # fmt: skip


def by_hand(widths, classes, shortcuts=()):
    """Return the parameters of 3x3 convolutions and 1x1 shortcuts with BNs, and of one classifier."""
    pairs = [(a, b, 9) for a, b in zip([3, *widths], widths)] + [(a, b, 1) for a, b in shortcuts]
    return sum(a * b * area + 2 * b for a, b, area in pairs) + (widths[-1] + 1) * classes


def test_the_networks_are_exactly_as_large_as_they_should_be():
    shortcuts = [(16, 32), (32, 64)]
    resnet, vgg = create_model("ResNet20"), create_model("VGG16_CIFAR")
    assert count(resnet) == by_hand([16] * 7 + [32] * 6 + [64] * 6, 10, shortcuts) == 272_474
    assert count(vgg) == by_hand([64] * 2 + [128] * 2 + [256] * 3 + [512] * 6, 10) == 14_724_042
    assert count(create_model("ResNet20", class_num=100)) == 272_474 + 90 * 65
    # Published: 41.6 M for the network without its shortcuts' 0.3 M, and 313 M.
    stem, first, halved = 16 * 27 * 32**2, 6 * 16 * 16 * 9 * 32**2, 16 * 32 * 9 * 16**2 + 5 * 32 * 32 * 9 * 16**2
    last = 32 * 64 * 9 * 8**2 + 5 * 64 * 64 * 9 * 8**2
    assert macs(resnet, 32) == stem + first + halved + last + 16 * 32 * 16**2 + 32 * 64 * 8**2 + 640
    convolutions, channels, side = 0, 3, 32
    for stage in ([64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3):
        for width in stage:
            convolutions, channels = convolutions + channels * width * 9 * side**2, width
        side //= 2
    assert macs(vgg, 32) == convolutions + 5120


@pytest.mark.parametrize("name", ["ResNet20", "VGG16_CIFAR"])
def test_every_3x3_convolution_is_one_that_layers_take(name):
    model = create_model(name, class_num=3)
    convolutions = [layer for layer in model.sublayers() if isinstance(layer, paddle.nn.Conv2D)]
    assert {(tuple(c._kernel_size), c.bias) for c in convolutions} <= {((3, 3), None), ((1, 1), None)}
    for conv in convolutions:
        # As their papers start them: variance 2 / (out * kernel area).
        deviation = math.sqrt(2 / (conv._out_channels * math.prod(conv._kernel_size)))
        assert float(conv.weight.std()) == pytest.approx(deviation, rel=5 / math.sqrt(conv.weight.size))
    model.eval()
    assert model(paddle.zeros([2, 3, 32, 32])).shape == [2, 3]


@pytest.mark.parametrize("name", list_layers())
def test_every_layer_goes_into_a_resnet20(name):
    options = {"where": WHERE, **OPTIONS.get(name, {})}
    model = create_model("ResNet20")
    if name in FOR_OTHERS:
        with pytest.raises(ReparamError, match=f"{name} was put in the place of no convolution"):
            replace(model, name, **options)
        return
    report = replace(model, name, **options)
    put_in = {path: layer for path, layer in model.named_sublayers() if type(layer) is get_layer(name).layer}
    assert set(put_in) == {path for path, _ in report.touched}

    randomise_and_settle(model, SHAPE)
    model.train()
    before = {path: [p.numpy().copy() for p in layer.parameters()] for path, layer in put_in.items()}
    [x] = sample_inputs([SHAPE], 4, seed=0, like=model)
    loss = paddle.nn.functional.cross_entropy(model(x), paddle.to_tensor(np.arange(4)))
    assert math.isfinite(float(loss))
    loss.backward()
    paddle.optimizer.Adam(1e-4, parameters=model.parameters()).step()
    for path, layer in put_in.items():
        trains = [p for p in layer.parameters() if not p.stop_gradient]
        assert all(np.isfinite(p.grad.numpy()).all() for p in trains if p.grad is not None), path
        assert any(not np.array_equal(p.numpy(), old) for p, old in zip(layer.parameters(), before[path])), path

    model.eval()
    fused, report = reparameterize(model, fold_bn=True, input_spec=[SHAPE])
    assert "layers in train form" not in report.left_over
    verify(model, fused, [SHAPE], batches=1).raise_if_failed("fused")
