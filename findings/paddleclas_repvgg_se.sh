#!/usr/bin/env bash
# PaddleClas fuses a RepVGG with squeeze and excitation into a network without squeeze and excitation.
#
# `RepVGG_D2se` weighs the channels of each block behind its branches. After `re_parameterize`, which
# PaddleClas' export calls, a block is the fused convolution and the activation alone: what weighs the channels is gone,
# without a word, and the network computes something else. Without squeeze and excitation the fusing is right.
#
# Needs Python 3.11, 2 GB in a temporary folder. Exit 0: as described; 1: it changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet paddlepaddle==3.3.1 numpy==1.26.4 setuptools==80.9.0 easydict==1.13 pyyaml==6.0.3 \
    scipy==1.15.3 opencv-python-headless==4.11.0.86 tqdm==4.67.1 scikit-learn==1.6.1 prettytable==3.16.0 ujson==5.10.0 \
    requests==2.32.5 pillow==11.3.0 six==1.17.0
venv/bin/pip install --quiet --no-deps paddleclas==2.6.0
cat > program.py <<'PROGRAM'
import importlib.util
import sys
from importlib.metadata import version

import numpy as np
import paddle

# Its modules import one another from there.
sys.path += importlib.util.find_spec("paddleclas").submodule_search_locations

from ppcls.arch.backbone.model_zoo.repvgg import RepVGG

print("paddlepaddle", paddle.__version__, "paddleclas", version("paddleclas"), "numpy", np.__version__)
paddle.seed(0)
images = paddle.randn([2, 3, 64, 64])
print("relative error of the fused network; expected: below 1e-3")
errors = {}
for use_se in (False, True):
    network = RepVGG(num_blocks=[1, 1, 1, 1], width_multiplier=[0.5, 0.5, 0.5, 0.5], class_num=10, use_se=use_se)
    network.eval()
    trained = network(images).numpy()
    for layer in network.sublayers():
        if hasattr(layer, "re_parameterize"):
            layer.re_parameterize()
    errors[use_se] = np.abs(network(images).numpy() - trained).max() / np.abs(trained).max()
    print(f"{'with' if use_se else 'without'} squeeze and excitation {errors[use_se]:.0e}")
as_described = errors[True] > 0.1 and errors[False] < 1e-3
print("as described" if as_described else "changed")
sys.exit(not as_described)
PROGRAM
venv/bin/python -W ignore program.py

# Seen (2026-12, x86-64 with AVX512):
#   paddlepaddle 3.3.1 paddleclas 2.6.0 numpy 1.26.4
#   relative error of the fused network; expected: below 1e-3
#   without squeeze and excitation 4e-07
#   with squeeze and excitation 4e+01
#   as described
