"""Going on from checkpoints without a record: right, or one sentence before the first step; one training a folder."""

import contextlib
import errno
import os
import shutil
import signal
import time

import numpy as np
import paddle
import pytest
from paddle import nn
from test_train_tools import PLAIN, Place, fails, train_as_a_process_of_its_own

from paddle_reparam.errors import CheckpointError, OutputExists
from paddle_reparam.ppcls import setup
from paddle_reparam.weights import pickles

setup()

from paddle_reparam.ppcls import resuming, saving  # noqa: E402
from paddle_reparam.ppcls.command import main  # noqa: E402
from paddle_reparam.ppcls.errors import ConfigError  # noqa: E402


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("resuming"))


@pytest.fixture(scope="module")
def config(place):
    return place.config(PLAIN)


@pytest.fixture(scope="module")
def saved(place, config):
    """Return the path, without suffix, of what one epoch of two left, without its record."""
    assert train_as_a_process_of_its_own(place.arguments(config, "whole", "Global.epochs=1")) == 0
    return without_record(place.saved("whole"), place.root / "copied")


def without_record(prefix: str, folder) -> str:
    folder.mkdir(exist_ok=True)
    for suffix in saving.SUFFIXES:
        shutil.copy(prefix + suffix, folder / f"latest{suffix}")
    return str(folder / "latest")


def velocity(state, part="fc"):
    return next(key for key in state if "velocity" in key)


def renamed(state):
    key = velocity(state)
    return {"another_velocity_0" if k == key else k: v for k, v in state.items()}


def with_entry(**entries):
    return lambda state: {**state, **entries}


def with_velocity(change):
    return lambda state: {**state, velocity(state): change(state[velocity(state)])}


def without(*keys):
    return lambda state: {k: v for k, v in state.items() if k not in keys}


def with_schedule(change):
    return lambda state: {**state, "LR_Scheduler": change(dict(state["LR_Scheduler"]))}


ODD_OPTIMIZERS = [
    lambda state: [],
    lambda state: [state, state],
    lambda state: 3,
    lambda state: "text",
    lambda state: None,
    lambda state: [[state]],
    lambda state: {},
    lambda state: {"LR_Scheduler": state["LR_Scheduler"]},
    lambda state: {k: v for k, v in state.items() if k != velocity(state)},
    renamed,
    with_entry(another_velocity_0=np.zeros([2], "float32")),
    with_velocity(lambda v: v[..., :1]),
    with_velocity(lambda v: v.reshape([-1, 1])),
    with_velocity(lambda v: v.T[None]),
    with_velocity(lambda v: v.astype("float64")),
    with_velocity(lambda v: v.astype("int32")),
    with_velocity(lambda v: v * np.float32("nan")),
    with_velocity(lambda v: v + np.float32("inf")),
    with_velocity(lambda v: v.tolist()),
    with_velocity(lambda v: None),
    with_velocity(lambda v: 0.0),
    with_velocity(lambda v: {"value": v}),
    without("LR_Scheduler"),
    with_schedule(lambda s: None),
    with_schedule(lambda s: []),
    with_schedule(lambda s: {}),
    with_schedule(lambda s: {**s, "last_epoch": "three"}),
    with_schedule(lambda s: {**s, "last_epoch": None}),
    with_schedule(lambda s: {**s, "last_epoch": float("nan")}),
    with_schedule(lambda s: {**s, "last_epoch": -3}),
    with_schedule(lambda s: {**s, "last_epoch": 10**30}),
    with_schedule(lambda s: {**s, "last_lr": [0.1]}),
    with_entry(master_weights=[]),
    with_entry(master_weights={"another": np.zeros([2], "float32")}),
]

ODD_STATES = [
    lambda states: [],
    lambda states: None,
    lambda states: 5,
    without("epoch"),
    with_entry(epoch=None),
    with_entry(epoch="one"),
    with_entry(epoch=-1),
    with_entry(epoch=1.5),
    with_entry(epoch=True),
    with_entry(epoch=float("nan")),
    with_entry(epoch=float("inf")),
    with_entry(epoch=10**30),
    with_entry(epoch=1 << 20000),
    with_entry(metric=-(1 << 20000)),
    with_entry(epoch=7),
    with_entry(epoch=[1]),
    with_entry(metric="good"),
    with_entry(metric=float("nan")),
    with_entry(metric=[0.5]),
    with_entry(global_step="many"),
    with_entry(global_step=-4),
    with_entry(best=3),
    with_entry(best={}),
    with_entry(best={"metric": None, "epoch": 1}),
]


