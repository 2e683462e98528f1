"""The weight normalisations against loops and a singular value decomposition, and their gradients."""

import copy

import numpy as np
import paddle
import pytest
from helpers import as_array, relative_error
from paddle import nn

from paddle_reparam.errors import ReparamError, UnsupportedConv
from paddle_reparam.layers.centered_weight_norm import CenteredWeightNormConv2D
from paddle_reparam.layers.orthogonal_weight_norm import OrthogonalWeightNormConv2D, inverse_root
from paddle_reparam.layers.weight_norm import WeightNormConv2D

LAYERS = [WeightNormConv2D, CenteredWeightNormConv2D, OrthogonalWeightNormConv2D]
CENTRED = LAYERS[1:]
CONVOLUTIONS = {
    "dense": ((4, 6, 3), {"padding": 1}),
    "more filters than weights": ((3, 20, (1, 3)), {}),
    "groups": ((8, 12, 3), {"groups": 4, "stride": 2, "bias_attr": False}),
    "depthwise": ((10, 10, (3, 2)), {"groups": 10, "dilation": 2}),
    "1x1": ((5, 3, 1), {"bias_attr": False}),
}
of_each_convolution = pytest.mark.parametrize(
    ("sizes", "options"), CONVOLUTIONS.values(), ids=[name.replace(" ", "-") for name in CONVOLUTIONS]
)


def a_layer(cls, sizes, options, seed=0, **layer_options):
    """Return a layer in float64 in the place of a convolution, with weights and factors drawn."""
    conv = nn.Conv2D(*sizes, **options)
    conv.to(dtype="float64")
    layer = cls.from_conv(conv, **layer_options)
    generator = np.random.default_rng(seed)
    for parameter in layer.parameters():
        parameter.set_value(paddle.to_tensor(generator.standard_normal(parameter.shape)))
    layer.eval()
    return layer


# --- What the kernel is ------------------------------------------------------------------------------------------


def by_loops(layer, group_size=None):
    """Return the kernel of a layer, each filter on its own; orthonormal ones by a singular value decomposition.

    The rows of U V^T are the orthonormal ones nearest to those of U S V^T, which is what (C C^T)^(-1/2) C is.
    """
    v, g = as_array(layer.weight_v), as_array(layer.weight_g)
    kernel = np.zeros_like(v)
    for o, filter_ in enumerate(v):
        if isinstance(layer, WeightNormConv2D):
            kernel[o] = filter_ / np.sqrt(sum(value**2 for value in filter_.flat))
        else:
            mean = sum(filter_.flat) / filter_.size
            kernel[o] = (filter_ - mean) / np.sqrt(sum((value - mean) ** 2 for value in filter_.flat))
    if group_size is not None:
        for start in range(0, len(v), group_size):
            group = np.stack([f.reshape(-1) - f.mean() for f in v[start : start + group_size]])
            left, _, right = np.linalg.svd(group, full_matrices=False)
            kernel[start : start + group_size] = (left @ right).reshape(-1, *v.shape[1:])
    return kernel * g


@of_each_convolution
@pytest.mark.parametrize("cls", LAYERS)
def test_the_kernel_is_what_a_second_formulation_gives(cls, sizes, options):
    layer = a_layer(cls, sizes, options)
    expected = by_loops(layer, getattr(layer, "group_size", None))
    fused = layer.reparameterize()
    assert relative_error(fused.weight, expected) < 1e-10
    x = paddle.randn([2, sizes[0], 7, 8], dtype="float64")
    by_hand = layer.geometry.convolve(x, paddle.to_tensor(expected), layer.bias)
    assert relative_error(layer(x), by_hand) < 1e-10


