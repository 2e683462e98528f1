"""PaddleClas' own blocks of branches, and blocks like those of its later versions: fused by this library, rightly."""

from __future__ import annotations

import copy

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
import yaml
from helpers import randomise_batch_norms, relative_error
from paddle import nn

from paddle_reparam import ppcls
from paddle_reparam.errors import NothingToFuse
from paddle_reparam.surgery.rewrite import reparameterize
from paddle_reparam.surgery.verify import settle_batch_norms


class ConvBN(nn.Layer):
    def __init__(self, kernel_size, stride=1, groups=1):
        super().__init__()
        self.conv = nn.Conv2D(8, 8, kernel_size, stride, kernel_size // 2, groups=groups, bias_attr=False)
        self.bn = nn.BatchNorm2D(8)

    def forward(self, x):
        return self.bn(self.conv(x))


class Gate(nn.Layer):
    """Squeeze-and-excitation of square maps alone, as PaddleClas 2.6 has it."""

    def __init__(self):
        super().__init__()
        self.up = nn.Conv2D(8, 8, 1)

    def forward(self, x):
        return x * F.sigmoid(self.up(F.avg_pool2d(x, x.shape[3])))


class LaterBlock(nn.Layer):
    """A block like RepVGG's in PaddleClas 2.6: fused, it leaves `se` out."""

    def __init__(self):
        super().__init__()
        self.is_repped = False
        self.nonlinearity = nn.ReLU()
        self.se = Gate()
        self.rbr_identity = nn.BatchNorm2D(8)
        self.rbr_dense, self.rbr_1x1 = ConvBN(3, groups=2), ConvBN(1, groups=2)

    def branches(self, x):
        return self.rbr_dense(x) + self.rbr_1x1(x) + self.rbr_identity(x)

    def forward(self, x):
        if self.is_repped:
            return self.nonlinearity(self.rbr_reparam(x))
        return self.nonlinearity(self.se(self.branches(x)))

    def re_parameterize(self):
        self.rbr_reparam = nn.Conv2D(8, 8, 3, padding=1, groups=2)
        self.is_repped = True


class OtherBlock(LaterBlock):
    """One that is made of the same parts in another order, and fuses itself as the parts are."""

    def forward(self, x):
        return self.se(self.nonlinearity(self.branches(x)))


def network(*blocks, dtype="float32"):
    paddle.seed(0)
    model = nn.Sequential(nn.Conv2D(3, 8, 1), *blocks)
    randomise_batch_norms(model)
    model.to(dtype=dtype)
    model.eval()
    return model


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_stands_behind_the_branches_stays(dtype):
    model = network(LaterBlock(), LaterBlock(), dtype=dtype)
    before = {key: value.numpy() for key, value in model.state_dict().items()}
    fused, report = reparameterize(model)
    assert [what for _, what in report.touched] == ["LaterBlock: 3 branches -> Conv2D"] * 2
    x = paddle.randn([2, 3, 7, 7], dtype=dtype)
    assert relative_error(fused(x), model(x)) < {"float32": 1e-5, "float64": 1e-12}[dtype]
    assert not any(isinstance(layer, nn.BatchNorm2D) for layer in fused.sublayers())
    assert all(np.array_equal(value.numpy(), before[key]) for key, value in model.state_dict().items())
    # What is fused already is no train form.
    assert fused[1].is_repped
    with pytest.raises(NothingToFuse):
        reparameterize(fused)


def test_a_block_that_does_something_else_with_the_same_parts_fuses_itself():
    model = network(OtherBlock())
    fused, report = reparameterize(model)
    assert report.touched == [("1", "OtherBlock.re_parameterize()")]
    kept = {name: type(part) for name, part in fused[1]._sub_layers.items() if name != "rbr_reparam"}
    assert kept == {name: type(part) for name, part in model[1]._sub_layers.items()}


def test_a_block_with_nothing_to_fuse_is_not_counted():
    class Idle(LaterBlock):
        rbr_dense = None

        def __init__(self):
            nn.Layer.__init__(self)
            self.is_repped = False

        def forward(self, x):
            return x

        def re_parameterize(self):
            pass

    _, report = reparameterize(network(Idle(), LaterBlock()))
    assert [path for path, _ in report.touched] == ["2"]


# ---------------------------------------------------------------------------------------------------------------------
# The blocks of the PaddleClas that is here


def own(name: str, **options):
    """Return a small network of PaddleClas' own blocks."""
    ppcls.setup()
    from ppcls.arch.backbone.legendary_models import pp_lcnet_v2
    from ppcls.arch.backbone.model_zoo import repvgg

    if name == "RepVGG":
        return repvgg.RepVGG([1, 2, 1, 1], [0.125] * 4, {2: 2, 4: 2}, class_num=5)
    if name == "RepVGGBlock":
        return nn.Sequential(nn.Conv2D(3, 8, 1), repvgg.RepVGGBlock(8, 8, 3, padding=1, **options))
    with paddle.utils.unique_name.guard():
        return pp_lcnet_v2.PPLCNetV2(scale=0.25, depths=[1, 1, 2, 1], class_num=5)


@pytest.mark.parametrize(
    ("name", "options"),
    [("RepVGG", {}), ("RepVGGBlock", {"dilation": 2}), ("RepVGGBlock", {"padding_mode": "reflect"}), ("PPLCNetV2", {})],
    ids=str,
)
def test_paddleclas_own_blocks(name, options):
    """With the statistics of no batch, each BN's own weights, in float64 too."""
    paddle.seed(0)
    model = own(name, **options)
    shape = [None, 3, 64, 64]
    randomise_batch_norms(model)
    settle_batch_norms(model, [shape])
    for dtype, tolerance in (("float32", 1e-4), ("float64", 1e-11)):
        model.to(dtype=dtype)
        model.eval()
        fused, report = reparameterize(model, fold_bn=True, input_spec=[shape])
        x = paddle.randn([2, 3, 64, 64], dtype=dtype)
        assert relative_error(fused(x), model(x)) < tolerance
        assert not report.left_over
        assert all("branches -> Conv2D" in what or "folded into" in what for _, what in report.touched)


def test_what_stock_paddleclas_trained_is_fused_by_the_command(tmp_path, capsys):
    """Its train-form weight file in, its fused form, compared with it."""
    ppcls.setup()
    from paddle_reparam.ppcls.reparam import build_train_form, main

    config = {
        "Global": {"image_shape": [3, 64, 64], "device": "cpu"},
        "Arch": {"name": "PPLCNetV2_base", "class_num": 5},
        "DataLoader": {"Train": {}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    paddle.seed(0)
    net = build_train_form(copy.deepcopy(config))
    settle_batch_norms(net, [[None, 3, 64, 64]], batch=16)
    assert any("dw_conv_list" in key for key in net.state_dict())
    paddle.save(net.state_dict(), str(tmp_path / "trained.pdparams"))
    files = ["-c", str(tmp_path / "config.yaml"), "--weights", str(tmp_path / "trained.pdparams")]
    assert main([*files, "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "6  RepDepthwiseSeparable: 3 branches -> Conv2D" in capsys.readouterr().out
