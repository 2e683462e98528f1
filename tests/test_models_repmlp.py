"""The networks with RepMLP (first paper): as large as published, the same in every form, published weights."""

from __future__ import annotations

import math

import numpy as np
import paddle
import pytest
from helpers import as_array, randomise_batch_norms, relative_error
from network_contract import (
    check_exports,
    check_fused_is_the_same_function,
    check_one_step_changes_every_parameter,
    count,
    macs,
)
from paddle import nn
from test_repmlp import convolve

from paddle_reparam import registry
from paddle_reparam.errors import CheckpointError, ReparamError
from paddle_reparam.layers.repmlp import RepMLP, RepMLPFused
from paddle_reparam.models.mlp_repmlp import _VARIANTS, RepMLP_CIFAR, RepMLPForCifar
from paddle_reparam.models.resnet_repmlp import RepMLPResNet, RepMLPResNet50, rename
from paddle_reparam.registry import create_model
from paddle_reparam.surgery.rewrite import reparameterize
from paddle_reparam.weights.checkpoints import load_into
from paddle_reparam.weights.published import convert_state


def small(block: str) -> RepMLPResNet:
    """A small host: partitions of 4x4 on 8x8 and, without a Global Perceptron, 4x4 maps."""
    groups = {} if block == "base" else {"c3": 2, "c4": 4}
    return RepMLPResNet(block, groups, {"c3": 2, "c4": 2}, 2, 64, 4, class_num=5, depths=(1, 2, 2, 1), width=8)


@pytest.mark.parametrize("block", ["light", "bottleneck"])
def test_every_form_of_a_host_is_the_same_function(block, tmp_path):
    model = small(block)
    check_one_step_changes_every_parameter(model, [None, 3, 64, 64])
    fused = check_fused_is_the_same_function(model, [None, 3, 64, 64])
    assert sum(isinstance(layer, RepMLPFused) for layer in fused.sublayers()) == 2
    assert not any(isinstance(layer, nn.BatchNorm2D) for layer in fused.sublayers())
    if block == "bottleneck":
        check_exports(model, [None, 3, 64, 64], tmp_path)
    with pytest.raises(ReparamError, match="images of 64x64 pixels and got images of 96x64; build it with another"):
        model(paddle.randn([1, 3, 96, 64]))


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0.0)


def conv_bn(block: nn.Layer, name: str, x: np.ndarray) -> np.ndarray:
    """The convolution and its BN alone."""
    part = getattr(block, name)
    return part.bn(part.conv(paddle.to_tensor(x))).numpy()


def test_where_the_activations_are():
    """A ReLU follows RepMLP and every BN but the last one, whose output is added to the shortcut."""
    light, bottleneck = small("light").stage2[1], small("bottleneck").stage2[1]
    for block in (light, bottleneck):
        block.to(dtype="float64")
        randomise_batch_norms(block)
        block.eval()
    x = np.random.randn(2, 64, 8, 8)
    y = relu(conv_bn(light, "light_conv1", x))
    y = relu(light.light_repmlp(paddle.to_tensor(y)).numpy())
    expected = relu(conv_bn(light, "light_conv3", y) + x)
    assert relative_error(light(paddle.to_tensor(x)), expected) < 1e-10
    y = relu(conv_bn(bottleneck, "btnk_conv2", relu(conv_bn(bottleneck, "btnk_conv1", x))))
    y = relu(bottleneck.btnk_repmlp(paddle.to_tensor(y)).numpy())
    y = relu(conv_bn(bottleneck, "btnk_conv4", y))
    expected = relu(conv_bn(bottleneck, "btnk_conv5", y) + x)
    assert relative_error(bottleneck(paddle.to_tensor(x)), expected) < 1e-10


def test_repmlp_is_in_every_block_but_those_of_stride_2():
    model = RepMLPResNet(
        "bottleneck", dict.fromkeys(("c2", "c3", "c5"), 1), {"c2": 2, "c3": 2, "c5": 4}, 1, 64, 2, 5, (1, 2, 2, 2), 8
    )
    paths = [path for path, layer in model.named_sublayers() if isinstance(layer, RepMLP)]
    assert paths == [f"{block}.btnk_repmlp" for block in ("stage1.0", "stage2.1", "stage4.1")]
    assert [layer.in_channels for layer in model.sublayers() if isinstance(layer, RepMLP)] == [4, 8, 16]


