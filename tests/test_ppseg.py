"""PaddleSeg with this library in it: mended where it needs to be, backbones, layers by its configs, strict weights."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
import segment
from helpers import randomise_batch_norms, relative_error
from paddle import nn
from segmentation import scenes_config

from paddle_reparam import ppseg
from paddle_reparam.errors import CheckpointError, ReparamError, UsageError
from paddle_reparam.layers.base import ReparamLayer
from paddle_reparam.models.stages import as_backbone
from paddle_reparam.registry import create_model
from paddle_reparam.surgery.rewrite import replace
from paddle_reparam.weights import checkpoints

paddleseg = ppseg.setup()

from paddleseg.cvlibs import Config, SegBuilder, manager  # noqa: E402 - after the library, which mends it
from paddleseg.utils import metrics, utils  # noqa: E402

from paddle_reparam.ppseg import mends  # noqa: E402


def run(*arguments):
    return segment.main([str(argument) for argument in arguments])


# ---------------------------------------------------------------------------------------------------------------------
# Mends


def test_a_second_setup_changes_nothing():
    forward = paddleseg.models.losses.CrossEntropyLoss.forward
    assert ppseg.setup() is paddleseg
    assert paddleseg.models.losses.CrossEntropyLoss.forward is forward


def test_nothing_is_left_to_mend():
    assert not mends._losses_mix_types()
    assert not mends._areas_have_no_dimension()


LOGIT = np.random.default_rng(0).standard_normal([2, 3, 8, 8]).astype("float32")
LABEL = np.random.default_rng(1).integers(0, 3, [2, 8, 8])


def expected_cross_entropy(weight=None):
    """The mean over the pixels that are not ignored, in float64."""
    powers = np.exp(LOGIT.astype("float64"))
    shares = powers / powers.sum(1, keepdims=True)
    kept = LABEL != 255
    losses = -np.log(np.take_along_axis(shares, np.where(kept, LABEL, 0)[:, None], 1))[:, 0]
    weights = np.ones(3) if weight is None else np.float64(weight)
    of_pixels = weights[np.where(kept, LABEL, 0)] * kept
    return (losses * of_pixels).sum() / of_pixels.sum()


@pytest.mark.parametrize("weight", [None, [0.2, 1.0, 3.0]])
def test_cross_entropy_is_the_mean_over_pixels_that_count(weight):
    LABEL[0, :2] = 255
    loss = manager.LOSSES["CrossEntropyLoss"](weight=weight)(paddle.to_tensor(LOGIT), paddle.to_tensor(LABEL))
    assert relative_error(loss, expected_cross_entropy(weight)) < 1e-5


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("CrossEntropyLoss", {"top_k_percent_pixels": 0.3}),
        ("BootstrappedCrossEntropyLoss", {"min_K": 4, "loss_th": 0.3}),
        ("OhemCrossEntropyLoss", {}),
        ("DiceLoss", {}),
        ("LovaszSoftmaxLoss", {}),
        ("RMILoss", {"num_classes": 3}),
        ("MultiClassFocalLoss", {"num_class": 3}),
        ("RelaxBoundaryLoss", {}),
    ],
)
def test_losses_have_a_gradient(name, options):
    logit = paddle.to_tensor(LOGIT)
    logit.stop_gradient = False
    loss = manager.LOSSES[name](**options)(logit, paddle.to_tensor(LABEL))
    loss.sum().backward()
    assert np.isfinite(float(loss))
    assert np.isfinite(logit.grad.numpy()).all()


def test_arithmetic_elsewhere_stays_paddles_own():
    """The types of the left side hold within a loss of PaddleSeg and nowhere else."""
    manager.LOSSES["CrossEntropyLoss"]()(paddle.to_tensor(LOGIT), paddle.to_tensor(LABEL))
    assert "like_the_left" not in paddle.Tensor.__mul__.__qualname__


def test_areas_of_classes():
    predicted, label = paddle.to_tensor([[[0, 1, 1]]], "int32"), paddle.to_tensor([[[0, 1, 255]]], "int64")
    areas = metrics.calculate_area(predicted, label, 2)
    assert [area.tolist() for area in areas] == [[1, 1], [1, 1], [1, 1]]


# ---------------------------------------------------------------------------------------------------------------------
# Backbones


@pytest.mark.parametrize(
    ("name", "channels", "strides", "options"),
    [
        ("SLaK_micro", [16, 32, 48, 64], [4, 8, 16, 32], {}),
        ("RepMLPNet_micro", [16, 32, 64, 128], [4, 8, 16, 32], {}),
        ("RepMLPResNet50", [256, 512, 1024, 2048], [4, 8, 16, 32], {"image_size": 64}),
        ("ResNet18_SPConv", [64, 128, 256, 512], [4, 8, 16, 32], {}),
        ("ResNet10_DYConv", [64, 128, 256, 512], [4, 8, 16, 32], {}),
        ("ResNet18_ACB", [64, 128, 256, 512], [4, 8, 16, 32], {}),
        ("MobileOne_S0", [48, 128, 256, 1024], [4, 8, 16, 32], {}),
        ("ResNet20", [16, 32, 64], [1, 2, 4], {}),
    ],
)
def test_a_network_as_a_backbone(name, channels, strides, options, tmp_path):
    classifier = create_model(name, **options)
    randomise_batch_norms(classifier, seed=3)
    classifier.eval()
    checkpoints.save(classifier.state_dict(), tmp_path / "of_classifier.pdparams")
    backbone = manager.BACKBONES[name](pretrained=str(tmp_path / "of_classifier.pdparams"), in_channels=3, **options)
    backbone.eval()
    assert (backbone.feat_channels, backbone.feat_strides) == (channels, strides)
    x = paddle.randn([1, 3, 64, 64])
    with paddle.no_grad():
        maps, own = backbone(x), classifier.stage_maps(x)
    assert [list(each.shape) for each in maps] == [[1, c, 64 // s, 64 // s] for c, s in zip(channels, strides)]
    for index, (put_out, of_stage) in enumerate(zip(maps, own)):
        norm = getattr(backbone, f"norm{index}", None)
        with paddle.no_grad():
            assert relative_error(put_out, of_stage if norm is None else norm(of_stage)) < 1e-6
    # What stands behind the stages is gone, the other entries have the names that they had.
    kept = {key for key in backbone.state_dict() if not key.startswith("norm")}
    gone = {key.partition(".")[0] for key in set(classifier.state_dict()) - kept}
    assert kept <= set(classifier.state_dict())
    assert gone <= {"norm", "head_norm", "head", "linear", "fc", "classifier"}


def test_some_stages_alone():
    backbone = as_backbone(create_model("SLaK_micro"), [1, 3])
    assert backbone.feat_channels == [32, 64]
    assert [key for key in backbone._sub_layers if key.startswith("norm")] == ["norm1", "norm3"]
    for wrong in ([], [4], [2, 1]):
        with pytest.raises(UsageError, match="out_indices is"):
            as_backbone(create_model("SLaK_micro"), wrong)


def test_no_backbone():
    with pytest.raises(ReparamError, match="has no stages"):
        manager.BACKBONES["VGG16_SPConv"]()
    with pytest.raises(UsageError, match="3 channels"):
        manager.BACKBONES["SLaK_micro"](in_channels=4)


def test_other_weights_are_no_backbones(tmp_path):
    file = tmp_path / "other.pdparams"
    checkpoints.save(create_model("ResNet20").state_dict(), file)
    with pytest.raises(CheckpointError, match="does not fit"):
        manager.BACKBONES["SLaK_micro"](pretrained=str(file))


# ---------------------------------------------------------------------------------------------------------------------
# The section Reparam


def built(path):
    return SegBuilder(Config(str(path))).model


FCN = {"type": "FCN", "num_classes": 11, "backbone": {"type": "ResNet20"}, "backbone_indices": [-1]}


def test_layers_by_a_section(tmp_path):
    section = {"layer": {"name": "RefConv2D", "init": "zero"}, "where": "backbone.layer*"}
    plain = built(scenes_config(tmp_path, model=FCN))
    model = built(scenes_config(tmp_path, model=FCN, Reparam=section))
    paths = {path for path, layer in model.named_sublayers() if isinstance(layer, ReparamLayer)}
    wanted = {
        path
        for path, layer in plain.named_sublayers()
        if isinstance(layer, nn.Conv2D) and path.startswith("backbone.layer") and layer.weight.shape[2] == 3
    }
    assert paths == wanted
    assert paths


@pytest.mark.parametrize(
    "section", [3, {}, {"layer": "RefConv2D"}, {"layer": {"type": 1}}, {"layer": {"name": "RefConv2D"}, "were": "*"}]
)
def test_a_section_that_says_nothing(tmp_path, section):
    with pytest.raises(UsageError, match="Reparam"):
        built(scenes_config(tmp_path, model=FCN, Reparam=section))


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def fcn(classes=11, pretrained=None):
    backbone = manager.BACKBONES["ResNet20"]()
    return manager.MODELS["FCN"](num_classes=classes, backbone=backbone, backbone_indices=[-1], pretrained=pretrained)


def test_a_trained_network_for_other_classes(tmp_path):
    file, trained = tmp_path / "trained.pdparams", fcn(19)
    checkpoints.save(trained.state_dict(), file)
    state, own = fcn(11, str(file)).state_dict(), trained.state_dict()
    different = {name for name in state if not np.array_equal(state[name].numpy(), own[name].numpy())}
    assert different == {"head.cls.weight", "head.cls.bias"}


@pytest.mark.parametrize("evaluate", [False, True])
def test_weights_in_which_nothing_fits(tmp_path, evaluate):
    file = str(tmp_path / "other.pdparams")
    checkpoints.save({"other.weight": paddle.zeros([3])}, file)
    with pytest.raises(CheckpointError, match="fit|none of its 1 entries"):
        utils.load_entire_model(fcn(), file) if evaluate else fcn(pretrained=file)


def test_weights_of_refconv_are_not_those_of_the_plain_network(tmp_path):
    refocused, file = fcn(), str(tmp_path / "refconv.pdparams")
    replace(refocused, "RefConv2D")
    checkpoints.save(refocused.state_dict(), file)
    with pytest.raises(CheckpointError, match="holds more of .* layers"):
        fcn(pretrained=file)


def test_an_evaluation_takes_all_or_nothing(tmp_path):
    """Without its classifier, a network would be measured with a random one."""
    file, state = str(tmp_path / "part.pdparams"), fcn().state_dict()
    checkpoints.save({name: value for name, value in state.items() if name.startswith("backbone")}, file)
    fcn(pretrained=file)
    with pytest.raises(CheckpointError, match="missing"):
        utils.load_entire_model(fcn(), file)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A config, and where its network was trained for two steps."""
    folder = tmp_path_factory.mktemp("trained")
    config = scenes_config(folder)
    assert run("train", "-c", config, "--save_dir", folder / "run", "--save_interval", 1, "--log_iters", 1) == 0
    return config, folder / "run"


