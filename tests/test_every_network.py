"""Every registered network: strict about its arguments, and the same function in every form, as ONNX too.

The forms of small networks are compared in every run; `EVERY_NETWORK=1 pytest <this>` does it for all of them,
which takes minutes for each of the large ones.
"""

from __future__ import annotations

import os

import paddle
import pytest
from helpers import missing_for_onnx
from network_contract import (
    check_exports,
    check_fused_is_the_same_function,
    check_one_step_changes_every_parameter,
    count,
    randomise_and_settle,
)

from paddle_reparam.deploy.export import ExportOptions, export_inference
from paddle_reparam.deploy.onnx_export import export_onnx
from paddle_reparam.deploy.runtimes.onnx_runtime import OnnxModel
from paddle_reparam.errors import ReparamError, UnknownName
from paddle_reparam.measure import catalogue
from paddle_reparam.registry import create_model, get_model, list_models
from paddle_reparam.surgery.rewrite import reparameterize
from paddle_reparam.surgery.verify import verify

EVERY = os.environ.get("EVERY_NETWORK") == "1"
#: One small network of each family that takes images of this size.
SMALL = {"ResNet20_SPConv": 32, "SLaK_micro": 32, "RepMLPNet_micro": 32, "RepMLP_CIFAR": 32}
#: Sides of images that most networks take; the others take those of their own size only.
USUAL = (64, 96)
#: Networks of which an ONNX file takes one size only: paddle2onnx writes their pooling to 2x2 for a known size alone.
ONNX_OF_ONE_SIZE = {
    *("ResNet10_DCD", "ResNet18_DCD", "ResNet34_DCD"),
    *("MobileNetV2_x0_35_DCD", "MobileNetV2_x0_5_DCD", "MobileNetV2_x0_75_DCD", "MobileNetV2_x1_0_DCD"),
}


@pytest.mark.parametrize("name", list_models())
def test_arguments_are_strict(name):
    for wish in ({"pretrained": True}, {"use_ssld": True}):
        with pytest.raises(ReparamError, match=f"no weights of {name} are published in Paddle's format; give"):
            create_model(name, class_num=2, **wish)
    with pytest.raises(UnknownName, match=f"{name} has no argument 'deptth'; it takes .*class_num"):
        create_model(name, deptth=3)


@pytest.mark.parametrize("name", list_models())
def test_published_rows_are_whole(name):
    """Each row says where it is from, and none is there twice."""
    published = get_model(name).published
    assert len(set(map(str, published))) == len(published)
    assert all(p.source for p in published)
    assert all(p.top1 is None or 0 < p.top1 < 100 for p in published)


def sides_of(name: str) -> tuple[int, ...]:
    """Return the sides of images to try, the network's own one where it takes no other."""
    model = create_model(name)
    model.eval()
    try:
        with paddle.no_grad():
            model(paddle.zeros([1, 3, USUAL[0], USUAL[0]]))
    except ReparamError:
        published = get_model(name).published
        return (published[0].input_size,)
    return USUAL


@pytest.mark.parametrize("name", list_models())
def test_all_forms_are_the_same_function(name, tmp_path):
    if not EVERY and name not in SMALL:
        pytest.skip("it takes minutes; EVERY_NETWORK=1 runs it, and its family's own tests run a small sibling")
    side, *others = (SMALL[name],) if name in SMALL else sides_of(name)
    shape = [None, 3, side, side]
    model = create_model(name)
    assert count(model) > 0
    check_one_step_changes_every_parameter(model, shape)
    check_fused_is_the_same_function(model, shape, *([None, 3, other, other] for other in others))
    check_exports(model, shape, tmp_path / str(side))
    for other in others:
        check_exports(model, [None, 3, other, other], tmp_path / str(other), forms=(True,))


@pytest.mark.skipif(bool(missing_for_onnx()), reason=missing_for_onnx() or "all there")
@pytest.mark.parametrize("name", list_models())
def test_an_onnx_file_takes_every_size_that_the_export_takes(name, tmp_path):
    if not EVERY and name not in {*SMALL, "ResNet10_DCD"}:
        pytest.skip("it takes minutes; EVERY_NETWORK=1 runs it, and its family's small sibling always")
    sides = (32, 64) if name in SMALL and name != "RepMLP_CIFAR" else sides_of(name)
    if len(sides) == 1:
        pytest.skip("the network itself takes one size only")
    shapes = [[None, 3, side, side] for side in sides]
    model = create_model(name)
    randomise_and_settle(model, shapes[0])
    fused, _ = reparameterize(model, fold_bn=True, input_spec=[shapes[0]])
    export_inference(fused, tmp_path, [shapes[0]], options=ExportOptions(dynamic_size=True))
    if name in ONNX_OF_ONE_SIZE:
        with pytest.raises(ReparamError, match="converted to ONNX: .*pool2d. Adaptive only support static input shape"):
            export_onnx(tmp_path)
        return
    converted = OnnxModel(export_onnx(tmp_path))
    for shape in shapes:
        verify(model, converted, [shape]).raise_if_failed(f"onnxruntime, {shape}")


def test_the_catalogue_knows_every_network():
    assert {name for name, _ in catalogue.networks()} == set(list_models())
