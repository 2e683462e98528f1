"""tools/convert_checkpoint.py: published weight files of every kind, and every sentence with which one is refused."""

import argparse
import contextlib
import importlib.util
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import paddle
import pytest
from helpers import relative_error
from paddle import nn

from paddle_reparam import registry
from paddle_reparam.errors import CheckpointError, OutputExists, ReparamError, UnknownName
from paddle_reparam.layers.spconv import SPConv2D
from paddle_reparam.registry import create_model
from paddle_reparam.weights import checkpoints, conversion, published
from paddle_reparam.weights.conversion import convert, read_published

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "convert_checkpoint.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("convert_checkpoint", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(argument) for argument in arguments])


class Tiny(nn.Layer):
    def __init__(self, class_num=10, ratio=0.5):
        super().__init__()
        self.conv = nn.Conv2D(3, 8, 3, stride=2, padding=1, bias_attr=False)
        self.bn = nn.BatchNorm2D(8)
        self.body = SPConv2D(8, 8, ratio=ratio)
        self.fc = nn.Linear(8, class_num)

    def forward(self, x):
        x = self.body(nn.functional.relu(self.bn(self.conv(x))))
        return self.fc(x.mean([2, 3]))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A registered network: its published files may have the first BN folded into its convolution."""

    def rename(state):
        state = dict(state)
        if "conv.bias" in state:
            ones = np.ones(len(state["conv.bias"]))
            state.update({"bn.weight": ones * (1 + 1e-5) ** 0.5, "bn.bias": state.pop("conv.bias")})
            state.update({"bn.running_mean": ones * 0, "bn.running_var": ones})
        return state

    def build(class_num=10, ratio=0.5, **unknown):
        if unknown:
            raise UnknownName(f"Tiny has no argument {', '.join(unknown)}")
        return Tiny(class_num, ratio)

    published = (registry.Published("somebody", input_size=32),)
    monkeypatch.setitem(registry._models._entries, "Tiny", registry.ModelEntry(build, published, rename))


def draw(shapes, seed=0, dtype="float32"):
    """Return arrays of the shapes; variances are positive and counters integers."""
    generator = np.random.default_rng(seed)
    state = {}
    for key, shape in shapes.items():
        values = generator.standard_normal(shape) / max(np.prod(shape[1:], dtype=int), 4) ** 0.5
        state[key] = (np.abs(values) + 0.5 if key.endswith("running_var") else values).astype(dtype)
        if key.endswith("num_batches_tracked"):
            state[key] = np.array(7, "int64")
    return state


def batch_norm(path, width):
    shapes = {f"{path}.{last}": (width,) for last in ("weight", "bias", "running_mean", "running_var")}
    return {**shapes, f"{path}.num_batches_tracked": ()}


def spconv(path, inputs, outputs, ratio=0.5):
    first = int(inputs * ratio)
    return {
        f"{path}.gwc.weight": (outputs, first // 2, 3, 3),
        f"{path}.pwc.weight": (outputs, first, 1, 1),
        f"{path}.conv1x1.weight": (outputs, inputs - first, 1, 1),
        f"{path}.conv1x1.bias": (outputs,),
        **batch_norm(f"{path}.bn1", outputs),
        **batch_norm(f"{path}.bn2", outputs),
    }


def published_tiny(classes=10, **options):
    linear = {"fc.weight": (classes, 8), "fc.bias": (classes,)}
    return draw({"conv.weight": (8, 3, 3, 3), **batch_norm("bn", 8), **spconv("body", 8, 8), **linear}, **options)


def expected_of(state):
    """Return what the converted file must hold."""
    names = {"running_mean": "_mean", "running_var": "_variance"}
    arrays = {}
    for key, array in state.items():
        path, last = key.rsplit(".", 1)
        if last != "num_batches_tracked":
            arrays[f"{path}.{names.get(last, last)}"] = array.T if key == "fc.weight" else array
    return arrays


def assert_holds(path, state):
    loaded, expected = checkpoints.load(path), expected_of(state)
    assert loaded.keys() == expected.keys()
    for key, array in expected.items():
        assert loaded[key].dtype == np.float32
        np.testing.assert_array_equal(loaded[key], array.astype("float32"), err_msg=key)


# --- A stand-in for PyTorch --------------------------------------------------------------------------------------


class Tensor:
    def __init__(self, array, dtype=None):
        self.array, self.dtype = array, f"torch.{dtype or array.dtype}"

    def float(self):
        return Tensor(self.array.astype("float32"))

    def detach(self):
        return self

    cpu = detach

    def numpy(self):
        assert self.dtype != "torch.bfloat16", "numpy has no bfloat16"
        return self.array


def tensors(state):
    return {key: Tensor(array) for key, array in state.items()}


@pytest.fixture
def torch(monkeypatch, tmp_path):
    """Return a function that makes a .pth file which a stand-in for PyTorch reads as the given content."""
    module = types.ModuleType("torch")
    module.__version__ = "2.6.0+cpu"
    allowed, contents = [], {}

    @contextlib.contextmanager
    def safe_globals(classes):
        allowed[:] = classes
        yield

    def load(path, map_location, weights_only):
        assert weights_only is True
        assert map_location == "cpu"
        assert allowed == [argparse.Namespace]
        if isinstance(contents[Path(path).name], Exception):
            raise contents[Path(path).name]
        return contents[Path(path).name]

    module.serialization = types.SimpleNamespace(safe_globals=safe_globals)
    module.load = load
    monkeypatch.setitem(sys.modules, "torch", module)

    def make(content, name="weights.pth"):
        contents[name] = content
        (tmp_path / name).write_bytes(b"PK")
        return tmp_path / name

    make.module = module
    return make


# --- What is read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npz", "safetensors", "pdparams", "pth", "pth.tar", "bin"])
@pytest.mark.parametrize("suffix", [".pdparams", ".safetensors"])
def test_every_kind_of_file_gives_the_same(kind, suffix, tmp_path, torch):
    state = published_tiny()
    source = tmp_path / f"weights.{kind}"
    if kind == "npz":
        np.savez(source, **state)
    elif kind == "safetensors":
        from safetensors.numpy import save_file

        save_file({key: np.ascontiguousarray(array) for key, array in state.items()}, str(source))
    elif kind == "pdparams":
        checkpoints.save(expected_of(state), source)
    else:
        torch(tensors(state), source.name)
    output = tmp_path / "deeper" / f"ours{suffix}"
    report = convert("Tiny", source, output)
    assert_holds(output, state)
    assert (report.entries, report.written) == (19 if kind == "pdparams" else 22, 19)
    assert report.check.passed
    assert report.check.layers > 2
    assert [path.name for path in output.parent.iterdir()] == [output.name]


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
def test_other_float_types_become_float32(dtype, tmp_path, torch):
    state = published_tiny()
    if dtype == "bfloat16":
        state = {k: (a.view("uint32") & 0xFFFF0000).view("float32") if a.ndim else a for k, a in state.items()}
        source = torch({k: Tensor(a, "bfloat16" if a.ndim else None) for k, a in state.items()})
    else:
        state = {k: a.astype(dtype) if a.ndim else a for k, a in state.items()}
        source = tmp_path / "weights.npz"
        np.savez(source, **state)
    report = convert("Tiny", source, tmp_path / "ours.pdparams")
    assert_holds(tmp_path / "ours.pdparams", state)
    assert report.types == {dtype: 19, "int64": 3}


def test_bfloat16_without_torch_becomes_float32(tmp_path):
    floats = expected_of(published_tiny())
    bits = {key: (np.ascontiguousarray(a).view("uint32") >> 16).astype("uint16") for key, a in floats.items()}
    checkpoints.save(bits, tmp_path / "weights.safetensors")
    report = convert("Tiny", tmp_path / "weights.safetensors", tmp_path / "ours.pdparams")
    assert report.types == {"bfloat16": 19}
    loaded = checkpoints.load(tmp_path / "ours.pdparams")
    assert relative_error(loaded["fc.weight"], floats["fc.weight"]) < 2**-7


def test_paddles_own_files_have_its_layouts(tmp_path):
    checkpoints.save({"fc.weight": np.ones((8, 10), "float32")}, tmp_path / "weights.pdparams")
    assert read_published(tmp_path / "weights.pdparams").arrays["fc.weight"].shape == (10, 8)


def test_spconv_round_trip(tmp_path):
    """ResNet-18 with SPConv, by the names of torchvision's ResNet."""
    shapes = {"conv1.weight": (64, 3, 7, 7), **batch_norm("bn1", 64)}
    for stage, (inputs, outputs) in enumerate([(64, 64), (64, 128), (128, 256), (256, 512)], start=1):
        for block in range(2):
            path, before = f"layer{stage}.{block}", inputs if block == 0 else outputs
            shapes.update({**spconv(f"{path}.conv1", before, outputs), **batch_norm(f"{path}.bn1", outputs)})
            shapes.update({**spconv(f"{path}.conv2", outputs, outputs), **batch_norm(f"{path}.bn2", outputs)})
            if before != outputs:
                shapes[f"{path}.downsample.0.weight"] = (outputs, before, 1, 1)
                shapes.update(batch_norm(f"{path}.downsample.1", outputs))
    shapes.update({"fc.weight": (1000, 512), "fc.bias": (1000,)})
    state = draw(shapes, dtype="float64")
    np.savez(tmp_path / "published.npz", **state)
    report = convert("ResNet18_SPConv", tmp_path / "published.npz", tmp_path / "ours.pdparams")
    assert_holds(tmp_path / "ours.pdparams", state)
    assert (report.class_num, report.class_num_from_file, report.merged) == (1000, False, False)
    create_model("ResNet18_SPConv", pretrained=str(tmp_path / "ours.pdparams"))


