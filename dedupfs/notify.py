"""A word to whoever started the daemon, in the protocol of sd_notify(3): ready, stopping, and what it is doing.

Where nobody listens (NOTIFY_SOCKET is not set) nothing is said. A word that cannot be delivered is lost: that is no
reason for a mount to end.
"""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

_EVERY_S = 5.0


class Herald:
    """Tells at one socket; any thread. While it is started, it tells again whatever `describe` answers, when that
    changed."""

    def __init__(self, path: str | None, describe: Callable[[], str]) -> None:
        """`path`: a socket's, or with an @ in front a name in the abstract namespace; None for nobody."""
        self._address = None if not path else "\0" + path[1:] if path.startswith("@") else path
        self._describe = describe
        self._told = ""
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def ready(self) -> None:
        """The mount answers."""
        if self._address is None:
            return
        self._told = self._describe()
        self._send(f"READY=1\nSTATUS={self._told}")
        self._thread = threading.Thread(target=self._run, name="notify", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """It answers no more, and the store is being closed."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        self._send("STOPPING=1\nSTATUS=closing the store")

    def _run(self) -> None:
        while not self._stopping.wait(_EVERY_S):
            now = self._describe()
            if now != self._told:
                self._told = now
                self._send(f"STATUS={now}")

    def _send(self, state: str) -> None:
        if self._address is None:
            return
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
            out.sendto(state.encode(errors="replace"), self._address)
