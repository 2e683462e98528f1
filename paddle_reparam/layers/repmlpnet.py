"""RepMLPBlock: "RepMLPNet: Hierarchical Vision MLP with Re-parameterized Locality" (CVPR 2022, arXiv 2112.11081)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ..arithmetic import kernels
from ..arithmetic.geometry import ConvGeometry, fold_into, read_bn_affine
from ..arithmetic.initializers import uniform_fan_in
from ..arithmetic.tensors import assign, sides, to_float64
from ..errors import ReparamError, UnsupportedConv
from ..registry import register_layer
from .base import WHOLE, InferenceForm, ReparamLayer, or_none, several
from .partitions import join_partitions, moved, partition_counts, size_of, split_into_partitions


class GlobalPerceptron(nn.Layer):
    """One factor in 0..1 for each channel: sigmoid(fc2(relu(fc1(GAP(x))))), `[N, C, H, W]` to `[N, C, 1, 1]`."""

    def __init__(self, channels: int, internal_neurons: int) -> None:
        super().__init__()
        self.fc1 = _conv(channels, internal_neurons, 1, bias=True)
        self.fc2 = _conv(internal_neurons, channels, 1, bias=True)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return F.sigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


class RepMLPBlockFused(InferenceForm):
    """A fused `RepMLPBlock`: out = gp(x) * (W_s p + b_s) for each partition p of a channel of set s.

    `[N, C, H, W]` in and out. `weight` is `[sets, h * w, h * w]`, from pixel to pixel, as the batched matrix product
    takes it; `bias` is `[sets, 1, h * w]`.
    """

    def __init__(
        self,
        gp: GlobalPerceptron,
        weight: np.ndarray,
        bias: np.ndarray,
        partition: tuple[int, int],
        published_order: bool,
        dtype: Any,
    ) -> None:
        super().__init__()
        self.partition = partition
        self.published_order = published_order
        self.gp = gp
        zeros = nn.initializer.Constant(0.0)
        self.weight = self.create_parameter(list(weight.shape), dtype=dtype, default_initializer=zeros)
        self.bias = self.create_parameter(list(bias.shape), dtype=dtype, default_initializer=zeros)
        assign(self.weight, weight)
        assign(self.bias, bias)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        sets = self.weight.shape[0]
        rows = _rows_by_set(x, sets, self.partition)
        y = paddle.matmul(rows, self.weight) + self.bias
        return _map_of_rows(y, x, self.partition, self.published_order) * self.gp(x)

    def absorb_affine(self, scale: np.ndarray, shift: np.ndarray) -> None:
        """Refuse: the weights are shared by channels with different factors, and the gate comes after the bias."""
        raise _no_affine()

    def for_size(self, height: int, width: int, form: str | None = None) -> RepMLPBlockFitted | None:
        """Return a layer with an `nn.Linear` for FC3, where one set of weights sees whole maps; None elsewhere."""
        one_set = self.weight.shape[0] == 1
        return RepMLPBlockFitted(self) if one_set and (height, width) == self.partition else None


class RepMLPBlockFitted(InferenceForm):
    """A `RepMLPBlockFused` of one set, for maps of one partition: out = gp(x) * fc3(x), `[N, C, h, w]` in and out.

    oneDNN lays the weights of a fully connected layer out once, and copies those of a batched product at every call.
    """

    def __init__(self, fused: RepMLPBlockFused) -> None:
        super().__init__()
        self.partition = fused.partition
        self.gp = copy.deepcopy(fused.gp)
        _, pixels, _ = fused.weight.shape
        self.fc3 = nn.Linear(pixels, pixels, weight_attr=nn.initializer.Constant(0.0))
        self.fc3.to(dtype=fused.weight.dtype)
        assign(self.fc3.weight, to_float64(fused.weight)[0])
        assign(self.fc3.bias, to_float64(fused.bias).reshape(-1))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        if not _is_one_partition(x, self.partition):
            (h, w), got = self.partition, size_of(x)
            raise ReparamError(
                f"this RepMLPBlock was fused for maps of {h}x{w} pixels and got maps of {got}; fuse again"
            )
        y = self.fc3(x.reshape([-1, self.fc3.weight.shape[0]]))
        return y.reshape([-1, *x.shape[1:]]) * self.gp(x)

    def absorb_affine(self, scale: np.ndarray, shift: np.ndarray) -> None:
        """Refuse, as `RepMLPBlockFused` does."""
        raise _no_affine()

    def extra_repr(self) -> str:
        return f"maps of {self.partition[0]}x{self.partition[1]}"


def _no_affine() -> UnsupportedConv:
    return UnsupportedConv(
        "a RepMLPBlock shares its weights among channels and multiplies by a gate in the end, so it cannot take "
        "the scale and shift per channel of a BN that follows; the BN stays"
    )


@register_layer
class RepMLPBlock(ReparamLayer):
    """Fully connected layers over partitions of h x w pixels, shared by channels, with convolutions beside them.

    `[N, C, H, W]` in and out. The map is cut into partitions; channel c uses the weights of set c mod num_sharesets:

        out = gp(x) * (BN(FC3_s(p)) + sum over k of BN(conv_s,k(p)))

    for each partition p; gp is a `GlobalPerceptron` of C / globalperceptron_reduce neurons, conv_s,k a k x k
    convolution of one channel that pads each partition with zeros. FC3 has no bias. Fusing turns the convolutions into
    fully connected layers and adds them to FC3.

    Zeros fill up partitions that reach beyond the map, and are cut off again: the published layer takes only multiples
    of h and w. How well a network trained without such zeros does with them is untested.

    Where a map has several partitions, all whole, and sets are shared, the published layer does not put the results
    back where it took their inputs: run r of `num_sharesets` channels in partition p, number p * C / num_sharesets + r,
    comes back as the run and partition of that number in the order r * partitions + p. So does this one, unless
    `published_order` is False; then, as with filled up partitions, each result stays at its place. Weights trained
    with one partition to a map, as all published ones, cannot expect that disorder: turn it off for larger images.

    Raises `UnsupportedConv` for sizes that do not go together.
    """

    fused_type = RepMLPBlockFused
    options = {  # noqa: RUF012
        "partition": several(WHOLE, 2), "reparam_conv_k": or_none(several(WHOLE)), "globalperceptron_reduce": WHOLE,
        "num_sharesets": WHOLE,
    }  # fmt: skip
    keeps_function_with = None
    train_form_keys = ("gp.fc1.weight", "fc3.weight", "fc3_bn.weight")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        h: int,
        w: int,
        reparam_conv_k: Sequence[int] | None = None,
        globalperceptron_reduce: int = 4,
        num_sharesets: int = 1,
        published_order: bool = True,
    ) -> None:
        super().__init__()
        conv_sizes = tuple(reparam_conv_k or ())
        _check_sizes(in_channels, out_channels, (h, w), conv_sizes, globalperceptron_reduce, num_sharesets)
        self.partition = (h, w)
        self.num_sharesets = num_sharesets
        self.published_order = published_order
        self.gp = GlobalPerceptron(in_channels, in_channels // globalperceptron_reduce)
        # A convolution by name and layout only: its weight goes through a batched matrix product.
        self.fc3 = _conv(num_sharesets * h * w, num_sharesets * h * w, 1, groups=num_sharesets)
        self.fc3_bn = nn.BatchNorm2D(num_sharesets)
        self.conv_names = [f"repconv{k}" for k in conv_sizes]
        for name, k in zip(self.conv_names, conv_sizes):
            conv = _conv(num_sharesets, num_sharesets, k, padding=k // 2, groups=num_sharesets)
            self.add_sublayer(name, nn.Sequential(("conv", conv), ("bn", nn.BatchNorm2D(num_sharesets))))

    @classmethod
    def build(
        cls,
        geometry: ConvGeometry,
        partition: tuple[int, int] = (7, 7),
        reparam_conv_k: Sequence[int] | None = (1, 3),
        globalperceptron_reduce: int = 4,
        num_sharesets: int = 1,
    ) -> RepMLPBlock:
        """Return a layer in the place of a depthwise convolution that keeps the size of its maps.

        `partition` is (h, w) in pixels; its results stay in place. A convolution that mixes channels is refused: this
        layer mixes pixels only.
        """
        if not geometry.is_depthwise or geometry.in_channels != geometry.out_channels:
            raise UnsupportedConv(
                f"RepMLPBlock mixes no channels, so it stands in for depthwise convolutions only, not for {geometry}"
            )
        if geometry.stride != (1, 1) or geometry.dilation != (1, 1):
            raise UnsupportedConv(f"RepMLPBlock has neither stride nor dilation, this one is {geometry}")
        kernel_h, kernel_w = geometry.kernel_size
        top, bottom, left, right = geometry.padding
        if (top + bottom, left + right) != (kernel_h - 1, kernel_w - 1) or geometry.padding_mode != "zeros":
            raise UnsupportedConv(
                f"RepMLPBlock keeps the size of the map, as zeros around it do; this one is {geometry} with padding "
                f"{geometry.padding} in mode {geometry.padding_mode!r}"
            )
        if geometry.data_format != "NCHW":
            raise UnsupportedConv(f"RepMLPBlock takes NCHW, this one takes {geometry.data_format}")
        channels = geometry.in_channels
        layer = cls(channels, channels, *partition, reparam_conv_k, globalperceptron_reduce, num_sharesets, False)
        layer.to(dtype=geometry.dtype)
        return layer

    def extra_repr(self) -> str:
        return "partitions of {}x{}, {} sets".format(*self.partition, self.num_sharesets)

    def forward_train_form(self, x: paddle.Tensor) -> paddle.Tensor:
        sets, (h, w) = self.num_sharesets, self.partition
        rows = _rows_by_set(x, sets, self.partition)
        parts = rows.transpose([1, 0, 2]).reshape([-1, sets, h, w])
        y = paddle.matmul(rows, self.fc3.weight.reshape([sets, h * w, h * w]), transpose_y=True)
        y = self.fc3_bn(y.transpose([1, 0, 2]).reshape([-1, sets, h, w]))
        for name in self.conv_names:
            y = y + self._sub_layers[name](parts)
        return _map_of_parts(y, x, self.published_order) * self.gp(x)

    def fuse(self) -> RepMLPBlockFused:
        sets, (h, w) = self.num_sharesets, self.partition
        scale, bias = read_bn_affine(self.fc3_bn)
        weight = to_float64(self.fc3.weight).reshape([sets, h * w, h * w]) * scale[:, None, None]
        branches = [self._sub_layers[name] for name in self.conv_names]
        folded = [fold_into(branch.conv, *read_bn_affine(branch.bn)) for branch in branches]
        if folded:
            kernel = kernels.sum_kernels([kernel for kernel, _ in folded])
            weight += kernels.conv_as_linear(kernel, h, w).reshape(weight.shape)
            bias = bias + sum(more for _, more in folded)
        biases = np.broadcast_to(bias[:, None, None], (sets, 1, h * w))
        return RepMLPBlockFused(
            copy.deepcopy(self.gp), weight.transpose(0, 2, 1), biases, self.partition, self.published_order,
            self.fc3.weight.dtype,
        )  # fmt: skip


class FFNBlock(nn.Layer):
    """Two 1x1 convolutions with BNs and a GELU between them, `[N, channels, H, W]` in and out."""

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.ffn_fc1 = conv_bn(channels, hidden_channels, 1, 1)
        self.ffn_fc2 = conv_bn(hidden_channels, channels, 1, 1)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.ffn_fc2(F.gelu(self.ffn_fc1(x)))


class RepMLPNetUnit(nn.Layer):
    """What RepMLPNet is made of, `[N, channels, H, W]` in and out; arguments as for `RepMLPBlock`.

        y = x + RepMLPBlock(BN(x)),  out = y + FFN(BN(y))

    The FFN is `ffn_expand` times as wide inside.
    """

    def __init__(
        self,
        channels: int,
        h: int,
        w: int,
        reparam_conv_k: Sequence[int] | None,
        globalperceptron_reduce: int,
        ffn_expand: int = 4,
        num_sharesets: int = 1,
        published_order: bool = True,
    ) -> None:
        super().__init__()
        self.repmlp_block = RepMLPBlock(
            channels, channels, h, w, reparam_conv_k, globalperceptron_reduce, num_sharesets, published_order
        )
        self.ffn_block = FFNBlock(channels, channels * ffn_expand)
        # It stays when the network is fused: channels with factors of their own share the weights that read them.
        self.prebn1 = nn.BatchNorm2D(channels)
        self.prebn2 = nn.BatchNorm2D(channels)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        y = x + self.repmlp_block(self.prebn1(x))
        return y + self.ffn_block(self.prebn2(y))


def conv_bn(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Sequential:
    """Return an unpadded convolution without bias and its BN, named `conv` and `bn`."""
    conv = _conv(in_channels, out_channels, kernel_size, stride=stride)
    return nn.Sequential(("conv", conv), ("bn", nn.BatchNorm2D(out_channels)))


def _conv(
    in_channels: int, out_channels: int, kernel_size: int, groups: int = 1, bias: bool = False, **options: int
) -> nn.Conv2D:
    init = uniform_fan_in(in_channels // groups * kernel_size**2)
    return nn.Conv2D(
        in_channels, out_channels, kernel_size, groups=groups, weight_attr=init, bias_attr=init if bias else False,
        **options,
    )  # fmt: skip


def _check_sizes(
    in_channels: int,
    out_channels: int,
    partition: tuple[int, int],
    conv_sizes: tuple[int, ...],
    reduction: int,
    sets: int,
) -> None:
    if in_channels != out_channels:
        raise UnsupportedConv(
            f"RepMLPBlock keeps the number of channels; {in_channels} in and {out_channels} out do not"
        )
    if sets < 1 or in_channels % sets:
        raise UnsupportedConv(
            f"{in_channels} channels cannot share num_sharesets={sets} sets of weights evenly; choose a divisor"
        )
    if not 1 <= reduction <= in_channels:
        raise UnsupportedConv(
            f"globalperceptron_reduce={reduction} leaves no neuron of {in_channels} channels; choose 1 to {in_channels}"
        )
    if min(partition) < 1:
        raise UnsupportedConv(f"a partition of {partition[0]}x{partition[1]} has no pixels; give h and w of 1 or more")
    if any(k < 1 or k % 2 == 0 for k in conv_sizes) or len(set(conv_sizes)) < len(conv_sizes):
        raise UnsupportedConv(f"reparam_conv_k={conv_sizes}: these must be odd sizes, each of them once")


def _is_one_partition(x: paddle.Tensor, partition: tuple[int, int]) -> bool:
    # A side of unknown length, in a network that is being traced, is no int.
    height, width = sides(x)
    return isinstance(height, int) and isinstance(width, int) and (height, width) == partition


def _rows_by_set(x: paddle.Tensor, sets: int, partition: tuple[int, int]) -> paddle.Tensor:
    """Return the partitions of `[N, C, H, W]` as rows of pixels for each set, `[sets, N * C / sets * parts, h * w]`.

    Channel c is of set c mod sets: the channels are C / sets runs of one channel of each set. The rows are in the order
    (image, run, partition).
    """
    h, w = partition
    if _is_one_partition(x, partition):
        return moved(x.reshape([-1, sets, h, w]), [1, 0, 2, 3], [sets, -1, h * w])
    rows, columns = partition_counts(x, h, w)
    parts = split_into_partitions(x, h, w).reshape([-1, sets, rows * columns, h * w])
    return moved(parts, [1, 0, 2, 3], [sets, -1, h * w])


def _map_of_rows(
    rows_by_set: paddle.Tensor, x: paddle.Tensor, partition: tuple[int, int], published_order: bool
) -> paddle.Tensor:
    """Return what `_rows_by_set` gives as a map of the shape of `x` again."""
    channels, (height, width), (h, w) = x.shape[1], sides(x), partition
    sets = rows_by_set.shape[0]
    if _is_one_partition(x, partition):
        return moved(rows_by_set.reshape([sets, -1, h, w]), [1, 0, 2, 3], [-1, channels, h, w])
    rows, columns = partition_counts(x, h, w)
    if published_order:
        by_image = rows_by_set.reshape([sets, -1, channels // sets * rows * columns, h * w])
        rows_by_set = paddle.index_select(by_image, _published_order(x, channels // sets, partition), axis=2)
    parts = rows_by_set.reshape([sets, -1, rows * columns, h * w])
    parts = moved(parts, [1, 0, 2, 3], [-1, rows * columns, h * w])
    return join_partitions(parts, channels, partition, (height, width))


def _map_of_parts(parts: paddle.Tensor, x: paddle.Tensor, published_order: bool) -> paddle.Tensor:
    """Return the rows of `_rows_by_set` as a map of the shape of `x` again, given as `[rows, sets, h, w]`."""
    channels, (height, width) = x.shape[1], sides(x)
    _, sets, h, w = parts.shape
    if not _is_one_partition(x, (h, w)):
        rows, columns = partition_counts(x, h, w)
        if published_order:
            by_image = parts.reshape([-1, channels // sets * rows * columns, sets * h * w])
            parts = paddle.index_select(by_image, _published_order(x, channels // sets, (h, w)), axis=1)
        parts = moved(parts.reshape([-1, rows * columns, sets, h * w]), [0, 2, 1, 3], [-1, rows * columns, h * w])
        return join_partitions(parts, channels, (h, w), (height, width))
    return parts.reshape([-1, channels, height, width])


def _published_order(x: paddle.Tensor, runs: int, partition: tuple[int, int]) -> paddle.Tensor:
    """Return which of the rows of an image the published layer puts at the place of each.

    It writes them down as (partition, run), and reads the results as (run, partition).
    """
    (height, width), (h, w) = sides(x), partition
    rows, columns = partition_counts(x, h, w)
    # 1 where partitions are filled up, which the published layer cannot do, else 0. Arithmetic, and no `if`, because
    # the sides may be unknown while a network is traced.
    filled = (rows - height // h + columns - width // w + 1) // 2
    partitions = rows * columns - filled * (rows * columns - 1)
    runs = runs * rows * columns // partitions
    numbers = paddle.arange(0, runs * partitions, dtype="int64")
    return numbers % runs * partitions + numbers // runs
