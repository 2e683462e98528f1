#!/usr/bin/env bash
# OpenVINO computes something else behind a convolution in int8 whose output is put out as well.
#
# A network is quantised by NNCF. Where what one of its convolutions gives before the bias is made an output more, the
# first output, which nobody changed, is another one. In float32 it stays the same, and so it does where the output is
# taken behind the bias.
#
# Needs Python 3.11, 1 GB in a temporary folder. Exit 0: as described; 1: it changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet openvino==2026.4.1 nncf==3.4.0 networkx==3.6.1 numpy==1.26.4 scipy==1.17.1
cat > program.py <<'PROGRAM'
import sys

import nncf
import numpy as np
import openvino as ov
from openvino import opset13 as op

print("openvino", ov.__version__.split("-")[0], "nncf", nncf.__version__, "numpy", np.__version__)
draw = np.random.default_rng(0)


def network():
    x = y = op.parameter([-1, 3, 16, 16], np.float32)
    channels = 3
    for i in range(3):
        weight = draw.standard_normal([16, channels, 3, 3]) * np.sqrt(2 / (9 * channels))
        y = op.convolution(y, weight.astype("float32"), [1, 1], [1, 1], [1, 1], [1, 1])
        y.friendly_name = f"convolution {i}"
        y = op.add(y, draw.standard_normal([1, 16, 1, 1]).astype("float32"))
        y.friendly_name = f"bias {i}"
        y, channels = op.relu(y), 16
    return ov.Model([op.reduce_mean(y, [2, 3], False)], [x])


def first_output(model, more=None):
    model = model.clone()
    if more is not None:
        model.add_outputs([(more, 0)])
    return ov.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images)[0].copy()


def error(actual):
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


images = draw.standard_normal([64, 3, 16, 16]).astype("float32")
model = network()
expected = first_output(model)
int8 = nncf.quantize(model.clone(), nncf.Dataset([images]), subset_size=1)
errors = {
    "int8": error(first_output(int8)),
    "int8, bias 1 put out as well": error(first_output(int8, "bias 1")),
    "int8, convolution 1 put out as well": error(first_output(int8, "convolution 1")),
    "float32, convolution 1 put out as well": error(first_output(model, "convolution 1")),
}
print("how far the first output is from that in float32, relative; expected: below 0.1")
for name, value in errors.items():
    print(f"{name:40s} {value:.3f}")
plain, behind, before, in_float = errors.values()
as_described = max(plain, behind, in_float) < 0.1 and before > 0.3
print("as described" if as_described else "changed")
sys.exit(not as_described)
PROGRAM
venv/bin/python -W ignore program.py | grep -v "Statistics\|Bias\|INFO:\|^$"

# Seen (2026-11, x86-64 with AMX):
#   openvino 2026.4.1 nncf 3.4.0 numpy 1.26.4
#   how far the first output is from that in float32, relative; expected: below 0.1
#   int8                                     0.012
#   int8, bias 1 put out as well             0.012
#   int8, convolution 1 put out as well      0.562
#   float32, convolution 1 put out as well   0.000
#   as described