@pytest.mark.parametrize(
    ("pack", "part"),
    [
        (lambda state: state, ""),
        (lambda state: {"state_dict": state, "epoch": 3}, "state_dict"),
        (lambda state: {"model": state, "optimizer": {"state": {}}, "args": argparse.Namespace(model="Tiny")}, "model"),
        (lambda state: {"module": state}, "module"),
        (lambda state: {"model": {"state_dict": state}}, "model.state_dict"),
        (lambda state: {"model": {f"module.{key}": value for key, value in state.items()}}, "model"),
    ],
)
def test_the_part_with_the_weights_is_found(pack, part, tmp_path, torch):
    state = published_tiny()
    report = convert("Tiny", torch(pack(tensors(state))), tmp_path / "ours.pdparams")
    assert_holds(tmp_path / "ours.pdparams", state)
    assert report.part == part


@pytest.mark.parametrize("part", ["model_ema", "state_dict_ema"])
def test_the_moving_average_is_taken_when_asked_for(part, tmp_path, torch):
    state, average = published_tiny(), published_tiny(seed=1)
    source = torch({"model": tensors(state), part: tensors(average)})
    report = convert("Tiny", source, tmp_path / "plain.pdparams")
    assert_holds(tmp_path / "plain.pdparams", state)
    assert "model (a moving average is there too: ask for the ema weights)" in str(report)
    report = convert("Tiny", source, tmp_path / "ema.pdparams", weights="ema")
    assert_holds(tmp_path / "ema.pdparams", average)
    assert report.part == part
    assert "--weights" not in str(report)


