"""PaddleDetection with this library in it: mended, backbones, layers by its configs, strict weights, fused blocks."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import detect
import numpy as np
import paddle
import pytest
import yaml
from detection import detection_config
from helpers import randomise_batch_norms, relative_error
from paddle import nn
from pages import ROOT, blocks_of, commands_of

from paddle_reparam import ppdet as of_library
from paddle_reparam.errors import CheckpointError, ReparamError, UsageError
from paddle_reparam.layers.base import ReparamLayer
from paddle_reparam.surgery.places import copy_model
from paddle_reparam.surgery.rewrite import reparameterize, replace
from paddle_reparam.surgery.verify import verify
from paddle_reparam.weights import checkpoints

ppdet = of_library.setup()

from ppdet.core.workspace import create, global_config  # noqa: E402 - after the library, which mends it
from ppdet.engine import Trainer  # noqa: E402
from ppdet.modeling.backbones.cspresnet import RepVggBlock  # noqa: E402
from ppdet.modeling.backbones.mobileone import MobileOneBlock  # noqa: E402
from ppdet.optimizer import ModelEMA  # noqa: E402
from ppdet.utils import checkpoint  # noqa: E402

from paddle_reparam.ppdet import averages, exporting, mends  # noqa: E402
from paddle_reparam.ppdet.command import reading  # noqa: E402
from paddle_reparam.ppdet.heads import UpToHeads  # noqa: E402


def run(*arguments):
    return detect.main([str(argument) for argument in arguments])


# ---------------------------------------------------------------------------------------------------------------------
# Mends


def test_a_second_setup_changes_nothing():
    get_loss = ppdet.modeling.architectures.YOLOv3.get_loss
    assert of_library.setup() is ppdet
    assert ppdet.modeling.architectures.YOLOv3.get_loss is get_loss


def test_nothing_is_left_to_mend():
    assert not mends._assigners_mix_integers()
    assert not mends._numbers_have_no_dimension()
    assert not mends._logs_keep_the_first_output()
    assert not averages._is_biased()


@pytest.mark.parametrize("kind", ["threshold", "normal", "exponential"])
def test_an_average_is_that_of_the_steps(kind):
    """By hand, in float64: after each step decay * average + (1 - decay) * weight, divided by the weight of all."""
    layer = nn.Linear(1, 1, bias_attr=False)
    average, by_hand, weighed = ModelEMA(layer, decay=0.9, ema_decay_type=kind), 0.0, 0.0
    for step in range(5):
        layer.weight.set_value(paddle.full([1, 1], step + 1.0))
        average.update()
        decay = {
            "threshold": min(0.9, (1 + step) / (10 + step)), "normal": 0.9,
            "exponential": 0.9 * (1 - np.exp(-(step + 1) / 2000)),
        }[kind]  # fmt: skip
        by_hand, weighed = decay * by_hand + (1 - decay) * (step + 1), decay * weighed + (1 - decay)
        expected = by_hand if kind == "exponential" else by_hand / weighed
        assert relative_error(average.apply()["weight"], np.full([1, 1], expected)) < 1e-6


def test_what_does_not_train_is_in_no_average():
    network = nn.Sequential(nn.Conv2D(2, 3, 3), nn.BatchNorm2D(3))
    replace(network, "RefConv2D")
    average = ModelEMA(network, decay=0.9)
    network[1]._mean.set_value(paddle.to_tensor([1.0, 2.0, 3.0]))
    average.update()
    state = average.apply()
    assert np.array_equal(state["0.weight"].numpy(), network[0].weight.numpy())
    assert {name for name in state if name in average.ema_black_list} == {"0.weight"}
    assert relative_error(state["1._mean"], network[1]._mean) < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Backbones


@pytest.mark.parametrize(
    ("name", "channels", "strides"),
    [("SLaK_micro", [16, 32, 48, 64], [4, 8, 16, 32]), ("ResNet18_SPConv", [64, 128, 256, 512], [4, 8, 16, 32])],
)
def test_a_network_as_a_backbone(name, channels, strides):
    backbone = create(name)
    assert [(each.channels, each.stride) for each in backbone.out_shape] == list(zip(channels, strides))
    with paddle.no_grad():
        maps = backbone({"image": paddle.randn([1, 3, 64, 64])})
    assert [list(each.shape) for each in maps] == [[1, c, 64 // s, 64 // s] for c, s in zip(channels, strides)]


def test_options_and_stages_of_a_backbone(tmp_path):
    config = detection_config(tmp_path, "faster_rcnn_slak_micro", SLaK_micro={"return_idx": [1, 2], "patch_size": 2})
    with reading(str(config), []):
        assert [each.stride for each in create("SLaK_micro").out_shape] == [4, 8]
    assert [each.stride for each in create("SLaK_micro").out_shape] == [4, 8, 16, 32]


# ---------------------------------------------------------------------------------------------------------------------
# The section Reparam, and what a trainer does with its network


def trainer(folder, name="yolov3_plain", mode="train", **sections):
    with reading(str(detection_config(folder, name, **sections)), []) as config:
        return Trainer(config, mode=mode)


REFCONV = {"layer": {"name": "RefConv2D", "init": "zero"}, "where": ["backbone.*"]}


def test_layers_by_a_section(tmp_path):
    network = trainer(tmp_path, Reparam=REFCONV).model
    paths = {path for path, layer in network.named_sublayers() if isinstance(layer, ReparamLayer)}
    assert paths
    assert all(path.startswith("backbone.") for path in paths)
    assert "Reparam" not in global_config
    assert not any(isinstance(layer, ReparamLayer) for layer in trainer(tmp_path).model.sublayers())


@pytest.mark.parametrize("section", [3, {}, {"layer": "RefConv2D"}, {"layer": {"name": "RefConv2D"}, "were": "*"}])
def test_a_section_that_says_nothing(tmp_path, section):
    with pytest.raises(UsageError, match="Reparam"):
        trainer(tmp_path, Reparam=section)


def test_layers_are_told_of_the_epochs(tmp_path):
    network = trainer(tmp_path, Reparam={"layer": {"name": "DYConv2D"}, "where": ["neck.yolo_transition*"]}).model
    layer = next(each for each in network.sublayers() if isinstance(each, ReparamLayer))
    told = []
    layer.start_epoch = told.append
    hook = next(iter(network._forward_pre_hooks.values()))
    for epoch in (0, 0, 1):
        hook(network, ({"epoch_id": epoch},))
    assert told == [1, 2]


# ---------------------------------------------------------------------------------------------------------------------
# Weights


@pytest.fixture(scope="module")
def yolo(tmp_path_factory):
    return trainer(tmp_path_factory.mktemp("yolo")).model


def test_weights_of_refconv_are_not_those_of_the_plain_network(yolo, tmp_path):
    file, state = str(tmp_path / "refconv.pdparams"), yolo.state_dict()
    kernel = next(name for name in state if state[name].ndim == 4 and name.startswith("backbone"))
    more = {**state, f"{kernel.removesuffix('weight')}convmap.weight": paddle.ones([1])}
    for prefix in ("", "backbone."):
        saved = {name.removeprefix(prefix): value for name, value in more.items() if name.startswith(prefix)}
        checkpoints.save(saved, file)
        with pytest.raises(CheckpointError, match="holds more of 1 layers"):
            checkpoint.load_pretrain_weight(yolo, file)


def test_weights_of_a_backbone_and_of_other_classes(yolo, tmp_path):
    file, state = str(tmp_path / "backbone.pdparams"), yolo.state_dict()
    zeros = {name: paddle.zeros_like(value) for name, value in state.items()}
    saved = {name.removeprefix("backbone."): each for name, each in zeros.items() if name.startswith("backbone.")}
    checkpoints.save({**saved, "fc.weight": paddle.ones([3, 5])}, file)
    checkpoint.load_pretrain_weight(yolo, file)
    after = yolo.state_dict()
    assert all(
        (float(after[name].abs().max()) == 0) == name.startswith("backbone.") for name in after if "weight" in name
    )
    yolo.set_state_dict(state)


def test_weights_in_which_nothing_fits(yolo, tmp_path):
    file = str(tmp_path / "other.pdparams")
    checkpoints.save({"other.thing": paddle.zeros([3])}, file)
    with pytest.raises(CheckpointError, match="none of its 1 entries"):
        checkpoint.load_pretrain_weight(yolo, file)
    checkpoints.save({"conv.weight": paddle.zeros([3])}, file)
    with pytest.raises(CheckpointError, match="may be .* and .* of the network"):
        checkpoint.load_pretrain_weight(yolo, file)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks that fuse themselves


def with_alpha(value):
    block = RepVggBlock(4, 4, act="swish", alpha=value is not None)
    if value is not None:
        block.alpha.set_value(paddle.to_tensor([value]))
    return block


@pytest.mark.parametrize("layer", [None, "RefConv2D", "DBB2D"])
@pytest.mark.parametrize(
    "build",
    [lambda: with_alpha(None), lambda: with_alpha(0.7), lambda: with_alpha(0.0), lambda: MobileOneBlock(4, 6, 1, 3)],
)
def test_a_block_of_theirs_with_a_layer_inside(build, layer):
    network = nn.Sequential(build())
    if layer is not None:
        replace(network, layer)
    randomise_batch_norms(network, seed=1)
    network.eval()
    x = paddle.randn([2, 4, 7, 7])
    expected = network(x)
    if layer == "DBB2D" and isinstance(network[0], MobileOneBlock):
        # Its own way forgets the bias that this layer is fused to.
        with pytest.raises(ReparamError, match="makes another function of it"):
            reparameterize(network)
        return
    fused, _ = reparameterize(network)
    assert relative_error(fused(x), expected) < 1e-5
    assert not any(isinstance(each, nn.BatchNorm2D) for each in fused.sublayers())
    assert relative_error(network(x), expected) == 0
    # A second time there is nothing to convert, by us or by them.
    fused[0].convert_to_deploy()
    assert relative_error(fused(x), expected) < 1e-5


def test_their_own_way_leaves_no_layer_out():
    block = with_alpha(None)
    replace(block, "RefConv2D")
    block.eval()
    with pytest.raises(ReparamError, match="leave out the RefConv2D"):
        block.convert_to_deploy()


# ---------------------------------------------------------------------------------------------------------------------
# Whole networks

SPEC = [[None, 3, 64, 64]]
CASCADE = {
    "architecture": "CascadeRCNN",
    "CascadeRCNN": {
        "backbone": "ResNet", "neck": "FPN", "rpn_head": "RPNHead", "bbox_head": "CascadeHead",
        "bbox_post_process": "BBoxPostProcess",
    },
    "CascadeHead": {
        "head": "CascadeTwoFCHead", "bbox_assigner": "BBoxAssigner", "roi_extractor": {"resolution": 7},
    },
    "CascadeTwoFCHead": {"out_channel": 16},
    "BBoxPostProcess": {"decode": {"name": "RCNNBox", "prior_box_var": [30.0, 30.0, 15.0, 15.0]}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "sections", "layer"),
    [
        ("ppyoloe_plain", {"CSPResNet": {"layers": [1, 1, 1]}}, "RefConv2D"),
        ("faster_rcnn_plain", CASCADE, "RefConv2D"),
        ("faster_rcnn_slak_micro", {}, None),
    ],
)
def test_a_detector_is_the_same_up_to_its_heads(recipe, sections, layer, tmp_path):
    with reading(str(detection_config(tmp_path, recipe, **sections)), []) as config:
        detector = create(config["architecture"])
    for conv in detector.sublayers():
        if isinstance(conv, nn.Conv2D) and float(conv.weight.abs().max()) == 0:
            # As the last ones of a head start.
            conv.weight.set_value(paddle.randn(conv.weight.shape) * 0.1)
    randomise_batch_norms(detector, seed=1)
    detector.eval()
    network = UpToHeads(detector)
    plain = copy_model(network)
    if layer is not None:
        replace(detector, layer, init="zero")
        assert verify(plain, network, SPEC, batches=1).relative_error == 0
    fused, report = reparameterize(network, fold_bn=True, input_spec=SPEC)
    assert "BNs" not in report.left_over
    assert verify(network, fused, SPEC, batches=1).passed
    # What was proven is the detector itself, which goes on as one.
    whole = {
        "image": paddle.randn([1, 3, 64, 64]),
        "im_shape": paddle.full([1, 2], 64.0),
        "scale_factor": paddle.ones([1, 2]),
    }
    assert set(fused.detector(whole)) >= {"bbox", "bbox_num"}


def test_no_detector_has_no_heads():
    with pytest.raises(ReparamError, match="Linear is no detector"):
        UpToHeads(nn.Linear(1, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A config with an average of the weights, and where its network was trained for an epoch."""
    folder = tmp_path_factory.mktemp("trained")
    config = detection_config(folder, "ppyoloe_plain", CSPResNet={"layers": [1, 1, 1]})
    assert run("train", "-c", config) == 0
    return config, folder / "out" / "config"


