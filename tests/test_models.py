"""The networks: as large as published, open in batch and size, and strict about their arguments."""

from __future__ import annotations

import copy
import math

import paddle
import pytest
from helpers import randomise_batch_norms, relative_error

from paddle_reparam import models  # noqa: F401 - registers them
from paddle_reparam.errors import CheckpointError, ReparamError, UnknownName
from paddle_reparam.registry import create_model, list_models
from paddle_reparam.surgery.flops import measure
from paddle_reparam.weights.checkpoints import save

# Millions of parameters, and of multiply-adds at 224x224, counted with the published code.
PUBLISHED = {
    ("ResNet50_SPConv", 1 / 2): (18.345, 2907),
    ("ResNet50_SPConv", 1 / 4): (16.931, 2676),
    ("ResNet50_SPConv", 1 / 8): (16.223, 2561),
    ("ResNet18_SPConv", 1 / 2): (4.690, 743),
    ("ResNet18_SPConv", 1 / 4): (3.317, None),
    ("ResNet18_SPConv", 1 / 8): (2.630, None),
    ("ResNet20_SPConv", 1 / 2): (0.105, None),
    ("ResNet20_SPConv", 1 / 4): (0.0717, None),
    ("VGG16_SPConv", 1 / 2): (5.61, None),
    ("VGG16_SPConv", 1 / 4): (3.77, None),
    ("VGG16_SPConv", 1 / 8): (2.85, None),
    ("VGG16_SPConv", 1 / 16): (2.39, None),
}


@pytest.mark.parametrize(("name", "ratio"), PUBLISHED, ids=str)
def test_as_large_as_published(name, ratio):
    parameters, macs = PUBLISHED[name, ratio]
    model = create_model(name, ratio=ratio)
    count = sum(math.prod(p.shape) for p in model.parameters() if not p.stop_gradient) / 1e6
    digits = len(str(parameters).split(".")[1])
    assert round(count, digits) == parameters
    if macs is not None:
        model.eval()
        size = measure(model, [[None, 3, 32, 32]])
        assert not size.uncounted
        # At 224x224 every map has 49 times as many pixels; the fully connected layer stays as it is.
        last = math.prod(model.fc.weight.shape)
        assert ((size.macs_per_image - last) * 49 + last) / 1e6 == pytest.approx(macs, rel=0.001)


@pytest.mark.parametrize("name", ["ResNet34_SPConv", "ResNet101_SPConv"])
def test_the_other_depths(name):
    depth = int(name[6:-7])
    names = [n for n, layer in create_model(name).named_sublayers() if type(layer).__name__ == "SPConv2D"]
    assert len(names) == {34: 32, 101: 33}[depth]
    assert "layer1.0.conv2" in names
    assert "layer4.2.conv2" in names


@pytest.mark.parametrize("name", ["ResNet18_SPConv", "ResNet20_SPConv", "VGG16_SPConv"])
def test_open_in_batch_and_size(name):
    model = create_model(name, class_num=7)
    randomise_batch_norms(model)
    model.eval()
    spec = [paddle.static.InputSpec([None, 3, None, None], "float32")]
    traced = paddle.jit.to_static(copy.deepcopy(model), input_spec=spec, full_graph=True)
    for shape in ([1, 3, 32, 32], [2, 3, 45, 38]):
        x = paddle.randn(shape)
        with paddle.no_grad():
            assert model(x).shape == [shape[0], 7]
            assert relative_error(traced(x), model(x)) < 1e-5


def test_pretrained_is_a_weight_file(tmp_path):
    trained = create_model("ResNet20_SPConv")
    save(trained.state_dict(), tmp_path / "weights.pdparams")
    loaded = create_model("ResNet20_SPConv", pretrained=str(tmp_path / "weights.pdparams"))
    assert relative_error(loaded.fc.weight, trained.fc.weight) == 0
    with pytest.raises(CheckpointError, match="another shape"):
        create_model("ResNet20_SPConv", pretrained=str(tmp_path / "weights.pdparams"), ratio=0.25)


@pytest.mark.parametrize("name", list_models("*SPConv"))
def test_arguments_are_strict(name):
    for wish in ({"pretrained": True}, {"use_ssld": True}):
        with pytest.raises(ReparamError, match=f"no weights of {name} are published in Paddle's format; give"):
            create_model(name, class_num=2, **wish)
    with pytest.raises(UnknownName, match=f"{name} has no argument 'depth'; it takes .*class_num, ratio"):
        create_model(name, depth=3)
