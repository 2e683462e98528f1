"""What every network of this library must keep, as functions that raise AssertionError."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import paddle
from helpers import missing_for_onnx, randomise_batch_norms
from paddle import nn

from paddle_reparam.arithmetic.geometry import BATCH_NORMS
from paddle_reparam.deploy.checks import check_export
from paddle_reparam.deploy.export import export_inference
from paddle_reparam.deploy.onnx_export import export_onnx
from paddle_reparam.layers.branches import MiddleTapLayer
from paddle_reparam.layers.dcd import DCDConv2D
from paddle_reparam.surgery.flops import measure
from paddle_reparam.surgery.rewrite import reparameterize
from paddle_reparam.surgery.tracing import sample_inputs
from paddle_reparam.surgery.verify import settle_batch_norms, verify

Shape = list
#: A dynamic convolution puts out a square of its input. Over more residual blocks of them than this, an image that is
#: not quite like the batch that settled the BNs grows beyond all numbers, unless the blocks add little.
DYNAMIC_CONVOLUTIONS = 60


def count(model: nn.Layer) -> int:
    """Return how many numbers the trainable parameters have."""
    return sum(math.prod(p.shape) for p in model.parameters() if not p.stop_gradient)


def macs(model: nn.Layer, size: int) -> int:
    """Return the multiply-adds of an image; whatever was not counted is a fault."""
    model.eval()
    measured = measure(model, [[None, 3, size, size]])
    assert not measured.uncounted
    return measured.macs_per_image


def check_one_step_changes_every_parameter(model: nn.Layer, shape: Shape, batch: int = 4) -> None:
    """One step of Adam changes every trainable parameter, on random labels and with nothing dropped.

    Not of SGD: behind a layer scale that starts at 1e-6, float32 shows no change of a weight that starts at 1.
    """
    model.train()
    for layer in model.sublayers():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    trainable = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
    before = {name: p.numpy().copy() for name, p in trainable.items()}
    [x] = sample_inputs([shape], batch, seed=0, like=model)
    logits = model(x)
    labels = paddle.to_tensor(np.arange(batch) % logits.shape[1])
    nn.functional.cross_entropy(logits, labels).backward()
    paddle.optimizer.Adam(0.01, parameters=list(trainable.values())).step()
    assert trainable
    same = [name for name, p in trainable.items() if np.array_equal(p.numpy(), before[name])]
    assert not same, f"unchanged after one step: {same}"


def randomise_and_settle(model: nn.Layer, shape: Shape) -> None:
    """Give every batch norm weights of its own and the statistics of one batch; leave the model in eval mode."""
    randomise_batch_norms(model)
    if sum(isinstance(layer, DCDConv2D) for layer in model.sublayers()) > DYNAMIC_CONVOLUTIONS:
        for name, layer in model.named_sublayers():
            if name.endswith("bn3"):
                layer.weight.set_value(0.2 * layer.weight)
    for layer in model.sublayers():
        if isinstance(layer, MiddleTapLayer):
            # A channel that its ReLU lets nothing of through in that batch has no variance there. Behind the next BN it
            # is a thousand times as large in an image of another kind, and a deep network then answers to 1e-6 of its
            # input with another output.
            for bn in layer.sublayers():
                if isinstance(bn, BATCH_NORMS):
                    bn.bias.set_value(bn.bias.abs())
    settle_batch_norms(model, [shape])


def check_fused_is_the_same_function(model: nn.Layer, shape: Shape, *other_shapes: Shape) -> nn.Layer:
    """The fused network computes the same, also at other sizes, and for its own size alone; return it."""
    randomise_and_settle(model, shape)
    fused, report = reparameterize(model, fold_bn=True, input_spec=[shape])
    assert "layers in train form" not in report.left_over
    for spec in ([shape], *([other] for other in other_shapes)):
        verify(model, fused, spec, batches=2).raise_if_failed(f"fused, {spec}")
    fitted, _ = reparameterize(model, fold_bn=True, input_spec=[shape], fixed_size=True)
    verify(model, fitted, [shape], batches=2).raise_if_failed("fused for one size")
    return fused


def check_exports(model: nn.Layer, shape: Shape, folder: Path, forms: tuple[bool, ...] = (False, True)) -> None:
    """The Executor and the Predictor, with and without oneDNN, compute what the train form does, at two batch sizes.

    `forms`: whether the network is fused for one size. If it is, onnxruntime computes the same too, where it is there.
    """
    randomise_and_settle(model, shape)
    for fixed_size in forms:
        fused, _ = reparameterize(model, fold_bn=True, input_spec=[shape], fixed_size=fixed_size)
        target = folder / f"fixed_{fixed_size}"
        export_inference(fused, target, [shape])
        with_onnx = fixed_size and not missing_for_onnx()
        if with_onnx:
            export_onnx(target)
        reports = check_export(target, model, [shape])
        assert len(reports) >= (8 if with_onnx else 6)  # more where OpenVINO is
        for name, report in reports.items():
            report.raise_if_failed(f"{name}, fixed_size={fixed_size}")
