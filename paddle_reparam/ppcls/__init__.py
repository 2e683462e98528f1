"""The only place that knows PaddleClas: find it, mend what is old in it, register in it, train through it."""

from __future__ import annotations

import warnings
from types import ModuleType

from ..measure.processors import let_amd_multiply_fast


def setup() -> ModuleType:
    """Return PaddleClas' `ppcls`: found, mended, everything of this library registered; a second call does nothing.

    After it, `Arch.name` in a YAML file may be `ReparamModel` or any of `list_models()`, weight files are read without
    running them and are errors where they do not fit, and matrix products are fast on AMD processors too. Raises
    `ReparamError` where no PaddleClas with a training Engine is installed.
    """
    from . import locate

    let_amd_multiply_fast()
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
