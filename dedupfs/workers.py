"""The processes that describe pictures: started, handed one descriptor at a time, replaced.

The daemon never looks into a picture; it hands an open descriptor to a worker that is shut in (`sandbox`) and takes a
record, or a reason, for what comes back. A worker that dies, does not answer in time, grows, or has described its share
is ended and another one started. What it answers is checked like any record that somebody else wrote.

`Workers.describe` is for any thread; as many run at a time as there are workers, others wait their turn.
"""

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata

from . import codec
from .errors import StoreError, Unavailable
from .likeness import Likeness, Picture
from .model import DESCRIBING_PATH, HASH_BYTES, ImageRecord, Relation, Thumbnails

# The worker's side of these is in `describer`, which the daemon must not import: it imports the decoders.
_DESCRIBED = b"\1"
_COMPARE, _COMPARE_CUTS = b"~", b"%"
_MODULE = "dedupfs.describer"

_SIZE = struct.Struct(">II")
_MOST_PIXEL_BYTES = 16 << 20  # of a difference

_LONGEST_ANSWER_BYTES = 32 << 10
_START_S = 60.0
_PICTURE_S = 90.0  # by the clock, at the lowest priority; the worker itself has less of the processor's time
_END_S = 5.0
_SHARE = 500  # pictures, then another process takes over
_MOST_RESIDENT_BYTES = 512 << 20  # between two pictures
_MOST_STARTS = 3
_COMPARED_AT_ONCE = 16

# Threads of numeric libraries would only reserve address space, and must not exist when the sandbox closes.
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def _path_version() -> int:
    """As `phash` has it, without loading a decoder."""
    return DESCRIBING_PATH << 16 | int(metadata.version("Pillow").partition(".")[0])


def _likeness_in(answer: bytes) -> Likeness | None:
    """Raises _Silent for what is none."""
    try:
        found = json.loads(answer)
        if found is None:
            return None
        relation, distance, evidence = found
        if isinstance(distance, int) and 0 <= distance <= 8 * HASH_BYTES and isinstance(evidence, dict):
            return Likeness(Relation(relation), distance, evidence)
    except (ValueError, TypeError, RecursionError):
        pass
    raise _Silent("answered what is no likeness")


class Refused(Exception):
    """A picture cannot be described; `str()` is the reason, fit to be kept."""