def test_of_paddleclas_two_files_pdparams_holds_the_average(tool, tmp_path, capsys, monkeypatch):
    """Where PaddleClas averages the weights, it writes the average into .pdparams and the plain ones into .pdema."""

    def refuse(*arguments, **options):
        raise AssertionError("a file was unpickled")

    for owner, name in ((paddle, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, refuse)
    state = published.convert_state("Tiny", published_tiny())
    kinds = {"pdparams": "the moving average of the weights", "pdema": "the weights as they were trained"}
    checkpoints.save(state, tmp_path / "latest.pdparams")
    given = ["--model", "Tiny", "--output", str(tmp_path / "ours.pdparams"), "--force", "--input"]
    assert tool(*given, tmp_path / "latest.pdparams") == 0
    assert "the whole file" in capsys.readouterr().out
    (tmp_path / "latest.pdema").write_bytes((tmp_path / "latest.pdparams").read_bytes())
    for suffix, weights, other in (("pdparams", "ema", "pdema"), ("pdema", "plain", "pdparams")):
        file = str(tmp_path / f"latest.{suffix}")
        for chosen in ([], ["--weights", weights]):
            assert tool(*given, file, *chosen) == 0
            assert f"{kinds[suffix]} (the other ones: latest.{other})" in capsys.readouterr().out
        assert tool(*given, file, "--weights", "plain" if weights == "ema" else "ema") == 1
        assert f"it holds the {weights} weights; give {tmp_path / f'latest.{other}'}" in capsys.readouterr().err


def test_published_weights_for_another_number_of_classes(npz, tmp_path):
    """They are converted as they are, and the classifier stays fresh where they are loaded."""
    published = npz(published_tiny(classes=7))
    with pytest.raises(CheckpointError, match="they are of 7 classes: convert them without class_num, and load the"):
        conversion.convert("Tiny", published, tmp_path / "ours.pdparams", options={"class_num": 3})
    conversion.convert("Tiny", published, tmp_path / "ours.pdparams")
    model = create_model("Tiny", class_num=3)
    report = checkpoints.load_into(model, tmp_path / "ours", fresh=True)
    assert report.fresh == ("fc.weight", "fc.bias")
    arrays = checkpoints.load(tmp_path / "ours.pdparams")
    assert all(np.array_equal(arrays[name], model.state_dict()[name].numpy()) for name in report.loaded)


def test_weights_that_are_not_there_are_refused(torch):
    state = tensors(published_tiny())
    for content, weights, sentence in [
        (state, "ema", "one set of weights and no moving average of them; ask for the plain weights"),
        ({"model": state, "epoch": 1}, "ema", r"of its parts \(model, epoch\) none are ema weights; ask for the plain"),
        ({"model_ema": state}, "plain", r"none are plain weights; ask for the ema weights"),
        ([1, 2], "plain", "it holds a list in the place of named weights"),
        ({"epoch": 3}, "plain", "its entry 'epoch' is no array but of the type int, so this is no state dict"),
    ]:
        source = torch(content)
        with pytest.raises(CheckpointError, match=f"{source.name}: .*{sentence}"):
            read_published(source, weights)
    with pytest.raises(ReparamError, match="there are no weights 'EMA'; choose 'plain' or 'ema'"):
        read_published(source, "EMA")


def test_without_pytorch_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "w.pth").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"w.pth: it is read by PyTorch, which cannot be imported.*\.npz"):
        read_published(tmp_path / "w.pth")


