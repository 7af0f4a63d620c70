"""The LMDB environment that the index is in: its file, its tables, its transactions.

Only this module imports lmdb. Where that cannot write its root page (a used-up quota of btrfs, a disk that fails), it
refuses everything from then on: whoever comes next, to read or to write, opens it anew. So a transaction comes with the
handles of the tables that go with it.
"""

from __future__ import annotations  # lmdb's classes are generic for the type checker only

import errno
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import lmdb
from lmdb.verify import VerifyError, verify

from .errors import IndexDamaged, StoreError

if TYPE_CHECKING:
    Cursor = lmdb.Cursor[bytes]
    Table = lmdb._Database
    Transaction = lmdb.Transaction[bytes]

# Sparse, and never grown: enlarging a map while transactions are open is what crashes. About 400 bytes a file are used.
_MAP_BYTES = 64 << 30
_IN_MEMORY = ("/dev/shm", "/run")
_VERIFIED_BYTES = 64 << 20  # half a second
_READING_S = 10.0  # how long who reads in a dead environment is waited for
_POLL_S = 0.001
_DUPSORT = frozenset({"links", "holders", "sharers", "alike"})


class Tables:
    """An open environment, and the handles of its tables, which are what is annotated here: good for transactions of
    this environment, and for no other's."""

    meta: Table
    files: Table
    links: Table
    dirs: Table
    holders: Table
    sharers: Table
    queue: Table
    verified: Table
    damages: Table
    images: Table
    thumbnails: Table
    backlog: Table
    alike: Table

    def __init__(self, directory: str) -> None:
        """With `meta` alone: the others are made where they are not."""
        with _lock_in_memory(directory) as place:
            self.env = lmdb.open(
                place,
                map_size=_MAP_BYTES,
                max_dbs=32,
                max_readers=512,
                mode=0o600,
                writemap=False,
                readahead=False,
            )
        try:
            self._check_length(os.path.join(directory, "data.mdb"))
            self.inode = _inode(directory)
            self.meta = self.env.open_db(b"meta")
        except BaseException:
            self.env.close()
            raise

    def _check_length(self, path: str) -> None:
        """LMDB maps what its header promises: of a file that was cut short, the rest is a SIGBUS."""
        promised = (self.env.info()["last_pgno"] + 1) * self.env.stat()["psize"]
        found = os.stat(path).st_size
        if found < promised:
            raise IndexDamaged(f"the index has {found} of {promised} bytes")

    def open_all(self) -> None:
        for name in Tables.__annotations__:
            setattr(self, name, self.env.open_db(name.encode(), dupsort=name in _DUPSORT))

    def all(self) -> list[Table]:
        return [getattr(self, name) for name in Tables.__annotations__]

    def close_unread(self) -> None:
        """Close a dead environment, in which no transaction begins any more, when those that are open have ended. Who
        does not come to an end meets an error."""
        deadline = time.monotonic() + _READING_S
        while _is_read(self.env) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        self.env.close()


def _inode(directory: str) -> tuple[int, int]:
    found = os.stat(os.path.join(directory, "data.mdb"))
    return found.st_dev, found.st_ino


def _is_read(env: lmdb.Environment) -> bool:
    """Whether LMDB's table of readers has one that is at a transaction; those that wait for one have a dash there."""
    return any(line.split()[-1].isdigit() for line in env.readers().splitlines())