def test_the_base_takes_images_of_any_size():
    check_fused_is_the_same_function(small("base"), [None, 3, 64, 64], [None, 3, 96, 40])


@pytest.mark.parametrize("variant", _VARIANTS)
def test_every_form_of_the_pure_mlp_is_the_same_function(variant):
    model = RepMLPForCifar(variant, 2, class_num=3)
    check_one_step_changes_every_parameter(model, [None, 3, 32, 32])
    fused = check_fused_is_the_same_function(model, [None, 3, 32, 32])
    expected = 0 if _VARIANTS[variant] is None else 6
    fc1s = sum(name.endswith("fc1.weight") for name, _ in fused.named_parameters())
    assert fc1s == (0 if variant == "without_global" else expected * 2 // 3)
    assert any("repconv" in name for name in model.state_dict()) == (variant != "without_local" and expected > 0)
    assert sum(isinstance(layer, RepMLPFused) for layer in fused.sublayers()) == expected


@pytest.fixture
def zeros_everywhere(monkeypatch):
    """Start all weights at zero: for counting, drawing 80 million numbers is wasted time."""
    for name in ("Normal", "XavierUniform", "XavierNormal", "KaimingNormal"):
        monkeypatch.setattr(nn.initializer, name, lambda *_, **__: nn.initializer.Constant(0.0))


def c4(reduction: int) -> dict:
    return {"fc3_groups": {"c4": 8}, "reduction": {"c4": reduction}}


def groups(c3: int, c4: int, size: int) -> dict:
    return {"fc3_groups": {"c3": c3, "c4": c4}, "image_size": size}


# Network, options, side of the images: millions of parameters in train form and of the published deploy form, and
# thousands of millions of multiply-adds, as counted with the published code.
PUBLISHED = [
    ("RepMLPResNet50_base_224", {}, 224, 25.557, "25.530", 4.089),
    ("RepMLPResNet50_light_224", {}, 224, 87.04, "86.14", 3.30),
    ("RepMLPResNet50_bottleneck_224", {}, 224, 41.07, "40.87", 3.95),
    ("RepMLPResNet50", c4(8), 224, None, "25.03", None),
    ("RepMLPResNet50", c4(4), 224, None, "30.88", None),
    ("RepMLPResNet50", c4(2), 224, None, "52.78", None),
    ("RepMLPResNet50", groups(8, 16, 224), 224, None, "37.8", None),
    ("RepMLPResNet50", groups(4, 8, 224), 224, None, "44.6", None),
    ("RepMLPResNet50", groups(8, 16, 320), 320, None, "59.2", None),
    ("RepMLPResNet50", groups(4, 8, 320), 320, None, "87.4", None),
]


def deploy_count(model: nn.Layer) -> int:
    """Count what the deploy form has: no Local Perceptron, no BN of the averages, of every other BN the bias alone."""
    return sum(
        math.prod(p.shape)
        for name, p in model.named_parameters()
        if not p.stop_gradient and not ("repconv" in name or "avg.bn" in name or name.endswith("bn.weight"))
    )


@pytest.mark.parametrize(("name", "options", "size", "train", "deploy", "giga"), PUBLISHED, ids=str)
def test_as_large_as_published(zeros_everywhere, name, options, size, train, deploy, giga):
    model = create_model(name, **options)
    assert train is None or round(count(model) / 1e6, len(str(train).split(".")[1])) == train
    assert f"{deploy_count(model) / 1e6:.{len(deploy.split('.')[1])}f}" == deploy
    if giga is not None:
        assert macs(model, size) / 1e9 == pytest.approx(giga, rel=0.002)


def test_fused_as_large_as_published(zeros_everywhere):
    model = create_model("RepMLPResNet50_bottleneck_224")
    model.eval()
    fused, _ = reparameterize(model)
    assert macs(fused, 224) / 1e9 == pytest.approx(3.89, rel=0.002)
    weights_of_norms = sum(p.size for name, p in fused.named_parameters() if name.endswith("bn.weight"))
    assert count(fused) - weights_of_norms == deploy_count(model)


def test_the_pure_mlp_is_as_large_as_published():
    millions = {variant: macs(RepMLP_CIFAR(variant=variant), 32) / 1e6 for variant in ("without_local", "wide_convnet")}
    # Without the Local Perceptron, the train form multiplies what the fused form of the whole does.
    assert f"{millions['without_local']:.1f}" == "52.8"
    assert f"{millions['wide_convnet']:.1f}" == "65.1"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block": "lite"}, "no block 'lite'; it has base, light, bottleneck"),
        ({"block": "light", "reduction": {"c3": 2}}, "reduction says nothing about the block 'light'; leave it out"),
        ({"block": "base", "fc3_groups": {"c3": 2}}, "fc3_groups says nothing about the block 'base'"),
        ({"fc3_groups": {"c6": 2}}, "fc3_groups is a number for each stage, such as"),
        ({"reduction": 4}, "reduction is a number for each stage, such as"),
        ({"image_size": 225}, "image_size=225 is no multiple of 32"),
    ],
)
def test_options_that_fit_nothing_are_refused(options, words):
    with pytest.raises(ReparamError, match=words):
        RepMLPResNet50(**options)


