"""What the tests share: how far two arrays are apart, and batch norms that are away from their initial values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

from paddle_reparam.arithmetic.geometry import BATCH_NORMS
from paddle_reparam.deploy.export import ExportOptions, export_inference
from paddle_reparam.deploy.old_programs import HAS_NEW_PROGRAMS
from paddle_reparam.deploy.onnx_export import PACKAGES
from paddle_reparam.deploy.programs import FORMATS
from paddle_reparam.deploy.runtimes import get_runtime
from paddle_reparam.deploy.runtimes.onnx_runtime import need
from paddle_reparam.errors import ReparamError


def as_array(value) -> np.ndarray:
    """Return a tensor, array or number as a float64 array."""
    if isinstance(value, paddle.Tensor):
        value = value.detach().astype("float64").numpy()
    return np.asarray(value, dtype=np.float64)


def relative_error(actual, expected) -> float:
    """Return max|actual - expected| / max|expected|; shapes that differ, NaN and an all-zero `expected` fail."""
    actual, expected = as_array(actual), as_array(expected)
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    assert expected.size, "nothing to compare"
    assert np.isfinite(expected).all(), "the expected values are not finite"
    assert np.isfinite(actual).all(), "the values are not finite"
    scale = np.abs(expected).max()
    assert scale > 0, "every expected value is zero: the comparison would say nothing"
    return float(np.abs(actual - expected).max() / scale)


def randomise_batch_norms(model: nn.Layer, seed: int = 0) -> int:
    """Give every batch norm weights of either sign in 0.5..1.5, biases and means away from 0, variances in 0.5..2.

    Returns how many there were.
    """
    generator = np.random.default_rng(seed)

    def away_from_zero(size: int, low: float, high: float) -> np.ndarray:
        return generator.uniform(low, high, size) * generator.choice([-1.0, 1.0], size)

    norms = [layer for layer in model.sublayers(include_self=True) if isinstance(layer, BATCH_NORMS)]
    for norm in norms:
        size = norm._mean.shape[0]
        values = [
            (norm.weight, away_from_zero(size, 0.5, 1.5)),
            (norm.bias, away_from_zero(size, 0.2, 1.0)),
            (norm._mean, away_from_zero(size, 0.2, 1.0)),
            (norm._variance, generator.uniform(0.5, 2.0, size)),
        ]
        for tensor, value in values:
            if tensor is not None:
                tensor.set_value(paddle.to_tensor(value).astype(tensor.dtype))
    return len(norms)


def draw_by_fan_in(model: nn.Layer) -> None:
    """Draw the weights of every convolution so that its output is about as large as its input.

    Networks whose own draw makes depthwise outputs small hardly depend on the image until they are trained.
    """
    for layer in model.sublayers(include_self=True):
        if isinstance(layer, nn.Conv2D):
            nn.initializer.KaimingNormal()(layer.weight)


def missing_for_onnx() -> str:
    """Return why ONNX files cannot be made here, or nothing."""
    try:
        for package in PACKAGES:
            need(package)
    except ReparamError as error:
        return str(error)
    return ""


def check_in_bfloat16(network: nn.Layer, shape: Sequence[int], folder: Path, bound: float = 0.03) -> None:
    """Paddle Inference computes a network in bfloat16, out of every kind of program, for a batch of 1 and one of 3.

    Where this processor has no bfloat16 there is nothing to check.
    """
    runtime = get_runtime("onednn-bfloat16")
    try:
        runtime.require()
    except ReparamError:
        return
    x = np.random.default_rng(0).standard_normal([3, *shape]).astype(np.float32)
    for file_format in FORMATS if HAS_NEW_PROGRAMS else FORMATS[-1:]:
        target = folder / file_format
        export_inference(network, target, [[None, *shape]], options=ExportOptions(file_format))
        loaded = runtime.load(target)
        for batch in (1, 3):
            expected = network(paddle.to_tensor(x[:batch]))
            error = relative_error(loaded.run(x[:batch])[0], expected)
            assert 1e-6 < error < bound, f"{file_format}, {batch} images: {error:.1e}"


def smallest_manifest(files: dict) -> dict:
    """Return a manifest of a release with these files, as `write_manifest` takes it; nothing in it was measured."""
    size = dict.fromkeys(
        [
            "trainable_parameters",
            "frozen_parameters",
            "nonzero_parameters",
            "macs_per_image",
            "macs_per_pass",
            "layers",
        ],
        1,
    )
    return {
        "files": files,
        "input": {
            "shape": [[None, 3, 8, 8]],
            "names": None,
            "dtype": "float32",
            "size": "fixed",
            "normalization": None,
        },
        "output": {"activation": "softmax", "keys": [], "left_out": []},
        "plain_weights": {"file": None, "why_none": "there is none"},
        "probe": {"scale": 1.0, "input_sha256": "0" * 64, "tolerance": 1e-4},
        "quantization": {"kernels": []},
        "size": {form: {**size, "uncounted": []} for form in ("train_form", "fused")},
    }
