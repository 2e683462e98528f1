"""A segmentation network from weights to masks: released, proven, read by PaddleSeg's own way, and used."""

import json

import numpy as np
import paddle
import predict
import pytest
import reparam
import segment
import yaml
from network_contract import randomise_and_settle
from pages import ROOT, blocks_of, commands_of, run_here
from PIL import Image
from segmentation import SIDE, scenes_config

from paddle_reparam import ppseg
from paddle_reparam.deploy.old_programs import HAS_NEW_PROGRAMS
from paddle_reparam.deploy.predict import preprocess
from paddle_reparam.deploy.segmentation import Segmenter, palette
from paddle_reparam.errors import ReparamError
from paddle_reparam.images import read_rgb
from paddle_reparam.surgery.verify import compare_outputs
from paddle_reparam.weights import checkpoints

paddleseg = ppseg.setup()

from paddleseg import transforms as T  # noqa: E402 - after the library, which mends it
from paddleseg.cvlibs import Config, SegBuilder, manager  # noqa: E402

from paddle_reparam.ppseg.exporting import steps_of  # noqa: E402

#: What this Paddle writes, its own first.
FORMATS = ["json", "pdmodel"] if HAS_NEW_PROGRAMS else ["pdmodel"]
NORMALIZE = {"type": "Normalize", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}


