"""Outputs, gradients and running statistics of the papers' published modules: `GOLDEN_DIR=<folder> pytest <this>`.

One `.npz` per case: `config` (the layer and the arguments of the published module, by name), `state/<key>`, an input
`x` and a co-vector `r` (the loss is sum(y * r)); `y_eval`, `y_train`, `grad_x`, `grad/<key>`, and `after/<key>`, the
running statistics after the one training step. The vectors were computed in float64 and are stored in float32.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import paddle
import published_cheap
import published_dbb
import published_dcd
import published_dynamic
import published_mobileone
import published_plugins
import published_refconv
import published_replknet
import published_repmlp
import published_repmlpnet
import published_repvgg
import published_slak
import published_spconv
import published_weight_norm
import pytest
from helpers import BATCH_NORMS, as_array, relative_error
from paddle import nn

from paddle_reparam.layers.base import ReparamLayer
from paddle_reparam.surgery.rewrite import reparameterize

TOLERANCE = 1e-6
FOLDER = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent / "golden")


# --- From the published arguments and names to ours --------------------------------------------------------------

FAMILIES = [
    published_refconv, published_spconv, published_slak, published_replknet, published_dcd, published_repmlp,
    published_repmlpnet, published_weight_norm, published_plugins, published_repvgg, published_mobileone,
    published_dynamic, published_cheap, published_dbb,
]  # fmt: skip
#: Published layer -> function(published arguments) -> our layer or network in float64.
LAYERS = {name: make for family in FAMILIES for name, make in family.LAYERS.items()}
#: Published layer -> function(published key) -> our key, where more differs than the names of a BN's statistics.
RENAME = {name: rename for family in FAMILIES for name, rename in family.RENAME.items()}
OF_A_BATCH_NORM = {"running_mean": "_mean", "running_var": "_variance"}


def our_key(name: str, key: str) -> str | None:
    """Return our name of a published key, None for a batch norm's counter, which Paddle does not keep."""
    path, _, last = RENAME.get(name, lambda k: k)(key).rpartition(".")
    if last == "num_batches_tracked":
        return None
    last = OF_A_BATCH_NORM.get(last, last)
    return f"{path}.{last}" if path else last


def in_our_layout(layer: nn.Layer, key: str, array: np.ndarray) -> np.ndarray:
    """Return a published array as Paddle keeps it: the weight of a `Linear` is [in, out] there, [out, in] in torch."""
    owners = dict(layer.named_sublayers(include_self=True))
    path, _, last = key.rpartition(".")
    return array.T if last == "weight" and isinstance(owners.get(path), nn.Linear) else array