@pytest.mark.parametrize("name", ["yolov3_refconv", "picodet_refconv", "faster_rcnn_slak_micro"])
def test_train(name, tmp_path):
    config = detection_config(tmp_path, name, pretrain_weights=None)
    assert run("train", "-c", config) == 0
    assert (tmp_path / "out" / "config" / "model_final.pdparams").is_file()


def test_evaluate(trained, capsys):
    config, folder = trained
    assert run("eval", "-c", config, "--weights", folder / "best_model.pdparams") == 0
    assert "bbox mAP: " in capsys.readouterr().out
    # An evaluation takes all or nothing.
    state = checkpoints.load(folder / "best_model.pdparams")
    part = folder / "part.pdparams"
    checkpoints.save({name: value for name, value in state.items() if not name.startswith("yolo_head")}, part)
    assert run("eval", "-c", config, "--weights", part) == 1
    assert "missing" in capsys.readouterr().err


def test_a_second_stage_and_a_training_that_goes_on(trained, tmp_path, capsys):
    config, folder = trained
    where = {**REFCONV, "where": ["backbone.*", "neck.*"]}
    second = detection_config(
        tmp_path,
        "ppyoloe_plain",
        Reparam=where,
        CSPResNet={"layers": [1, 1, 1]},
        pretrain_weights=str(folder / "model_final.pdparams"),
    )
    assert run("train", "-c", second) == 0
    saved = tmp_path / "out" / "config" / "model_final"
    state, first = checkpoints.load(f"{saved}.pdparams"), checkpoints.load(folder / "model_final.pdparams")
    base = [name for name in state if name.endswith("convmap.weight")]
    kernel = base[0].replace("convmap.", "")
    assert np.array_equal(state[kernel], first[kernel])
    with paddle.utils.unique_name.guard():
        assert run("train", "-c", second, "-o", "epoch=2", "-r", f"{saved}.pdparams") == 0
    assert "Epoch: [1]" in capsys.readouterr().out
    assert run("train", "-c", config, "-o", "epoch=2", "-r", f"{saved}.pdparams") == 1
    assert "does not fit" in capsys.readouterr().err


