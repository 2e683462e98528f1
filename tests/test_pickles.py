"""Pickles: what Paddle's own hold is read, what anybody else's ask for is not done."""

import collections
import os
import pickle
import random
import subprocess

import numpy as np
import paddle
import pytest
from weight_files import DATA, assert_same, expected, read_or_refuse, refusal

from paddle_reparam.errors import CheckpointError
from paddle_reparam.weights import pickles
from paddle_reparam.weights.checkpoints import load


@pytest.mark.parametrize("state", [{"a": 1}, {"a": {"b": 2}}], ids=["number", "container"])
def test_entries_that_are_no_arrays_are_named(tmp_path, state):
    paddle.save({**expected(), **state}, str(tmp_path / "model.pdparams"))
    assert "its entry 'a' is a" in refusal(tmp_path / "model.pdparams")


def test_ordered_dicts_tied_arrays_and_the_other_byte_order(tmp_path):
    array = np.arange(3000, dtype=">f4").reshape(30, 100)
    state = collections.OrderedDict(a=array, b=array, c=np.asfortranarray(array[:2]))
    (tmp_path / "model.pdparams").write_bytes(pickle.dumps(state, 4))
    native = array.astype(np.float32)
    assert_same(load(tmp_path / "model.pdparams"), {"a": native, "b": native, "c": native[:2].copy()})