def test_an_old_pytorch_is_refused(torch):
    torch.module.__version__ = "2.5.1"
    with pytest.raises(CheckpointError, match=r"PyTorch 2.5.1 may run code of a file that it reads; install torch 2.6"):
        read_published(torch({}))


def test_what_would_run_code_is_refused(torch):
    error = RuntimeError("WeightsUnpickler error: Unsupported global: GLOBAL yacs.config.CfgNode was not allowed")
    with pytest.raises(CheckpointError, match=r"plain values \(yacs.config.CfgNode\); reading that could run code"):
        read_published(torch(error))


def test_what_is_damaged_is_refused(torch, tmp_path):
    with pytest.raises(CheckpointError, match=r"truncated, damaged or no file of PyTorch.*EOFError"):
        read_published(torch(EOFError()))
    with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\)"):
        read_published(torch(PermissionError(13, "Permission denied")))
    with pytest.raises(CheckpointError, match=r"none.pth: there is no such file"):
        read_published(tmp_path / "none.pth")


# --- What does not fit -------------------------------------------------------------------------------------------


@pytest.fixture
def npz(tmp_path):
    def make(state):
        np.savez(tmp_path / "published.npz", **state)
        return tmp_path / "published.npz"

    return make


def test_nothing_may_be_missing_or_left_over(npz, tmp_path):
    state = {**published_tiny(), "more.weight": np.ones(3)}
    del state["body.pwc.weight"], state["bn.running_var"]
    missing = (
        r"(?s)published.npz: the published weights are not those of Tiny.*2 missing: bn._variance, body.pwc.weight"
    )
    with pytest.raises(CheckpointError, match=missing + r"\n  1 left over: more.weight"):
        convert("Tiny", npz(state), tmp_path / "ours.pdparams")
    assert not (tmp_path / "ours.pdparams").exists()


