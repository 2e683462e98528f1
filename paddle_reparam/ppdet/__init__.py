"""The only place that knows PaddleDetection: find it, mend what is old in it, register in it, train through it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from types import ModuleType

from ..arithmetic.layer_norm import mend_layer_norm
from ..frameworks.scripts import folder_above, load
from ..measure.processors import let_amd_multiply_fast

_INSTALL = "install it (pip install --no-deps paddledet==2.6.0), or run a script of a checkout by tools/launch.py"


def checkout_of(script: str | os.PathLike[str]) -> Path | None:
    """Return the checkout of PaddleDetection that a script lies in, or None."""
    return folder_above(script, "ppdet/core/workspace.py")


def setup(checkout: str | os.PathLike[str] | None = None) -> ModuleType:
    """Return `ppdet`: mended, everything of this library registered; a second call does nothing.

    After it, the backbone in a YAML file may be any of `list_models()` that has stages, a config may have a section
    `Reparam`, and weight files are read without running them and are errors where they do not fit. It is the
    PaddleDetection of a `checkout`, or else the one that is installed. Raises `ReparamError` where there is none.
    """
    let_amd_multiply_fast()
    mend_layer_norm()
    ppdet = load("ppdet", ["ppdet.engine"], "PaddleDetection", _INSTALL, checkout)
    if not hasattr(ppdet, "_paddle_reparam"):
        from . import averages, backbones, exporting, loading, mends, section

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mends.apply()
        averages.register()
        loading.register()
        backbones.register()
        section.register()
        exporting.register()
        ppdet._paddle_reparam = True
    return ppdet