def test_export(trained, tmp_path, capsys, monkeypatch):
    """Boxes and all, with a layer inside of blocks of theirs; what hardly finds anything proves nothing."""
    config, folder = trained
    output, weights = tmp_path / "shipped", tmp_path / "refconv.pdparams"
    section = "Reparam={layer: {name: RefConv2D, init: zero}, where: [backbone.*, neck.*]}"
    arguments = ["export", "-c", config, "-o", section, "--weights", weights, "--output", output, "--images", 2]
    with reading(str(config), [section]) as read:
        network = Trainer(read, mode="test").model
    checkpoint.load_pretrain_weight(network, str(folder / "best_model.pdparams"))
    generator = np.random.default_rng(0)
    state = network.state_dict()
    for name, value in state.items():
        if name.endswith("convmap.weight"):
            value.set_value(generator.normal(0, 0.1, value.shape).astype("float32"))
    checkpoints.save(state, weights)
    assert run(*arguments) == 1
    assert "would prove nothing" in capsys.readouterr().err
    assert not output.exists()
    monkeypatch.setattr(exporting, "_SCORE", 0.0)
    assert run(*arguments) == 0
    assert "100.0% of" in capsys.readouterr().out
    assert {"model.pdmodel", "model.pdiparams", "infer_cfg.yml"} <= {file.name for file in output.iterdir()}
    assert run(*arguments) == 2


