"""Files and folders that appear whole or not at all, and what tells one from another."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Union

from .errors import ReparamError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

Folder = Union[str, "os.PathLike[str]"]

_CHUNK = 1 << 20


def digest(path: Path) -> dict[str, Any]:
    """Return the size in bytes and the sha256 of a file; raises `ReparamError` where it cannot be read."""
    seen, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while data := file.read(_CHUNK):
                seen.update(data)
                size += len(data)
    except OSError as error:
        raise ReparamError(f"{path}: it cannot be read ({error.strerror})") from error
    return {"bytes": size, "sha256": seen.hexdigest()}


def atomic_write(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Let `write` make a file at a temporary path, and put it at `path` when it is whole and on the disk.

    Until then, and for good if anything fails, what stood at `path` stays; no temporary file is left. The temporary
    path has the suffix of `path` and lies in its folder, which is made where it is missing.

    Raises `ReparamError` where the file cannot be written, and whatever `write` raises besides `OSError`.
    """
    target = Path(os.path.realpath(path))
    # Of a name that is as long as can be there is no longer one.
    temporary = target.with_name(f".{target.stem[:40]}-{secrets.token_hex(4)}{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        flush(temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise ReparamError(
            f"{path}: it cannot be written ({error.strerror or error}); what stood there is unchanged"
        ) from error
    except ReparamError as error:
        raise _as_it_will_be(error, temporary, path).at(str(path)) from error
    finally:
        # Where the folder is none, or nothing can be written in it, there is no temporary file either.
        with contextlib.suppress(OSError):
            temporary.unlink()
    # The file is in place and whole; some file systems cannot flush a folder.
    with contextlib.suppress(OSError):
        flush(target.parent)


def create(path: Path, text: str) -> bool:
    """Write a file, whole, where none stands; return False, and change nothing, where one does.

    Of several processes that do so at the same time one is told True. Its folder is made where it is missing. Raises
    `ReparamError` where it cannot be written.
    """
    temporary = path.with_name(f".{path.stem[:40]}-{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # Some file systems have no links. There a reader may see a part of it.
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
    except FileExistsError:
        return False
    except OSError as error:
        raise ReparamError(f"{path}: it cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return True


@contextlib.contextmanager
def new_folder(target: Path, folder: Folder, replace: bool) -> Iterator[Path]:
    """Give a temporary folder to fill, and put it in the place of `target` when the `with` block ends without an error.

    It lies beside the target, as `.NAME-*.partial`, and is flushed to the disk before it is put in place. An older
    folder is exchanged with the new one in a single step where the system can do that (Linux). Elsewhere it is moved
    aside first: for the moment between two renames no folder has the name, and the old one is whole beside it. What a
    killed process left beside the target is removed by the next one.
    """
    temporary = target.with_name(f".{target.name[:40]}-{secrets.token_hex(4)}.partial")
    held = None
    try:
        temporary.mkdir(parents=True)
        held = _hold(temporary)
        _remove_what_killed_ones_left(target)
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            flush(path)
        if replace and target.exists():
            _exchange(temporary, target)
        else:
            os.rename(temporary, target)
        flush(target.parent)
    except OSError as error:
        raise ReparamError(f"{folder}: it cannot be written ({error.strerror or error})") from error
    except ReparamError as error:
        raise _as_it_will_be(error, temporary, folder) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if held is not None:
            os.close(held)


def _hold(folder: Path) -> int | None:
    """Return a descriptor that keeps other processes from holding a folder until it is closed, or this process ends.

    None where another one holds it, or where it cannot be told.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_what_killed_ones_left(target: Path) -> None:
    for left in target.parent.glob(f".{glob.escape(target.name[:40])}-{'[0-9a-f]' * 8}.partial"):
        with contextlib.suppress(OSError):
            held = _hold(left)
            if held is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(held)


def _as_it_will_be(error: ReparamError, temporary: Path, place: Folder) -> ReparamError:
    """Return an error that names a file by the place that it was written for, where nobody finds the temporary one."""
    return type(error)(str(error).replace(str(temporary), str(place)))


def flush(path: Path) -> None:
    """Wait until a file, or a folder where that can be, is on the disk; raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some file systems cannot flush a folder; a file they can.
        if path.is_file():
            raise
    finally:
        os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Swap the two folders: in one step, or in two renames where the system has no such step."""
    if _exchange_at_once(new, old):
        return
    aside = new.with_suffix(".old")
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except OSError:
        os.rename(aside, old)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange_at_once(new: Path, old: Path) -> bool:
    """Exchange two names with Linux' renameat2; return False where this system or file system cannot."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if function is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if function(here, os.fsencode(new), here, os.fsencode(old), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number))
