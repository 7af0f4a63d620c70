"""An app that saves, copies, edits, renames and deletes files in a mount, and says in a ledger what it has fsynced.

As a script: works in DIRECTORY, where `DIRECTORIES` are and nothing else, until its standard input ends or the first
call that fails. What it did is one line on standard output, {"calls": …, "error": errno or null}.
"""

import argparse
import json
import os
import random
import select
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .durable import Attributes, Content, Ledger, cut, make, overwrite, size_of

DIRECTORIES = ("", "sub")
_MOST_FILES = 14
_POOL = 14  # contents that all writers have
_SMALLEST_SHARED_BYTES = 4096


@dataclass(slots=True)
class _File:
    """What a path shows now, and what of that is on disk. `content` None: it was removed."""

    content: Content | None
    data_synced: bool = False
    name_synced: bool = False
    attributes: Attributes | None = None


class SyncingApp:
    """Paths are relative to one directory and its subdirectory; nobody else works there."""

    def __init__(self, directory: int, ledger: Ledger, rng: random.Random, first_stream: int) -> None:
        """`directory`: a descriptor. `first_stream`: streams from there on are this app's alone."""
        self._directory, self._ledger, self._rng = directory, ledger, rng
        self._streams = iter(range(first_stream, first_stream + (1 << 20)))
        self._names = iter(range(1 << 20))
        self.files: dict[str, _File] = {}
        self.calls = 0
        self._deeds: list[Callable[[], None]] = [
            *[self._save] * 6,
            *[self._save_by_rename] * 4,
            *[self._rewrite] * 3,
            *[self._edit] * 3,
            *[self._append] * 1,
            *[self._cut] * 1,
            *[self._touch] * 3,
            *[self._copy] * 4,
            *[self._move] * 2,
            *[self._remove] * 3,
            *[self._sync_later] * 3,
            *[self._sync_directory] * 2,
            *[self._ask] * 3,
            *[self._pause] * 2,
        ]

    def work(self) -> None:
        if len(self._existing()) >= _MOST_FILES:
            self._remove()
        self._rng.choice(self._deeds)()
        self.calls += 1

    # --- small things

    def _existing(self) -> list[str]:
        return sorted(path for path, file in self.files.items() if file.content is not None)

    def _some(self) -> str | None:
        existing = self._existing()
        return self._rng.choice(existing) if existing else None

    def _new(self, suffix: str = "") -> str:
        name = f"{next(self._names)}{suffix}"  # never used again
        directory = self._rng.choice(DIRECTORIES)
        return f"{directory}/{name}" if directory else name

    def _content(self) -> Content:
        if self._rng.random() < 0.85:
            number = self._rng.randrange(1, _POOL)
        else:
            number = next(self._streams)
        # The same for all who have the stream: 4 KiB, 8 KiB … and some bytes.
        size_bytes = 4096 * (1 + number * 7 % 24) + number * 37 % 4096
        return ((0, size_bytes, number),)

    def _may(self, path: str, content: Content | None, *, torn: bool) -> None:
        self._ledger.may(path, content, torn=torn)

    def _set(self, path: str, content: Content | None, *, data_synced: bool = False, name_synced: bool = False) -> None:
        self.files[path] = _File(content, data_synced=data_synced, name_synced=name_synced)

    def _say(self, path: str) -> None:
        """Promise what is certain about a path now."""
        file = self.files[path]
        if file.name_synced and (file.data_synced or file.content is None):
            self._ledger.must(path, file.content, file.attributes)

    def _open(self, path: str, flags: int, mode: int = 0o644) -> int:
        return os.open(path, flags | os.O_NOFOLLOW, mode, dir_fd=self._directory)

    def _write(self, path: str, fd: int, data: bytes, offset: int) -> None:
        step = self._rng.choice((len(data), 16 << 10, 100_000))
        done = 0
        while done < len(data):
            # A disk that goes in the middle makes it a short one; the next then says why.
            count = os.pwrite(fd, data[done : done + step], offset + done)
            if not count:
                raise AssertionError(f"{path}: nothing was written")
            done += count

    def _sync(self, path: str, fd: int, *, data_only: bool = False) -> None:
        (os.fdatasync if data_only else os.fsync)(fd)
        file, st = self.files[path], os.fstat(fd)
        file.data_synced = True
        # fdatasync promises neither mode nor time
        file.attributes = None if data_only else Attributes(stat.S_IMODE(st.st_mode), st.st_mtime_ns)
        self._say(path)

    def _maybe_sync(self, path: str, fd: int) -> None:
        if self._rng.random() < 0.6:
            self._sync(path, fd, data_only=self._rng.random() < 0.2)

    def _maybe_sync_directory(self, path: str) -> None:
        if self._rng.random() < 0.6:
            self._sync_names(os.path.dirname(path))

    def _sync_names(self, directory: str) -> None:
        fd = self._open(directory or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        for path, file in self.files.items():
            if os.path.dirname(path) == directory and not file.name_synced:
                file.name_synced = True
                self._say(path)

    # --- what apps do

    def _fill(self, path: str, content: Content) -> None:
        self._may(path, content, torn=True)
        fd = self._open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, self._rng.choice((0o600, 0o640, 0o644)))
        try:
            # An fsync of a new file makes its name durable too, on every filesystem we promise to work on.
            self._set(path, content, name_synced=True)
            self._write(path, fd, make(content), 0)
            self._maybe_sync(path, fd)
        finally:
            os.close(fd)

    def _save(self) -> None:
        path = self._new()
        self._fill(path, self._content())
        self._maybe_sync_directory(path)

    def _save_by_rename(self) -> None:
        draft = self._new("~")
        self._fill(draft, self._content())
        target = self._some()
        if target is None or target == draft or self._rng.random() < 0.3:
            target = self._new()
        self._rename(draft, target)

    def _rename(self, old: str, new: str) -> None:
        file = self.files[old]
        assert file.content is not None
        self._ledger.moves(old, new, file.content if file.data_synced and file.name_synced else None)
        os.rename(old, new, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        self.files[new] = _File(file.content, data_synced=file.data_synced, attributes=file.attributes)
        self._set(old, None)
        if self._rng.random() < 0.6:
            # Where it is first: on a filesystem without order the name that went must not be lost alone.
            self._sync_names(os.path.dirname(new))
            if os.path.dirname(old) != os.path.dirname(new):
                self._sync_names(os.path.dirname(old))

    def _move(self) -> None:
        path = self._some()
        if path is not None:
            self._rename(path, self._new())

    def _change(self, path: str, content: Content) -> None:
        """Before an existing file is written to."""
        known = self.files[path]
        self._may(path, content, torn=True)
        self._set(path, content, name_synced=known.name_synced)

    def _rewrite(self) -> None:
        path = self._some()
        if path is None:
            return
        content = self._content()
        self._may(path, (), torn=False)
        self._change(path, content)
        fd = self._open(path, os.O_WRONLY | os.O_TRUNC)
        try:
            self._write(path, fd, make(content), 0)
            self._maybe_sync(path, fd)
        finally:
            os.close(fd)

    def _put(self, path: str, start: int, end: int, flags: int) -> None:
        known = self.files[path].content
        assert known is not None
        number = self._rng.randrange(1, _POOL)
        content = overwrite(known, start, end, number)
        self._change(path, content)
        fd = self._open(path, flags)
        try:
            self._write(path, fd, make(((start, end, number),)), start)
            self._maybe_sync(path, fd)
        finally:
            os.close(fd)

    def _edit(self) -> None:
        path = self._some()
        if path is None:
            return
        size_bytes = size_of(self.files[path].content or ())
        if size_bytes:
            start = self._rng.choice((0, size_bytes // 2 // 512 * 512, size_bytes // 3))
            self._put(path, start, min(size_bytes, start + self._rng.choice((100, 4096, 30_000))), os.O_RDWR)

    def _append(self) -> None:
        path = self._some()
        if path is not None:
            size_bytes = size_of(self.files[path].content or ())
            if size_bytes < 150_000:
                self._put(path, size_bytes, size_bytes + self._rng.choice((512, 9000)), os.O_RDWR)

    def _cut(self) -> None:
        path = self._some()
        if path is None:
            return
        content = cut(self.files[path].content or (), size_of(self.files[path].content or ()) // 2)
        self._change(path, content)
        fd = self._open(path, os.O_RDWR)
        try:
            os.ftruncate(fd, size_of(content))
            self._maybe_sync(path, fd)
        finally:
            os.close(fd)

    def _touch(self) -> None:
        """Open for writing and write nothing: what was certain stays certain."""
        path = self._some()
        if path is not None:
            os.close(self._open(path, os.O_RDWR))

    def _copy(self) -> None:
        source = self._some()
        if source is None:
            return
        content = self.files[source].content
        assert content is not None
        target = self._new()
        self._may(target, content, torn=True)
        reading = self._open(source, os.O_RDONLY)
        try:
            writing = self._open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            try:
                self._set(target, content, name_synced=True)
                while os.copy_file_range(reading, writing, 1 << 30):
                    pass
                self._maybe_sync(target, writing)
            finally:
                os.close(writing)
        finally:
            os.close(reading)
        self._maybe_sync_directory(target)

    def _remove(self) -> None:
        path = self._some()
        if path is not None:
            self._may(path, None, torn=False)
            os.unlink(path, dir_fd=self._directory)
            self._set(path, None)
            self._maybe_sync_directory(path)

    def _sync_later(self) -> None:
        """Long after it was closed, as sync(1) with a name does it, which opens for reading."""
        path = self._some()
        if path is not None:
            fd = self._open(path, os.O_RDONLY)
            try:
                self._sync(path, fd)
            finally:
                os.close(fd)

    def _sync_directory(self) -> None:
        self._sync_names(self._rng.choice(DIRECTORIES))

    def _ask(self) -> None:
        """Waits until the file is settled, which makes the daemon hurry with all of them."""
        path = self._some()
        if path is not None and size_of(self.files[path].content or ()) >= _SMALLEST_SHARED_BYTES:
            fd = self._open(path, os.O_RDONLY)
            try:
                os.getxattr(fd, "user.dedupfs.state")
            finally:
                os.close(fd)

    def _pause(self) -> None:
        time.sleep(self._rng.uniform(0, 0.05))


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.crash.syncing")
    parser.add_argument("directory")
    parser.add_argument("ledger", type=Path)
    parser.add_argument("seed")
    parser.add_argument("first_stream", type=int)
    chosen = parser.parse_args()
    os.umask(0)
    directory = os.open(chosen.directory, os.O_RDONLY | os.O_DIRECTORY)
    app = SyncingApp(directory, Ledger(chosen.ledger), random.Random(chosen.seed), chosen.first_stream)
    failed = None
    try:
        while not select.select([sys.stdin], [], [], 0)[0]:
            app.work()
    except OSError as error:
        failed = [error.errno, str(error)]
    print(json.dumps({"calls": app.calls, "error": failed}), flush=True)


if __name__ == "__main__":
    _main()
