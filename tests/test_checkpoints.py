"""Weight files: what is read, what is refused and with which words, and what stands on the disk after a failure."""

import errno
import io
import os
import pickle
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn
from weight_files import DATA, assert_same, expected, read_or_refuse, refusal

from paddle_reparam import registry
from paddle_reparam.errors import CheckpointError, MissingFile, ReparamError
from paddle_reparam.files import atomic_write
from paddle_reparam.layers.base import ReparamLayer
from paddle_reparam.surgery.masks import masked_places
from paddle_reparam.training import sparsity
from paddle_reparam.weights import formats
from paddle_reparam.weights.checkpoints import LoadReport, form_of, load, load_into, save

PADDLE_FILES = sorted(DATA.glob("*.pdparams"))
BY_SUFFIX = [".safetensors", ".pdparams"]


def write_npz(arrays: dict, path: Path) -> None:
    np.savez(path, **arrays)


WRITERS = {".safetensors": save, ".pdparams": save, ".npz": write_npz}


# --- what is read ---------------------------------------------------------------------------------------------------


def test_both_paddles_files_are_here():
    assert len(PADDLE_FILES) == 12
    assert {path.stem.rsplit("-", 1)[1] for path in PADDLE_FILES} == {"2.6.2", "3.3.1"}


@pytest.mark.parametrize("path", PADDLE_FILES, ids=lambda path: path.stem)
def test_files_of_both_paddles(path):
    arrays = load(path)
    assert_same(arrays, expected())
    assert all(array.flags.writeable for array in arrays.values())


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_state_dict_of_the_running_paddle(tmp_path, protocol):
    model = nn.Sequential(nn.Conv2D(2, 3, 3), nn.BatchNorm2D(3))
    paddle.save(model.state_dict(), str(tmp_path / "model.pdema"), protocol=protocol)
    assert_same(load(tmp_path / "model.pdema"), {name: t.numpy() for name, t in model.state_dict().items()})


def test_npz(tmp_path):
    write_npz(expected(), tmp_path / "model.npz")
    assert_same(load(tmp_path / "model.npz"), expected())
    np.savez_compressed(tmp_path / "packed.npz", **expected())
    assert_same(load(tmp_path / "packed.npz"), expected())


@pytest.mark.parametrize("suffix", WRITERS)
def test_the_content_decides_and_not_the_name(tmp_path, suffix):
    WRITERS[suffix](expected(), tmp_path / f"model{suffix}")
    (tmp_path / f"model{suffix}").rename(tmp_path / "model.weights")
    assert_same(load(tmp_path / "model.weights"), expected())


# --- what is refused ------------------------------------------------------------------------------------------------


def test_npz_bombs_and_other_zip_archives(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "_ALWAYS_UNPACKED", 1000)
    np.savez_compressed(tmp_path / "bomb.npz", w=np.zeros(100_000))
    assert "packed more than a hundred times" in refusal(tmp_path / "bomb.npz")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("archive/data.pkl", b"x")
    assert "zip archive with 'archive/data.pkl'" in refusal(tmp_path / "other.npz")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
        archive.writestr("w.npy", header.getvalue() + b"1234")
    assert "with other than" in refusal(tmp_path / "lie.npz")


def test_safetensors_types_that_no_weight_has(tmp_path):
    from safetensors.numpy import save_file

    save_file({"w": np.ones(2, np.uint32)}, tmp_path / "model.safetensors")
    assert "its entry 'w' has the type U32" in refusal(tmp_path / "model.safetensors")


