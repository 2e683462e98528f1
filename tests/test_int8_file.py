"""An int8 file: channels made alike, layers that stay float32, and a file that is broken in each of many ways."""

import json

import int8_table
import numpy as np
import paddle
import pytest
from helpers import relative_error
from paddle import nn
from test_onnx import needs_onnx

from paddle_reparam.deploy.calibration import Activation
from paddle_reparam.deploy.runtimes.onnx_runtime import OnnxModel
from paddle_reparam.errors import ReparamError

pytestmark = needs_onnx

SIZE = 12


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).standard_normal([24, 3, SIZE, SIZE]).astype("float32")


def constants(spread):
    """Return the weights and biases of `network`."""
    draw = np.random.default_rng(0)
    factors = np.float32(spread) ** draw.uniform(0, 1, 8)
    weights = {
        "stem": draw.standard_normal([8, 3, 3, 3]) / 5,
        "wide": draw.standard_normal([8, 8, 3, 3]) / 8 * factors.reshape(-1, 1, 1, 1),
        "depthwise": draw.standard_normal([8, 1, 3, 3]) / 3 / factors.reshape(-1, 1, 1, 1),
        "dense": draw.standard_normal([8, 8, 1, 1]) / 3,
        "last": draw.standard_normal([8, 8, 3, 3]),
        "classifier": draw.standard_normal([8, 5]),
    }
    arrays = {f"{name}.weight": array for name, array in weights.items()}
    arrays.update({f"{name}.bias": draw.standard_normal(8) / 8 for name in weights})
    arrays["wide.bias"] *= factors
    arrays["classifier.bias"] = arrays["classifier.bias"][:5]
    return arrays


