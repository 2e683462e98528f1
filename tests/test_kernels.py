"""Each function of kernels.py against the convolutions that it claims to equal, computed by Paddle in float64."""

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from helpers import randomise_batch_norms, relative_error
from paddle import nn

from paddle_reparam.arithmetic import kernels
from paddle_reparam.arithmetic.tensors import to_float64
from paddle_reparam.errors import ReparamError

EXACT = 1e-12


def random(*shape):
    return np.random.standard_normal(shape)


def conv(x, kernel, bias=None, stride=1, padding=0, groups=1, dilation=1):
    """Paddle's own convolution of numpy arrays."""
    bias = None if bias is None else paddle.to_tensor(bias)
    padding = list(padding) if isinstance(padding, (tuple, list)) else padding
    x, kernel = paddle.to_tensor(x), paddle.to_tensor(kernel)
    return F.conv2d(x, kernel, bias, stride, padding, dilation, groups).numpy()


def same(kernel):
    """The padding (top, bottom, left, right) that keeps the size and puts tap k // 2 on the pixel."""
    height, width = kernel.shape[2:]
    return [height // 2, (height - 1) // 2, width // 2, (width - 1) // 2]


# --- Batch norms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("epsilon", [1e-5, 1e-3])
def test_bn_affine_is_the_batch_norm_in_eval_mode(affine, epsilon):
    attr = None if affine else False
    norm = nn.BatchNorm2D(5, epsilon=epsilon, weight_attr=attr, bias_attr=attr)
    norm.to(dtype="float64")
    randomise_batch_norms(norm, 1)
    norm.eval()
    x = random(2, 5, 3, 4)
    scale, shift = kernels.bn_affine(
        to_float64(norm.weight), to_float64(norm.bias), to_float64(norm._mean), to_float64(norm._variance), epsilon
    )
    assert scale.shape == shift.shape == (5,)
    actual = x * scale[:, None, None] + shift[:, None, None]
    assert relative_error(actual, norm(paddle.to_tensor(x))) < EXACT


def test_bn_affine_of_a_dead_channel_is_what_paddle_computes():
    # With a variance of 0 only epsilon is left, and Paddle's kernels keep epsilon as a float32.
    norm = nn.BatchNorm2D(2)
    norm.to(dtype="float64")
    norm._variance.set_value(paddle.zeros([2], dtype="float64"))
    norm.eval()
    x = random(2, 2, 3, 3)
    scale, shift = kernels.bn_affine(None, None, np.zeros(2), np.zeros(2), norm._epsilon)
    assert relative_error(x * scale[:, None, None] + shift[:, None, None], norm(paddle.to_tensor(x))) < EXACT


def test_bn_affine_takes_float32_and_computes_in_float64():
    values = [random(4).astype("float32") for _ in range(3)]
    variance = np.random.uniform(0.5, 2.0, 4).astype("float32")
    scale, shift = kernels.bn_affine(*values, variance, 1e-5)
    assert scale.dtype == shift.dtype == np.float64
    wide, wide_shift = kernels.bn_affine(*[v.astype("float64") for v in values], variance.astype("float64"), 1e-5)
    np.testing.assert_array_equal(scale, wide)
    np.testing.assert_array_equal(shift, wide_shift)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("with_bias", [True, False])
def test_fold_affine_is_the_convolution_and_the_affine(groups, with_bias):
    kernel, x = random(8, 4 // groups, 3, 2), random(2, 4, 6, 7)
    bias = random(8) if with_bias else None
    scale, shift = random(8), random(8)
    expected = conv(x, kernel, bias, padding=1, groups=groups) * scale[:, None, None] + shift[:, None, None]
    folded, folded_bias = kernels.fold_affine(kernel, bias, scale, shift)
    assert relative_error(conv(x, folded, folded_bias, padding=1, groups=groups), expected) < EXACT


def test_fold_affine_leaves_its_arguments_alone():
    kernel, bias, scale, shift = random(2, 3, 3, 3), random(2), random(2), random(2)
    before = [a.copy() for a in (kernel, bias, scale, shift)]
    kernels.fold_affine(kernel, bias, scale, shift)
    for array, old in zip((kernel, bias, scale, shift), before):
        np.testing.assert_array_equal(array, old)


def test_fold_affine_of_other_channels_is_refused():
    with pytest.raises(ReparamError, match=r"an affine of 3 channels .* \[4, 2, 3, 3\].* 4 output channels"):
        kernels.fold_affine(random(4, 2, 3, 3), None, random(3), random(3))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_an_affine_in_front_goes_into_the_kernel(groups):
    kernel, bias, scale, shift = random(8, 4 // groups, 3, 3), random(8), random(4), random(4)
    x = random(2, 4, 7, 6)
    expected = conv(x * scale[:, None, None] + shift[:, None, None], kernel, bias, groups=groups)
    folded, folded_bias = kernels.fold_input_affine(kernel, bias, scale, shift, groups)
    assert relative_error(conv(x, folded, folded_bias, groups=groups), expected) < EXACT
    _, without = kernels.fold_input_affine(kernel, None, scale, shift, groups)
    assert relative_error(without + bias, folded_bias) < EXACT


def test_an_affine_in_front_of_other_channels_is_refused():
    with pytest.raises(ReparamError, match=r"affine of 3 channels cannot precede.*\[8, 2, 3, 3\].*of the 4 input"):
        kernels.fold_input_affine(random(8, 2, 3, 3), None, random(3), random(3), 2)


# --- Parallel kernels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("small", [(1, 1), (3, 3), (1, 5), (3, 1), (5, 7)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_centre_pad_is_the_same_convolution_with_more_padding(small, dilation):
    size = (5, 7)
    kernel, x = random(4, 3, *small), random(2, 3, 9, 8)
    extra = [(big - k) // 2 * dilation for big, k in zip(size, small)]
    expected = conv(x, kernel, padding=[1, 3], dilation=dilation)
    padded = kernels.centre_pad(kernel, size)
    assert padded.shape == (4, 3, *size)
    actual = conv(x, padded, padding=[1 + extra[0], 3 + extra[1]], dilation=dilation)
    assert relative_error(actual, expected) < EXACT


def test_centre_pad_of_even_kernels():
    kernel, x = random(2, 2, 2, 4), random(1, 2, 6, 6)
    padded = kernels.centre_pad(kernel, (4, 6))
    assert relative_error(conv(x, padded, padding=[1, 1]), conv(x, kernel)) < EXACT


@pytest.mark.parametrize("size", [(3, 4), (4, 3), (1, 3), (3, 1), (2, 2)])
def test_centre_pad_without_a_middle_is_refused(size):
    with pytest.raises(ReparamError, match=rf"3x3 has no middle place in one of {size[0]}x{size[1]}.*even number"):
        kernels.centre_pad(random(1, 1, 3, 3), size)


def test_sum_kernels_is_the_sum_of_the_outputs():
    parts = [random(4, 2, *k) for k in [(3, 3), (1, 1), (1, 3), (5, 1)]]
    x = random(2, 4, 7, 6)
    expected = sum(conv(x, k, padding=same(k), groups=2) for k in parts)
    total = kernels.sum_kernels(parts)
    assert total.shape == (4, 2, 5, 3)
    assert relative_error(conv(x, total, padding=[2, 1], groups=2), expected) < EXACT


def test_sum_kernels_of_other_channels_is_refused():
    with pytest.raises(ReparamError, match=r"different channel counts cannot be summed: \[\[4, 1\], \[4, 2\]\]"):
        kernels.sum_kernels([random(4, 2, 3, 3), random(4, 1, 1, 1)])


@pytest.mark.parametrize(("groups", "outputs"), [(1, 6), (2, 6), (3, 3), (6, 6), (6, 12)])
def test_ungroup_is_the_same_convolution_without_groups(groups, outputs):
    kernel, x = random(outputs, 6 // groups, 3, 2), random(2, 6, 5, 6)
    dense = kernels.ungroup(kernel, groups)
    assert dense.shape == (outputs, 6, 3, 2)
    assert relative_error(conv(x, dense), conv(x, kernel, groups=groups)) < EXACT


# --- Kernels one after the other ---------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True), (True, True)])
def test_one_by_one_then_is_both_convolutions(groups, biases):
    inputs, middle, outputs = 4, 12, 8
    first, second = random(middle, inputs // groups, 1, 1), random(outputs, middle // groups, 3, 2)
    first_bias = random(middle) if biases[0] else None
    second_bias = random(outputs) if biases[1] else None
    x = random(2, inputs, 5, 6)
    expected = conv(conv(x, first, first_bias, groups=groups), second, second_bias, groups=groups)
    kernel, bias = kernels.one_by_one_then(first, first_bias, second, second_bias, groups)
    assert kernel.shape == (outputs, inputs // groups, 3, 2)
    assert relative_error(conv(x, kernel, bias, groups=groups), expected) < EXACT


def test_one_by_one_then_on_a_border_padded_with_the_first_bias():
    first, first_bias, second = random(4, 3, 1, 1), random(4), random(5, 4, 3, 3)
    x = random(2, 3, 5, 5)
    middle = conv(x, first, first_bias)
    ring = np.broadcast_to(first_bias[:, None, None], (2, 4, 7, 7)).copy()
    ring[:, :, 1:-1, 1:-1] = middle
    kernel, bias = kernels.one_by_one_then(first, first_bias, second, None, 1)
    assert relative_error(conv(x, kernel, bias, padding=1), conv(ring, second)) < EXACT


@pytest.mark.parametrize(
    ("first", "second", "groups"),
    [((4, 3, 3, 3), (5, 4, 3, 3), 1), ((4, 3, 1, 1), (5, 3, 3, 3), 1), ((4, 3, 1, 1), (4, 4, 3, 3), 2)],
)
def test_one_by_one_then_of_kernels_that_do_not_fit_is_refused(first, second, groups):
    with pytest.raises(ReparamError, match=rf"cannot follow each other with groups={groups}.*must be 1x1"):
        kernels.one_by_one_then(random(*first), None, random(*second), None, groups)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("size", [(2, 2), (3, 3), (3, 2)])
def test_average_pool_kernel_is_the_pool_that_counts_padding(groups, size):
    x = random(2, 6, 7, 8)
    padding = [s // 2 for s in size]
    expected = F.avg_pool2d(paddle.to_tensor(x), size, 2, padding, exclusive=False)
    kernel = kernels.average_pool_kernel(6, size, groups)
    assert kernel.shape == (6, 6 // groups, *size)
    assert relative_error(conv(x, kernel, stride=2, padding=padding, groups=groups), expected) < EXACT


# --- A convolution as a fully connected layer --------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (5, 5), (3, 5), (5, 1), (2, 2), (4, 3), (9, 11)])
@pytest.mark.parametrize("map_size", [(4, 4), (3, 5), (1, 2)])
def test_conv_as_linear_is_the_same_padded_convolution(groups, size, map_size):
    height, width = map_size
    kernel, x = random(8, 4 // groups, *size), random(3, 4, height, width)
    expected = conv(x, kernel, padding=same(kernel), groups=groups)
    matrix = kernels.conv_as_linear(kernel, height, width)
    pixels = height * width
    assert matrix.shape == (8 * pixels, 4 // groups * pixels)
    rows = matrix.reshape(groups, -1, matrix.shape[1])
    actual = np.einsum("gpq,ngq->ngp", rows, x.reshape(3, groups, -1)).reshape(expected.shape)
    assert relative_error(actual, expected) < EXACT


# --- All of them -------------------------------------------------------------------------------------------------


def test_every_function_takes_float32_and_returns_float64():
    kernel, point = random(4, 4, 3, 3).astype("float32"), random(4, 4, 1, 1).astype("float32")
    vector = random(4).astype("float32")
    results = [
        *kernels.fold_affine(kernel, None, vector, vector),
        kernels.centre_pad(kernel, (5, 5)),
        kernels.sum_kernels([kernel, point]),
        kernels.ungroup(kernel, 2),
        *kernels.one_by_one_then(point, vector, kernel, vector, 1),
        kernels.average_pool_kernel(4, (2, 2), 2),
        kernels.conv_as_linear(kernel, 3, 3),
    ]
    assert [r.dtype for r in results] == [np.float64] * len(results)
