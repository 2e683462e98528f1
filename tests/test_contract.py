"""The contract of a layer, run for every registered one; and for a toy layer whose seeded faults must all be found."""

import dataclasses

import contract
import numpy as np
import paddle
import pytest
from contract import CASES, CHECKS, Case
from paddle import nn

import paddle_reparam  # noqa: F401 - registers the layers
from paddle_reparam import registry
from paddle_reparam.arithmetic import kernels
from paddle_reparam.arithmetic.geometry import ConvGeometry, read_bn_affine
from paddle_reparam.arithmetic.tensors import assign, to_float64, type_name
from paddle_reparam.errors import UnsupportedConv
from paddle_reparam.layers.base import InferenceForm, ReparamLayer

ENTRIES = {name: registry.get_layer(name) for name in registry.list_layers()}
LAYERS = [
    pytest.param(
        entry.layer, id=name, marks=[pytest.mark.skip(reason=f"{name}: {entry.untestable}")] if entry.untestable else []
    )
    for name, entry in ENTRIES.items()
]
#: A convolution that most layers can stand in for.
COMMON = Case(8, 8, 3, {"padding": 1, "bias_attr": False})


def of_each_layer(test):
    return pytest.mark.parametrize("cls", LAYERS)(test)


@pytest.mark.parametrize("case", CASES, ids=str)
@of_each_layer
def test_a_layer_keeps_the_contract(cls, case):
    for check in CHECKS:
        check(cls, case)


@of_each_layer
def test_a_layer_supports_some_convolutions(cls):
    contract.check_supports_some(cls)


@of_each_layer
def test_a_layer_can_be_traced(cls):
    case = next((c for c in [COMMON, *CASES] if contract.build(cls, c) is not None), COMMON)
    contract.check_traces(cls, case)


@of_each_layer
def test_a_layer_that_reads_bfloat16_fuses_to_bfloat16(cls):
    layer = contract.ready(cls, COMMON, "float32")
    if layer is None:
        pytest.skip(f"{cls.__name__} does not support {COMMON}")
    layer.to(dtype="bfloat16")
    dtypes = {str(p.dtype) for p in layer.reparameterize().parameters()}
    assert dtypes == {"paddle.bfloat16"}


def test_a_layer_that_is_not_tested_here_says_why():
    for name, entry in ENTRIES.items():
        reason = entry.untestable
        assert reason is None or len(reason.split()) >= 4, f"{name} gives no reason: {reason!r}"


# --- The test of the tests ---------------------------------------------------------------------------------------


class ToyConv2D(ReparamLayer):
    """Two convolutions of the input, the second with a mask and a BN, added."""

    holders = {"weight": "plain", "bias": "offset"}  # noqa: RUF012
    keeps_function_with = {"silent": True}  # noqa: RUF012

    def __init__(self, geometry: ConvGeometry, silent: bool = False) -> None:
        super().__init__()
        self.geometry = geometry
        shape = list(geometry.weight_shape)
        normal = nn.initializer.Normal(0.0, 0.3)
        self.plain = self.create_parameter(shape, dtype=geometry.dtype, default_initializer=normal)
        self.normed = self.create_parameter(shape, dtype=geometry.dtype, default_initializer=normal)
        self.offset = self.create_parameter([geometry.out_channels], dtype=geometry.dtype, is_bias=True)
        self.register_buffer("mask", paddle.ones(shape, dtype=geometry.dtype))
        self.bn = nn.BatchNorm2D(geometry.out_channels, data_format=geometry.data_format)
        self.bn.to(dtype=geometry.dtype)
        if silent:
            self.bn.weight.set_value(paddle.zeros_like(self.bn.weight))

    @classmethod
    def build(cls, geometry, **options):
        return cls(geometry, **options)

    def forward_train_form(self, x):
        branch = self.bn(self.geometry.convolve(x, self.normed * self.mask, None))
        return self.geometry.convolve(x, self.plain, self.offset) + branch

    def extra_repr(self):
        return str(self.geometry)

    def fused_kernel(self):
        kernel = to_float64(self.normed * self.mask)
        kernel, bias = kernels.fold_affine(kernel, None, *read_bn_affine(self.bn))
        return kernel + to_float64(self.plain), bias + to_float64(self.offset)

    def fuse(self):
        dtype = type_name(self.plain)
        return dataclasses.replace(self.geometry, dtype=dtype).make_conv(*self.fused_kernel())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_toy_layer_keeps_the_contract(case):
    for check in CHECKS:
        check(ToyConv2D, case)


def test_the_toy_layer_supports_everything():
    contract.check_supports_some(ToyConv2D, len(CASES))


class ToyInferenceForm(InferenceForm):
    def __init__(self, conv: nn.Conv2D) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x)

    def absorb_affine(self, scale, shift):
        kernel, bias = kernels.fold_affine(to_float64(self.conv.weight), to_float64(self.conv.bias), scale, shift)
        assign(self.conv.weight, kernel)
        assign(self.conv.bias, bias)