def test_a_detector_of_two_stages_is_not_exported(tmp_path, capsys):
    config, weights = detection_config(tmp_path, "faster_rcnn_slak_micro"), tmp_path / "any.pdparams"
    checkpoints.save({"any": paddle.zeros([1])}, weights)
    assert run("export", "-c", config, "--weights", weights, "--output", tmp_path / "out") == 1
    assert "FasterRCNN proposes boxes first" in capsys.readouterr().err


def test_boxes_are_the_same():
    box = np.array([[3, 0.9, 10, 10, 20, 20]])
    others = box + np.array([[0, 0, 0.05, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0.01, 0, 0, 0, 0], [0, 0, 0, 0, 0.2, 0]])
    assert [exporting._count_same(box, other[None]) for other in others] == [1, 0, 0, 0]
    assert [exporting._count(box), exporting._count(np.zeros([0, 6])), exporting._count(0.01 * box)] == [1, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["export", "-c", "CONFIG", "--weights", "none", "--output", "x"], 2, "there is no weight file none"),
        (["export", "-c", "CONFIG", "--weights", "none", "--output", "x", "--images", "0"], 2, "it is 1 or more"),
        (["train", "-c", "none.yml"], 2, "there is no config none.yml"),
        (["eval", "-c", "CONFIG", "--weights", "none"], 2, "there is no weight file none"),
        (["train", "-c", "CONFIG", "-o", "TrainReader.batch_size=100"], 1, "do not fill a batch of 100"),
        (["train", "-c", "CONFIG", "-o", "Reparam.layer=3"], 2, "Reparam.layer needs a name"),
        (["train", "-c", "CONFIG", "-o", "epoch"], 2, "write KEY=VALUE"),
        (["train", "-c", "CONFIG", "-o", "epohc=3"], 2, "has 'epohc'"),
        (["train", "-c", "CONFIG", "-o", "architecture=Nothing"], 2, "Nothing"),
        (["train", "-c", "CONFIG", "-o", "TrainDataset.dataset_dir=none"], 1, "none"),
        (["train", "-c", "CONFIG", "-o", "EvalDataset.anno_path=none.json"], 1, "EvalDataset: there is no file"),
        (["train", "-c", "CONFIG", "-o", "EvalDataset.anno=none.json"], 2, "EvalDataset has no 'anno'"),
        (["train", "-c", "CONFIG", "-o", "pretrain_weights=none"], 2, "there is no weight file none"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(trained, capsys, arguments, code, message):
    config, _ = trained
    assert run(*(str(config) if argument == "CONFIG" else argument for argument in arguments)) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_one_sentence(workers, tmp_path, capsys):
    config = detection_config(tmp_path)
    for image in (tmp_path / "scenes" / "images").glob("train_*.png"):
        image.write_bytes(b"no image")
    assert run("train", "-c", config, "-o", f"worker_num={workers}") == 1
    assert ".png: it is no image" in capsys.readouterr().err


def test_without_paddledetection_there_is_one_sentence(tmp_path):
    (tmp_path / "ppdet.py").write_text("raise ModuleNotFoundError('no ppdet', name='ppdet')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import detect; sys.exit(detect.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "-c", "none.yml"],
        cwd=Path(detect.__file__).parent, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "PaddleDetection is not installed" in done.stderr


def test_a_script_of_a_checkout_runs_as_it_stands(tmp_path):
    """A checkout's own training script, with a network and a layer of this library in its config."""
    checkout = tmp_path / "PaddleDetection"
    (checkout / "tools").mkdir(parents=True)
    (checkout / "ppdet").symlink_to(Path(ppdet.__file__).parent)
    script = checkout / "tools" / "train.py"
    script.write_text(
        "import sys\n"
        "from ppdet.core.workspace import load_config\n"
        "from ppdet.engine import Trainer\n"
        "Trainer(load_config(sys.argv[1]), mode='train').train(False)\n"
    )
    config = detection_config(tmp_path, Reparam=REFCONV)
    done = subprocess.run(
        [sys.executable, Path(detect.__file__).with_name("launch.py"), script, config],
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    saved = checkpoints.load(tmp_path / "out" / "config" / "model_final.pdparams")
    assert any(name.endswith(".convmap.weight") for name in saved)


# ---------------------------------------------------------------------------------------------------------------------
# The page

PAGE = (ROOT / "docs" / "detection.md").read_text(encoding="utf-8")


def test_the_page_trains_by_recipes_that_are_there(tmp_path):
    commands = [shlex.split(each) for kind, block in blocks_of(PAGE) if kind == "bash" for each in commands_of(block)]
    assert len(commands) == 6
    saved = set()
    for _, script, kind, *arguments in commands:
        assert (ROOT / script).is_file()
        if kind == "scenes":
            continue
        recipe = ROOT / arguments[arguments.index("-c") + 1]
        with reading(str(recipe), []) as config:
            folder = f"{config['save_dir']}/{config['filename']}"
            pretrained = config.get("pretrain_weights")
            section = config.get("Reparam")
        assert pretrained is None or pretrained.removesuffix("/best_model.pdparams") in saved
        if kind == "train":
            saved.add(folder)
        else:
            assert arguments[arguments.index("--weights") + 1] == f"{folder}/best_model"
    [written] = [yaml.safe_load(block) for kind, block in blocks_of(PAGE) if kind == "yaml"]
    assert written == {"pretrain_weights": pretrained, "Reparam": section}


def test_the_program_of_the_page(tmp_path, monkeypatch, capsys):
    [program] = [block for kind, block in blocks_of(PAGE) if kind == "python"]
    config = detection_config(tmp_path, MobileNet={"scale": 0.25})
    program = program.replace("ppdet_configs/scenes/yolov3_plain.yml", str(config))
    with reading(str(config), []):
        exec(compile(program, "detection.md", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert "RefConv2D -> Conv2D" in printed
    assert re.search(r"^yes", printed, re.M)
