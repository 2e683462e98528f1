"""What the monitor writes, that it changes no training, and what a config may say of it."""

import io
import random
import re
import sys
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
import yaml
from helpers import as_array
from pages import ROOT
from test_train_tools import PLAIN, REFCONV, Place, config_of, train_as_a_process_of_its_own
from visualdl import LogReader

from paddle_reparam import analysis, create_model
from paddle_reparam.errors import ReparamError
from paddle_reparam.layers.refconv import RefConv2D
from paddle_reparam.ppcls import monitoring
from paddle_reparam.surgery.masks import masked_places
from paddle_reparam.surgery.verify import settle_batch_norms
from paddle_reparam.training import monitor, sparsity
from paddle_reparam.weights import checkpoints

SPARSITY = {"density": 0.6, "distribution": "erk", "update_frequency": 2, "prune_rate": 0.5}
ZERO = {**REFCONV, "layer": {"name": "RefConv2D", "base": "random"}}


class Log:
    """A writer that keeps what it is given."""

    def __init__(self):
        self.scalars, self.histograms, self.images, self.hparams = {}, {}, {}, []

    def add_scalar(self, tag, value, step):
        self.scalars.setdefault(tag, {})[step] = value

    def add_histogram(self, tag, values, step, buckets=10):
        self.histograms.setdefault(tag, {})[step] = values

    def add_image(self, tag, img, step):
        self.images.setdefault(tag, {})[step] = img

    def add_hparams(self, hparams_dict, metrics_list):
        self.hparams.append((hparams_dict, metrics_list))


def test_churn_is_the_share_that_is_new():
    before = np.array([True, True, True, True, False, False])
    after = np.array([True, True, True, False, True, False])
    assert monitor.churn(before, after) == pytest.approx(0.25, rel=1e-12)
    assert monitor.churn(before, before) == 0.0


def test_the_scale_of_a_norm():
    norm = paddle.nn.BatchNorm2D(2, epsilon=0.0)
    norm.weight.set_value(paddle.to_tensor([3.0, 4.0]))
    norm._variance.set_value(paddle.to_tensor([1.0, 4.0]))
    assert monitor.scale_of(norm) == pytest.approx(np.sqrt((9 + 4) / 2), rel=1e-6)


class Training:
    """As much of `SparseTraining` as a history of masks looks at: one mask of four, moved by hand."""

    class At:
        path = "weight"

        def __init__(self):
            self.mask = np.array([True, True, False, False])

        def read_mask(self):
            return self.mask.copy()

    def __init__(self):
        self.step, self.places = 10, [self.At()]

    def update_masks(self, dense=None):
        self.places[0].mask = np.array([True, False, True, False])


def test_ages_are_steps_since_a_weight_became_active():
    training = Training()
    history = monitor.MaskHistory(training)
    training.step = 14
    assert history.ages() == {"weight": 4.0}
    training.update_masks()
    training.step = 16
    # One weight since step 10, one since step 14.
    assert history.ages() == {"weight": (6 + 2) / 2}
    assert history.churn == {"weight": 0.5}


def test_models_that_cannot_be_watched_are_refused():
    model = paddle.nn.Sequential(paddle.nn.Conv2D(3, 4, 3))
    with pytest.raises(ReparamError, match="nothing to show"):
        monitor.Monitor(model, Log(), np.zeros([1, 3, 8, 8], "float32"), np.zeros(1))
    with pytest.raises(ReparamError, match=r"make them float32 \(AMP.level: O1\)"):
        monitor.Monitor(small_refconv().to(dtype="float16"), Log(), np.zeros([1, 4, 8, 8], "float32"), np.zeros(1))


def test_a_strip_of_images_with_captions():
    images = np.zeros([2, 3, 4, 4], "float32")
    images[1] = 1.0
    strips = [monitor.captioned(images, captions) for captions in (["a", "b"], ["is é\nsays b", "山" * 40])]
    for strip in strips:
        assert strip.dtype == np.uint8
        assert strip[:64, :64].max() == 0
        cell = strip.shape[1] // 2
        assert strip[:64, cell : cell + 64].min() == 255
        # What is written stands below each image, and ends there.
        assert max(strip[64:, :cell].min(), strip[64:, cell:].min()) < 64
        assert strip[64:, [cell - 1, -1]].min() == strip[-1].min() == 255
    assert strips[0].shape[1] < strips[1].shape[1] < 2 * 400


