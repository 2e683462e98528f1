"""ONNX files beside a release: the same function in onnxruntime, for each family of networks."""

import os
import sys
from importlib import metadata

import numpy as np
import paddle
import pytest
from helpers import missing_for_onnx, relative_error
from network_contract import check_exports
from test_released import PIXELS, Net, released

from paddle_reparam import check_release, create_model
from paddle_reparam.deploy import onnx_export, steps
from paddle_reparam.deploy.export import ExportOptions, export_inference
from paddle_reparam.deploy.onnx_export import OPSET, PACKAGES, export_onnx
from paddle_reparam.deploy.programs import program_file
from paddle_reparam.deploy.released import read_manifest
from paddle_reparam.deploy.runtimes import onnx_runtime
from paddle_reparam.deploy.runtimes.onnx_runtime import ONNX_FILE, OnnxModel
from paddle_reparam.errors import ReparamError

needs_onnx = pytest.mark.skipif(bool(missing_for_onnx()), reason=missing_for_onnx() or "all there")


@needs_onnx
def test_a_release_with_onnx_is_compared_and_checked(tmp_path):
    net = released(tmp_path / "out", options=ExportOptions(onnx=True))
    checks = read_manifest(tmp_path / "out")["checks"]
    assert {"onnxruntime, batch 1", "onnxruntime, batch 3"} <= set(checks)
    assert checks["onnxruntime, batch 3"]["relative_error"] < 1e-5
    x = paddle.randn([4, 3, 16, 16])
    (actual,) = OnnxModel(tmp_path / "out" / ONNX_FILE).run(x.numpy())
    assert relative_error(actual, paddle.nn.functional.softmax(net(x))) < 1e-5
    assert check_release(tmp_path / "out", Net()).errors["onnxruntime"] < 1e-5
    onnx = onnx_runtime.need("onnx")
    assert [entry.version for entry in onnx.load(str(tmp_path / "out" / ONNX_FILE)).opset_import] == [OPSET]
    versions = read_manifest(tmp_path / "out")["versions"]
    assert {name: versions[name] for name in PACKAGES} == {name: metadata.version(name) for name in PACKAGES}


@needs_onnx
def test_pixels_hold_in_onnx_too_and_what_does_not_convert_is_one_sentence(tmp_path):
    released(tmp_path / "out", options=ExportOptions(normalization=PIXELS, onnx=True))
    pixels = np.zeros([1, 3, 16, 16], np.uint8)
    assert OnnxModel(tmp_path / "out" / ONNX_FILE).run(pixels)[0].shape == (1, 5)
    with pytest.raises(ReparamError, match="cannot be converted to ONNX: .*Adaptive only support static") as error:
        released(tmp_path / "never", options=ExportOptions(dynamic_size=True, onnx=True))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "never").exists()


@needs_onnx
def test_a_conversion_that_is_wrong_leaves_nothing(tmp_path, monkeypatch):
    onnx = onnx_runtime.need("onnx")

    def spoiled(folder, metadata=None):
        path = export_onnx(folder, metadata)
        model = onnx.load(str(path))
        for tensor in model.graph.initializer:
            if len(tensor.dims) == 4:
                array = onnx.numpy_helper.to_array(tensor) * np.float32(1.01)
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        onnx.save(model, str(path))

    monkeypatch.setattr(steps, "export_onnx", spoiled)
    with pytest.raises(ReparamError, match="(OpenVINO|onnxruntime), batch 1 is not the same function"):
        released(tmp_path / "out", options=ExportOptions(onnx=True))
    assert not (tmp_path / "out").exists()


@needs_onnx
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("ResNet10_DCD", 32),  # its last maps, of one pixel, are averaged to 2x2
        ("ResNet10_DCD", 64),
        ("ShuffleNetV1_x0_5_g3", 32),
        ("HBONet_x0_25", 64),
    ],
)
def test_a_network_converts(tmp_path, name, size):
    """Of the other families `test_every_network` converts a small one."""
    check_exports(create_model(name), [None, 3, size, size], tmp_path, forms=(True,))


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ReparamError, match=r"needs the package onnxruntime .*paddle-reparam\[onnx\]") as error:
        OnnxModel(tmp_path / ONNX_FILE)
    assert "\n" not in str(error.value)


@needs_onnx
def test_nothing_is_installed_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYGRAPHY_AUTOINSTALL_DEPS", "1")
    paddle2onnx = onnx_runtime.need("paddle2onnx")
    export, given = paddle2onnx.export, {}
    monkeypatch.setattr(paddle2onnx, "export", lambda *a, **k: given.update(k) or export(*a, **k))
    model = Net()
    export_inference(model, tmp_path, [[None, 3, 16, 16]])
    onnx_export.convert(program_file(tmp_path), tmp_path / ONNX_FILE, {})
    assert given["optimize_tool"] == "None"
    assert os.environ["POLYGRAPHY_AUTOINSTALL_DEPS"] == "0"
