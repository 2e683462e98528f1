"""The walk: which convolutions get a layer, what is fused, which BN is folded, and what is refused by name."""

import contextlib
import re

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from helpers import randomise_batch_norms, relative_error
from paddle import nn
from paddle.vision.ops import DeformConv2D

from paddle_reparam.errors import ReparamError, UnknownName, UsageError
from paddle_reparam.layers.base import InferenceForm
from paddle_reparam.layers.refconv import RefConv2D
from paddle_reparam.layers.spconv import SPConv2D
from paddle_reparam.registry import get_layer, list_layers
from paddle_reparam.surgery.places import RewriteReport, copy_model
from paddle_reparam.surgery.rewrite import reparameterize, replace
from paddle_reparam.surgery.verify import verify

SPEC = [[None, 3, 9, 8]]


class Net(nn.Layer):
    """Convolutions of every kind that a walk meets."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2D(3, 8, 3, padding=1, bias_attr=False)
        self.bn = nn.BatchNorm2D(8)
        self.blocks = nn.Sequential(
            nn.Sequential(nn.Conv2D(8, 8, 3, padding="SAME", groups=8), nn.BatchNorm2D(8), nn.ReLU()),
            nn.Sequential(nn.Conv2D(8, 6, 1), nn.BatchNorm2D(6), nn.ReLU()),
            nn.Sequential(nn.Conv2D(6, 6, (3, 5), padding=(2, 4), dilation=2), nn.ReLU()),
        )
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.head(x.mean([2, 3]))


def build(cls=Net, *args, **options):
    model = cls(*args, **options)
    randomise_batch_norms(model, 1)
    model.eval()
    return model


def state_of(model):
    return {k: v.numpy().copy() for k, v in model.state_dict().items()}


def assert_same_state(model, state):
    now = state_of(model)
    assert list(now) == list(state)
    for key, value in state.items():
        np.testing.assert_array_equal(now[key], value, err_msg=key)


# ---------------------------------------------------------------------------------------------------------------------
# replace


def test_replace_reports_every_convolution_and_keeps_the_function():
    model = build()
    x = paddle.randn([2, 3, 9, 8])
    before = model(x)
    report = replace(model, "RefConv2D", init="zero")
    assert [path for path, _ in report.touched] == ["stem", "blocks.0.0", "blocks.2.0"]
    assert [path for path, _ in report.skipped] == ["blocks.1.0"]
    assert "1x1" in report.skipped[0][1]
    assert all(isinstance(layer, RefConv2D) for layer in (model.stem, model.blocks[0][0], model.blocks[2][0]))
    assert relative_error(model(x), before) < 1e-6
    assert not model.stem.training
    assert report.coverage == 0.75
    assert "blocks.2.0" in report.table()
    assert '"touched"' in report.to_json()


def test_a_report_as_text_is_short_and_its_table_whole():
    """Counts by what was done and why not; layers are named in the table alone, and many kinds are put together."""
    report = RewriteReport(
        [*((f"conv{i}", f"RefConv2D({i}->8, 3x3)") for i in range(30)), ("a", "folded into b"), ("c", "folded into d")],
        [*((f"skip{i}", f"takes no groups, this one is {i}->8") for i in range(20))],
        {"BNs": 2},
    )
    assert str(report).splitlines()[2:] == [
        "    30  RefConv2D", "     2  folded", "    20  skipped: takes no groups",
        "32 done, 20 skipped (62% done); left over: 2 BNs",
    ]  # fmt: skip
    rows = report.table().splitlines()
    assert len(rows) == 2 + 52 + 1
    assert re.split(" {2,}", rows[31]) == ["conv29", "done", "RefConv2D(29->8, 3x3)"]
    report.skipped = [(f"skip{i}", f"reason {chr(97 + i)}") for i in range(20)]
    assert len(str(report).splitlines()) == 15
    assert str(report).splitlines()[-2] == "    11  of other kinds"


@pytest.mark.parametrize(
    "where",
    ["blocks.*", ["blocks.0.*", "blocks.2.*"], lambda path, conv: conv._groups == 8 or conv._dilation[0] == 2],
    ids=["pattern", "patterns", "predicate"],
)
def test_where_selects(where):
    model = build()
    report = replace(model, "RefConv2D", where=where, init="zero")
    assert [path for path, _ in report.touched] == ["blocks.0.0", "blocks.2.0"]
    assert dict(report.skipped)["stem"] == "not selected by `where`"
    assert type(model.stem) is nn.Conv2D


def test_dry_run_reports_the_same_and_changes_nothing():
    model = build()
    state, types = state_of(model), [type(layer) for layer in model.sublayers()]
    dry = replace(model, "RefConv2D", dry_run=True, init="zero")
    assert_same_state(model, state)
    assert [type(layer) for layer in model.sublayers()] == types
    assert dry.touched == replace(model, "RefConv2D", init="zero").touched


def test_replacing_nothing_is_an_error_with_the_reasons():
    with pytest.raises(ReparamError, match="in the place of no convolution of Net.*not selected by `where`"):
        replace(build(), "RefConv2D", where=lambda path, conv: False)
    with pytest.raises(UsageError, match=r"`where` has 'block.0.0', which no .*; some are blocks.0.0"):
        replace(build(), "RefConv2D", where=["stem", "block.0.0"])
    with pytest.raises(ReparamError, match="of Linear: it has none"):
        replace(nn.Linear(2, 2), "RefConv2D")
    with pytest.raises(ReparamError, match="use RefConv2D.from_conv"):
        replace(nn.Conv2D(3, 3, 3), "RefConv2D")
    with pytest.raises(UnknownName, match="did you mean RefConv2D"):
        replace(build(), "RefConv")


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        ("RefConv2D", {}),
        ("RefConv2D", {"train_base": True}),
        ("RepMLP", {"height": 9, "width": 8, "partition": (3, 4)}),
    ],
)
def test_a_frozen_convolution_stays_frozen_through_a_training_step(layer, options):
    frozen = paddle.ParamAttr(learning_rate=0.0, need_clip=False, regularizer=paddle.regularizer.L1Decay(0.5))
    model = nn.Sequential(
        nn.Conv2D(3, 4, 3, padding=1, weight_attr=frozen, bias_attr=frozen), nn.Conv2D(4, 4, 3, padding=1)
    )
    model[1].weight.stop_gradient = True
    replace(model, layer, **options)
    for parameter in model[0].parameters():
        assert (parameter.need_clip, parameter.regularizer._coeff) == (False, 0.5)
    # What is new around a weight without gradient trains; the weight itself does not.
    new = [p for p in model[1].parameters() if not p.stop_gradient]
    before = [p.numpy() for p in [*model[0].parameters(), *new]]
    base = model[1].state_dict().get("weight")
    kept = None if base is None else base.numpy()
    clip = nn.ClipGradByGlobalNorm(1.0)
    optimizer = paddle.optimizer.AdamW(0.1, parameters=model.parameters(), weight_decay=0.1, grad_clip=clip)
    # In eval mode: the running statistics of BNs move in training, whatever is frozen.
    model.eval()
    model(paddle.randn([2, 3, 9, 8])).pow(2).sum().backward()
    optimizer.step()
    moved = [not np.array_equal(p.numpy(), old) for p, old in zip([*model[0].parameters(), *new], before)]
    assert not any(moved[: -len(new)])
    assert any(moved[-len(new) :])
    assert base is None or np.array_equal(base.numpy(), kept)


def test_what_is_no_network_name_or_pattern_is_refused_in_a_sentence():
    for model in ("resnet18", None, nn.Linear):
        with pytest.raises(UsageError, match="a paddle.nn.Layer, not into .*; build it first"):
            replace(model, "RefConv2D")
        with pytest.raises(UsageError, match="only a network"):
            reparameterize(model)
    for name in (RefConv2D, None, ["RefConv2D"]):
        with pytest.raises(UnknownName, match="a layer is chosen by its name, a text"):
            replace(build(), name)
    for where in (3, [3], {"stem": 1}, nn.ReLU()):
        with pytest.raises(UsageError, match="`where` is a pattern of paths"):
            replace(build(), "RefConv2D", where=where)


VALUES = (
    None,
    True,
    -1,
    0,
    2,
    4,
    0.5,
    1.5,
    10**9,
    float("nan"),
    float("inf"),
    "3",
    "zero",
    [],
    [3],
    (2, 3),
    {},
    [None],
)


@pytest.mark.parametrize("name", list_layers())
def test_options_of_layers_are_wrong_in_a_sentence(name):
    cls = get_layer(name).layer
    needed = {"height": 8, "width": 8, "partition": (4, 4)} if name == "RepMLP" else {}
    convs = [
        nn.Conv2D(4, 4, 3, padding=1),
        nn.Conv2D(4, 4, 7, padding=3, groups=4),
        nn.Conv2D(4, 6, 1, stride=2, data_format="NHWC"),
    ]
    assert cls.options is not None
    with pytest.raises(UnknownName, match=f"no option of {name} named 'no_such'"):
        cls.from_conv(convs[0], no_such=1)
    for option in cls.options:
        with pytest.raises(UnknownName, match=f"did you mean {option}"):
            cls.from_conv(convs[0], **{f"{option}x": 1})
        for value in VALUES:
            if isinstance(value, int) and value > 1000 and cls.options[option].accepts(value):
                continue  # A layer of that size is right, and does not fit.
            for conv in convs:
                with contextlib.suppress(ReparamError):
                    cls.from_conv(conv, **{**needed, option: value})


def test_an_error_in_a_layer_carries_its_path():
    model = build()
    model.blocks[0][0].weight.set_value(paddle.zeros([8, 1, 3, 3]))
    with pytest.raises(ReparamError, match=r"blocks\.0\.0: .*zero"):
        replace(model, "RefConv2D")
    assert type(model.stem) is nn.Conv2D, "nothing may change when one layer cannot be replaced"


class Shared(nn.Layer):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2D(3, 3, 3, padding=1)
        self.again = self.first
        self.tied = nn.Conv2D(3, 3, 3, padding=1)
        self.tied_too = nn.Conv2D(3, 3, 3, padding=1)
        self.tied_too.weight = self.tied.weight
        self.listed = [self.add_sublayer("in_list", nn.Conv2D(3, 3, 3, padding=1))]
        self.by_name = {"a": self.listed[0], "pair": (self.listed[0], 1)}

    def forward(self, x):
        x = self.tied_too(self.tied(self.again(self.first(x))))
        return self.by_name["pair"][0](self.by_name["a"](self.listed[0](x)))


class OtherConvolutions(nn.Layer):
    """What is no Conv2D, by a convolution's name or class."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Conv1D(3, 3, 3)
        self.up = nn.Conv2DTranspose(3, 3, 2, stride=2)
        self.volume = nn.Conv3D(3, 3, 3)
        self.deformable = DeformConv2D(3, 3, 3)
        self.head = nn.Linear(3, 2)