@pytest.mark.parametrize("number", range(len(ODD_OPTIMIZERS) + len(ODD_STATES)))
def test_odd_states_are_one_sentence_before_the_first_step(place, config, saved, tmp_path, capsys, number):
    prefix = without_record(saved, tmp_path)
    suffix, change = (
        (".pdopt", ODD_OPTIMIZERS[number])
        if number < len(ODD_OPTIMIZERS)
        else (".pdstates", ODD_STATES[number - len(ODD_OPTIMIZERS)])
    )
    states = saving.read_states(prefix + suffix)
    changed = [change(states[0])] if suffix == ".pdopt" and number > 5 else change(states[0] if number < 6 else states)
    paddle.save(as_saved(changed), prefix + suffix)
    arguments = place.arguments(config, f"odd_{number}", f"Global.checkpoints={prefix}", "Global.epochs=2")
    assert train_as_a_process_of_its_own(arguments) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert f"latest{suffix}: it" in lines[0]
    assert saving.newest(place.root / f"odd_{number}") is None


def as_saved(states):
    """Return states as `paddle.save` takes them: without read-only arrays."""
    if isinstance(states, np.ndarray):
        return np.array(states)
    if isinstance(states, dict):
        return {key: as_saved(value) for key, value in states.items()}
    return [as_saved(value) for value in states] if isinstance(states, list) else states


def test_a_copied_checkpoint_goes_on_as_the_uninterrupted_run(place, config, saved):
    assert train_as_a_process_of_its_own(place.arguments(config, "two", "Global.epochs=2")) == 0
    resume = (f"Global.checkpoints={saved}", "Global.epochs=2")
    assert train_as_a_process_of_its_own(place.arguments(config, "resumed", *resume)) == 0
    # In the same process Paddle gives the second network's parameters other names.
    assert main("train", place.arguments(config, "renamed", *resume)) == 0
    # What PaddleClas writes of a run, and older versions of it as a Tensor.
    theirs = without_record(saved, place.root / "theirs")
    paddle.save({"metric": paddle.to_tensor([0.5]), "epoch": 1}, f"{theirs}.pdstates")
    resume = (f"Global.checkpoints={theirs}", "Global.epochs=2")
    assert main("train", place.arguments(config, "of_paddleclas", *resume)) == 0
    expected = weights(place.saved("two"))
    for run in ("resumed", "renamed", "of_paddleclas"):
        assert weights(place.saved(run)) == expected


def test_another_number_of_steps_in_an_epoch_is_told(place, config, saved):
    resume = (f"Global.checkpoints={saved}", "Global.epochs=2")
    for run, size in (("as_before", 4), ("smaller", 2)):
        overrides = (*resume, f"DataLoader.Train.sampler.batch_size={size}")
        assert train_as_a_process_of_its_own(place.arguments(config, run, *overrides)) == 0
    [line] = [line for line in place.log("smaller").splitlines() if "before the checkpoint had" in line]
    assert "the 1 epochs before the checkpoint had 2 steps, and would have 4 now" in line
    with_as_many = place.log("as_before").split("training goes on from")[1].split("[Train][Epoch 2/2][Avg]")[0]
    assert "before the checkpoint had" not in with_as_many


def weights(prefix: str) -> dict[str, bytes]:
    with open(f"{prefix}.pdparams", "rb") as file:
        return {name: array.tobytes() for name, array in pickles.read(file.read()).items()}


def test_all_epochs_done(place, config, capsys):
    assert train_as_a_process_of_its_own(place.arguments(config, "done", "Global.epochs=1")) == 0
    prefix = place.saved("done")
    before = weights(prefix)
    again = place.arguments(config, "done", f"Global.checkpoints={prefix}", "Global.epochs=1")
    fails(capsys, 2, "all 1 epochs were done when it was saved; raise Global.epochs", main, "train", again)
    assert main("train", place.arguments(config, "done", "Global.checkpoints=auto", "Global.epochs=1")) == 0
    assert "there is nothing left to train" in place.log("done")
    assert weights(prefix) == before


@pytest.mark.parametrize("kind", ["Momentum", "Adam", "AdamW", "RMSProp"])
def test_states_find_their_parameters_by_the_names_of_the_state_dict(kind):
    """Layers that were made in another order have each other's names."""

    def build(order):
        layers = {}
        with paddle.utils.unique_name.guard():
            for name in order:
                layers[name] = nn.Linear(3, 3)
        model = nn.LayerDict({name: layers[name] for name in "ab"})
        optimizer = getattr(paddle.optimizer, kind)(learning_rate=0.1, parameters=model.parameters())
        return model, optimizer

    first, optimizer = build("ab")
    for _ in range(2):
        (first["a"](paddle.ones([1, 3])) - 2 * first["b"](paddle.ones([1, 3]))).sum().backward()
        optimizer.step()
    second, other = build("ba")
    keys = first.state_dict()
    state = {k: v.numpy() for k, v in optimizer.state_dict().items()}
    names = {keys[key].name: tensor.name for key, tensor in second.state_dict().items()}
    resuming.load_optimizer("x.pdopt", other, state, names)
    for entries in zip(optimizer._accumulators.values(), other._accumulators.values()):
        for key, parameter in keys.items():
            mine, theirs = entries[0][parameter.name], entries[1][second.state_dict()[key].name]
            assert mine.numpy().tobytes() == theirs.numpy().tobytes()


