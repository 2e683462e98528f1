"""A file of eight bits for OpenVINO, made of an ONNX file by NNCF; needs the packages of the extra `openvino`."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ReparamError, one_sentence
from ..files import Folder
from .runtimes.openvino import METADATA, need_openvino


def quantize_openvino(
    source: Folder, target: Folder, images: np.ndarray, batch: int = 16, metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write an ONNX file of float32 in int8 for OpenVINO, with the ranges of its activations on images `[N, C, H, W]`.

    Two files are written: the network, which ends in `.xml`, and its weights beside it, which end in `.bin`. Weights
    have a scale for each channel, activations one each; biases are corrected for what rounding moves on average. The
    file says `metadata` of itself. Returns the settings. Raises `ReparamError` without images, without the extra
    `openvino`, and where NNCF cannot quantise the network.
    """
    if not len(images):
        raise ReparamError("the ranges of the activations are measured on images, and none was given")
    openvino, nncf = need_openvino(), need_openvino("nncf")
    target = Path(target)
    nncf.set_log_level(logging.ERROR)
    with one_sentence(f"{source}: NNCF cannot quantise it"), contextlib.redirect_stdout(io.StringIO()):
        # Not by `read_model`: it leaves the kernels of grouped convolutions behind a reshape, and NNCF then measures
        # another range for each column of a kernel and leaves the convolution in float32.
        model = openvino.convert_model(str(source))
        batches = [images[i : i + batch] for i in range(0, len(images), batch)]
        quantized = nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches))
        # What has no name of its own is called by how many there were before it in this process.
        for index, operation in enumerate(quantized.get_ordered_ops()):
            kind = operation.get_type_name()
            if re.fullmatch(rf"{kind}_\d+", operation.friendly_name):
                operation.friendly_name = f"{kind}_{index}"
        for name, text in (metadata or {}).items():
            quantized.set_rt_info(text, [METADATA, name])
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            written = Path(folder) / target.name
            openvino.save_model(quantized, str(written), compress_to_fp16=False)
            for suffix in (".bin", ".xml"):
                os.replace(written.with_suffix(suffix), target.with_suffix(suffix))
    return {}
