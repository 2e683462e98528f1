"""ResNets with DBB2D and ACB2D: as large as published, the published function, and weight files of others."""

from __future__ import annotations

import copy
import math
import re
import sys
from types import ModuleType

import numpy as np
import paddle
import pytest
from helpers import as_array, randomise_batch_norms, relative_error
from network_contract import (
    check_fused_is_the_same_function,
    check_one_step_changes_every_parameter,
    count,
)
from numpy.lib.stride_tricks import sliding_window_view
from paddle import nn

from paddle_reparam.arithmetic.geometry import ConvGeometry
from paddle_reparam.errors import CheckpointError, ReparamError
from paddle_reparam.layers.acb import ACB2D
from paddle_reparam.layers.dbb import DBB2D
from paddle_reparam.models.resnet_dbb import BranchedResNet
from paddle_reparam.ppcls import setup
from paddle_reparam.registry import create_model
from paddle_reparam.surgery.rewrite import reparameterize
from paddle_reparam.weights.checkpoints import save
from paddle_reparam.weights.conversion import read_published
from paddle_reparam.weights.published import fit_exactly, in_our_names

#: Parameters of torchvision's ResNets, and (inputs, outputs) of each of their 3x3 convolutions.
PLAIN = {"ResNet18": 11_689_512, "ResNet50": 25_557_032}
WIDTHS = (64, 128, 256, 512)
CONVOLUTIONS = {
    "ResNet18": [(c, o) for i, o in enumerate(WIDTHS) for c in (WIDTHS[max(i - 1, 0)], o, o, o)],
    "ResNet50": [(w, w) for w, depth in zip(WIDTHS, (3, 4, 6, 3)) for _ in range(depth)],
}


def of_dbb(inputs: int, outputs: int) -> int:
    """Return what a DBB has more than a 3x3 convolution and its BN: three 1x1 and a 3x3 convolution, five BNs."""
    return 2 * inputs * outputs + inputs**2 + 9 * inputs * outputs + 2 * (inputs + 4 * outputs)


def of_acb(inputs: int, outputs: int) -> int:
    return 2 * (3 * inputs * outputs + 2 * outputs)


@pytest.mark.parametrize("plain", PLAIN)
@pytest.mark.parametrize(("kind", "more"), [("DBB", of_dbb), ("ACB", of_acb)])
def test_as_large_as_published(plain, kind, more):
    model = create_model(f"{plain}_{kind}")
    assert count(model) == PLAIN[plain] + sum(more(*channels) for channels in CONVOLUTIONS[plain])
    layer = {"DBB": DBB2D, "ACB": ACB2D}[kind]
    assert sum(isinstance(part, layer) for part in model.sublayers()) == len(CONVOLUTIONS[plain])


# ---------------------------------------------------------------------------------------------------------------------
# The published function, by numpy alone