def test_convolutions_of_every_kind_are_reported():
    model = OtherConvolutions()
    with pytest.raises(ReparamError) as error:
        replace(model, "RefConv2D")
    for name in ("Conv1D", "Conv2DTranspose", "Conv3D", "DeformConv2D"):
        assert f"{name} is not paddle.nn.Conv2D itself" in str(error.value)
    assert "its 4 convolutions were skipped" in str(error.value)
    model.conv = nn.Conv2D(3, 3, 3)
    report = replace(model, "RefConv2D", init="zero")
    assert [path for path, _ in report.skipped] == ["rows", "up", "volume", "deformable"]
    assert report.coverage == 0.2
    # A layer of this library is no convolution that was left out.
    model.more = nn.Conv2D(3, 3, 3)
    report = replace(model, "RefConv2D", init="zero", train_base=True)
    assert [path for path, _ in report.skipped] == ["rows", "up", "volume", "deformable"]


def test_shared_layers_stay_shared_and_tied_weights_are_refused():
    model = build(Shared)
    x = paddle.randn([1, 3, 6, 6])
    before = model(x)
    report = replace(model, "RefConv2D", init="zero")
    assert [path for path, _ in report.touched] == ["first", "in_list"]
    assert "also at again" in dict(report.touched)["first"]
    assert model.first is model.again
    assert [path for path, _ in report.skipped] == ["tied", "tied_too"]
    assert "shared with another layer" in report.skipped[0][1]
    assert relative_error(model(x), before) < 1e-6
    # The layers that the forward reaches through a list, a dict and a tuple are the new ones.
    assert isinstance(model.listed[0], RefConv2D)
    assert model.by_name["a"] is model.listed[0] is model.by_name["pair"][0] is model.in_list


