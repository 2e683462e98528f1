"""The only place that knows PaddleSeg: find it, mend what is old in it, register in it, train through it."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

from ..errors import ReparamError
from ..measure.processors import let_amd_multiply_fast

_INSTALL = "install it (pip install --no-deps paddleseg==2.8.0), or run a script of a checkout by tools/launch.py"


def checkout_of(script: str | os.PathLike[str]) -> Path | None:
    """Return the checkout of PaddleSeg that a script lies in, or None."""
    folders = Path(script).resolve().parents
    return next((folder for folder in folders if (folder / "paddleseg" / "cvlibs" / "manager.py").is_file()), None)


def setup(checkout: str | os.PathLike[str] | None = None) -> ModuleType:
    """Return `paddleseg`: mended, everything of this library registered; a second call does nothing.

    After it, `type` of a backbone in a YAML file may be any of `list_models()` that has stages, a config may have a
    section `Reparam`, and weight files are read without running them and are errors where they do not fit. It is the
    PaddleSeg of a `checkout`, or else the one that is installed. Raises `ReparamError` where there is none.
    """
    let_amd_multiply_fast()
    paddleseg = _load(checkout)
    if not hasattr(paddleseg, "_paddle_reparam"):
        from . import backbones, loading, mends, section

        mends.apply()
        loading.register()
        backbones.register()
        section.register()
        paddleseg._paddle_reparam = True
    return paddleseg


def _load(checkout: str | os.PathLike[str] | None) -> ModuleType:
    if checkout is not None and str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    try:
        # It prints warnings of Python's as it is imported, and looks for the GPUs of the machine by a program.
        with warnings.catch_warnings(), contextlib.redirect_stderr(None):
            warnings.simplefilter("ignore")
            module = importlib.import_module("paddleseg")
            importlib.import_module("paddleseg.core")
    except ModuleNotFoundError as error:
        if error.name == "paddleseg":
            raise ReparamError(f"PaddleSeg is not installed; {_INSTALL}") from error
        raise ReparamError(f"PaddleSeg needs the package {error.name!r}; install it") from error
    loaded = Path(module.__file__).resolve()
    if checkout is not None and loaded != (Path(checkout) / "paddleseg" / "__init__.py").resolve():
        raise ReparamError(f"PaddleSeg has been imported as {loaded} already and cannot be from {checkout} as well")
    return module