def test_train_and_evaluate(trained, capsys):
    config, folder = trained
    assert (folder / "iter_2" / "model.pdopt").is_file()
    assert run("eval", "-c", config, "--weights", folder / "best_model" / "model.pdparams") == 0
    assert "mIoU" in capsys.readouterr().out


def test_a_training_goes_on(trained, tmp_path, capsys):
    config, folder = trained
    options = ["--save_dir", tmp_path, "--log_iters", 1, "--iters", 3]
    assert run("train", "-c", config, *options, "--resume_model", folder / "iter_2") == 0
    assert (tmp_path / "iter_3" / "model.pdparams").is_file()
    with paddle.utils.unique_name.guard():
        other = scenes_config(tmp_path, model=FCN, loss={"types": [{"type": "CrossEntropyLoss"}], "coef": [1]})
        assert run("train", "-c", other, *options, "--resume_model", folder / "iter_2") == 1
    assert "does not fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "-c", "none.yml"], 2, "there is no config none.yml"),
        (["eval", "-c", "CONFIG", "--weights", "none"], 2, "there is no weight file none"),
        (["train", "-c", "CONFIG", "--iters", "0"], 2, "--iters is 0"),
        (["train", "-c", "CONFIG", "--batch_size", "100"], 1, "do not fill a batch of 100"),
        (["train", "-c", "CONFIG", "-o", "model.backbone.kernel_size=3"], 1, "needs one kernel size"),
        (["train", "-c", "CONFIG", "-o", "model.type=Nothing"], 1, "Nothing"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(trained, capsys, arguments, code, message):
    config, _ = trained
    assert run(*(str(config) if argument == "CONFIG" else argument for argument in arguments)) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_without_paddleseg_there_is_one_sentence(tmp_path):
    blocked = tmp_path / "paddleseg.py"
    blocked.write_text("raise ModuleNotFoundError('no paddleseg', name='paddleseg')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import segment; sys.exit(segment.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "-c", "none.yml"],
        cwd=Path(segment.__file__).parent, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "PaddleSeg is not installed" in done.stderr


def test_a_script_of_a_checkout_runs_as_it_stands(trained, tmp_path):
    """A checkout's own training script, with a network and a layer of this library in its config."""
    checkout = tmp_path / "PaddleSeg"
    (checkout / "tools").mkdir(parents=True)
    (checkout / "paddleseg").symlink_to(Path(paddleseg.__file__).parent)
    script = checkout / "tools" / "train.py"
    script.write_text(
        "import sys\n"
        "from paddleseg.core import train\n"
        "from paddleseg.cvlibs import Config, SegBuilder\n"
        "builder = SegBuilder(Config(sys.argv[1], iters=1))\n"
        "train(builder.model, builder.train_dataset, optimizer=builder.optimizer, losses=builder.loss, iters=1,\n"
        "      batch_size=4, save_dir=sys.argv[2], save_interval=1, log_iters=1)\n"
    )
    config = scenes_config(tmp_path, Reparam={"layer": {"name": "RefConv2D"}, "where": "head.*"})
    done = subprocess.run(
        [sys.executable, Path(segment.__file__).with_name("launch.py"), script, config, tmp_path / "run"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    saved = checkpoints.load(tmp_path / "run" / "iter_1" / "model.pdparams")
    assert any(name.endswith(".convmap.weight") for name in saved)
