#!/usr/bin/env bash
# paddle2onnx writes adaptive average pooling to a size that does not divide the map as a pool with fixed windows.
#
# AdaptiveAvgPool2D((1, 3)) of the map 0, 1, 2, 3, 4, 5, 6, 7 averages [0, 3), [2, 6) and [5, 8): 1, 3.5, 6. The ONNX
# file has one window of 4 with a stride of 2: 1.5, 3.5, 5.5. Nothing is said, and onnx.checker passes the file.
#
# Needs Python 3.11, 2 GB in a temporary folder. Exit 0: as described; 1: it changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet paddlepaddle==3.3.1 numpy==1.26.4 setuptools==80.9.0
# Without what it would optimise the file with, which is not used here.
venv/bin/pip install --quiet --no-deps paddle2onnx==2.1.0
venv/bin/pip install --quiet onnx==1.17.0 onnxruntime==1.32.0
cat > program.py <<'PROGRAM'
import sys

import numpy as np
import onnx
import onnxruntime
import paddle
import paddle2onnx

print("paddlepaddle", paddle.__version__, "paddle2onnx", paddle2onnx.__version__, "onnxruntime", onnxruntime.__version__)
layer = paddle.nn.AdaptiveAvgPool2D((1, 3))
layer.eval()
x = np.arange(8, dtype="float32").reshape([1, 1, 1, 8])
paddle.jit.save(layer, "pool", input_spec=[paddle.static.InputSpec([1, 1, 1, 8], "float32", "x")])
paddle2onnx.export("pool.json", "pool.pdiparams", "pool.onnx", opset_version=17, optimize_tool="None")
onnx.checker.check_model(onnx.load("pool.onnx"), full_check=True)
session = onnxruntime.InferenceSession("pool.onnx", providers=["CPUExecutionProvider"])
expected = layer(paddle.to_tensor(x)).numpy().ravel().tolist()
found = session.run(None, {session.get_inputs()[0].name: x})[0].ravel().tolist()
print("expected: the same twice, or a conversion that is refused")
print("Paddle      ", expected)
print("onnxruntime ", found)
as_described = expected == [1.0, 3.5, 6.0] and found == [1.5, 3.5, 5.5]
print("as described" if as_described else "changed")
sys.exit(not as_described)
PROGRAM
venv/bin/python -W ignore program.py

# Seen (2026-11, x86-64):
#   paddlepaddle 3.3.1 paddle2onnx 2.1.0 onnxruntime 1.32.0
#   expected: the same twice, or a conversion that is refused
#   Paddle       [1.0, 3.5, 6.0]
#   onnxruntime  [1.5, 3.5, 5.5]
#   as described
