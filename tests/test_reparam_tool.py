"""Releases: a folder appears whole and checked, or not at all; and the command that makes one from a config."""

import contextlib
import hashlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
import yaml
from helpers import randomise_batch_norms, relative_error
from paddle import nn

from paddle_reparam import InferenceModel, files, ppcls
from paddle_reparam.deploy import steps
from paddle_reparam.deploy.outputs import OutputSpec
from paddle_reparam.deploy.programs import WEIGHTS_SUFFIX, program_file
from paddle_reparam.deploy.released import MANIFEST, PLAIN_WEIGHTS
from paddle_reparam.errors import OutputExists, ReparamError, UsageError
from paddle_reparam.layers.spconv import SPConv2D
from paddle_reparam.surgery.rewrite import replace
from paddle_reparam.surgery.verify import settle_batch_norms
from paddle_reparam.weights import checkpoints

# The package has a function of the same name.
release = importlib.import_module("paddle_reparam.deploy.release")

SPEC = [[None, 3, 16, 16]]


class Plain(nn.Layer):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2D(3, 8, 3, stride=2, padding=1, bias_attr=False)
        self.stem_bn = nn.BatchNorm2D(8, epsilon=1e-3)
        self.body = nn.Conv2D(8, 8, 3, padding=1, bias_attr=False)
        self.body_bn = nn.BatchNorm2D(8)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x):
        x = nn.functional.relu(self.stem_bn(self.stem(x)))
        x = nn.functional.relu(self.body_bn(self.body(x)))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def make(layer="RefConv2D", where=None):
    net = Plain()
    randomise_batch_norms(net)
    replace(net, layer, where=where)
    randomise_batch_norms(net, seed=1)
    net.eval()
    return net


@pytest.fixture
def trained(tmp_path):
    """Return (a function that builds the network, the file of its trained weights)."""
    checkpoints.save(make().state_dict(), tmp_path / "trained.pdparams")
    return make, tmp_path / "trained.pdparams"


def run(trained, folder, **options):
    build, weights = trained
    stock = Plain()
    stock.eval()
    options = {"stock": stock, **options}
    return release.release(build(), weights, folder, SPEC, progress=lambda line: None, **options)


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def is_whole(folder):
    """Tell whether every file of a release is the one that its manifest describes, and no other is there."""
    files = json.loads((folder / MANIFEST).read_text())["files"]
    found = digests(folder)
    found.pop(MANIFEST)
    return found == {name: entry["sha256"] for name, entry in files.items()}


def left_beside(folder):
    return sorted(p.name for p in folder.parent.iterdir() if p.name.startswith("."))


# ---------------------------------------------------------------------------------------------------------------------
# What a release holds


def test_a_release_is_whole_checked_and_described(trained, tmp_path):
    report = run(trained, tmp_path / "out", output=OutputSpec("softmax"), facts={"source": {"config": {"name": "a"}}})
    assert is_whole(tmp_path / "out")
    assert left_beside(tmp_path / "out") == []
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert len(manifest["checks"]) == 8
    assert all(check["passed"] and check["relative_error"] < 1e-5 for check in manifest["checks"].values())
    assert manifest["source"]["weights"]["sha256"] == hashlib.sha256(trained[1].read_bytes()).hexdigest()
    assert manifest["source"]["config"] == {"name": "a"}
    assert manifest["batch_norm_epsilons"] == {"0.001": 1, "1e-05": 1}
    assert manifest["output"] == {"activation": "softmax", "keys": [], "left_out": []}
    assert manifest["size"]["train_form"]["frozen_parameters"] == 3 * 8 * 9 + 8 * 8 * 9
    assert manifest["size"]["fused"]["frozen_parameters"] == 0
    assert manifest["size"]["fused"]["macs_per_image"] == 64 * (3 * 8 * 9 + 8 * 8 * 9) + 32 * 5
    assert manifest["fusing"]["left_over"] == {}
    assert str(tmp_path) not in json.dumps({k: v for k, v in manifest.items() if k != "source"})
    assert "Predictor, oneDNN, batch 3" in str(report)

    net = make()
    checkpoints.load_into(net, trained[1])
    x = paddle.randn([2, 3, 16, 16])
    (probabilities,) = InferenceModel(tmp_path / "out").run(x.numpy())
    assert relative_error(probabilities, nn.functional.softmax(net(x))) < 1e-5

    stock = Plain()
    stock.eval()
    checkpoints.load_into(stock, tmp_path / "out" / PLAIN_WEIGHTS)
    assert relative_error(stock(x), net(x)) < 1e-5