@pytest.mark.parametrize(
    ("sizes", "options", "asked", "group_size", "groups"),
    [
        ((4, 6, 3), {}, None, 6, [6]),  # 6 filters of 36 weights
        ((3, 64, 3), {}, None, 22, [22, 22, 20]),  # of 27
        ((32, 32, 3), {"groups": 32}, None, 8, [8] * 4),  # of 9
        ((4, 7, 1), {}, None, 3, [3, 3, 1]),  # of 4
        ((8, 10, 3), {}, 4, 4, [4, 4, 2]),
        ((8, 10, 3), {}, 7, 5, [5, 5]),
        ((8, 10, 3), {}, 1, 1, [1] * 10),
        ((3, 64, 3), {}, 100, 22, [22, 22, 20]),
    ],
)
def test_filters_are_orthonormal_in_even_groups_of_fewer_than_their_weights(sizes, options, asked, group_size, groups):
    layer = a_layer(OrthogonalWeightNormConv2D, sizes, options, group_size=asked)
    assert layer.group_size == group_size
    assert f"groups of {group_size} filters" in layer.extra_repr()
    kernel = as_array(layer.reparameterize().weight) / as_array(layer.weight_g)
    rows = kernel.reshape(sizes[1], -1)
    assert np.abs(rows.mean(axis=1)).max() < 1e-15
    start = 0
    for size in groups:
        group = rows[start : start + size]
        assert relative_error(group @ group.T, np.eye(size)) < 1e-9
        start += size
    assert start == sizes[1]
    between = rows[: groups[0]] @ rows[groups[0] :].T
    assert not between.size or np.abs(between).max() > 0.05, "other groups are orthogonal too: one group would do"


@pytest.mark.parametrize("cls", CENTRED)
def test_filters_with_nothing_to_learn_are_refused(cls):
    for conv in (nn.Conv2D(4, 4, 1, groups=4), nn.Conv2D(4, 4, (1, 2), groups=4), nn.Conv2D(4, 6, 1, groups=2)):
        with pytest.raises(UnsupportedConv, match="weights each; centred and of norm 1, fewer than 3"):
            cls.from_conv(conv)
    for group_size in (0, 2.5, "8", True):
        with pytest.raises(ReparamError, match="no group_size="):
            OrthogonalWeightNormConv2D.from_conv(nn.Conv2D(4, 4, 3), group_size=group_size)


# --- Where it starts ---------------------------------------------------------------------------------------------


@of_each_convolution
@pytest.mark.parametrize("cls", LAYERS)
def test_it_starts_as_near_to_the_convolution_as_the_lengths_can_bring_it(cls, sizes, options):
    conv = nn.Conv2D(*sizes, **options)
    conv.to(dtype="float64")
    layer = cls.from_conv(conv)
    np.testing.assert_array_equal(layer.weight_v.numpy(), conv.weight.numpy())
    weight = as_array(conv.weight).reshape(sizes[1], -1)
    layer.eval()
    kernel = as_array(layer.reparameterize().weight).reshape(sizes[1], -1)
    # The difference to the nearest point on a line stands upright on it.
    assert np.abs(((weight - kernel) * kernel).sum(axis=1)).max() < 1e-6 * np.square(weight).sum(axis=1).max()
    assert (as_array(layer.weight_g) > 0).all()
    if cls is CenteredWeightNormConv2D:
        assert relative_error(kernel, weight - weight.mean(axis=1, keepdims=True)) < 1e-12


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("value", [0.0, 1e-30, 0.1])
def test_a_filter_without_a_direction_stays_what_it_was_and_can_learn(cls, value):
    conv = nn.Conv2D(4, 6, 3)
    weight = conv.weight.numpy()
    weight[2] = value
    conv.weight.set_value(weight)
    layer = cls.from_conv(conv)
    directionless = value < 1e-12 or cls in CENTRED
    assert (float(layer.weight_g[2].abs()) < 1e-7) == directionless
    assert (np.abs(layer.weight_v.numpy()[2]).max() > 0.05) == (value == 0.1 or directionless)
    others = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(layer.weight_v.numpy()[others], weight[others])
    layer(paddle.randn([2, 4, 5, 5])).pow(2).sum().backward()
    layer.clear_gradients()
    x = paddle.randn([2, 4, 5, 5])
    y = layer(x)
    (y * paddle.randn(y.shape)).sum().backward()
    assert float(layer.weight_g.grad[2].abs()) > 1e-3
    assert all(np.isfinite(p.grad.numpy()).all() for p in layer.parameters())


