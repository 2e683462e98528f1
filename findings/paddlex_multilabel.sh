#!/usr/bin/env bash
# PaddleX' multi-label classification takes a class's threshold for an image's, and leaves a crop out.
#
# With the thresholds 0.9 for class 0 and 0.5 for all others, the first image of a batch gets 0.9 for every class, the
# second that of class 1, and so on: of three classes at 0.6 none is found, where two should be. A CropImage in
# inference.yml, which image classification runs, is read and not run; nothing is said of either.
#
# Needs Python 3.11, 3 GB in a temporary folder. Exit 0: as described; 1: it changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet paddlepaddle==3.3.1 numpy==2.3.5 "paddlex[cv]==3.7.2"
cat > program.py <<'PROGRAM'
import sys

import numpy as np
import paddle
import paddlex
import yaml
from paddlex import create_model

print("paddlepaddle", paddle.__version__, "paddlex", paddlex.__version__)


class Means(paddle.nn.Layer):
    def __init__(self):
        super().__init__()
        self.same = paddle.nn.Conv2D(3, 3, 1, bias_attr=False)
        self.same.weight.set_value(np.eye(3, dtype="float32").reshape([3, 3, 1, 1]))

    def forward(self, x):
        return self.same(x).mean([2, 3])


network = Means()
network.eval()
paddle.jit.save(network, "model/inference", input_spec=[paddle.static.InputSpec([None, 3, None, None], "float32", "x")])


def found(image, crop=(), threshold=0.5):
    steps = [
        {"ResizeImage": {"size": [16, 16]}},
        *crop,
        {"NormalizeImage": {"mean": [0.0] * 3, "std": [1.0] * 3, "scale": 1 / 255, "order": ""}},
        {"ToCHWImage": None},
    ]
    ending = {"MultiLabelThreshOutput": {"threshold": 0.5, "label_list": ["red", "green", "blue"]}}
    with open("model/inference.yml", "w") as file:
        yaml.safe_dump({"PreProcess": {"transform_ops": steps}, "PostProcess": ending}, file)
    [result] = create_model(model_name="PP-LCNet_x1_0_ML", model_dir="model").predict([image], threshold=threshold)
    return sorted(result["label_names"])


# In BGR, as OpenCV has them: each channel at 0.6.
gray = np.full((16, 16, 3), 153, np.uint8)
thresholds = {"default": 0.5, 0: 0.9}
by_class = found(gray, threshold=thresholds)
print("thresholds", thresholds, "expected ['blue', 'green']: red alone needs 0.9; found", by_class)

# Red in the middle, black around.
spot = np.zeros((16, 16, 3), np.uint8)
spot[4:12, 4:12, 2] = 255
cropped = found(spot, crop=[{"CropImage": {"size": 8}}])
print("a crop to the red middle, expected ['red']; found", cropped)
as_described = by_class == [] and cropped == []
print("as described" if as_described else "changed")
sys.exit(not as_described)
PROGRAM
venv/bin/python -W ignore program.py

# Seen (2026-11, x86-64):
#   paddlepaddle 3.3.1 paddlex 3.7.2
#   thresholds {'default': 0.5, 0: 0.9} expected ['blue', 'green']: red alone needs 0.9; found []
#   a crop to the red middle, expected ['red']; found []
#   as described