def test_captions_have_names():
    """Of classes, and of several labels; what has no name is called by its number."""
    images, names = np.zeros([2, 4, 8, 8], "float32"), ["cat", None, "a\x1b[31mb"]
    scores = paddle.to_tensor([2.0, 1.0, 0.0, -1.0])
    watch = monitor.Monitor(small_refconv(), Log(), images, np.array([2, 1]), names=names)
    assert watch._caption(scores, np.int64(2)) == "is a\\x1b[31mb\nsays cat (0.64)"
    assert watch._caption(scores - 9 * paddle.eye(4)[0], np.int64(3)) == "is 3\nsays 1 (0.67)"
    assert watch._caption(scores, np.array([0, 1, 1, 0])) == "is 1, a\\x1b[31mb\nsays cat, 1, a\\x1b[31mb"
    assert watch._caption(scores - 9, np.zeros(4)) == "is none\nsays none"


def small_refconv():
    model = paddle.nn.Sequential(paddle.nn.Conv2D(4, 4, 3, padding=1, groups=4), paddle.nn.BatchNorm2D(4),
                                 paddle.nn.AdaptiveAvgPool2D(1), paddle.nn.Flatten())  # fmt: skip
    model[0] = RefConv2D.from_conv(model[0])
    return model


def test_numbers_and_pictures_of_refconv_and_nothing_else_changes():
    model, log = small_refconv(), Log()
    model.train()
    model[1].eval()
    watch = monitor.Monitor(model, log, np.random.default_rng(0).random([2, 4, 6, 6], "float32"), np.array([1, 0]))
    before = {name: value.numpy() for name, value in model.state_dict().items()}
    states = random.getstate(), np.random.get_state()[1].tolist()
    watch.write(0)
    refocus = model[0].convmap.weight
    refocus.set_value(refocus + 0.1)
    watch.write(7)
    refocus.set_value(paddle.to_tensor(before["0.convmap.weight"]))
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert states == (random.getstate(), np.random.get_state()[1].tolist())
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), before[name])
    change = log.scalars["refconv_relative_change/0"]
    assert list(change) == [0, 7]
    assert change[7] > change[0]
    # Pictures come one time in ten.
    assert log.images["refconv_connectivity/0"].keys() == log.histograms["fused/0.weight"].keys() == {0}
    assert log.images["predictions"][0].dtype == np.uint8


NETWORKS = ["dcd/ResNet10_DCD", "repmlp/RepMLPNet_micro", "repmlp/RepMLP_CIFAR", "slak/SLaK_micro",
            "spconv/ResNet20_SPConv"]  # fmt: skip