class Reference:
    """A published ResNet of two convolutions a block, from its state dict by the published names, in float64.

    In training a BN takes the statistics of the batch, and a BN that pads does so by running statistics with them.
    """

    def __init__(self, state: dict[str, np.ndarray], training: bool) -> None:
        self.state, self.training = state, training

    def conv(self, x: np.ndarray, name: str, stride: int = 1, padding: int = 0) -> np.ndarray:
        weight = self.state[f"{name}.weight"]
        if name.endswith("idconv1"):
            weight = weight + np.eye(len(weight))[:, :, None, None]
        x = np.pad(x, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
        windows = sliding_window_view(x, weight.shape[2:], (2, 3))[:, :, ::stride, ::stride]
        return np.einsum("nchwij,ocij->nohw", windows, weight)

    def bn(self, x: np.ndarray, name: str, pad: bool = False) -> np.ndarray:
        weight, bias, running_mean, running_var = (
            self.state[f"{name}.{last}"] for last in ("weight", "bias", "running_mean", "running_var")
        )
        mean, var = running_mean, running_var
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
            values = x.size / len(mean)
            running_mean = 0.9 * running_mean + 0.1 * mean
            running_var = 0.9 * running_var + 0.1 * var * values / (values - 1)
        scale = (weight / np.sqrt(var + 1e-5))[:, None, None]
        y = (x - mean[:, None, None]) * scale + bias[:, None, None]
        if not pad:
            return y
        border = bias - running_mean * weight / np.sqrt(running_var + 1e-5)
        padded = np.broadcast_to(border[:, None, None], (*x.shape[:2], x.shape[2] + 2, x.shape[3] + 2)).copy()
        padded[:, :, 1:-1, 1:-1] = y
        return padded

    def dbb(self, x: np.ndarray, name: str, stride: int) -> np.ndarray:
        out = self.bn(self.conv(x, f"{name}.dbb_origin.conv", stride, 1), f"{name}.dbb_origin.bn")
        out = out + self.bn(self.conv(x, f"{name}.dbb_1x1.conv", stride), f"{name}.dbb_1x1.bn")
        y = self.bn(self.conv(x, f"{name}.dbb_1x1_kxk.idconv1"), f"{name}.dbb_1x1_kxk.bn1.bn", pad=True)
        out = out + self.bn(self.conv(y, f"{name}.dbb_1x1_kxk.conv2", stride), f"{name}.dbb_1x1_kxk.bn2")
        y = self.bn(self.conv(x, f"{name}.dbb_avg.conv"), f"{name}.dbb_avg.bn.bn", pad=True)
        y = sliding_window_view(y, (3, 3), (2, 3))[:, :, ::stride, ::stride].mean((4, 5))
        return out + self.bn(y, f"{name}.dbb_avg.avgbn")

    def acb(self, x: np.ndarray, name: str, stride: int) -> np.ndarray:
        out = self.bn(self.conv(x, f"{name}.square_conv", stride, 1), f"{name}.square_bn")
        rows, columns = np.pad(x, [(0, 0)] * 2 + [(1, 1), (0, 0)]), np.pad(x, [(0, 0)] * 3 + [(1, 1)])
        out = out + self.bn(self.conv(rows, f"{name}.ver_conv", stride), f"{name}.ver_bn")
        return out + self.bn(self.conv(columns, f"{name}.hor_conv", stride), f"{name}.hor_bn")

    def __call__(self, x: np.ndarray, layer: str) -> np.ndarray:
        block = getattr(self, layer)
        x = np.maximum(self.bn(self.conv(x, "stage0.conv1.conv", 2, 3), "stage0.conv1.bn"), 0)
        padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)], constant_values=-np.inf)
        x = sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::2, ::2].max((4, 5))
        for stage in range(1, 5):
            for number in range(2):
                name, stride = f"stage{stage}.{number}", 2 if stage > 1 and number == 0 else 1
                shortcut = x
                if f"{name}.shortcut.conv.weight" in self.state:
                    shortcut = self.bn(self.conv(x, f"{name}.shortcut.conv", stride), f"{name}.shortcut.bn")
                y = np.maximum(block(x, f"{name}.conv1", stride), 0)
                x = np.maximum(block(y, f"{name}.conv2", 1) + shortcut, 0)
        return x.mean((2, 3)) @ self.state["linear.weight"].T + self.state["linear.bias"]


def small(layer: type, **options) -> BranchedResNet:
    return BranchedResNet(layer, (2, 2, 2, 2), False, class_num=5, width=8, **options)


def published_state(model: nn.Layer) -> dict[str, np.ndarray]:
    """Return the state dict as torch has it."""
    state = {}
    for key, value in model.state_dict().items():
        key = key.replace("._mean", ".running_mean").replace("._variance", ".running_var")
        state[key] = as_array(value).T if key == "linear.weight" else as_array(value)
        if key.endswith(".running_mean"):
            state[key.replace("running_mean", "num_batches_tracked")] = np.array(7)
    return state


