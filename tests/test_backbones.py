"""RefConv in the networks of its paper: kept by zero init, changed by random init, plain again when fused."""

import copy
import os

import numpy as np
import paddle
import pytest
from helpers import randomise_batch_norms, relative_error
from paddle import nn

from paddle_reparam import ppcls
from paddle_reparam.ppcls import locate
from paddle_reparam.surgery.rewrite import reparameterize, replace
from paddle_reparam.surgery.tracing import sample_inputs
from paddle_reparam.surgery.verify import verify

#: PaddleClas' own from 2.4 on, and this library's.
BACKBONES = [
    "MobileNetV1", "MobileNetV2", "MobileNetV3_small_x1_0", "MobileNetV3_large_x1_0", "EfficientNetB0",
    "ShuffleNetV2_x1_0", "ResNet18", "ResNet50", "ResNeXt50_32x4d", "DenseNet121", "GhostNet_x1_0", "Res2Net50_26w_4s",
    "HRNet_W18_C", "HBONet_x0_25", "ReXNet_1_0", "ShuffleNetV1_x0_5_g3", "ConvNeXt_T",
]  # fmt: skip
#: Those that the PaddleClas 2.4 wheel lacks.
NEWER = ["FasterNet_T0", "MobileNeXt_x0_35", "ConvNeXt_tiny"]
IN_A_CHECKOUT = pytest.mark.skipif(
    not os.environ.get(locate.HOME), reason=f"PaddleClas 2.4 lacks it: set {locate.HOME} to a checkout of 2.6"
)
#: As small as every one of them can take: what is tested is the walk and the arithmetic, not the size.
SPEC = [[None, 3, 64, 64]]


def build(name):
    # ConvNeXt starts with blocks that are next to nothing beside their shortcuts.
    options = {"layer_scale_init_value": 1.0} if name.startswith("ConvNeXt") else {}
    # Some backbones give their parameters fixed names, which one process may use once only.
    with paddle.utils.unique_name.guard():
        model = getattr(ppcls.setup().arch, name)(class_num=7, **options)
    randomise_batch_norms(model, seed=3)
    model.eval()
    return model


@pytest.mark.parametrize("name", BACKBONES + [pytest.param(name, marks=IN_A_CHECKOUT) for name in NEWER])
def test_refconv_in_a_backbone(name):
    plain = build(name)
    # The blocks of this library's ConvNeXt are fused as well, with and without RefConv in them.
    stock = reparameterize(plain)[0] if name == "ConvNeXt_T" else plain
    keys = {key: value.shape for key, value in stock.state_dict().items()}
    convolutions = {path: layer for path, layer in plain.named_sublayers() if isinstance(layer, nn.Conv2D)}
    inputs = sample_inputs(SPEC, 2, 0, like=plain)
    model = copy.deepcopy(plain)

    report = replace(model, "RefConv2D", init="zero")
    # Everything that a map_k of 3 fits into: the 2x2 that FasterNet and ConvNeXt downsample by stay, as 1x1 do.
    large_enough = {path for path, conv in convolutions.items() if min(conv.weight.shape[2:]) >= 3}
    assert {path for path, _ in report.touched} == large_enough
    assert {tuple(convolutions[path].weight.shape[2:]) for path, _ in report.skipped} <= {(1, 1), (2, 2)}
    with paddle.no_grad():
        expected = plain(*inputs)
        assert relative_error(model(*inputs), expected) < 1e-5

    # Any other refocusing weight is another function.
    model = copy.deepcopy(plain)
    replace(model, "RefConv2D")
    with paddle.no_grad():
        changed = model(*inputs)
    assert relative_error(changed, expected) > 1e-3

    fused, _ = reparameterize(model)
    assert {key: value.shape for key, value in fused.state_dict().items()} == keys
    assert [type(layer) for layer in fused.sublayers()] == [type(layer) for layer in stock.sublayers()]
    # The plain weight file means the same to a stock backbone.
    stock.set_state_dict(fused.state_dict())
    with paddle.no_grad():
        output = fused(*inputs)
        assert relative_error(output, changed) < 1e-4
        np.testing.assert_allclose(stock(*inputs).numpy(), output.numpy(), rtol=1e-6)

    folded, report = reparameterize(model, fold_bn=True, input_spec=SPEC)
    same = verify(model, folded, SPEC, batches=1)
    assert same.passed, str(same)
    assert report.left_over.get("BNs", 0) == len(report.skipped)