def test_the_names_of_numpy_2(tmp_path):
    data = (DATA / "arrays-protocol2-3.3.1.pdparams").read_bytes()
    renamed = data.replace(b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n")
    assert renamed != data
    (tmp_path / "model.pdparams").write_bytes(renamed)
    assert_same(load(tmp_path / "model.pdparams"), expected())


def test_arrays_that_paddle_split(tmp_path):
    whole = np.arange(10, dtype=np.float32)
    state = {
        "w@@.0": whole[:6],
        "w@@.1": whole[6:],
        "UnpackBigParamInfor@@": {"w": {"OriginShape": (2, 5), "slices": ["w@@.0", "w@@.1"]}},
        "StructuredToParameterName@@": {"w": "linear_0.w_0"},
    }
    (tmp_path / "model.pdparams").write_bytes(pickle.dumps(state, 2))
    assert_same(load(tmp_path / "model.pdparams"), {"w": whole.reshape(2, 5)})
    state["v@@.0"] = state["w@@.0"]
    state["UnpackBigParamInfor@@"]["v"] = {"OriginShape": (6,), "slices": ["v@@.0"]}
    (tmp_path / "model.pdparams").write_bytes(pickle.dumps(state, 2))
    assert "uses one part of a large array twice" in refusal(tmp_path / "model.pdparams")


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def hostile_pickles(target: str) -> dict[str, tuple[bytes, str]]:
    """Return pickles that make the file `target` when they are unpickled, and the name that refusing them shows."""
    code = f"open({target!r}, 'w')"
    shell = f"touch {target}"
    text = "({0}\nS'{1}'\ntR."  # GLOBAL is put in front

    def dumped(value, protocol=4):
        return pickle.dumps(value, protocol)

    system = f"{os.system.__module__}.system"
    cases = {
        "os.system": (dumped({"w": Calls(os.system, shell)}), system),
        "protocol 2": (dumped({"w": Calls(os.system, shell)}, 2), system),
        "protocol 5": (dumped({"w": Calls(os.system, shell)}, 5), system),
        "nested": (dumped({"a": [({"b": Calls(os.system, shell)},)]}), system),
        "as a key": (dumped({Calls(os.system, shell): 1}), system),
        "other eval": (dumped({"w": Calls(eval, code)}), "builtins.eval"),
        "other eval with names": (dumped({"w": Calls(eval, code, {"data": 1})}), "builtins.eval"),
        "eval of data with builtins": (dumped(Calls(eval, "data", {"data": 1, "__builtins__": {}})), "builtins.eval"),
        "exec": (dumped({"w": Calls(exec, code)}), "builtins.exec"),
        "subprocess": (dumped({"w": Calls(subprocess.Popen, ["touch", target])}), "subprocess.Popen"),
        "numpy.save": (dumped({"w": Calls(np.save, target, 1)}), "numpy.save"),
        "numpy.fromfile": (dumped({"w": Calls(np.fromfile, "/dev/null")}), "fromfile"),
        "numpy.ndarray": (dumped({"w": Calls(np.ndarray, (1 << 40,))}), "numpy.ndarray"),
        "numpy.load": (dumped({"w": Calls(np.load, target)}), "numpy.load"),
        "getattr": (
            dumped(Calls(getattr, "", "join")),
            "builtins.getattr",
        ),
        "codecs": (dumped({"w": Calls(__import__("_codecs").encode, "abc", "rot13")}), "_codecs.encode"),
        "dotted": (b"\x80\x04\x8c\x05numpy\x8c\x07os.name\x93.", "numpy.os.name"),
        "dotted past an admitted name": (
            b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93.",
            "numpy.ndarray.__class__",
        ),
        "INST": (b"\x80\x02(S'" + shell.encode() + b"'\nios\nsystem\n.", "INST|STRING|os.system"),
        "INST alone": (b"\x80\x02(ios\nsystem\n.", "os.system"),
        "INST of an admitted name": (b"\x80\x02(inumpy\nndarray\n.", "numpy.ndarray"),
        "NEWOBJ": (b"\x80\x02cnumpy\nndarray\nK\x01\x85\x81.", "NEWOBJ"),
        "persistent id": (b"\x80\x02X\x01\x00\x00\x00aQ.", "BINPERSID"),
        "extension": (b"\x80\x02\x82\x01.", "EXT1"),
        "state": (b"\x80\x02ccollections\nOrderedDict\n}b.", "the state of an object"),
        "protocol 0 global": (b"\x80\x02cos\nsystem\n" + text.format("", shell).encode(), system.split(".")[1]),
    }
    return cases


@pytest.mark.parametrize("case", hostile_pickles("x"))
def test_hostile_pickles_run_nothing_and_are_named(tmp_path, case):
    target = tmp_path / "made"
    data, named = hostile_pickles(str(target))[case]
    (tmp_path / "model.pdparams").write_bytes(data)
    message = refusal(tmp_path / "model.pdparams")
    assert not target.exists()
    assert any(name in message for name in named.split("|"))
    assert "nothing was run" in message


def test_the_hostile_pickle_would_have_run(tmp_path):
    data, _ = hostile_pickles(str(tmp_path / "made"))["os.system"]
    pickle.loads(data)
    assert (tmp_path / "made").exists()


def array_pickle(shape: tuple, dtype: str, data: bytes) -> bytes:
    """Return a pickle of {"w": array} with any shape, dtype and bytes, whether they fit or not."""
    stub = b"\x80\x02}X\x01\x00\x00\x00wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    state = pickle.dumps(shape, 2)[2:-1]
    kind = f"cnumpy\ndtype\nX{chr(len(dtype))}\0\0\0{dtype}\x89\x88\x87R".encode("latin1")
    return stub + b"(K\x01" + state + kind + b"\x89B" + len(data).to_bytes(4, "little") + data + b"tbs."


def test_array_pickle_is_a_pickle_of_an_array(tmp_path):
    wanted = np.array([[1.0, 2.0]], dtype=np.float32)
    (tmp_path / "model.pdparams").write_bytes(array_pickle((1, 2), "f4", wanted.tobytes()))
    assert_same(load(tmp_path / "model.pdparams"), {"w": wanted})


@pytest.mark.parametrize(
    ("shape", "dtype", "data", "words"),
    [
        ((1 << 40,), "f4", b"1234", "with other than"),
        ((1 << 62, 1 << 62), "f8", b"", "with other than"),
        ((0, 1 << 62), "f4", b"1234", "with other than 0 bytes"),
        ((0, 1 << 63), "f4", b"", "shape [0, "),
        ((0, 1 << 70), "f4", b"", "a number of more than 64 bits"),
        ((-1, -1), "f4", b"1234", "shape [-1, -1]"),
        ((2,), "f4", b"1234", "with other than 8 bytes"),
        ((1,), "O8", b"12345678", "numpy.dtype than Paddle's own of 'O8'"),
        ((1,), "c8", b"12345678", "numpy.dtype than Paddle's own of 'c8'"),
        ((1,), "V8", b"12345678", "numpy.dtype than Paddle's own of 'V8'"),
        ((1,), "b1", b"\2", "bool array"),
        ((1,) * 33, "f4", b"1234", "shape [1, 1, 1"),
    ],
)
def test_arrays_must_be_what_their_bytes_are(tmp_path, shape, dtype, data, words):
    (tmp_path / "model.pdparams").write_bytes(array_pickle(shape, dtype, data))
    assert words in refusal(tmp_path / "model.pdparams")


def test_object_arrays_are_refused(tmp_path):
    array = np.array([print, None], dtype=object)
    (tmp_path / "model.pdparams").write_bytes(pickle.dumps({"w": array}))
    assert "numpy.dtype than Paddle's own of 'O8'" in refusal(tmp_path / "model.pdparams")
    np.savez(tmp_path / "model.npz", w=np.array([None, "x"], dtype=object))
    assert "dtype '|O'" in refusal(tmp_path / "model.npz")


def test_bytes_named_many_times_do_not_grow(tmp_path):
    count, size = 1000, 4000
    data = array_pickle((size,), "i1", b"\1" * size)
    body = data[3:-2]  # without PROTO, EMPTY_DICT, SETITEM and STOP
    start = body.index(b"B" + size.to_bytes(4, "little"))
    first = body[:start] + body[start : start + 5 + size] + b"q\x01" + body[start + 5 + size :] + b"s"
    again = body[:start] + b"h\x01" + body[start + 5 + size :] + b"s"
    others = b"".join(again.replace(b"X\x01\0\0\0w", b"X\x04\0\0\0%04d" % i) for i in range(count))
    (tmp_path / "model.pdparams").write_bytes(b"\x80\x02}" + first + others + b".")
    assert "more bytes than the file has" in refusal(tmp_path / "model.pdparams")


@pytest.mark.parametrize("read", [pickles.read, pickles.read_state], ids=["weights", "state"])
@pytest.mark.parametrize("key", [7, (1, 2), None, b"w"], ids=lambda key: type(key).__name__)
def test_keys_are_text(read, key):
    """Numbers can be chosen so that a dict of them takes a time that grows with their square."""
    with pytest.raises(CheckpointError, match=f"a key that is no text but a {type(key).__name__}"):
        read(pickle.dumps({"w": np.zeros(1), "inside": [{key: 1}]}))


def test_numbers_of_more_than_64_bits_are_refused():
    assert pickles.read_state(pickle.dumps({"epoch": -(1 << 63)})) == {"epoch": -(1 << 63)}
    with pytest.raises(CheckpointError, match="a number of more than 64 bits"):
        pickles.read_state(pickle.dumps({"epoch": 1 << 64}))


def test_what_is_remembered_is_numbered_in_order():
    with pytest.raises(ValueError, match="out of order"):
        pickles.read_state(b"\x80\x02]r\0\0\1\0.")
    for start in (0, 1):
        assert pickles.read_state(b"\x80\x02]q%c]q%ch%ca." % (start, start + 1, start)) == [[]]


def test_bytes_made_many_times_do_not_grow():
    """Pickles of protocol 2 make bytes of text, by a call that could be repeated."""
    size, count = 4000, 1000
    text = b"X" + size.to_bytes(4, "little") + b"a" * size + b"q\1"
    made = b"c_codecs\nencode\nq\2h\1X\6\0\0\0latin1q\3\x86R"
    again = b"h\2h\1h\3\x86R"
    data = b"\x80\x02(" + text + made + again * count + b"l."
    with pytest.raises(CheckpointError, match="more bytes than the file has"):
        pickles.read_state(data)


def test_a_list_of_parts_named_by_many_arrays_is_gone_through_once():
    class Counted(list):
        steps = 0

        def __iter__(self):
            for part in super().__iter__():
                Counted.steps += 1
                yield part

    def array():
        made = pickles._Array()
        made.value = np.zeros(1, np.float32)
        return made

    parts = Counted(f"w@@.{i}" for i in range(50))
    splits = {f"w{i}": {"OriginShape": (50,), "slices": parts} for i in range(50)}
    with pytest.raises(CheckpointError, match="uses one part of a large array twice"):
        pickles._name_arrays({**{part: array() for part in list(parts)}, "UnpackBigParamInfor@@": splits})
    assert Counted.steps <= 2 * len(parts) + 1


@pytest.mark.parametrize("read", [pickles.read, pickles.read_state], ids=["weights", "state"])
def test_deep_nesting_is_a_sentence(tmp_path, read):
    data = b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b"."
    (tmp_path / "model.pdparams").write_bytes(data)
    assert "it " in refusal(tmp_path / "model.pdparams")
    with pytest.raises((CheckpointError, RecursionError)):
        read(data)


def test_names_from_a_file_cannot_write_to_the_terminal(tmp_path):
    (tmp_path / "model.pdparams").write_bytes(pickle.dumps({"\x1b[2J\n" * 1000: 1}, 4))
    assert "\x1b" not in refusal(tmp_path / "model.pdparams")
    (tmp_path / "model.pdparams").write_bytes(b"\x80\x02c\x1b[2J" + b"x" * 10_000 + b"\nsystem\n.")
    assert "\x1b" not in refusal(tmp_path / "model.pdparams")


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@pytest.mark.parametrize("name", ["tensors-3.3.1", "mixed-protocol2-2.6.2"])
def test_random_bytes_in_files_without_a_checksum_raise_nothing_else(tmp_path, name):
    data = (DATA / f"{name}.pdparams").read_bytes()
    path = tmp_path / "model.pdparams"
    noticed = 0
    for _ in range(600):
        changed = bytearray(data)
        for _ in range(random.choice([1, 1, 2, 5])):
            changed[random.randrange(len(data))] = random.randrange(256)
        path.write_bytes(changed)
        noticed += read_or_refuse(path) is None
    assert noticed > 120
