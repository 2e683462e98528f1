"""RepVGG and MobileOne, which ship as plain convolutions: sizes, published weights, and a reference by other means."""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from helpers import relative_error
from network_contract import (
    check_exports,
    check_fused_is_the_same_function,
    check_one_step_changes_every_parameter,
    count,
)

from paddle_reparam import ppcls
from paddle_reparam.arithmetic.geometry import ConvGeometry
from paddle_reparam.errors import CheckpointError
from paddle_reparam.layers.branches import MiddleTapLayer
from paddle_reparam.models.mobileone import MobileOne
from paddle_reparam.models.repvgg import RepVGG
from paddle_reparam.registry import create_model, list_models
from paddle_reparam.surgery.rewrite import reparameterize
from paddle_reparam.weights import checkpoints
from paddle_reparam.weights.conversion import convert
from paddle_reparam.weights.published import convert_state, fit_exactly, in_our_names

# ---------------------------------------------------------------------------------------------------------------------
# Sizes

#: Name -> millions of trainable parameters in train form, as timm lists its networks, and shipped, as papers do.
PUBLISHED = {
    "RepVGG_A0": ("9.11", "8.31"), "RepVGG_A1": ("14.09", "12.79"), "RepVGG_A2": ("28.21", "25.50"),
    "RepVGG_B0": ("15.82", "14.34"), "RepVGG_B1": ("57.42", "51.83"), "RepVGG_B1g2": (None, "41.36"),
    "RepVGG_B1g4": ("39.97", "36.13"), "RepVGG_B2": ("89.02", "80.32"), "RepVGG_B2g2": (None, None),
    "RepVGG_B2g4": ("61.76", "55.78"), "RepVGG_B3": ("123.09", "110.96"), "RepVGG_B3g2": (None, None),
    "RepVGG_B3g4": ("83.83", "75.63"), "RepVGG_D2se": ("133.33", "120.39"),
    "MobileOne_S0": ("5.29", "2.1"), "MobileOne_S1": ("4.83", "4.8"), "MobileOne_S2": ("7.88", "7.8"),
    "MobileOne_S3": ("10.17", "10.1"), "MobileOne_S4": ("14.95", "14.8"),
}  # fmt: skip


def shipped_parameters(model) -> int:
    """Return how many parameters a network has when each of its layers is one convolution with a bias."""
    total = count(model)
    for layer in model.sublayers():
        if isinstance(layer, MiddleTapLayer):
            geometry = ConvGeometry.of(layer.whole()[0].conv)
            branches = sum(count(branch) for branch in [*layer.whole(), *layer.on_the_middle()])
            total += int(np.prod(geometry.weight_shape)) + geometry.out_channels - branches
    return total


def rounded(number: int, text: str) -> str:
    return f"{number / 1e6:.{len(text.split('.')[1])}f}"


