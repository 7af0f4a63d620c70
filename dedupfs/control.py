"""The control socket: how the command line asks a running mount.

One request a connection, in lines of JSON. The client sends `{"command": name, ...arguments}`; the server answers with
any number of `{"progress": [phase, done, total or null]}` and then one `{"result": ...}` or
`{"error": text, "exit_code": number}`. Paths are strings as `os.fsdecode` makes them. A command that is a stream sends
one line of progress when it has begun, then `{"event": ...}` for as long as the client listens, and ends in an error.

Only root and the user of the daemon are answered. The daemon owns its `Server`, which runs each command in a thread of
its own; the functions below it are the client's side.
"""

import errno
import json
import logging
import os
import select
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from typing import NoReturn, Protocol

from . import store
from .backing import Backing, filesystem_type
from .codec import json_object
from .errors import (
    EXIT_INTERNAL,
    EXIT_OS_ERROR,
    Busy,
    DedupfsError,
    NotMounted,
    SourceError,
    StoreError,
    Unavailable,
    UnknownFormat,
    UsageError,
)
from .model import Progress

log = logging.getLogger(__name__)

CONTROL_XATTR = "user.dedupfs.control"
FUSE_TYPE = "fuse.dedupfs"

Command = Callable[[Mapping[str, object], Progress], object]


class Stream(Protocol):
    """Something that goes on: `fileno` is readable while `take` has something to give, each piece as JSON."""

    def fileno(self) -> int: ...
    def take(self) -> list[bytes]: ...
    def close(self) -> None: ...


Listen = Callable[[Mapping[str, object]], Stream]

_REQUEST_LIMIT_BYTES = 16 << 20  # more than the longest command line can hold
_PATIENCE_S = 30.0  # for a client that neither reads nor writes
_PROGRESS_INTERVAL_S = 0.1
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid

_STRANGER = "only root and the user who mounted may ask this mount"

# Subclasses of these share their parent's exit code, and the parent stands for them.
_ERRORS = (UsageError, StoreError, SourceError, NotMounted, Unavailable, Busy, UnknownFormat)
_ERROR_OF_EXIT_CODE: dict[int, type[DedupfsError]] = {kind.exit_code: kind for kind in _ERRORS}


class _ClientGone(Exception):
    """Nobody waits for this command's answer any more."""


