"""The papers' figures: each number against one that is known by hand, and the command that writes them."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from helpers import as_array, randomise_batch_norms, relative_error
from paddle import nn
from PIL import Image

from paddle_reparam import analysis, replace
from paddle_reparam.analysis import dcd, refconv, repmlp, slak, spconv
from paddle_reparam.analysis.figures import FIGURES
from paddle_reparam.errors import ReparamError
from paddle_reparam.layers.dcd import DCDConv2D, DCDLinear
from paddle_reparam.layers.dcd_matrix import DCDDepthwiseConv2D, DCDMatrixConv2D
from paddle_reparam.layers.refconv import RefConv2D
from paddle_reparam.layers.replknet import ReparamLargeKernelConv2D
from paddle_reparam.layers.repmlp import RepMLP
from paddle_reparam.layers.repmlpnet import RepMLPBlock
from paddle_reparam.layers.slak import DecomposedLargeKernelConv2D
from paddle_reparam.layers.spconv import SPConv2D
from paddle_reparam.weights import checkpoints

ROOT = Path(__file__).resolve().parents[1]


def fill(parameter, array) -> None:
    parameter.set_value(paddle.to_tensor(np.asarray(array)).astype(parameter.dtype))


def of(*layers) -> nn.Layer:
    """Return a network of some layers in eval mode."""
    model = nn.Sequential(*layers)
    model.eval()
    return model


def noise(*shape) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape)


# ---------------------------------------------------------------------------------------------------------------------
# RefConv


def refocusing(in_channels=6, out_channels=6, groups=6, init="xavier", k=3) -> RefConv2D:
    layer = RefConv2D(in_channels, out_channels, k, groups=groups, init=init)
    fill(layer.weight, noise(*layer.weight.shape))
    layer.eval()
    return layer


def test_connectivity_is_the_sum_of_absolute_weights_per_pair_of_channels():
    layer = refocusing(70, 70, 70)
    refocus = as_array(layer.convmap.weight)
    [row] = refconv.analyze(of(layer))
    assert row.connectivity.shape == (64, 64)
    for i, j in ((0, 0), (3, 61), (61, 3)):
        assert row.connectivity[i, j] == pytest.approx(sum(abs(v) for v in refocus[i, j].reshape(-1)))


def test_connectivity_is_of_depthwise_convolutions_only():
    [row] = refconv.analyze(of(refocusing(4, 6, groups=2)))
    assert row.connectivity.size == 0


def test_divergence_is_that_of_the_softmaxed_kernel_channels():
    kernel = noise(5, 3, 3, 3)
    planes = [plane.reshape(-1) for filters in kernel for plane in filters]
    p = [np.exp(plane) / np.exp(plane).sum() for plane in planes]
    matrix = refconv.divergence(kernel, channels=8)
    assert matrix.shape == (8, 8)
    for i, j in ((0, 1), (1, 0), (7, 2)):
        assert matrix[i, j] == pytest.approx(sum(a * np.log(a / b) for a, b in zip(p[i], p[j])))
    assert np.abs(np.diag(matrix)).max() < 1e-12
    # Large weights overflow a softmax that is not shifted.
    assert np.isfinite(refconv.divergence(1000 * kernel)).all()


def test_equal_channels_do_not_diverge_and_one_channel_has_no_mean():
    assert refconv.mean_divergence(refconv.divergence(np.ones((4, 1, 3, 3)))) == pytest.approx(0.0, abs=1e-12)
    assert refconv.mean_divergence(refconv.divergence(np.ones((1, 1, 3, 3)))) is None


def test_mean_divergence_leaves_the_diagonal_out():
    assert refconv.mean_divergence(np.array([[5.0, 1.0], [3.0, 7.0]])) == pytest.approx(2.0)


def test_relative_change_of_a_kernel_that_was_not_refocused_is_zero_and_of_a_doubled_one_is_one():
    layer = refocusing(init="zero")
    [row] = refconv.analyze(of(layer))
    assert row.relative_change == 0.0
    # The centre tap of the channel itself: T is then the base weight again.
    fill(layer.convmap.weight, np.eye(6)[:, :, None, None] * np.pad([[1.0]], 1))
    [row] = refconv.analyze(of(layer))
    assert row.relative_change == pytest.approx(1.0, rel=1e-6)
    np.testing.assert_allclose(row.divergence_of_refocused, refconv.divergence(2 * as_array(layer.weight)), rtol=1e-5)
    assert row.base_divergence == pytest.approx(refconv.mean_divergence(refconv.divergence(as_array(layer.weight))))


# ---------------------------------------------------------------------------------------------------------------------
# SPConv


class Twice(nn.Layer):
    """A layer that runs two times in a pass, and one that may not run at all."""

    def __init__(self, layer, idle=None):
        super().__init__()
        self.layer, self.idle = layer, idle

    def forward(self, x):
        return self.layer(self.layer(x))


def test_gate_of_constant_paths_is_known():
    layer = SPConv2D(4, 4)
    for norm, bias in ((layer.bn1, [0.0, 1.0, 2.0, -1.0]), (layer.bn2, [0.0, 0.0, 0.5, 1.0])):
        fill(norm.weight, np.zeros(4))
        fill(norm.bias, bias)
    layer.eval()
    [row] = spconv.analyze(of(layer), noise(5, 4, 6, 6).astype("float32"))
    expected = 1 / (1 + np.exp(-np.array([0.0, 1.0, 1.5, -2.0])))
    np.testing.assert_allclose(row.mean, expected, rtol=1e-6)
    np.testing.assert_allclose(row.deviation, np.zeros(4), atol=1e-7)
    assert row.gate == pytest.approx(expected.mean(), rel=1e-6)
    assert row.spread_of_channels == pytest.approx(expected.std(), rel=1e-6)
    assert (row.representative, row.uncertain) == (2, 2)


@pytest.mark.parametrize("count", [5, 70])
def test_gate_is_the_share_that_the_layer_uses(count):
    layer = SPConv2D(4, 6)
    randomise_batch_norms(layer)
    layer.eval()
    x = noise(count, 4, 6, 6).astype("float32")
    [row] = spconv.analyze(of(layer), x)
    with paddle.no_grad():
        first, rest = paddle.split(paddle.to_tensor(x), 2, axis=1)
        u3 = layer.bn1(layer.gwc(first) + layer.pwc(first)).numpy()
        u1 = layer.bn2(layer.conv1x1(rest)).numpy()
        out = layer(paddle.to_tensor(x)).numpy()
    gate = 1 / (1 + np.exp(-(u3 - u1).mean((2, 3))))
    np.testing.assert_allclose(
        gate[:, :, None, None] * u3 + (1 - gate)[:, :, None, None] * u1, out, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(row.mean, gate.mean(0), rtol=1e-5)
    np.testing.assert_allclose(row.deviation, gate.std(0), rtol=1e-4)
    assert row.spread_of_images == pytest.approx(gate.std(0).mean(), rel=1e-4)


def test_a_layer_that_did_not_run_is_an_error_and_leaves_no_hook():
    used, idle = SPConv2D(4, 4), SPConv2D(4, 4)
    model = of(Twice(used, idle))
    images = noise(2, 4, 6, 6).astype("float32")
    with pytest.raises(ReparamError, match="bn1.*did not run"):
        spconv.analyze(model, images)
    assert not used.bn1._forward_post_hooks
    [row] = spconv.analyze(of(Twice(used)), images)
    assert row.mean.shape == (4,)


# ---------------------------------------------------------------------------------------------------------------------
# Large kernels


def test_energy_of_a_flat_kernel_grows_with_the_square():
    np.testing.assert_allclose(slak.energy_within(np.full((2, 1, 5, 5), -3.0)), [1 / 25, 9 / 25, 1.0])
    strong_middle = np.pad([[-2.0]], 1, constant_values=1.0)[None, None]
    np.testing.assert_allclose(slak.energy_within(strong_middle), [4 / 12, 1.0])
    assert slak.energy_within(np.zeros((1, 1, 3, 3))).tolist() == [0.0, 0.0]


def test_smallest_side_that_holds_enough():
    within = np.array([0.1, 0.5, 0.89, 1.0])
    assert [slak.smallest_side(within, share) for share in (0.05, 0.5, 0.9)] == [1, 3, 7]
    assert slak.smallest_side(np.zeros(2), 0.5) == 3


def test_decomposed_kernel_is_analysed_as_the_cross_that_it_is():
    layer = DecomposedLargeKernelConv2D(2, 9, small_kernel=3, bn=False)
    tall, wide, small = noise(2, 1, 9, 3), noise(2, 1, 3, 9), noise(2, 1, 3, 3)
    tall[:, :, :3] = 0.0
    for branch, kernel in ((layer.LoRA1, tall), (layer.LoRA2, wide), (layer.small_conv, small)):
        fill(branch.conv.weight, kernel)
    layer.eval()
    whole = np.zeros((2, 1, 9, 9))
    whole[:, :, :, 3:6] += tall
    whole[:, :, 3:6] += wide
    whole[:, :, 3:6, 3:6] += small
    [row] = slak.analyze(of(layer))
    np.testing.assert_allclose(row.magnitude, np.abs(whole).mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(row.within, slak.energy_within(whole), rtol=1e-6)
    assert row.density == pytest.approx((2 * 18 + 2 * 27 + 2 * 9) / (2 * 63))
    assert (row.density_of_small, row.kernel, row.channels) == (1.0, "9x3 + 3x9 + 3x3", 2)


def test_undecomposed_kernel_holds_the_folded_norms():
    layer = ReparamLargeKernelConv2D(3, 7)
    randomise_batch_norms(layer)
    layer.eval()
    fill(layer.small_conv.conv.weight, np.where(np.arange(25).reshape(5, 5) < 5, 0.0, noise(3, 1, 5, 5)))
    [row] = slak.analyze(of(layer))
    kernel = np.zeros((3, 1, 7, 7))
    for branch, cut in ((layer.lkb_origin, 0), (layer.small_conv, 1)):
        scale = as_array(branch.bn.weight) / np.sqrt(as_array(branch.bn._variance) + branch.bn._epsilon)
        kernel[:, :, cut : 7 - cut, cut : 7 - cut] += as_array(branch.conv.weight) * scale[:, None, None, None]
    assert relative_error(row.magnitude, np.abs(kernel).mean((0, 1))) < 1e-6
    assert row.density_of_small == pytest.approx(20 / 25)


# ---------------------------------------------------------------------------------------------------------------------
# DCD


def by_images_mean(layer, factors) -> nn.Layer:
    """Return a layer on `[N, 2, H, W]` whose Phi and Lambda are factors times the mean of the first channel."""
    first, scale = factors
    for name in ("fc_phi", "fc_scale"):
        linear = getattr(layer, name)
        fill(linear.weight, np.zeros(linear.weight.shape))
        if linear.bias is not None:
            fill(linear.bias, np.zeros(linear.bias.shape))
    squeeze = np.zeros(layer.fc[0].weight.shape)
    squeeze[0, 0] = 1.0
    fill(layer.fc[0].weight, squeeze)
    if layer.fc[0].bias is not None:
        fill(layer.fc[0].bias, np.zeros(layer.fc[0].bias.shape))
    for linear, factor in ((layer.fc_phi, first), (layer.fc_scale, scale)):
        weight = np.zeros(linear.weight.shape)
        weight[0] = factor
        fill(linear.weight, weight)
    return layer


def test_spread_of_the_papers_coefficients_over_images():
    layer = by_images_mean(DCDMatrixConv2D(4, 6, 1, latent_dimension=4, blocks=2), (-2.0, 3.0))
    images = np.ones((3, 4, 2, 2), "float32") * np.array([1.0, 2.0, 6.0], "float32")[:, None, None, None]
    [row] = dcd.analyze(of(layer), images)
    deviation = np.std([1.0, 2.0, 6.0])
    assert row.latent == 2
    assert (row.lambda_mean, row.lambda_spread) == pytest.approx((9.0, 3 * deviation))
    assert (row.phi_mean, row.phi_spread) == pytest.approx((6.0, 2 * deviation))
    np.testing.assert_allclose(row.scale, [[9.0] * 6, [3 * deviation] * 6], rtol=1e-6)
    np.testing.assert_allclose(row.phi, np.full((4, 2), -6.0), rtol=1e-6)
    np.testing.assert_allclose(row.phi_deviation, np.full((4, 2), 2 * deviation), rtol=1e-6)


@pytest.mark.parametrize("attention", [True, False])
def test_depthwise_layers_and_layers_without_attention(attention):
    layer = DCDDepthwiseConv2D(4, 3, channel_attention=attention)
    [row] = dcd.analyze(of(layer), noise(3, 4, 5, 5).astype("float32"))
    assert (row.lambda_mean is None, row.scale.shape) == ((False, (2, 4)) if attention else (True, (2, 0)))
    assert row.phi.shape == (4, 4)
    assert "-" in analysis.table_of([row]).splitlines()[2].split() or attention


def test_coefficients_of_the_released_layers_are_those_of_their_formula():
    layer, images = DCDConv2D(4, 6, 3, latent_dimension=2, squeezed_width=3), noise(5, 4, 6, 6).astype("float32")
    for linear in (layer.fc_phi, layer.fc_scale):
        fill(linear.weight, 4 * noise(*linear.weight.shape))
    [row] = dcd.analyze(of(layer), images)
    u = images.mean((2, 3)) @ as_array(layer.fc[0].weight)
    u = u * (np.clip(u @ as_array(layer.fc[1].fc[0].weight) + 3, 0, 6) / 3)
    scale = np.clip(u @ as_array(layer.fc_scale.weight) + 3, 0, 6) / 3
    phi = u @ as_array(layer.fc_phi.weight)
    np.testing.assert_allclose(row.scale, [scale.mean(0), scale.std(0)], rtol=1e-4)
    np.testing.assert_allclose(row.phi, phi.mean(0).reshape(2, 2), rtol=1e-4)
    expected = (scale.mean(), scale.std(0).mean(), np.abs(phi).mean(), phi.std(0).mean())
    assert (row.lambda_mean, row.lambda_spread, row.phi_mean, row.phi_spread) == pytest.approx(expected, rel=1e-4)


def test_classifiers_are_watched_too():
    network = nn.Sequential(nn.AdaptiveAvgPool2D(1), nn.Flatten(), DCDLinear(4, 7))
    [row] = dcd.analyze(of(network), noise(3, 4, 5, 5).astype("float32"))
    assert (row.path, row.latent, row.scale.shape) == ("0.2", 32, (2, 7))


# ---------------------------------------------------------------------------------------------------------------------
# RepMLP


def rep_mlps():
    """Both papers' layers, with two groups and partitions that are not square."""
    return [RepMLP(4, 4, 8, 10, 4, 5, reparam_conv_k=(1, 3), fc3_groups=2), RepMLPBlock(4, 4, 4, 5, (1, 3), 4, 2)]


