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
