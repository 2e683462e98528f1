"""RepMLP: "Re-parameterizing Convolutions into Fully-connected Layers for Image Recognition" (arXiv 2105.01883).

The first paper's layer; the second paper's (RepMLPNet) is in `repmlpnet.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ..arithmetic import kernels
from ..arithmetic.geometry import ConvGeometry, absorb_affine_into, fold_into, linear_behind, read_bn_affine
from ..arithmetic.initializers import uniform_fan_in
from ..arithmetic.tensors import assign, to_float64
from ..errors import ReparamError, UnsupportedConv
from ..registry import register_layer
from .base import FLAG, POSITIVE, WHOLE, InferenceForm, ReparamLayer, or_none, several
from .partitions import grouped_linear, join_partitions, moved, pad_to_partitions, size_of, split_into_partitions

#: Numbers in a processor's widest vector: in groups of no multiple of it oneDNN's convolution loses at larger batches.
VECTOR = 16


class RepMLPFused(InferenceForm):
    """A fused `RepMLP`: three fully connected layers, `[N, C, H, W]` to `[N, O, H, W]` for one H and W.

    FC1 and FC2 see the partitions' averages and are None where there is no Global Perceptron. FC3 is one batched
    matrix product over the groups; `weight` is `[groups, C * h * w / groups, O * h * w / groups]`, so that no product
    has to transpose it, and `bias` `[groups, O * h * w / groups]`.
    """

    def __init__(
        self,
        size: tuple[int, int],
        partition: tuple[int, int],
        fc1: nn.Linear | None,
        fc2: nn.Linear | None,
        weight: np.ndarray,
        bias: np.ndarray,
        dtype: str,
        relu: bool = False,
    ) -> None:
        super().__init__()
        self.size = size
        self.partition = partition
        self.relu = relu
        self.out_channels = bias.size // (partition[0] * partition[1])
        self.fc1 = fc1
        self.fc2 = fc2
        zeros = nn.initializer.Constant(0.0)
        self.weight = self.create_parameter(list(weight.shape), dtype=dtype, default_initializer=zeros)
        self.bias = self.create_parameter(list(bias.shape), dtype=dtype, default_initializer=zeros)
        assign(self.weight, weight)
        assign(self.bias, bias)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        _check_size(x, self.size)
        channels, (height, width) = x.shape[1], self.partition
        parts = split_into_partitions(x, *self.partition)
        count = parts.shape[2]
        if self.fc1 is not None:
            averages = F.avg_pool2d(pad_to_partitions(x, *self.partition), self.partition, self.partition)
            values = self.fc2(F.relu(self.fc1(paddle.flatten(averages, 1))))
            parts = parts + values.reshape([-1, channels, count, 1])
        groups, inputs, _ = self.weight.shape
        parts = parts.reshape([-1, groups, channels // groups, count, height * width])
        out = paddle.matmul(moved(parts, [1, 0, 3, 2, 4], [groups, -1, inputs]), self.weight) + self.bias.unsqueeze(1)
        out = F.relu(out) if self.relu else out
        out = out.reshape([groups, -1, count, self.out_channels // groups, height * width])
        out = moved(out, [1, 0, 3, 2, 4], [-1, self.out_channels, count, height * width])
        return join_partitions(out, self.out_channels, self.partition, self.size)

    def absorb_affine(self, scale: np.ndarray, shift: np.ndarray) -> None:
        """Make this layer compute scale * out + shift per channel: the rows of FC3 and its bias take both."""
        _refuse_behind_relu(self.relu)
        area = self.partition[0] * self.partition[1]
        scale, shift = (np.repeat(np.asarray(v, np.float64), area).reshape(self.bias.shape) for v in (scale, shift))
        assign(self.weight, to_float64(self.weight) * scale[:, None])
        assign(self.bias, to_float64(self.bias) * scale + shift)

    def for_size(self, height: int, width: int, form: str | None = None) -> RepMLPFitted | None:
        """Return a layer whose FC3 is a convolution, where its groups are whole vectors; elsewhere this is faster."""
        _, inputs, outputs = self.weight.shape
        return None if inputs % VECTOR or outputs % VECTOR else RepMLPFitted(self)


class RepMLPFitted(InferenceForm):
    """A `RepMLPFused` for oneDNN: all of its layers are convolutions, `[N, C, H, W]` to `[N, O, H, W]`.

    FC3 is a 1x1 convolution in groups over one image, whose pixels are the partitions of all images. oneDNN lays the
    weights of a convolution out once, and copies those of a matrix product at every call; where FC3 is as slow as the
    memory that it is read from, that is most of its time. FC1 is as large as the map of averages, FC2 1x1. What FC2
    puts out, a number for all pixels of a partition's channel, is one more input of FC3 for each channel, whose
    weights are the sums of those of the pixels.
    """

    # Adding the numbers to the pixels raised in Paddle Inference's bfloat16, and a convolution of their own beside FC3
    # did so in a .pdmodel. FC3 as a convolution with the kernel and the stride of a partition needs no first
    # transposition, but took twice as long for 8 images (128 channels of 14x14 pixels, 4 groups, one thread: 49 ms
    # instead of 24 in Paddle Inference, 46 instead of 23 in onnxruntime, 65 instead of 26 in OpenVINO); and OpenVINO
    # 2026.4 in bfloat16 computed one of 8 groups of 8 channels wrongly.

    def __init__(self, fused: RepMLPFused) -> None:
        super().__init__()
        self.size, self.partition, self.relu = fused.size, fused.partition, fused.relu
        groups, _, outputs = fused.weight.shape
        area = self.partition[0] * self.partition[1]
        self.out_channels = fused.out_channels
        counts = tuple(-(-side // part) for side, part in zip(self.size, self.partition))
        dtype = fused.weight.dtype
        weight = to_float64(fused.weight).reshape(groups, -1, area, outputs)
        self.channels = groups * weight.shape[1]
        self.fc1 = self.fc2 = None
        if fused.fc1 is not None:
            self.fc1 = _as_conv(to_float64(fused.fc1.weight), to_float64(fused.fc1.bias), dtype, counts)
            self.fc2 = _as_conv(to_float64(fused.fc2.weight), to_float64(fused.fc2.bias), dtype)
            weight = np.concatenate([weight, weight.sum(axis=2, keepdims=True)], axis=2)
        weight = weight.transpose(1, 2, 0, 3).reshape(-1, groups * outputs)
        self.fc3 = _as_conv(weight, to_float64(fused.bias), dtype, groups=groups)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        _check_size(x, self.size)
        area = self.partition[0] * self.partition[1]
        parts = split_into_partitions(x, *self.partition)
        count, order, inputs = parts.shape[2], [1, 3, 0, 2], [1, self.fc3.weight.shape[1] * self.fc3._groups, -1, 1]
        if self.fc1 is None:
            rows = moved(parts, order, inputs)
        else:
            averages = F.avg_pool2d(pad_to_partitions(x, *self.partition), self.partition, self.partition)
            values = self.fc2(F.relu(self.fc1(averages))).reshape([-1, self.channels, 1, count])
            rows = paddle.concat([parts.transpose(order), values.transpose([1, 2, 0, 3])], axis=1).reshape(inputs)
        y = self.fc3(rows)
        # Here, and not behind the transposition, oneDNN takes it into the convolution.
        y = F.relu(y) if self.relu else y
        y = moved(y.reshape([self.out_channels, area, -1, count]), [2, 0, 3, 1], [-1, self.out_channels, count, area])
        return join_partitions(y, self.out_channels, self.partition, self.size)

    def absorb_affine(self, scale: np.ndarray, shift: np.ndarray) -> None:
        """Make this layer compute scale * out + shift per channel: the rows of FC3 and its bias take both."""
        _refuse_behind_relu(self.relu)
        area = self.partition[0] * self.partition[1]
        absorb_affine_into(self.fc3, np.repeat(scale, area), np.repeat(shift, area))

    def extra_repr(self) -> str:
        return f"{self.channels}->{self.out_channels}, partitions of {self.partition[0]}x{self.partition[1]}"


@register_layer(untestable="it is built for maps of one size; tests/test_repmlp.py checks the same promises")
class RepMLP(ReparamLayer):
    """Three fully connected layers over the partitions of a map, trained with convolutions beside the last one.

    `[N, in_channels, H, W]` to `[N, out_channels, H, W]`, for this one H and W, in partitions of h x w pixels:

        Global Perceptron     P' = P + FC2(ReLU(FC1(BN(averages of all partitions))))      only where there are several
        Partition Perceptron  y = BN(FC3(P')), FC3 in `fc3_groups` groups from C * h * w to O * h * w
        Local Perceptron      out = y + sum over k of BN_k(conv_k(P')), k in `reparam_conv_k`, in the same groups

    FC1 has the averages' number of outputs divided by `fc1_fc2_reduction`. FC3 sees a partition in (channel, row,
    column) order. Where h or w does not divide H or W, the map gets zeros at the bottom and right; they count like
    pixels, also in the averages, and their places are cut off at the end.

    For ablations: `reparam_conv_k=()` leaves the Local Perceptron out, `global_perceptron=False` the global one, and
    `fc3_conv_k=k` puts a kxk convolution with its BN in FC3's place. All of them fuse to the same form. With `relu` the
    layer puts max(out, 0) out: where a ReLU follows, it costs least here.

    FC3's weights start from a normal distribution of variance 1 / max(its inputs per group, its outputs), which is that
    of the orthogonal matrix that the authors start from; to orthogonalise takes seconds for one layer of ResNet50.

    Raises `UnsupportedConv` for channels that cannot be split into the groups, `ReparamError` for kernels, partitions
    and reductions that make no layer and, at a call, for a map of another size.
    """

    fused_type = RepMLPFused
    options = {  # noqa: RUF012
        "height": or_none(WHOLE), "width": or_none(WHOLE), "partition": several(WHOLE, 2),
        "reparam_conv_k": several(WHOLE), "fc1_fc2_reduction": POSITIVE, "fc3_groups": WHOLE,
        "global_perceptron": FLAG, "fc3_conv_k": or_none(WHOLE), "relu": FLAG,
    }  # fmt: skip
    keeps_function_with = None
    train_form_keys = ("fc3.weight", "fc3_bn.weight")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        H: int,
        W: int,
        h: int,
        w: int,
        reparam_conv_k: Sequence[int] = (1, 3, 5),
        fc1_fc2_reduction: float = 1,
        fc3_groups: int = 1,
        global_perceptron: bool = True,
        fc3_conv_k: int | None = None,
        relu: bool = False,
    ) -> None:
        super().__init__()
        self.relu = relu
        self.size, self.partition = (H, W), (h, w)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.fc3_groups = fc3_groups
        self.reparam_conv_k = tuple(reparam_conv_k)
        self.fc3_is_conv = fc3_conv_k is not None
        _check_channels(in_channels, out_channels, fc3_groups)
        _check_kernels(self.reparam_conv_k, fc3_conv_k)
        if not (1 <= h <= H and 1 <= w <= W):
            raise ReparamError(f"partitions of {h}x{w} do not lie in a map of {H}x{W}; choose smaller ones")

        self.avg = self.fc1_fc2 = None
        if global_perceptron and self.size != self.partition:
            averages = in_channels * -(-H // h) * -(-W // w)
            hidden = int(averages // fc1_fc2_reduction)
            if hidden < 1:
                raise ReparamError(f"fc1_fc2_reduction={fc1_fc2_reduction} leaves nothing of {averages} averages")
            self.avg = nn.Sequential(("avg", nn.AvgPool2D((h, w))), ("bn", nn.BatchNorm2D(in_channels)))
            fc1, fc2 = nn.Linear(averages, hidden), nn.Linear(hidden, averages)
            self.fc1_fc2 = nn.Sequential(("fc1", fc1), ("relu", nn.ReLU()), ("fc2", fc2))
        if fc3_conv_k is None:
            inputs, outputs = in_channels * h * w, out_channels * h * w
            deviation = max(inputs // fc3_groups, outputs) ** -0.5
            self.fc3 = nn.Conv2D(
                inputs, outputs, 1, groups=fc3_groups, bias_attr=False,
                weight_attr=nn.initializer.Normal(0.0, deviation),
            )  # fmt: skip
            self.fc3_bn = nn.BatchNorm1D(outputs)
        else:
            self.fc3 = _same_conv(in_channels, out_channels, fc3_conv_k, fc3_groups)
            self.fc3_bn = nn.BatchNorm2D(out_channels)
        for k in self.reparam_conv_k:
            conv = _same_conv(in_channels, out_channels, k, fc3_groups)
            setattr(self, f"repconv{k}", nn.Sequential(("conv", conv), ("bn", nn.BatchNorm2D(out_channels))))

    @classmethod
    def build(
        cls,
        geometry: ConvGeometry,
        height: int | None = None,
        width: int | None = None,
        partition: Sequence[int] = (7, 7),
        **options: Any,
    ) -> RepMLP:
        """Return a layer in the place of a "same" convolution of stride 1 that gets maps of height x width pixels.

        `options` are those of `RepMLP`; `fc3_groups` is the convolution's number of groups unless given. Nothing of the
        convolution's weights can be kept; a BN that follows the convolution stays after this layer.
        """
        if height is None or width is None:
            raise ReparamError("RepMLP is built for maps of one size: give the options height and width, in pixels")
        k_h, k_w = geometry.kernel_size
        same = (k_h // 2, k_h // 2, k_w // 2, k_w // 2)
        plain = geometry.padding_mode == "zeros" and geometry.data_format == "NCHW"
        if geometry.stride != (1, 1) or not k_h % 2 or not k_w % 2 or not plain:
            raise UnsupportedConv(
                "RepMLP stands in for NCHW convolutions of stride 1 with odd kernels and zero padding, this one is "
                f" {geometry} ({geometry.padding_mode}, {geometry.data_format})"
            )
        if geometry.dilation != (1, 1) or geometry.padding != same:
            raise UnsupportedConv(
                f"RepMLP gives maps of the size that it gets, without dilation; this one is {geometry} with padding "
                f"{geometry.padding}"
            )
        options.setdefault("fc3_groups", geometry.groups)
        layer = cls(geometry.in_channels, geometry.out_channels, height, width, *partition, **options)
        layer.to(dtype=geometry.dtype)
        return layer

    def extra_repr(self) -> str:
        sizes = "{}x{}, partitions of {}x{}".format(*self.size, *self.partition)
        return f"{self.in_channels}->{self.out_channels}, maps of {sizes}, convolutions {list(self.reparam_conv_k)}"

    def forward_train_form(self, x: paddle.Tensor) -> paddle.Tensor:
        _check_size(x, self.size)
        parts = split_into_partitions(x, *self.partition)
        count, area = parts.shape[2:]
        if self.fc1_fc2 is not None:
            averages = self.avg(pad_to_partitions(x, *self.partition))
            values = self.fc1_fc2(paddle.flatten(averages, 1))
            parts = parts + values.reshape([-1, self.in_channels, count, 1])
        parts = moved(parts, [0, 2, 1, 3], [-1, self.in_channels, *self.partition])
        out = self._partition_perceptron(parts)
        for k in self.reparam_conv_k:
            out = out + getattr(self, f"repconv{k}")(parts)
        out = F.relu(out) if self.relu else out
        out = moved(out.reshape([-1, count, self.out_channels, area]), [0, 2, 1, 3], [-1, count, area])
        return join_partitions(out, self.out_channels, self.partition, self.size)

    def _partition_perceptron(self, parts: paddle.Tensor) -> paddle.Tensor:
        """`[N, C, h, w]` to `[N, O, h, w]`."""
        if self.fc3_is_conv:
            return self.fc3_bn(self.fc3(parts))
        inputs = self.fc3.weight.shape[1]
        flat = grouped_linear(parts.reshape([-1, self.fc3_groups, inputs]), self.fc3.weight)
        outputs = self.fc3.weight.shape[0]
        return self.fc3_bn(flat.reshape([-1, outputs])).reshape([-1, self.out_channels, *self.partition])

    def fuse(self) -> RepMLPFused:
        branches = [(branch.conv, branch.bn) for branch in (getattr(self, f"repconv{k}") for k in self.reparam_conv_k)]
        area = self.partition[0] * self.partition[1]
        shape = (self.out_channels * area, self.in_channels * area // self.fc3_groups)
        weight, bias = np.zeros(shape), np.zeros(shape[0])
        if self.fc3_is_conv:
            branches.append((self.fc3, self.fc3_bn))
        else:
            fc3_weight, bias = fold_into(self.fc3, *read_bn_affine(self.fc3_bn))
            weight = fc3_weight.reshape(shape)
        if branches:
            folded = [fold_into(conv, *read_bn_affine(bn)) for conv, bn in branches]
            kernel = kernels.sum_kernels([kernel for kernel, _ in folded])
            weight = weight + kernels.conv_as_linear(kernel, *self.partition)
            bias = bias + np.repeat(sum(bias for _, bias in folded), area)
        weight = weight.reshape(self.fc3_groups, -1, shape[1]).transpose(0, 2, 1)
        bias = bias.reshape(self.fc3_groups, -1)
        fc1 = fc2 = None
        if self.fc1_fc2 is not None:
            fc1 = linear_behind(self.fc1_fc2.fc1, *read_bn_affine(self.avg.bn))
            fc2 = _copied(self.fc1_fc2.fc2)
        return RepMLPFused(self.size, self.partition, fc1, fc2, weight, bias, self.fc3.weight.dtype, self.relu)


def _refuse_behind_relu(relu: bool) -> None:
    if relu:
        raise UnsupportedConv("there is a ReLU between this layer and what is to be folded into it")


def _check_channels(in_channels: int, out_channels: int, groups: int) -> None:
    if in_channels % groups or out_channels % groups:
        raise UnsupportedConv(
            f"{in_channels} and {out_channels} channels cannot both be split into {groups} groups; choose fc3_groups "
            "so that it divides them"
        )


def _check_kernels(reparam_conv_k: Sequence[int], fc3_conv_k: int | None) -> None:
    sizes = [*reparam_conv_k, *([] if fc3_conv_k is None else [fc3_conv_k])]
    if any(k < 1 or k % 2 == 0 for k in sizes) or len(set(reparam_conv_k)) < len(reparam_conv_k):
        raise ReparamError(
            f"kernels of sizes {sizes} cannot stand beside each other: each must be odd, and none there twice"
        )


def _check_size(x: paddle.Tensor, size: tuple[int, int]) -> None:
    built, got = f"{size[0]}x{size[1]}", size_of(x)
    if got != built:
        raise ReparamError(
            f"this RepMLP is built for maps of {built} pixels and got maps of {got}; "
            "build the network for the size of its images"
        )


def _same_conv(in_channels: int, out_channels: int, k: int, groups: int) -> nn.Conv2D:
    # Paddle's own start does not know of groups: their kernels would be sqrt(groups) times too small.
    start = uniform_fan_in(in_channels // groups * k**2)
    return nn.Conv2D(
        in_channels, out_channels, k, padding=k // 2, groups=groups, bias_attr=False, weight_attr=start
    )  # fmt: skip


def _as_conv(
    weight: np.ndarray, bias: np.ndarray, dtype: str, size: tuple[int, int] = (1, 1), groups: int = 1
) -> nn.Conv2D:
    """Return a fully connected layer, `[inputs of a group, outputs]`, as a convolution without padding.

    The kernel has the height and width of `size`, its inputs the order (channel, row, column).
    """
    kernel = weight.T.reshape(weight.shape[1], -1, *size)
    zeros = nn.initializer.Constant(0.0)
    conv = nn.Conv2D(kernel.shape[1] * groups, len(kernel), size, groups=groups, weight_attr=zeros)
    conv.to(dtype=dtype)
    assign(conv.weight, kernel)
    assign(conv.bias, bias.reshape(-1))
    return conv


def _copied(linear: nn.Linear) -> nn.Linear:
    copied = nn.Linear(*linear.weight.shape, weight_attr=nn.initializer.Constant(0.0))
    copied.to(dtype=linear.weight.dtype)
    copied.set_state_dict(linear.state_dict())
    return copied
