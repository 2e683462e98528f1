"""The glue to PaddleClas: finding it, its mends, and what a YAML file's `Arch` may name."""

import copy
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from helpers import relative_error

from paddle_reparam.errors import CheckpointError, ReparamError, UnknownName, UsageError
from paddle_reparam.layers.refconv import RefConv2D
from paddle_reparam.ppcls import locate, setup
from paddle_reparam.ppcls.errors import ConfigError
from paddle_reparam.registry import create_model, list_models
from paddle_reparam.weights import checkpoints

ppcls = setup()
BACKBONE = {"name": "MobileNetV1_x0_25"}
REFCONV = {"name": "RefConv2D", "init": "zero"}


def build(arch):
    """Build an `Arch` as the Engine does."""
    return ppcls.arch.build_model({"Arch": arch, "Global": {"device": "cpu"}})


def images(batch=2, size=32):
    return paddle.to_tensor(np.random.default_rng(0).standard_normal((batch, 3, size, size)), dtype="float32")


# ---------------------------------------------------------------------------------------------------------------------
# Finding it


def test_setup_twice_changes_nothing():
    from ppcls.engine import engine
    from ppcls.loss import CombinedLoss

    before = (engine.Engine, CombinedLoss.__call__, ppcls.arch.ReparamModel)
    assert setup() is ppcls
    assert (engine.Engine, CombinedLoss.__call__, ppcls.arch.ReparamModel) == before


def make_checkout(root: Path, code: str = "") -> Path:
    (root / "ppcls" / "engine").mkdir(parents=True)
    (root / "ppcls" / "__init__.py").write_text(code)
    (root / "ppcls" / "engine" / "__init__.py").touch()
    (root / "ppcls" / "engine" / "engine.py").touch()
    return root


def test_home_that_is_no_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv(locate.HOME, str(tmp_path))
    with pytest.raises(ReparamError, match=r"PADDLECLAS_HOME=.* is no checkout of PaddleClas"):
        locate.find()


def test_home_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv(locate.HOME, str(make_checkout(tmp_path)))
    assert locate.find() == tmp_path.resolve()


def test_another_paddleclas_than_the_imported_one(tmp_path, monkeypatch):
    monkeypatch.setenv(locate.HOME, str(make_checkout(tmp_path)))
    with pytest.raises(ReparamError, match="has been imported from"):
        locate.load()


def test_nothing_installed(monkeypatch):
    monkeypatch.delenv(locate.HOME, raising=False)
    monkeypatch.setattr(locate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ReparamError, match=r"PaddleClas is not installed; install it \(pip install"):
        locate.find()


def test_a_wheel_without_an_engine(tmp_path, monkeypatch):
    wheel = ModuleSpec("paddleclas", None, origin=str(tmp_path / "paddleclas" / "__init__.py"))
    monkeypatch.delenv(locate.HOME, raising=False)
    monkeypatch.setattr(locate.importlib.util, "find_spec", lambda name: wheel if name == "paddleclas" else None)
    with pytest.raises(ReparamError, match="has no training Engine"):
        locate.find()


