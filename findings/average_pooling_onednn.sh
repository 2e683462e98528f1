#!/usr/bin/env bash
# Paddle Inference with oneDNN divides an average pool's last window by another number than Paddle itself does.
#
# AvgPool2D(kernel_size=2, ceil_mode=True, exclusive=False) of a map of ones, 3 pixels a side. The last windows hang
# over the edge. Paddle, jit.load and the Predictor without oneDNN divide by the pixels inside the map and padding that
# was asked for (none): 1 everywhere. With oneDNN, which is on by default, the sum is divided by the whole window.
#
# Needs Python 3.11, a CPU with oneDNN, 2 GB in a temporary folder. Exit 0: as described; 1: it changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet paddlepaddle==3.3.1 numpy==1.26.4 setuptools==80.9.0
cat > program.py <<'PROGRAM'
import os
import sys

import numpy as np
import paddle
from paddle.inference import Config, create_predictor

print("paddlepaddle", paddle.__version__, "numpy", np.__version__)
layer = paddle.nn.AvgPool2D(2, ceil_mode=True, exclusive=False)
layer.eval()
x = np.ones([1, 1, 3, 3], "float32")
paddle.jit.save(layer, "out/pool", input_spec=[paddle.static.InputSpec([1, 1, 3, 3], "float32", "x")])


def predict(onednn):
    program = "out/pool.json" if os.path.exists("out/pool.json") else "out/pool.pdmodel"
    config = Config(program, "out/pool.pdiparams")
    config.disable_glog_info()
    config.enable_mkldnn() if onednn else config.disable_mkldnn()
    predictor = create_predictor(config)
    handle = predictor.get_input_handle(predictor.get_input_names()[0])
    handle.copy_from_cpu(x)
    predictor.run()
    return predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()[0, 0].tolist()


itself = layer(paddle.to_tensor(x)).numpy()[0, 0].tolist()
without, with_onednn = predict(False), predict(True)
print("expected: the same three times")
print("Paddle                     ", itself)
print("Predictor, without oneDNN  ", without)
print("Predictor, with oneDNN     ", with_onednn)
as_described = itself == without == [[1.0, 1.0], [1.0, 1.0]] and with_onednn == [[1.0, 0.5], [0.5, 0.25]]
print("as described" if as_described else "changed")
sys.exit(not as_described)
PROGRAM
venv/bin/python -W ignore program.py

# Seen (2026-11, x86-64 with AVX512):
#   paddlepaddle 3.3.1 numpy 1.26.4
#   expected: the same three times
#   Paddle                      [[1.0, 1.0], [1.0, 1.0]]
#   Predictor, without oneDNN   [[1.0, 1.0], [1.0, 1.0]]
#   Predictor, with oneDNN      [[1.0, 0.5], [0.5, 0.25]]
#   as described
