"""Has the kernel read files that will be hashed soon, while others are: the disk and the processor work at once.

A scan settles files one after the other. Most of what it meets is not in memory: without this, the disk would rest
while a file is hashed and recorded, and the processor while the next one is read.
"""

import threading
from contextlib import suppress

from .backing import Backing
from .model import Ino

_MOST_BYTES = 32 << 20  # read ahead of what is hashed; a longer file is read from its start as far as that
_MOST_FILES = 64


class ReadAhead:
    """Files in the order in which they will be read, and a thread that is a little ahead of whoever reads them."""

    def __init__(self, backing: Backing) -> None:
        self._backing = backing
        self._condition = threading.Condition(threading.Lock())
        self._waiting: dict[Ino, bytes] = {}
        self._ahead: dict[Ino, int] = {}  # bytes of those that were asked for, and not taken yet
        self._ahead_bytes = 0
        self._stopping = False
        self._thread: threading.Thread | None = None

    def add(self, ino: Ino, path: bytes) -> None:
        """This file will be read, after those that were added before."""
        with self._condition:
            self._waiting[ino] = path
            if self._thread is None and not self._stopping:
                self._thread = threading.Thread(target=self._run, name="readahead", daemon=True)
                self._thread.start()
            elif self._has_room():
                self._condition.notify()

    def take(self, ino: Ino) -> None:
        """This file is read now, or need not be read any more."""
        with self._condition:
            self._waiting.pop(ino, None)
            self._ahead_bytes -= self._ahead.pop(ino, 0)
            if self._waiting and self._has_room():
                self._condition.notify()

    def stop(self) -> None:
        """Return when nothing is being read ahead; nothing will be."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread is not None:
            self._thread.join()

    def _has_room(self) -> bool:
        return len(self._ahead) < _MOST_FILES and self._ahead_bytes < _MOST_BYTES

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._stopping or (self._waiting and self._has_room()))
                if self._stopping:
                    return
                ino = next(iter(self._waiting))
                path = self._waiting.pop(ino)
                self._ahead[ino] = count = 0
            with suppress(OSError):  # whoever comes to read it finds out as well
                count = self._backing.will_need(path, _MOST_BYTES)
            with self._condition:
                if ino in self._ahead:  # it was not taken meanwhile
                    self._ahead[ino] = count
                    self._ahead_bytes += count
