#!/usr/bin/env bash
# On a CPU the gradient of a LayerNorm's input is wrong where its weight is frozen.
#
# A LayerNorm whose weight does not train, as where a network is trained further with its norms frozen, hands a wrong
# gradient to everything before it, without a word: the loss falls, if at all, by other steps than were asked for. With
# a weight that trains the same gradient is right, and so it is where weight and bias are applied after the norm.
#
# Needs Python 3.11, 2 GB in a temporary folder. Exit 0: as described; 1: it changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet paddlepaddle==3.3.1 numpy==1.26.4 setuptools==80.9.0
cat > program.py <<'PROGRAM'
import sys

import numpy as np
import paddle
import paddle.nn.functional as F

print("paddlepaddle", paddle.__version__, "numpy", np.__version__)
paddle.set_device("cpu")
paddle.seed(0)
values, scales, factors = (paddle.randn(shape, dtype="float64") for shape in ([4, 16], [16], [4, 16]))


def gradient(normed, frozen):
    x, weight = values.clone().detach(), scales.clone().detach()
    x.stop_gradient, weight.stop_gradient = False, frozen
    (normed(x, weight) * factors).sum().backward()
    return x.grad.numpy()


def in_one(x, weight):
    return F.layer_norm(x, [16], weight)


def in_two(x, weight):
    return F.layer_norm(x, [16]) * weight


def loss(x):
    centred = x - x.mean(1, keepdims=True)
    return (centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) * scales.numpy() * factors.numpy()).sum()


expected = np.zeros([4, 16])
for place in np.ndindex(4, 16):
    step = np.zeros([4, 16])
    step[place] = 1e-6
    expected[place] = (loss(values.numpy() + step) - loss(values.numpy() - step)) / 2e-6
print("relative error of the gradient of the input, against differences of the loss; expected: below 1e-6")
errors = {}
for name, normed in (("layer_norm(x, weight)", in_one), ("layer_norm(x) * weight", in_two)):
    for frozen in (False, True):
        error = np.abs(gradient(normed, frozen) - expected).max() / np.abs(expected).max()
        errors[normed, frozen] = error
        print(f"{name:22s} weight {'frozen' if frozen else 'trains'} {error:.0e}")
wrong = errors.pop((in_one, True))
as_described = wrong > 0.1 and max(errors.values()) < 1e-6
print("as described" if as_described else "changed")
sys.exit(not as_described)
PROGRAM
venv/bin/python -W ignore program.py

# Seen (2026-11, x86-64 with AVX512):
#   paddlepaddle 3.3.1 numpy 1.26.4
#   relative error of the gradient of the input, against differences of the loss; expected: below 1e-6
#   layer_norm(x, weight)  weight trains 6e-10
#   layer_norm(x, weight)  weight frozen 2e+00
#   layer_norm(x) * weight weight trains 6e-10
#   layer_norm(x) * weight weight frozen 6e-10
#   as described