@pytest.mark.parametrize("layer", [DBB2D, ACB2D])
def test_the_published_function(layer):
    model = small(layer)
    model.to(dtype="float64")
    randomise_batch_norms(model)
    for name, parameter in model.named_parameters():
        if "idconv1" in name:
            parameter.set_value(0.2 * paddle.randn(parameter.shape, parameter.dtype))
    x = np.random.default_rng(0).standard_normal([3, 3, 75, 66])
    for training in (False, True):
        model.train() if training else model.eval()
        expected = Reference(published_state(model), training)(x, layer.__name__[:3].lower())
        # In training the borders depend on the momentum, which Paddle keeps as a float32.
        assert relative_error(model(paddle.to_tensor(x)), expected) < (1e-6 if training else 1e-9)


@pytest.mark.parametrize("layer", [DBB2D, ACB2D])
def test_a_bottleneck_has_one_of_them(layer):
    model = BranchedResNet(layer, (1, 1, 1, 1), True, class_num=5, width=8)
    names = [name for name, part in model.named_sublayers() if isinstance(part, layer)]
    assert names == [f"stage{i}.0.conv2" for i in range(1, 5)]
    check_one_step_changes_every_parameter(model, [None, 3, 64, 64])
    check_fused_is_the_same_function(model, [None, 3, 32, 32], [None, 3, 45, 38])


# ---------------------------------------------------------------------------------------------------------------------
# Weight files


def converted(name: str, model: nn.Layer, state: dict) -> nn.Layer:
    """Return another network like the model, with a published state dict of the network `name`."""
    other = copy.deepcopy(model)
    other.set_state_dict(fit_exactly(other, in_our_names(name, state, other), name))
    return other


@pytest.mark.parametrize(
    ("name", "layer", "merged"), [("ResNet18_DBB", DBB2D, "dbb_reparam"), ("ResNet18_ACB", ACB2D, "fused_conv")]
)
def test_files_of_the_authors(name, layer, merged):
    model, x = small(layer), paddle.randn([2, 3, 64, 64])
    randomise_batch_norms(model)
    model.eval()
    expected = model(x)
    another = small(layer)
    another.eval()
    assert relative_error(converted(name, another, published_state(model))(x), expected) == 0

    # Merged: every convolution has a bias, and no BN is left.
    fused, _ = reparameterize(model, fold_bn=True, input_spec=[[None, 3, 64, 64]])
    state = {}
    for key, value in published_state(fused).items():
        block = re.fullmatch(r"(stage[1-4]\.\d\.conv\d)\.(weight|bias)", key)
        state[f"{block[1]}.{merged}.{block[2]}" if block else key] = value
    assert len(state) == 42
    model = converted(name, another, state)
    assert relative_error(model(x), expected) < 1e-5
    model.train()
    model(x).sum().backward()
    idle = [n for n, p in model.named_parameters() if "conv" in n.rsplit(".", 2)[1] and not np.any(p.grad.numpy())]
    assert {n.rsplit(".", 2)[1] for n in idle} <= {"idconv1"}, "branches that begin as zeros learn"
    with pytest.raises(CheckpointError, match="missing: .*"):
        converted(name, small(ACB2D if layer is DBB2D else DBB2D), state)


def test_files_of_paddleclas(tmp_path):
    """PaddleClas counts blocks through all stages, and convolutions from 0; its ResNet around the same layers."""
    setup()
    from ppcls.arch.backbone import ResNet18

    theirs = ResNet18(class_num=3)
    for block in theirs.blocks:
        for name in ("conv0", "conv1"):
            layer = DBB2D.from_conv(getattr(block, name).conv)
            if name == "conv0":
                layer.register_forward_post_hook(lambda layer, inputs, output: nn.functional.relu(output))
            setattr(block, name, layer)
    randomise_batch_norms(theirs)
    theirs.eval()
    save(theirs.state_dict(), tmp_path / "theirs.pdparams")
    ours = create_model("ResNet18_DBB", class_num=3, first_shortcut=True)
    arrays = read_published(tmp_path / "theirs.pdparams").arrays
    ours.set_state_dict(fit_exactly(ours, in_our_names("ResNet18_DBB", arrays, ours), "ResNet18_DBB"))
    ours.eval()
    x = paddle.randn([2, 3, 32, 32])
    assert relative_error(ours(x), theirs(x)) < 1e-6

    # With `use_first_short_conv: False` the first block has no convolution there, as in the authors' network.
    arrays = {key: value for key, value in arrays.items() if not key.startswith("blocks.0.short")}
    ours = create_model("ResNet18_DBB", class_num=3)
    assert (
        fit_exactly(ours, in_our_names("ResNet18_DBB", arrays, ours), "ResNet18_DBB").keys() == ours.state_dict().keys()
    )