class Environment:
    """One that is open. Reading is for any thread; one at a time writes."""

    def __init__(self, directory: str) -> None:
        """Open or create, with the table `meta` alone: `open_tables` makes the others where they are not.

        Raises IndexDamaged when it cannot be used.
        """
        self._directory = directory
        self._opening = threading.Lock()
        self._is_lost = False  # it was dead and is closed, and could not be opened since
        _verify(os.path.join(directory, "data.mdb"))
        with _refusing():
            self.tables = Tables(directory)

    def open_tables(self) -> None:
        """Raises IndexDamaged."""
        with _refusing():
            self.tables.open_all()

    def close(self) -> None:
        """What was committed is durable already."""
        with self._opening:
            if not self._is_lost:
                self.tables.env.close()
            self._is_lost = False  # it stays closed

    def read(self) -> Reading:
        return Reading(self)

    @contextmanager
    def write(self) -> Iterator[tuple[Transaction, Tables]]:
        """Raises IndexDamaged, with nothing changed; or, where the disk failed at the very end, perhaps everything."""
        try:
            tables = self.tables
            try:
                txn = tables.env.begin(write=True)
            except lmdb.Error as error:
                txn, tables = self.begin_anew(tables, error, write=True)
            with txn:
                yield txn, tables
        except (lmdb.Error, StoreError) as error:
            raise IndexDamaged(f"the index cannot be written ({error})") from None

    def copy(self, fd: int) -> None:
        """Write the whole of it to a descriptor. Raises OSError."""
        try:
            self.tables.env.copyfd(fd)
        except lmdb.Error as error:
            raise OSError(errno.EIO, str(error)) from None

    def used_share(self) -> float:
        """How much of the room that it can have is used, 0 to 1. Raises IndexDamaged."""
        with self.read() as (_, tables):
            info = tables.env.info()
            return float((info["last_pgno"] + 1) * tables.env.stat()["psize"] / info["map_size"])

    def begin_anew(self, tables: Tables, error: lmdb.Error, *, write: bool = False) -> tuple[Transaction, Tables]:
        """A transaction where none could begin in `tables`. Raises as `_open_anew` does."""
        while True:  # what was opened may be dead before this thread comes to it
            tables = self._open_anew(tables, error)
            try:
                return tables.env.begin(write=write), tables
            except lmdb.Error as again:
                error = again

    def _open_anew(self, tables: Tables, error: lmdb.Error) -> Tables:
        """What to use instead of `tables`, in which no transaction could begin. Raises `error` where opening it again
        is of no use, and IndexDamaged where it cannot be: who comes next tries again."""
        with self._opening:
            if self.tables is not tables:
                return self.tables  # somebody else was faster
            if not (self._is_lost or isinstance(error, lmdb.PanicError)):
                raise error
            try:
                if _inode(self._directory) != tables.inode:
                    raise IndexDamaged("the index cannot be opened again: another file is in its place")
                if not self._is_lost:
                    tables.close_unread()  # LMDB does not open a file twice, and knows of no readers but its own
                    self._is_lost = True
                opened = Tables(self._directory)
                try:
                    opened.open_all()
                except BaseException:
                    opened.env.close()
                    raise
            except (lmdb.Error, OSError) as problem:
                raise IndexDamaged(f"the index cannot be opened again ({problem})") from None
            self.tables, self._is_lost = opened, False
            return opened


@contextmanager
def _lock_in_memory(directory: str) -> Iterator[str]:
    """Where to open the index of `directory` so that LMDB's table of readers does not lie on the source's filesystem.

    Every reader writes to that table through a shared mapping. Where no block can be had for it (a full disk; on btrfs
    also a used up quota, at any time), that write is a SIGBUS. Nobody else needs the table: a store has one owner.
    """
    memory = next((path for path in _IN_MEMORY if os.access(path, os.W_OK | os.X_OK)), None)
    with TemporaryDirectory(prefix="dedupfs-", dir=memory) as place:
        os.symlink(os.path.abspath(os.path.join(directory, "data.mdb")), os.path.join(place, "data.mdb"))
        yield place  # LMDB opens everything once; the names may go


@contextmanager
def _refusing() -> Iterator[None]:
    """What LMDB says when it opens an index, as our error."""
    try:
        yield
    except lmdb.Error as error:
        raise IndexDamaged(f"the index cannot be opened ({error}); run dedupfs rebuild") from None


def _verify(path: str) -> None:
    """Refuse a file that would crash LMDB, which trusts what it maps. A large one is taken on trust: it would hold up
    the mount, and fsck looks at it."""
    try:
        if os.stat(path).st_size > _VERIFIED_BYTES:
            return
        problems: list[str] = verify(path)  # type: ignore[no-untyped-call]
    except FileNotFoundError:
        return
    except (NotADirectoryError, IsADirectoryError) as error:
        problems = [error.strerror or str(error)]
    except VerifyError as error:
        problems = [str(error)]
    if problems:
        raise IndexDamaged(f"the index is damaged ({problems[0]})")


class Reading:
    """A transaction to read in, and its tables. A class, since it is entered a dozen times for a file: half the cost of
    a generator."""

    __slots__ = ("_environment", "_txn")

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    def __enter__(self) -> tuple[Transaction, Tables]:
        tables = self._environment.tables
        try:
            self._txn = tables.env.begin()
        except lmdb.Error as error:
            try:
                self._txn, tables = self._environment.begin_anew(tables, error)
            except lmdb.Error as again:
                raise _unreadable(again) from None
        return self._txn, tables

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        self._txn.abort()
        if isinstance(error, (lmdb.Error, StoreError)):
            raise _unreadable(error) from None


def _unreadable(error: Exception) -> IndexDamaged:
    return IndexDamaged(f"the index cannot be read ({error}); run dedupfs rebuild")
