"""Files of directories that have no store: looked at so that nothing changes, and remembered between two runs.

What was found out about a file is kept by inode, size and times, in a cache that can be thrown away at any time. Used
by one thread.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Self

from .errors import SourceError
from .model import Digest, Stamp

_COMMITTED_FILES = 200

# A device and an inode as text: SQLite's integers have a sign.
_FILE = "device TEXT, ino TEXT, size INTEGER, mtime INTEGER, ctime INTEGER"
_IS_FILE = "device = ? AND ino = ? AND size = ? AND mtime = ? AND ctime = ?"
_TABLES = (
    f"CREATE TABLE IF NOT EXISTS digests ({_FILE}, digest BLOB, PRIMARY KEY (device, ino)) WITHOUT ROWID",
    f"CREATE TABLE IF NOT EXISTS pictures ({_FILE}, version INTEGER, seen BLOB, PRIMARY KEY (device, ino))",
    f"CREATE TABLE IF NOT EXISTS compared ({_FILE}, among BLOB, found BLOB, PRIMARY KEY (device, ino))",
)


@dataclass(frozen=True, slots=True)
class File:
    """An inode, under the first name that was met."""

    directory: int  # which of those that were named
    path: bytes
    device: int
    ino: int
    stamp: Stamp


def open_quietly(path: bytes) -> int:
    """A descriptor to read from; where we may, without a new access time. Raises OSError."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_NOATIME)
    except PermissionError:
        return os.open(path, flags)


class Cache:
    """A file, made where there is none. One that is no database is begun anew; SourceError says why another one cannot
    be used, then or later."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._uncommitted = 0
        with self._usable():
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            try:
                self._database = self._open(path)
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:
                os.unlink(path)  # nothing but time is lost
                self._database = self._open(path)

    @staticmethod
    def _open(path: str) -> sqlite3.Connection:
        database = sqlite3.connect(path)
        try:
            database.execute("PRAGMA synchronous = OFF")
            for table in _TABLES:
                database.execute(table)
        except BaseException:
            database.close()
            raise
        return database

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise SourceError(f"the cache {self._path} cannot be used: {error}") from None

    def digest(self, file: File) -> Digest | None:
        """None where the file was not seen as it is now."""
        found = self._get(f"SELECT digest FROM digests WHERE {_IS_FILE}", _key(file))
        return Digest(found) if found is not None and len(found) == 16 else None

    def put_digest(self, file: File, digest: Digest) -> None:
        self._put("INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?, ?, ?)", (*_key(file), digest))

    def picture(self, file: File, version: int) -> bytes | None:
        """What this version made of a file's picture; None where it has not seen the file as it is now."""
        return self._get(f"SELECT seen FROM pictures WHERE {_IS_FILE} AND version = ?", (*_key(file), version))

    def put_picture(self, file: File, version: int, seen: bytes) -> None:
        self._put("INSERT OR REPLACE INTO pictures VALUES (?, ?, ?, ?, ?, ?, ?)", (*_key(file), version, seen))

    def compared(self, file: File, among: bytes) -> bytes | None:
        """What was found alike with a file's picture; None where it was not compared, or not among these."""
        return self._get(f"SELECT found FROM compared WHERE {_IS_FILE} AND among = ?", (*_key(file), among))

    def put_compared(self, file: File, among: bytes, found: bytes) -> None:
        self._put("INSERT OR REPLACE INTO compared VALUES (?, ?, ?, ?, ?, ?, ?)", (*_key(file), among, found))

    def _get(self, query: str, key: tuple[object, ...]) -> bytes | None:
        with self._usable(), closing(self._database.execute(query, key)) as rows:
            row = rows.fetchone()
        return row[0] if row is not None and isinstance(row[0], bytes) else None

    def _put(self, statement: str, values: tuple[object, ...]) -> None:
        with self._usable():
            self._database.execute(statement, values)
            self._uncommitted += 1
            if self._uncommitted >= _COMMITTED_FILES:
                self._database.commit()
                self._uncommitted = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with closing(self._database), self._usable():
            self._database.commit()


def _key(file: File) -> tuple[object, ...]:
    return (str(file.device), str(file.ino), *file.stamp)
