"""Find a PaddleClas that can train, and import its `ppcls`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from ..errors import ReparamError

HOME = "PADDLECLAS_HOME"
_INSTALL = f"install it (pip install --no-deps paddleclas==2.4.2), or set {HOME} to a checkout of PaddleClas"


def has_engine(root: str | os.PathLike[str]) -> bool:
    """Return whether a folder holds a `ppcls` with the training Engine."""
    return (Path(root) / "ppcls" / "engine" / "engine.py").is_file()


def find() -> Path:
    """Return the folder whose `ppcls` to use: `PADDLECLAS_HOME`, else a `ppcls` on the path, else the wheel's.

    Raises `ReparamError` with what to install where there is none, or where it has no Engine.
    """
    home = os.environ.get(HOME)
    if home:
        if not has_engine(home):
            raise ReparamError(f"{HOME}={home} is no checkout of PaddleClas: it has no ppcls/engine/engine.py")
        return Path(home).resolve()
    # The wheel keeps ppcls inside its own package, whose import is slow and prepends folders to the path.
    for package, levels in (("ppcls", 2), ("paddleclas", 1)):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            root = Path(spec.origin).resolve().parents[levels - 1]
            if not has_engine(root):
                raise ReparamError(
                    f"the PaddleClas in {root} has no training Engine (the 2.6 wheel has none); {_INSTALL}"
                )
            return root
    raise ReparamError(f"PaddleClas is not installed; {_INSTALL}")


def load() -> ModuleType:
    """Import and return `ppcls`; raises `ReparamError` where it or a package that it needs is missing."""
    root = find()
    if "ppcls" not in sys.modules:
        folder = root / "ppcls"
        # Not through sys.path: beside ppcls lie folders named tools, tests and deploy.
        spec = importlib.util.spec_from_file_location(
            "ppcls", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules["ppcls"] = module
        try:
            spec.loader.exec_module(module)
            importlib.import_module("ppcls.engine.engine")
        except ModuleNotFoundError as error:
            for name in [n for n in sys.modules if n == "ppcls" or n.startswith("ppcls.")]:
                del sys.modules[name]
            raise ReparamError(f"PaddleClas in {root} needs the package {error.name!r}; install it") from error
    module = sys.modules["ppcls"]
    loaded = Path(module.__file__).resolve().parents[1]
    if loaded != root:
        raise ReparamError(f"PaddleClas has been imported from {loaded} already and cannot be from {root} as well")
    return module