class ToyDynamicConv2D(ToyConv2D):
    fused_type = ToyInferenceForm

    def fuse(self):
        return self.fused_type(super().fuse())


def test_the_toy_inference_form_keeps_the_contract():
    for check in CHECKS:
        check(ToyDynamicConv2D, COMMON)


class ForgetsTheShift(ToyDynamicConv2D):
    class fused_type(ToyInferenceForm):
        def absorb_affine(self, scale, shift):
            super().absorb_affine(scale, np.zeros_like(shift))


class AbsorbsOnlyOnce(ToyDynamicConv2D):
    class fused_type(ToyInferenceForm):
        def absorb_affine(self, scale, shift):
            if not hasattr(self, "absorbed"):
                super().absorb_affine(scale, shift)
            self.absorbed = True


class ForgetsTheMean(ToyConv2D):
    def fused_kernel(self):
        kernel, bias = super().fused_kernel()
        scale, _ = read_bn_affine(self.bn)
        return kernel, bias + to_float64(self.bn._mean) * scale


class ForgetsEpsilon(ToyConv2D):
    def fused_kernel(self):
        values = (to_float64(t) for t in (self.bn.weight, self.bn.bias, self.bn._mean, self.bn._variance))
        kernel, bias = kernels.fold_affine(to_float64(self.normed), None, *kernels.bn_affine(*values, 0.0))
        return kernel + to_float64(self.plain), bias + to_float64(self.offset)


class DropsTheBias(ToyConv2D):
    def fuse(self):
        return self.geometry.make_conv(self.fused_kernel()[0], None)


class SwapsHeightAndWidth(ToyConv2D):
    def fused_kernel(self):
        kernel, bias = super().fused_kernel()
        return kernel.swapaxes(2, 3), bias


class FusesInFloat32(ToyConv2D):
    def fused_kernel(self):
        return tuple(part.astype("float32") for part in super().fused_kernel())


class PadsWithZerosOnly(ToyConv2D):
    def fuse(self):
        return dataclasses.replace(self.geometry, padding_mode="zeros").make_conv(*self.fused_kernel())


class KeepsTheOldDtype(ToyConv2D):
    def fuse(self):
        return self.geometry.make_conv(*self.fused_kernel())


class ChangesItself(ToyConv2D):
    def fuse(self):
        fused = super().fuse()
        self.bn.weight.set_value(self.bn.weight * 2.0)
        return fused


class FusesInPlaceAlways(ToyConv2D):
    def fuse(self):
        self.fused = super().fuse()
        return self.fused


class SharesItsWeights(ToyConv2D):
    def fuse(self):
        fused = super().fuse()
        fused.bias = self.offset
        assign(self.offset, self.fused_kernel()[1])
        return fused


class StaysInTrainingMode(ToyConv2D):
    def reparameterize(self):
        fused = super().reparameterize()
        fused.train()
        return fused


class GivesItself(ToyConv2D):
    def fuse(self):
        return contract.copy.deepcopy(self)


class AllowsTrainingMode(ToyConv2D):
    def reparameterize(self):
        self.eval()
        return super().reparameterize()


class RepDoesNothing(ToyConv2D):
    def rep(self):
        pass


class FusesAgain(ToyConv2D):
    def re_parameterize(self):
        if self.is_repped:
            self.fused = self.reparameterize()
        super().re_parameterize()


class LeavesABuffer(ToyConv2D):
    def re_parameterize(self):
        mask = self.mask
        super().re_parameterize()
        self.register_buffer("mask", mask)


class LeavesTheBranches(ToyConv2D):
    def re_parameterize(self):
        self.fused = self.reparameterize()


class HandsOutItsOwnPart(ToyConv2D):
    def reparameterize(self):
        return self.fused if self.is_repped else super().reparameterize()


class HasADeadParameter(ToyConv2D):
    def __init__(self, geometry, **options):
        super().__init__(geometry, **options)
        self.unused = self.create_parameter([3], dtype=geometry.dtype)


class DetachesABranch(ToyConv2D):
    def forward_train_form(self, x):
        branch = self.bn(self.geometry.convolve(x, self.normed.detach(), None))
        return self.geometry.convolve(x, self.plain, self.offset) + branch


class KeepsAGraphTensor(ToyConv2D):
    def forward_train_form(self, x):
        self.last = super().forward_train_form(x)
        return self.last


class CachesTooLong(ToyConv2D):
    def forward_train_form(self, x):
        if self.training:
            return super().forward_train_form(x)
        if not hasattr(self, "cache"):
            self.cache = self.fused_kernel()
        weight, bias = (paddle.to_tensor(part.astype(type_name(x))) for part in self.cache)
        return self.geometry.convolve(x, weight, bias)


