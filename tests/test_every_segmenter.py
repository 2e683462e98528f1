"""PaddleSeg's networks with layers of this library: the same function in every form, and as what is exported.

Two small ones are tried in every run; `EVERY_NETWORK=1 pytest <this>` tries all that are named here.
"""

from __future__ import annotations

import os

import paddle
import pytest
from network_contract import randomise_and_settle

from paddle_reparam import ppseg
from paddle_reparam.deploy.checks import check_export
from paddle_reparam.deploy.export import ExportOptions, export_inference
from paddle_reparam.deploy.outputs import OutputSpec
from paddle_reparam.surgery.rewrite import reparameterize, replace
from paddle_reparam.surgery.verify import verify

ppseg.setup()

from paddleseg.cvlibs import manager  # noqa: E402 - after the library, which mends it

EVERY = os.environ.get("EVERY_NETWORK") == "1"
#: Networks that are tried always: with the smallest backbone there is, on the smallest images that they take.
SMALL = {
    "PSPNet": {"backbone_indices": [1, 2], "pp_out_channels": 16},
    "OCRNet": {"backbone_indices": [2], "ocr_mid_channels": 16, "ocr_key_channels": 8},
}
#: Network -> its backbone, and options where those of PaddleSeg's own do not fit that.
LARGE = {
    "AttentionUNet": (None, {}),
    "BiSeNetV2": (None, {}),
    "BiseNetV1": ("ResNet18_vd", {}),
    "CCNet": ("ResNet18_vd", {}),
    "DANet": ("ResNet18_vd", {"backbone_indices": [2, 3]}),
    "DeepLabV3P": ("ResNet18_vd", {}),
    "GCNet": ("ResNet18_vd", {}),
    "HarDNet": (None, {}),
    "LRASPP": ("MobileNetV3_small_x0_35", {}),
    "MobileSeg": ("MobileNetV3_small_x0_35", {}),
    "PFPNNet": ("ResNet18_vd", {"backbone_indices": [0, 1, 2, 3], "channels": 64, "fpn_inplanes": [64, 128, 256, 512]}),
    "PPHumanSegLite": (None, {}),
    "PPLiteSeg": ("STDC1", {}),
    "PSPNet": ("ResNet18_vd", {}),
    "STDCSeg": ("STDC1", {}),
    "SegFormer": ("MixVisionTransformer_B0", {"embedding_dim": 64}),
    "UNet": (None, {}),
    "UPerNet": ("SLaK_micro", {"backbone_indices": [0, 1, 2, 3], "channels": 32}),
}


def built(name, backbone, options):
    maps = {} if backbone is None else {"backbone": manager.BACKBONES[backbone]()}
    return manager.MODELS[name](num_classes=2, **maps, **options)


def check(model, folder, shape):
    """The fused network is the trained one, and so is what is exported of it."""
    fused, _ = reparameterize(model, fold_bn=True, input_spec=[shape], fixed_size=True)
    verify(model, fused, [shape]).raise_if_failed("the fused network")
    scores = OutputSpec("identity")
    export_inference(fused, folder, [shape], scores, ExportOptions("pdmodel"))
    for runtime, report in check_export(folder, model, [shape], scores, (2,)).items():
        report.raise_if_failed(runtime)


def same_at_step_0(model, layer, shape, **options):
    """A layer takes the place of convolutions, and the network computes what it did."""
    randomise_and_settle(model, shape)
    x = paddle.randn([1, *shape[1:]])
    with paddle.no_grad():
        before = model(x)[0]
        replace(model, layer, **options)
        model.eval()
        error = float((model(x)[0] - before).abs().max() / before.abs().max())
    assert error < 1e-4


@pytest.mark.parametrize("name", SMALL)
def test_refconv_in_whole_networks(name, tmp_path):
    shape = [None, 3, 32, 32]
    model = built(name, "ResNet20", SMALL[name])
    same_at_step_0(model, "RefConv2D", shape, init="zero")
    for path, parameter in model.named_parameters():
        if path.endswith("convmap.weight"):
            parameter.set_value(0.1 * paddle.randn(parameter.shape))
    check(model, tmp_path, shape)


def test_repmlp_where_sizes_are_known(tmp_path):
    """It stands on maps of one size, here those of a backbone; pooled maps have others, and 1x1 kernels nothing to
    gain."""
    shape = [None, 3, 32, 32]
    model = built("PSPNet", "ResNet20", SMALL["PSPNet"])
    report = replace(model, "RepMLP", where="backbone.layer3.1*", height=8, width=8, partition=(4, 4))
    assert len(report.touched) > 1
    randomise_and_settle(model, shape)
    check(model, tmp_path, shape)


@pytest.mark.parametrize("name", LARGE)
def test_every_network_with_refconv(name, tmp_path):
    if not EVERY:
        pytest.skip("it takes a minute for each network; EVERY_NETWORK=1 runs it")
    shape = [None, 3, 64, 64]
    model = built(name, *LARGE[name])
    same_at_step_0(model, "RefConv2D", shape, init="zero")
    check(model, tmp_path, shape)