def test_a_fused_form_that_is_no_stock_network_has_no_plain_weights(tmp_path):
    def build():
        return make("SPConv2D", where="body")

    assert type(build().body) is SPConv2D
    checkpoints.save(build().state_dict(), tmp_path / "w.pdparams")
    report = run((build, tmp_path / "w.pdparams"), tmp_path / "out")
    assert not (tmp_path / "out" / PLAIN_WEIGHTS).exists()
    assert "body.difference.weight" in report.manifest["plain_weights"]["why_none"]
    assert report.fusing.left_over == {"inference forms": 1}
    assert is_whole(tmp_path / "out")


def test_a_dry_run_writes_nothing(trained, tmp_path):
    before = sorted(tmp_path.iterdir())
    report = run(trained, tmp_path / "out" / "deeper", dry_run=True)
    assert sorted(tmp_path.iterdir()) == before
    assert report.checks["fused network"].passed
    assert "files" not in report.manifest


# ---------------------------------------------------------------------------------------------------------------------
# Faults


class Foreign(nn.Layer):
    """A block like those of PaddleClas, whose fused form is wrong."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2D(8, 8, 1)
        self.is_repped = False

    def forward(self, x):
        return self.conv(x)

    def re_parameterize(self):
        self.conv.weight.set_value(self.conv.weight * 1.01)
        self.is_repped = True


def test_a_block_that_is_fused_wrongly_is_named_and_nothing_is_written(tmp_path):
    def build():
        net = make()
        net.body = Foreign()
        net.eval()
        return net

    checkpoints.save(build().state_dict(), tmp_path / "w.pdparams")
    with pytest.raises(ReparamError, match="fused network is not the same function.*layer 'body'"):
        run((build, tmp_path / "w.pdparams"), tmp_path / "out", stock=None)
    assert [p.name for p in tmp_path.iterdir()] == ["w.pdparams"]


def spoil(folder):
    """Change the sign of the last weights of an export."""
    file = program_file(folder).with_suffix(WEIGHTS_SUFFIX)
    data = bytearray(file.read_bytes())
    for place in range(len(data) - 64, len(data), 4):
        data[place + 3] ^= 0x80
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("fault", ["export", "plain", "fused", "late", "write"])
def test_a_fault_at_any_step_leaves_nothing(trained, tmp_path, monkeypatch, fault):
    message = "is not the same function"
    if fault == "export":
        export = steps.export_inference

        def spoiled_export(model, folder, *rest):
            export(model, folder, *rest)
            spoil(folder)

        monkeypatch.setattr(steps, "export_inference", spoiled_export)
        message = "Predictor, oneDNN, batch 1 is not"
    elif fault == "plain":
        plain_weights = steps.plain_weights

        def spoiled_weights(*args):
            state, why = plain_weights(*args)
            return {**state, "head.bias": state["head.bias"] + 1}, why

        monkeypatch.setattr(steps, "plain_weights", spoiled_weights)
        message = "stock network, plain weights is not"
    elif fault == "fused":
        fuse = steps.reparameterize

        def spoiled_fuse(*args, **kwargs):
            fused, report = fuse(*args, **kwargs)
            fused.body.weight.set_value(fused.body.weight * 1.01)
            return fused, report

        monkeypatch.setattr(steps, "reparameterize", spoiled_fuse)
        message = "fused network is not the same function.*'body_bn'"
    elif fault == "late":
        check = steps.check_export

        def check_then_spoil(folder, *rest, **kwargs):
            reports = check(folder, *rest, **kwargs)
            spoil(folder)
            return reports

        monkeypatch.setattr(steps, "check_export", check_then_spoil)
        message = "inference.pdiparams: the file changed after it was written"
    else:

        def no_space(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(steps, "export_inference", no_space)
        message = "could not export for Paddle Inference: .*No space left on device"
    with pytest.raises(ReparamError, match=message):
        run(trained, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["trained.pdparams"]


def test_weights_that_do_not_fit_are_refused(trained, tmp_path):
    build, weights = trained
    plain = tmp_path / "plain.pdparams"
    checkpoints.save(Plain().state_dict(), plain)
    with pytest.raises(ReparamError, match=r"2 missing: stem.convmap.weight, body.convmap.weight"):
        run((build, plain), tmp_path / "out")
    checkpoints.save({**checkpoints.load(weights), "more": np.zeros(3, "float32")}, weights)
    with pytest.raises(ReparamError, match="1 extra: more"):
        run(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The place of a release


def test_a_folder_that_is_there_is_kept_unless_forced(trained, tmp_path):
    out = tmp_path / "out"
    run(trained, out)
    old = digests(out)
    with pytest.raises(
        OutputExists, match="is kept; name another folder, or replace it with force=True .in a command, --force"
    ):
        run(trained, out)
    assert digests(out) == old

    (out / "of-the-old-one").write_text("")
    run(trained, out, output=OutputSpec("softmax"), force=True)
    assert is_whole(out)
    assert digests(out) != old
    assert left_beside(out) == []


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_force_replaces_releases_only(trained, tmp_path, kind):
    out = tmp_path / "home"
    if kind == "folder":
        out.mkdir()
        (out / "thesis.txt").write_text("three years")
    else:
        out.write_text("three years")
    with pytest.raises(OutputExists, match=r"holds no manifest.json"):
        run(trained, out, force=True)
    assert (out / "thesis.txt" if kind == "folder" else out).read_text() == "three years"


def test_a_failed_replacement_leaves_the_old_release(trained, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(trained, out)
    old = digests(out)
    monkeypatch.setattr(steps, "check_export", lambda *_, **__: (_ for _ in ()).throw(ReparamError("broken")))
    with pytest.raises(ReparamError, match="broken"):
        run(trained, out, force=True)
    assert digests(out) == old
    assert left_beside(out) == []


def killed_while_replacing(target, patch):
    """Replace a folder in a process of its own that `patch` makes kill itself on the way."""
    child = os.fork()
    if child == 0:
        try:
            patch()
            with files.new_folder(target, target, replace=True) as new:
                (new / "a").write_text("new")
                (new / "b").write_text("new")
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the process was not killed: the test has lost its point"


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in(owner, name, before=True):
    """Kill the process just before, or just after, a function's work."""

    def patch():
        function = getattr(owner, name)

        def deadly(*args, **kwargs):
            if not before:
                function(*args, **kwargs)
            die()

        setattr(owner, name, deadly)

    return patch


