"""An app on a real mount: it saves, copies, edits, renames and deletes photographs, and notes what it may rely on.

As a script it is one of several writers that load a mount. It waits for orders on standard input, a line each:

    ["go", MOUNTPOINT, LEDGER, SEED, [NAME, …]]

to work in MOUNTPOINT/<its own directory> until the mount dies or the next line comes, noting everything in a new
ledger. The files named may not show their last time yet. It answers {"ready": how many files there are}, and in the
end {"calls": how many it made}, or {"error": what went wrong}. Everything is done relative to a descriptor of its
directory, so that nothing ever lands below a mount point that is gone.
"""

import argparse
import contextlib
import ctypes
import errno
import json
import os
import random
import select
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from .ledger import Ledger, State, World

# What a call says when the daemon dies under it, or is dead.
DEAD = (errno.ENOTCONN, errno.ECONNABORTED)

_MOST_FILES = 16
_NOTE = "user.note"
_NAMES = ("permit", "street 7", "IMG", "n\udcff")  # the last is no text

_libc = ctypes.CDLL(None, use_errno=True)


class Mismatch(Exception):
    """The mount shows something else than what was written."""


class PathApp:
    """Calls below one directory, each noted in the ledger before and after. Paths are names of files in it."""

    def __init__(self, directory: int, ledger: Ledger) -> None:
        """`directory`: a descriptor."""
        self._directory, self.ledger = directory, ledger
        self.contents: dict[str, bytes] = {}
        self.calls = 0

    # --- looking

    def look(self, name: str) -> State | None:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self._directory)
        except FileNotFoundError:
            return None
        with os.fdopen(fd, "rb") as file:
            data = file.read()
            st = os.fstat(fd)
            xattrs = [(key, os.getxattr(fd, key).hex()) for key in sorted(os.listxattr(fd)) if key.startswith("user.")]
        owner = (st.st_uid, st.st_gid)
        return State.of(data, mode=stat.S_IMODE(st.st_mode), owner=owner, mtime_ns=st.st_mtime_ns, xattrs=tuple(xattrs))

    def read(self, name: str) -> bytes:
        with os.fdopen(os.open(name, os.O_RDONLY, dir_fd=self._directory), "rb") as file:
            return file.read()

    def names(self) -> set[str]:
        return set(os.listdir(self._directory))

    def check(self, *, looked_at: bool = True) -> list[str]:
        return self.ledger.check(self.look, self.names(), looked_at=looked_at)

    # --- calls

    @contextlib.contextmanager
    def _call(self, *worlds: World) -> Iterator[None]:
        """One system call, from the first world to the last. Whatever it raises leaves the outcome open."""
        self.ledger.begin(list(worlds))
        yield
        self.ledger.end(worlds[-1])
        self.calls += 1

    def _state(self, name: str) -> State:
        return self.ledger.certain[name]

    def create(self, name: str, mode: int = 0o644) -> int:
        state = State.of(b"", mode=mode, owner=(os.geteuid(), os.getegid()), xattrs=())
        with self._call({name: None}, {name: state}):
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode, dir_fd=self._directory)
        self.contents[name] = b""
        return fd

    def open(self, name: str, flags: int) -> int:
        """An existing file; with O_TRUNC it is empty then."""
        state = self._state(name)
        emptied = state.with_content(b"") if flags & os.O_TRUNC else state
        with self._call({name: state}, {name: emptied}):
            fd = os.open(name, flags, dir_fd=self._directory)
        if flags & os.O_TRUNC:
            self.contents[name] = b""
        return fd

    def write(self, name: str, fd: int, data: bytes, offset: int) -> None:
        """One write, which a kill may leave half done at any block's end, as it does everywhere."""
        before, state = self.contents[name].ljust(offset, b"\0"), self._state(name)
        cuts = [0, *range(4096 - offset % 4096, len(data), 4096), len(data)]
        after = [before[:offset] + data[:cut] + before[offset + cut :] for cut in cuts]
        worlds: list[World] = [{name: state.with_content(content)} for content in after]
        with self._call(*worlds):
            written = os.pwrite(fd, data, offset)
            if written != len(data):
                # The kernel sends the daemon what goes into a page that it does not have by itself. Killed after that,
                # the daemon leaves a short write; who writes the rest hears of it.
                os.pwrite(fd, data[written:], offset + written)
                raise Mismatch(f"{name}: wrote {written} of {len(data)} bytes, and then more")
        self.contents[name] = after[-1]

    def truncate(self, name: str, fd: int, size_bytes: int) -> None:
        state, after = self._state(name), self.contents[name][:size_bytes].ljust(size_bytes, b"\0")
        with self._call({name: state}, {name: state.with_content(after)}):
            os.ftruncate(fd, size_bytes)
        self.contents[name] = after

    def copy_range(self, source: str, target: str, reading: int, writing: int) -> None:
        """All of it, in as many calls as it takes."""
        data, state, done = self.contents[source], self._state(target), 0
        cuts = [data[:cut] for cut in [*range(0, len(data), 4096), len(data)]]
        worlds: list[World] = [{target: state.with_content(content)} for content in cuts]
        with self._call(*worlds):
            while count := os.copy_file_range(reading, writing, 1 << 30, done, done):
                done += count
            if done != len(data):
                raise Mismatch(f"{source}: copied {done} of {len(data)} bytes")
        self.contents[target] = data

    def close(self, fd: int) -> None:
        os.close(fd)
        self.calls += 1

    def sync(self, fd: int) -> None:
        os.fsync(fd)
        self.calls += 1

    def rename(self, name: str, new: str) -> None:
        before: World = {name: self._state(name), new: self.ledger.certain.get(new)}
        # libfuse moves a file aside first that is still open, or was until just now (operations.md, Differences).
        moved_aside: World = {name: before[name], new: None}
        with self._call(before, moved_aside, {name: None, new: before[name]}):
            os.rename(name, new, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        self.contents[new] = self.contents.pop(name)

    def exchange(self, name: str, other: str) -> None:
        before: World = {name: self._state(name), other: self._state(other)}
        with self._call(before, {name: before[other], other: before[name]}):
            encoded = os.fsencode(name), os.fsencode(other)
            if _libc.renameat2(self._directory, encoded[0], self._directory, encoded[1], 2):
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))
        self.contents[name], self.contents[other] = self.contents[other], self.contents[name]

    def unlink(self, name: str) -> None:
        with self._call({name: self._state(name)}, {name: None}):
            os.unlink(name, dir_fd=self._directory)
        del self.contents[name]

    def chmod(self, name: str, mode: int) -> None:
        state = self._state(name)
        with self._call({name: state}, {name: replace(state, mode=mode)}):
            os.chmod(name, mode, dir_fd=self._directory)

    def utime(self, name: str, mtime_ns: int) -> None:
        state = self._state(name)
        with self._call({name: state}, {name: replace(state, mtime_ns=mtime_ns)}):
            os.utime(name, ns=(mtime_ns, mtime_ns), dir_fd=self._directory)

    def note(self, name: str, fd: int, value: bytes) -> None:
        state = self._state(name)
        with self._call({name: state}, {name: replace(state, xattrs=((_NOTE, value.hex()),))}):
            os.setxattr(fd, _NOTE, value)

    def compare(self, name: str) -> None:
        if (seen := self.read(name)) != self.contents[name]:
            raise Mismatch(f"{name} reads otherwise than written: {State.of(seen)}, not {self._state(name)}")
        self.calls += 1