def test_the_number_of_classes_is_read_from_the_file(npz, tmp_path):
    state = published_tiny(classes=7)
    report = convert("Tiny", npz(state), tmp_path / "ours.pdparams")
    assert_holds(tmp_path / "ours.pdparams", state)
    assert (report.class_num, report.class_num_from_file) == (7, True)
    assert "7 (read from the file)" in str(report)
    with pytest.raises(CheckpointError, match=r"fc.weight \(file \[8, 7\], model \[8, 5\]\)"):
        convert("Tiny", npz(state), tmp_path / "five.pdparams", options={"class_num": 5})


def test_options_make_the_network_that_was_trained(npz, tmp_path):
    state = published_tiny()
    state.update(draw(spconv("body", 8, 8, ratio=0.25)))
    with pytest.raises(CheckpointError, match=r"not those of Tiny; give the options.*\n.*body.gwc.weight"):
        convert("Tiny", npz(state), tmp_path / "ours.pdparams")
    report = convert("Tiny", npz(state), tmp_path / "ours.pdparams", options={"ratio": 0.25})
    assert report.options == {"ratio": 0.25}
    with pytest.raises(ReparamError, match=r"Tiny cannot be built with \{'ratio': 'much'\}"):
        convert("Tiny", npz(state), tmp_path / "more.pdparams", options={"ratio": "much"})


def test_a_network_without_published_weights_says_so(npz, tmp_path, monkeypatch):
    entry = registry.get_model("Tiny")
    monkeypatch.setitem(registry._models._entries, "Tiny", registry.ModelEntry(entry.build, entry.published, None))
    with pytest.raises(CheckpointError, match="no published weight files of Tiny are known; those of .*50_SPConv"):
        convert("Tiny", npz(published_tiny()), tmp_path / "ours.pdparams")


def test_a_merged_file_is_told_from_a_train_form(npz, tmp_path):
    state = published_tiny()
    state["conv.bias"] = np.arange(8.0)
    for last in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        del state[f"bn.{last}"]
    report = convert("Tiny", npz(state), tmp_path / "ours.pdparams")
    assert report.merged
    assert "merged (deploy)" in str(report)
    np.testing.assert_array_equal(checkpoints.load(tmp_path / "ours.pdparams")["bn.bias"], np.arange(8.0))


def test_zeros_are_counted(npz, tmp_path):
    state = published_tiny()
    large = [array for array in state.values() if array.ndim > 1]
    state["conv.weight"][:4] = 0.0
    report = convert("Tiny", npz(state), tmp_path / "ours.pdparams")
    assert report.nonzero == pytest.approx(1 - 4 * 27 / sum(array.size for array in large))


# --- The output --------------------------------------------------------------------------------------------------


