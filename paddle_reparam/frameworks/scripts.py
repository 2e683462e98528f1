"""A framework, installed or in a checkout, and the scripts of a checkout, run as they stand."""

from __future__ import annotations

import contextlib
import importlib
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import MissingFile, ReparamError, exit_code


def folder_above(script: str | os.PathLike[str], holds: str) -> Path | None:
    """Return the folder that a script lies in, at any depth, and that holds a file; or None."""
    return next((folder for folder in Path(script).resolve().parents if (folder / holds).is_file()), None)


def load(
    package: str, modules: Sequence[str], framework: str, install: str, checkout: str | os.PathLike[str] | None
) -> ModuleType:
    """Import the package of a framework, and modules of it: that of a checkout, or else the one that is installed.

    Raises `ReparamError` where it or a package that it needs is missing (`install` says what to do), or another one has
    been imported before.
    """
    if checkout is not None and str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    try:
        # They print warnings as they are imported, of Python's and of packages for other tasks.
        with warnings.catch_warnings(), contextlib.redirect_stderr(None), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            module = importlib.import_module(package)
            for name in modules:
                importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise ReparamError(f"{framework} is not installed; {install}") from error
        raise ReparamError(f"{framework} needs the package {error.name!r}; install it") from error
    loaded = Path(module.__file__).resolve()
    if checkout is not None and loaded != (Path(checkout) / package / "__init__.py").resolve():
        raise ReparamError(f"{framework} has been imported as {loaded} already and cannot be from {checkout} as well")
    return module


def launch(given: str, arguments: Sequence[str], setup: Callable[[Path], Any]) -> int:
    """Run a script as it stands with its own arguments, after `setup` of its path; return the exit code."""
    script = Path(given).resolve()
    with exit_code() as result:
        if not script.is_file():
            raise MissingFile(f"there is no script {given}")
        setup(script)
        sys.argv = [str(script), *arguments]
        runpy.run_path(str(script), run_name="__main__")
    return result[0]
