"""The memory of this process: its peak, and giving back what is free."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator
from pathlib import Path


def own_peak() -> int:
    """Return the most bytes that this process has held.

    Linux' `ru_maxrss` would not do: it starts at what the parent held.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        [kibibytes] = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return 1024 * int(kibibytes)
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


#: glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD: from how many bytes on a block is apart, and how much is kept.
_BLOCK_APART, _KEPT = -3, -1


@contextlib.contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Inside, let what is freed of a megabyte or more go back to the system at once, where the allocator is glibc's.

    It does so by itself at first, but with each such block that is freed it keeps more: up to 32 MiB, the weights of
    most layers. Runtimes that load a network, which copy each weight twice, then hold a copy of all that nobody uses.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "mallopt"):
        yield
        return
    library.mallopt(_BLOCK_APART, 1 << 20)
    try:
        yield
    finally:
        # Where glibc's own rule ends; once told, it has none.
        library.mallopt(_BLOCK_APART, 32 << 20)
        library.mallopt(_KEPT, 64 << 20)


def give_back() -> None:
    """Hand memory that holds nothing back to the system, where its allocator is glibc's; elsewhere do nothing more.

    glibc keeps freed blocks of up to 32 MiB. Between steps that each need several times a network's weights, what it
    keeps comes to as much again.
    """
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # musl has no such function
            ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def only_new_objects() -> Iterator[None]:
    """Let the collections inside look through those objects alone that are made inside.

    Paddle and what it imports are half a million objects, which takes a fifth of a second each time.
    """
    gc.collect()
    if gc.get_freeze_count():  # somebody else has set objects aside, and unfreezing would bring theirs back too
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
