"""Programs of Paddle 2, `.pdmodel`, written and read by this Paddle."""

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from network_contract import randomise_and_settle
from paddle import nn

from paddle_reparam.deploy.checks import check_export
from paddle_reparam.deploy.export import ExportOptions, export_inference
from paddle_reparam.deploy.old_programs import _operators, old_programs
from paddle_reparam.errors import ReparamError
from paddle_reparam.registry import create_model
from paddle_reparam.surgery.rewrite import reparameterize

SHAPE = [None, 3, 8, 8]
OLD = ExportOptions(file_format="pdmodel")
#: One network for each function that the fused forms, or PaddleClas' backbones, call.
NETWORKS = {"ResNet20_SPConv": 32, "SLaK_micro": 32, "RepMLPNet_micro": 32, "RepMLP_CIFAR": 32, "ResNet10_DCD": 64}

FUNCTIONS = {
    "acos": lambda x: paddle.acos(paddle.tanh(x)),
    "acosh": lambda x: paddle.acosh(1.5 + x * x),
    "all": lambda x: paddle.all(x > -1.5, axis=1, keepdim=True),
    "amax": lambda x: paddle.amax(x, axis=[2, 3]),
    "amin": lambda x: paddle.amin(x, axis=1),
    "any": lambda x: paddle.any(x > 1.0, axis=-1),
    "any of all": lambda x: paddle.any(paddle.abs(x) > 0.1),
    "argmax": lambda x: paddle.argmax(x, axis=1),
    "argmax of the last axis": lambda x: x.argmax(axis=-1, keepdim=True, dtype="int32"),
    "argmax of all": paddle.argmax,
    "argmin": lambda x: paddle.argmin(x, axis=2),
    "asin": lambda x: paddle.asin(paddle.tanh(x)),
    "atanh": lambda x: paddle.atanh(0.9 * paddle.tanh(x)),
    "bmm": lambda x: paddle.bmm(x.flatten(2), x.flatten(2).transpose([0, 2, 1])),
    "ceil": lambda x: paddle.ceil(4 * x),
    "cosh": paddle.cosh,
    "diagonal": lambda x: paddle.diagonal(x, offset=1, axis1=2, axis2=3),
    "dot": lambda x: paddle.dot(x.flatten(0, 2), x.flatten(0, 2)),
    "expand_as": lambda x: paddle.expand_as(x[:, :1], x),
    "expm1": paddle.expm1,
    "greater_than": lambda x: paddle.greater_than(x, x * x),
    "grid_sample": lambda x: F.grid_sample(x, paddle.tanh(x[:, :2].transpose([0, 2, 3, 1])), align_corners=False),
    "grid_sample, nearest": lambda x: F.grid_sample(
        x, 1.2 * paddle.tanh(x[:, 1:].transpose([0, 2, 3, 1])), "nearest", "border"
    ),
    "isclose": lambda x: paddle.isclose(x, x.round(), rtol=0.1, atol=0.2),
    "isfinite": lambda x: paddle.isfinite(paddle.log(x)),
    "isinf": lambda x: paddle.isinf(1 / F.relu(x)),
    "isnan": lambda x: paddle.isnan(paddle.sqrt(x)),
    "log10": lambda x: paddle.log10(2 + x * x),
    "log1p": lambda x: paddle.log1p(x * x),
    "log2": lambda x: paddle.log2(2 + x * x),
    "logical_and": lambda x: paddle.logical_and(x > 0, x < 1),
    "logical_not": lambda x: paddle.logical_not(x > 0),
    "logical_or": lambda x: paddle.logical_or(x > 1, x < 0),
    "logical_xor": lambda x: paddle.logical_xor(x > -1, x > 1),
    "logsumexp": lambda x: paddle.logsumexp(x, axis=1, keepdim=True),
    "logsumexp of all": paddle.logsumexp,
    "roll": lambda x: paddle.roll(x, [1, -2], axis=[2, 3]),
    "roll of one axis": lambda x: paddle.roll(x, shifts=2, axis=1),
    "sinh": paddle.sinh,
    "softplus": lambda x: F.softplus(x, beta=2),
    "sum of truth values": lambda x: paddle.sum(x > 0, axis=[1, 2]),
    "tril": lambda x: paddle.tril(x, -1),
    "triu": paddle.triu,
    "abs": paddle.abs,
    "cos": paddle.cos,
    "exp": paddle.exp,
    "floor": lambda x: paddle.floor(4 * x),
    "gelu": F.gelu,
    "gelu of tanh": lambda x: F.gelu(x, approximate=True),
    "log": lambda x: paddle.log(2 + x * x),
    "matmul": lambda x: paddle.matmul(x, x),
    "matmul, left one transposed": lambda x: paddle.matmul(x, 0.5 * x, transpose_x=True),
    "matmul, right one transposed": lambda x: x.matmul(0.5 * x, transpose_y=True),
    "maximum": lambda x: paddle.maximum(x, x * x),
    "minimum": lambda x: paddle.minimum(x, x * x),
    "multiply": lambda x: paddle.multiply(x, F.relu(x)),
    "multiply, broadcast": lambda x: paddle.multiply(x, F.adaptive_avg_pool2d(x, 1)),
    "round": lambda x: paddle.round(4 * x),
    "rsqrt": lambda x: paddle.rsqrt(2 + x * x),
    "sigmoid": F.sigmoid,
    "sign": paddle.sign,
    "sin": paddle.sin,
    "sqrt": lambda x: paddle.sqrt(x * x),
    "sum": lambda x: paddle.sum(x),
    "sum of an axis": lambda x: paddle.sum(x, axis=1, keepdim=True),
    "sum of axes": lambda x: paddle.sum(x, axis=[2, 3], keepdim=True),
    "tanh": paddle.tanh,
}