# --- Its gradients -----------------------------------------------------------------------------------------------


def directional(layer, x, r, names, seed=0, step=1e-5):
    """Return (by autograd, by central differences) of sum(layer(x) * r) along four drawn directions of all tensors."""
    tensors = {**{name: dict(layer.named_parameters())[name] for name in names}, "x": x}
    layer.clear_gradients()
    x.stop_gradient = False
    x.clear_gradient()
    (layer(x) * r).sum().backward()
    generator = np.random.default_rng(seed)
    values = {name: as_array(t).copy() for name, t in tensors.items()}
    pairs = []
    for _ in range(4):
        along = {name: generator.standard_normal(value.shape) * np.abs(value).max() for name, value in values.items()}
        slope = sum((as_array(tensors[name].grad) * way).sum() for name, way in along.items())
        sums = []
        for sign in (1.0, -1.0):
            for name, way in along.items():
                tensors[name].set_value(paddle.to_tensor(values[name] + sign * step * way))
            with paddle.no_grad():
                sums.append(float((layer(x) * r).sum()))
        for name, value in values.items():
            tensors[name].set_value(paddle.to_tensor(value))
        pairs.append((slope, (sums[0] - sums[1]) / (2 * step)))
    return np.array(pairs).T


def with_singular_values(layer, values):
    """Give the layer filters whose centred matrix has these singular values, in a rotated basis."""
    generator = np.random.default_rng(1)
    count, fan = len(values), layer.fan
    left = np.linalg.qr(generator.standard_normal((count, count)))[0]
    centred = generator.standard_normal((fan, count))
    right = np.linalg.qr(centred - centred.mean(axis=0))[0]
    rows = left @ np.diag(values) @ right.T + generator.standard_normal((count, 1))
    layer.weight_v.set_value(paddle.to_tensor(rows.reshape(layer.weight_v.shape)))


@of_each_convolution
@pytest.mark.parametrize("cls", LAYERS)
def test_gradients_are_those_of_finite_differences(cls, sizes, options):
    layer = a_layer(cls, sizes, options, seed=3)
    x = paddle.randn([2, sizes[0], 7, 8], dtype="float64")
    r = paddle.randn(layer(x).shape, dtype="float64")
    names = [name for name, _ in layer.named_parameters()]
    step = 1e-7 if cls is OrthogonalWeightNormConv2D else 1e-5
    actual, expected = directional(layer, x, r, names, step=step)
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize(
    "values",
    [
        [2.0] * 5,
        [1.0, 1.0, 3.0, 3.0, 3.0],
        [1.0, 1.0 + 1e-9, 1.0 + 2e-9, 2.0, 2.0 - 1e-13],
        [0.01, 0.01, 1.0, 1.0, 10.0],
        [1e-6, 2e-6, 1e-6, 1e-6, 1e-6],
    ],
    ids=["all-equal", "two-and-three", "nearly-equal", "far-apart", "small"],
)
def test_equal_eigenvalues_have_the_gradient_of_finite_differences(values):
    layer = a_layer(OrthogonalWeightNormConv2D, (3, 5, 3), {})
    with_singular_values(layer, values)
    x = paddle.randn([2, 3, 6, 6], dtype="float64")
    r = paddle.randn(layer(x).shape, dtype="float64")
    # Steps are relative to the largest weight, of which the mean is a part; the smallest direction is what may not move
    # far.
    step = 1e-4 * min(values) / np.abs(as_array(layer.weight_v)).max()
    actual, expected = directional(layer, x, r, ["weight_v"], step=step)
    assert np.isfinite(actual).all()
    assert relative_error(actual, expected) < 1e-6


