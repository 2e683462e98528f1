"""The commands train, eval, infer, export_model and launch, on images of 16 pixels that the tests draw."""

import json
import os
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
import yaml
from helpers import relative_error
from launch import launch
from PIL import Image

from paddle_reparam.ppcls import locate, setup
from paddle_reparam.weights import checkpoints

ppcls = setup()

from paddle_reparam.ppcls import reparam, saving  # noqa: E402
from paddle_reparam.ppcls.command import main, read_config  # noqa: E402

TOOLS = Path(__file__).resolve().parents[1] / "tools"
HOME = os.environ.get(locate.HOME)
IN_A_CHECKOUT = pytest.mark.skipif(not HOME, reason="needs a checkout of PaddleClas: set PADDLECLAS_HOME")
PLAIN = {"name": "MobileNetV1_x0_25", "class_num": 2}
REFCONV = {
    "name": "ReparamModel", "class_num": 2, "backbone": {"name": "MobileNetV1_x0_25"}, "layer": {"name": "RefConv2D"},
}  # fmt: skip


def draw_images(folder: Path) -> None:
    """Write 8 images to train on and 5 to evaluate: the second class is brighter."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 5)):
        lines = []
        for i in range(count):
            pixels = generator.integers(0, 128, (16, 16, 3)) + i % 2 * 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{split}_{i}.png")
            lines.append(f"{split}_{i}.png {i % 2}\n")
        (folder / f"{split}.txt").write_text("".join(lines))


def config_of(data: Path, arch: dict) -> dict:
    normalise = {"NormalizeImage": {"scale": "1.0/255.0", "mean": [0.5] * 3, "std": [0.5] * 3, "order": ""}}
    transforms = [{"DecodeImage": {"to_rgb": True, "channel_first": False}}, normalise]

    def loader(split: str) -> dict:
        return {
            "dataset": {
                "name": "ImageNetDataset", "image_root": str(data), "cls_label_path": str(data / f"{split}.txt"),
                "transform_ops": transforms,
            },
            "sampler": {"name": "DistributedBatchSampler", "batch_size": 4, "drop_last": False, "shuffle": False},
            "loader": {"num_workers": 0, "use_shared_memory": False},
        }  # fmt: skip

    return {
        "Global": {
            "device": "cpu", "seed": 0, "epochs": 1, "save_interval": 1, "eval_during_train": True, "eval_interval": 1,
            "print_batch_step": 1, "use_visualdl": True, "image_shape": [3, 16, 16],
            "checkpoints": None, "pretrained_model": None,
        },
        "Arch": arch,
        "Loss": {"Train": [{"CELoss": {"weight": 1.0}}], "Eval": [{"CELoss": {"weight": 1.0}}]},
        "Optimizer": {
            "name": "Momentum", "momentum": 0.9, "lr": {"name": "Constant", "learning_rate": 0.01},
            "regularizer": {"name": "L2", "coeff": 1e-4},
        },
        "DataLoader": {"Train": loader("train"), "Eval": loader("val")},
        "Metric": {"Train": [{"TopkAcc": {"topk": [1]}}], "Eval": [{"TopkAcc": {"topk": [1]}}]},
        "Infer": {
            "infer_imgs": str(data / "val_0.png"), "batch_size": 1, "transforms": [*transforms, {"ToCHWImage": None}],
            "PostProcess": {"name": "Topk", "topk": 1, "class_id_map_file": None},
        },
    }  # fmt: skip


def train_as_a_process_of_its_own(arguments: list[str]) -> int:
    """Train with parameters that are named from the start: the optimizer's state is found again by these names."""
    with paddle.utils.unique_name.guard():
        return main("train", arguments)