def test_the_variants_are_named():
    with pytest.raises(ReparamError, match="no variant 'mlp'; it has pure_mlp, without_local"):
        RepMLP_CIFAR(variant="mlp")


# --- Published weights ------------------------------------------------------------------------------------------------


def published_train_keys() -> dict[str, list[int]]:
    """The entries of the published `RepMLP-Res50` with RepMLP in c4, reduction 8, 8 groups, written down by rule."""
    shapes: dict[str, list[int]] = {}

    def bn(path, size):
        shapes.update({f"{path}.{last}": [size] for last in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{path}.num_batches_tracked"] = []

    def conv_bn(path, outputs, inputs, k):
        shapes[f"{path}.conv.weight"] = [outputs, inputs, k, k]
        bn(f"{path}.bn", outputs)

    conv_bn("stage0.0", 64, 3, 7)
    inputs = 64
    for stage, depth, outputs in ((1, 3, 256), (2, 4, 512), (3, 6, 1024), (4, 3, 2048)):
        for i in range(depth):
            path, middle = f"stage{stage}.{i}", outputs // 4
            if i == 0:
                conv_bn(f"{path}.shortcut", outputs, inputs, 1)
            if stage == 3 and i > 0:
                conv_bn(f"{path}.btnk_conv1", middle, inputs, 1)
                conv_bn(f"{path}.btnk_conv2", 32, middle, 3)
                repmlp = f"{path}.btnk_repmlp"
                for fc in ("fc1", "fc2"):
                    shapes.update({f"{repmlp}.fc1_fc2.{fc}.weight": [128, 128], f"{repmlp}.fc1_fc2.{fc}.bias": [128]})
                bn(f"{repmlp}.avg.bn", 32)
                shapes[f"{repmlp}.fc3.weight"] = [32 * 49, 4 * 49, 1, 1]
                bn(f"{repmlp}.fc3_bn", 32 * 49)
                for k in (1, 3, 5):
                    conv_bn(f"{repmlp}.repconv{k}", 32, 4, k)
                conv_bn(f"{path}.btnk_conv4", middle, 32, 3)
                conv_bn(f"{path}.btnk_conv5", outputs, middle, 1)
            else:
                conv_bn(f"{path}.conv1", middle, inputs, 1)
                conv_bn(f"{path}.conv2", middle, middle, 3)
                conv_bn(f"{path}.conv3", outputs, middle, 1)
            inputs = outputs
    shapes.update({"linear.weight": [1000, 2048], "linear.bias": [1000]})
    return shapes


def test_the_published_entries_are_ours(zeros_everywhere):
    state = {f"module.{key}": np.zeros(shape, np.float32) for key, shape in published_train_keys().items()}
    state["module.linear.weight"][3, 5] = 7.0
    converted = convert_state("RepMLPResNet50", state, **c4(8))
    assert converted["linear.weight"][5, 3] == 7.0
    assert converted["stage3.1.btnk_repmlp.fc3_bn._variance"].shape == (1568,)


def published_state(model: RepMLPResNet) -> dict[str, np.ndarray]:
    """The train form's state as PyTorch would save it."""
    state = {}
    for key, value in model.state_dict().items():
        array = as_array(value)
        is_linear = array.ndim == 2
        key = key.replace("._mean", ".running_mean").replace("._variance", ".running_var")
        state[key] = array.T if is_linear else array
    return state


def folded(state: dict, conv: str, bn: str) -> tuple[np.ndarray, np.ndarray]:
    scale = state[f"{bn}.weight"] / np.sqrt(state[f"{bn}.running_var"] + 1e-5)
    weight = state[f"{conv}.weight"] * scale.reshape(-1, *[1] * (state[f"{conv}.weight"].ndim - 1))
    return weight, state[f"{bn}.bias"] - state[f"{bn}.running_mean"] * scale


def published_deploy_state(state: dict[str, np.ndarray], model: RepMLPResNet) -> dict[str, np.ndarray]:
    """What the published conversion makes of a train form: no BNs, no Local Perceptron, biases in their places."""
    deploy = {key: state[key] for key in ("linear.weight", "linear.bias")}
    for path, layer in model.named_sublayers():
        if f"{path}.conv.weight" in state and "repconv" not in path:
            deploy[f"{path}.conv.weight"], deploy[f"{path}.conv.bias"] = folded(state, f"{path}.conv", f"{path}.bn")
        if isinstance(layer, RepMLP):
            weight, bias = folded(state, f"{path}.fc3", f"{path}.fc3_bn")
            h, w = layer.partition
            inputs, groups = layer.in_channels * h * w, layer.fc3_groups
            for k in layer.reparam_conv_k:
                kernel, shift = folded(state, f"{path}.repconv{k}.conv", f"{path}.repconv{k}.bn")
                impulses = np.eye(inputs).reshape(inputs, layer.in_channels, h, w)
                answers = convolve(impulses, kernel, groups).reshape(inputs, -1).T
                blocks = [np.split(r, groups, axis=1)[i] for i, r in enumerate(np.split(answers, groups, axis=0))]
                weight = weight + np.concatenate(blocks)[:, :, None, None]
                bias = bias + shift.repeat(h * w)
            deploy[f"{path}.fc3.weight"], deploy[f"{path}.fc3.bias"] = weight, bias
            if f"{path}.avg.bn.weight" in state:
                scale = state[f"{path}.avg.bn.weight"] / np.sqrt(state[f"{path}.avg.bn.running_var"] + 1e-5)
                shift = state[f"{path}.avg.bn.bias"] - state[f"{path}.avg.bn.running_mean"] * scale
                fc1 = f"{path}.fc1_fc2.fc1"
                deploy.update({key: state[key] for key in state if key.startswith(f"{path}.fc1_fc2.fc2")})
                times = state[f"{fc1}.weight"].shape[1] // scale.size
                deploy[f"{fc1}.weight"] = state[f"{fc1}.weight"] * scale.repeat(times)
                deploy[f"{fc1}.bias"] = state[f"{fc1}.bias"] + state[f"{fc1}.weight"] @ shift.repeat(times)
    return deploy


@pytest.fixture
def tiny(monkeypatch):
    """A registered small host for each block, in float64."""

    def build(block):
        def builder():
            model = small(block)
            model.to(dtype="float64")
            return model

        return builder

    for block in ("base", "light", "bottleneck"):
        entry = registry.ModelEntry(build(block), (), rename)
        monkeypatch.setitem(registry._models._entries, f"tiny_{block}", entry)


@pytest.mark.parametrize("block", ["base", "light", "bottleneck"])
def test_a_published_deploy_form_becomes_the_same_function(tiny, block):
    model = create_model(f"tiny_{block}")
    randomise_batch_norms(model)
    model.eval()
    state = published_state(model)
    deploy = published_deploy_state(state, model)
    assert not any("bn" in key or "repconv" in key for key in deploy)
    x = paddle.randn([2, 3, 64, 64], dtype="float64")
    for published in (state, deploy):
        loaded = create_model(f"tiny_{block}")
        load_into(loaded, convert_state(f"tiny_{block}", published))
        loaded.eval()
        assert relative_error(loaded(x), model(x)) < 1e-7
        if block != "base":
            assert relative_error(reparameterize(loaded)[0](x), model(x)) < 1e-7


def test_a_deploy_form_that_is_not_whole_is_refused(tiny):
    model = create_model("tiny_light")
    deploy = published_deploy_state(published_state(model), model)
    conv = "stage2.1.light_conv1.conv.weight"
    del deploy[conv]
    with pytest.raises(CheckpointError, match=f"light_repmlp.fc3.weight, but not {conv} before it"):
        convert_state("tiny_light", deploy)
