#!/usr/bin/env bash
# A layer put into a network of paddle.vision reads a height of -1 out of x.shape when the network is exported.
#
# paddle.jit turns `x.shape` of a layer into the sizes that the image will have, but not inside code of Paddle's own: of
# a layer that a network of paddle.vision calls, it takes the size that is open as it stands, which is -1. The export is
# written without a word and computes something else. The same layer, called by a network of one's own, is right.
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


class TimesHeight(nn.Layer):
    def forward(self, x):
        return x * x.shape[2]


class Behind(nn.Layer):
    def __init__(self, network, layer):
        super().__init__()
        self.network, self.layer = network, layer

    def forward(self, x):
        return self.layer(self.network(x))


def export_error(network, name):
    network.eval()
    images = paddle.randn([2, 3, 64, 64])
    expected = network(images).numpy()
    open_size = paddle.static.InputSpec([None, 3, None, None])
    paddle.jit.save(network, name, input_spec=[open_size])
    return np.abs(paddle.jit.load(name)(images).numpy() - expected).max() / np.abs(expected).max()


paddle.seed(0)
inside = paddle.vision.models.resnet18(num_classes=0, with_pool=False)
inside.layer4 = nn.Sequential(inside.layer4, TimesHeight())
behind = Behind(paddle.vision.models.resnet18(num_classes=0, with_pool=False), TimesHeight())
print("relative error of the export; expected: below 1e-3")
wrong, right = export_error(inside, "inside"), export_error(behind, "behind")
print(f"the layer inside a network of paddle.vision {wrong:.1e}")
print(f"the layer behind it                         {right:.1e}")
as_described = wrong > 0.1 and right < 1e-3
print("as described" if as_described else "changed")
sys.exit(not as_described)
PROGRAM
venv/bin/python -W ignore program.py

# Seen (2026-12, x86-64 with AVX512):
#   paddlepaddle 3.3.1 numpy 1.26.4
#   relative error of the export; expected: below 1e-3
#   the layer inside a network of paddle.vision 1.5e+00
#   the layer behind it                         0.0e+00
#   as described
