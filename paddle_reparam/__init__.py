"""Convolutions that train rich and ship plain, for PaddlePaddle and PaddleClas.

replace(model, "RefConv2D")        put a layer in the place of a model's convolutions
reparameterize(model)              fuse them out again
verify(model, fused, input_spec)   prove that both are the same function
release(model, weights, folder)    all of it, exported for Paddle Inference and checked
InferenceModel(folder)             run what was released
"""

import warnings

# Before paddle: 2.6 exports a zlib of its own, and Python's, where it is loaded after that one, crashes in it.
import zlib  # noqa: F401

# What compiles C++ extensions for Paddle says so at every import of Paddle; nothing is compiled here.
warnings.filterwarnings("ignore", message="No ccache found", category=UserWarning)

__version__ = "0.4.0"

from . import layers as layers
from . import models as models
from .deploy.inference import InferenceModel
from .deploy.release import release
from .deploy.released import check_release
from .errors import ReparamError
from .registry import create_model, list_layers, list_models
from .surgery.rewrite import reparameterize, replace
from .surgery.verify import verify
from .weights.checkpoints import load, load_into, save
from .weights.published import convert_state

__all__ = [
    "InferenceModel",
    "ReparamError",
    "check_release",
    "convert_state",
    "create_model",
    "layers",
    "list_layers",
    "list_models",
    "load",
    "load_into",
    "models",
    "release",
    "reparameterize",
    "replace",
    "save",
    "verify",
]
