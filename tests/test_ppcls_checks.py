"""What is refused before a run starts: configs, overrides, and runs that could only go wrong."""

import pytest

from paddle_reparam.errors import UnknownName
from paddle_reparam.ppcls import setup
from paddle_reparam.ppcls.errors import ConfigError

setup()

from paddle_reparam.ppcls.command import read_config  # noqa: E402
from paddle_reparam.ppcls.validation import check_config, check_run  # noqa: E402

BACKBONE = {"name": "MobileNetV1_x0_25"}

CONFIG = """
Global: {epochs: 1, device: cpu, print_batch_step: 1, save_interval: 1, eval_during_train: false, eval_interval: 1}
Arch: {name: MobileNetV1_x0_25, class_num: 2}
DataLoader: {Train: {dataset: {name: ImageNetDataset, transform_ops: [{ResizeImage: {size: 8}}]}}}
Metric: {Eval: [{TopkAcc: {topk: [1]}}]}
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return str(path)


def test_overrides_are_applied(config_file):
    overrides = ["Global.epochs=3", "Optimizer.lr.learning_rate=0.5", "Global.eval_mode=classification"]
    config = read_config(config_file, [*overrides, "DataLoader.Train.dataset.transform_ops.0.ResizeImage.size=9"])
    assert config["Global"]["epochs"] == 3
    assert config["Optimizer"]["lr"]["learning_rate"] == 0.5
    assert config["Global"]["eval_mode"] == "classification"
    assert config["DataLoader"]["Train"]["dataset"]["transform_ops"][0]["ResizeImage"]["size"] == 9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("Global.epochs", "write KEY=VALUE with one ="),
        ("Global.epochs=1=2", "write KEY=VALUE with one ="),
        ("Globl.epochs=1", "the config has no 'Globl'; did you mean 'Global'"),
        ("Zebra.epochs=1", "the config has no 'Zebra'; known: AMP, Arch"),
        ("Global.epoch=1", "Global has no 'epoch'; did you mean 'epochs'"),
        ("Global.epochs.x=1", "Global.epochs is 1 and has nothing named 'x'"),
        ("DataLoader.Train.dataset.transform_ops.1.x=1", "transform_ops is a list of 1 and has no '1'"),
        ("DataLoader.Train.dataset.transform_ops.first=1", "transform_ops is a list of 1 and has no 'first'"),
    ],
)
def test_overrides_that_are_refused(config_file, override, message):
    with pytest.raises(ConfigError, match=message):
        read_config(config_file, [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("Global: [", "is no YAML file with sections"),
        ("just text", "is no YAML file with sections"),
        ("", "is no YAML file with sections"),
        ("Global: {epochs: 1}", "has no section Arch"),
    ],
)
def test_configs_that_are_refused(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_config(str(path))


def checked(config_file, mode, *overrides, arch=None):
    config = read_config(config_file, overrides)
    config["Arch"] = arch or config["Arch"]
    check_run(config, mode)
    check_config(config, mode)
    return config


REPARAM = {"name": "ReparamModel", "class_num": 2, "backbone": BACKBONE, "layer": {"name": "RefConv2D"}}


@pytest.mark.parametrize(
    ("mode", "overrides", "error", "message"),
    [
        ("train", ["Arch.name=MobileNetV9"], UnknownName, "no Arch named 'MobileNetV9'; did you mean MobileNetV"),
        ("train", ["Arch.name="], ConfigError, "Arch has no name"),
        ("train", ["DataLoader.Train.dataset.image_root=no/such"], ConfigError, "image_root: there is no no/such"),
        ("eval", [], ConfigError, "eval has no weights: set Global.pretrained_model"),
        ("eval", ["Global.checkpoints=out/latest"], ConfigError, "eval reads Global.pretrained_model: set that to out"),
        ("infer", [], ConfigError, "infer has no weights"),
        ("export", ["Arch.pretrained=True"], ConfigError, "lacks Global.image_shape, Global.save_inference_dir"),
    ],
)
def test_runs_that_are_refused(config_file, mode, overrides, error, message):
    with pytest.raises(error, match=message):
        checked(config_file, mode, *overrides)


@pytest.mark.parametrize("inside", ["Arch", "Backbone", "models"])
def test_refconv_without_a_base_is_refused(config_file, inside):
    layer = REPARAM["layer"]
    arch = {
        "Arch": lambda part: part,
        "Backbone": lambda part: {"name": "RecModel", "Backbone": part},
        "models": lambda part: {"name": "DistillationModel", "models": [{"Student": part}]},
    }[inside]
    message = "nothing to refocus: set Arch.pretrained or Global.pretrained_model"
    with pytest.raises(ConfigError, match=message):
        checked(config_file, "train", arch=arch(REPARAM))
    for part in (
        {**REPARAM, "layer": {**layer, "base": "random"}},
        {**REPARAM, "pretrained": "baseline"},
        {**REPARAM, "backbone": {**BACKBONE, "pretrained": True}},
    ):
        checked(config_file, "train", arch=arch(part))
    for key in ("pretrained_model", "checkpoints"):
        checked(config_file, "train", f"Global.{key}=x", arch=arch(REPARAM))


def test_the_baseline_is_not_asked_for_where_its_weights_are_replaced(config_file):
    arch = {**REPARAM, "pretrained": "moved/away"}
    config = checked(config_file, "eval", "Global.pretrained_model=x", arch=arch)
    assert config["Arch"]["pretrained"] is None
    with pytest.raises(ConfigError, match="eval has no weights"):
        checked(config_file, "eval", arch={**REPARAM, "pretrained": "baseline"})


def test_weights_of_paddleclas_own_are_enough_to_evaluate(config_file):
    checked(config_file, "eval", "Arch.pretrained=True")


def test_batch_norms_are_synchronised_in_training_on_a_gpu_only(config_file):
    for mode, device, kept in (("train", "gpu", True), ("train", "cpu", False), ("eval", "gpu", False)):
        overrides = ["Arch.use_sync_bn=True", f"Global.device={device}", "Global.pretrained_model=x"]
        assert checked(config_file, mode, *overrides)["Arch"]["use_sync_bn"] is kept
