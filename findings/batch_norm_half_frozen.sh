#!/usr/bin/env bash
# A BatchNorm2D whose weight is frozen does not train its bias either, and the other way round.
#
# stop_gradient = True on one of the two parameters, as for a scale that stays at 1: the other one, which is to train,
# gets no gradient at all, and an optimizer leaves it where it is without a word. LayerNorm trains it.
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

print("paddlepaddle", paddle.__version__, "numpy", np.__version__)
paddle.seed(0)
x, target = paddle.randn([4, 3, 5, 5]), paddle.randn([4, 3, 5, 5])
moved = {}
print("how far the parameter that is not frozen went in a step of SGD; expected: more than 0")
for make in (lambda: nn.BatchNorm2D(3), lambda: nn.LayerNorm([3, 5, 5])):
    for frozen, trained in (("weight", "bias"), ("bias", "weight")):
        layer = make()
        getattr(layer, frozen).stop_gradient = True
        before = getattr(layer, trained).numpy().copy()
        optimizer = paddle.optimizer.SGD(0.1, parameters=layer.parameters())
        ((layer(x) - target) ** 2).sum().backward()
        optimizer.step()
        name = type(layer).__name__
        moved[name, trained] = float(np.abs(getattr(layer, trained).numpy() - before).max())
        print(f"{name:11s} {frozen} frozen, {trained} {moved[name, trained]:.3f}")
as_described = all((distance == 0) == (name == "BatchNorm2D") for (name, _), distance in moved.items())
print("as described" if as_described else "changed")
sys.exit(not as_described)
PROGRAM
venv/bin/python -W ignore program.py

# Seen (2026-11, x86-64 with AVX512):
#   paddlepaddle 3.3.1 numpy 1.26.4
#   how far the parameter that is not frozen went in a step of SGD; expected: more than 0
#   BatchNorm2D weight frozen, bias 0.000
#   BatchNorm2D bias frozen, weight 0.000
#   LayerNorm   weight frozen, bias 2.154
#   LayerNorm   bias frozen, weight 3.923
#   as described