def test_a_package_that_paddleclas_needs(tmp_path, monkeypatch):
    monkeypatch.setenv(locate.HOME, str(make_checkout(tmp_path, "import a_package_that_is_not_there")))
    for name in [n for n in sys.modules if n == "ppcls" or n.startswith("ppcls.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ReparamError, match="needs the package 'a_package_that_is_not_there'"):
        locate.load()
    assert "ppcls" not in sys.modules


def test_a_fresh_process_survives_the_import():
    """Paddle 2.6 crashes a process that loads Python's zlib only after Paddle's.

    Where there is no ccache, Paddle 3 warns of it; nothing is compiled here. Other warnings are shown.
    """
    code = (
        "import paddle_reparam, warnings\n"
        "import paddle_reparam.ppcls, paddle; paddle_reparam.ppcls.setup(); print('alive')\n"
        "warnings.warn('another')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "alive" in done.stdout
    assert "ccache" not in done.stderr
    assert "UserWarning: another" in done.stderr


def test_the_environment_names_a_checkout_or_nothing():
    home = os.environ.get(locate.HOME)
    assert Path(ppcls.__file__).parents[1] == (Path(home).resolve() if home else locate.find())


# ---------------------------------------------------------------------------------------------------------------------
# Mends


class Trainer:
    """As much of the Engine as PaddleClas' bookkeeping looks at."""

    def __init__(self, metric=None):
        self.output_info = {}
        self.train_metric_func = metric


def test_losses_are_counted():
    from ppcls.engine.train.utils import update_loss
    from ppcls.loss import build_loss

    trainer = Trainer()
    losses = build_loss([{"CELoss": {"weight": 1.0}}])(paddle.zeros([4, 2]), paddle.zeros([4, 1], "int64"))
    update_loss(trainer, losses, 4)
    assert trainer.output_info["loss"].avg == pytest.approx(np.log(2), rel=1e-5)


def test_metrics_are_counted():
    from ppcls.engine.train.utils import update_metric
    from ppcls.metric import build_metrics

    trainer = Trainer(build_metrics([{"TopkAcc": {"topk": [1]}}]))
    scores = paddle.to_tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    update_metric(trainer, scores, [scores, paddle.zeros([4, 1], "int64")], 4)
    assert trainer.output_info["top1"].avg == pytest.approx(0.75)
    assert trainer.train_metric_func.avg_info == "top1: 0.75000"


def test_a_meter_takes_tensors():
    from ppcls.utils.misc import AverageMeter

    meter = AverageMeter("loss")
    meter.update(paddle.to_tensor(1.0), 1)
    meter.update(paddle.to_tensor(4.0), 2)
    assert meter.avg_info == "loss: 3.00000"


def test_auto_augment():
    from ppcls.data.preprocess import AutoAugment

    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert AutoAugment()(image).shape == (16, 16, 3)


def test_mixup_of_each_image():
    from ppcls.data.preprocess.batch_ops import batch_operators

    if not hasattr(batch_operators, "MixupCutmixHybrid"):
        pytest.skip("PaddleClas 2.4 has no such operator")
    mix = batch_operators.MixupCutmixHybrid(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=2, mode="elem")
    batch = [(np.ones((3, 8, 8), "float32"), label) for label in (0, 1, 0, 1)]
    assert len(mix(batch)) == 4


def test_a_process_on_cpu_has_a_device():
    assert paddle.distributed.ParallelEnv().device_id == 0


# ---------------------------------------------------------------------------------------------------------------------
# Models of this library


def test_every_model_is_registered():
    assert list_models()
    assert [name for name in list_models() if not hasattr(ppcls.arch, name)] == []


def test_a_model_is_what_its_builder_makes():
    model = build({"name": "ResNet20_SPConv", "class_num": 3, "ratio": 0.25, "infer_add_softmax": False})
    plain = create_model("ResNet20_SPConv", class_num=3, ratio=0.25)
    assert isinstance(model, ppcls.arch.TheseusLayer)
    checkpoints.load_into(plain, model.state_dict())
    assert list(model.state_dict()) == list(plain.state_dict())
    model.eval(), plain.eval()
    assert relative_error(model(images()), plain(images())) == 0
    assert relative_error(copy.deepcopy(model)(images()), plain(images())) == 0


def test_a_model_stops_where_it_is_told():
    model = build({"name": "ResNet18_SPConv", "class_num": 3, "stop_after": "layer2"})
    assert model(images()).shape == [2, 128 * 4 * 4]


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"return_stages": [0, 2]}, {"logits", "layer1", "layer3"}),
        ({"return_stages": True}, {"logits", "layer1", "layer2", "layer3", "layer4"}),
        ({"return_patterns": ["layer1[0]"]}, {"logits", "layer1[0]"}),
        ({"return_patterns": "layer4"}, {"logits", "layer4"}),
    ],
)
def test_a_model_returns_what_is_inside(options, keys):
    model = build({"name": "ResNet18_SPConv", "class_num": 3, **options})
    assert set(model(images())) == keys


@pytest.mark.parametrize("options", [{"stop_after": "layr2"}, {"return_patterns": ["layer1", "layer9[0]"]}])
def test_a_layer_that_is_not_there(options):
    with pytest.raises(UnknownName, match=r"layr2.*did you mean layer2|layer9\.0.*did you mean layer"):
        build({"name": "ResNet18_SPConv", "class_num": 3, **options})


def test_stages_of_a_network_without_them():
    with pytest.raises(ConfigError, match="has no stages to return"):
        build({"name": "VGG16_SPConv", "class_num": 3, "return_stages": True})


def test_freezing_needs_a_newer_paddleclas():
    arch = {"name": "ResNet18_SPConv", "class_num": 3, "freeze_befor": "layer1"}
    if hasattr(ppcls.arch.TheseusLayer, "freeze_befor"):
        assert build(arch)(images()).shape == [2, 3]
    else:
        with pytest.raises(ConfigError, match=r"freeze_befor needs PaddleClas 2\.5"):
            build(arch)


def test_an_unknown_option_of_a_model():
    with pytest.raises(UnknownName, match="'ratioo'"):
        build({"name": "ResNet18_SPConv", "ratioo": 0.5})


