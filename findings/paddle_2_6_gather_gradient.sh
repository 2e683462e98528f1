#!/usr/bin/env bash
# paddle.gather along any axis but the first has a wrong gradient in Paddle 2.6.2.
#
# gather(x, indices, axis) gives the right numbers, and so does its gradient for axis 0, and for a loss in which all of
# them count alike. Where they do not, the gradient of the other axes has the right numbers in the wrong places.
# index_select, which is the same function, has the right one.
#
# Needs Python 3.11, 2 GB in a temporary folder. Exit 0: as described; 1: it changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet paddlepaddle==2.6.2 numpy==1.26.4 setuptools==80.9.0
cat > program.py <<'PROGRAM'
import sys

import numpy as np
import paddle

print("paddlepaddle", paddle.__version__, "numpy", np.__version__)
shape, errors = (2, 3, 4), {}
weights = np.random.default_rng(0).standard_normal(shape).astype("float32")
print("largest error of the gradient of sum(weights * f(x, reversed indices)); expected: 0")
for axis in range(3):
    for name in ("gather", "index_select"):
        x = paddle.zeros(shape)
        x.stop_gradient = False
        backwards = paddle.arange(shape[axis] - 1, -1, -1)
        taken = getattr(paddle, name)(x, backwards, axis)
        assert taken.shape == list(shape)
        (taken * paddle.to_tensor(weights)).sum().backward()
        errors[name, axis] = float(np.abs(x.grad.numpy() - np.flip(weights, axis)).max())
        print(f"{name:12s} axis {axis}: {errors[name, axis]:.1f}")
wrong = sorted(key for key, error in errors.items() if error > 0.1)
as_described = wrong == [("gather", 1), ("gather", 2)] and max(e for k, e in errors.items() if k not in wrong) == 0
print("as described" if as_described else "changed")
sys.exit(not as_described)
PROGRAM
venv/bin/python -W ignore program.py

# Seen (2026-11, x86-64 with AVX512):
#   paddlepaddle 2.6.2 numpy 1.26.4
#   largest error of the gradient of sum(weights * f(x, reversed indices)); expected: 0
#   gather       axis 0: 0.0
#   index_select axis 0: 0.0
#   gather       axis 1: 2.6
#   index_select axis 1: 0.0
#   gather       axis 2: 2.5
#   index_select axis 2: 0.0
#   as described
