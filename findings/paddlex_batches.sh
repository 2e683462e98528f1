#!/usr/bin/env bash
# PaddleX gives each result of a batch the class_ids of all images of the batch.
#
# Of two images with a batch_size of 1, the results' class_ids are [[2]] and [[0]]; with a batch_size of 2 both are
# [[2], [0]]. Scores and label_names are right. The features of image feature models come in the same way.
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
paddle.jit.save(network, "model/inference", input_spec=[paddle.static.InputSpec([None, 3, 8, 8], "float32", "x")])
steps = [
    {"ResizeImage": {"size": [8, 8]}},
    {"NormalizeImage": {"mean": [0.0] * 3, "std": [1.0] * 3, "scale": 1 / 255, "order": ""}},
    {"ToCHWImage": None},
]
config = {"PreProcess": {"transform_ops": steps}, "PostProcess": {"Topk": {"topk": 1}}}
with open("model/inference.yml", "w") as file:
    yaml.safe_dump(config, file)

# Images in BGR, as OpenCV has them: the first is blue, whose class is 2, the second red, whose class is 0.
images = [np.zeros((8, 8, 3), np.uint8) for _ in range(2)]
images[0][:, :, 0] = images[1][:, :, 2] = 255
model = create_model(model_name="PP-LCNet_x1_0", model_dir="model")
one, two = (
    [np.ravel(result["class_ids"]).tolist() for result in model.predict(images, batch_size=size)] for size in (1, 2)
)
print("expected: the same twice, [[2], [0]]")
print("class_ids, batch_size=1", one)
print("class_ids, batch_size=2", two)
as_described = one == [[2], [0]] and two == [[2, 0], [2, 0]]
print("as described" if as_described else "changed")
sys.exit(not as_described)
PROGRAM
venv/bin/python -W ignore program.py

# Seen (2026-11, x86-64):
#   paddlepaddle 3.3.1 paddlex 3.7.2
#   expected: the same twice, [[2], [0]]
#   class_ids, batch_size=1 [[2], [0]]
#   class_ids, batch_size=2 [[2, 0], [2, 0]]
#   as described