#: So many are written into one program, as each program takes a second.
TOGETHER = 8


class Calls(nn.Layer):
    """Functions of the input times a weight: oneDNN's products are wrong for some outputs of convolutions."""

    def __init__(self, *functions):
        super().__init__()
        self.weight = self.create_parameter([3, 1, 1])
        self.functions = functions

    def forward(self, x):
        return [function(self.weight * x) for function in self.functions]


@pytest.mark.parametrize(
    "names", [[*FUNCTIONS][first : first + TOGETHER] for first in range(0, len(FUNCTIONS), TOGETHER)], ids=", ".join
)
def test_each_function_is_written_as_it_is(names, tmp_path):
    paddle.seed(3)
    model = Calls(*(FUNCTIONS[name] for name in names))
    model.eval()
    export_inference(model, tmp_path, [SHAPE], options=OLD)
    assert (tmp_path / "inference.pdmodel").is_file()
    for reader, report in check_export(tmp_path, model, [SHAPE]).items():
        report.raise_if_failed(f"{reader}, one of {', '.join(names)}")


def test_every_function_of_the_table_is_tried():
    """What this Paddle itself cannot write is in the table of what is written, and that is tried here."""
    tried = {name.partition(",")[0].partition(" of ")[0] for name in FUNCTIONS}
    assert set(_operators()) <= tried


@pytest.mark.parametrize("name", NETWORKS)
def test_fused_networks_of_all_papers_are_written(name, tmp_path):
    shape = [None, 3, NETWORKS[name], NETWORKS[name]]
    model = create_model(name)
    randomise_and_settle(model, shape)
    fused, _ = reparameterize(model, fold_bn=True, input_spec=[shape], fixed_size=True)
    export_inference(fused, tmp_path, [shape], options=OLD)
    for reader, report in check_export(tmp_path, model, [shape]).items():
        report.raise_if_failed(f"{name}, {reader}")


def fail_among_old_programs(x):
    with old_programs():
        # What is computed at once stays so while old programs are written.
        np.testing.assert_array_equal(paddle.matmul(x, x).numpy(), [[7.0, 10.0], [15.0, 22.0]])
        raise KeyError


def test_paddle_is_as_it_was_afterwards():
    x = paddle.to_tensor([[1.0, 2.0], [3.0, 4.0]])
    own = paddle._C_ops.matmul
    with pytest.raises(KeyError):
        fail_among_old_programs(x)
    assert paddle._C_ops.matmul is own


@pytest.mark.skipif(
    "generated" not in paddle.logsumexp.__module__, reason="this Paddle itself writes all functions into old programs"
)
def test_a_function_that_cannot_be_written_is_named(tmp_path):
    model = Calls(lambda x: paddle.index_put(x, (x > 0.5,), x.sum()))
    model.eval()
    with pytest.raises(ReparamError, match=r"Calls cannot be exported: TypeError: .*index_put\(\)"):
        export_inference(model, tmp_path, [SHAPE], options=OLD)