def test_hooked_subclassed_and_weight_normed_convolutions_are_skipped_by_name():
    class MyConv(nn.Conv2D):
        pass

    hooked = nn.Conv2D(3, 3, 3)
    hooked.register_forward_post_hook(lambda layer, args, out: out * 2)
    model = nn.Sequential(MyConv(3, 3, 3), hooked, nn.utils.weight_norm(nn.Conv2D(3, 3, 3)), nn.Conv2D(3, 3, 3))
    reasons = dict(replace(model, "RefConv2D", init="zero").skipped)
    assert "MyConv is not paddle.nn.Conv2D itself" in reasons["0"]
    assert "hooks" in reasons["1"]
    assert "computed before each pass by a hook (WeightNorm)" in reasons["2"]


def test_layers_already_put_in_are_left_alone():
    model = build()
    replace(model, "RefConv2D", where="stem", init="zero")
    report = replace(model, "RefConv2D", init="zero")
    assert [path for path, _ in report.touched] == ["blocks.0.0", "blocks.2.0"]
    model = build(nn.Sequential, SPConv2D(8, 8), nn.Conv2D(8, 8, 3))
    report = replace(model, "RefConv2D")
    assert [path for path, _ in report.touched] == ["1"]
    assert dict(report.skipped)["0.gwc"] == "it is part of a SPConv2D"


