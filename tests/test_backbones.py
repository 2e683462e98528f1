"""RefConv in PaddleClas' own backbones: kept by zero init, changed by random init, plain again when fused."""

import copy

import numpy as np
import paddle
import pytest
from helpers import randomise_batch_norms

from paddle_reparam import ppcls
from paddle_reparam.rewrite import reparameterize, replace
from paddle_reparam.tracing import sample_inputs
from paddle_reparam.verify import verify

BACKBONES = [
    "MobileNetV1", "MobileNetV2", "MobileNetV3_small_x1_0", "MobileNetV3_large_x1_0", "EfficientNetB0",
    "ShuffleNetV2_x1_0", "ResNet18", "ResNet50", "ResNeXt50_32x4d", "DenseNet121", "GhostNet_x1_0", "Res2Net50_26w_4s",
    "HRNet_W18_C",
]  # fmt: skip
#: As small as every one of them can take: what is tested is the walk and the arithmetic, not the size.
SPEC = [[None, 3, 64, 64]]


def build(name):
    # Some backbones give their parameters fixed names, which one process may use once only.
    with paddle.utils.unique_name.guard():
        model = getattr(ppcls.setup().arch, name)(class_num=7)
    randomise_batch_norms(model, seed=3)
    model.eval()
    return model


@pytest.mark.parametrize("name", BACKBONES)
def test_refconv_in_a_backbone(name):
    plain = build(name)
    keys = {key: value.shape for key, value in plain.state_dict().items()}
    model = copy.deepcopy(plain)

    report = replace(model, "RefConv2D", init="zero")
    assert all("1x1" in reason for _, reason in report.skipped)
    kept = verify(plain, model, SPEC, batches=1, tolerance=1e-5)
    assert kept.passed, str(kept)

    # Any other refocusing weight is another function, and such a layer is where it starts.
    model = copy.deepcopy(plain)
    report = replace(model, "RefConv2D")
    changed = verify(plain, model, SPEC, batches=1)
    assert changed.first_difference in [path for path, _ in report.touched]

    fused, _ = reparameterize(model)
    assert {key: value.shape for key, value in fused.state_dict().items()} == keys
    assert [type(layer) for layer in fused.sublayers()] == [type(layer) for layer in plain.sublayers()]
    same = verify(model, fused, SPEC, batches=1)
    assert same.passed, str(same)

    # The plain weight file means the same to a stock backbone.
    plain.set_state_dict(fused.state_dict())
    inputs = sample_inputs(SPEC, 1, 0, like=plain)
    with paddle.no_grad():
        np.testing.assert_allclose(plain(*inputs).numpy(), fused(*inputs).numpy(), rtol=1e-6)

    folded, report = reparameterize(model, fold_bn=True, input_spec=SPEC)
    assert verify(model, folded, SPEC, batches=1).passed
    assert report.left_over.get("BNs", 0) == len(report.skipped)