@pytest.mark.parametrize("config", NETWORKS)
def test_what_is_written_of_the_digits_networks_is_what_the_weights_say(config, monkeypatch):
    settings = yaml.safe_load((ROOT / "ppcls_configs" / "digits" / f"{config}.yaml").read_text(encoding="utf-8"))
    paper, shape = config.split("/")[0], settings["Global"]["image_shape"]
    model, log = create_model(**settings["Arch"]), Log()
    settle_batch_norms(model, [[None, *shape]], batch=8)
    if "Sparsity" in settings:
        sparsity.add_masks(model, 0.6)
    images = np.random.default_rng(0).normal(size=[6, *shape]).astype("float32")
    captions = []
    plain = monitor.captioned
    monkeypatch.setattr(monitor, "captioned", lambda pixels, texts: captions.extend(texts) or plain(pixels, texts))
    monitor.Monitor(model, log, images, np.arange(6)).write(4)
    # The rows' analysis raises for what is not finite.
    rows = analysis.analyze(model, images)[paper]
    for name in monitor.CURVES[paper][1]:
        expected = {f"{paper}_{name}/{row.path}": getattr(row, name) for row in rows}
        found = {tag: steps for tag, steps in log.scalars.items() if tag.startswith(f"{paper}_{name}/")}
        assert found == {tag: {4: value} for tag, value in expected.items() if value is not None} != {}
    for row in rows:
        layer = dict(model.named_sublayers())[row.path]
        norms = [f"{row.path}.{name}" for name, each in layer.named_sublayers() if hasattr(each, "_variance")]
        written = [tag.split("/")[1] for tag in log.scalars if tag.startswith(f"branch_scale/{row.path}.")]
        assert written == (norms if len(norms) > 1 else [])
        for tag in norms if len(norms) > 1 else []:
            norm = dict(model.named_sublayers())[tag]
            scale = as_array(norm.weight) / np.sqrt(as_array(norm._variance) + norm._epsilon)
            rms = np.sqrt(np.square(scale).mean())
            assert log.scalars[f"branch_scale/{tag}"][4] == pytest.approx(rms, rel=1e-6)
        fused = {name: as_array(each) for name, each in layer.reparameterize().named_parameters() if each.ndim > 1}
        assert fused
        for name, weight in fused.items():
            np.testing.assert_array_equal(log.histograms[f"fused/{row.path}.{name}"][4], weight.reshape(-1))
    masks = {f"mask_density/{each.path}": {4: each.read_mask().mean()} for each in masked_places(model)}
    assert {tag: steps for tag, steps in log.scalars.items() if tag.startswith("mask_")} == masks
    assert bool(masks) == ("Sparsity" in settings)
    said = model(paddle.to_tensor(images)).argmax(axis=-1).tolist()
    assert [text.split(" (")[0] for text in captions] == [f"is {i}\nsays {answer}" for i, answer in enumerate(said)]
    assert log.images["predictions"].keys() == {4}


def test_drawing_afterwards_is_as_if_nothing_had_been_drawn():
    def draws(disturb):
        paddle.seed(3)
        model = small_refconv()
        if disturb:
            with monitor.undisturbed(model):
                paddle.rand([5]), np.random.rand(), random.random()
                paddle.nn.Conv2D(3, 3, 3)
        return paddle.rand([4]).numpy().tolist(), np.random.get_state()[1].tolist()

    np.random.seed(0)
    plain = draws(False)
    assert draws(True) == plain


def test_mixed_precision_is_off_while_it_looks(monkeypatch):
    # A CPU casts nothing, whatever is asked for: only the call can be seen.
    asked, plain = [], paddle.amp.auto_cast
    monkeypatch.setattr(paddle.amp, "auto_cast", lambda **given: asked.append(given) or plain(**given))
    with monitor.undisturbed(small_refconv()):
        assert asked == [{"enable": False}]


# ---------------------------------------------------------------------------------------------------------------------
# In PaddleClas' Engine


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("monitor"))


def log_of(place, run):
    """Return tag -> steps of the log that VisualDL shows of a run, the newest."""
    # Newer Engines write beside their checkpoints, those of 2.4 into a folder of its own.
    reader = LogReader(file_path=str(max((place.root / run).rglob("vdlrecords*.log"))))
    return {tag: [each.id for each in reader.get_data("scalar", tag)] for tag in reader.get_tags()["scalar"]}


class Batches:
    """As much of a loader as a bar looks at: three batches of four images."""

    batch_sampler = SimpleNamespace(batch_size=4)

    def __len__(self):
        return 3


def bar_of(monkeypatch, terminal, steps):
    """Return what an Engine of two epochs, with 0.5 s a step, leaves on stderr that is a terminal or none."""
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    engine = SimpleNamespace(
        config={"Global": {"epochs": 2}}, train_dataloader=Batches(),
        output_info={"loss": SimpleNamespace(avg=0.25), "top1": SimpleNamespace(avg=0.5)},
        time_info={"batch_cost": SimpleNamespace(avg=0.5)}, watch=None,
    )  # fmt: skip
    with monitoring.progress(engine):
        for engine.global_step in steps:
            monitoring.advance(engine, 1 + (engine.global_step - 1) // 3)
    return stream.getvalue()


def test_a_bar_where_there_is_a_terminal(monkeypatch):
    assert bar_of(monkeypatch, False, range(1, 7)) == ""
    last = bar_of(monkeypatch, True, range(1, 7)).rstrip().split("\r")[-1]
    assert last.startswith("epoch 2/2: 100%")
    assert "6/6 [" in last
    assert last.endswith("loss=0.2500, top1=0.5000, images/s=8]")


def test_the_bar_of_a_resumed_run_goes_on(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(clock)))
    printed = bar_of(monkeypatch, True, range(4, 7))
    assert "epoch 2/2:  67%" in printed
    assert "6/6 [" in printed
    # A step takes several ticks of this clock; the steps before count for nothing.
    assert max(float(rate) for rate in re.findall(r"([\d.]+)step/s", printed)) <= 1.0