class HasStateOutsideItsStateDict(ToyConv2D):
    def __init__(self, geometry, **options):
        super().__init__(geometry, **options)
        self.register_buffer("gain", paddle.rand([1], dtype=geometry.dtype) + 1.0, persistable=False)

    def forward_train_form(self, x):
        return super().forward_train_form(x) * self.gain

    def fused_kernel(self):
        return tuple(part * to_float64(self.gain) for part in super().fused_kernel())


class ForgetsTheConvsBias(ToyConv2D):
    holders = {"weight": "plain"}  # noqa: RUF012


class SharesTheConvsWeight(ToyConv2D):
    def take_weights(self, conv):
        super().take_weights(conv)
        self.plain = conv.weight


class ForgetsHowItWasOptimized(ToyConv2D):
    def _take_attributes(self, conv):
        pass


class ThawsTheWeight(ToyConv2D):
    def _take_attributes(self, conv):
        super()._take_attributes(conv)
        self.plain.stop_gradient = False


class FreezesWhatIsNew(ToyConv2D):
    def _take_attributes(self, conv):
        super()._take_attributes(conv)
        self.normed.stop_gradient = conv.weight.stop_gradient


class LetsWhatIsNewMove(ToyConv2D):
    def _take_attributes(self, conv):
        super()._take_attributes(conv)
        self.normed.optimize_attr = {"learning_rate": max(self.normed.optimize_attr["learning_rate"], 0.25)}


class IgnoresTheConvsMode(ToyConv2D):
    @classmethod
    def from_conv(cls, conv, **options):
        layer = super().from_conv(conv, **options)
        layer.train()
        return layer


class AlwaysKeepsTheFunction(ToyConv2D):
    @classmethod
    def build(cls, geometry, silent=True):
        return cls(geometry, silent)


class BuildsInFloat32(ToyConv2D):
    @classmethod
    def build(cls, geometry, **options):
        return cls(dataclasses.replace(geometry, dtype="float32"), **options)


class IgnoresTheStride(ToyConv2D):
    @classmethod
    def build(cls, geometry, **options):
        stride = geometry.stride if geometry.padding == "SAME" else (1, 1)
        return cls(dataclasses.replace(geometry, stride=stride), **options)


class RefusesWithoutASentence(ToyConv2D):
    @classmethod
    def build(cls, geometry, **options):
        raise UnsupportedConv("groups")


class RefusesEverything(ToyConv2D):
    @classmethod
    def build(cls, geometry, **options):
        raise UnsupportedConv("it stands in for no convolution at all")


class CannotBeTraced(ToyConv2D):
    def forward_train_form(self, x):
        return super().forward_train_form(x) * float(np.sign(1.0 + x.numpy().max() ** 2))


FAULTS = {
    contract.check_fused_is_the_same_function: [
        ForgetsTheMean, ForgetsEpsilon, DropsTheBias, SwapsHeightAndWidth, FusesInFloat32, PadsWithZerosOnly,
        ChangesItself, FusesInPlaceAlways, SharesItsWeights, StaysInTrainingMode, GivesItself, IgnoresTheStride,
        BuildsInFloat32, RefusesWithoutASentence,
    ],
    contract.check_fused_follows_a_cast: [KeepsTheOldDtype],
    contract.check_fuses_in_place: [
        RepDoesNothing, FusesAgain, LeavesABuffer, LeavesTheBranches, HandsOutItsOwnPart,
    ],
    contract.check_absorbs_an_affine: [ForgetsTheShift, AbsorbsOnlyOnce],
    contract.check_copies_are_equal: [KeepsAGraphTensor, CachesTooLong, HasStateOutsideItsStateDict],
    contract.check_every_parameter_learns: [HasADeadParameter, DetachesABranch],
    contract.check_training_mode_is_refused: [AllowsTrainingMode],
    contract.check_starts_from_a_conv: [
        ForgetsTheConvsBias, SharesTheConvsWeight, IgnoresTheConvsMode, AlwaysKeepsTheFunction,
    ],
    contract.check_is_optimized_as_the_convolution_was: [
        ForgetsHowItWasOptimized, ThawsTheWeight, FreezesWhatIsNew, LetsWhatIsNewMove,
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("check", "faulty"),
    [(check, faulty) for check, layers in FAULTS.items() for faulty in layers],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_seeded_fault_is_found(check, faulty):
    def run():
        for case in CASES:
            check(faulty, case)

    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run()


def test_every_check_is_tried_on_a_fault():
    assert set(FAULTS) == set(CHECKS)


def test_a_layer_that_refuses_everything_is_found():
    with pytest.raises(AssertionError, match="supports only 0 of"):
        contract.check_supports_some(RefusesEverything)


def test_a_layer_that_cannot_be_traced_is_found():
    contract.check_traces(ToyConv2D, COMMON)
    with pytest.raises(Exception, match="numpy"):
        contract.check_traces(CannotBeTraced, COMMON)
