"""Eight bits: what the kernels say before, what the images say afterwards, and the command."""

import json

import numpy as np
import paddle
import pytest
import yaml
from helpers import smallest_manifest
from paddle import nn
from sklearn.datasets import load_digits
from test_onnx import needs_onnx

from paddle_reparam.deploy.export import ExportOptions, export_inference
from paddle_reparam.deploy.onnx_export import export_onnx
from paddle_reparam.deploy.outputs import Normalization
from paddle_reparam.deploy.precision import Agreement
from paddle_reparam.deploy.quantization import Int8Report, export_int8, kernel_range, quantization_report, quantize_onnx
from paddle_reparam.deploy.released import write_manifest
from paddle_reparam.deploy.runtimes.onnx_runtime import ONNX_FILE, OnnxModel
from paddle_reparam.errors import ReparamError, UsageError
from paddle_reparam.files import digest
from paddle_reparam.ppcls.errors import ConfigError

SPEC = [[None, 1, 8, 8]]

# ---------------------------------------------------------------------------------------------------------------------
# The report


def kernel(channels=8):
    return np.random.default_rng(0).uniform(-1, 1, [channels, 4, 3, 3]).astype("float32")


def test_a_channel_that_stands_out_shows():
    plain = kernel_range("body.conv.weight", kernel())
    assert (plain.path, plain.shape, plain.outliers) == ("body.conv", [8, 4, 3, 3], [])
    assert plain.spread < 1.2
    # Rounding to steps of s is off by s / sqrt(12) at the root of the mean square; of the uniform weights it is
    # 1 / sqrt(3).
    assert plain.error_per_tensor == pytest.approx(plain.largest / 127 / 2, rel=0.1)
    weight = kernel()
    weight[3] *= 1000
    found = kernel_range("w", weight)
    assert found.outliers == [3]
    assert found.largest == pytest.approx(1000 * np.abs(kernel()[3]).max(), rel=1e-6)
    assert found.spread == pytest.approx(1000, rel=0.2)
    small = np.delete(weight, 3, axis=0)
    step = found.largest / 127
    assert np.abs(small).max() < step / 2, "all of the others become zero with one scale"
    expected = np.sqrt((np.square(small).sum() + np.square(weight[3] - np.round(weight[3] / step) * step).sum())
                       / np.square(weight.astype(np.float64)).sum())  # fmt: skip
    assert found.error_per_tensor == pytest.approx(expected, rel=1e-4)
    assert found.error_per_channel == pytest.approx(plain.error_per_channel, rel=0.2)


def test_what_int8_can_hold_is_not_rounded():
    weight = np.random.default_rng(0).integers(-127, 128, [4, 6]).astype("float32")
    weight[0] = 127
    found = kernel_range("fc.weight", weight * np.float32([0.5, 1, 2, 4, 8, 16]))
    assert found.error_per_channel == 0
    assert found.error_per_tensor > 0
    assert found.spread == 32


def test_channels_of_zeros_do_not_count():
    weight = kernel()
    weight[:6] = 0
    found = kernel_range("w", weight)
    assert found.spread < 1.2
    assert found.outliers == []
    zeros = kernel_range("w", np.zeros_like(weight))
    assert (zeros.largest, zeros.spread, zeros.error_per_tensor, zeros.error_per_channel) == (0, 1, 0, 0)


def test_the_report_of_a_network():
    net = nn.Sequential(nn.Conv2D(3, 8, 3), nn.BatchNorm2D(8), nn.Flatten(), nn.Linear(32, 5))
    net[0].weight.set_value(paddle.concat([net[0].weight[:7], net[0].weight[7:] * 1e4]))
    report = quantization_report(net)
    assert [k.path for k in report.kernels] == ["0", "3"]
    assert report.kernels[0].outliers == [7]
    assert json.loads(report.to_json())["kernels"][0]["outliers"] == [7]
    assert report.worst(1).splitlines()[-1].startswith("0 ")
    assert len(str(report).splitlines()) == 4
    net[3].weight.set_value(net[3].weight / 0)
    with pytest.raises(ReparamError, match="3.weight: it holds numbers that are not finite"):
        quantization_report(net)
    with pytest.raises(ReparamError, match="ReLU has no kernels"):
        quantization_report(nn.ReLU())