def network(path, spread=1.0):
    """Write a small network with a residual, whose middle maps have channels up to `spread` times as large as others.

    conv - ReLU - conv - ReLU - depthwise conv - ReLU - 1x1 conv - LeakyReLU - conv + the first map, and a classifier.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def conv(name, x, pad, **attributes):
        inputs = [x, f"{name}.weight", f"{name}.bias"]
        return helper.make_node("Conv", inputs, [f"{name}.out"], name=name, pads=[pad] * 4, **attributes)

    nodes = [
        conv("stem", "x", 1, strides=[2, 2]),
        helper.make_node("Relu", ["stem.out"], ["stem.relu"], name="stem.relu"),
        conv("wide", "stem.relu", 1),
        helper.make_node("Relu", ["wide.out"], ["wide.relu"], name="wide.relu"),
        conv("depthwise", "wide.relu", 1, group=8),
        helper.make_node("Relu", ["depthwise.out"], ["depthwise.relu"], name="depthwise.relu"),
        conv("dense", "depthwise.relu", 0),
        helper.make_node("LeakyRelu", ["dense.out"], ["dense.relu"], name="dense.relu", alpha=0.1),
        conv("last", "dense.relu", 2, dilations=[2, 2]),
        helper.make_node("Add", ["last.out", "stem.relu"], ["sum"], name="sum"),
        helper.make_node("GlobalAveragePool", ["sum"], ["pooled"], name="pooled"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="flat"),
        helper.make_node("Gemm", ["flat", "classifier.weight", "classifier.bias"], ["scores"], name="classifier"),
    ]
    graph = helper.make_graph(
        nodes, "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(array.astype("float32"), name) for name, array in constants(spread).items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def quantize(source, target, images, **options):
    from paddle_reparam.deploy.quantization import quantize_onnx

    return quantize_onnx(source, target, images, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Ranges and equalisation


def test_a_range_cuts_off_what_costs_less_than_it_saves():
    numbers = np.random.default_rng(0).standard_normal(1 << 14).astype("float32")
    held = Activation(float(numbers.min()), 50.0, numbers)
    assert held.range_with("minmax") == (float(numbers.min()), 50.0)
    low, high = held.range_with("mse")
    assert 2 < high < 15
    assert held.lowest <= low < -2
    assert Activation(2.0, 3.0, numbers).range_with("minmax") == (0.0, 3.0)
    assert Activation(0.0, 0.0, 0 * numbers).range_with("mse") == (0.0, 0.0)


def test_an_equalised_graph_is_the_same_function(images, tmp_path):
    from paddle_reparam.deploy.calibration import largest_by_channel
    from paddle_reparam.deploy.equalization import arrays_of, equalize, exponents_of, links_of
    from paddle_reparam.deploy.int8_onnx import prepared

    model = prepared(network(tmp_path / "wide.onnx", spread=1000.0))
    links = links_of(model)
    # The stem's map is read twice.
    assert [(link.maker, link.reader) for link in links] == [
        ("wide", "depthwise"), ("depthwise", "dense"), ("dense", "last")
    ]  # fmt: skip
    before = arrays_of(model)
    largest = largest_by_channel(model, [link.tensor for link in links], images)
    assert largest["wide.relu"].max() > 100 * largest["wide.relu"].min()
    exponents = exponents_of(model, largest)
    [expected] = OnnxModel(tmp_path / "wide.onnx").run(images)
    equalize(model, exponents)
    [outputs] = OnnxModel(model.SerializeToString()).run(images)
    assert relative_error(outputs, expected) < 1e-6
    after = largest_by_channel(model, ["wide.relu"], images)["wide.relu"]
    assert after.max() < 2 * after.min()
    assert not np.array_equal(arrays_of(model)["wide.weight"], before["wide.weight"])
    assert np.array_equal(arrays_of(model)["stem.weight"], before["stem.weight"])


def test_channels_of_different_sizes_survive(images, tmp_path):
    source = network(tmp_path / "wide.onnx", spread=1000.0)
    settings = quantize(source, tmp_path / "int8.onnx", images)
    [expected], [outputs] = (OnnxModel(file).run(images) for file in (source, tmp_path / "int8.onnx"))
    assert 1e-4 < relative_error(outputs, expected) < 0.03
    assert "wide.relu" in settings["equalized"]
    assert json.loads(json.dumps(settings)) == settings
    assert settings["int8"] == ["stem", "wide", "depthwise", "dense", "last", "classifier"]
    assert (settings["float32"], settings["drop"]) == ([], None)
    assert settings["activations"] in ("uint8", "int8")
    assert settings["error"] < 0.05


def test_every_weight_is_stored_in_eight_bits(images, tmp_path):
    import onnx

    source = network(tmp_path / "plain.onnx")
    quantize(source, tmp_path / "int8.onnx", images)
    graph = onnx.load(str(tmp_path / "int8.onnx")).graph
    large = [tensor for tensor in graph.initializer if np.prod(tensor.dims) > 8]
    assert {tensor.data_type for tensor in large} == {onnx.TensorProto.INT8}
    # Scores are not rounded: nothing in eight bits reads them.
    assert {node.op_type for node in graph.node if "scores" in node.output} == {"Gemm"}


def test_averages_of_windows_are_not_held_in_the_range_of_what_they_average(images, tmp_path):
    import onnx
    from onnx import helper

    model = onnx.load(str(network(tmp_path / "plain.onnx")))
    graph, sizes = model.graph, {"kernel_shape": [4, 4], "strides": [4, 4]}
    graph.node.insert(2, helper.make_node("AveragePool", ["stem.relu"], ["windows"], name="windows", **sizes))
    graph.node[3].input[0] = "windows"
    graph.node.remove(next(node for node in graph.node if node.name == "sum"))
    next(node for node in graph.node if node.name == "pooled").input[0] = "last.out"
    onnx.save(model, str(tmp_path / "averages.onnx"))
    # The averages of noise are several times as small as its largest numbers.
    quantize(tmp_path / "averages.onnx", tmp_path / "int8.onnx", images)
    [expected], [outputs] = (OnnxModel(tmp_path / f"{name}.onnx").run(images) for name in ("averages", "int8"))
    assert relative_error(outputs, expected) < 0.03


def test_an_image_that_reaches_farther_than_the_others_is_no_wrong_calibration(images, tmp_path, monkeypatch):
    from paddle_reparam.deploy import int8_check

    monkeypatch.setattr(int8_check, "_FEW", 8)
    source = network(tmp_path / "plain.onnx")
    one_of_them = images.copy()
    one_of_them[-1] *= 20
    assert quantize(source, tmp_path / "int8.onnx", one_of_them)["ranges"] == "minmax"
    with pytest.raises(ReparamError, match="it was calibrated on something else"):
        int8_check.check_int8(source, tmp_path / "int8.onnx", images)


# ---------------------------------------------------------------------------------------------------------------------
# The search


def test_the_worst_layers_stay_until_the_drop_is_small_enough(images, tmp_path):
    import onnx

    source = network(tmp_path / "plain.onnx")
    asked = []

    def drop(file):
        asked.append(file)
        return 5.0 if len(asked) < 3 else 0.5

    settings = quantize(source, tmp_path / "int8.onnx", images, drop=drop)
    kept = settings["float32"]
    assert (len(asked), len(kept), settings["drop"]) == (3, 2, 0.5)
    assert not set(kept) & set(settings["int8"])
    arrays = {each.name: each for each in onnx.load(str(tmp_path / "int8.onnx")).graph.initializer}
    for name in ("stem", "wide", "depthwise", "dense", "last", "classifier"):
        assert (f"{name}.weight" in arrays) == (name in kept), name
    asked.clear()
    again = quantize(source, tmp_path / "again.onnx", images, drop=drop)
    assert again == settings
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "int8.onnx").read_bytes()
    with pytest.raises(ReparamError, match="loses 3.00 points with 2 of 6 layers in float32, more than the 1 that are"):
        quantize(source, tmp_path / "int8.onnx", images, drop=lambda file: 3.0)


def test_the_layer_that_changes_most_comes_first(images, tmp_path):
    from paddle_reparam.deploy.calibration import measure
    from paddle_reparam.deploy.int8_onnx import QuantizedNetwork, prepared

    # Not equalised, what the wide map loses is most.
    model = prepared(network(tmp_path / "wide.onnx", spread=1000.0))
    worst = QuantizedNetwork(model, measure(model, images), images).worst_first("minmax", "uint8")
    assert set(worst[:2]) == {"wide", "depthwise"}
    assert set(worst) == {"stem", "wide", "depthwise", "dense", "last", "sum", "classifier"}


# ---------------------------------------------------------------------------------------------------------------------
# Broken files


def tensor_of(model, name):
    return next(each for each in model.graph.initializer if each.name == name)


def change(model, name, function):
    import onnx

    tensor = tensor_of(model, name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(function(onnx.numpy_helper.to_array(tensor).copy()), name))


def node_of(model, name):
    return next(each for each in model.graph.node if each.name == name)


def set_attribute(model, name, key, value):
    import onnx

    node = node_of(model, name)
    for attribute in [each for each in node.attribute if each.name == key]:
        node.attribute.remove(attribute)
    node.attribute.append(onnx.helper.make_attribute(key, value))


def flip(array):
    array.reshape(-1)[5] ^= 1 << 6
    return array


def calibrate_again(model, factor):
    """Give a tensor a range of another width, with everything that belongs to it."""
    import onnx

    change(model, "dense.relu_scale", lambda scale: scale * np.float32(factor))
    change(model, "last.bias_quantized_scale", lambda scale: scale * np.float32(factor))
    scale = onnx.numpy_helper.to_array(tensor_of(model, "last.bias_quantized_scale"))
    change(model, "last.bias_quantized", lambda _: np.round(constants(1.0)["last.bias"] / scale).astype("int32"))


BROKEN = {
    "a flipped weight": (
        lambda m: change(m, "dense.weight_quantized", flip),
        r"dense: its weight at \[0, 5, 0, 0\] is .* in int8 and .* in float32, 6[345].* steps apart",
    ),
    "a wrong scale of a weight": (
        lambda m: change(m, "wide.weight_scale", lambda s: s * np.float32([1, 1, 1, 1.5, 1, 1, 1, 1])),
        r"wide: its weight at \[3, .* steps apart",
    ),
    "a scale of zero": (
        lambda m: change(m, "wide.weight_scale", lambda s: s * 0),
        "wide.weight: its scale is 0; it has to be finite and above zero",
    ),
    "a scale that is no number": (
        lambda m: change(m, "sum_scale", lambda s: s * np.float32(np.nan)),
        "sum: its scale is nan; it has to be finite",
    ),
    "a scale below zero": (lambda m: change(m, "sum_scale", lambda s: -s), "sum: its scale is -.*; it has to be"),
    "another bias": (lambda m: change(m, "wide.bias_quantized", lambda b: b + 2), "wide: its weight at .* 2.* steps"),
    "a bias in another scale": (
        lambda m: (
            change(m, "wide.bias_quantized_scale", lambda s: s * 2),
            change(m, "wide.bias_quantized", lambda b: np.round(b / 2).astype("int32")),
        ),
        "wide: the scale of its bias is not that of its input times that of its weight",
    ),
    "a dropped padding": (
        lambda m: set_attribute(m, "wide", "pads", [0] * 4),
        r"wide: its pads is \[0, 0, 0, 0\], in float32 \[1, 1, 1, 1\]",
    ),
    "another stride": (lambda m: set_attribute(m, "stem", "strides", [1, 1]), "stem: its strides is"),
    "other groups": (lambda m: set_attribute(m, "depthwise", "group", 4), "depthwise: its group is 4, in float32 8"),
    "another dilation": (lambda m: set_attribute(m, "last", "dilations", [1, 1]), "last: its dilations is"),
    "another slope": (lambda m: set_attribute(m, "dense.relu", "alpha", 0.2), "dense.relu: its alpha is 0.2"),
    "another input": (
        lambda m: node_of(m, "last").input.__setitem__(0, node_of(m, "dense").input[0]),
        "last: it reads depthwise.relu, in float32 dense.relu",
    ),
    "a layer too few": (
        lambda m: m.graph.node.remove(node_of(m, "dense.relu")), "dense.relu: it has no such LeakyRelu",
    ),
    "a range that is too narrow": (lambda m: calibrate_again(m, 0.1), "dense.relu: its range is .* outside: it was"),
    "a range that is too wide": (lambda m: calibrate_again(m, 16.0), "dense.relu: its range is .* outside: it was"),
    "rounded with one scale and read with another": (
        lambda m: (
            m.graph.initializer.append(_copied(tensor_of(m, "sum_scale"), "other", 1.5)),
            node_of(m, "sum_DequantizeLinear").input.__setitem__(1, "other"),
        ),
        "sum: it is rounded with one scale and read with another",
    ),
}  # fmt: skip


def _copied(tensor, name, factor):
    import onnx

    return onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(factor), name)


@pytest.fixture(scope="module")
def int8_file(images, tmp_path_factory):
    """Return a float32 file and the int8 file that was made of it."""
    folder = tmp_path_factory.mktemp("int8")
    source = network(folder / "inference.onnx")
    quantize(source, folder / "inference_int8.onnx", images)
    return source, folder / "inference_int8.onnx"


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_named_with_its_layer(int8_file, images, tmp_path, what):
    import onnx

    from paddle_reparam.deploy.int8_check import check_int8

    source, target = int8_file
    model = onnx.load(str(target))
    breaking, message = BROKEN[what]
    breaking(model)
    onnx.save(model, str(tmp_path / "broken.onnx"))
    with pytest.raises(ReparamError, match=message) as error:
        check_int8(source, tmp_path / "broken.onnx", images)
    assert len(str(error.value).splitlines()) == 1


def test_a_whole_file_passes_and_that_of_another_network_does_not(int8_file, images, tmp_path):
    from paddle_reparam.deploy.int8_check import check_int8

    source, target = int8_file
    check_int8(source, target, images)
    check_int8(source, target)
    with pytest.raises(ReparamError, match="steps apart"):
        check_int8(network(tmp_path / "other.onnx", spread=2.0), target)
    (tmp_path / "none.onnx").write_text("x")
    with pytest.raises(ReparamError, match="none.onnx: it cannot be compared with"):
        check_int8(source, tmp_path / "none.onnx")


def test_uneven_channels_of_the_page_are_the_same_function_to_the_bit_and_uneven():
    net = nn.Sequential(
        nn.Conv2D(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2D(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2D(8, 4, 1)
    )
    x = paddle.randn([2, 3, SIZE, SIZE])
    expected, before = net(x).numpy(), _ranges(net)
    int8_table.make_uneven(net)
    np.testing.assert_array_equal(net(x).numpy(), expected)
    spread = _ranges(net) / before
    assert spread.max() / spread.min() >= 16


def _ranges(net):
    """Return the largest weight of each channel of the depthwise convolution."""
    return np.abs(net[2].weight.numpy()).max((1, 2, 3))