class Server:
    """Answers on one socket from `start` until `close`. Commands may run at the same time, each in its own thread."""

    def __init__(self, path: str, commands: Mapping[str, Command], streams: Mapping[str, Listen] | None = None) -> None:
        """Listen at `path`. Raises OSError; SourceError when somebody else could put a socket in that place.

        The caller owns the store that the path is named after, so a socket that is there already is a dead daemon's.
        """
        self.path = path
        self._commands, self._streams = commands, streams or {}
        self._stopping = threading.Event()
        self._requests: dict[threading.Thread, socket.socket] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _make_directory(os.path.dirname(path))
            with suppress(FileNotFoundError):
                os.unlink(path)
            self._listener.bind(path)
            os.chmod(path, 0o600)
            self._listener.listen()
        except BaseException:
            self._listener.close()
            raise
        self._acceptor = threading.Thread(target=self._accept, name="control", daemon=True)

    def start(self) -> None:
        self._acceptor.start()

    def close(self) -> None:
        """Take no more requests, stop the running commands at their next sign of progress, and wait for them.

        Idempotent. The wait has no limit: while a command works on the store, the store must not be marked clean.
        """
        if self._stopping.is_set():
            return
        self._stopping.set()
        with suppress(FileNotFoundError):
            os.unlink(self.path)
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        if self._acceptor.ident is not None:
            self._acceptor.join()
        self._listener.close()
        for thread, connection in list(self._requests.items()):
            with suppress(OSError):  # just closed
                connection.shutdown(socket.SHUT_RD)  # whoever has not said what he wants gets no answer
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._stopping.is_set():
                    return
                log.warning("control socket: %s", error)
                self._stopping.wait(1)  # out of descriptors or memory: those who hold them need time to let go
                continue
            thread = threading.Thread(target=self._attend, args=(connection,), name="control-request", daemon=True)
            self._requests[thread] = connection
            try:
                thread.start()
            except RuntimeError as error:  # no more threads
                log.warning("control socket: %s", error)
                del self._requests[thread]
                connection.close()

    def _attend(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.settimeout(_PATIENCE_S)
                connection.sendall(self._answer(connection))
        except (_ClientGone, OSError) as error:
            log.debug("control client went away: %s", error)
        finally:
            del self._requests[threading.current_thread()]

    def _answer(self, connection: socket.socket) -> bytes:
        """The last line to send. Raises _ClientGone when there is nobody to send it to."""
        try:
            arguments = _receive(connection)
            name = arguments.pop("command", None)
            if isinstance(name, str) and name in self._streams:
                self._send_stream(connection, self._streams[name](arguments))
            command = self._commands.get(name) if isinstance(name, str) else None
            if command is None:
                raise UsageError(f"the mount does not know the command {name!r}; is it of another version of dedupfs?")
            return _line({"result": command(arguments, self._progress_to(connection))})
        except _ClientGone:
            raise
        except DedupfsError as error:
            return _line({"error": str(error), "exit_code": error.exit_code})
        except OSError as error:
            return _line({"error": describe(error), "exit_code": EXIT_OS_ERROR})
        except Exception:
            log.exception("internal error while answering a command")
            return _line(
                {"error": "internal error in the mount; its log has the traceback", "exit_code": EXIT_INTERNAL}
            )

    def _send_stream(self, connection: socket.socket, stream: Stream) -> NoReturn:
        """Send what there is until the client goes or the server stops, however slowly it is taken: nobody but this
        thread waits for a client. Raises _ClientGone, NotMounted."""
        with closing(stream):
            connection.setblocking(False)
            unsent = _line({"progress": ["watching", 0, None]})
            while not self._stopping.is_set():
                poll = select.poll()
                poll.register(connection, select.POLLIN | (select.POLLOUT if unsent else 0))
                if not unsent:
                    poll.register(stream, select.POLLIN)
                happened = dict(poll.poll())
                if happened.get(connection.fileno(), 0) & ~select.POLLOUT and not self._stopping.is_set():
                    raise _ClientGone("stopped listening")  # it has nothing more to say to us
                if happened.get(connection.fileno(), 0) & select.POLLOUT:
                    with suppress(BlockingIOError):
                        unsent = unsent[connection.send(unsent) :]
                elif not unsent:
                    unsent = b"".join(b'{"event": %s}\n' % event for event in stream.take())
            if unsent:
                raise _ClientGone("has not taken what there was")
            connection.settimeout(_PATIENCE_S)
            raise NotMounted("the mount went down; watch it again when it is back")

    def _progress_to(self, connection: socket.socket) -> Progress:
        last_phase: str | None = None
        last_sent = 0.0

        def progress(phase: str, done: int, total: int | None) -> None:
            nonlocal last_phase, last_sent
            if self._stopping.is_set():
                raise Busy("the mount is going down; run the command again when it is back")
            now = time.monotonic()
            if phase == last_phase and done != total and now - last_sent < _PROGRESS_INTERVAL_S:
                return
            last_phase, last_sent = phase, now
            try:
                connection.sendall(_line({"progress": [phase, done, total]}))
            except OSError as error:
                raise _ClientGone(str(error)) from None

        return progress


def describe(error: OSError) -> str:
    """An OSError in the words of a shell: the file, then what is wrong with it."""
    reason = error.strerror or str(error)
    return f"{os.fsdecode(error.filename)}: {reason}" if isinstance(error.filename, (str, bytes)) else reason


def _line(message: dict[str, object]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _receive(connection: socket.socket) -> dict[str, object]:
    _, uid, _ = _credentials(connection)
    if uid not in (0, os.geteuid()):
        raise PermissionError(errno.EPERM, _STRANGER)
    try:
        with connection.makefile("rb") as file:
            raw = file.readline(_REQUEST_LIMIT_BYTES + 1)
    except OSError as error:
        raise _ClientGone(str(error)) from None
    if not raw:
        raise _ClientGone("no request")
    if len(raw) > _REQUEST_LIMIT_BYTES:
        raise UsageError(f"a request may have {_REQUEST_LIMIT_BYTES >> 20} MiB; name fewer paths at once")
    try:
        return json_object(raw)
    except ValueError:
        raise UsageError("the request is not a JSON object in one line") from None


def _credentials(connection: socket.socket) -> tuple[int, int, int]:
    """pid, uid and gid of the other end: for a server its client, for a client the process that listens."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    return pid, uid, gid


def _make_directory(path: str) -> None:
    """A directory that nobody but us can put anything into."""
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
    st = os.lstat(path)
    if not stat.S_ISDIR(st.st_mode) or st.st_uid != os.geteuid():
        raise SourceError(f"{path} belongs to somebody else; set XDG_RUNTIME_DIR to a directory of your own")
    os.chmod(path, 0o700)


# -- the client's side ------------------------------------------------------------------------------------------------


def call(
    socket_path: str,
    command: str,
    arguments: Mapping[str, object],
    progress: Progress,
    event: Callable[[object], None] | None = None,
) -> object:
    """What the mount behind the socket answers. Raises what the command raised there, NotMounted when nobody listens.

    Waits for as long as the command takes; what `progress` raises ends the command. `event` is told what a stream
    sends.
    """
    gone = NotMounted("the mount went down before it answered; see its log, and run the command again")
    with _connect(socket_path) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):  # a server that refuses to read on has said why
            connection.sendall(_line({**arguments, "command": command}))
        with connection.makefile("rb") as file:
            while True:
                try:
                    raw = file.readline()
                except ConnectionResetError:
                    raise gone from None
                if not raw.endswith(b"\n"):
                    raise gone
                message = json.loads(raw)
                if "progress" in message:
                    progress(*message["progress"])
                elif "event" in message:
                    if event is not None:
                        event(message["event"])
                elif "error" in message:
                    raise _error_from(message)
                else:
                    result: object = message["result"]
                    return result


def _error_from(message: dict[str, object]) -> DedupfsError:
    exit_code = int(str(message["exit_code"]))
    error = _ERROR_OF_EXIT_CODE.get(exit_code, DedupfsError)(message["error"])
    error.exit_code = exit_code
    return error


def daemon_pid(socket_path: str) -> int:
    """The process that listens on the socket, by the kernel's word. Raises NotMounted."""
    with _connect(socket_path) as connection:
        return _credentials(connection)[0]


def _connect(socket_path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(socket_path)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        raise NotMounted(f"no mount answers at {socket_path}; if its daemon was killed, mount again") from None
    except PermissionError as error:
        connection.close()
        raise PermissionError(error.errno, _STRANGER, socket_path) from None
    except BaseException:
        connection.close()
        raise
    return connection


def mount_at(path: str) -> str | None:
    """The control socket of the dedupfs whose root is at `path`, None when it is something else that is there.

    Raises NotMounted for the mount of a daemon that died, UsageError for a path deeper in a mount, SourceError when
    there is nothing to look at.
    """
    try:
        kind = filesystem_type(os.stat(path).st_dev)
        # An ordinary filesystem keeps whatever a user writes into such an xattr, so there it means nothing.
        if not kind.startswith("fuse"):
            return None
        return os.fsdecode(os.getxattr(path, CONTROL_XATTR))
    except OSError as error:
        if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):  # it died before we asked, or just now
            raise NotMounted(f"the mount at {path} is dead; run dedupfs umount {path}") from None
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise SourceError(f"{path}: {error.strerror}") from None
    if kind == FUSE_TYPE:
        raise UsageError(f"{path} is inside a dedupfs mount; name the directory where it is mounted")
    return None


def find_mount(path: str) -> str | None:
    """The control socket of the live mount whose mount point or source is `path`, None when there is none.

    Raises like `mount_at`; SourceError also when `path` cannot be looked into.
    """
    socket_path = mount_at(path)
    if socket_path is not None:
        return socket_path
    with closing(Backing(path)) as backing:
        try:
            daemon = store.read_daemon(backing) if store.is_owned(backing) else None
        except OSError as error:
            raise SourceError(f"cannot look into the store of {path}: {error.strerror}") from None
    if daemon is None:
        return None
    socket_path = str(daemon["socket"])
    # An offline command may own the store of a mount that was killed and left its word behind.
    try:
        _connect(socket_path).close()
    except NotMounted:
        return None
    return socket_path