@pytest.mark.parametrize("number", [0, 1])
def test_what_the_convolutions_are_of_the_fused_layer(number):
    layer = rep_mlps()[number]
    layer.eval()
    [row] = repmlp.analyze(of(layer))
    assert (row.partition, row.groups) == ("4x5", 2)
    assert 0 < row.share_of_convolutions < 1
    assert row.share_of_fc3 + row.share_of_convolutions == pytest.approx(1.0)
    fill(layer.fc3.weight, np.zeros(layer.fc3.weight.shape))
    [row] = repmlp.analyze(of(layer))
    assert (row.share_of_fc3, row.share_of_convolutions) == (0.0, 1.0)
    assert row.concentration_of_fused == pytest.approx(1.0)
    assert row.concentration_of_fc3 == 0.0


@pytest.mark.parametrize("number", [0, 1])
def test_the_middle_unit_reads_the_pixels_that_it_is_connected_to(number):
    layer = rep_mlps()[number]
    layer.eval()
    weight = np.zeros(layer.fc3.weight.shape)
    # From pixel (0, 3) to the middle one, (2, 2), in the layout [(group, out, pixel), (in, pixel), 1, 1].
    weight.reshape(2, -1, 20, weight.shape[1] // 20, 20)[:, :, 2 * 5 + 2, :, 3] = 7.0
    fill(layer.fc3.weight, weight)
    [row] = repmlp.analyze(of(layer))
    expected = np.zeros((4, 5))
    expected[0, 3] = 7.0 / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(row.unit_of_fc3, expected, atol=1e-6)
    assert (row.unit_of_fused > 0).sum() == 10


def test_shares_are_those_of_the_norms():
    layer = RepMLPBlock(2, 2, 3, 3, (1,), 1, 1)
    layer.eval()
    fill(layer.fc3.weight, np.full([9, 9, 1, 1], 2.0))
    fill(layer.repconv1.conv.weight, [[[[6.0]]]])
    [row] = repmlp.analyze(of(layer))
    # ||FC3|| = 2 * 9, ||identity|| = 6 * 3.
    assert row.share_of_convolutions == pytest.approx(0.5)


# ---------------------------------------------------------------------------------------------------------------------
# All papers


def test_analyze_finds_which_papers_layers_a_network_has():
    layers = [refocusing(4, 4, 4), SPConv2D(4, 4), ReparamLargeKernelConv2D(4, 7), RepMLPBlock(4, 4, 3, 3)]
    model = of(*layers, DCDConv2D(4, 4, 1))
    found = analysis.analyze(model, noise(3, 4, 6, 6).astype("float32"))
    assert {paper: [row.path for row in rows] for paper, rows in found.items()} == {
        "dcd": ["4"], "refconv": ["0"], "repmlp": ["3"], "slak": ["2"], "spconv": ["1"],
    }  # fmt: skip
    for rows in found.values():
        header, _, *lines = analysis.table_of(rows).splitlines()
        assert header.startswith("path")
        assert len(lines) == len(rows)
        json.dumps([analysis.numbers_of(row) for row in rows], allow_nan=False)


def test_a_model_without_such_layers_is_an_error():
    with pytest.raises(ReparamError, match="has no .*RefConv2D.* in train form"):
        analysis.analyze(nn.Sequential(nn.Conv2D(3, 4, 3)), noise(1, 3, 6, 6).astype("float32"))
    fused = of(refocusing())
    fused[0].re_parameterize()
    with pytest.raises(ReparamError, match="in train form"):
        refconv.analyze(fused)


def test_a_model_in_training_mode_is_an_error():
    images = noise(2, 4, 6, 6).astype("float32")
    for layer in (SPConv2D(4, 4), RepMLPBlock(4, 4, 3, 3), ReparamLargeKernelConv2D(4, 7)):
        with pytest.raises(ReparamError, match="training mode"):
            analysis.analyze(nn.Sequential(layer), images)


def test_numbers_that_are_not_finite_are_an_error():
    layer = refocusing()
    fill(layer.convmap.weight, np.full(layer.convmap.weight.shape, np.nan))
    with pytest.raises(ReparamError, match=r"^0: its relative_change is nan"):
        analysis.analyze(of(layer), noise(1, 6, 6, 6).astype("float32"))


# ---------------------------------------------------------------------------------------------------------------------
# The command

CONFIG = "ppcls_configs/digits/refconv/PPLCNet_x0_25_RefConv.yaml"
PLAIN = "ppcls_configs/digits/refconv/PPLCNet_x0_25.yaml"


@pytest.fixture(scope="module")
def command():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module("analyze")
    finally:
        sys.path.remove(str(ROOT / "tools"))


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Arguments for the command: 12 images, and the weights of a network that nobody trained."""
    from paddle_reparam.ppcls import setup

    monkeypatch.chdir(tmp_path)
    for number in range(12):
        Image.fromarray(np.full((8, 8), 20 * number, "uint8")).save(f"{number}.png")
    Path("val.txt").write_text("".join(f"{number}.png\t{number % 10}\n" for number in range(12)))
    setup()
    from paddle_reparam.ppcls.command import read_config
    from paddle_reparam.ppcls.reparam import build_train_form

    checkpoints.save(build_train_form(read_config(str(ROOT / CONFIG))).state_dict(), "weights.pdparams")
    return [
        "-c", str(ROOT / CONFIG), "--weights", "weights", "--output", "out",
        "-o", "DataLoader.Eval.dataset.image_root=./", "-o", "DataLoader.Eval.dataset.cls_label_path=val.txt",
    ]  # fmt: skip


def with_argument(given, name, value):
    return [value if before == name else argument for before, argument in zip(["", *given], given)]


def test_the_command_writes_the_table_the_json_and_the_picture(command, given, capsys):
    assert command.main([*given, "--images", "5"]) == 0
    printed = capsys.readouterr().out
    written = json.loads(Path("out/analysis.json").read_text())
    assert written["images"] == 5
    assert len(written["layers"]["refconv"]) == 14
    for row in written["layers"]["refconv"]:
        assert f"{row['path']} " in printed
        assert f"{row['relative_change']:.4g}" in printed
    with Image.open("out/refconv.png") as picture:
        assert len(picture.getcolors(1 << 24)) > 100
    assert sorted(path.name for path in Path("out").iterdir()) == ["analysis.json", "refconv.png"]


def refused(command, arguments, capsys) -> tuple[int, str]:
    """Return the exit code and the one line of the error; nothing may be left."""
    before = sorted(Path().iterdir())
    code = command.main(arguments)
    assert sorted(Path().iterdir()) == before
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return code, line


def test_what_the_command_refuses(command, given, capsys):
    Path("kept").mkdir()
    code, line = refused(command, with_argument(given, "--output", "kept"), capsys)
    assert (code, "kept exists already" in line) == (2, True)
    code, line = refused(command, with_argument(given, "--weights", "nowhere"), capsys)
    assert (code, "no weight file nowhere" in line) == (2, True)
    code, line = refused(command, [*given, "-o", "DataLoader.Eval.dataset.cls_label_path=gone.txt"], capsys)
    assert (code, "there is no gone.txt" in line) == (2, True)
    code, line = refused(command, with_argument(given, "-c", str(ROOT / PLAIN)), capsys)
    assert code == 1, "the weights have entries that the plain network has not"
    with pytest.raises(SystemExit, match="2"):
        command.main([*given, "--images", "0"])


def test_a_network_without_the_layers_is_refused(command, given, capsys):
    from paddle_reparam.ppcls.command import read_config
    from paddle_reparam.ppcls.reparam import build_train_form

    model = build_train_form(read_config(str(ROOT / PLAIN)))
    checkpoints.save(model.state_dict(), "plain.pdparams")
    arguments = with_argument(with_argument(given, "-c", str(ROOT / PLAIN)), "--weights", "plain.pdparams")
    code, line = refused(command, arguments, capsys)
    assert (code, " or RefConv2D or " in line) == (1, True)


@pytest.mark.parametrize("paper", sorted(analysis.PAPERS))
def test_every_paper_has_a_figure(paper):
    assert paper in FIGURES


def every_row(paths):
    """Return rows of every paper, as a network with layers of these paths would give them; paper -> rows, twice."""
    matrix, number = noise(9, 9) ** 2 / 1e7, dict(base_divergence=0.2, refocused_divergence=0.3, relative_change=0.1)
    none, gate = np.zeros((0, 0)), np.linspace(0.1, 0.9, 4)
    of_paths = {
        "dcd": lambda path: dcd.DCDRow(path, 9, 1.0, 0.1, 1e-7, 1e-8, matrix, matrix, matrix),
        "refconv": lambda path: refconv.RefConvRow(
            path, "3x3", **number, connectivity=matrix, divergence_of_base=matrix, divergence_of_refocused=matrix
        ),
        "refconv, dense": lambda path: refconv.RefConvRow(
            path, "3x3", **number, connectivity=none, divergence_of_base=matrix, divergence_of_refocused=matrix
        ),
        "repmlp": lambda path: repmlp.RepMLPRow(path, "9x9", 1, 0.4, 0.6, 0.1, 0.2, matrix, matrix),
        "slak": lambda path: slak.LargeKernelRow(path, "9x3 + 3x9", 4, 0.5, None, 3, 5, matrix, np.linspace(0.1, 1, 5)),
        "spconv": lambda path: spconv.SPConvRow(path, 2, 2, 0.5, 0.1, 0.1, gate, gate / 9),
    }  # fmt: skip
    return [(key.split(",")[0], [row(path) for path in paths]) for key, row in of_paths.items()]


@pytest.mark.parametrize("number", range(6))
def test_titles_do_not_meet_and_maps_have_axes_and_scales(number):
    """With the names of MobileNetV2's layers, and longer ones."""
    paths = [f"conv{i}._block{i}-1._bottleneck_conv._conv" for i in range(1, 18)]
    paths[0], paths[-1] = "conv", "backbone.stages.0.blocks.bottleneck_conv.depthwise." * 3 + "conv"
    paper, rows = every_row(paths)[number]
    figure = FIGURES[paper](rows)
    figure.draw_without_rendering()
    maps = [axes for axes in figure.axes if axes.images]
    assert len(maps) == (0 if paper == "spconv" else 12 if number in (2, 3) else 6)
    bars = [axes.images[0].colorbar for axes in maps]
    for axes in [each for each in figure.axes if each.axison and each.get_title(loc="left")]:
        assert axes.get_xlabel()
        assert axes.get_ylabel()
    for axes, bar in zip(maps, bars):
        assert "layer " in axes.get_title(loc="left")
        assert bar.ax.get_ylabel()
        assert not bar.ax.yaxis.get_offset_text().get_text()
        assert bar.ax.get_window_extent().height == pytest.approx(axes.get_window_extent().height)
    titles = [text for axes in figure.axes for text in [axes._left_title] if text.get_text()] + [figure._suptitle]
    # A bar belongs to its map, and stands on the right of it.
    boxes = [each.get_window_extent() for each in [*titles, *figure.axes, *(bar.ax for bar in bars)]]
    for i, one in enumerate(boxes):
        assert figure.bbox.x0 <= one.x0
        assert one.x1 <= figure.bbox.x1
        for other in boxes[i + 1 :]:
            assert not one.overlaps(other)


def test_every_figure_can_be_drawn(command, tmp_path):
    dynamic = [DCDConv2D(4, 4, 3), DCDMatrixConv2D(4, 4, 1, channel_attention=False)]
    model = nn.Sequential(SPConv2D(4, 4), ReparamLargeKernelConv2D(4, 3), *rep_mlps()[1:], *dynamic)
    convs = nn.Sequential(nn.Conv2D(4, 6, 3, padding=1), nn.Conv2D(6, 1, 3, padding=1))
    replace(convs, "RefConv2D")
    papers = analysis.analyze(of(model, convs), noise(3, 4, 8, 10).astype("float32"))
    command.write(tmp_path, papers, {})
    assert {path.name for path in tmp_path.iterdir()} == {"analysis.json", *(f"{paper}.png" for paper in papers)}