def test_an_older_file_is_kept_unless_forced(npz, tmp_path):
    output = tmp_path / "ours.pdparams"
    output.write_text("precious")
    with pytest.raises(OutputExists, match="ours.pdparams exists already and is kept; name another file, or replace"):
        convert("Tiny", npz(published_tiny()), output)
    assert output.read_text() == "precious"
    convert("Tiny", npz(published_tiny()), output, force=True)
    assert_holds(output, published_tiny())


@pytest.mark.parametrize("fault", ["fusing", "writing", "not finite"])
def test_a_fault_leaves_the_older_file(fault, npz, tmp_path, monkeypatch):
    state, output = published_tiny(), tmp_path / "ours.pdparams"
    output.write_text("precious")
    source = npz(state)
    if fault == "fusing":
        fuse = conversion.reparameterize

        def spoiled(*arguments, **options):
            fused, report = fuse(*arguments, **options)
            fused.fc.weight.set_value(fused.fc.weight * 1.01)
            return fused, report

        monkeypatch.setattr(conversion, "reparameterize", spoiled)
        message = "the fused form of the converted network is not the same function"
    elif fault == "writing":
        full = OSError(28, "No space left on device")
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(full))
        message = "cannot be written .No space left on device"
    else:
        state["fc.bias"][0] = np.nan
        source = npz(state)
        message = "cannot be compared: fc.bias holds 1 of 10 numbers that are not finite"
    with pytest.raises(ReparamError, match=message):
        convert("Tiny", source, output, force=True)
    assert output.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.pdparams", "published.npz"]


def test_a_network_for_one_size_is_checked_with_that(npz, tmp_path, monkeypatch):
    class OneSize(Tiny):
        def forward(self, x):
            if x.shape[2] != 80:
                raise ReparamError("images of 80 pixels only")
            return super().forward(x)

    published = [registry.Published("somebody", input_size=size) for size in (96, 80)]
    entry = registry.ModelEntry(OneSize, published, dict)
    monkeypatch.setitem(registry._models._entries, "Tiny", entry)
    report = convert("Tiny", npz(published_tiny()), tmp_path / "ours.pdparams")
    assert report.input_shape == [None, 3, 80, 80]


# --- The command -------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_found(tool, npz, tmp_path, capsys):
    source, output = npz(published_tiny(classes=4)), tmp_path / "ours.safetensors"
    assert tool("--model", "Tiny", "--input", source, "--output", output, "--option", "ratio=0.5") == 0
    said = capsys.readouterr().out
    for words in (
        "Tiny{'ratio': 0.5}", "published.npz (npz)", "22, 19 of float32, 3 of int64", "4 (read from the file)",
        "100.00%", "19 entries in train form", "the train form against the fused network, 3x32x32", "yes",
    ):  # fmt: skip
        assert words in said
    assert_holds(output, published_tiny(classes=4))


def test_exit_codes(tool, npz, tmp_path, capsys):
    source, output = npz(published_tiny()), tmp_path / "ours.pdparams"
    usual = ["--model", "Tiny", "--input", source, "--output", output]

    def fails(*arguments):
        code = tool(*arguments)
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert "Traceback" not in message
        return code, message

    code, message = fails("--model", "Tinny", *usual[2:])
    assert code == 2
    assert "no model named 'Tinny'; did you mean Tiny" in message
    assert fails(*usual, "--option", "depth=3") == (2, "error: Tiny has no argument depth\n")
    assert fails(*usual[:3], tmp_path / "none.npz", *usual[4:])[0] == 2
    assert fails(*usual, "--option", "class_num=[3, 4]")[0] == 1
    assert not output.exists()
    output.write_text("precious")
    assert fails(*usual)[0] == 2
    assert tool(*usual, "--force") == 0
    capsys.readouterr()
    for wrong in (
        [*usual[:5], tmp_path / "ours.pth"], [*usual, "--option", "ratio"], [*usual, "--option", "ratio=[1"],
        [*usual, "--weights", "both"], usual[2:],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as exit_:
            tool(*wrong)
        assert exit_.value.code == 2
        assert "usage" in capsys.readouterr().err