# ---------------------------------------------------------------------------------------------------------------------
# The file


@pytest.fixture(scope="module")
def digits():
    """Return (images `[N, 1, 8, 8]`, labels) of scikit-learn's digits."""
    images, labels = load_digits(return_X_y=True)
    return (images.reshape(-1, 1, 8, 8) / 8 - 1).astype("float32"), labels


@pytest.fixture(scope="module")
def network(digits):
    """Return a network that knows digits."""
    paddle.seed(0)
    images, labels = (paddle.to_tensor(array[:1400]) for array in digits)
    net = nn.Sequential(
        nn.Conv2D(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2D(16, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    optimizer = paddle.optimizer.Adam(3e-3, parameters=net.parameters())
    for _ in range(8):
        for start in range(0, 1400, 50):
            nn.functional.cross_entropy(net(images[start : start + 50]), labels[start : start + 50]).backward()
            optimizer.step()
            optimizer.clear_grad()
    net.eval()
    return net


@pytest.fixture(scope="module")
def trained(network, tmp_path_factory):
    """Return its ONNX file."""
    folder = tmp_path_factory.mktemp("trained")
    export_inference(network, folder, SPEC)
    return export_onnx(folder)


def batches(digits):
    images, labels = digits
    return [(images[i : i + 100], labels[i : i + 100]) for i in range(1400, len(images), 100)]


@needs_onnx
def test_int8_is_nearly_as_good_and_smaller(trained, digits, tmp_path):
    images, labels = digits
    report = export_int8(trained, tmp_path / "int8.onnx", images[:64], batches(digits), largest_drop=1.0)
    measured = report.measured
    assert (measured.images, report.calibration_images) == (397, 64)
    assert measured.measure == "top-1"
    assert measured.reference_accuracy > 0.85
    assert measured.drop == max(0.0, round(100 * (measured.reference_accuracy - measured.accuracy), 6)) <= 1.0
    assert report.int8_bytes == (tmp_path / "int8.onnx").stat().st_size
    assert str(report).splitlines()[-1].endswith(", on 397 images")
    [logits] = OnnxModel(tmp_path / "int8.onnx").run(images[1400:])
    assert measured.accuracy == (logits.argmax(1) == labels[1400:]).mean()
    [exact] = OnnxModel(trained).run(images[1400:])
    assert np.abs(logits - exact).max() > 1e-3 * np.abs(exact).max(), "nothing was quantised"
    assert [path.name for path in tmp_path.iterdir()] == ["int8.onnx"]


@needs_onnx
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_network_that_takes_pixels_is_calibrated_on_pixels(network, trained, digits, tmp_path, dtype):
    normalization = Normalization((1.0,), (1.0,), 1 / 8, dtype)
    export_inference(network, tmp_path, SPEC, options=ExportOptions(normalization=normalization))
    images, labels = digits
    pixels = normalization.undo(images)
    assert pixels.dtype == dtype
    assert np.array_equal(pixels, load_digits().images[:, None])
    report = export_int8(export_onnx(tmp_path), tmp_path / "int8.onnx", pixels[:64], batches((pixels, labels)))
    exact = OnnxModel(trained).run(images[1400:])[0].argmax(1)
    assert report.measured.reference_accuracy == (exact == labels[1400:]).mean()
    assert report.measured.drop <= 1.0
    for other in (Normalization((1.0,), (1.0,), 1 / 255, dtype), Normalization((0.5,), (1.0,), 1 / 8, dtype)):
        with pytest.raises(ReparamError, match="no pixels 0..255 that were normalised by Normalization.mean"):
            other.undo(images)


@pytest.mark.parametrize(
    ("int8", "drop", "text"),
    [
        (0.745, 0.5, "int8 loses 0.50 points"),
        (0.75, 0.0, "int8 is right as often"),
        (0.76, 0.0, "int8 gains 1.00 points"),
    ],
)
def test_what_int8_loses_is_never_negative(int8, drop, text):
    measured = Agreement("top-1", 200, 0.01, 1.0, 0.99, 0.75, int8)
    report = Int8Report(measured, 8, 400, 100, {"float32": []})
    assert measured.drop == drop
    assert str(report).splitlines()[-1] == f"{text}, on 200 images"


@needs_onnx
def test_weights_have_a_scale_for_each_channel(trained, digits, tmp_path):
    import onnx

    quantize_onnx(trained, tmp_path / "int8.onnx", digits[0][:8])
    graph = onnx.load(str(tmp_path / "int8.onnx")).graph
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    readers = {name: node for node in graph.node for name in node.input if node.op_type == "DequantizeLinear"}
    weights = {name: a for name, a in arrays.items() if a.dtype == np.int8 and a.ndim > 1}
    assert sorted(a.shape for a in weights.values()) == [(16, 1, 3, 3), (16, 16, 3, 3), (256, 10)]
    for name, weight in weights.items():
        scales = arrays[readers[name].input[1]]
        assert scales.shape == (weight.shape[0 if weight.ndim == 4 else 1],)
        assert len(np.unique(scales)) > 1


@needs_onnx
def test_what_loses_too_much_is_not_written(trained, digits, tmp_path):
    target = tmp_path / "int8.onnx"
    target.write_text("an older one")
    images, _ = digits
    # Calibrated on what is almost black, everything else is cut off.
    with pytest.raises(
        ReparamError, match="int8 loses .* points with 1 of 3 layers in float32, more than the 1 that are"
    ):
        export_int8(trained, target, images[:8] * 1e-3, batches(digits), largest_drop=1.0)
    with pytest.raises(UsageError, match="what may be lost is -1 percentage points; give 0 or more"):
        export_int8(trained, target, images[:8], batches(digits), largest_drop=-1.0)
    for calibration, measured, message in [
        (images[:0], batches(digits), "measured on images, and none was given"),
        (images[:8], [], "0 images cannot show a drop of 1 points: give 100 images or more$"),
        (np.zeros([2, 3, 8, 8], "float32"), batches(digits), "inference.onnx: onnxruntime cannot run it"),
    ]:
        with pytest.raises(ReparamError, match=message):
            export_int8(trained, target, calibration, measured)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"int8.onnx": "an older one"}


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a config, as the working directory."""
    monkeypatch.chdir(tmp_path)
    config = {
        "Global": {"image_shape": [3, 8, 8]},
        "Arch": {"name": "ReparamModel", "class_num": 10},
        "DataLoader": {
            part: {"dataset": {"name": "ImageNetDataset", "image_root": "nowhere", "cls_label_path": "nowhere.txt"}}
            for part in ("Train", "Eval")
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def release_of(folder):
    folder.mkdir()
    (folder / ONNX_FILE).write_text("")
    write_manifest(folder, smallest_manifest({ONNX_FILE: digest(folder / ONNX_FILE)}))


def test_what_is_wrong_is_one_sentence(project, capsys):
    from paddle_reparam.ppcls.quantize import main

    (project / "plain").mkdir()
    release_of(project / "released")
    (project / "there.onnx").write_text("an older one")
    for release, output, more, message in [
        ("plain", "new.onnx", [], "plain/inference.onnx is missing; make the release with tools/reparam.py --onnx"),
        ("released", "there.onnx", [], "there.onnx exists already and is kept"),
        ("released", "new.onnx", ["-o", "Globl.seed=1"], "did you mean 'Global'?"),
        ("released", "new.onnx", [], "there is no nowhere"),
    ]:
        arguments = ["-c", "config.yaml", "--release", release, "--output", output, *more]
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (project / "new.onnx").exists()
    assert (project / "there.onnx").read_text() == "an older one"
    with pytest.raises(SystemExit) as exit:
        main(["-c", "config.yaml", "--release", "released", "--output", "new.onnx", "--images", "0"])
    assert exit.value.code == 2


def test_an_altered_file_is_not_quantised(project, capsys):
    from paddle_reparam.ppcls.quantize import main

    release_of(project / "released")
    (project / "released" / ONNX_FILE).write_text("x")
    assert main(["-c", "config.yaml", "--release", "released", "--output", "new.onnx"]) == 1
    assert f"{ONNX_FILE} is not as it was written" in capsys.readouterr().err


@needs_onnx
def test_the_config_of_another_network_is_refused(trained, project):
    from paddle_reparam import ppcls

    ppcls.setup()
    from paddle_reparam.ppcls.quantize import _refuse_another_network

    manifest = smallest_manifest({})
    steps = [{"ToCHWImage": {}}]
    manifest["input"].update(shape=[[None, 1, 8, 8]], preprocessing=steps)
    manifest["labels"] = [str(number) for number in range(10)]
    (project / "labels.txt").write_text("".join(f"{number} {number}\n" for number in range(10)))
    (project / "others.txt").write_text("".join(f"{number} {number + 1}\n" for number in range(10)))

    def config(shape=(1, 8, 8), classes=10, labels="labels.txt", transforms=steps):
        post_process = {"class_id_map_file": labels}
        return {
            "Global": {"image_shape": list(shape)},
            "Arch": {"name": "Net", "class_num": classes},
            "Infer": {"transforms": transforms, "PostProcess": post_process},
        }

    _refuse_another_network(config(), manifest, str(trained.parent))
    for other, what in [
        (config(shape=(3, 8, 8)), "Global.image_shape"),
        (config(classes=5, labels=None), "Arch.class_num"),
        (config(labels="others.txt"), "list of labels"),
        (config(transforms=[{"ResizeImage": {"size": 8}}, *steps]), "preprocessing"),
    ]:
        with pytest.raises(ConfigError, match=f"not the one that .* was made with: its {what} is"):
            _refuse_another_network(other, manifest, str(trained.parent))


def test_images_to_calibrate_on_are_those_of_training_without_its_augmentation(project):
    from PIL import Image

    from paddle_reparam import ppcls

    ppcls.setup()
    from paddle_reparam.ppcls.images import read_training_images, validation_batches

    config = yaml.safe_load((project / "config.yaml").read_text())
    scale = {"NormalizeImage": {"scale": 1.0, "mean": [0.0] * 3, "std": [1.0] * 3, "order": ""}}
    for part, first, more in (("Train", 100, [{"RandCropImage": {"size": 4}}]), ("Eval", 200, [])):
        (project / part).mkdir()
        for i in range(5):
            Image.new("RGB", (8, 8), (first + i,) * 3).save(project / part / f"{i}.png")
        (project / f"{part}.txt").write_text("".join(f"{i}.png {i}\n" for i in range(5)))
        config["DataLoader"][part] = {
            "dataset": {
                "name": "ImageNetDataset", "image_root": part, "cls_label_path": f"{part}.txt",
                "transform_ops": [{"DecodeImage": {"to_rgb": True, "channel_first": False}}, *more, scale],
            },
            "sampler": {"name": "DistributedBatchSampler", "batch_size": 2, "drop_last": False, "shuffle": False},
            "loader": {"num_workers": 0, "use_shared_memory": False},
        }  # fmt: skip
    found = read_training_images(config, 3)
    assert found.labels.tolist() == [0, 2, 4]
    assert found.pixels.shape == (3, 3, 8, 8)
    assert found.pixels[:, 0, 0, 0].tolist() == [100, 102, 104]
    batches = list(validation_batches(config, 2))
    assert [images.pixels[:, 0, 0, 0].tolist() for images in batches] == [[200, 201], [202, 203], [204]]