class LaterBlock(nn.Layer):
    """A block of the same branches and a ReLU, with the names and the protocol of PaddleClas 2.6."""

    def __init__(self, geometry: ConvGeometry) -> None:
        super().__init__()
        self.is_repped, self.nonlinear = False, nn.ReLU()
        self.layer = [layer := DBB2D(geometry)]
        for name, branch in layer.named_children():
            setattr(self, name, branch)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.nonlinear(self.dbb_reparam(x) if self.is_repped else self.layer[0].forward_branches(x))

    def re_parameterize(self) -> None:
        raise AssertionError("it was to be fused by this library")


@pytest.mark.parametrize("more", [{}, {"stride": (2, 2)}, {"groups": 4}, {"out_channels": 16}], ids=str)
def test_blocks_of_paddleclas_are_fused_by_this_library(more):
    geometry = ConvGeometry(**{"in_channels": 8, "out_channels": 8, "kernel_size": (3, 3), "padding": (1,) * 4, **more})
    model = nn.Sequential(nn.Conv2D(3, 8, 1), LaterBlock(geometry))
    randomise_batch_norms(model)
    model.eval()
    x = paddle.randn([2, 3, 9, 8])
    expected = model(x)
    fused, report = reparameterize(model)
    count = sum(name.startswith("dbb") for name, _ in model[1].named_children())
    assert report.touched == [("1", f"LaterBlock: {count} branches -> Conv2D")]
    assert relative_error(fused(x), expected) < 1e-5
    assert sum(p.size for p in fused[1].parameters()) == math.prod(geometry.weight_shape) + geometry.out_channels
    assert not model[1].is_repped


def test_a_block_that_is_no_convolution_is_refused():
    """Paddle's average pooling leaves the padding out, unless it is told."""
    block = LaterBlock(ConvGeometry(8, 8, (3, 3), padding=(1,) * 4, groups=8))
    block.dbb_avg[0] = nn.AvgPool2D(3, 1, 1)
    model = nn.Sequential(block)
    randomise_batch_norms(model)
    model.eval()
    with pytest.raises(ReparamError, match="0: this LaterBlock computes no convolution, as where it averages without"):
        reparameterize(model)
    assert isinstance(block.dbb_origin, nn.Sequential)


def test_the_identity_of_paddleclas_own_block_gets_the_type_of_its_kernel(monkeypatch):
    """In PaddleClas 2.6 it is float64, and since Paddle 2.6 the block cannot be run."""
    setup()
    from paddle_reparam.ppcls import mends

    class IdentityBasedConv1x1(nn.Conv2D):
        def __init__(self, channels):
            super().__init__(channels, channels, 1, bias_attr=False)
            self.id_tensor = paddle.to_tensor(np.eye(channels)[:, :, None, None])

        def forward(self, x):
            return nn.functional.conv2d(x, self.weight + self.id_tensor)

    assert not mends._diverse_branches_add_float64(), "the PaddleClas that is here has no such block, or a whole one"
    path = "ppcls.arch.backbone.base.dbb.dbb_block"
    for depth in range(5, 7):
        name = ".".join(path.split(".")[:depth])
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[path].IdentityBasedConv1x1 = IdentityBasedConv1x1
    assert mends._diverse_branches_add_float64()
    mends._mend_diverse_branches()
    assert not mends._diverse_branches_add_float64()
    layer, x = IdentityBasedConv1x1(4), paddle.randn([2, 4, 3, 3])
    layer.weight.set_value(paddle.zeros([4, 4, 1, 1]))
    assert relative_error(layer(x), x) == 0