class Workers:
    def __init__(self, count: int, *, picture_s: float = _PICTURE_S, share: int = _SHARE) -> None:
        """`count` at a time; none is started before there is something to do."""
        self._picture_s, self._share = picture_s, share
        self._slots = threading.Semaphore(count)
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._closed = False
        self._version = _path_version()
        self.started = 0

    @property
    def version(self) -> int:
        """Of the describing path. No worker is started to know it."""
        return self._version

    def describe(self, fd: int) -> tuple[ImageRecord, Thumbnails]:
        """Describe what is behind a descriptor, which stays the caller's.

        Raises Refused with the reason when that cannot be done, Unavailable when no worker can be had (nothing is
        known of the picture then).
        """
        with self._slots:
            try:
                return self._describe(fd)
            except _Silent:
                pass  # perhaps ended by somebody else, for want of memory, say: another one decides
            try:
                return self._describe(fd)
            except _Silent as silence:
                raise Refused(str(silence)) from None

    def difference(self, one: int, other: int) -> tuple[int, int, bytes]:
        """Two pictures, and where they differ, side by side: width, height, and three bytes a pixel (red, green,
        blue), row by row. Raises as `describe`."""
        with self._slots:
            worker = self._take()
            try:
                found = worker.ask_for_difference(one, other, self._picture_s)
            except Refused:
                self._put_back(worker)
                raise
            except _Silent as silence:
                self._discard(worker)
                raise Refused(str(silence)) from None
            except BaseException:
                self._discard(worker)
                raise
            self._put_back(worker)
            return found

    def compare(self, ours: Picture, others: list[Picture], *, cuts: bool) -> list[Likeness | None]:
        """As `likeness.compare_each`, without holding the interpreter. Raises Unavailable."""
        with self._slots:
            try:
                return self._compare(ours, others, cuts=cuts)
            except _Silent:
                pass  # perhaps ended by somebody else
            try:
                return self._compare(ours, others, cuts=cuts)
            except _Silent as silence:
                raise Unavailable(str(silence)) from None

    def _compare(self, ours: Picture, others: list[Picture], *, cuts: bool) -> list[Likeness | None]:
        worker = self._take()
        found: list[Likeness | None] = []
        with self._ended_by_errors(worker):
            for start in range(0, len(others), _COMPARED_AT_ONCE):
                some = others[start : start + _COMPARED_AT_ONCE]
                found += worker.compare(ours, some, self._picture_s, cuts=cuts)
        self._put_back(worker)
        return found

    def _describe(self, fd: int) -> tuple[ImageRecord, Thumbnails]:
        worker = self._take()
        with self._ended_by_errors(worker, but=Refused):
            try:
                answer = worker.ask([fd], self._picture_s)
                if answer[:1] != _DESCRIBED:
                    raise Refused(answer[1:].decode(errors="replace") or "refused without a reason")
                description = codec.decode_description(answer[1:])
                if description[0].version != self._version:
                    raise StoreError("of another version")
            except Refused:
                self._put_back(worker)
                raise
            except StoreError as error:
                self._discard(worker)  # it is not what we started any more
                raise Refused(f"its description is not one: {error}") from None
        self._put_back(worker)
        return description

    def rest(self) -> None:
        """End those that have nothing to do; others are started when there is something again."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.end()

    def close(self) -> None:
        """End all of them at once; whoever waits for a picture is told Unavailable."""
        with self._lock:
            self._closed = True
            idle, busy = list(self._idle), list(self._busy)
            self._idle.clear()
        for worker in idle:
            worker.end()
        for worker in busy:
            worker.kill()

    def _take(self) -> "_Worker":
        with self._lock:
            if self._closed:
                raise Unavailable("the mount is going down")
            worker = self._idle.pop() if self._idle else None
            if worker is not None:
                self._busy.add(worker)
                return worker
        for _ in range(_MOST_STARTS):
            try:
                return self._start()
            except _Silent as silence:
                reason = str(silence)
        raise Unavailable(f"a worker for pictures does not start: {reason}")

    def _start(self) -> "_Worker":
        """Raises _Silent when it dies before it is ready, Unavailable when it cannot be shut in."""
        worker = _Worker()
        with self._lock:
            self._busy.add(worker)
            closed = self._closed
        if closed:
            worker.kill()
        with self._ended_by_errors(worker):
            if worker.wait_until_ready(_START_S) != self._version:
                raise Unavailable("Pillow is another one than when the mount began; unmount and mount again")
        self.started += 1
        return worker

    def _put_back(self, worker: "_Worker") -> None:
        if worker.done >= self._share or worker.resident_bytes() > _MOST_RESIDENT_BYTES:
            self._discard(worker)
            return
        with self._lock:
            self._busy.discard(worker)
            if not self._closed:
                self._idle.append(worker)
                return
        worker.end()

    @contextmanager
    def _ended_by_errors(self, worker: "_Worker", *, but: type[Exception] | tuple[()] = ()) -> Iterator[None]:
        """Inside, whatever is raised ends the worker, `but` that, which has seen to it. While all are being ended, that
        is the reason: Unavailable."""
        try:
            yield
        except but:
            raise
        except BaseException:
            self._discard(worker)
            if self._closed:
                raise Unavailable("the mount is going down") from None
            raise

    def _discard(self, worker: "_Worker") -> None:
        worker.end()
        with self._lock:
            self._busy.discard(worker)


class _Silent(Exception):
    """A worker did not answer; `str()` says what became of it."""


class _Worker:
    """One process, and our end of its socket."""

    def __init__(self) -> None:
        self.done = 0
        self._kill_lock = threading.Lock()
        # Each message is one piece, however long: no framing that a worker could confuse us with.
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            # -P and our own search path: whatever lies in the working directory is not for it to import and run.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE, str(theirs.fileno())],
                env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # decoders complain there, in whatever words the file gives them
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()

    def wait_until_ready(self, timeout_s: float) -> int:
        """The version of its describing path. Raises Unavailable when it refuses, _Silent when it says nothing."""
        greeting = self._receive(timeout_s)
        if greeting[:1] != _DESCRIBED or len(greeting) != 5:
            raise Unavailable(greeting[1:].decode(errors="replace"))
        return int.from_bytes(greeting[1:], "big")

    def ask(self, fds: list[int], timeout_s: float) -> bytes:
        """Raises _Silent."""
        self.done += 1
        try:
            socket.send_fds(self._socket, [b"?"], fds)
        except OSError:
            raise _Silent(self._fate()) from None
        return self._receive(timeout_s)

    def compare(self, ours: Picture, others: list[Picture], timeout_s: float, *, cuts: bool) -> list[Likeness | None]:
        """Raises _Silent."""
        self.done += 1
        self._socket.settimeout(timeout_s)
        try:
            self._socket.send((_COMPARE_CUTS if cuts else _COMPARE) + bytes([len(others)]))
            for picture in (ours, *others):
                self._socket.send(codec.encode_description(*picture))
        except OSError:
            raise _Silent(self._fate()) from None
        finally:
            self._socket.settimeout(None)
        return [_likeness_in(self._receive(timeout_s)) for _ in others]

    def ask_for_difference(self, one: int, other: int, timeout_s: float) -> tuple[int, int, bytes]:
        """Raises Refused, _Silent."""
        answer = self.ask([one, other], timeout_s)
        if answer[:1] != _DESCRIBED:
            raise Refused(answer[1:].decode(errors="replace") or "refused without a reason")
        if len(answer) != 1 + _SIZE.size:
            raise _Silent("gave no size")
        width, height = _SIZE.unpack(answer[1:])
        if not 0 < 3 * width * height <= _MOST_PIXEL_BYTES:
            raise _Silent("gave a size that makes no sense")
        pixels = bytearray()
        while len(pixels) < 3 * width * height:
            pixels += self._receive(timeout_s)
        if len(pixels) != 3 * width * height:
            raise _Silent("gave more than it said")
        return width, height, bytes(pixels)

    def _receive(self, timeout_s: float) -> bytes:
        try:
            poll = select.poll()  # not select, which knows no descriptor beyond 1024: apps have files open
            poll.register(self._socket, select.POLLIN)
            if not poll.poll(timeout_s * 1000):
                raise _Silent(f"took longer than {timeout_s:.0f} s")
            answer = self._socket.recv(_LONGEST_ANSWER_BYTES + 1)
        except OSError:
            raise _Silent(self._fate()) from None
        if len(answer) > _LONGEST_ANSWER_BYTES:
            raise _Silent("gave an endless answer")
        if not answer:
            raise _Silent(self._fate())
        return answer

    def _fate(self) -> str:
        """How it ended, in the words of who asks about a picture."""
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return "ended the conversation"
        if code == -signal.SIGXCPU:
            return "needs more processor time than is allowed"
        if code < 0:
            with suppress(ValueError):
                return f"ended the decoder with {signal.Signals(-code).name}"
        return f"ended the decoder with exit code {code}"

    def resident_bytes(self) -> int:
        try:
            with open(f"/proc/{self._process.pid}/statm", "rb") as statm:
                return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, IndexError):
            return 0

    def kill(self) -> None:
        """End the process, and wait until it has ended. Any thread, any number of times."""
        with self._kill_lock:
            try:
                self._process.kill()
            except PermissionError:  # it is another user by now, and whoever started us left us no CAP_KILL
                with suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)  # nobody to talk to: it ends when its picture is done
            self._process.wait()

    def end(self) -> None:
        """Also let go of the socket: by whoever has this worker to himself."""
        self.kill()
        self._socket.close()
