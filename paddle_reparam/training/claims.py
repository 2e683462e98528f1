"""Tasks that processes, of several machines perhaps, share out between them by files in a folder that all of them see.

A task is a folder. Who begins it creates the next of its files `claim.1.json`, `claim.2.json`, ..., which one process
alone can, and writes that file anew every few seconds. The last file is what counts. A process that ended, or that
wrote nothing for long, has lost its task, and another one creates the next file: none is ever taken away, so that two
cannot both think that they were first.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ReparamError
from ..files import atomic_write, create

#: Seconds between two beats of who holds a task, and without one after which it is taken for dead.
BEAT, PATIENCE = 5.0, 90.0


class Claim:
    """A task that this process holds while it is in the `with` block.

    What is put into `done`, the share that is done, the others see. Where another process has taken the task over, as
    from a machine that slept, `lost` is True and the thread that is in the block is interrupted as by the user.
    """

    def __init__(self, folder: Path, number: int, owner: dict[str, Any], beat: float) -> None:
        self.folder, self.number, self.done, self.lost = folder, number, 0.0, False
        self._owner, self._beat, self._beats = owner, beat, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._go_on, daemon=True)

    def __enter__(self) -> Claim:
        self._holder = threading.get_ident()
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()
        if not self.lost:
            self._write(left=True)

    def tell(self, done: float) -> None:
        """Take note of the share that is done."""
        self.done = done

    def _go_on(self) -> None:
        while not self._ended.wait(self._beat):
            if _last(self.folder) > self.number:
                self.lost = True
                # By no signal: what a script starts in the background ignores that of an interrupt.
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self._holder), ctypes.py_object(KeyboardInterrupt)
                )
                return
            self._write()

    def _write(self, left: bool = False) -> None:
        self._beats += 1
        text = json.dumps({**self._owner, "beat": self._beats, "done": self.done, "left": left})
        # Where it cannot be written the next beat may come through; if none does, the others see to the task.
        with contextlib.suppress(ReparamError):
            atomic_write(_file(self.folder, self.number), lambda path: path.write_text(text, encoding="utf-8"))


class Claims:
    """What this process takes, and knows of what the others hold.

    Clocks of two machines may differ: what counts is how long a claim has not changed while this process looked at it.
    """

    def __init__(
        self, beat: float = BEAT, patience: float = PATIENCE, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._beat, self._patience, self._clock = beat, patience, clock
        self._seen: dict[Path, tuple[str, float]] = {}

    def take(self, folder: Path) -> Claim | None:
        """Return the task of a folder, which is made where it is missing; None where another process has it."""
        number, holder = self._look(folder)
        if holder is not None:
            return None
        # The next one to what was looked at: where somebody has taken that since, this one is not to have it.
        number, owner = number + 1, this_process()
        if not create(_file(folder, number), json.dumps({**owner, "beat": 0, "done": 0.0, "left": False})):
            return None
        return Claim(folder, number, owner, self._beat)

    def holder(self, folder: Path) -> dict[str, Any] | None:
        """Return what the process that works on a task says of itself, and of what is `done`; None where none does."""
        return self._look(folder)[1]

    def _look(self, folder: Path) -> tuple[int, dict[str, Any] | None]:
        """Return the number of a task's last claim, and what `holder` does."""
        number = _last(folder)
        if number == 0:
            return 0, None
        file = _file(folder, number)
        try:
            text = file.read_text(encoding="utf-8")
        except OSError:
            text = ""
        before, since = self._seen.get(file, (None, 0.0))
        if text != before:
            since = self._clock()
            self._seen[file] = (text, since)
        try:
            claim = json.loads(text)
            gone = claim["left"] or _has_ended(claim)
        except (ValueError, KeyError, TypeError):
            claim, gone = {}, False  # It is just being written, or was cut short.
        return number, None if gone or self._clock() - since > self._patience else claim


def this_process() -> dict[str, Any]:
    """Return what tells this process from all others."""
    return {"host": platform.node(), "machine": _machine(), "process": os.getpid(), "started": _started(os.getpid())}


def _has_ended(owner: dict[str, Any]) -> bool:
    """Tell whether a process is gone, where that can be known: on this machine, where it is Linux."""
    machine = _machine()
    return machine is not None and owner["machine"] == machine and _started(owner["process"]) != owner["started"]


def _machine() -> str | None:
    """Return what tells the processes that can be seen from here from those of other machines and containers."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(process: int) -> str | None:
    """Return when a process was started, in the ticks of its machine; None where it is none, or has ended."""
    try:
        # The name may hold anything; behind it are the state and, 20 places on, when it was started.
        fields = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _file(folder: Path, number: int) -> Path:
    return folder / f"claim.{number}.json"


def _last(folder: Path) -> int:
    """Return the number of the last claim of a task; 0: nobody has begun it."""
    numbers = [path.name.split(".")[1] for path in folder.glob("claim.*.json")]
    return max((int(number) for number in numbers if number.isdigit()), default=0)
