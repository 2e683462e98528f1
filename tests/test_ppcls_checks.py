"""What is refused before a run starts: configs, overrides, and runs that could only go wrong."""

import importlib
from pathlib import Path

import paddle
import pytest

from paddle_reparam.errors import UnknownName, UsageError
from paddle_reparam.ppcls import setup
from paddle_reparam.ppcls.errors import ConfigError

setup()

from paddle_reparam.ppcls import monitoring, sparse, values  # noqa: E402
from paddle_reparam.ppcls.command import read_config  # noqa: E402
from paddle_reparam.ppcls.validation import check_config, check_run  # noqa: E402

BACKBONE = {"name": "MobileNetV1_x0_25"}

CONFIG = """
Global: {epochs: 1, device: cpu, print_batch_step: 1, save_interval: 1, eval_during_train: false, eval_interval: 1}
Arch: {name: MobileNetV1_x0_25, class_num: 2}
Loss: {Train: [{CELoss: {weight: 1.0}}]}
Optimizer: {name: Momentum, momentum: 0.9, lr: {name: Cosine, learning_rate: 0.1, warmup_epoch: 0},
            regularizer: {name: L2, coeff: 0.1}}
DataLoader:
  Train: &part
    dataset:
      name: ImageNetDataset
      image_root: FOLDER
      cls_label_path: FOLDER/config.yaml
      transform_ops: [{DecodeImage: {to_rgb: true}}, {ResizeImage: {size: 8}}, {ToCHWImage: null}]
      batch_transform_ops: [{MixupOperator: {alpha: 0.2}}]
    sampler: {name: DistributedBatchSampler, batch_size: 2, drop_last: false, shuffle: true}
    loader: {num_workers: 0, use_shared_memory: false}
  Eval: *part
Metric: {Train: [{TopkAcc: {topk: [1, 5]}}], Eval: [{TopkAcc: {topk: [1, 5]}}]}
Infer:
  infer_imgs: FOLDER
  batch_size: 1
  transforms: [{DecodeImage: {to_rgb: true}}]
  PostProcess: {name: Topk, topk: 1}
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("FOLDER", str(tmp_path)))
    return str(path)


def test_overrides_are_applied(config_file):
    overrides = ["Global.epochs=3", "Optimizer.lr.learning_rate=0.5", "Global.eval_mode=classification"]
    config = read_config(config_file, [*overrides, "DataLoader.Train.dataset.transform_ops.1.ResizeImage.size=9"])
    assert config["Global"]["epochs"] == 3
    assert config["Optimizer"]["lr"]["learning_rate"] == 0.5
    assert config["Global"]["eval_mode"] == "classification"
    assert config["DataLoader"]["Train"]["dataset"]["transform_ops"][1]["ResizeImage"]["size"] == 9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("Global.epochs", "write KEY=VALUE with one ="),
        ("Global.epochs=1=2", "write KEY=VALUE with one ="),
        ("Globl.epochs=1", "the config has no 'Globl'; did you mean 'Global'"),
        ("Zebra.epochs=1", "the config has no 'Zebra'; known: AMP, Arch"),
        ("Global.epoch=1", "Global has no 'epoch'; did you mean 'epochs'"),
        ("Global.epochs.x=1", "Global.epochs is 1 and has nothing named 'x'"),
        ("DataLoader.Train.dataset.transform_ops.3.x=1", "transform_ops is a list of 3 and has no '3'"),
        ("DataLoader.Train.dataset.transform_ops.first=1", "transform_ops is a list of 3 and has no 'first'"),
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


DATASET = "DataLoader.Train.dataset"


@pytest.mark.parametrize(
    ("mode", "override", "message"),
    [
        ("train", "Global.epochs=abc", "Global.epochs is 'abc'; it takes a whole number from 1"),
        ("train", "Global.epochs=0", "Global.epochs is 0; it takes a whole number from 1"),
        ("train", "Global.epochs=2.0", "Global.epochs is 2.0; it takes a whole number"),
        ("train", "Global.save_interval=0", "Global.save_interval is 0; it takes a whole number from 1"),
        ("train", "Global.print_batch_step=0", "print_batch_step is 0; it takes"),
        ("train", "Global.seed=-5", "Global.seed is -5; it takes a whole number from 0 to 4294967295"),
        ("train", "Global.eval_during_train=abc", "eval_during_train is 'abc'; it takes True or False"),
        ("train", "Global.output_dir=[1]", r"output_dir is \[1\]; it takes a text"),
        ("train", "Global.output_dir=/dev/null/x", "/dev/null is not a folder"),
        ("train", "Global.device=cuda", "device is 'cuda'; it takes cpu or gpu; which GPU is chosen with CUDA_VISIBLE"),
        ("train", "Global.device=gpu:0", "device is 'gpu:0'; it takes cpu or gpu"),
        ("train", "Global.pretrained_model=[1]", "pretrained_model is .*; it takes a text, or a list"),
        ("train", "Arch.class_num=-1", "Arch.class_num is -1; it takes a whole number from 1"),
        ("train", "Arch.scale=1000000000", "Arch.scale is 1000000000; no network is that large"),
        ("train", "Arch.models=x", "Arch.models is 'x'; it takes a list"),
        ("train", "Loss.Train=CELoss", "Loss.Train is 'CELoss'; it takes a list of NAME: OPTIONS"),
        ("train", "Loss.Train={CELos: {weight: 1}}", "Loss.Train is .*; it takes a list"),
        (
            "train",
            "Loss.Train=[{CELos: {weight: 1}}]",
            "Loss.Train.0: there is no loss named 'CELos'; did you mean CELoss",
        ),
        ("train", "Loss.Train=[{CELoss: {}}]", "CELoss needs the option weight"),
        ("train", "Loss.Train.0.CELoss.epsilo=0.1", "CELoss has no 'epsilo'; did you mean 'epsilon'"),
        ("train", "Loss.Train.0.CELoss.zebra=0.1", "CELoss has no option 'zebra'; it takes epsilon"),
        (
            "train",
            "Optimizer.name=Momentun",
            "Optimizer: there is no optimizer named 'Momentun'; did you mean Momentum",
        ),
        ("train", "Optimizer.name=[1]", "the name of the optimizer is .*; it takes a text"),
        ("train", "Optimizer={name: Momentum, lr: {learning_rate: 1}}", "Momentum needs the option momentum"),
        ("train", "Optimizer.lr=0.1", "Optimizer.lr is 0.1; it takes a section"),
        ("train", "Optimizer.lr.name=Cosin", "no schedule of the learning rate named 'Cosin'; did you mean Cosine"),
        ("train", "Optimizer.lr.learning_rate=-1", "learning_rate of Cosine is -1; it takes a number from 0"),
        ("train", "Optimizer.lr={learning_rate: abc}", "learning_rate is 'abc'; it takes a number"),
        ("train", "Optimizer.lr={name: Cosine, learning_rate: 1, warmup_epch: 2}", "did you mean 'warmup_epoch'"),
        ("train", "Optimizer.regularizer.name=L3", "regularizer.name is 'L3'; it takes one of L1, L2"),
        ("train", "Optimizer.weight_deca=1", "Optimizer has no 'weight_deca'; did you mean 'weight_decay'"),
        (
            "train",
            f"{DATASET}.name=ImageNetDatasett",
            "no data set named 'ImageNetDatasett'; did you mean ImageNetData",
        ),
        ("train", f"{DATASET}.zebra=1", "ImageNetDataset has no option 'zebra'; it takes cls_label_path"),
        ("train", f"{DATASET}.image_root=/dev/null", "image_root: /dev/null is not a folder"),
        ("train", f"{DATASET}.cls_label_path=/dev", "cls_label_path: /dev is not a file"),
        ("train", f"{DATASET}.transform_ops=[DecodeImage]", "transform_ops.0 is 'DecodeImage'; it takes one NAME: OPT"),
        (
            "train",
            f"{DATASET}.transform_ops.0={{DecodImage: }}",
            "no transform named 'DecodImage'; did you mean Decode",
        ),
        ("train", f"{DATASET}.transform_ops.1.ResizeImage.siz=8", "ResizeImage has no 'siz'; did you mean 'size'"),
        ("train", f"{DATASET}.transform_ops.1.ResizeImage.size=1000000", "size of ResizeImage is 1000000; it takes"),
        (
            "train",
            f"{DATASET}.batch_transform_ops.0.MixupOperator.alpha=x",
            "alpha of MixupOperator is 'x'; it takes a num",
        ),
        ("train", "DataLoader.Train.sampler.name=BatchSample", "no sampler named 'BatchSample'; did you mean Batch"),
        ("train", "DataLoader.Train.sampler.batch_size=0", "batch_size of .* is 0|batch_size is 0; it takes"),
        ("train", "DataLoader.Train.sampler.drop_lst=True", "'drop_lst'; did you mean 'drop_last'"),
        ("train", "DataLoader.Train.loader.num_workers=1000000", "num_workers is 1000000; it takes"),
        ("train", "DataLoader.Train=null", "DataLoader.Train is null"),
        ("train", "Metric.Train=[{TopkAc: {topk: 1}}]", "no metric named 'TopkAc'; did you mean TopkAcc"),
        ("train", "Metric.Train.0.TopkAcc.top=1", "TopkAcc has no 'top'; did you mean 'topk'"),
        ("train", "AMP.lvel=O1", "AMP has no 'lvel'; did you mean 'level'"),
        ("train", "AMP.level=O3", "AMP.level is 'O3'; it takes one of O1, O2"),
        ("train", "EMA.deca=0.5", "EMA has no 'deca'; did you mean 'decay'"),
        ("train", "EMA.decay=1.5", "EMA.decay is 1.5; it takes a number between 0 and 1"),
        ("eval", "Global.print_batch_step=-1", "print_batch_step is -1; it takes"),
        ("infer", "Infer.infer_imgs=no/such", "Infer.infer_imgs: there is no no/such"),
        ("infer", "Infer=null", "Infer is null; it takes a section"),
        ("infer", "Infer.batch_size=0", "Infer.batch_size is 0; it takes"),
        ("infer", "Infer.PostProcess.name=Top", "no post-processing named 'Top'; did you mean Topk"),
        ("infer", "Infer.transforms.0={Decode: null}", "no transform named 'Decode'"),
    ],
)
def test_values_and_names_that_are_refused(config_file, mode, override, message):
    with pytest.raises(UsageError, match=message):
        checked(config_file, mode, override, *([] if mode == "train" else ["Global.pretrained_model=x"]))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs:", "epoch:", "Global has no 'epoch'; did you mean 'epochs'"),
        ("Optimizer:", "Optimiser:", "the config has no 'Optimiser'; did you mean 'Optimizer'"),
        ("{Train: [{Topk", "{Trian: [{Topk", "Metric has no 'Trian'; did you mean 'Train'"),
        ("{Train: [{CEL", "{Trian: [{CEL", "Loss has no 'Trian'; did you mean 'Train'"),
        ("sampler:", "samplr:", "DataLoader.Train has no 'samplr'; did you mean 'sampler'"),
        ("class_num:", "3:", "Arch has the key 3; keys are texts"),
        ("class_num: 2", "scale: .nan", "Arch.scale is nan; it takes a finite number"),
    ],
)
def test_misspelt_keys_of_the_file_are_refused(config_file, old, new, message):
    path = Path(config_file)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        checked(config_file, "train")


def test_keys_of_somebody_else_are_left_alone(config_file):
    config = checked(config_file, "train", "Global.my_note=x", "Global.of_mine={zebra: 1}")
    assert config["Global"]["of_mine"] == {"zebra": 1}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("null", None), ("~", None), ("None", None), ("true", True), ("False", False), ("1e-3", 1e-3), ("-2", -2),
        ("[a, null]", ["a", None]), ("{name: L2}", {"name": "L2"}), ("3,8,8", [3, 8, 8]), ("*.conv.*", "*.conv.*"),
        ("./out", "./out"), ("1.0/255.0", "1.0/255.0"), ("yes", "yes"), ("copy", "copy"), ("...", "..."), ("", ""),
        ("[*", "[*"), ("2020-01-02", "2020-01-02"), ("b'x'", "b'x'"),
    ],
)  # fmt: skip
def test_values_of_overrides(config_file, text, value):
    given = read_config(config_file, [f"Global.of_mine={text}"])["Global"]["of_mine"]
    assert (given, type(given)) == (value, type(value))


@pytest.mark.parametrize("key", ["AMP=null", "AMP={use_amp: False, level: O1}", "EMA=null"])
def test_a_section_that_is_off_is_taken_out(config_file, key):
    assert not {"AMP", "EMA"} & set(checked(config_file, "train", key))


@pytest.mark.parametrize(
    ("override", "key"), [("EMA.decay=0.5", "EMA"), ("Global.update_freq=2", "Global.update_freq")]
)
def test_what_this_paddleclas_would_pass_over_is_refused(config_file, override, key):
    if hasattr(importlib.import_module("ppcls.engine.engine"), "ExponentialMovingAverage"):
        checked(config_file, "train", override)
        return
    with pytest.raises(ConfigError, match=f"this PaddleClas does not know {key}, and would train without it"):
        checked(config_file, "train", override)


def test_what_is_needed_is_not_all_that_may_be_said(config_file, monkeypatch):
    for table in ("LOADER", "SAMPLER", "INFER"):
        monkeypatch.setitem(getattr(values, table), "zebra", values.truth)
    Path(config_file).write_text(Path(config_file).read_text().replace("name: DistributedBatchSampler, ", ""))
    checked(config_file, "train")
    checked(config_file, "infer", "Global.pretrained_model=x")
    with pytest.raises(ConfigError, match="zebra is 3; it takes True or False"):
        checked(config_file, "train", "DataLoader.Train.loader.zebra=3")
    text = Path(config_file).read_text()
    for key, section in (("num_workers", "loader"), ("shuffle", "sampler")):
        Path(config_file).write_text(text.replace(f"{key}:", f"no_{key[::-1]}:"))
        with pytest.raises(ConfigError, match=f"DataLoader.Train.{section} lacks {key}"):
            checked(config_file, "train")


@pytest.mark.parametrize(
    ("read", "override", "message"),
    [
        (sparse, "Sparsity={}", "Sparsity has no density; give the share"),
        (sparse, "Sparsity.density=60", "Sparsity.density is 60; it takes a number between 0 and 1"),
        (sparse, "Sparsity.density=True", "Sparsity.density is True"),
        (sparse, "Sparsity={distribution: weights, density: x}", "Sparsity.density is 'x'"),
        (sparse, "Sparsity.distribution=lottery", "is 'lottery'; it takes one of uniform, erk, snip, weights"),
        (sparse, "Sparsity.distribution=[snip]", "Sparsity.distribution is"),
        (sparse, "Sparsity.growth=hope", "Sparsity.growth is 'hope'; it takes one of random, gradient"),
        (sparse, "Sparsity.growth=null", "Sparsity.growth is null"),
        (sparse, "Sparsity.where=3", "Sparsity.where is 3; it takes a text, or a list of them"),
        (sparse, "Sparsity.where=[]", "Sparsity.where is"),
        (sparse, "Sparsity.where=[a, 3]", "Sparsity.where is"),
        (sparse, "Sparsity.update_frequency=True", "update_frequency is True; it takes a whole number from 1"),
        (sparse, "Sparsity.update_frequency=2.5", "update_frequency is 2.5; it takes a whole number from 1"),
        (sparse, "Sparsity.prune_rate=True", "prune_rate is True; it takes a number between 0 and 1"),
        (sparse, "Sparsity.prune_rate=0", "prune_rate is 0; it takes a number between 0 and 1"),
        (sparse, "Sparsity.frequency=3", "Sparsity has no frequency; it takes density, distribution"),
        (monitoring, "Monitor.images=True", "Monitor.images is True; it takes a whole number from 1"),
        (monitoring, "Monitor.interval=0", "Monitor.interval is 0; it takes a whole number from 1"),
        (monitoring, "Monitor.every=3", "Monitor has no every; it takes interval, images"),
        (monitoring, "Monitor=3", "Monitor is 3; give it as {interval: 100}"),
    ],
)
def test_sections_of_this_library_that_are_refused(config_file, read, override, message):
    with pytest.raises(ConfigError, match=message):
        read.read_section(read_config(config_file, ["Sparsity.density=0.5", override]))


def test_sections_of_this_library(config_file):
    given = ["Sparsity={distribution: weights, where: '*.conv*'}", "Monitor={}", "Global.use_visualdl=True"]
    config = read_config(config_file, given)
    assert sparse.read_section(config) == {
        "density": None, "distribution": "weights", "where": ["*.conv*"], "update_frequency": 100, "prune_rate": 0.3,
        "growth": "random",
    }  # fmt: skip
    assert monitoring.read_section(config) == {"interval": 100, "images": 32}


def test_no_regularizer_in_an_override(config_file):
    from ppcls.optimizer import build_optimizer

    nothing = ("Optimizer.regularizer=null", "Optimizer.clip_norm=null")
    config = checked(config_file, "train", *nothing)
    (optimizer,), _ = build_optimizer(config["Optimizer"], 1, 1, [paddle.nn.Linear(2, 2)])
    assert optimizer.regularization is None


def test_numbers_that_yaml_reads_as_text(config_file):
    path = Path(config_file)
    path.write_text(
        path.read_text().replace("learning_rate: 0.1", "learning_rate: 1e-3").replace("weight: 1.0", "weight: 1e0")
    )
    config = checked(config_file, "train")
    assert config["Optimizer"]["lr"]["learning_rate"] == 1e-3
    assert config["Loss"]["Train"][0]["CELoss"]["weight"] == 1.0


def test_a_folder_that_may_not_be_written_in_is_refused(config_file, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigError, match="nothing may be written in"):
        checked(config_file, "train")


def test_weights_of_paddleclas_own_are_enough_to_evaluate(config_file):
    checked(config_file, "eval", "Arch.pretrained=True")


@pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="this Paddle may have a GPU")
def test_a_gpu_is_refused_where_there_is_none(config_file):
    with pytest.raises(ConfigError, match="device is 'gpu'; it takes cpu here: this Paddle is built for the CPU alone"):
        checked(config_file, "train", "Global.device=gpu")


def test_batch_norms_are_synchronised_in_training_on_a_gpu_only(config_file, monkeypatch):
    monkeypatch.setattr("paddle.is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr("paddle.device.cuda.device_count", lambda: 1)
    for mode, device, kept in (("train", "gpu", True), ("train", "cpu", False), ("eval", "gpu", False)):
        overrides = ["Arch.use_sync_bn=True", f"Global.device={device}", "Global.pretrained_model=x"]
        assert checked(config_file, mode, *overrides)["Arch"]["use_sync_bn"] is kept