def test_a_name_that_paddleclas_has_already(monkeypatch):
    from paddle_reparam.ppcls import arch

    monkeypatch.setattr(arch, "list_models", lambda: ["ResNet50"])
    monkeypatch.setattr(arch, "get_model", lambda name: SimpleNamespace(in_paddleclas=False))
    with pytest.raises(ReparamError, match="has a model named 'ResNet50' of its own"):
        arch.register()


# ---------------------------------------------------------------------------------------------------------------------
# ReparamModel


def test_reparam_model_is_the_backbone_with_its_weights(tmp_path):
    plain = build({**BACKBONE, "class_num": 3})
    checkpoints.save(plain.state_dict(), tmp_path / "baseline.pdparams")
    model = build(
        {
            "name": "ReparamModel", "class_num": 3, "backbone": BACKBONE, "layer": REFCONV,
            "pretrained": str(tmp_path / "baseline"), "infer_add_softmax": False, "infer_output_key": None,
        }
    )  # fmt: skip
    assert type(model) is type(plain)
    assert isinstance(model.conv.conv, RefConv2D)
    extra = set(model.state_dict()) - set(plain.state_dict())
    assert extra == {n for n in model.state_dict() if n.endswith("convmap.weight")}
    assert len(extra) == 14
    model.eval(), plain.eval()
    assert relative_error(model(images()), plain(images())) < 1e-5


def test_where_limits_the_replacement():
    model = build(
        {"name": "ReparamModel", "class_num": 3, "backbone": BACKBONE, "layer": REFCONV, "where": ["blocks.[01].*"]}
    )
    paths = [name for name, layer in model.named_sublayers() if isinstance(layer, RefConv2D)]
    assert paths == ["blocks.0.depthwise_conv.conv", "blocks.1.depthwise_conv.conv"]


def test_stages_that_lr_mult_list_freezes_stay_as_they_are_replaced():
    backbone = {"name": "ResNet18", "lr_mult_list": [0.0, 0.0, 0.0, 0.5, 1.0]}
    model = build({"name": "ReparamModel", "class_num": 3, "backbone": backbone, "layer": REFCONV})

    def kernels():
        return {
            name: layer.reparameterize().weight.numpy()
            for name, layer in model.named_sublayers()
            if isinstance(layer, RefConv2D)
        }

    model.eval()
    before = kernels()
    frozen = {name: p.numpy() for name, p in model.named_parameters() if not p.optimize_attr["learning_rate"]}
    optimizer = paddle.optimizer.Momentum(0.1, parameters=model.parameters(), weight_decay=1e-2)
    model.train()
    model(images()).pow(2).sum().backward()
    optimizer.step()
    model.eval()
    moved = {name for name, kernel in kernels().items() if not np.array_equal(kernel, before[name])}
    # The stem, and the first two of four stages of two blocks each.
    still = {name for name in before if name.startswith(("stem.", *(f"blocks.{i}." for i in range(4))))}
    assert len(still) == 9
    assert moved == set(before) - still
    now = dict(model.named_parameters())
    assert [name for name, value in frozen.items() if not np.array_equal(now[name].numpy(), value)] == []


def test_a_model_of_this_library_as_the_backbone():
    backbone = {"name": "ResNet18_SPConv"}
    model = build({"name": "ReparamModel", "class_num": 3, "backbone": backbone, "layer": REFCONV, "where": "conv1"})
    assert isinstance(model, ppcls.arch.TheseusLayer)
    assert isinstance(model.conv1, RefConv2D)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"laier": 1}, UnknownName, "no option of ReparamModel named 'laier'; did you mean layer"),
        ({"layer": None}, ConfigError, "Arch.layer of ReparamModel needs a name and options"),
        ({"backbone": "MobileNetV1"}, ConfigError, "Arch.backbone of ReparamModel needs a name and options"),
        ({"layer": {"name": "RefConv"}}, UnknownName, "no layer named 'RefConv'; did you mean RefConv2D"),
        (
            {"layer": {"name": "RefConv2D", "map": 3}},
            UnknownName,
            "no option of RefConv2D named 'map'; did you mean map_k",
        ),
        ({"backbone": {"name": "MobilNetV1"}}, UnknownName, "no Arch named 'MobilNetV1'; did you mean MobileNetV1"),
        ({"where": "nowhere"}, UsageError, "`where` has 'nowhere', which no convolution's path matches"),
        ({"pretrained": True}, ConfigError, "set Arch.backbone.pretrained: True"),
        ({"pretrained": "no/such/file"}, CheckpointError, "there is no weight file no/such/file or"),
    ],
)
def test_what_reparam_model_refuses(change, error, message):
    arch = {"name": "ReparamModel", "class_num": 3, "backbone": BACKBONE, "layer": REFCONV, **change}
    with pytest.raises(error, match=message):
        build(arch)