def test_a_training_is_the_same_bit_for_bit_and_its_steps_go_on(place, monkeypatch):
    config = place.config(ZERO, Sparsity=SPARSITY)
    (place.root / "names.txt").write_text("0 dark\n1 bright\n")
    watched = ["Monitor.interval=1", f"Infer.PostProcess.class_id_map_file={place.root / 'names.txt'}"]
    shown = []
    monkeypatch.setattr(monitor, "captioned", lambda pixels, texts: shown.append(texts) or np.zeros([8, 8, 3], "uint8"))
    assert train_as_a_process_of_its_own(place.arguments(config, "plain", "Global.epochs=2")) == 0
    assert train_as_a_process_of_its_own(place.arguments(config, "watched", "Global.epochs=2", *watched)) == 0
    assert [re.split(r"[ (]", text)[1] for text in shown[0]] == [f"{['dark', 'bright'][i % 2]}\nsays" for i in range(5)]
    plain, seen = (checkpoints.load(f"{place.saved(run)}.pdparams") for run in ("plain", "watched"))
    assert plain.keys() == seen.keys()
    for name, value in plain.items():
        np.testing.assert_array_equal(value, seen[name], err_msg=name)
    again = place.arguments(config, "watched", "Global.epochs=3", "Global.checkpoints=auto", *watched)
    assert train_as_a_process_of_its_own(again) == 0
    tags = log_of(place, "watched")
    for kind in ("refconv_relative_change/", "mask_density/", "mask_age/"):
        steps = next(steps for tag, steps in tags.items() if tag.startswith(kind))
        assert steps[-1] == 6
    # The last update is at step 2 of the first run; the second has none.
    assert any(tag.startswith("mask_churn/") for tag in tags)
    change = next(steps for tag, steps in tags.items() if tag.startswith("refconv_relative_change/"))
    # The last write of the first run was the first one of the second, but for its pictures.
    assert change == list(range(7))


def test_mixed_precision_is_watched(place):
    mixed = ["AMP.level=O1", "AMP.scale_loss=128.0", "AMP.use_dynamic_loss_scaling=True", "Monitor.interval=1"]
    assert train_as_a_process_of_its_own(place.arguments(place.config(ZERO), "mixed", *mixed)) == 0
    tags = log_of(place, "mixed")
    assert {tuple(steps) for tag, steps in tags.items() if tag.startswith("refconv_")} == {(0, 1, 2)}


def test_hyperparameters_are_those_that_describe_a_run(place):
    config = {**config_of(place.data, REFCONV), "Sparsity": SPARSITY}
    assert monitoring.hyperparameters(config) == {
        "Global.epochs": 1, "Global.seed": 0, "batch_size": 4, "Arch.name": "ReparamModel", "Arch.class_num": 2,
        "Arch.backbone.name": "MobileNetV1_x0_25", "Arch.layer.name": "RefConv2D", "Optimizer.name": "Momentum",
        "Optimizer.momentum": 0.9, "Optimizer.lr.name": "Constant", "Optimizer.lr.learning_rate": 0.01,
        "Optimizer.regularizer.name": "L2", "Optimizer.regularizer.coeff": 1e-4,
        **{f"Sparsity.{key}": value for key, value in SPARSITY.items()},
    }  # fmt: skip


def test_sections_that_mean_nothing_are_refused(place, capsys):
    for section, overrides, text in (
        ({"every": 3}, [], "Monitor has no every; it takes interval"),
        ({"interval": 0}, [], "Monitor.interval is 0; it takes a whole number"),
        ({}, ["Global.use_visualdl=False"], "set Global.use_visualdl to True"),
        ({}, [], "Monitor has nothing to show"),
    ):
        arguments = place.arguments(place.config(PLAIN, Monitor=section), "refused", *overrides)
        assert train_as_a_process_of_its_own(arguments) == 2
        assert text in capsys.readouterr().err