class Writer:
    """What such an app does with its time. `rng` decides."""

    def __init__(self, app: PathApp, photos: list[bytes], rng: random.Random) -> None:
        self._app, self._photos, self._rng = app, photos, rng
        # Which of them is done how often: mostly what makes duplicates, and what breaks them up.
        self._deeds: list[Callable[[], None]] = [
            *[self._save] * 5,
            *[self._save_by_rename] * 3,
            *[self._copy] * 4,
            *[self._edit] * 4,
            *[self._append] * 2,
            *[self._cut] * 2,
            *[self._rewrite] * 2,
            *[self._move] * 3,
            *[self._remove] * 2,
            self._remove_while_open,
            self._exchange,
            *[self._dress] * 2,
            *[self._compare] * 3,
        ]

    def work(self) -> None:
        if len(self._app.contents) > _MOST_FILES:
            self._remove()
        self._rng.choice(self._deeds)()

    def _some(self) -> str | None:
        return self._rng.choice(sorted(self._app.contents)) if self._app.contents else None

    def _new_name(self, suffix: str = "") -> str:
        while True:
            name = f"{self._rng.choice(_NAMES)}-{self._rng.randrange(1000)}.jpg{suffix}"
            if name not in self._app.contents:
                return name

    def _piece(self) -> bytes:
        return self._rng.randbytes(self._rng.choice((1, 100, 4096, 9999)))

    def _fill(self, name: str) -> None:
        app, data = self._app, self._rng.choice(self._photos)
        fd = app.create(name, self._rng.choice((0o644, 0o600, 0o664)))
        try:
            size_bytes = self._rng.choice((len(data), 1 << 16, 30_000))
            for offset in range(0, len(data), size_bytes):
                app.write(name, fd, data[offset : offset + size_bytes], offset)
            if self._rng.random() < 0.1:
                app.sync(fd)
            if self._rng.random() < 0.3:
                app.note(name, fd, self._rng.randbytes(10))
        finally:
            app.close(fd)

    def _save(self) -> None:
        name = self._new_name()
        self._fill(name)
        if self._rng.random() < 0.5:
            self._app.utime(name, self._rng.randrange(10**9, 17 * 10**17))

    def _save_by_rename(self) -> None:
        draft = self._new_name(suffix="~")  # one of that name may lie there since a kill
        self._fill(draft)
        self._app.rename(draft, self._some_or_new())

    def _some_or_new(self) -> str:
        others = sorted(name for name in self._app.contents if not name.endswith("~"))
        return self._rng.choice(others) if others and self._rng.random() < 0.6 else self._new_name()

    def _copy(self) -> None:
        source = self._some()
        if source is None:
            return
        app, target = self._app, self._new_name()
        reading = app.open(source, os.O_RDONLY)
        try:
            writing = app.create(target)
            try:
                app.copy_range(source, target, reading, writing)
            finally:
                app.close(writing)
        finally:
            app.close(reading)

    @contextlib.contextmanager
    def _opened(self, flags: int) -> Iterator[tuple[str, int]]:
        name = self._some()
        if name is None:
            name = self._new_name()
            self._fill(name)
        fd = self._app.open(name, flags)
        try:
            yield name, fd
        finally:
            self._app.close(fd)

    def _edit(self) -> None:
        with self._opened(os.O_RDWR) as (name, fd):
            for _ in range(self._rng.randint(1, 3)):
                end = len(self._app.contents[name])
                self._app.write(name, fd, self._piece(), self._rng.randint(0, max(0, end)))

    def _append(self) -> None:
        with self._opened(os.O_WRONLY | os.O_APPEND) as (name, fd):
            self._app.write(name, fd, self._piece(), len(self._app.contents[name]))

    def _cut(self) -> None:
        with self._opened(os.O_RDWR) as (name, fd):
            size_bytes = len(self._app.contents[name])
            self._app.truncate(
                name, fd, self._rng.choice((0, size_bytes // 2, max(0, size_bytes - 1), size_bytes + 5000))
            )

    def _rewrite(self) -> None:
        with self._opened(os.O_WRONLY | os.O_TRUNC) as (name, fd):
            self._app.write(name, fd, self._rng.choice(self._photos), 0)

    def _move(self) -> None:
        if (name := self._some()) is not None:
            new = self._some_or_new()
            if new != name:
                self._app.rename(name, new)

    def _exchange(self) -> None:
        if len(self._app.contents) > 1:
            self._app.exchange(*self._rng.sample(sorted(self._app.contents), 2))

    def _remove(self) -> None:
        if (name := self._some()) is not None:
            self._app.unlink(name)

    def _remove_while_open(self) -> None:
        with self._opened(os.O_RDWR) as (name, fd):
            data = self._app.contents[name]
            self._app.unlink(name)
            if os.pread(fd, len(data) + 1, 0) != data:
                raise Mismatch(f"{name} reads otherwise after it was unlinked")

    def _dress(self) -> None:
        if (name := self._some()) is not None:
            self._app.chmod(name, self._rng.choice((0o600, 0o640, 0o644)))
            self._app.utime(name, self._rng.randrange(10**9, 17 * 10**17))

    def _compare(self) -> None:
        if (name := self._some()) is not None:
            self._app.compare(name)


def _is_dead(directory: int) -> bool:
    """Whether it was the end of the daemon that somebody met who waited for a page, and was told EIO."""
    try:
        os.stat(b"a name that nobody has looked up", dir_fd=directory)
    except OSError as error:
        return error.errno in DEAD
    return False


def _told_to_stop() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def _go(
    name: str, photos: list[bytes], mountpoint: str, ledger_path: str, seed: str, of_uncertain_time: list[str]
) -> dict[str, object]:
    """One round. What is in the directory now was verified: it is certain."""
    directory = os.open(os.path.join(mountpoint, name), os.O_RDONLY | os.O_DIRECTORY)
    try:
        ledger = Ledger(Path(ledger_path))
        app = PathApp(directory, ledger)
        for file in app.names():
            state = app.look(file)
            if state is not None:
                ledger.end({file: replace(state, mtime_ns=None) if file in of_uncertain_time else state})
                app.contents[file] = app.read(file)
        print(json.dumps({"ready": len(app.contents)}), flush=True)
        writer = Writer(app, photos, random.Random(seed))
        try:
            while not _told_to_stop():
                writer.work()
        except OSError as error:
            if error.errno not in DEAD and not (error.errno == errno.EIO and _is_dead(directory)):
                raise
        ledger.close()
        return {"calls": app.calls}
    finally:
        os.close(directory)


def _main() -> NoReturn:
    parser = argparse.ArgumentParser(prog="python -m tests.crash.writers")
    parser.add_argument("name", help="the writer's own directory in the mount")
    parser.add_argument("photos", nargs="+", type=Path)
    chosen = parser.parse_args()
    photos = [path.read_bytes() for path in chosen.photos]
    os.umask(0)
    while line := sys.stdin.buffer.readline():
        word, *arguments = json.loads(line)
        if word == "go":
            try:
                answer = _go(chosen.name, photos, *arguments)
            except (OSError, Mismatch) as error:
                answer = {"error": ascii(str(error))}
            print(json.dumps(answer), flush=True)
    sys.exit()


if __name__ == "__main__":
    _main()