class Place:
    """A folder with images and configs, and what the commands make in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = root / "data"
        self.data.mkdir()
        draw_images(self.data)

    def config(self, arch: dict, **sections) -> str:
        """Write a config and return its path."""
        path = self.root / f"{len(list(self.root.glob('*.yaml')))}.yaml"
        path.write_text(yaml.safe_dump({**config_of(self.data, arch), **sections}))
        return str(path)

    def arguments(self, config: str, run: str, *overrides: str) -> list[str]:
        given = [f"Global.output_dir={self.root / run}", f"Global.save_inference_dir={self.root / run / 'inference'}"]
        return ["-c", config, *(part for o in [*given, *overrides] for part in ("-o", o))]

    def saved(self, run: str, name: str = "latest") -> str:
        """Return the path, without suffix, of what a run saved; 2.4 has a folder for each Arch in between."""
        (path,) = self.root.joinpath(run).rglob(f"{name}.pdparams")
        return str(path)[: -len(".pdparams")]

    def log(self, run: str, mode: str = "train") -> str:
        (path,) = self.root.joinpath(run).rglob(f"{mode}.log")
        return path.read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("tools"))


@pytest.fixture(scope="module")
def baseline(place):
    """The weights of a plain network, trained for one epoch."""
    assert main("train", place.arguments(place.config(PLAIN), "baseline")) == 0
    return place.saved("baseline")


@pytest.fixture(scope="module")
def refconv(place):
    return place.config(REFCONV)


@pytest.fixture(scope="module")
def trained(place, baseline, refconv):
    """The weights of stage 2: the same network with RefConv layers on the baseline's weights."""
    arguments = place.arguments(refconv, "refconv", f"Global.pretrained_model={baseline}")
    assert train_as_a_process_of_its_own(arguments) == 0
    return place.saved("refconv")


