"""The only place that knows PaddleClas: find it, mend what is old in it, register in it, train through it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from types import ModuleType

from ..arithmetic.layer_norm import mend_layer_norm
from ..frameworks.scripts import folder_above
from ..measure.processors import let_amd_multiply_fast


def checkout_of(script: str | os.PathLike[str]) -> Path | None:
    """Return the checkout of PaddleClas that a script lies in, or None."""
    return folder_above(script, "ppcls/engine/engine.py")


def setup(checkout: str | os.PathLike[str] | None = None) -> ModuleType:
    """Return PaddleClas' `ppcls`: found, mended, everything of this library registered; a second call does nothing.

    After it, `Arch.name` in a YAML file may be `ReparamModel` or any of `list_models()`, weight files are read without
    running them and are errors where they do not fit, and matrix products are fast on AMD processors too. It
    is the PaddleClas of a `checkout`, or else the one that is found. Raises `ReparamError` where there is none with a
    training Engine.
    """
    from . import locate

    if checkout is not None:
        os.environ[locate.HOME] = str(checkout)

    let_amd_multiply_fast()
    mend_layer_norm()
    # One of PaddleClas' losses hides every warning of the process as it is imported.
    with warnings.catch_warnings():
        ppcls = locate.load()
        from . import arch, engine, guards, loading, mends, transforms
    if not hasattr(ppcls, "_paddle_reparam"):
        mends.apply()
        loading.register()
        transforms.register()
        arch.register()
        engine.register()
        guards.watch_readers()
        if ppcls.utils.logger._logger is None:
            # An Engine sets it up; models built without one write to it as well.
            ppcls.utils.logger.init_logger()
        ppcls._paddle_reparam = True
    return ppcls