class Vector:
    """One case, with our names and layouts."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        config = json.loads(str(arrays["config"]))
        self.name = config.pop("layer")
        config.pop("note", None)  # in words, for readers
        self.layer: nn.Layer = LAYERS[self.name](**config)
        self.arrays = arrays

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key].astype(np.float64)

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """Return what is stored under `<prefix>/`."""
        keys = {k: our_key(self.name, k[len(prefix) + 1 :]) for k in self.arrays if k.startswith(f"{prefix}/")}
        return {ours: in_our_layout(self.layer, ours, self[k]) for k, ours in keys.items() if ours is not None}


# --- The check ---------------------------------------------------------------------------------------------------


def check(arrays: dict[str, np.ndarray]) -> None:
    vector = Vector(arrays)
    layer = vector.layer
    state = vector.group("state")
    assert state.keys() == layer.state_dict().keys()
    missing, unexpected = layer.set_state_dict(state)
    assert not missing, missing
    assert not unexpected, unexpected

    layer.eval()
    x = paddle.to_tensor(vector["x"])
    assert relative_error(layer(x), vector["y_eval"]) <= TOLERANCE, "output in eval mode"
    assert relative_error(fused_form(layer, x)(x), vector["y_eval"]) <= TOLERANCE, "fused output"

    counts = count_elements_per_channel(layer)
    layer.train()
    x.stop_gradient = False
    y = layer(x)
    assert relative_error(y, vector["y_train"]) <= TOLERANCE, "output in training mode"
    (y * paddle.to_tensor(vector["r"])).sum().backward()
    check_gradients(layer, x, vector)
    check_running_statistics(layer, state, vector.group("after"), counts)


def fused_form(layer: nn.Layer, x: paddle.Tensor) -> nn.Layer:
    """Return a layer fused, or a network with every BN and LayerNorm folded that can be."""
    if isinstance(layer, ReparamLayer):
        return layer.reparameterize()
    if not any(isinstance(each, (ReparamLayer, *BATCH_NORMS)) for each in layer.sublayers()):
        return layer  # it ships as it is
    return reparameterize(layer, fold_bn=True, input_spec=[[None, *x.shape[1:]]])[0]


def count_elements_per_channel(layer: nn.Layer) -> dict[str, int]:
    """Return a dict that a forward pass fills: path of a batch norm -> values per channel in its input."""
    counts = {}

    def hook_for(path):
        def hook(norm, inputs, output):
            counts[path] = inputs[0].size // norm._mean.size

        return hook

    for path, norm in layer.named_sublayers():
        if isinstance(norm, BATCH_NORMS):
            norm.register_forward_post_hook(hook_for(path))
    return counts


def check_gradients(layer: nn.Layer, x: paddle.Tensor, vector: Vector) -> None:
    assert relative_error(x.grad, vector["grad_x"]) <= TOLERANCE, "gradient of the input"
    expected = vector.group("grad")
    trainable = {name: p for name, p in layer.named_parameters() if not p.stop_gradient}
    assert trainable.keys() == expected.keys(), "other trainable parameters than the published ones"
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    for name, gradient in expected.items():
        actual = as_array(trainable[name].grad)
        if np.abs(gradient).max() > 1e-12 * largest:
            assert relative_error(actual, gradient) <= TOLERANCE, f"gradient of {name}"
        else:
            # Zero by nature: the BN behind a bias takes it away again, for instance. What is stored is what rounding
            # left of terms that cancel, so there is nothing to be relative to but the other gradients.
            assert actual.shape == gradient.shape
            assert np.abs(actual).max() <= 1e-12 * largest, f"gradient of {name}, which is zero by nature"


def check_running_statistics(layer: nn.Layer, before: dict, after: dict, counts: dict[str, int]) -> None:
    statistics = {f"{path}.{last}" for path in counts for last in OF_A_BATCH_NORM.values()}
    assert after.keys() == statistics, "other running statistics than the published ones"
    ours = layer.state_dict()
    for key, expected in after.items():
        path, _, last = key.rpartition(".")
        if last == "_variance":
            # Published: 0.9 * old + 0.1 * unbiased; Paddle on the CPU takes the biased variance of the batch.
            kept = 0.9 * before[key]
            expected = kept + (expected - kept) * (counts[path] - 1) / counts[path]
        assert relative_error(ours[key], expected) <= TOLERANCE, f"{key} after one step"


# --- The vectors -------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def on_cpu():
    """The running variance is the biased one on the CPU only."""
    device = paddle.get_device()
    paddle.set_device("cpu")
    yield
    paddle.set_device(device)


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def layer_of(path: Path) -> str:
    return json.loads(str(load(path)["config"]))["layer"]


FILES = sorted(FOLDER.glob("*.npz"))
REGISTERED = [path for path in FILES if layer_of(path) in LAYERS]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_our_layer_computes_what_the_published_one_does(path):
    assert path in REGISTERED, f"this library has no {layer_of(path)}"
    check(load(path))


def test_there_is_something_to_check():
    assert REGISTERED, f"{FOLDER} holds {len(FILES)} vectors, none of them of a layer of this library"


def one_vector_of_each_layer() -> list[Path]:
    # The first one of each: "slak_large_kernel_bigger_than_map" has taps that only ever meet the padding.
    return list({layer_of(path): path for path in reversed(REGISTERED)}.values())


#: What a softmax takes away again, because it is the same for all that it compares: stored, but of no effect.
OF_NO_EFFECT = {"state/p.bias", "state/conv_attn.bias"}


@pytest.mark.parametrize("path", one_vector_of_each_layer(), ids=lambda path: path.stem)
def test_every_number_of_a_vector_matters(path):
    """A small change of one number, or an array too few, is found: nothing is stored that is not used or compared."""
    vector = load(path)
    keys = sorted(vector.keys() - {"config"})
    # A network has hundreds, most of which are those of its blocks again: some of them are enough.
    for key in keys[:: 1 + len(keys) // 60]:
        changed = {k: v.astype(np.float64) if k != "config" else v for k, v in vector.items()}
        flat = changed[key].reshape(-1)
        # The number that the loss depends on most: another one may be behind a ReLU that lets nothing through.
        slope = {"x": "grad_x", "r": "y_train"}.get(key, key.replace("state/", "grad/"))
        place = np.abs(vector.get(slope, flat)).argmax()
        compared = key.startswith(("y_", "grad", "after/"))
        # What is put in shows in no single number as strongly as it was changed.
        flat[place] += abs(flat[place]) * (1e-5 if compared else 1e-2) if abs(flat[place]) > 1e-9 else 1e-3
        if key not in OF_NO_EFFECT:
            with pytest.raises(AssertionError):
                check(changed)
        del changed[key]
        with pytest.raises((AssertionError, KeyError)):
            check(changed)
