"""NonLocal2D and GlobalContext2D: put behind a trained network's layers, trained, folded, exported."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from contract import randomise
from helpers import as_array, check_in_bfloat16, missing_for_onnx, relative_error
from paddle import nn

from paddle_reparam.deploy.export import export_inference
from paddle_reparam.deploy.onnx_export import export_onnx
from paddle_reparam.deploy.runtimes import get_runtime
from paddle_reparam.errors import ReparamError
from paddle_reparam.layers.global_context import GlobalContext2D
from paddle_reparam.layers.non_local import NonLocal2D
from paddle_reparam.surgery.rewrite import reparameterize
from paddle_reparam.weights.checkpoints import load_into

BLOCKS = {"non_local": NonLocal2D, "context": GlobalContext2D}


def network(blocks: bool = True) -> nn.Layer:
    """A small network of two stages, with a block at the end of each."""
    stages = [nn.Sequential(nn.Conv2D(3, 8, 3, padding=1), nn.BatchNorm2D(8), nn.ReLU())]
    stages.append(nn.Sequential(nn.Conv2D(8, 16, 3, 2, 1), nn.BatchNorm2D(16), nn.ReLU()))
    for stage, channels, (name, block) in zip(stages, (8, 16), BLOCKS.items() if blocks else ()):
        stage.add_sublayer(name, block(channels, channels // 2))
    return nn.Sequential(*stages, nn.Conv2D(16, 4, 1))


def test_a_network_takes_them_behind_its_layers_and_computes_what_it_did():
    """The names of a trained network's weights stay; what is new learns from the first steps on."""
    trained, taking = network(blocks=False), network()
    report = load_into(taking, trained.state_dict(), may_miss=[f"*.{name}.*" for name in BLOCKS])
    assert len(report.loaded) == len(trained.state_dict())
    x = paddle.randn([2, 3, 8, 6])
    for mode in ("eval", "train"):
        for each in (trained, taking):
            getattr(each, mode)()
        assert relative_error(taking(x), trained(x)) == 0.0
    optimizer = paddle.optimizer.SGD(0.1, parameters=taking.parameters())
    before = {name: as_array(p).copy() for name, p in taking.named_parameters() if not p.stop_gradient}
    for _ in range(3):
        taking(x).pow(2).mean().backward()
        optimizer.step()
        optimizer.clear_grad()
    same = {name for name, p in taking.named_parameters() if name in before and (as_array(p) == before[name]).all()}
    # These two a softmax takes away again: by how much the pixels match all alike.
    assert same <= {"0.non_local.p.bias", "1.context.conv_attn.bias"}


def exported() -> nn.Layer:
    model = randomise(network())
    model.eval()
    return reparameterize(model, fold_bn=True, input_spec=[[None, 3, 8, 6]])[0]


def test_their_bns_are_folded():
    model = randomise(network())
    model.eval()
    fused, report = reparameterize(model, fold_bn=True, input_spec=[[None, 3, 8, 6]])
    assert dict(report.touched)["0.non_local.norm"] == "folded into 0.non_local.z"
    assert not report.left_over
    x = paddle.randn([2, 3, 7, 9])
    assert relative_error(fused(x), model(x)) < 1e-5


def test_every_runtime_agrees(tmp_path):
    """A matrix product of maps behind a convolution is silently wrong in oneDNN where it reads them as they are."""
    fused = exported()
    runtimes = ["onednn", "no-onednn", "executor"]
    export_inference(fused, tmp_path / "one", [[None, 3, 8, 6]])
    if not missing_for_onnx():
        export_onnx(tmp_path / "one")
        runtimes.append("onnxruntime")
    for batch in (1, 3):
        x = np.random.default_rng(batch).standard_normal((batch, 3, 8, 6)).astype(np.float32)
        for runtime in runtimes:
            y = get_runtime(runtime).load(tmp_path / "one").run(x)[0]
            assert relative_error(y, fused(paddle.to_tensor(x))) < 1e-5, (batch, runtime)
    check_in_bfloat16(fused, [3, 8, 6], tmp_path / "bfloat16")


def test_an_export_of_every_size(tmp_path):
    fused = exported()
    export_inference(fused, tmp_path, [[None, 3, None, None]])
    for runtime in map(get_runtime, ("onednn", "no-onednn", "executor")):
        loaded = runtime.load(tmp_path)
        for size in ((8, 6), (7, 9)):
            x = np.random.default_rng(0).standard_normal((2, 3, *size)).astype(np.float32)
            assert relative_error(loaded.run(x)[0], fused(paddle.to_tensor(x))) < 1e-5, size


@pytest.mark.parametrize("block", BLOCKS.values())
def test_channels_that_are_none(block):
    with pytest.raises(ReparamError, match=f"{block.__name__} has no inner=0; choose a whole number of 1 or more"):
        block(8, 0)
