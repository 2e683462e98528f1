"""Both stages of RefConv by one command, on images of 16 pixels that the tests draw."""

import json
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest
import yaml
from helpers import relative_error
from test_train_tools import PLAIN, REFCONV, Place, fails

from paddle_reparam.errors import CheckpointError
from paddle_reparam.files import digest
from paddle_reparam.layers.refconv import RefConv2D
from paddle_reparam.ppcls import setup
from paddle_reparam.weights import checkpoints

ppcls = setup()

from paddle_reparam.ppcls import engine, refocus, saving  # noqa: E402
from paddle_reparam.ppcls.command import read_config  # noqa: E402
from paddle_reparam.ppcls.reparam import build_train_form  # noqa: E402

EPOCHS = 2


class Run:
    """What one command made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.result = json.loads((folder / "result.json").read_text())
        self.second = yaml.safe_load((folder / "stage_two.yaml").read_text())

    def weights(self, of: str) -> dict[str, np.ndarray]:
        return checkpoints.load(self.result["weights"][of]["name"])

    def accumulators(self) -> set[str]:
        """Return the names of what the optimizer of the second stage keeps for single parameters."""
        states = saving.read_states(self.result["weights"]["trained"]["name"].replace(".pdparams", ".pdopt"))
        states = states[0] if isinstance(states, list) else states
        return {name for name, value in states.items() if isinstance(value, np.ndarray)}

    def network(self) -> paddle.nn.Layer:
        """Build the network of the second stage, its parameters named as in the training, with trained weights."""
        with paddle.utils.unique_name.guard():
            model = build_train_form(read_config(str(self.folder / "stage_two.yaml")))
        checkpoints.load_into(model, self.weights("trained"))
        return model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("refocus"))


@pytest.fixture(scope="module")
def config(place):
    return place.config(PLAIN)


@pytest.fixture(scope="module")
def command(place, config):
    def run(output, *arguments):
        epochs = ["-o", f"Global.epochs={EPOCHS}", "-o", "Global.save_interval=1000"]
        return refocus.main(["-c", config, "--output", str(place.root / output), *epochs, *arguments])

    return run


@pytest.fixture(scope="module")
def refocused(place, command):
    assert command("refocus") == 0
    return Run(place.root / "refocus")


@pytest.fixture(scope="module")
def baseline(refocused):
    return refocused.result["weights"]["baseline"]["name"]


@pytest.fixture(scope="module")
def runs(place, command, refocused, baseline):
    """Variant -> its run, all from the same baseline."""
    made = {"refocus": refocused}
    for variant in set(refocus.VARIANTS) - set(made):
        assert command(variant, "--variant", variant, "--weights", baseline) == 0
        made[variant] = Run(place.root / variant)
    return made


# ---------------------------------------------------------------------------------------------------------------------
# What is trained


def test_the_optimizer_keeps_nothing_for_what_is_frozen(runs):
    for variant, frozen in (("refocus", True), ("random-base", True), ("trained-base", False)):
        network, kept = runs[variant].network(), runs[variant].accumulators()
        bases = [layer.weight for layer in network.sublayers() if isinstance(layer, RefConv2D)]
        assert len(bases) == 14
        # The statistics of BNs are parameters as well, which nothing trains.
        trained = {parameter.name for parameter in network.parameters() if not parameter.stop_gradient}
        assert kept == {f"{name}_velocity_0" for name in trained}
        assert len(trained & {base.name for base in bases}) == (0 if frozen else len(bases)), variant


def test_all_but_the_base_goes_on_to_train(runs, baseline):
    before = checkpoints.load(baseline)
    for variant, run in runs.items():
        after, layers = run.weights("trained"), run.second["Arch"].get("layer")
        bases = {name.replace("convmap.weight", "weight") for name in after if "convmap" in name}
        assert len(bases) == (14 if layers else 0)
        # BNs with their statistics, 1x1 convolutions and the head.
        assert {name for name in before if name not in bases} >= {"fc.weight", "conv.bn._mean", "conv.bn.weight"}
        still = {name for name in before if np.array_equal(before[name], after[name])}
        assert still == (bases if variant == "refocus" else set()), variant


def test_random_bases_are_frozen_where_they_were_drawn(runs):
    with paddle.utils.unique_name.guard():
        run = runs["random-base"]
        paddle.seed(run.result["seed"])
        drawn = build_train_form(read_config(str(run.folder / "stage_two.yaml"))).state_dict()
    after = run.weights("trained")
    for name in (name.replace("convmap.weight", "weight") for name in drawn if "convmap" in name):
        np.testing.assert_array_equal(after[name], drawn[name].numpy(), err_msg=name)


def test_the_second_stage_has_the_recipe_of_the_first(runs, config):
    for variant, run in runs.items():
        first, second = read_config(config, [f"Global.epochs={EPOCHS}"]), run.second
        arch = second["Arch"]
        if refocus.VARIANTS[variant].layer is None:
            assert arch == PLAIN
            assert second["Global"]["pretrained_model"] == run.result["weights"]["baseline"]["name"]
        else:
            assert {**arch["backbone"], "class_num": arch["class_num"]} == PLAIN
            assert arch["layer"] == {"name": "RefConv2D", **refocus.VARIANTS[variant].layer}
            assert arch["pretrained"] == run.result["weights"]["baseline"]["name"]
        rate = first["Optimizer"]["lr"]["learning_rate"] * (0.01 if variant == "finetune" else 1)
        assert second["Optimizer"]["lr"].pop("learning_rate") == pytest.approx(rate, rel=1e-12)
        del first["Optimizer"]["lr"]["learning_rate"]
        for key in ("Optimizer", "DataLoader", "Loss", "Metric"):
            assert first[key] == second[key]
        assert second["Global"]["epochs"] == EPOCHS


def test_every_schedule_is_scaled():
    rates = [
        {"Momentum": {"scope": "backbone", "lr": {"name": "Piecewise", "values": [0.1, 0.01], "decay_epochs": [3]}}},
        {"SGD": {"scope": "head", "lr": {"learning_rate": 0.5, "eta_min": 0.1, "warmup_epoch": 5}}},
    ]
    assert refocus._scale_rates(rates, 0.1) == 3
    assert rates[0]["Momentum"]["lr"] == {"name": "Piecewise", "values": [0.1 * 0.1, 0.1 * 0.01], "decay_epochs": [3]}
    assert rates[1]["SGD"]["lr"] == {"learning_rate": 0.05, "eta_min": 0.1 * 0.1, "warmup_epoch": 5}


def test_options_of_the_layer(config):
    given = read_config(config, ["Arch.layer.init=zero", "Arch.where=*.depthwise_conv.*", "Arch.use_sync_bn=True"])
    second = refocus.stage_two(given, refocus.VARIANTS["trained-base"], "weights")
    assert second["Arch"] == {
        "name": "ReparamModel", "use_sync_bn": True, "class_num": 2, "backbone": {"name": PLAIN["name"]},
        "layer": {"name": "RefConv2D", "init": "zero", "train_base": True}, "where": "*.depthwise_conv.*",
        "pretrained": "weights",
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What comes out


def test_the_plain_weights_are_the_trained_network(runs):
    images = paddle.to_tensor(np.random.default_rng(1).standard_normal((3, 3, 16, 16)), dtype="float32")
    for run in runs.values():
        stock = ppcls.arch.build_model({"Arch": PLAIN, "Global": {"device": "cpu"}})
        checkpoints.load_into(stock, run.folder / "plain.pdparams")
        stock.eval()
        assert relative_error(stock(images), run.network()(images)) < 1e-5


def test_what_is_reported(runs, config):
    for variant, run in runs.items():
        result = run.result
        assert (result["variant"], result["network"], result["seed"], result["epochs"]) == (
            variant, PLAIN["name"], 0, EPOCHS,
        )  # fmt: skip
        assert set(result["curves"]) == ({"baseline", variant} if variant == "refocus" else {variant})
        for name, curve in result["curves"].items():
            assert [point["epoch"] for point in curve] == [1, 2]
            # The log has five digits.
            assert abs(curve[-1]["eval_top1"] - result["accuracy"][name]) < 1e-5
            assert all(point["train_loss"] > 0 for point in curve)
        for weights in result["weights"].values():
            assert digest(Path(weights["name"])) == {key: weights[key] for key in ("bytes", "sha256")}
        assert result["source"]["config"]["sha256"] == digest(Path(config))["sha256"]
        assert (run.folder / "shipped" / "manifest.json").is_file() == ("layer" in run.second["Arch"])


def test_curves_of_two_trainings_are_not_mixed(refocused):
    first, second = refocused.result["curves"].values()
    logs = [log.read_text() for log in refocused.folder.rglob("train.log")]
    assert len(logs) == 2
    assert [log.count("[Avg]") for log in logs] == [2 * EPOCHS, 2 * EPOCHS]
    assert first != second


# ---------------------------------------------------------------------------------------------------------------------
# Again


def test_a_killed_run_goes_on(place, command, refocused, monkeypatch):
    """It is stopped in the second epoch of either stage, and ends with the very weights of the run that was not."""
    check_loss, calls = engine.check_loss, []

    def stopping(losses, epoch, step):
        calls.append((epoch, step))
        if len(calls) in (3, 8):
            raise KeyboardInterrupt
        return check_loss(losses, epoch, step)

    monkeypatch.setattr(engine, "check_loss", stopping)
    for _ in range(2):
        assert command("killed") == 130
    assert command("killed") == 0
    # One epoch has two steps; the two that were stopped began again.
    assert [epoch for epoch, _ in calls] == [1, 1, 2, 2, 2, 1, 1, 2, 2, 2]
    run = Run(place.root / "killed")
    for name, value in refocused.weights("plain").items():
        np.testing.assert_array_equal(run.weights("plain")[name], value, err_msg=name)
    assert run.result["accuracy"] == refocused.result["accuracy"]
    assert run.result["curves"] == refocused.result["curves"]


def test_what_stands_there_is_kept(place, command, refocused, baseline, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in refocused.folder.rglob("*")}
    fails(capsys, 2, "holds a finished run and is kept", command, "refocus")
    assert before == {path: path.stat().st_mtime_ns for path in refocused.folder.rglob("*")}

    shutil.copytree(refocused.folder, place.root / "unfinished")
    (place.root / "unfinished" / "result.json").unlink()
    fails(capsys, 2, "of another variant; name another", command, "unfinished", "--variant", "random-base")
    fails(
        capsys,
        2,
        "of another config and weights; ",
        command,
        "unfinished",
        "--weights",
        baseline,
        "-o",
        "Global.seed=1",
    )
    (place.root / "mine").mkdir()
    (place.root / "mine" / "notes.txt").write_text("mine")
    fails(capsys, 2, "exists already and is kept", command, "mine")
    assert [path.name for path in (place.root / "mine").iterdir()] == ["notes.txt"]


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def test_weights_of_another_network(place, command, baseline, capsys):
    arguments = ["--weights", baseline, "-o", "Arch.class_num=3"]
    fails(capsys, 1, "fc.weight (file [256, 2], model [256, 3])", command, "other", *arguments)
    fails(capsys, 2, "there is no weight file no/such", command, "other", "--weights", "no/such")
    assert not (place.root / "other").exists()


def test_weights_that_paddleclas_has(config, baseline, tmp_path, monkeypatch):
    from ppcls.utils import download

    prefix = baseline[: -len(".pdparams")]
    monkeypatch.setattr(download, "get_path_from_url", lambda url, folder, decompress: baseline)
    for overrides in ([], [f"Arch.pretrained={prefix}"]):
        file = tmp_path / "baseline.pdparams"
        refocus._save_pretrained(read_config(config, overrides), file)
        state, expected = checkpoints.load(file), checkpoints.load(baseline)
        assert state.keys() == expected.keys()
        assert all(np.array_equal(state[name], expected[name]) for name in state)
        file.unlink()
    another = ["Arch.class_num=3"]
    with pytest.raises(CheckpointError, match=r"it is of 2 classes and the model of 3"):
        refocus._save_pretrained(read_config(config, another), tmp_path / "baseline.pdparams")
    another.append("Arch.fresh=True")
    with pytest.raises(CheckpointError, match=r"do not fit: 1 entries stay random, the first is fc.weight \[256, 3\]"):
        refocus._save_pretrained(read_config(config, another), tmp_path / "baseline.pdparams")
    assert not list(tmp_path.iterdir())


def test_from_weights_that_paddleclas_has(place, command, baseline):
    prefix = baseline[: -len(".pdparams")]
    arguments = ["--weights", "pretrained", "-o", f"Arch.pretrained={prefix}", "-o", "Arch.layer.init=zero"]
    assert command("pretrained", *arguments, "--variant", "trained-base", "-o", "Global.epochs=1") == 0
    run = Run(place.root / "pretrained")
    assert run.result["weights"]["baseline"]["name"] == str(run.folder / "baseline.pdparams")
    assert run.second["Arch"]["backbone"] == {"name": PLAIN["name"], "pretrained": False}
    assert set(run.result["curves"]) == {"trained-base"}


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "refocuss"], "there is no variant named 'refocuss'; did you mean refocus"),
        (["-o", "Global.checkpoints=auto"], "Global.checkpoints must be null"),
        (["-o", "Metric.Eval=None"], "needs DataLoader.Eval and Metric.Eval"),
        (["-o", "Global.image_shape=None"], "Global.image_shape is None"),
        (["-o", "Arch.layer.inti=zero"], "no option of RefConv2D named 'inti'; did you mean init"),
        (["-o", "Arch.layer=zero"], "give options of RefConv2D"),
        (["-o", "Arch.layer.name=SPConv2D"], "Arch.layer.name=SPConv2D is not this variant"),
        (["-o", "Arch.layer.base=random", "--variant", "retrain"], "this variant trains the plain network"),
        (["-o", "Optimizer.lr={'name': 'Noam'}", "--variant", "finetune"], "Optimizer has no learning rate"),
        (["-o", "Arch.name=MobileNetV9"], "did you mean MobileNetV"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(place, command, capsys, arguments, message):
    fails(capsys, 2, message, command, "refused", *arguments)
    assert not (place.root / "refused").exists()


def test_a_variant_is_not_turned_into_another_one(config):
    given = read_config(config, ["Arch.layer.train_base=False"])
    with pytest.raises(refocus.ConfigError, match="train_base=False is not this variant"):
        refocus.stage_two(given, refocus.VARIANTS["trained-base"], "weights")


def test_a_config_of_the_second_stage(place, capsys):
    config = place.config(REFCONV)
    fails(capsys, 2, "is a ReparamModel already", refocus.main, ["-c", config, "--output", str(place.root / "x")])
    fails(capsys, 2, "cannot be read", refocus.main, ["-c", "no.yaml", "--output", str(place.root / "x")])


def test_several_processes_are_refused(command, monkeypatch, capsys):
    monkeypatch.setattr(paddle.distributed, "get_world_size", lambda: 2)
    fails(capsys, 2, "trains in one process; on several devices", command, "two")
