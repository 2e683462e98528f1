"""What Paddle, its exports and their converters do where a good guess is wrong, met by a network of one's own."""

import paddle
import pytest
from helpers import randomise_batch_norms, relative_error
from paddle import nn
from paddle.nn.utils import spectral_norm, weight_norm

from paddle_reparam import checkpoints, save
from paddle_reparam.export import FORMATS, ExportOptions, export_inference, load_program
from paddle_reparam.old_programs import HAS_NEW_PROGRAMS

SPEC = [[None, 3, 8, 8]]
every_format = pytest.mark.parametrize("file_format", FORMATS if HAS_NEW_PROGRAMS else FORMATS[1:])


def around(*layers):
    """Return a network in eval mode of these layers, for 4 channels, behind a convolution and its BN."""
    net = nn.Sequential(nn.Conv2D(3, 4, 3, padding=1), nn.BatchNorm2D(4), *layers)
    randomise_batch_norms(net)
    net.eval()
    return net


@every_format
@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_a_weight_that_is_computed_before_each_pass_is_exported_as_loaded(tmp_path, norm, file_format):
    """Tracing alone stores the weight of the last pass as a constant: the random one of before the loading."""
    trained = around(norm(nn.Conv2D(4, 4, 3)))
    x = paddle.randn([2, 3, 8, 8])
    expected = trained(x)
    save(trained.state_dict(), tmp_path / "weights.pdparams")
    model = around(norm(nn.Conv2D(4, 4, 3)))
    checkpoints.load_into(model, tmp_path / "weights.pdparams")
    names = list(model.state_dict())
    export_inference(model, tmp_path, SPEC, options=ExportOptions(file_format))
    assert relative_error(load_program(tmp_path)(x), expected) < 1e-6
    assert relative_error(model(x), expected) < 1e-6
    assert list(model.state_dict()) == names