def fails(capsys, code: int, message: str, command, *arguments) -> None:
    """Expect an exit code and one sentence on stderr."""
    assert command(*arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_training_saves_evaluates_and_logs(place, baseline):
    log = place.log("baseline")
    assert "[Train][Epoch 1/1][Avg]top1: " in log
    assert "[Eval][Epoch 1][Avg]CELoss: " in log
    for name in ("latest", "best_model", "epoch_1"):
        assert Path(place.saved("baseline", name) + ".pdopt").is_file()


def test_visualdl_reads_the_log(place, baseline):
    from visualdl import LogReader

    (file,) = place.root.joinpath("baseline").rglob("vdlrecords.*.log")
    reader = LogReader(file_path=str(file))
    curves = {
        tag: {each.id: each.value for each in reader.get_data("scalar", tag)} for tag in reader.get_tags()["scalar"]
    }
    assert list(curves["train_loss"]) == list(curves["train_top1"]) == [1, 2]
    assert np.isfinite(list(curves["train_loss"].values())).all()
    # What is logged of the evaluation, over five images in batches of four and one.
    printed = next(line for line in place.log("baseline").splitlines() if "[Eval][Epoch 1][Avg]" in line)
    evaluated = {name: float(value) for name, value in re.findall(r"(\w+): ([\d.]+)", printed.split("[Avg]")[1])}
    assert set(evaluated) == {"CELoss", "loss", "top1"}
    for tag, name in (("eval_CELoss", "CELoss"), ("eval_loss", "loss"), ("eval_acc", "top1")):
        assert curves[tag] == {1: pytest.approx(evaluated[name], rel=1e-4)}


def test_stage_two_trains_the_refocusing_and_keeps_the_base(place, baseline, trained):
    before, after = checkpoints.load(f"{baseline}.pdparams"), checkpoints.load(f"{trained}.pdparams")
    assert relative_error(after["conv.conv.weight"], before["conv.conv.weight"]) == 0
    assert relative_error(after["fc.weight"], before["fc.weight"]) > 0
    assert {n for n in after if n not in before} == {n for n in after if n.endswith("convmap.weight")}
    # The optimizer keeps something of what is trained alone.
    base = [name.replace("convmap.", "") for name in after if name.endswith("convmap.weight")]
    learning = [name for name in after if name not in base and not name.endswith(("._mean", "._variance"))]
    [state] = saving.read_states(f"{trained}.pdopt")
    kept = sum(value.size for value in state.values() if isinstance(value, np.ndarray))
    assert kept == sum(after[name].size for name in learning)


def test_what_a_training_says(place, baseline, refconv, caplog):
    """What is replaced, in short and once; where the weights are; and what to type next, which works."""
    given = [f"Global.pretrained_model={baseline}", "Arch.infer_add_softmax=False", "Optimizer.lr.learning_rate=0.02"]
    assert train_as_a_process_of_its_own(place.arguments(refconv, "says", *given)) == 0
    printed, [log] = caplog.text, place.root.joinpath("says").rglob("train.log")
    assert printed.count("14 done, 13 skipped (52% done)") == 1
    assert re.search(r"^ +14  RefConv2D\n +13  skipped: a 1x1 convolution has no", printed, re.M)
    assert f"each layer: {log}" in printed
    whole = re.compile(r"^conv\.conv +done +RefConv2D\(3->8, 3x3", re.M)
    assert (len(whole.findall(printed)), len(whole.findall(log.read_text()))) == (0, 1)

    assert ".partial" not in printed
    places = {name: place.saved("says", name) for name in ("best_model", "latest", "epoch_1")}
    assert "Already save" not in printed
    assert [text for text in caplog.messages if text.startswith("saved: ")] == [
        f"saved: {places[name]}.pdparams" for name in ("best_model", "epoch_1", "latest")
    ]
    *_, best, latest, following = caplog.messages
    assert re.fullmatch(rf"best weights \(of epoch 1, 0\.\d{{5}}\): {places['best_model']}\.pdparams", best)
    assert latest == f"latest weights: {places['latest']}.pdparams"
    python, tool, *arguments = shlex.split(following.splitlines()[-1])
    assert (python, tool) == ("python", "tools/reparam.py")
    assert arguments == [
        "-c", refconv, "-o", "Arch.infer_add_softmax=False", "--weights", f"{places['best_model']}.pdparams",
        "--output", str(place.root / "says" / "shipped"),
    ]  # fmt: skip
    assert reparam.main([*arguments, "--dry-run"]) == 0

    # All epochs are done: it says so, and the same again.
    caplog.clear()
    assert main("train", place.arguments(refconv, "says", "Global.checkpoints=auto", given[1])) == 0
    assert caplog.messages[-3:] == [best, latest, following]


def test_the_baseline_may_stand_in_arch(place, baseline, refconv):
    assert main("train", place.arguments(refconv, "arch", f"Arch.pretrained={baseline}")) == 0
    before, after = checkpoints.load(f"{baseline}.pdparams"), checkpoints.load(place.saved("arch") + ".pdparams")
    assert relative_error(after["conv.conv.weight"], before["conv.conv.weight"]) == 0


def test_training_goes_on_from_a_checkpoint(place, trained, refconv):
    overrides = ["Global.epochs=2", f"Global.checkpoints={trained}"]
    assert train_as_a_process_of_its_own(place.arguments(refconv, "resumed", *overrides)) == 0
    log = place.log("resumed")
    assert "[Train][Epoch 2/2][Avg]" in log
    assert "[Train][Epoch 1/2]" not in log
    assert Path(place.saved("resumed", "epoch_2") + ".pdparams").is_file()


def test_mixed_precision(place, baseline, refconv):
    overrides = ["AMP.level=O1", "AMP.scale_loss=128.0", "AMP.use_dynamic_loss_scaling=True"]
    overrides.append(f"Global.pretrained_model={baseline}")
    assert main("train", place.arguments(refconv, "amp", *overrides)) == 0
    before, after = checkpoints.load(f"{baseline}.pdparams"), checkpoints.load(place.saved("amp") + ".pdparams")
    assert relative_error(after["conv.conv.weight"], before["conv.conv.weight"]) == 0
    assert after["conv.conv.convmap.weight"].dtype == np.float32


@IN_A_CHECKOUT
def test_moving_average(place, baseline, refconv):
    given = place.arguments(refconv, "ema", "EMA.decay=0.5", f"Global.pretrained_model={baseline}")
    assert main("train", given) == 0
    before, after = checkpoints.load(f"{baseline}.pdparams"), checkpoints.load(place.saved("ema") + ".pdparams")
    assert relative_error(after["conv.conv.weight"], before["conv.conv.weight"]) < 1e-6
    assert Path(place.saved("ema") + ".pdema").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation, inference, export


def test_evaluation(place, trained, refconv):
    assert main("eval", place.arguments(refconv, "eval", f"Global.pretrained_model={trained}")) == 0
    last = [line for line in place.log("refconv").splitlines() if "[Eval][Epoch 1][Avg]" in line][-1]
    again = [line for line in place.log("eval", "eval").splitlines() if "[Eval][Epoch 0][Avg]" in line][-1]
    assert again.split("[Avg]")[1] == last.split("[Avg]")[1]


def test_inference(place, trained, refconv, capfd):
    assert main("infer", place.arguments(refconv, "infer", f"Global.pretrained_model={trained}")) == 0
    out = capfd.readouterr().out + place.log("infer", "infer")
    assert "'class_ids'" in out
    assert "val_0.png" in out


@pytest.mark.parametrize("arch", [REFCONV, {"name": "ResNet20_SPConv", "class_num": 2}], ids=["RefConv2D", "SPConv2D"])
def test_the_export_is_fused_and_the_same_function(place, arch, request):
    config = place.config(arch)
    if arch is REFCONV:
        weights = request.getfixturevalue("trained")
    else:
        assert main("train", place.arguments(config, "spconv")) == 0
        weights = place.saved("spconv")
    assert main("export", place.arguments(config, f"export_{arch['name']}", f"Global.pretrained_model={weights}")) == 0

    model = ppcls.arch.build_model({"Arch": arch, "Global": {"device": "cpu"}})
    checkpoints.load_into(model, f"{weights}.pdparams")
    model.eval()
    exported = paddle.jit.load(str(place.root / f"export_{arch['name']}" / "inference" / "inference"))
    images = paddle.to_tensor(np.random.default_rng(1).standard_normal((3, 3, 16, 16)), dtype="float32")
    assert relative_error(exported(images), paddle.nn.functional.softmax(model(images))) < 1e-5

    held = sum(int(np.prod(value.shape)) for value in exported.state_dict().values())
    in_train_form = sum(int(np.prod(value.shape)) for value in model.state_dict().values())
    for layer in model.sublayers():
        if hasattr(layer, "re_parameterize"):
            layer.re_parameterize()
    fused = sum(int(np.prod(value.shape)) for value in model.state_dict().values())
    assert held == fused
    # SPConv's inference form holds the weights of the uncertain channels twice: additions in convolutions are faster.
    assert (fused < in_train_form) == (arch is REFCONV)


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


def test_no_base_to_refocus(place, refconv, capsys):
    fails(capsys, 2, "has nothing to refocus: set Arch.pretrained or", main, "train", place.arguments(refconv, "x"))


@pytest.mark.parametrize("mode", ["eval", "infer", "export"])
def test_a_baseline_is_not_evaluated_with_random_refocusing(place, baseline, refconv, capsys, mode):
    arguments = place.arguments(refconv, "x", f"Global.pretrained_model={baseline}")
    message = f"it lacks 14 refocusing weights (conv.conv.convmap.weight), which would stay random; for {mode} give"
    fails(capsys, 1, message, main, mode, arguments)
    assert not list(place.root.glob("x/inference/*"))


@pytest.mark.parametrize("mode", ["train", "eval", "export"])
def test_weights_of_another_model(place, baseline, capsys, mode):
    config = place.config({**PLAIN, "class_num": 3})
    arguments = place.arguments(config, "x", f"Global.pretrained_model={baseline}")
    fails(capsys, 1, "fc.weight (file [256, 2], model [256, 3])", main, mode, arguments)


def test_a_checkpoint_of_another_model(place, baseline, refconv, capsys):
    arguments = place.arguments(refconv, "x", f"Global.checkpoints={baseline}")
    fails(capsys, 1, "it lacks 14 refocusing weights", main, "train", arguments)


def test_a_checkpoint_without_its_optimizer(place, trained, refconv, tmp_path, capsys):
    shutil.copy(f"{trained}.pdparams", tmp_path / "latest.pdparams")
    arguments = place.arguments(refconv, "x", f"Global.checkpoints={tmp_path / 'latest'}")
    fails(capsys, 1, f"there is no file {tmp_path / 'latest.pdopt'}", main, "train", arguments)


def test_a_weight_file_that_is_not_there(place, refconv, capsys):
    arguments = place.arguments(refconv, "x", "Global.pretrained_model=no/such")
    fails(capsys, 2, "there is no weight file no/such or no/such.pdparams", main, "eval", arguments)


class Hostile:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_weight_file_is_not_run(place, refconv, tmp_path, capsys):
    import pickle

    (tmp_path / "bad.pdparams").write_bytes(pickle.dumps({"conv.conv.weight": Hostile(tmp_path / "it_ran")}))
    arguments = place.arguments(refconv, "x", f"Global.pretrained_model={tmp_path / 'bad'}")
    fails(capsys, 1, "bad.pdparams", main, "eval", arguments)
    assert not (tmp_path / "it_ran").exists()


def test_the_weights_of_a_training_loss_are_no_fault(place, capsys):
    """CenterLoss has weights, which are saved with the network's and which only training has a use for."""
    head = {"Head": {"name": "FC", "embedding_size": 8, "class_num": 2}}
    neck = {"BackboneStopLayer": {"name": "flatten"}, "Neck": {"name": "FC", "embedding_size": 256, "class_num": 8}}
    arch = {"name": "RecModel", "Backbone": {"name": "MobileNetV1_x0_25"}, **neck, **head, "class_num": 2}
    losses = [{"CELoss": {"weight": 1.0}}, {"CenterLoss": {"weight": 0.1, "num_classes": 2, "feat_dim": 8}}]
    config = place.config(arch, Loss={"Train": losses, "Eval": [{"CELoss": {"weight": 1.0}}]})
    weights = ppcls.arch.build_model(read_config(config)).state_dict()
    weights.update(ppcls.loss.build_loss(losses).state_dict())
    assert "loss_func.1.centers" in weights
    path = place.root / "with_loss.pdparams"
    checkpoints.save(weights, path)
    assert main("export", place.arguments(config, "loss", f"Global.pretrained_model={path}")) == 0

    checkpoints.save({**weights, "other": weights["loss_func.1.centers"]}, path)
    arguments = place.arguments(config, "loss", f"Global.pretrained_model={path}")
    fails(capsys, 1, "1 extra: other", main, "export", arguments)


# ---------------------------------------------------------------------------------------------------------------------
# The scripts


@pytest.mark.parametrize("tool", ["train", "eval", "infer", "export_model"])
def test_scripts_answer_bad_usage(tool, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["-c", "no.yaml"], "error: the config no.yaml cannot be read"),
        ([], "arguments are required: -c"),
    ):
        monkeypatch.setattr(sys, "argv", [f"{tool}.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(TOOLS / f"{tool}.py"), run_name="__main__")
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_launch_runs_a_script_with_everything_registered(tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, json\nfrom ppcls.engine.engine import Engine\nfrom ppcls import arch\n"
        "print(json.dumps([Engine.__module__, hasattr(arch, 'ReparamModel'), sys.argv[1:]]))\n"
    )
    assert launch([str(script), "-c", "x.yaml", "--flag"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == ["paddle_reparam.ppcls.engine", True, ["-c", "x.yaml", "--flag"]]


def test_launch_without_its_script(capsys):
    fails(capsys, 2, "there is no script no/such.py", launch, ["no/such.py"])


@IN_A_CHECKOUT
def test_the_stock_scripts_run_unchanged(place, baseline, refconv, monkeypatch, capsys):
    stock = Path(HOME) / "tools"
    arguments = place.arguments(refconv, "stock", f"Global.pretrained_model={baseline}")
    monkeypatch.setattr(sys, "argv", sys.argv)
    assert launch([str(stock / "train.py"), *arguments]) == 0
    weights = place.saved("stock")
    for tool in ("eval", "infer", "export_model"):
        given = place.arguments(refconv, "stock", f"Global.pretrained_model={weights}")
        assert launch([str(stock / f"{tool}.py"), *given]) == 0
    assert (place.root / "stock" / "inference" / "inference.pdiparams").is_file()
    capsys.readouterr()
    fails(capsys, 1, "it lacks 14 refocusing weights", launch, [str(stock / "eval.py"), *arguments])
    given = place.arguments(refconv, "stock", "Arch.backbone.name=MobileNetV9")
    fails(capsys, 2, "did you mean MobileNetV", launch, [str(stock / "train.py"), *given])


def test_a_temperature_falls_with_the_epochs_of_a_run(place):
    """Resumed or not: the epoch decides, and the weights keep it; it does not rise in the next run."""
    layer = {"name": "DYConv2D", "experts": 2, "temperature": 9.0, "temperature_epochs": 4}
    plain = {"name": "MobileNetV1_x0_25"}
    arch = {"name": "ReparamModel", "class_num": 2, "backbone": plain, "layer": layer, "where": "blocks.[12].*"}
    config = place.config(arch)
    assert train_as_a_process_of_its_own(place.arguments(config, "whole", "Global.epochs=3")) == 0
    resume = (f"Global.checkpoints={place.saved('whole', 'epoch_2')}", "Global.epochs=3")
    assert train_as_a_process_of_its_own(place.arguments(config, "resumed", *resume)) == 0
    further = [f"Global.pretrained_model={place.saved('whole')}", *(["EMA.decay=0.5"] if HOME else [])]
    assert main("train", place.arguments(config, "further", *further)) == 0

    states = {run: checkpoints.load(f"{place.saved(run)}.pdparams") for run in ("whole", "resumed", "further")}
    states["half"] = checkpoints.load(f"{place.saved('whole', 'epoch_2')}.pdparams")
    temperatures = [key for key in states["whole"] if key.endswith("attention.temperature")]
    assert temperatures
    for run, expected in {"half": 7.0, "whole": 5.0, "resumed": 5.0, "further": 5.0}.items():
        assert {float(states[run][key]) for key in temperatures} == {expected}, run
    for key, value in states["whole"].items():
        np.testing.assert_array_equal(states["resumed"][key], value, err_msg=key)