def test_pretrained_weights_that_do_not_fit(tmp_path):
    checkpoints.save(build({**BACKBONE, "class_num": 4}).state_dict(), tmp_path / "four.pdparams")
    with pytest.raises(CheckpointError, match=r"fc.weight \(file \[256, 4\], model \[256, 3\]\)"):
        build(
            {
                "name": "ReparamModel", "class_num": 3, "backbone": BACKBONE, "layer": REFCONV,
                "pretrained": str(tmp_path / "four.pdparams"),
            }
        )  # fmt: skip


@pytest.mark.parametrize(
    ("backbone", "stop", "width"),
    [
        ({"name": "ResNet18_SPConv"}, "avgpool", 512),
        ({"name": "ReparamModel", "backbone": BACKBONE, "layer": REFCONV}, "flatten", 256),
    ],
)
def test_as_the_backbone_of_rec_model(backbone, stop, width):
    model = build(
        {
            "name": "RecModel", "infer_output_key": "features", "Backbone": backbone,
            "BackboneStopLayer": {"name": stop},
            "Neck": {"name": "FC", "embedding_size": width, "class_num": 8},
            "Head": {"name": "FC", "embedding_size": 8, "class_num": 3},
        }
    )  # fmt: skip
    out = model(images(), paddle.zeros([2, 1], "int64"))
    assert {name: value.shape for name, value in out.items()} == {
        "backbone": [2, width], "neck": [2, 8], "features": [2, 8], "logits": [2, 3],
    }  # fmt: skip


def test_as_teacher_and_student():
    student = {"name": "ReparamModel", "class_num": 3, "backbone": BACKBONE, "layer": REFCONV}
    model = build(
        {
            "name": "DistillationModel", "class_num": 3, "freeze_params_list": [True, False],
            "models": [{"Teacher": {"name": "ResNet20_SPConv", "class_num": 3}}, {"Student": student}],
        }
    )  # fmt: skip
    out = model(images())
    assert {name: value.shape for name, value in out.items()} == {"Teacher": [2, 3], "Student": [2, 3]}
    out["Student"].sum().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if n.startswith("Teacher"))
    trained = {n: p for n, p in model.named_parameters() if n.startswith("Student") and not p.stop_gradient}
    assert "Student.conv.conv.convmap.weight" in trained
    assert [n for n, p in trained.items() if p.grad is None] == []


def test_a_frozen_base_survives_what_paddleclas_does_to_models():
    """A copy (EMA), synchronised batch norms, and Paddle's own mixed precision leave the base weight where it is."""
    backbone = {"name": "ResNet18_SPConv"}
    model = build({"name": "ReparamModel", "class_num": 3, "backbone": backbone, "layer": REFCONV, "where": "conv1"})
    base = model.conv1.weight.numpy()
    names = list(model.state_dict())
    synced = paddle.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert any(isinstance(layer, paddle.nn.SyncBatchNorm) for layer in synced.sublayers())
    decorated = paddle.amp.decorate(models=copy.deepcopy(model), level="O1", save_dtype="float32")
    for changed in (synced, decorated):
        assert list(changed.state_dict()) == names
        assert relative_error(changed.conv1.weight, base) == 0
        assert "conv1.weight" not in dict(changed.named_parameters())


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "Momentum", "momentum": 0.9, "regularizer": {"name": "L2", "coeff": 0.1}},
        {"name": "Adam", "regularizer": {"name": "L2", "coeff": 0.1}},
        {"name": "AdamW", "weight_decay": 0.1, "no_weight_decay_name": "bn", "one_dim_param_no_weight_decay": True},
        {"name": "RMSProp", "regularizer": {"name": "L2", "coeff": 0.1}},
    ],
)
def test_optimizers_leave_the_frozen_base_alone(optimizer):
    from ppcls.optimizer import build_optimizer

    model = build({"name": "ReparamModel", "class_num": 3, "backbone": BACKBONE, "layer": REFCONV})
    config = {**optimizer, "lr": {"name": "Constant", "learning_rate": 0.1}}
    (step, *_), _ = build_optimizer(config, 1, 1, [model])
    base, refocusing = model.conv.conv.weight.numpy(), model.conv.conv.convmap.weight.numpy()
    model(images()).mean().backward()
    step.step()
    assert relative_error(model.conv.conv.weight, base) == 0
    assert np.abs(model.conv.conv.convmap.weight.numpy() - refocusing).max() > 0