# ---------------------------------------------------------------------------------------------------------------------
# reparameterize


def test_fused_without_bn_is_the_plain_network_again():
    plain = build()
    model = build()
    model.set_state_dict(plain.state_dict())
    replace(model, "RefConv2D", init="xavier")
    state = state_of(model)
    fused, report = reparameterize(model)
    assert [path for path, _ in report.touched] == ["stem", "blocks.0.0", "blocks.2.0"]
    assert {k: v.shape for k, v in fused.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert [type(layer) for layer in fused.sublayers()] == [type(layer) for layer in plain.sublayers()]
    assert report.left_over == {"BNs": 3}
    assert verify(model, fused, SPEC).passed
    x = paddle.randn([2, 3, 9, 8])
    assert relative_error(model(x), plain(x)) > 1e-2
    assert_same_state(model, state)
    assert isinstance(model.stem, RefConv2D)


def test_float64_networks_fuse_to_float64_accuracy():
    paddle.set_default_dtype("float64")
    model = build()
    replace(model, "RefConv2D", init="xavier")
    fused, report = reparameterize(model, fold_bn=True, input_spec=SPEC)
    assert report.left_over == {}
    assert verify(model, fused, SPEC, tolerance=1e-12).passed


def test_folding_follows_the_data_not_the_names():
    class Crossed(nn.Layer):
        """Registered next to each other: a and bn. Following each other: nothing but c and bn."""

        def __init__(self):
            super().__init__()
            self.c = nn.Conv2D(3, 4, 3, padding=1)
            self.a = nn.Conv2D(3, 4, 3, padding=1)
            self.bn = nn.BatchNorm2D(4)

        def forward(self, x):
            return self.a(x) + self.bn(self.c(x))

    model = build(Crossed)
    fused, report = reparameterize(model, fold_bn=True, input_spec=[[None, 3, 7, 7]])
    assert report.touched == [("bn", "folded into c")]
    assert isinstance(fused.bn, nn.Identity)
    np.testing.assert_array_equal(fused.a.weight.numpy(), model.a.weight.numpy())
    assert verify(model, fused, [[None, 3, 7, 7]]).passed


class Trap(nn.Layer):
    """A conv and a BN between which something else happens."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2D(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2D(3)
        self.other = nn.Conv2D(3, 3, 1)
        if kind == "tied":
            self.other.weight = self.other.create_parameter([3, 3, 3, 3])
            self.other = nn.Conv2D(3, 3, 3, padding=1)
            self.other.weight = self.conv.weight
        if kind == "hook":
            self.bn.register_forward_post_hook(lambda layer, args, out: out + 1)
        if kind == "batch statistics":
            self.bn = nn.BatchNorm2D(3, use_global_stats=False)

    def forward(self, x):
        y = self.conv(x)
        if self.kind == "read twice":
            return self.bn(y) + self.other(y)
        if self.kind == "returned too":
            return self.bn(y), y
        if self.kind == "changed in place":
            y = F.relu_(y)
        if self.kind == "conv called twice":
            return self.bn(y) + self.conv(x * 2)
        if self.kind == "BN called twice":
            return self.bn(y) + self.bn(self.other(x))
        if self.kind == "activation between":
            y = F.relu(y)
        if self.kind == "BN unused":
            return y
        return self.other(F.sigmoid(self.bn(y)))


@pytest.mark.parametrize(
    "kind",
    [
        "read twice", "returned too", "changed in place", "conv called twice", "BN called twice", "activation between",
        "BN unused", "tied", "hook", "batch statistics",
    ],
)  # fmt: skip
def test_a_bn_that_cannot_be_folded_is_named_and_left(kind):
    model = build(Trap, kind)
    with pytest.raises(ReparamError, match="nothing to fuse"):
        reparameterize(model, fold_bn=True, input_spec=[[None, 3, 6, 6]])
    replaced = build(Trap, kind)
    if kind == "tied":
        return
    replace(replaced, "RefConv2D", where="conv", init="xavier")
    fused, report = reparameterize(replaced, fold_bn=True, input_spec=[[None, 3, 6, 6]])
    assert [path for path, _ in report.skipped] == ["bn"]
    assert report.left_over == {"BNs": 1}
    assert verify(replaced, fused, [[None, 3, 6, 6]]).passed


class NormsInFront(nn.Layer):
    """A residual network in the style of transformers: each norm is read by a linear layer alone, or not."""

    def __init__(self, groups=1, read_twice=False, padding=0):
        super().__init__()
        self.bn = nn.BatchNorm2D(4)
        self.conv = nn.Conv2D(4, 8, 1, groups=groups, padding=padding, bias_attr=False)
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 6)
        self.read_twice = read_twice
        for parameter in (self.norm.weight, self.norm.bias):
            parameter.set_value(paddle.randn(parameter.shape))

    def forward(self, x):
        normed = self.bn(F.relu(x))
        y = self.norm(self.conv(normed).transpose([0, 2, 3, 1]))
        z = self.linear(y)
        return z + (y[..., :6] + normed.mean() if self.read_twice else 0)


@pytest.mark.parametrize("groups", [1, 2])
def test_norms_fold_into_the_layer_that_reads_them(groups):
    spec = [[None, 4, 6, 5]]
    model = build(NormsInFront, groups)
    fused, report = reparameterize(model, fold_bn=True, input_spec=spec)
    assert report.touched == [
        ("bn", "folded into conv, which reads it"),
        ("norm", "folded into linear, which reads it"),
    ]
    assert report.skipped == []
    assert report.left_over == {}
    assert not list(fused.norm.parameters())
    assert model.norm.weight is not None
    proof = verify(model, fused, spec)
    assert proof.passed
    assert proof.layers >= 3
    fused.conv.bias.set_value(fused.conv.bias + 1)
    assert verify(model, fused, spec).first_difference == "conv"


@pytest.mark.parametrize("options", [{"read_twice": True}, {"padding": 1}])
def test_norms_with_another_reader_or_padding_behind_them_stay(options):
    spec = [[None, 4, 6, 5]]
    model = build(NormsInFront, **options)
    if "padding" in options:
        _, report = reparameterize(model, fold_bn=True, input_spec=spec)
        assert [path for path, _ in report.touched] == ["norm"]
        assert [path for path, _ in report.skipped] == ["bn"]
        return
    with pytest.raises(ReparamError, match="nothing to fuse"):
        reparameterize(model, fold_bn=True, input_spec=spec)


def test_inference_forms_take_the_form_for_one_size():
    class Smaller(InferenceForm):
        def forward(self, x):
            return x * 2

    class Scale(InferenceForm):
        def forward(self, x):
            return x + x

        def for_size(self, height, width, form=None):
            return Smaller() if (height, width) == (6, 5) else None

    model = build(nn.Sequential, nn.Conv2D(4, 4, 1), Scale(), nn.MaxPool2D(2), Scale())
    fused, report = reparameterize(model, fixed_size=True, input_spec=[[None, 4, 6, 5]])
    assert [path for path, _ in report.touched] == ["1"]
    assert "6x5" in report.touched[0][1]
    assert isinstance(fused[1], Smaller)
    assert isinstance(fused[3], Scale)
    assert isinstance(model[1], Scale)


FOLDED = [
    (nn.Conv1D, nn.BatchNorm1D, {"groups": 2}, [4, 9]),
    (nn.Conv1D, nn.BatchNorm1D, {"data_format": "NLC"}, [9, 4]),
    (nn.Conv1DTranspose, nn.BatchNorm1D, {"groups": 2, "stride": 2, "output_padding": 1}, [4, 9]),
    (nn.Conv2DTranspose, nn.BatchNorm2D, {"groups": 2, "stride": 2, "output_padding": 1, "dilation": 2}, [4, 9, 8]),
    (nn.Conv2DTranspose, nn.BatchNorm2D, {"stride": 2, "padding": [0, 1, 1, 2], "data_format": "NHWC"}, [9, 8, 4]),
    (nn.Conv2DTranspose, nn.BatchNorm2D, {"stride": 2, "padding": "SAME"}, [4, 9, 8]),
    (nn.Conv3D, nn.BatchNorm3D, {"groups": 2}, [4, 5, 6, 4]),
    (nn.Conv3DTranspose, nn.BatchNorm3D, {"groups": 2, "stride": 2}, [4, 3, 2, 3]),
    (nn.Conv3DTranspose, nn.BatchNorm3D, {"data_format": "NDHWC"}, [3, 2, 3, 4]),
    (nn.Linear, nn.BatchNorm1D, {}, [4]),
    (nn.Linear, nn.BatchNorm1D, {"data_format": "NLC"}, [6, 4]),
]


@pytest.mark.parametrize(("layer", "norm", "options", "shape"), FOLDED, ids=lambda v: getattr(v, "__name__", str(v)))
@pytest.mark.parametrize("bias", [None, False])
def test_a_bn_folds_into_whatever_convolves(layer, norm, options, shape, bias):
    formats = {k: v for k, v in options.items() if k == "data_format"}
    sizes = (4, 6) if layer is nn.Linear else (4, 6, 3)
    options = {} if layer is nn.Linear else options
    model = nn.Sequential(layer(*sizes, bias_attr=bias, **options), norm(6, **formats), nn.ReLU())
    model.to(dtype="float64")
    randomise_batch_norms(model, 1)
    if bias is None:
        model[0].bias.set_value(paddle.randn([6], "float64"))
    model.eval()
    state = state_of(model)
    fused, report = reparameterize(model, fold_bn=True, input_spec=[[None, *shape]])
    assert (report.touched, report.skipped, report.left_over) == ([("1", "folded into 0")], [], {})
    x = paddle.randn([2, *shape], "float64")
    assert relative_error(fused(x), model(x)) < 1e-12
    assert verify(model, fused, [[None, *shape]], tolerance=1e-12).passed
    assert_same_state(model, state)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Linear(4, 6), [6, 4]),
        (lambda: nn.Conv2D(4, 6, 3, data_format="NHWC"), [8, 8, 4]),
        (lambda: nn.Conv2DTranspose(4, 6, 3, data_format="NHWC"), [4, 4, 4]),
    ],
    ids=["Linear", "Conv2D", "Conv2DTranspose"],
)
def test_a_bn_along_another_axis_stays(layer, shape):
    """As many numbers along one axis as channels: folding would compute something else, and fit."""
    norm = nn.BatchNorm1D(6) if len(shape) == 2 else nn.BatchNorm2D(6)
    with pytest.raises(ReparamError, match="1: it normalises along another axis than that of the channels of 0"):
        reparameterize(build(nn.Sequential, layer(), norm), fold_bn=True, input_spec=[[None, *shape]])


def test_a_bn_behind_what_may_do_more_than_a_convolution_is_left_with_that_reason():
    class Halved(nn.Conv2DTranspose):
        def forward(self, x):
            return super().forward(x) / 2

    hooked = nn.Conv2D(4, 4, 3)
    hooked.register_forward_pre_hook(lambda layer, args: None)
    model = build(nn.Sequential, Halved(4, 4, 3), nn.BatchNorm2D(4), hooked, nn.BatchNorm2D(4), RefConv2D(4, 4, 3))
    model[4].weight.set_value(paddle.randn([4, 4, 3, 3]))
    fused, report = reparameterize(model, fold_bn=True, input_spec=[[None, 4, 9, 8]])
    reasons = dict(report.skipped)
    assert "0, which it follows, is a Halved, whose forward may do more" in reasons["1"]
    assert "forward hooks on it or on its convolution" in reasons["3"]
    assert verify(model, fused, [[None, 4, 9, 8]]).passed


def test_folding_does_not_depend_on_the_caller_s_gradients():
    model = build()
    for parameter in model.parameters():
        parameter.stop_gradient = True
    with paddle.no_grad():
        _, report = reparameterize(model, fold_bn=True, input_spec=SPEC)
    assert report.left_over == {}


def test_old_batch_norm_keeps_its_activation():
    model = build(
        nn.Sequential, nn.Conv2D(3, 4, 3, data_format="NHWC"), nn.BatchNorm(4, act="relu", data_layout="NHWC")
    )
    fused, report = reparameterize(model, fold_bn=True, input_spec=[[None, 9, 7, 3]])
    assert report.touched == [("1", "folded into 0")]
    assert verify(model, fused, [[None, 9, 7, 3]]).passed
    assert float(fused(paddle.randn([1, 9, 7, 3])).min()) == 0.0


def test_a_bn_behind_an_inference_form_goes_into_it():
    model = build(nn.Sequential, SPConv2D(8, 12), nn.BatchNorm2D(12), nn.Conv2D(12, 4, 1))
    fused, report = reparameterize(model, fold_bn=True, input_spec=[[None, 8, 7, 7]])
    assert report.touched[-1] == ("1", "folded into 0")
    assert report.left_over == {"inference forms": 1}
    assert verify(model, fused, [[None, 8, 7, 7]]).passed


def test_the_root_itself_can_be_a_layer():
    layer = RefConv2D.from_conv(nn.Conv2D(3, 4, 3))
    layer.eval()
    fused, report = reparameterize(layer)
    assert type(fused) is nn.Conv2D
    assert len(report.touched) == 1


def test_training_mode_and_nothing_to_fuse_are_refused():
    model = build()
    with pytest.raises(ReparamError, match="Net has nothing to fuse.*fold_bn=True"):
        reparameterize(model)
    model.train()
    with pytest.raises(ReparamError, match=r"training mode; call model.eval\(\)"):
        reparameterize(model)
    model.eval()
    replace(model, "RefConv2D", init="zero")
    fused, _ = reparameterize(model)
    with pytest.raises(ReparamError, match="nothing to fuse"):
        reparameterize(fused)
    model.stem.train()
    with pytest.raises(ReparamError, match="stem: RefConv2D is in training mode"):
        reparameterize(model)


def test_a_layer_with_hooks_is_refused_by_name():
    model = build()
    replace(model, "RefConv2D", where="stem", init="zero")
    model.stem.register_forward_post_hook(lambda layer, args, out: out)
    with pytest.raises(ReparamError, match="stem: it has forward hooks"):
        reparameterize(model)


def test_hooks_that_close_over_the_model_speak_of_the_copy():
    class Counting(Net):
        def __init__(self):
            super().__init__()
            self.seen = 0

            def count(layer, args):
                self.seen += 1

            self.register_forward_pre_hook(count)

    model = build(Counting)
    replace(model, "RefConv2D", init="zero")
    fused, _ = reparameterize(model)
    fused(paddle.randn([1, 3, 9, 8]))
    assert (model.seen, fused.seen) == (0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks that fuse themselves, as PaddleClas' do


class ForeignBlock(nn.Layer):
    """Two branches and a scale; fused in place by the name that one PaddleClas release or the other gives it."""

    def __init__(self, fault=False):
        super().__init__()
        self.fault = fault
        self.is_repped = False
        self.large = nn.Conv2D(4, 4, 3, padding=1, bias_attr=False)
        self.small = nn.Conv2D(4, 4, 1, bias_attr=False)

    def forward(self, x):
        if self.is_repped:
            return self.merged(x) * (1.0 if self.fault else 2.0)
        return (self.large(x) + self.small(x)) * 2.0

    def _merge(self):
        merged = nn.Conv2D(4, 4, 3, padding=1, bias_attr=False)
        merged.weight.set_value(self.large.weight + F.pad(self.small.weight, [1, 1, 1, 1]))
        self.merged = merged
        self.is_repped = True


class Rep24Block(ForeignBlock):
    def rep(self):
        self._merge()


class Rep26Block(ForeignBlock):
    def re_parameterize(self):
        self._merge()


@pytest.mark.parametrize("block", [Rep24Block, Rep26Block])
def test_foreign_blocks_are_fused_and_their_dead_branches_dropped(block):
    model = build(nn.Sequential, nn.Conv2D(3, 4, 3), block(), nn.ReLU())
    fused, report = reparameterize(model, fold_bn=True, input_spec=[[None, 3, 8, 8]])
    assert report.touched[0][0] == "1"
    assert dict(report.touched)["1.large"] == "training branch dropped, 144 parameters"
    assert sum(p.size for p in fused[1].parameters()) == 144
    assert verify(model, fused, [[None, 3, 8, 8]]).passed
    assert not model[1].is_repped


def test_a_wrong_foreign_block_is_found_by_name():
    model = build(nn.Sequential, nn.Conv2D(3, 4, 3), nn.Sequential(Rep26Block(), Rep26Block(fault=True)), nn.ReLU())
    fused, _ = reparameterize(model)
    report = verify(model, fused, [[None, 3, 8, 8]])
    assert not report.passed
    assert report.first_difference == "1.1"
    with pytest.raises(ReparamError, match=r"relative error 5.0e-01 .*first at layer '1\.1'"):
        report.raise_if_failed("the fused network")


def test_a_foreign_block_that_fails_is_named():
    class Broken(ForeignBlock):
        def rep(self):
            raise TypeError("float64 is not float32")

    with pytest.raises(ReparamError, match=r"^1: Broken.rep\(\) .*failed: float64 is not float32"):
        reparameterize(build(nn.Sequential, nn.ReLU(), Broken()))


def test_a_copy_may_share_the_tensors_but_not_the_layers():
    net = nn.Sequential(nn.Conv2D(3, 4, 1), nn.BatchNorm2D(4))
    for share in (True, False):
        copied = copy_model(net, share_tensors=share)
        assert not {id(layer) for layer in copied.sublayers()} & {id(layer) for layer in net.sublayers()}
        for name, tensor in copied.state_dict().items():
            assert (tensor is net.state_dict()[name]) == share, name


def test_a_compiled_network_is_refused():
    """It would go on computing the layers that it had when it was compiled."""
    network = nn.Sequential(nn.Conv2D(3, 4, 3), nn.BatchNorm2D(4))
    network.eval()
    compiled = paddle.jit.to_static(nn.Sequential(network), full_graph=True)
    compiled.eval()
    for call in (
        lambda: replace(compiled, "RefConv2D"),
        lambda: reparameterize(compiled, fold_bn=True, input_spec=[[None, 3, 8, 8]]),
    ):
        with pytest.raises(ReparamError, match="compiled by paddle.jit.to_static"):
            call()
    reparameterize(network, fold_bn=True, input_spec=[[None, 3, 8, 8]])
