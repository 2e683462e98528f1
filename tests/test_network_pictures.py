"""Loss landscapes and receptive fields: against what is known by hand, before and after fusing, and by the command."""

import importlib
import json
import sys
from pathlib import Path

import measured_tables
import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from helpers import as_array, randomise_batch_norms, relative_error
from paddle import nn
from PIL import Image

from paddle_reparam import create_model, reparameterize, replace
from paddle_reparam.analysis import landscape, observe, receptive_field
from paddle_reparam.analysis.network_figures import draw_fields, draw_landscape
from paddle_reparam.deploy.export import ExportOptions, export_inference
from paddle_reparam.deploy.gradients import DifferentiatedProgram
from paddle_reparam.errors import ReparamError
from paddle_reparam.surgery.tracing import walk
from paddle_reparam.weights import checkpoints

ROOT = Path(__file__).resolve().parents[1]


def fill(parameter, array) -> None:
    parameter.set_value(paddle.to_tensor(np.asarray(array)).astype(parameter.dtype))


def noise(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def small_network() -> nn.Layer:
    """A network with a dense, a grouped and a depthwise convolution, a 1x1, BNs and a classifier, in eval mode."""
    paddle.seed(0)
    model = nn.Sequential(
        nn.Conv2D(3, 8, 3, padding=1, bias_attr=False), nn.BatchNorm2D(8), nn.ReLU(),
        nn.Conv2D(8, 8, 3, stride=2, padding=1, groups=8), nn.BatchNorm2D(8), nn.Conv2D(8, 6, 1), nn.ReLU(),
        nn.Conv2D(6, 6, 5, padding=2, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2D(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    randomise_batch_norms(model)
    model.eval()
    return model


IMAGES, LABELS = noise(12, 3, 10, 10), np.arange(12)[:, None] % 4


def cross_entropy_of(model):
    return lambda: landscape.mean_loss(model, IMAGES, LABELS, F.cross_entropy)


# ---------------------------------------------------------------------------------------------------------------------
# Loss landscape


class Squares(nn.Layer):
    """What has a loss that is known everywhere: the sum of the squares of its weights."""

    def __init__(self, seed=0, scale=1.0):
        super().__init__()
        self.linear, self.conv = nn.Linear(3, 2), nn.Conv2D(2, 4, 3)
        fill(self.linear.weight, scale * noise(3, 2, seed=seed))
        fill(self.conv.weight, scale * noise(4, 2, 3, 3, seed=seed + 1))
        self.eval()

    def loss(self) -> float:
        return float((self.linear.weight**2).sum() + (self.conv.weight**2).sum())


def test_filters_of_a_direction_have_the_norms_of_the_networks():
    model = Squares()
    fill(
        model.conv.weight,
        noise(4, 2, 3, 3) * (noise(4, 2, 3, 3, seed=5) > 0) * np.array([1, 2, 3, 0])[:, None, None, None],
    )
    weights = landscape.weights_of(model)
    assert set(weights) == {"linear.weight", "conv.weight"}, "biases stay"
    direction = landscape.draw_direction(weights, [0, 0])
    conv, linear = as_array(model.conv.weight), as_array(model.linear.weight)
    np.testing.assert_allclose(
        *(np.linalg.norm(each.reshape(4, -1), axis=1) for each in (direction["conv.weight"], conv)), rtol=1e-6
    )
    # Paddle has the weights of one output in a column.
    np.testing.assert_allclose(
        *(np.linalg.norm(each, axis=0) for each in (direction["linear.weight"], linear)), rtol=1e-6
    )
    assert ((conv == 0) == (direction["conv.weight"] == 0)).all(), "what a mask holds at zero stays there"
    again, other = (landscape.draw_direction(weights, seed) for seed in ([0, 0], [0, 1]))
    assert (again["conv.weight"] == direction["conv.weight"]).all()
    assert relative_error(other["conv.weight"], direction["conv.weight"]) > 0.1


def test_what_is_frozen_does_not_move():
    model = small_network()
    replace(model, "RefConv2D", where="0")
    model[11].weight.stop_gradient = True
    assert set(landscape.moved_parameters(model)) == {"0.convmap.weight", "3.weight", "5.weight", "7.weight"}


def test_losses_are_those_of_the_weights_at_each_place():
    model = Squares()
    weights, before = landscape.weights_of(model), model.loss()
    drawn = [landscape.draw_direction(weights, [0, k]) for k in range(3)]
    places = [{}, {0: 0.5}, {0: -1.0, 1: 0.25}, {2: 2.0}]
    found = landscape.losses(model, places, drawn.__getitem__, model.loss)
    expected = [
        sum(np.square(weights[path][0] + sum(x * drawn[k][path] for k, x in place.items())).sum() for path in weights)
        for place in places
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert model.loss() == before


def test_the_numbers_of_a_bowl_are_known():
    """Along d, ||w + x d||^2 = ||w||^2 + 2 x w.d + x^2 ||w||^2: half way it rises by ||w||^2 / 4, whatever d is."""
    models = {"small": Squares(), "large": Squares(scale=3.0)}
    rows = landscape.analyze({name: (each, each.loss) for name, each in models.items()}, points=5, directions=4)
    for row, (name, model) in zip(rows, models.items()):
        assert (row.network, row.parameters) == (name, 6 + 72)
        assert row.loss == pytest.approx(model.loss())
        assert row.sharpness == pytest.approx(model.loss() / 4, rel=1e-5)
        assert row.spread == pytest.approx(0.0, abs=1e-4)
        assert (row.surface.shape, row.cuts.shape) == ((5, 5), (4, 5))
        np.testing.assert_array_equal(row.axis, [-1, -0.5, 0, 0.5, 1])
        np.testing.assert_array_equal(row.cuts[0], row.surface[2])
        np.testing.assert_array_equal(row.cuts[1], row.surface[:, 2])
    assert [row.sharper for row in rows] == [None, 4]
    # The same draws: the larger weights' directions are as much larger.
    assert relative_error(rows[1].surface, 9 * rows[0].surface) < 1e-5
    radius = landscape.analyze({"one": (models["small"], models["small"].loss)}, radius=2.0, points=5, directions=2)
    assert radius[0].sharpness == pytest.approx(rows[0].loss, rel=1e-5)


def test_networks_of_other_shapes_are_not_compared_direction_by_direction():
    one, other = Squares(), nn.Linear(5, 3)
    other.eval()
    networks = {"one": (one, one.loss), "other": (other, lambda: float((other.weight**2).sum()))}
    assert [row.sharper for row in landscape.analyze(networks, points=5, directions=2)] == [None, None]


def test_a_network_is_afterwards_what_it_was():
    model = small_network()
    before = {name: as_array(value) for name, value in model.state_dict().items()}
    landscape.analyze({"x": (model, cross_entropy_of(model))}, points=5, directions=2)
    assert not any(layer.training for layer in model.sublayers(include_self=True))
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(as_array(value), before[name])


def test_norms_take_the_statistics_of_every_place():
    """A kernel that a BN follows may be twice as long: normalised anew, the network is the same function."""
    model = small_network()
    direction = {path: np.zeros_like(weight) for path, (weight, _) in landscape.weights_of(model).items()}
    direction["0.weight"] = as_array(model[0].weight).astype("float64")
    found = landscape.losses(model, [{}, {0: 1.0}, {0: 3.0}], lambda k: direction, cross_entropy_of(model))
    np.testing.assert_allclose(found, found[0], rtol=1e-4)
    fixed = cross_entropy_of(model)()
    assert abs(found[0] / fixed - 1) > 1e-3, "the statistics that the network holds are others"


def image_of(model, path, change) -> np.ndarray:
    """Return by how much the kernel that ships moves where the refocusing weight at a path moves by `change`."""
    layer = dict(walk(model))[path.removesuffix(".convmap.weight")]
    before, start = as_array(layer.reparameterize().weight), as_array(layer.convmap.weight)
    fill(layer.convmap.weight, start + change)
    after = as_array(layer.reparameterize().weight)
    fill(layer.convmap.weight, start)
    return after.astype("float64") - before


def test_refocused_networks_have_the_landscape_of_what_they_ship():
    """Wt = Wb + T(Wb; Wr) is linear in Wr: a straight line of it is a straight line of the kernel that ships, along
    T(Wb; dWr). BNs stand behind the layers in either form, and are normalised anew."""
    model = small_network()
    replace(model, "RefConv2D")
    fused, _ = reparameterize(model)
    weights = landscape.weights_of(model)
    drawn = [landscape.draw_direction(weights, [0, k]) for k in range(2)]
    refocused = [path for path in weights if path.endswith("convmap.weight")]
    assert len(refocused) == 3
    shipped = [
        {path.replace("convmap.", ""): image_of(model, path, change) if path in refocused else change
         for path, change in each.items()}
        for each in drawn
    ]  # fmt: skip
    assert set(shipped[0]) == set(landscape.weights_of(fused))
    places = [{0: x, 1: y} for x in (-1.0, 0.0, 0.5) for y in (-0.5, 0.0, 1.0)]
    trained = landscape.losses(model, places, drawn.__getitem__, cross_entropy_of(model))
    found = landscape.losses(fused, places, shipped.__getitem__, cross_entropy_of(fused))
    assert relative_error(found, trained) < 1e-5
    assert np.ptp(trained) > 0.05, "the places must differ"


def both_landscapes(layer) -> list[np.ndarray]:
    """Return the losses of a network in train form and fused, along directions that leave its layers alone."""
    model = small_network()
    replace(model, layer, where=["0", "3"])
    fused, _ = reparameterize(model)
    outside = {path: each for path, each in landscape.weights_of(model).items() if path in ("5.weight", "11.weight")}
    moved = {
        path: each.shape for form in (model, fused) for path, (each, _) in landscape.moved_parameters(form).items()
    }
    zero = {path: np.zeros(shape) for path, shape in moved.items()}
    drawn = [{**zero, **landscape.draw_direction(outside, [0, k])} for k in range(2)]
    places = [{}, {0: 0.5}, {0: -1.0, 1: 1.0}]
    return [landscape.losses(form, places, drawn.__getitem__, cross_entropy_of(form)) for form in (model, fused)]


@pytest.mark.parametrize("layer", ["RefConv2D", "WeightNormConv2D"])
def test_along_what_no_fusing_touches_both_forms_have_one_landscape(layer):
    trained, fused = both_landscapes(layer)
    assert relative_error(fused, trained) < 1e-5
    assert np.ptp(trained) > 0.05, "the places must differ"


def test_norms_inside_a_layer_are_gone_when_it_is_fused():
    """They took the statistics of every place, and what they are fused into keeps those of the training."""
    trained, fused = both_landscapes("RepVGG2D")
    assert relative_error(fused, trained) > 1e-3


def test_batches_are_as_equal_as_can_be(monkeypatch):
    monkeypatch.setattr(landscape, "BATCH", 5)
    sizes, model = [], small_network()
    monkeypatch.setattr(landscape.paddle, "to_tensor", lambda x, to=paddle.to_tensor: sizes.append(len(x)) or to(x))
    landscape.mean_loss(model, IMAGES[:11], LABELS[:11], F.cross_entropy)
    assert sizes[::2] == sizes[1::2] == [4, 4, 3]


def test_what_has_no_landscape_is_an_error():
    model = small_network()
    loss = cross_entropy_of(model)
    model.train()
    with pytest.raises(ReparamError, match="training mode"):
        landscape.analyze({"x": (model, loss)}, points=5, directions=2)
    model.eval()
    fill(model[11].weight, np.full([6, 4], np.nan))
    with pytest.raises(ReparamError, match=r"^x: its loss is not finite"):
        landscape.analyze({"x": (model, loss)}, points=5, directions=2)
    for parameter in model.parameters():
        parameter.stop_gradient = True
    with pytest.raises(ReparamError, match="no trainable weights"):
        landscape.analyze({"x": (model, loss)}, points=5, directions=2)


# ---------------------------------------------------------------------------------------------------------------------
# Effective receptive field


def field_of(model, images) -> tuple[str, np.ndarray]:
    path, _ = receptive_field.last_map(model, images[:1])
    return path, receptive_field.contributions(receptive_field.input_gradients(model, path), images)


def of_one_kernel(kernel, bias=100.0) -> nn.Layer:
    """A convolution, pooling and a classifier; with its bias the convolution puts out positive values."""
    conv = nn.Conv2D(kernel.shape[1], len(kernel), kernel.shape[2:], padding=kernel.shape[2] // 2)
    fill(conv.weight, kernel)
    fill(conv.bias, np.full(len(kernel), bias))
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2D(1), nn.Conv2D(len(kernel), 5, 1), nn.Flatten())
    model.eval()
    return model


def test_the_field_of_one_convolution_is_its_kernel():
    kernel = noise(2, 3, 5, 5)
    path, matrix = field_of(of_one_kernel(kernel), noise(3, 3, 12, 14))
    expected = np.zeros((12, 14))
    # Summed over output channels before it is clipped, over input channels afterwards.
    expected[4:9, 5:10] = np.maximum(kernel.sum(axis=0), 0).sum(axis=0)
    assert path == "0", "pooled maps have one pixel"
    np.testing.assert_allclose(matrix, expected, rtol=1e-5, atol=1e-6)


def test_only_positive_values_have_a_field():
    kernel = noise(2, 1, 3, 3)
    model = of_one_kernel(kernel)
    fill(model[0].bias, [100.0, -100.0])
    _, matrix = field_of(model, noise(1, 1, 9, 9))
    np.testing.assert_allclose(matrix[3:6, 3:6], np.maximum(kernel[0, 0], 0), rtol=1e-5)
    fill(model[0].bias, [-100.0, -100.0])
    with pytest.raises(ReparamError, match="zero everywhere"):
        field_of(model, noise(1, 1, 9, 9))


@pytest.mark.parametrize("form", ["train form", "frozen", "fused", "exported"])
def test_layer_norms_have_their_gradients_whatever_is_frozen(tmp_path, form):
    """Against differences: Paddle's own gradient is wrong on a CPU where that of the norm's weight is not asked for."""
    if form == "exported" and paddle.__version__ < "3":
        pytest.skip("Paddle 2 writes programs without gradients")
    paddle.seed(0)
    model = create_model("SLaK_micro", depths=[1, 1, 1, 1], patch_size=2)
    randomise_batch_norms(model)
    model.eval()
    for parameter in model.parameters():
        parameter.stop_gradient = parameter.stop_gradient or form == "frozen"
    for layer in model.sublayers():
        if isinstance(layer, nn.LayerNorm):
            fill(layer.weight, 1 + 0.5 * noise(*layer.weight.shape))
    image, change = noise(1, 3, 32, 32).astype("float64"), noise(1, 3, 32, 32, seed=1).astype("float64")
    network = model if form in ("train form", "frozen") else reparameterize(model, True, [[None, 3, 32, 32]])[0]
    if form == "exported":
        export_inference(network, tmp_path / "out", [[None, 3, 32, 32]])
        found = DifferentiatedProgram(tmp_path / "out").gradients(image.astype("float32"))
    else:
        path, _ = receptive_field.last_map(network, image.astype("float32"))
        found = receptive_field.input_gradients(network, path)(image.astype("float32"))
    assert model.stages[3][0].norm.weight.stop_gradient == (form == "frozen")
    model.to(dtype="float64")
    values = []

    def look(_layer, _given, output):
        values.append(float(receptive_field.middle_of(output)))

    hook = model.stages[3].register_forward_post_hook(look)
    for step in (1e-6, -1e-6):
        model(paddle.to_tensor(image + step * change))
    hook.remove()
    assert (found * change).sum() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-3)


def test_a_field_is_the_mean_over_images_whatever_the_batches(monkeypatch):
    model = small_network()
    path, matrix = field_of(model, IMAGES)
    assert path == "8"
    gradients = receptive_field.input_gradients(model, path)
    each = [receptive_field.contributions(gradients, image[None]) for image in IMAGES]
    assert relative_error(np.mean(each, axis=0), matrix) < 1e-5
    monkeypatch.setattr(receptive_field, "_PIXELS", 500)
    assert relative_error(receptive_field.contributions(gradients, IMAGES), matrix) < 1e-5


def test_areas_of_high_contribution_are_those_of_the_protocol():
    """Of the logarithms; squares of 3x3 and larger around the middle pixel, the one right of it in an even image."""
    even = np.full((10, 10), 9.0)
    # 3x3 holds 9 of 100, 5x5 25, 7x7 49, 9x9 81.
    areas = [receptive_field.high_contribution_area(even, share) for share in (0.05, 0.2, 0.3, 0.5, 0.8, 0.99)]
    assert areas == [0.09, 0.25, 0.49, 0.81, 0.81, 1.0]
    one = np.zeros((11, 11))
    one[5, 5] = 5.0
    assert receptive_field.high_contribution_area(one, 0.99) == 9 / 121
    one[5, 5], one[0, 0] = 10.0**4 - 1, 10.0**2 - 1
    np.testing.assert_allclose(receptive_field.displayed(one)[[5, 0], [5, 0]], [1.0, 0.5])
    np.testing.assert_allclose(receptive_field.shares_within(one)[[0, -1]], [2 / 3, 2 / 3])
    assert receptive_field.high_contribution_area(one, 0.7) == 1.0


def kinds_of_networks():
    """Networks in train form, with BNs that have seen data: each with another kind of layers."""
    for name in ("SLaK_micro", "ResNet20"):
        yield name, lambda name=name: create_model(name)
    for layer in ("RefConv2D", "RepVGG2D", "DBB2D", "DCDConv2D"):

        def build(layer=layer):
            model = small_network()
            replace(model, layer)
            return model

        yield layer, build


@pytest.mark.parametrize(("name", "build"), kinds_of_networks(), ids=lambda each: each if isinstance(each, str) else "")
def test_fusing_changes_no_receptive_field(name, build):
    paddle.seed(0)
    model = build()
    randomise_batch_norms(model)
    model.eval()
    images = noise(3, 3, 40, 40)
    fused, report = reparameterize(model, fold_bn=True, input_spec=[[None, 3, 40, 40]])
    assert report.touched
    path, trained = field_of(model, images)
    same, found = field_of(fused, images)
    assert same == path
    assert relative_error(found, trained) < 2e-5
    assert np.count_nonzero(trained) > 25


def test_a_stage_is_the_last_map_and_not_its_last_convolution():
    model = create_model("SLaK_micro")
    model.eval()
    assert receptive_field.last_map(model, noise(1, 3, 64, 64)) == ("stages.3", [1, 64, 2, 2])
    # Of images of 32 pixels the last stage's map has one, and inside it are maps with their channels last.
    assert receptive_field.last_map(model, noise(1, 3, 32, 32)) == ("downsample_layers.3.0", [1, 48, 2, 2])
    flat = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    flat.eval()
    with pytest.raises(ReparamError, match="no layer of this Sequential puts out a map"):
        receptive_field.last_map(flat, noise(1, 3, 4, 4))


new_programs = pytest.mark.skipif(paddle.__version__ < "3", reason="Paddle 2 writes programs without gradients")


@new_programs
def test_an_exported_program_has_the_field_of_its_network(tmp_path):
    model = small_network()
    fused, _ = reparameterize(model, fold_bn=True, input_spec=[[None, 3, 10, 10]])
    export_inference(fused, tmp_path / "json", [[None, 3, 10, 10]])
    program = DifferentiatedProgram(tmp_path / "json")
    assert program.shape[1:] == [6, 5, 5]
    found = receptive_field.contributions(program.gradients, IMAGES)
    assert relative_error(found, field_of(model, IMAGES)[1]) < 1e-5


def test_programs_without_gradients_are_refused(tmp_path):
    model = small_network()
    export_inference(model, tmp_path / "old", [[None, 3, 10, 10]], options=ExportOptions("pdmodel"))
    with pytest.raises(ReparamError, match=r"is a \.pdmodel, .* as json"):
        DifferentiatedProgram(tmp_path / "old")
    if paddle.__version__ > "3":
        export_inference(model, tmp_path / "any", [[None, 3, 10, 10]], options=ExportOptions(dynamic_size=True))
        with pytest.raises(ReparamError, match="does not take images of one size"):
            DifferentiatedProgram(tmp_path / "any")
        flat = nn.Sequential(nn.Flatten(), nn.Linear(300, 4))
        flat.eval()
        export_inference(flat, tmp_path / "flat", [[None, 3, 10, 10]])
        with pytest.raises(ReparamError, match="computes no map"):
            DifferentiatedProgram(tmp_path / "flat")


@pytest.fixture(scope="module")
def command():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module("analyze")
    finally:
        sys.path.remove(str(ROOT / "tools"))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def test_pictures_have_axes_and_one_scale():
    models = {f"output/refconv/network_{i}/latest.pdparams": Squares(scale=i + 1.0) for i in range(3)}
    rows = landscape.analyze({name: (each, each.loss) for name, each in models.items()}, points=5, directions=3)
    rows[2].surface[0, 0], rows[2].cuts[0, 0] = np.inf, np.nan
    figure = draw_landscape(rows)
    figure.draw_without_rendering()
    planes, lines = figure.axes[:3], figure.axes[3:6]
    assert len({tuple(axes.collections[0].levels) for axes in planes}) == 1
    assert len({axes.get_ylim() for axes in lines}) == 1
    matrices = [noise(64, 64, seed=k) ** 2 for k in range(5)]
    fields = [
        receptive_field.row_of(
            f"output/digits/network_{k // 2}/of_a_name/latest", "fused", "stages.3", [1, 8, 4, 4], 5, each, None
        )
        for k, each in enumerate(matrices)
    ]
    picture = draw_fields(fields)
    picture.draw_without_rendering()
    assert {axes.images[0].get_clim() for axes in picture.axes if axes.images} == {(0.0, 1.0)}
    for axes in [each for each in (*figure.axes, *picture.axes) if each.axison and each.get_title(loc="left")]:
        assert axes.get_xlabel()
        assert axes.get_ylabel()
    for drawn in (figure, picture):
        titles = [axes._left_title.get_window_extent() for axes in drawn.axes if axes.get_title(loc="left")]
        assert not [one for i, one in enumerate(titles) for other in titles[i + 1 :] if one.overlaps(other)]
    assert "area 20" in observe.table_of(fields).splitlines()[0]


@pytest.mark.parametrize("name", ["landscape_cifar10", "field_digits"])
def test_the_pages_show_what_was_measured(command, name):
    file = ROOT / "docs" / "measured" / f"{name}.json"
    pages = [
        page for page in (ROOT / "docs").glob("*.md") if measured_tables.to_markdown(file) in page.read_text("utf-8")
    ]
    assert len(pages) == 1
    assert f"(images/{name}.png)" in pages[0].read_text("utf-8")
    measured = json.loads(file.read_text())
    given = command.parser_of().parse_args(measured["command"].split()[2:])
    assert {row["network"] for row in measured["rows"]} == set(given.weights)
    with Image.open(ROOT / "docs" / "images" / f"{name}.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 30


# ---------------------------------------------------------------------------------------------------------------------
# The command

CONFIG = ROOT / "ppcls_configs/digits/refconv/PPLCNet_x0_25.yaml"
REFOCUSED = ROOT / "ppcls_configs/digits/refconv/PPLCNet_x0_25_RefConv.yaml"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with 12 images, two weight files of the plain network, one with RefConv, and a release of the first."""
    from paddle_reparam.ppcls import setup

    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number in range(12):
            pixels = np.random.default_rng(number).integers(0, 255, (8, 8), dtype="uint8")
            Image.fromarray(pixels).save(f"{number}.png")
        Path("list.txt").write_text("".join(f"{number}.png\t{number % 10}\n" for number in range(12)))
        setup()
        from paddle_reparam.ppcls import reparam
        from paddle_reparam.ppcls.command import read_config

        for name, config, seed in (("one", CONFIG, 0), ("two", CONFIG, 1), ("refocused", REFOCUSED, 0)):
            paddle.seed(seed)
            model = reparam.build_train_form(read_config(str(config)))
            randomise_batch_norms(model)
            for _, layer in walk(model):
                if type(layer).__name__ == "RefConv2D":
                    fill(layer.weight, 0.2 * noise(*layer.weight.shape))
            checkpoints.save(model.state_dict(), f"{name}.pdparams")
        if paddle.__version__ > "3":
            assert reparam.main([*_images_of("-c", str(CONFIG)), "--weights", "one", "--output", "released"]) == 0
    return folder


def _images_of(*arguments) -> list[str]:
    parts = [
        f"DataLoader.{part}.dataset.{key}"
        for part in ("Eval", "Train") for key in ("image_root=./", "cls_label_path=list.txt")
    ]  # fmt: skip
    return [*arguments, *(word for part in parts for word in ("-o", part))]


@pytest.fixture
def here(files, monkeypatch):
    monkeypatch.chdir(files)


def test_the_command_draws_landscapes_side_by_side(command, here, capsys):
    words = ["landscape", *_images_of("-c", str(CONFIG)), "--weights", "one", "two", "--output", "land"]
    assert command.main([*words, "--points", "5", "--directions", "3", "--radius", "0.5"]) == 0
    printed = capsys.readouterr().out
    written = json.loads(Path("land/landscape.json").read_text())
    assert written["command"].startswith("python tools/analyze.py landscape ")
    assert [row["network"] for row in written["rows"]] == ["one", "two"]
    assert [row["sharper"] is None for row in written["rows"]] == [True, False]
    for row in written["rows"]:
        assert f"{row['sharpness']:.4g}" in printed
        assert np.shape(row["surface"]) == (5, 5)
        assert np.shape(row["cuts"]) == (3, 5)
        assert row["axis"] == [-0.5, -0.25, 0.0, 0.25, 0.5]
        assert row["loss"] == pytest.approx(row["surface"][2][2], rel=1e-5)
    assert sorted(path.name for path in Path("land").iterdir()) == ["landscape.json", "landscape.png"]


def test_the_command_takes_a_config_for_each_weight_file(command, here, capsys):
    words = ["landscape", *_images_of("-c", str(CONFIG), str(REFOCUSED)), "--weights", "one", "refocused"]
    assert command.main([*words, "--output", "both", "--points", "5", "--directions", "2"]) == 0
    first, second = json.loads(Path("both/landscape.json").read_text())["rows"]
    assert second["sharper"] is None
    assert first["parameters"] != second["parameters"]


def test_the_command_finds_fields_before_and_after_fusing(command, here, capsys):
    words = ["field", *_images_of("-c", str(CONFIG)), "--weights", "one", "--output", "field", "--images", "5"]
    released = [] if paddle.__version__ < "3" else ["--release", "released"]
    assert command.main([*words, *released]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(Path("field/field.json").read_text())["rows"]
    assert [row["form"] for row in rows] == ["train form", "fused", "release"][: 2 + bool(released)]
    assert rows[0]["difference"] is None
    for row in rows:
        assert row["images"] == 5
        assert 0 < row["area_20"] <= row["area_30"] <= row["area_50"] <= row["area_99"] <= 1
        assert f"{row['area_50']:.4g}" in printed
        assert row["last_map"] == rows[0]["last_map"]
    assert all(row["difference"] < 2e-5 for row in rows[1:])
    assert sorted(path.name for path in Path("field").iterdir()) == ["field.json", "field.png"]


def test_images_are_enlarged(command, here):
    words = ["field", *_images_of("-c", str(REFOCUSED)), "--weights", "refocused", "--output", "large"]
    assert command.main([*words, "--images", "2", "--size", "24"]) == 0
    rows = json.loads(Path("large/field.json").read_text())["rows"]
    assert rows[0]["last_map"].endswith("x6x6")
    assert rows[1]["difference"] < 2e-5


REFUSED = [
    ("landscape --weights one gone", 2, "no weight file gone"),
    ("landscape --weights one refocused", 1, "refocused.pdparams"),
    ("landscape --weights one --points 7", 2, "give 5, 9, 13"),
    ("landscape --weights one --directions 1", 2, "from 2 on"),
    ("landscape --weights one --radius 0", 2, "no number above 0"),
    ("landscape --weights one --images 1", 2, "from 2 on"),
    ("landscape --weights one two -c CONFIG CONFIG CONFIG", 2, "one config for all of them, or one for each"),
    ("landscape --weights one -o Loss.Eval=[] -o Loss.Train=[]", 2, "Loss"),
    ("field", 2, "give --weights, --release or both"),
    ("field --release gone", 2, "gone"),
    ("field --weights one --size 2", 2, "from 3 on"),
    ("field --weights one --images 0", 2, "from 1 on"),
    ("field --weights one --images 1 -o DataLoader.Eval.dataset.cls_label_path=gone.txt", 2, "there is no gone.txt"),
]


@pytest.mark.parametrize(("line", "code", "said"), REFUSED)
def test_what_the_command_refuses(command, here, capsys, line, code, said):
    name, *words = line.replace("CONFIG", str(CONFIG)).split()
    try:
        found = command.main([name, *_images_of("-c", str(CONFIG)), *words, "--output", "refused"])
    except SystemExit as end:
        found = end.code
    errors = [each for each in capsys.readouterr().err.splitlines() if "error: " in each]
    assert (found, len(errors)) == (code, 1)
    assert said in errors[0]
    assert not Path("refused").exists()


@new_programs
def test_a_release_of_another_size_is_refused(command, here, capsys):
    words = ["field", *_images_of("-c", str(CONFIG)), "--release", "released", "--output", "refused", "--size", "16"]
    assert command.main(words) == 2
    assert "takes images of 3x8x8, and these are 3x16x16" in capsys.readouterr().err


@new_programs
def test_a_release_needs_no_weight_file(command, here):
    words = ["field", *_images_of("-c", str(CONFIG)), "--release", "released", "--output", "alone", "--images", "2"]
    assert command.main(words) == 0
    [row] = json.loads(Path("alone/field.json").read_text())["rows"]
    assert (row["form"], row["difference"]) == ("release", None)