@pytest.mark.parametrize(
    ("patch", "expected"),
    [
        (kill_in(os, "fsync"), "old"),
        (kill_in(files, "_exchange"), "old"),
        (kill_in(files, "_exchange", before=False), "new"),
        (kill_in(files.shutil, "rmtree"), "new"),
    ],
    ids=["before it is on the disk", "before the exchange", "after the exchange", "before the old one is deleted"],
)
def test_a_killed_process_leaves_a_whole_folder(tmp_path, patch, expected):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a", "b"):
        (out / name).write_text("old")
    killed_while_replacing(out, patch)
    assert {p.name: p.read_text() for p in out.iterdir()} == {"a": expected, "b": expected}
    # What it left is gone after the next one, and what another one is writing is not.
    with files.new_folder(out, out, replace=True) as other, files.new_folder(out, out, replace=True) as new:
        (new / "a").write_text("newer")
        assert other.is_dir()
        assert sorted(tmp_path.iterdir()) == sorted([out, other, new])
    assert list(tmp_path.iterdir()) == [out]


def test_without_an_exchange_the_old_folder_is_moved_aside(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("old")
    monkeypatch.setattr(files, "_exchange_at_once", lambda new, old: False)

    def second_rename_kills():
        rename = os.rename
        calls = []

        def deadly(*args):
            if calls:
                die()
            calls.append(1)
            rename(*args)

        os.rename = deadly

    killed_while_replacing(out, second_rename_kills)
    (aside,) = tmp_path.glob(".out-*.old")
    assert (aside / "a").read_text() == "old"
    os.rename(aside, out)

    with files.new_folder(out, out, replace=True) as new:
        (new / "a").write_text("new")
    assert (out / "a").read_text() == "new"
    assert not list(tmp_path.glob(".out-*.old"))


def test_errors_name_the_place_and_not_what_is_temporary(tmp_path):
    out = tmp_path / "out"
    with (
        pytest.raises(UsageError, match=f"^{out}/program.json: it is broken$"),
        files.new_folder(out, out, replace=False) as new,
    ):
        raise UsageError(f"{new / 'program.json'}: it is broken")

    def write(temporary):
        raise ReparamError(f"{temporary} is broken")

    with pytest.raises(ReparamError, match=f"^{out}: {out} is broken$"):
        files.atomic_write(out, write)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_the_longest_name(tmp_path):
    out = tmp_path / ("x" * 250)
    with files.new_folder(out, out, replace=False) as new:
        (new / "a").write_text("new")
    assert (out / "a").read_text() == "new"
    too_long = tmp_path / ("x" * 300)
    with (
        pytest.raises(ReparamError, match="it cannot be written .File name too long"),
        files.new_folder(too_long, too_long, replace=False),
    ):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# The command

CONFIG = {
    "Global": {"image_shape": [3, 32, 32], "device": "cpu"},
    "Arch": {
        "name": "ReparamModel",
        "class_num": 10,
        "pretrained": "a baseline that is not there any more",
        "backbone": {"name": "MobileNetV1_x0_25"},
        "layer": {"name": "RefConv2D"},
    },
    "DataLoader": {"Train": {}},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a folder with a config and the weights of its network."""
    ppcls.setup()
    from paddle_reparam.ppcls.reparam import build_train_form

    folder = tmp_path_factory.mktemp("project")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    paddle.seed(0)
    net = build_train_form(json.loads(json.dumps(CONFIG)))
    settle_batch_norms(net, [[None, 3, 32, 32]], batch=32)
    checkpoints.save(net.state_dict(), folder / "trained.pdparams")
    return folder


@contextlib.contextmanager
def inside(folder):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def call(project, *arguments, weights="trained.pdparams", config="config.yaml"):
    from paddle_reparam.ppcls.reparam import main

    with inside(project):
        return main(["-c", config, "--weights", weights, *arguments])


def test_the_command(project, capsys):
    command = [sys.executable, str(Path(__file__).parents[1] / "tools" / "reparam.py"), "-c", "config.yaml"]
    command += ["--weights", "trained", "--output", "released"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ +\d+  folded$", done.stdout, re.M)
    assert "folded into" not in done.stdout, "layer by layer only if asked for"
    assert "multiply-adds per image" in done.stdout
    tools = Path(command[1]).parent
    assert done.stdout.splitlines()[-6:] == [
        "each layer: released/manifest.json, in fusing", "next:",
        "# labels of images", f"python {tools / 'predict.py'} released IMAGE",
        "# later, or where it is used: is it whole, and right?", f"python {tools / 'reparam.py'} --check released",
    ]  # fmt: skip
    assert is_whole(project / "released")
    manifest = json.loads((project / "released" / MANIFEST).read_text())
    assert manifest["output"] == {"activation": "softmax", "keys": [], "left_out": []}
    assert manifest["source"]["config"]["name"] == "config.yaml"
    assert manifest["source"]["weights"]["name"] == "trained.pdparams"
    assert manifest["versions"]["paddleclas"]["engine_sha256"]
    assert manifest["plain_weights"]["file"] == "plain.pdparams"
    assert manifest["plain_weights"]["arch"]["name"] == "MobileNetV1_x0_25"
    assert str(project) not in json.dumps(manifest)

    stock = ppcls.setup().arch.MobileNetV1_x0_25(class_num=10)
    stock.eval()
    checkpoints.load_into(stock, project / "released" / PLAIN_WEIGHTS)
    x = paddle.randn([2, 3, 32, 32])
    (probabilities,) = InferenceModel(project / "released").run(x.numpy())
    assert relative_error(probabilities, nn.functional.softmax(stock(x))) < 1e-4

    assert call(project, "--output", "released") == 2
    assert capsys.readouterr().err.startswith("error: released exists already and is kept")

    assert check(project, "released") == 0
    assert "plain.pdparams" in capsys.readouterr().out
    (project / "released" / "plain.pdparams").write_bytes(b"")
    assert check(project, "released") == 1
    assert capsys.readouterr().err.startswith("error: released/plain.pdparams is not as it was written")


def check(project, folder):
    from paddle_reparam.ppcls.reparam import main

    with inside(project):
        return main(["--check", folder])


def test_what_the_export_takes_is_chosen(project, capsys):
    options = ("--output", "chosen", "--format", "pdmodel", "--size", "dynamic", "--normalize", "float32")
    assert call(project, *options) == 2
    assert "--normalize needs one NormalizeImage" in capsys.readouterr().err
    config = yaml.safe_load((project / "config.yaml").read_text())
    config["Infer"] = {"transforms": [{"NormalizeImage": {"scale": "1.0/255.0", "std": [0.2, 0.3, 0.4]}}]}
    (project / "pixels.yaml").write_text(yaml.safe_dump(config))
    assert call(project, *options, config="pixels.yaml") == 0
    taken = json.loads((project / "chosen" / "manifest.json").read_text())["input"]
    assert taken["size"] == "dynamic"
    assert taken["normalization"] == {
        "dtype": "float32", "mean": [0.485, 0.456, 0.406], "scale": 1 / 255, "std": [0.2, 0.3, 0.4],
    }  # fmt: skip
    assert (project / "chosen" / "inference.pdmodel").is_file()
    assert check(project, "chosen") == 0


def test_check_stands_alone(project, capsys):
    with pytest.raises(SystemExit, match="2"):
        call(project, "--check", "released")
    with pytest.raises(SystemExit, match="2"):
        call(project)
    assert check(project, "nowhere") == 2
    assert "nowhere is no release" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--batch", "8"], "--batch says how something is tried; give --tune, or a --precision below float32"),
        (["--precision", "float32", "--largest-drop", "1"], "--largest-drop says how something is tried"),
        (["--tune", "--largest-drop", "-1"], "--largest-drop takes 0 or more, not -1.0"),
        (["--tune", "--batch", "1", "0"], "--batch takes 1 or more, not 1 0"),
        (["--tune", "--tune-seconds", "inf"], "--tune-seconds takes 1 or more, not inf"),
        (["--precision", "int8", "--threads", "0"], "--threads takes 1 or more, not 0"),
        (["--tune", "--dry-run"], "what is tried is what is written; leave out --dry-run"),
        (["--precision", "float16"], "invalid choice: 'float16'"),
    ],
)
def test_options_of_a_tuning_that_cannot_be(project, capsys, given, sentence):
    with pytest.raises(SystemExit, match="2"):
        call(project, "--output", "tuned", *given)
    assert sentence in capsys.readouterr().err


def test_a_precision_is_proven_on_images_that_are_there(project, capsys):
    assert call(project, "--output", "small", "--precision", "int8") == 2
    assert "DataLoader" in capsys.readouterr().err
    assert not (project / "small").exists()


def test_a_dry_run_of_the_command(project, capsys):
    before = sorted(project.iterdir())
    assert call(project, "--output", "dry", "--dry-run", "--verbose", "-o", "Arch.infer_add_softmax=False") == 0
    assert sorted(project.iterdir()) == before
    assert "fused network" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"config": "nowhere.yaml"}, 2, "nowhere.yaml"),
        ({"weights": "nowhere"}, 2, "there is no weight file nowhere"),
        ({"more": ["-o", "Global.image_shape=224"]}, 2, "Global.image_shape is 224"),
        ({"more": ["-o", "Arch.backbone.name=MobilNetV1"]}, 2, "MobilNetV1"),
        ({"weights": "config.yaml"}, 1, "config.yaml"),
        ({"more": ["-o", "Arch.class_num=11"]}, 1, "fc.weight"),
        ({"more": ["-o", "Global.image_shape=[4,32,32]"]}, 1, "could not run the network"),
        ({"more": ["-o", "Arch.backbone.depth=9"]}, 1, "depth"),
    ],
)
def test_what_is_wrong_is_one_sentence(project, capsys, options, code, message):
    more = options.pop("more", [])
    before = sorted(project.iterdir())
    assert call(project, "--output", "never", *more, **options) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert sorted(project.iterdir()) == before


def test_paddleclas_own_blocks_are_fused(project, tmp_path, capsys):
    from paddle_reparam.ppcls.reparam import build_train_form

    config = {**CONFIG, "Arch": {"name": "RepVGG_A0", "class_num": 10}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    net = build_train_form(config)
    settle_batch_norms(net, [[None, 3, 32, 32]], batch=32)
    checkpoints.save(net.state_dict(), tmp_path / "trained.pdparams")
    assert call(tmp_path, "--output", "dry", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "no plain weight file: RepVGG_A0 is no ReparamModel around a backbone" in printed


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, OutputSpec("softmax")),
        ({"Arch": {"name": "X", "infer_add_softmax": False}}, OutputSpec(None)),
        (
            {"Arch": {"name": "RecModel", "infer_output_key": "features", "infer_add_softmax": False}},
            OutputSpec(None, ("features",)),
        ),
        ({"Arch": {"name": "DistillationModel", "infer_model_name": "Student"}}, OutputSpec("softmax")),
        ({"Global": {"use_multilabel": True}}, OutputSpec("sigmoid")),
        ({"Metric": {"Eval": [{"ATTRMetric": None}]}}, OutputSpec("sigmoid")),
        ({"Metric": {"Eval": [{"TopkAcc": {"topk": [1]}}]}}, OutputSpec("softmax")),
    ],
)
def test_the_output_is_that_of_paddleclas_export(changes, expected):
    from paddle_reparam.ppcls.reparam import read_output

    assert read_output({"Global": {}, "Arch": {"name": "ResNet50"}, **changes}) == expected
