"""What a training has on the disk already is not written again: a file is then a link to the one that holds it."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import paddle


class Files:
    """The files that a training has put in place, by what they hold, so that no number is written twice.

    What they hold is known by its hash and not by the step it is of; a file that was replaced or changed since is not
    linked to. Where the file system has no links, all files are written.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[Path, tuple[int, ...]]] = {}
        self._staged: dict[Path, str] = {}

    @contextlib.contextmanager
    def linked(self) -> Iterator[None]:
        """Let `paddle.save` make a link where a file that is in place holds what it would write."""
        self._staged.clear()
        original = paddle.save

        def save(content: Any, path: Any, *args: Any, **options: Any) -> None:
            try:
                key, place = _hash_of(content), Path(path)
            except TypeError:  # something that paddle.save may know
                return original(content, path, *args, **options)
            if not self._link_known(key, place):
                original(content, path, *args, **options)
            self._staged[place] = key

        paddle.save = save
        try:
            yield
        finally:
            paddle.save = original

    def _link_known(self, key: str, path: Path) -> bool:
        # In this set, or in one of those before.
        same = [(staged, _state_of(staged)) for staged, other in self._staged.items() if other == key]
        for file, state in [*same, *([self._known[key]] if key in self._known else [])]:
            with contextlib.suppress(OSError):
                if _state_of(file) == state:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    os.link(file, path)
                    return True
        return False

    def learn_places(self, staging: Path, target: Path) -> None:
        """Learn where the files of a staged set are now."""
        for path, key in self._staged.items():
            place = target / path.relative_to(staging)
            self._known[key] = (place, _state_of(place))


def _state_of(path: Path) -> tuple[int, ...]:
    """Return what changes when a file is replaced, or written to in place."""
    state = path.stat()
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def _hash_of(content: Any) -> str:
    """Return the sha256 of states: names, types, shapes and numbers; raises `TypeError` for anything else in them."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Mapping):
            digest.update(f"{{{len(value)}".encode())
            for key, each in value.items():
                add(key)
                add(each)
        elif isinstance(value, (list, tuple)):
            digest.update(f"[{len(value)}".encode())
            for each in value:
                add(each)
        elif isinstance(value, (paddle.Tensor, np.ndarray)):
            # A weight file holds the names of its tensors too.
            array = np.ascontiguousarray(value)
            kind = (type(value).__name__, getattr(value, "name", ""), str(value.dtype), tuple(value.shape))
            digest.update(repr(kind).encode())
            digest.update(array.reshape(-1).view(np.uint8))
        elif value is None or isinstance(value, (str, int, float, np.generic)):
            digest.update(f"{type(value).__name__} {value!r};".encode())
        else:
            raise TypeError(f"a {type(value).__name__}")

    add(content)
    return digest.hexdigest()