def test_every_network_is_listed():
    assert set(PUBLISHED) == set(list_models(["RepVGG_*", "MobileOne_*"]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_large_as_published(name):
    with paddle.LazyGuard():
        model = create_model(name)
    train, shipped = PUBLISHED[name]
    assert train is None or rounded(count(model), train) == train
    # MobileOne's papers cut the last digit off.
    assert shipped is None or abs(shipped_parameters(model) / 1e6 - float(shipped)) < 0.1 ** len(shipped.split(".")[1])


# ---------------------------------------------------------------------------------------------------------------------
# The published networks, by their authors' names of entries


class State(dict):
    """A published state dict with numbers of its own, exact in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(0)

    def draw(self, low: float, high: float, *shape: int) -> np.ndarray:
        return self.generator.random(shape, np.float32) * np.float32(high - low) + np.float32(low)

    def bn(self, path: str, channels: int) -> None:
        self[f"{path}.weight"], self[f"{path}.bias"] = self.draw(0.5, 1, channels), self.draw(-0.3, 0.3, channels)
        self[f"{path}.running_mean"] = self.draw(-0.3, 0.3, channels)
        self[f"{path}.running_var"] = self.draw(0.5, 2, channels)
        self[f"{path}.num_batches_tracked"] = np.int64(7)

    def conv(self, path: str, out: int, inputs: int, k: int, bias: bool = False) -> None:
        bound = (3 / (inputs * k * k)) ** 0.5
        self[f"{path}.weight"] = self.draw(-bound, bound, out, inputs, k, k)
        if bias:
            self[f"{path}.bias"] = self.draw(-0.3, 0.3, out)

    def conv_bn(self, path: str, out: int, inputs: int, k: int) -> None:
        self.conv(f"{path}.conv", out, inputs, k)
        self.bn(f"{path}.bn", out)

    def classifier(self, channels: int, classes: int = 1000) -> None:
        self["linear.weight"] = self.draw(-0.1, 0.1, classes, channels)
        self["linear.bias"] = self.draw(-0.3, 0.3, classes)


def repvgg_state(blocks, channels, groups=1, se=False) -> State:
    state, before, index = State(), 3, 0
    for stage, (many, after) in enumerate(zip((1, *blocks), (min(64, channels[0]), *channels))):
        for i in range(many):
            path, inputs = (
                f"stage{stage}.{i}" if stage else "stage0",
                before // (groups if index in range(2, 27, 2) else 1),
            )
            state.conv_bn(f"{path}.rbr_dense", after, inputs, 3)
            state.conv_bn(f"{path}.rbr_1x1", after, inputs, 1)
            if i:
                state.bn(f"{path}.rbr_identity", after)
            if se:
                state.conv(f"{path}.se.down", after // 16, after, 1, bias=True)
                state.conv(f"{path}.se.up", after, after // 16, 1, bias=True)
            before, index = after, index + 1
    state.classifier(before)
    return state


def mobileone_state(channels, copies=1, se=False, blocks=(2, 8, 10, 1)) -> State:
    state, before = State(), min(64, channels[0])

    def block(path, out, inputs, k, copies, identity, se):
        for i in range(copies):
            state.conv_bn(f"{path}.rbr_conv.{i}", out, inputs, k)
        if k > 1:
            state.conv_bn(f"{path}.rbr_scale", out, inputs, 1)
        if identity:
            state.bn(f"{path}.rbr_skip", out)
        if se:
            state.conv(f"{path}.se.reduce", out // 16, out, 1, bias=True)
            state.conv(f"{path}.se.expand", out, out // 16, 1, bias=True)

    block("stage0", before, 3, 3, 1, False, False)
    for stage, (many, with_se, after) in enumerate(zip(blocks, (0, 0, blocks[2] // 2, blocks[3]), channels), 1):
        for i in range(many):
            has_se = se and i >= many - with_se
            block(f"stage{stage}.{2 * i}", before, 1, 3, copies, i > 0, has_se)
            block(f"stage{stage}.{2 * i + 1}", after, before, 1, copies, before == after, has_se)
            before = after
    state.classifier(before)
    return state


def reference(state: State, x: paddle.Tensor) -> paddle.Tensor:
    """Compute either network in float64 from its authors' entries alone: what is there is what is added."""
    tensors = {key: paddle.to_tensor(value.astype(np.float64)) for key, value in state.items()}

    def bn(path, y):
        weight, bias, mean, variance = (
            tensors[f"{path}.{name}"].reshape([1, -1, 1, 1])
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        return (y - mean) / paddle.sqrt(variance + float(np.float32(1e-5))) * weight + bias

    def conv_bn(path, y, stride):
        kernel = tensors[f"{path}.conv.weight"]
        padding, groups = kernel.shape[2] // 2, y.shape[1] // kernel.shape[1]
        return bn(f"{path}.bn", F.conv2d(y, kernel, None, stride, padding, 1, groups))

    def block(path, y, stride):
        names = dict.fromkeys(
            key[len(path) + 1 :].rpartition(".conv.")[0]
            for key in tensors
            if key.startswith(f"{path}.") and ".conv." in key
        )
        out = sum(conv_bn(f"{path}.{name}", y, stride) for name in names)
        for name in ("rbr_identity", "rbr_skip"):
            if f"{path}.{name}.weight" in tensors:
                out = out + bn(f"{path}.{name}", y)
        for first, second in (("se.down", "se.up"), ("se.reduce", "se.expand")):
            if f"{path}.{first}.weight" in tensors:
                gate = out.mean([2, 3], keepdim=True)
                for name, act in ((first, F.relu), (second, F.sigmoid)):
                    gate = act(F.conv2d(gate, tensors[f"{path}.{name}.weight"], tensors[f"{path}.{name}.bias"]))
                out = out * gate
        return F.relu(out)

    paths = dict.fromkeys(".".join(key.split(".")[:2]) for key in tensors if key.startswith("stage"))
    paths = dict.fromkeys("stage0" if path.startswith("stage0") else path for path in paths)
    for path in paths:
        x = block(path, x, 2 if path == "stage0" or path.endswith(".0") else 1)
    return x.mean([2, 3]) @ tensors["linear.weight"].T + tensors["linear.bias"]


def of_timm(state: State, parts: dict[str, str]) -> dict[str, np.ndarray]:
    """Return the state under timm's names of the same entries."""
    renamed = {}
    for key, value in state.items():
        stage, _, rest = key.partition(".")
        if stage == "linear":
            path = ["head", "fc"]
        else:
            path = ["stem"] if stage == "stage0" else ["stages", str(int(stage[5:]) - 1)]
        for old, new in parts.items():
            rest = f".{rest}".replace(f".{old}.", f".{new}.")[1:]
        renamed[".".join([*path, rest])] = value
    return renamed


REPVGG_AT_TIMM = {
    "rbr_dense": "conv_kxk", "rbr_1x1": "conv_1x1", "rbr_identity": "identity",
    "se.down": "attn.fc1", "se.up": "attn.fc2",
}  # fmt: skip
MOBILEONE_AT_TIMM = {
    "rbr_conv": "conv_kxk", "rbr_scale": "conv_scale", "rbr_skip": "identity",
    "se.reduce": "attn.fc1", "se.expand": "attn.fc2",
}  # fmt: skip
STATES = {
    "RepVGG_A0": lambda: repvgg_state((2, 4, 14, 1), (48, 96, 192, 1280)),
    "RepVGG_B1g4": lambda: repvgg_state((4, 6, 16, 1), (128, 256, 512, 2048), groups=4),
    "MobileOne_S0": lambda: mobileone_state((48, 128, 256, 1024), copies=4),
    # Narrow siblings: the published ones of this kind are larger.
    "RepVGG_D2se": lambda: repvgg_state((1, 2, 1, 1), (32, 32, 32, 32), se=True),
    "MobileOne_S4": lambda: mobileone_state((32, 32, 64, 64), se=True, blocks=(1, 2, 3, 1)),
}
SIBLINGS = {
    "RepVGG_D2se": lambda: RepVGG((1, 2, 1, 1), (0.5, 0.25, 0.125, 0.0625), se=True),
    "MobileOne_S4": lambda: MobileOne((0.5, 0.25, 0.25, 0.125), se=True, blocks=(1, 2, 3, 1)),
}


def image(seed: int = 0) -> paddle.Tensor:
    return paddle.to_tensor(np.random.default_rng(seed).standard_normal([2, 3, 32, 32]))


def loaded(name: str, state) -> tuple[paddle.nn.Layer, dict[str, np.ndarray]]:
    """Return the network, or its narrow sibling, in float64 with a published state dict in it, and our entries."""
    model = SIBLINGS[name]() if name in SIBLINGS else create_model(name)
    entries = fit_exactly(model, in_our_names(name, state, model), name)
    checkpoints.load_into(model, entries)
    model.to(dtype="float64")
    model.eval()
    return model, entries


@pytest.mark.parametrize("name", STATES)
def test_published_weights_give_the_published_function(name):
    """Under the authors' names of entries, and under timm's."""
    state = STATES[name]()
    model, entries = loaded(name, state)
    assert relative_error(model(image()), reference(state, image())) < 1e-10
    at_timm = of_timm(state, REPVGG_AT_TIMM if name.startswith("RepVGG") else MOBILEONE_AT_TIMM)
    assert not at_timm.keys() & state.keys()
    theirs = fit_exactly(model, in_our_names(name, at_timm, model), name)
    assert entries.keys() == theirs.keys()
    assert all(np.array_equal(entries[key], theirs[key]) for key in entries)


@pytest.mark.parametrize(
    ("name", "merged"),
    [("MobileOne_S0", "reparam_conv"), ("MobileOne_S4", "reparam_conv"), ("RepVGG_D2se", "rbr_reparam")],
)
def test_merged_weights_become_the_train_form(name, merged):
    state = STATES[name]()
    model, _ = loaded(name, state)
    plain = {key: value for key, value in state.items() if ".se." in key or key.startswith("linear.")}
    for path, layer in model.named_sublayers():
        if isinstance(layer, MiddleTapLayer):
            conv = layer.reparameterize().conv
            plain[f"{path}.{merged}.weight"], plain[f"{path}.{merged}.bias"] = conv.weight.numpy(), conv.bias.numpy()
    again, _ = loaded(name, plain)
    for form in (again, reparameterize(again)[0]):
        assert relative_error(form(image()), model(image())) < 1e-5


def test_the_command_converts_a_file(tmp_path):
    state = STATES["MobileOne_S0"]()
    np.savez(tmp_path / "weights.npz", **{f"module.{key}": value for key, value in state.items()})
    report = convert("MobileOne_S0", tmp_path / "weights.npz", tmp_path / "ours.pdparams")
    assert report.check.passed
    assert not report.merged
    model = create_model("MobileOne_S0", pretrained=str(tmp_path / "ours.pdparams"))
    entries = convert_state("MobileOne_S0", state)
    assert all(np.array_equal(value.numpy(), entries[key]) for key, value in model.state_dict().items())
    del state["stage3.4.rbr_skip.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: stage3\.4\.identity\.weight"):
        convert_state("MobileOne_S0", state)


# ---------------------------------------------------------------------------------------------------------------------
# PaddleClas' own


@pytest.mark.parametrize("name", ["RepVGG_A0", "RepVGG_B1g4"])
def test_paddleclas_own_network_has_the_same_entries_and_function(name):
    ppcls.setup()
    from ppcls import arch

    assert getattr(arch, name).__module__.startswith("ppcls.arch.backbone.")
    with paddle.utils.unique_name.guard():
        theirs = getattr(arch, name)(class_num=7)
    ours = create_model(name, class_num=7)
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes
    for i, (key, value) in enumerate(theirs.state_dict().items()):
        if key.endswith(("_mean", "_variance", "bn.weight", "bn.bias", "identity.weight", "identity.bias")):
            value.set_value(np.random.default_rng(i).uniform(0.5, 1, value.shape).astype(np.float32))
    checkpoints.load_into(ours, theirs.state_dict())
    ours.eval()
    theirs.eval()
    x = image().astype("float32")
    assert relative_error(ours(x), theirs(x)) < 1e-5


def test_what_paddleclas_lacks_is_built_from_a_config():
    ppcls.setup()
    from ppcls import arch

    model = arch.MobileOne_S1(class_num=3, return_stages=[0, 3])
    assert isinstance(model, MobileOne)
    model.eval()
    assert model(image().astype("float32")).keys() == {"logits", "stage1", "stage4"}


# ---------------------------------------------------------------------------------------------------------------------
# The contract of a network, on narrow ones

NARROW = {
    "RepVGG": lambda: RepVGG((1, 2, 2, 1), (0.25, 0.125, 0.0625, 0.0625), groups=2, class_num=5),
    "RepVGG with SE": lambda: RepVGG((1, 2, 1, 1), (1, 0.5, 0.25, 0.125), se=True, class_num=5),
    "MobileOne with SE": lambda: MobileOne((0.5, 0.25, 0.25, 0.125), 2, se=True, class_num=5, blocks=(1, 1, 2, 1)),
}


@pytest.mark.parametrize("name", NARROW)
def test_it_learns_and_fuses(name):
    paddle.seed(0)  # Of a few units, a ReLU may let none through.
    model = NARROW[name]()
    check_one_step_changes_every_parameter(model, [None, 3, 64, 64])
    fused = check_fused_is_the_same_function(model, [None, 3, 64, 64], [None, 3, 96, 64])
    convolutions = [layer for layer in fused.sublayers() if isinstance(layer, paddle.nn.Conv2D)]
    gates = {"RepVGG with SE": 6, "MobileOne with SE": 4}.get(name, 0)
    assert len(convolutions) - 2 * gates == sum(isinstance(layer, MiddleTapLayer) for layer in model.sublayers())
    assert count(fused) == shipped_parameters(model)


def test_it_exports(tmp_path):
    paddle.seed(0)
    check_exports(NARROW["MobileOne with SE"](), [None, 3, 64, 64], tmp_path, forms=(True,))