NONE_IS_TOO_SMALL = paddle.zeros([1, 1], dtype="float64")


def jacobian_of(function, tensor):
    """Return what a function gives for a matrix `[1, n, n]`, and its Jacobian `[n * n, n * n]`, by autograd."""
    tensor.stop_gradient = False
    y = function(tensor)
    rows = [paddle.grad(each, tensor, retain_graph=True)[0] for each in y.reshape([-1])]
    return as_array(y)[0], np.stack([as_array(row).reshape(-1) for row in rows])


def symmetric(values, seed=0):
    """Return a matrix with these eigenvalues, and a symmetric one to change it by."""
    generator = np.random.default_rng(seed)
    basis = np.linalg.qr(generator.standard_normal((len(values), len(values))))[0]
    change = generator.standard_normal(basis.shape)
    return basis @ np.diag(values) @ basis.T, change + change.T


@pytest.mark.parametrize("values", [[1.0] * 6, [4.0, 4.0, 4.0, 1.0, 1e-4, 1e-4], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
def test_the_inverse_root_has_the_gradient_of_its_equation(values):
    """Y S Y = I: with any dS, dY of the layer solves dY S Y + Y dS Y + Y S dY = 0, equal eigenvalues or not."""
    s, ds = symmetric(values)
    y, jacobian = jacobian_of(lambda m: inverse_root(m, NONE_IS_TOO_SMALL), paddle.to_tensor(s[None]))
    # Rounding of S moves Y by as many times its own size as S is worse conditioned: 4e4 at most here.
    assert relative_error(y @ s @ y, np.eye(6)) < 1e-11
    dy = (jacobian @ ds.reshape(-1)).reshape(6, 6)
    assert relative_error(dy @ s @ y + y @ s @ dy, -y @ ds @ y) < 1e-9


def test_eigenvalues_that_are_too_small_count_as_the_smallest():
    values = [3.0, 1.0, 1.0, 0.5, 1e-6, 0.0]
    s, ds = symmetric(values)

    def by_numpy(matrix):
        found, vectors = np.linalg.eigh(matrix)
        return vectors @ np.diag(np.maximum(found, 0.01) ** -0.5) @ vectors.T

    smallest = paddle.full([1, 1], 0.01, dtype="float64")
    y, jacobian = jacobian_of(lambda m: inverse_root(m, smallest), paddle.to_tensor(s[None]))
    assert relative_error(y, by_numpy(s)) < 1e-12
    expected = (by_numpy(s + 1e-6 * ds) - by_numpy(s - 1e-6 * ds)) / 2e-6
    assert relative_error((jacobian @ ds.reshape(-1)).reshape(6, 6), expected) < 1e-7


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_filters_that_depend_on_each_other_give_finite_gradients(dtype):
    conv = nn.Conv2D(3, 6, 3)
    conv.to(dtype=dtype)
    weight = as_array(conv.weight)
    weight[1] = weight[0]
    weight[2] = 2 * weight[0] + 0.5 * weight[3]
    for value in (weight, np.zeros_like(weight), np.ones_like(weight)):
        layer = OrthogonalWeightNormConv2D.from_conv(conv)
        layer.weight_v.set_value(paddle.to_tensor(value.astype(dtype)))
        y = layer(paddle.randn([1, 3, 5, 5], dtype=dtype))
        (y * paddle.randn(y.shape, dtype=dtype)).sum().backward()
        assert np.isfinite(y.numpy()).all()
        assert all(np.isfinite(p.grad.numpy()).all() for p in layer.parameters())


@pytest.mark.parametrize("cls", LAYERS)
def test_a_filter_that_became_zero_gives_numbers(cls):
    layer = a_layer(cls, (3, 5, 3), {})
    layer.weight_v.set_value(
        paddle.to_tensor(as_array(layer.weight_v) * np.array([1, 0, 1, 1, 1])[:, None, None, None])
    )
    y = layer(paddle.randn([1, 3, 5, 5], dtype="float64"))
    y.square().sum().backward()
    assert np.isfinite(y.numpy()).all()
    assert all(np.isfinite(p.grad.numpy()).all() for p in layer.parameters())


@pytest.mark.parametrize("cls", LAYERS)
def test_what_is_no_number_stays_none(cls):
    """A plain convolution whose training diverges goes on with NaN; LAPACK would raise."""
    layer = a_layer(cls, (3, 5, 3), {})
    layer.weight_v.set_value(paddle.full_like(layer.weight_v, float("nan")))
    x = paddle.randn([1, 3, 5, 5], dtype="float64")
    assert np.isnan(as_array(layer(x))).all()


# --- Where it runs -----------------------------------------------------------------------------------------------


def test_a_layer_in_float32_is_as_exact_where_its_filters_are_nearly_dependent():
    """The smallest eigenvalue is 1e-6 of the largest: an inverse root in float32 would be wrong in the first digit."""
    layer = a_layer(OrthogonalWeightNormConv2D, (3, 5, 3), {})
    with_singular_values(layer, [1.0, 0.5, 0.3, 0.01, 0.001])
    layer.to(dtype="float32")
    x = paddle.randn([2, 3, 6, 6])
    assert relative_error(layer(x), layer.reparameterize()(x)) < 1e-6


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("cls", LAYERS)
def test_under_autocast_the_kernel_keeps_its_precision(cls, level, monkeypatch):
    layer = cls.from_conv(nn.Conv2D(8, 6, 3))
    x = paddle.randn([2, 8, 6, 6])
    layer.eval()
    kernels, convolve = [], type(layer.geometry).convolve

    def watched(self, x, weight, bias):
        kernels.append(weight)
        return convolve(self, x, weight, bias)

    monkeypatch.setattr(type(layer.geometry), "convolve", watched)
    with paddle.amp.auto_cast(level=level, dtype="bfloat16"):
        y = layer(x)
    # A CPU without bfloat16 computes all of it in float32.
    assert y.dtype in (paddle.bfloat16, paddle.float32)
    assert kernels[0].dtype == paddle.float32
    assert relative_error(kernels[0], layer.reparameterize().weight) < 1e-6
    y.astype("float32").sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad.dtype == paddle.float32
        assert np.isfinite(parameter.grad.numpy()).all()


@pytest.mark.parametrize("cls", LAYERS)
def test_a_layer_in_bfloat16_computes_its_kernel_in_float32(cls, monkeypatch):
    """Kernels of convolutions in bfloat16 are not on every CPU; what they would get is."""
    layer = cls.from_conv(nn.Conv2D(8, 6, 3))
    layer.eval()
    layer.to(dtype="bfloat16")
    given = {}
    monkeypatch.setattr(
        type(layer.geometry), "convolve", lambda self, x, weight, bias: given.update(weight=weight) or weight
    )
    layer(None)
    assert given["weight"].dtype == paddle.bfloat16
    np.testing.assert_array_equal(as_array(given["weight"]), as_array(layer.reparameterize().weight))


@pytest.mark.parametrize("cls", LAYERS)
def test_a_compiled_layer_trains_as_it_does_uncompiled(cls):
    layer = a_layer(cls, (4, 7, 3), {"stride": 2})
    layer.to(dtype="float32")
    layer.train()
    spec = [paddle.static.InputSpec([None, 4, None, None], "float32")]
    compiled = paddle.jit.to_static(copy.deepcopy(layer), input_spec=spec, full_graph=True)
    x = paddle.randn([2, 4, 7, 6])
    for net in (layer, compiled):
        net(x).pow(3).sum().backward()
    for (name, ours), theirs in zip(layer.named_parameters(), compiled.parameters()):
        assert relative_error(theirs.grad, ours.grad) < 1e-4, name