def test_what_is_no_weight_file_is_named(tmp_path):
    for name in ("model.pdparams", "model.safetensors", "model.npz"):
        (tmp_path / name).write_bytes(b"")
        assert refusal(tmp_path / name) == "it is empty"
        (tmp_path / name).write_bytes(b"<html>not found</html>")
        assert "truncated, damaged or no" in refusal(tmp_path / name)
    (tmp_path / "notes.txt").write_bytes(b"hello")
    assert "no .safetensors, .pdparams, .pdema or .npz file" in refusal(tmp_path / "notes.txt")
    assert "cannot be read (No such file" in refusal(tmp_path / "nowhere.pdparams")
    assert "cannot be read (Is a directory" in refusal(tmp_path)
    paddle.save(paddle.ones([2]), str(tmp_path / "model.pdparams"))
    assert "it holds a tuple, not arrays by name" in refusal(tmp_path / "model.pdparams")
    (tmp_path / "model.pdparams").write_bytes(pickle.dumps({}, 4))
    assert "holds no arrays" in refusal(tmp_path / "model.pdparams")
    (tmp_path / "model.pdparams").write_bytes(pickle.dumps({(1, 2): 3}, 4))
    assert "a key that is no text but a tuple" in refusal(tmp_path / "model.pdparams")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    save(expected(), tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "needs a package that is not installed" in refusal(tmp_path / "model.safetensors")


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_truncation_is_noticed_or_harmless(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    WRITERS[suffix](expected(), path)
    data = path.read_bytes()
    noticed = 0
    for end in range(1, len(data), 7):
        path.write_bytes(data[:end])
        arrays = read_or_refuse(path)
        noticed += arrays is None
        if arrays is not None:
            assert_same(arrays, expected())
    assert noticed > 0.9 * len(data) / 7


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_flipped_bit_is_noticed_or_harmless(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    WRITERS[suffix](expected(), path)
    data = path.read_bytes()
    noticed = 0
    for position in range(0, len(data), 3):
        flipped = bytearray(data)
        flipped[position] ^= 1 << random.randrange(8)
        path.write_bytes(flipped)
        arrays = read_or_refuse(path)
        noticed += arrays is None
        if arrays is not None:
            assert_same(arrays, expected())
    assert noticed > len(data) / 6


@pytest.mark.parametrize("suffix", BY_SUFFIX)
def test_one_flipped_bit_among_the_numbers_is_named_as_damage(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    state = expected()
    save(state, path)
    data = bytearray(path.read_bytes())
    data[data.index(state["conv.weight"].tobytes()) + 5] ^= 1
    path.write_bytes(data)
    assert "its checksum is not that of its contents: it is damaged" in refusal(path)


# --- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", BY_SUFFIX)
def test_round_trip_of_arrays_and_tensors(tmp_path, suffix):
    path = tmp_path / "new folder" / f"model{suffix}"
    save(expected(), path)
    assert_same(load(path), expected())
    tensors = {name: paddle.to_tensor(array) for name, array in expected().items()}
    assert tensors["bn.weight"].dtype == paddle.bfloat16
    save(tensors, path)
    assert_same(load(path), expected())
    save({"w": expected()["conv.weight"].astype(">f4").transpose(3, 2, 1, 0)}, path)
    assert_same(load(path), {"w": np.ascontiguousarray(expected()["conv.weight"].transpose(3, 2, 1, 0))})


@pytest.mark.parametrize("stock", ["Tensor", "numpy"])
def test_paddle_load_reads_a_saved_pickle(tmp_path, stock):
    path = str(tmp_path / "model.pdparams")
    save(expected(), path)
    loaded = paddle.load(path, return_numpy=stock == "numpy")
    assert_same({name: np.asarray(value) for name, value in loaded.items()}, expected())
    if stock == "Tensor":
        assert {name: t.dtype for name, t in loaded.items()} == {
            name: paddle.to_tensor(array).dtype for name, array in expected().items()
        }
        model = nn.Sequential(nn.Conv2D(1, 1, 1), nn.BatchNorm2D(1))
        other = nn.Sequential(nn.Conv2D(1, 1, 1), nn.BatchNorm2D(1))
        save(model.state_dict(), path)
        assert other.set_state_dict(paddle.load(path)) == ([], [])
        assert_same({k: t.numpy() for k, t in other.state_dict().items()}, load(path))


def test_safetensors_reads_a_saved_file(tmp_path):
    from safetensors import safe_open

    save(expected(), tmp_path / "model.safetensors")
    with safe_open(str(tmp_path / "model.safetensors"), framework="numpy") as file:
        assert set(file.keys()) == set(expected())
        assert file.get_slice("bn.weight").get_dtype() == "BF16"
        assert file.get_tensor("conv.weight").tobytes() == expected()["conv.weight"].tobytes()
        assert list(file.metadata()) == ["paddle_reparam.sha256"]


@pytest.mark.parametrize(
    "state", [{"w": [1.0]}, {"w": np.array(["a"])}, {"w": np.ones(2, np.complex64)}, {1: np.ones(2)}]
)
def test_what_is_no_state_is_refused_and_named(tmp_path, state):
    with pytest.raises(CheckpointError, match=r"the entry ('w'|1) is no Tensor or array of numbers"):
        save(state, tmp_path / "model.pdparams")
    assert list(tmp_path.iterdir()) == []


def test_empty_states_and_unknown_suffixes_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no arrays"):
        save({}, tmp_path / "model.pdparams")
    for name, said in [("model.npz", r"'\.npz'"), ("model", "'no suffix'")]:
        with pytest.raises(CheckpointError, match=rf"written as \.safetensors or \.pdparams, not as {said}"):
            save(expected(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def half_and_full(path: Path, data: bytes) -> int:
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
    raise OSError(errno.ENOSPC, "No space left on device")


def fail(*arguments):
    raise OSError(errno.EIO, "Input/output error")


def wrong_bytes(path: Path, data: bytes) -> int:
    with open(path, "wb") as file:
        return file.write(data[:-1])


@pytest.mark.parametrize("suffix", BY_SUFFIX)
@pytest.mark.parametrize(
    ("owner", "name", "fault", "words"),
    [
        (Path, "write_bytes", half_and_full, r"No space left on device.*; what stood there is unchanged"),
        (os, "fsync", fail, "Input/output error"),
        (os, "replace", fail, "Input/output error"),
        (Path, "write_bytes", wrong_bytes, "damaged"),
    ],
    ids=["full disk", "fsync", "replace", "short write"],
)
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, suffix, owner, name, fault, words):
    path = tmp_path / f"model{suffix}"
    save({"old": np.ones(3)}, path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fault)
        with pytest.raises(ReparamError, match=words) as caught:
            save(expected(), path)
    assert str(caught.value).startswith(f"{path}: ")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_read_back_is_compared(tmp_path, monkeypatch):
    # A pickle without the checksum, as from a disk that loses it, and with one number changed.
    monkeypatch.setitem(formats.WRITERS, ".pdparams", lambda arrays: pickle.dumps({"w": np.array([1.0, 3.0])}, 4))
    with pytest.raises(ReparamError, match="what was read back is not what was written"):
        save({"w": np.array([1.0, 2.0])}, tmp_path / "model.pdparams")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EROFS, "Read-only")]
)
def test_where_nothing_can_be_removed_the_sentence_stands(tmp_path, monkeypatch, error):
    """In a folder that is read-only, neither the writing nor the tidying up works."""

    def refuse(*arguments, **options):
        raise error

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(ReparamError, match=f"model.bin: it cannot be written \\({error.strerror}\\)"):
        atomic_write(tmp_path / "model.bin", refuse)


def test_names_that_are_too_long(tmp_path):
    with pytest.raises(ReparamError, match="cannot be written .File name too long"):
        save(expected(), tmp_path / f"{'x' * 300}.pdparams")
    (tmp_path / "file").touch()
    with pytest.raises(ReparamError, match="cannot be written .File exists"):
        save(expected(), tmp_path / "file" / "model.pdparams")
    longest = tmp_path / f"{'x' * 246}.pdparams"
    save(expected(), longest)
    assert_same(load(longest), expected())
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file", longest]


def test_an_exception_or_interrupt_while_writing_leaves_no_file(tmp_path):
    def interrupted(temporary):
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "model.onnx", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"old and whole")
    script = (
        "import os, sys\n"
        "from paddle_reparam.weights.checkpoints import atomic_write\n"
        "def write(temporary):\n"
        "    temporary.write_bytes(b'new and ha')\n"
        "    os._exit(9)\n"
        "atomic_write(sys.argv[1], write)\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=root, capture_output=True, timeout=120)
    assert done.returncode == 9, done.stderr.decode()
    assert path.read_bytes() == b"old and whole"
    assert [other.suffix for other in tmp_path.iterdir() if other != path] == [".bin"]


def test_atomic_write_follows_links_and_keeps_the_usual_permissions(tmp_path):
    (tmp_path / "real.bin").write_bytes(b"old")
    (tmp_path / "link.bin").symlink_to(tmp_path / "real.bin")
    atomic_write(tmp_path / "link.bin", lambda temporary: temporary.write_bytes(b"new"))
    assert (tmp_path / "link.bin").is_symlink()
    assert (tmp_path / "real.bin").read_bytes() == b"new"
    (tmp_path / "plain").touch()
    assert (tmp_path / "real.bin").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_in_the_way_is_an_error(tmp_path):
    (tmp_path / "model.pdparams").mkdir()
    with pytest.raises(ReparamError, match="cannot be written"):
        save(expected(), tmp_path / "model.pdparams")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pdparams"]


# --- into a model ---------------------------------------------------------------------------------------------------


def small_model() -> nn.Layer:
    return nn.Sequential(nn.Conv2D(1, 2, 1), nn.BatchNorm2D(2), nn.Linear(2, 2))


def state_of(model: nn.Layer) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


@pytest.fixture
def trained():
    """A model whose entries all differ from those of a new one."""
    model = small_model()
    for tensor in model.state_dict().values():
        tensor.set_value(paddle.rand(tensor.shape) + 2)
    return model


@pytest.mark.parametrize("suffix", BY_SUFFIX)
def test_load_into_from_a_file(tmp_path, trained, suffix):
    save(trained.state_dict(), tmp_path / f"model{suffix}")
    model = small_model()
    parameters = [id(parameter) for parameter in model.parameters()]
    frozen = [parameter.stop_gradient for parameter in model.parameters()]
    report = load_into(model, tmp_path / f"model{suffix}")
    assert_same(state_of(model), state_of(trained))
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert [parameter.stop_gradient for parameter in model.parameters()] == frozen
    assert report == LoadReport(tuple(model.state_dict()), (), 100.0)
    assert "coverage 100.0 % of 8" in str(report)
    assert '"coverage": 100.0' in report.to_json()


def test_load_into_casts_float_types(trained):
    state = state_of(trained)
    expect = {name: array.astype(np.float16).astype(np.float32) for name, array in state.items()}
    model = small_model()
    load_into(model, {name: array.astype(np.float16) for name, array in state.items()})
    assert_same(state_of(model), expect)
    load_into(model, {name: array.astype(np.float64) for name, array in state.items()})
    assert_same(state_of(model), state)
    bits = {name: (array.view(np.uint32) >> 16).astype(np.uint16) for name, array in state.items()}
    load_into(model, bits)
    assert_same(
        state_of(model), {name: (array.astype(np.uint32) << 16).view(np.float32) for name, array in bits.items()}
    )


def refused_by_model(model: nn.Layer, state: dict, **options) -> str:
    """Return the message of a load that must fail and leave the model as it was."""
    before = state_of(model)
    with pytest.raises(CheckpointError) as caught:
        load_into(model, state, **options)
    assert_same(state_of(model), before)
    return str(caught.value)


def test_every_fault_is_listed_and_the_model_unchanged(tmp_path, trained):
    state = state_of(trained)
    del state["0.bias"]
    state["more"] = np.ones(3)
    state["1.weight"] = np.ones(5, np.float32)
    state["1.bias"] = np.ones(2, np.int64)
    save(state, tmp_path / "model.pdparams")
    model = small_model()
    message = refused_by_model(model, tmp_path / "model.pdparams")
    assert message.splitlines() == [
        f"{tmp_path / 'model.pdparams'}: it does not fit the model, which is unchanged: "
        "5 of the model's 8 entries fit (62.5 %)",
        "  1 missing: 0.bias",
        "  1 extra: more",
        "  1 of another shape: 1.weight (file [5], model [2])",
        "  1 of another type: 1.bias (file int64, model float32)",
    ]


def test_long_lists_are_cut_and_counted():
    state = {f"layer{i}.weight": np.ones(1) for i in range(25)}
    message = refused_by_model(small_model(), state)
    assert "layer9.weight and 15 more" in message
    assert "  25 extra: layer0.weight, " in message
    assert "  8 missing: " in message
    assert "(0.0 %)" in message


def test_long_names_of_a_file_are_cut():
    state = {**state_of(small_model()), "x" * 10_000: np.zeros(1)}
    assert len(refused_by_model(small_model(), state)) < 1000


def test_numbers_that_the_models_type_cannot_hold_are_refused():
    model = nn.Linear(1, 1)
    model.to(dtype="float16")
    state = {"weight": np.array([[1e6]], np.float32), "bias": np.array([np.inf], np.float32)}
    assert "1 too large for the model's type: weight (model float16)" in refused_by_model(model, state)
    load_into(model, {**state, "weight": np.ones((1, 1), np.float32)})
    assert np.isinf(model.bias.numpy()).all()


def test_patterns_that_may_be_missing(trained):
    state = state_of(trained)
    del state["2.weight"], state["2.bias"]
    model = small_model()
    before = state_of(model)
    assert "1 missing: 2.bias" in refused_by_model(model, state, may_miss=("*.weight",))
    report = load_into(model, state, may_miss=("2.*",))
    assert_same(state_of(model), {**state, "2.weight": before["2.weight"], "2.bias": before["2.bias"]})
    assert report.missing == ("2.weight", "2.bias")
    assert report.coverage == 75.0
    assert "2.weight, 2.bias" in str(report)
    assert "name of no entry of the model" in refused_by_model(model, state, may_miss=("2.*", "*.convmap.weight"))
    assert "write ['2.*']" in refused_by_model(model, state, may_miss="2.*")
    assert "0 of the model's 8 entries fit" in refused_by_model(model, {"x": np.ones(1)}, may_miss=("*",))


# --- train form and fused form --------------------------------------------------------------------------------------


class Refocused(ReparamLayer):
    train_form_keys = ("convmap.weight",)

    def __init__(self):
        super().__init__()
        self.weight = self.create_parameter([1])
        self.convmap = nn.Linear(1, 1, bias_attr=False)


class TwoBranches(ReparamLayer):
    train_form_keys = ("gwc.weight", "bn1._mean")


@pytest.fixture
def two_layers(monkeypatch):
    monkeypatch.setattr(registry, "_layers", registry.Registry("layer"))
    registry.register_layer(Refocused)
    registry.register_layer(TwoBranches)


@pytest.mark.usefixtures("two_layers")
@pytest.mark.parametrize(
    ("names", "form"),
    [
        (["conv.weight", "conv.convmap.weight"], "train"),
        (["convmap.weight"], "train"),
        (["conv.weight", "conv.bias"], "fused"),
        (["myconvmap.weight"], "fused"),
        (["a.gwc.weight", "a.bn1._mean"], "train"),
        (["gwc.weight", "bn1._mean"], "train"),
        (["a.gwc.weight", "b.bn1._mean"], "fused"),
        (["a.bn1._mean"], "fused"),
        ([], "fused"),
    ],
)
def test_form_of(names, form):
    assert form_of(names) == form


@pytest.mark.usefixtures("two_layers")
def test_the_other_form_is_said_first():
    train, plain = nn.Sequential(Refocused()), nn.Sequential(nn.Linear(1, 1))
    said = refused_by_model(train, {"0.weight": np.ones(1, np.float32)})
    assert said.startswith("the state: this is a weight file of a fused or plain model and the model is in train form")
    said = refused_by_model(plain, state_of(train))
    assert said.startswith("the state: this is a weight file in train form and the model is fused or plain")
    assert load_into(train, {"0.weight": np.ones(1)}, may_miss=("*.convmap.weight",)).missing == ("0.convmap.weight",)


@pytest.mark.parametrize("name", ["RefConv2D", "SPConv2D"])
def test_the_layers_show_their_form(name):
    conv = nn.Conv2D(8, 8, 3, padding=1, bias_attr=False)
    layer = registry.get_layer(name).layer.from_conv(conv)
    layer.eval()
    assert form_of(nn.Sequential(layer).state_dict()) == "train"
    assert form_of(layer.reparameterize().state_dict()) == "fused"


def test_a_plain_baseline_goes_into_a_refconv_model():
    conv = nn.Conv2D(4, 4, 3, padding=1, bias_attr=False)
    other = nn.Conv2D(4, 4, 3, padding=1, bias_attr=False)
    model = nn.Sequential(registry.get_layer("RefConv2D").layer.from_conv(other))
    baseline = {f"0.{name}": tensor for name, tensor in conv.state_dict().items()}
    assert "name in may_miss" in refused_by_model(model, baseline)
    report = load_into(model, baseline, may_miss=("*.convmap.weight",))
    assert (report.loaded, report.missing) == (("0.weight",), ("0.convmap.weight",))
    np.testing.assert_array_equal(model[0].weight.numpy(), conv.weight.numpy())


# --- another number of classes --------------------------------------------------------------------------------------


class TwoHeads(nn.Layer):
    """A body, and two classifiers: a fully connected layer and a 1x1 convolution."""

    def __init__(self, classes: int, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1D(width))
        self.head = nn.Linear(width, classes)
        self.aux = nn.Conv2D(width, classes, 1)


def test_the_classifier_of_another_number_of_classes_stays_fresh(tmp_path):
    save(TwoHeads(7).state_dict(), tmp_path / "seven.pdparams")
    model = TwoHeads(2)
    drawn, published = state_of(model), load(tmp_path / "seven.pdparams")
    heads = ["aux.bias", "aux.weight", "head.bias", "head.weight"]
    with pytest.raises(CheckpointError, match="it is of 7 classes and the model of 2: fresh=True leaves head.weight"):
        load_into(model, tmp_path / "seven")
    assert_same(state_of(model), drawn)
    report = load_into(model, tmp_path / "seven", fresh=True)
    assert sorted(report.fresh) == heads
    assert "fresh, as they were drawn 4 head.weight, head.bias" in re.sub(" +", " ", str(report))
    assert sorted(report.loaded) == [name for name in sorted(drawn) if name not in heads]
    assert_same(state_of(model), {name: (drawn if name in heads else published)[name] for name in drawn})


def test_named_entries_stay_fresh_whatever_their_shape():
    state, model = state_of(TwoHeads(2)), TwoHeads(2)
    drawn = state_of(model)
    report = load_into(model, {**state, "of.another.task": np.ones(3)}, fresh=["head.*", "of.another.*"])
    assert report.fresh == ("head.weight", "head.bias")
    now = state_of(model)
    assert all(np.array_equal(now[name], (drawn if name.startswith("head") else state)[name]) for name in now)
    assert report.coverage == pytest.approx(100 * (len(now) - 2) / len(now))


@pytest.mark.parametrize(
    ("saved", "fresh", "message"),
    [
        (TwoHeads(2), True, "there is no classifier to leave fresh; leave fresh out"),
        (TwoHeads(2), ["heads.*"], "fresh 'heads.*' is the name of no entry of the model"),
        (TwoHeads(2), "head.*", r"fresh is a list of patterns: write \['head.\*'\]"),
        (TwoHeads(2), ["*"], "nothing of it would be loaded"),
        (TwoHeads(7), ["head.*"], r"2 of another shape: aux.weight"),
        # A layer within the network is wider: that is another network.
        (TwoHeads(7, width=5), True, r"of another shape: body.0.weight"),
        (nn.Linear(3, 2), True, "0 of the model's 10 entries fit"),
    ],
)
def test_fresh_that_cannot_be_meant(saved, fresh, message):
    model = TwoHeads(2)
    drawn = state_of(model)
    with pytest.raises(CheckpointError, match=message):
        load_into(model, saved.state_dict(), fresh=fresh)
    assert_same(state_of(model), drawn)


def test_masks_of_what_stays_fresh_are_drawn_anew():
    saved, model = TwoHeads(40, width=10), TwoHeads(8, width=10)
    sparsity.add_masks(saved, 0.5, "uniform", where=["body.0.weight", "head.weight"])
    drawn = state_of(model)
    report = load_into(model, saved.state_dict(), fresh=True)
    assert "head.weight" in report.fresh
    masks = {place.path: place.read_mask() for place in masked_places(model)}
    assert np.array_equal(masks.pop("body.0.weight"), saved.body[0].weight_mask.numpy())
    [(name, mask)] = masks.items()
    # As dense as the file's: exactly half of 10 x 8.
    assert (name, mask.shape, mask.sum()) == ("head.weight", (10, 8), 40)
    assert np.array_equal(model.head.weight.numpy(), np.where(mask, drawn["head.weight"], 0))
    again = TwoHeads(8, width=10)
    load_into(again, saved.state_dict(), fresh=["head.weight", "head.bias", "aux.*"])
    assert np.array_equal(again.head.weight_mask.numpy(), mask)


def test_weights_are_found_without_their_suffix(tmp_path):
    save(small_model().state_dict(), tmp_path / "latest.pdparams")
    load_into(small_model(), tmp_path / "latest")
    with pytest.raises(MissingFile, match=f"{tmp_path} is a folder and no weight file; name a file, such as .*latest"):
        load_into(small_model(), tmp_path)
    with pytest.raises(MissingFile, match="there is no weight file .*newest or .*newest.pdparams"):
        load_into(small_model(), tmp_path / "newest")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.pdparams")
    assert refusal(tmp_path / "model.pdparams") == "it is no file but a device or a pipe"
