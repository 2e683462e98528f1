#!/usr/bin/env bash
# paddle.jit.save of a layer under weight_norm ships the weight of the last forward pass, not of the loaded checkpoint.
#
# weight_norm computes the weight in a hook before each forward pass. Load a state dict, call eval() and jit.save: the
# weight that the hook left there before the loading is stored, and what was saved computes another function than the
# layer. One forward pass between loading and saving makes it right.
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
from paddle import nn
from paddle.nn.utils import weight_norm

print("paddlepaddle", paddle.__version__, "numpy", np.__version__)


def network(value):
    return weight_norm(nn.Linear(2, 1, nn.initializer.Constant(value), bias_attr=False))


x = paddle.ones([1, 2])
model = network(1.0)  # what it starts with
model.set_state_dict(network(5.0).state_dict())  # what was trained
model.eval()
spec = [paddle.static.InputSpec([None, 2], "float32", "x")]
paddle.jit.save(model, "before", input_spec=spec)
expected = float(model(x))
paddle.jit.save(model, "after", input_spec=spec)
before, after = (float(paddle.jit.load(name)(x)) for name in ("before", "after"))
print("expected: the same three times")
print(f"the layer                             {expected:.1f}")
print(f"saved after loading                   {before:.1f}")
print(f"saved after loading and one pass      {after:.1f}")
as_described = np.allclose([expected, before, after], [10.0, 2.0, 10.0])
print("as described" if as_described else "changed")
sys.exit(not as_described)
PROGRAM
venv/bin/python -W ignore program.py

# Seen (2026-11, x86-64):
#   paddlepaddle 3.3.1 numpy 1.26.4
#   expected: the same three times
#   the layer                             10.0
#   saved after loading                   2.0
#   saved after loading and one pass      10.0
#   as described
