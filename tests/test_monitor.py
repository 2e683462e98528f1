"""What the monitor writes, that it changes no training, and what a config may say of it."""

import glob
import random

import numpy as np
import paddle
import pytest
from test_train_tools import PLAIN, REFCONV, Place, train_as_a_process_of_its_own
from visualdl import LogReader

from paddle_reparam import checkpoints, monitor
from paddle_reparam.errors import ReparamError
from paddle_reparam.layers.refconv import RefConv2D

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

    def update_masks(self):
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


def test_a_model_without_our_layers_is_refused():
    model = paddle.nn.Sequential(paddle.nn.Conv2D(3, 4, 3))
    with pytest.raises(ReparamError, match="nothing to show"):
        monitor.Monitor(model, Log(), np.zeros([1, 3, 8, 8], "float32"), np.zeros(1))


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


# ---------------------------------------------------------------------------------------------------------------------
# In PaddleClas' Engine


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("monitor"))


def log_of(place, run):
    """Return tag -> steps, over all logs of a run."""
    found = {}
    for file in sorted(glob.glob(str(place.root / run / "vdl" / "*.log"))):
        reader = LogReader(file_path=file)
        for tag in reader.get_tags().get("scalar", []):
            found.setdefault(tag, []).extend(each.id for each in reader.get_data("scalar", tag))
    return found


def test_a_training_is_the_same_bit_for_bit_and_its_steps_go_on(place):
    config = place.config(ZERO, Sparsity=SPARSITY)
    watched = "Monitor.interval=1"
    assert train_as_a_process_of_its_own(place.arguments(config, "plain", "Global.epochs=2")) == 0
    assert train_as_a_process_of_its_own(place.arguments(config, "watched", "Global.epochs=2", watched)) == 0
    plain, seen = (checkpoints.load(f"{place.saved(run)}.pdparams") for run in ("plain", "watched"))
    assert plain.keys() == seen.keys()
    for name, value in plain.items():
        np.testing.assert_array_equal(value, seen[name], err_msg=name)
    again = place.arguments(config, "watched", "Global.epochs=3", "Global.checkpoints=auto", watched)
    assert train_as_a_process_of_its_own(again) == 0
    tags = log_of(place, "watched")
    for kind in ("refconv_relative_change/", "mask_density/", "mask_age/"):
        steps = next(steps for tag, steps in tags.items() if tag.startswith(kind))
        assert sorted(set(steps))[-1] == 6
    # The last update is at step 2 of the first run; the second has none.
    assert any(tag.startswith("mask_churn/") for tag in tags)
    change = next(steps for tag, steps in tags.items() if tag.startswith("refconv_relative_change/"))
    assert sorted(set(change)) == list(range(7))


def test_sections_that_mean_nothing_are_refused(place, capsys):
    for section, overrides, text in (
        ({"every": 3}, [], "Monitor has no every; it takes interval"),
        ({"interval": 0}, [], "Monitor.interval is 0; give a whole number"),
        ({}, ["Global.use_visualdl=False"], "set Global.use_visualdl to True"),
        ({}, [], "Monitor has nothing to show"),
    ):
        arguments = place.arguments(place.config(PLAIN, Monitor=section), "refused", *overrides)
        assert train_as_a_process_of_its_own(arguments) == 2
        assert text in capsys.readouterr().err