def run(*arguments):
    return segment.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a config of a network with RefConv2D, weights in train form that tell pixels apart, and labels."""
    folder = tmp_path_factory.mktemp("segmenter")
    fcn = {"type": "FCN", "num_classes": 11, "backbone": {"type": "ResNet20"}, "backbone_indices": [0], "channels": 8}
    path = scenes_config(folder, model=fcn, Reparam={"layer": {"name": "RefConv2D"}, "where": "backbone.layer1*"})
    paddle.seed(5)
    model = SegBuilder(Config(str(path))).model
    randomise_and_settle(model, [None, 3, SIDE, SIDE])
    checkpoints.save(model.state_dict(), folder / "trained.pdparams")
    (folder / "labels.txt").write_text("\n".join(["background", *map(str, range(10))]))
    return folder


@pytest.fixture(scope="module")
def released(trained):
    arguments = ["--weights", trained / "trained.pdparams", "--labels", trained / "labels.txt"]
    assert run("export", "-c", trained / "config.yml", *arguments, "--output", trained / "released") == 0
    return trained / "released"


def classes_of(folder, images):
    """Return what the trained network itself says of pixels, by its own transforms."""
    builder = SegBuilder(Config(str(folder / "config.yml")))
    model = builder.model
    checkpoints.load_into(model, folder / "trained.pdparams")
    model.eval()
    taken = [T.Compose([manager.TRANSFORMS["Normalize"]()])({"img": str(image)})["img"] for image in images]
    with paddle.no_grad():
        return model(paddle.to_tensor(np.stack(taken)))[0].numpy().argmax(axis=1)


def images_of(folder):
    return sorted((folder / "scenes" / "images").glob("val_*.png"))


def test_a_release_says_what_it_is(released, trained):
    manifest = json.loads((released / "manifest.json").read_text())
    assert manifest["task"] == "segmentation"
    assert manifest["output"]["activation"] == "argmax"
    assert manifest["labels"][:2] == ["background", "0"]
    assert manifest["plain_weights"]["file"] == "plain.pdparams"
    checks = manifest["checks"]
    # The scores are proven strictly, and the classes by the share of pixels.
    assert {check["tolerance"] for name, check in checks.items() if name.endswith("logits")} <= {1e-4}
    assert [check["relative_error"] for name, check in checks.items() if name == "Executor, batch 3"] == [0.0]
    assert reparam.main(["--check", str(released)]) == 0


def test_plain_weights_are_of_the_network_without_layers(released, trained):
    config = Config(str(trained / "config.yml"))
    del config.dic["Reparam"]
    stock = SegBuilder(config).model
    checkpoints.load_into(stock, released / "plain.pdparams")


def test_paddlesegs_deploy_script_reads_it(released, trained):
    """Its transforms, its two files and its first output, as deploy/python/infer.py takes them out of deploy.yaml."""
    deploy = yaml.safe_load((released / "deploy.yaml").read_text())["Deploy"]
    assert (deploy["output_op"], deploy["output_dtype"]) == ("argmax", "int32")
    assert deploy["input_shape"] == [-1, 3, SIDE, SIDE]
    transforms = T.Compose([manager.TRANSFORMS[options.pop("type")](**options) for options in deploy["transforms"]])
    config = paddle.inference.Config(str(released / deploy["model"]), str(released / deploy["params"]))
    config.disable_gpu()
    config.disable_glog_info()
    config.enable_memory_optim()
    config.switch_ir_optim(True)
    predictor = paddle.inference.create_predictor(config)
    images = images_of(trained)
    handle = predictor.get_input_handle(predictor.get_input_names()[0])
    handle.copy_from_cpu(np.stack([transforms({"img": str(image)})["img"] for image in images]))
    predictor.run()
    classes = predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()
    assert classes.dtype == np.int32
    assert np.mean(classes != classes_of(trained, images)) < 1e-3


def test_masks_of_a_folder(released, trained, tmp_path, capsys):
    assert predict.main([str(released), str(trained / "scenes" / "images"), "--masks", str(tmp_path / "masks")]) == 0
    lines = capsys.readouterr().out.splitlines()
    images = images_of(trained)
    assert len(lines) == len(list((trained / "scenes" / "images").iterdir())) + 1
    expected = classes_of(trained, images)
    assert len(np.unique(expected)) > 2
    for image, classes in zip(images, expected):
        mask = Image.open(tmp_path / "masks" / image.name)
        assert mask.mode == "P"
        assert np.mean(np.asarray(mask) != classes) < 1e-3
        np.testing.assert_array_equal(np.asarray(mask.convert("RGB")), palette()[np.asarray(mask)])
        overlay = np.asarray(Image.open(tmp_path / "masks" / f"{image.stem}_overlay.png"))
        background = np.asarray(mask) == 0
        np.testing.assert_array_equal(overlay[background], read_rgb(image)[background])
        [line] = [line for line in lines if line.startswith(str(image))]
        assert f"background {background.mean():.1%}" in line or not background.any()


def test_one_image_that_cannot_be_read_does_not_hold_the_others_up(released, trained, tmp_path, capsys):
    broken, image = tmp_path / "broken.png", images_of(trained)[0]
    broken.write_bytes(b"no image")
    (tmp_path / "large.png").write_bytes(image.read_bytes())
    Image.open(image).resize([40, 20]).save(tmp_path / "large.png")
    arguments = [str(released), str(tmp_path), str(image), "--masks", str(tmp_path / "masks")]
    assert predict.main(arguments) == 1
    error = capsys.readouterr().err
    assert "2 of 3 have no mask" in error
    assert "broken.png" in error
    assert "the network takes images of [3, 32, 32]" in error
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == [image.name, f"{image.stem}_overlay.png"]
    # And what is there is kept.
    assert predict.main(arguments) == 2
    assert "exists already and is kept" in capsys.readouterr().err


def test_images_of_one_name_do_not_overwrite_each_other(released, trained, tmp_path, capsys):
    image = images_of(trained)[0]
    (tmp_path / image.name).write_bytes(image.read_bytes())
    assert predict.main([str(released), str(image), str(tmp_path / image.name), "--masks", str(tmp_path / "m")]) == 1
    assert "another image of this name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [([], "name a folder for the masks with --masks"), (["--masks", "m", "--top", "3"], "--top is not for")],
)
def test_options_of_other_tasks(released, trained, capsys, options, message):
    assert predict.main([str(released), str(images_of(trained)[0]), *options]) == 2
    assert message in capsys.readouterr().err


def test_probabilities_of_every_size(trained, tmp_path):
    arguments = ["--weights", trained / "trained.pdparams", "--output", tmp_path / "out", "--format", FORMATS[0]]
    options = ["--output_op", "softmax", "--size", "dynamic"]
    assert run("export", "-c", trained / "config.yml", *arguments, *options) == 0
    deploy = yaml.safe_load((tmp_path / "out" / "deploy.yaml").read_text())["Deploy"]
    assert (deploy["input_shape"], deploy["output_dtype"]) == ([-1, 3, -1, -1], "float32")
    large = tmp_path / "large.png"
    Image.open(images_of(trained)[0]).resize([SIDE + 12, SIDE]).save(large)
    [mask] = Segmenter(tmp_path / "out").masks([large], print)
    assert mask.classes.shape == (SIDE, SIDE + 12)
    assert np.mean(mask.classes != classes_of(trained, [large])[0]) < 2e-3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--weights", "none"], 2, "there is no weight file none"),
        (["--labels", "none.txt"], 2, "there is no file none.txt"),
        (["--labels", "CONFIG"], 2, "classes, and the network has 11"),
        (["--image_size", "0", "32"], 2, "--image_size is 0 32"),
        (["-o", "Reparam=None"], 1, "does not fit"),
        (["-o", "model.num_classes=3"], 2, "`num_classes` is not consistent"),
    ],
)
def test_what_cannot_be_released_is_one_sentence(trained, tmp_path, capsys, arguments, code, message):
    arguments = [str(trained / "config.yml") if argument == "CONFIG" else argument for argument in arguments]
    usual = ["-c", trained / "config.yml", "--weights", trained / "trained.pdparams", "--output", tmp_path / "out"]
    assert run("export", *usual, *arguments) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "transforms",
    [
        [NORMALIZE],
        [{"type": "Resize", "target_size": [40, 24]}, {"type": "Normalize"}],
        [{"type": "Resize", "target_size": [24, 50], "interp": "NEAREST"}, NORMALIZE],
    ],
)
def test_transforms_are_read_as_steps(trained, transforms):
    image = images_of(trained)[0]
    made = [manager.TRANSFORMS[each["type"]](**{k: v for k, v in each.items() if k != "type"}) for each in transforms]
    expected = T.Compose(made)({"img": str(image)})["img"]
    actual = preprocess(read_rgb(image), steps_of(transforms))
    assert np.abs(actual - expected).max() < 1e-5


def test_transforms_that_are_not_known_are_none():
    assert steps_of([{"type": "Padding", "target_size": [9, 9]}, NORMALIZE]) is None
    assert steps_of([{"type": "Resize", "keep_ratio": True}, NORMALIZE]) is None
    assert steps_of(None) is None


# ---------------------------------------------------------------------------------------------------------------------
# The page


def test_the_commands_of_the_page(tmp_path, monkeypatch, capsys):
    """As they stand there, but for a few small steps on a few of the images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ppseg_configs").symlink_to(ROOT / "ppseg_configs")
    page = (ROOT / "docs" / "segmentation.md").read_text(encoding="utf-8")
    for command in [command for kind, block in blocks_of(page) if kind == "bash" for command in commands_of(block)]:
        run_here(f"{command} --iters 2 --batch_size 2" if "segment.py train" in command else command)
        if "prepare_data" in command:
            for file in (tmp_path / "output" / "scenes" / "train.txt", tmp_path / "output" / "scenes" / "val.txt"):
                file.write_text("".join(file.read_text().splitlines(keepends=True)[:4]))
    assert "val_0000.png  " in capsys.readouterr().out
    assert len(list((tmp_path / "output" / "masks").iterdir())) == 2


def test_the_configs_of_the_page_say_what_is_said():
    refconv, retrain = (
        Config(str(ROOT / f"ppseg_configs/scenes/bisenet_{name}.yml")).dic for name in ("refconv", "retrain")
    )
    assert refconv.pop("Reparam") == {"layer": {"name": "RefConv2D"}}
    assert refconv == retrain
    assert (refconv["iters"], refconv["batch_size"]) == (400, 8)


def test_classes_are_compared_by_the_share_of_pixels():
    expected = np.arange(100, dtype=np.int32).reshape(1, 10, 10)
    actual = expected.copy()
    actual[0, 3, 3:5] = 7
    assert compare_outputs([expected], [actual], 1e-3)[0] == pytest.approx(0.02)
    assert compare_outputs([expected], [actual[:, :9]], 1e-3)[0] == float("inf")


def test_a_mask_of_a_release_that_labels_images(tmp_path):
    with pytest.raises(ReparamError, match="is no release"):
        Segmenter(tmp_path)
