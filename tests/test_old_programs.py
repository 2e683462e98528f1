"""Programs of Paddle 2, `.pdmodel`, written and read by this Paddle."""

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from network_contract import randomise_and_settle
from paddle import nn

from paddle_reparam.deploy.checks import check_export
from paddle_reparam.deploy.export import ExportOptions, export_inference
from paddle_reparam.deploy.old_programs import old_programs
from paddle_reparam.errors import ReparamError
from paddle_reparam.registry import create_model
from paddle_reparam.surgery.rewrite import reparameterize

SHAPE = [None, 3, 8, 8]
OLD = ExportOptions(file_format="pdmodel")
#: One network for each function that the fused forms, or PaddleClas' backbones, call.
NETWORKS = {"ResNet20_SPConv": 32, "SLaK_micro": 32, "RepMLPNet_micro": 32, "RepMLP_CIFAR": 32, "ResNet10_DCD": 64}

FUNCTIONS = {
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


class Calls(nn.Layer):
    """One function of the input times a weight: oneDNN's products are wrong for some outputs of convolutions."""

    def __init__(self, function):
        super().__init__()
        self.weight = self.create_parameter([3, 1, 1])
        self.function = function

    def forward(self, x):
        return self.function(self.weight * x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_is_written_as_it_is(name, tmp_path):
    paddle.seed(3)
    model = Calls(FUNCTIONS[name])
    model.eval()
    export_inference(model, tmp_path, [SHAPE], options=OLD)
    assert (tmp_path / "inference.pdmodel").is_file()
    for reader, report in check_export(tmp_path, model, [SHAPE]).items():
        report.raise_if_failed(f"{name}, {reader}")


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
    model = Calls(lambda x: paddle.logsumexp(x, axis=1, keepdim=True))
    model.eval()
    with pytest.raises(ReparamError, match=r"Calls cannot be exported: TypeError: .*logsumexp\(\)"):
        export_inference(model, tmp_path, [SHAPE], options=OLD)