def arrays(state):
    if isinstance(state, dict):
        return {key: arrays(value) for key, value in state.items()}
    return state.numpy() if isinstance(state, paddle.Tensor) else state


def test_an_optimizer_of_another_network():
    layer, other, wider = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 3)
    build = paddle.optimizer.Momentum
    optimizer = build(parameters=layer.parameters())
    layer(paddle.ones([1, 2])).sum().backward()
    optimizer.step()
    state = arrays(optimizer.state_dict())
    with pytest.raises(CheckpointError, match="which this optimizer does not train"):
        resuming.load_optimizer("x.pdopt", build(parameters=other.parameters()), state)
    names = {old.name: new.name for old, new in zip(layer.parameters(), wider.parameters())}
    with pytest.raises(CheckpointError, match=r"has the shape \[2, 2\], and must have \[2, 3\]"):
        resuming.load_optimizer("x.pdopt", build(parameters=wider.parameters()), state, names)


@pytest.mark.parametrize("kind", ["Momentum", "Adam"])
def test_parameters_that_never_had_a_gradient_are_known_at_the_first_step(kind):
    used, unused = nn.Linear(2, 2), nn.Linear(2, 2)
    parameters = [*used.parameters(), *unused.parameters()]

    def step(optimizer, *layers):
        sum(layer(paddle.ones([1, 2])).sum() for layer in layers).backward()
        optimizer.step()
        optimizer.clear_grad()

    build = getattr(paddle.optimizer, kind)
    first = build(parameters=parameters)
    step(first, used)
    state = arrays(first.state_dict())
    second, third = build(parameters=parameters), build(parameters=parameters)
    resuming.load_optimizer("x.pdopt", second, state)
    step(second, used)
    step(second, used, unused)
    resuming.load_optimizer("x.pdopt", third, state)
    before = [parameter.numpy().tobytes() for parameter in parameters]
    with pytest.raises(CheckpointError, match=f"it has nothing of {unused.weight.name}, which is trained"):
        step(third, used, unused)
    assert [parameter.numpy().tobytes() for parameter in parameters] == before


@pytest.mark.parametrize("kind", ["SGD", "Momentum", "AdamW"])
def test_float32_copies_of_what_is_trained_in_another_type(kind):
    """Paddle has no step for them on a CPU; the copies and what is kept of them are there before it."""

    def build(layer):
        layer.to(dtype="bfloat16")
        rate = {"learning_rate": 0.1, "multi_precision": True}
        return getattr(paddle.optimizer, kind)(parameters=layer.parameters(), **rate)

    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    before, after = build(first), build(second)
    for number, tensor in enumerate(resuming._entries(before, first.parameters()).values()):
        tensor.set_value(np.full(tensor.shape, number, "float32"))
    state = arrays(before.state_dict())
    names = {old.name: new.name for old, new in zip(first.parameters(), second.parameters())}
    resuming.load_optimizer("x.pdopt", after, state, names)
    for old, new in zip(first.parameters(), second.parameters()):
        pairs = [(before._master_weights[old.name], after._master_weights[new.name])]
        for entry in before._accumulators:
            pairs.append((before._get_accumulator_master(entry, old), after._get_accumulator_master(entry, new)))
        for kept, loaded in pairs:
            assert kept.numpy().tobytes() == loaded.numpy().tobytes()
    if kind != "SGD":
        del state["master_weights"]
        with pytest.raises(CheckpointError, match="it has no master weight of"):
            resuming.load_optimizer("x.pdopt", build(second), state, names)


# ---------------------------------------------------------------------------------------------------------------------
# Two trainings in one folder


@contextlib.contextmanager
def held_by_another_process(folder):
    """Yield, with a function that kills it, while another process holds a folder, and its child lives longer.

    The workers of a loader do so.
    """
    ready, write = os.pipe()
    process = os.fork()
    if process == 0:
        with saving.only_training_in(folder):
            child = os.fork()
            if child:
                os.write(write, b"%d" % child)
            time.sleep(60)
            os._exit(0)
    child = int(os.read(ready, 20))
    try:
        yield lambda: (os.kill(process, signal.SIGKILL), os.waitpid(process, 0))
    finally:
        for each in (process, child):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)


def test_a_second_training_in_a_folder_says_so(place, config, capsys):
    with held_by_another_process(place.root / "shared") as kill:
        arguments = place.arguments(config, "shared")
        fails(capsys, 2, "another training is running in", main, "train", arguments)
        assert [path.name for path in (place.root / "shared").iterdir()] == [saving.LOCK]
        kill()
        assert main("train", arguments) == 0


def test_a_folder_is_free_again(tmp_path):
    for _ in range(2):
        with saving.only_training_in(tmp_path):
            pass
    with held_by_another_process(tmp_path), pytest.raises(OutputExists), saving.only_training_in(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file cannot be written to"), saving.only_training_in(tmp_path / "file"):
        pass

    def without_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(saving.fcntl, "lockf", without_locks)
    with saving.only_training_in(tmp_path):
        pass
