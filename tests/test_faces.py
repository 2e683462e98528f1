"""The networks for faces: as large as stated, the same in every form, with their blocks where the papers have them."""

from __future__ import annotations

import paddle
import pytest
from network_contract import (
    check_fused_is_the_same_function,
    check_one_step_changes_every_parameter,
    count,
    macs,
)
from paddle import nn

from paddle_reparam.errors import ReparamError
from paddle_reparam.layers.repmlp import RepMLP, RepMLPFused
from paddle_reparam.models.resnet_repmlp import RepMLPResNet
from paddle_reparam.registry import create_model


@pytest.fixture
def zeros_everywhere(monkeypatch):
    """Start all weights at zero: for counting, drawing 40 million numbers is wasted time."""
    for name in ("Normal", "XavierUniform", "XavierNormal", "KaimingNormal"):
        monkeypatch.setattr(nn.initializer, name, lambda *_, **__: nn.initializer.Constant(0.0))


@pytest.mark.parametrize(
    ("name", "options", "size", "parameters", "multiply_adds"),
    [
        ("MobileFaceNet", {}, 96, 996_480, 162_359_296),
        # 4.0 MB and, as others count it, 221 million multiply-adds.
        ("MobileFaceNet", {"image_size": 112}, 112, 1_003_136, 220_965_376),
        ("FaceResNet", {}, 96, 31_380_288, 998_948_864),
        ("RepMLP_FaceRes", {}, 96, 41_770_304, 1_029_251_072),
    ],
)
def test_counts(name, options, size, parameters, multiply_adds, zeros_everywhere):
    model = create_model(name, **options)
    assert (count(model), macs(model, size)) == (parameters, multiply_adds)


def test_every_form_of_mobilefacenet_is_the_same_function():
    model = create_model("MobileFaceNet", class_num=16, image_size=32)
    check_one_step_changes_every_parameter(model, [None, 3, 32, 32])
    fused = check_fused_is_the_same_function(model, [None, 3, 32, 32])
    assert not any(isinstance(layer, (nn.BatchNorm1D, nn.BatchNorm2D)) for layer in fused.sublayers())


def small_face_resnet(groups: int | None) -> RepMLPResNet:
    """Built as the builders do, on images of 32x32 with partitions of 2x2."""
    stages = dict.fromkeys(("c2", "c3", "c4"), groups) if groups else {}
    return RepMLPResNet(
        "bottleneck", stages, {"c2": 2, "c3": 2, "c4": 4}, 1, 32, 2, 6, (3, 2, 2, 2), 8, expansion=2, squeeze=1,
        plain_first=True,
    )  # fmt: skip


@pytest.mark.parametrize("groups", [None, 2])
def test_every_form_of_face_resnet_is_the_same_function(groups):
    model = small_face_resnet(groups)
    check_one_step_changes_every_parameter(model, [None, 3, 32, 32])
    fused = check_fused_is_the_same_function(model, [None, 3, 32, 32], *([] if groups else [[None, 3, 48, 40]]))
    assert sum(isinstance(layer, RepMLPFused) for layer in fused.sublayers()) == (4 if groups else 0)
    assert not any(isinstance(layer, nn.BatchNorm2D) for layer in fused.sublayers())


def test_repmlp_is_in_all_blocks_of_c2_to_c4_but_the_first(zeros_everywhere):
    plain, rich = create_model("FaceResNet"), create_model("RepMLP_FaceRes")
    paths = {path: layer for path, layer in rich.named_sublayers() if isinstance(layer, RepMLP)}
    assert list(paths) == [f"{block}.btnk_repmlp" for block in ("stage1.1", "stage1.2", "stage2.1", "stage3.1")]
    assert [(layer.in_channels, layer.size, layer.partition) for layer in paths.values()] == [
        (64, (24, 24), (6, 6)), (64, (24, 24), (6, 6)), (128, (12, 12), (6, 6)), (128, (6, 6), (6, 6)),
    ]  # fmt: skip
    for model in (plain, rich):
        for number, (width, depth) in enumerate(((128, 3), (256, 2), (512, 2), (1024, 2)), 1):
            blocks = getattr(model, f"stage{number}")
            assert len(blocks) == depth
            kernels = [list(conv.weight.shape) for conv in blocks[0].sublayers() if isinstance(conv, nn.Conv2D)]
            assert [width, width, 3, 3] in kernels
            assert all(kernel[0] == width for kernel in kernels)


def test_what_cannot_be_built_is_one_sentence():
    with pytest.raises(ReparamError, match="MobileFaceNet halves its images four times; image_size=100 is no multiple"):
        create_model("MobileFaceNet", image_size=100)
    with pytest.raises(ReparamError, match="RepMLP_FaceRes halves its images five times; image_size=112 is no"):
        create_model("RepMLP_FaceRes", image_size=112)
    with pytest.raises(ReparamError, match="reduction is a number for c2, c3 and c4, such as .*, not {'c5': 2}"):
        create_model("RepMLP_FaceRes", reduction={"c5": 2})
    network = create_model("MobileFaceNet", image_size=32)
    with pytest.raises(ReparamError, match="built for images of 32x32 pixels and got images of 48x48; build it with"):
        network(paddle.zeros([1, 3, 48, 48]))
