"""The only place that knows PaddleSeg: find it, mend what is old in it, register in it, train through it."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

from ..arithmetic.layer_norm import mend_layer_norm
from ..frameworks.scripts import folder_above, load
from ..measure.processors import let_amd_multiply_fast

_INSTALL = "install it (pip install --no-deps paddleseg==2.8.0), or run a script of a checkout by tools/launch.py"


def checkout_of(script: str | os.PathLike[str]) -> Path | None:
    """Return the checkout of PaddleSeg that a script lies in, or None."""
    return folder_above(script, "paddleseg/cvlibs/manager.py")


def setup(checkout: str | os.PathLike[str] | None = None) -> ModuleType:
    """Return `paddleseg`: mended, everything of this library registered; a second call does nothing.

    After it, `type` of a backbone in a YAML file may be any of `list_models()` that has stages, a config may have a
    section `Reparam`, and weight files are read without running them and are errors where they do not fit. It is the
    PaddleSeg of a `checkout`, or else the one that is installed. Raises `ReparamError` where there is none.
    """
    let_amd_multiply_fast()
    mend_layer_norm()
    paddleseg = load("paddleseg", ["paddleseg.core"], "PaddleSeg", _INSTALL, checkout)
    if not hasattr(paddleseg, "_paddle_reparam"):
        from . import backbones, loading, mends, section

        mends.apply()
        loading.register()
        backbones.register()
        section.register()
        paddleseg._paddle_reparam = True
    return paddleseg
