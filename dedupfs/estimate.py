"""What sharing would save in directories that dedupfs never saw: reads, and changes nothing.

Only files that could share are read, and of those only the ones whose size another has; a digest is taken as proof, as
nothing is done upon it. Digests are kept in a cache by inode, size and times, so that an interrupted run goes on where
it was, and the next one reads only what is new. Called by the command line, in its thread; nothing of a store is used.
"""

import itertools
import os
import sqlite3
import stat
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Self

from .digest import Checkpoint, hash_descriptor
from .errors import SourceError, UsageError
from .model import SMALLEST_SHARED_BYTES, STORE_DIRECTORY, Digest, Progress, Stamp

PRICES_USD = (0.08, 0.23)  # a gigabyte and month, as municipal contracts pay

_LARGEST = 20
_COMMITTED_FILES = 200
_SHOWN_UNREADABLE = 100


@dataclass(frozen=True, slots=True)
class File:
    """An inode, under the first name that was met."""

    directory: int  # which of those that were named
    path: bytes
    device: int
    ino: int
    stamp: Stamp


@dataclass(slots=True)
class Sums:
    """`duplicate_*`: what is beyond the first of equal files."""

    files: int = 0
    bytes: int = 0
    duplicate_files: int = 0
    duplicate_bytes: int = 0

    def as_json(self) -> dict[str, object]:
        return {
            "files": self.files,
            "bytes": self.bytes,
            "duplicate_files": self.duplicate_files,
            "duplicate_bytes": self.duplicate_bytes,
        }


@dataclass(slots=True)
class Group:
    """Equal files."""

    digest: Digest
    size_bytes: int
    paths: list[bytes]

    @property
    def wasted_bytes(self) -> int:
        return self.size_bytes * (len(self.paths) - 1)


@dataclass(slots=True)
class Estimate:
    """What was found; sizes are lengths. A directory's own sums leave out what only another has as well."""

    directories: list[tuple[bytes, Sums]]
    total: Sums = field(default_factory=Sums)
    largest: list[Group] = field(default_factory=list)
    unreadable: list[tuple[bytes, str]] = field(default_factory=list)
    pairs: dict[tuple[int, int], int] = field(default_factory=dict)  # of directories, by number: what both have
    read_bytes: int = 0
    cached_files: int = 0

    @property
    def across_bytes(self) -> int:
        """What is duplicate only because one directory has what another has."""
        return self.total.duplicate_bytes - sum(sums.duplicate_bytes for _, sums in self.directories)

    def as_json(self, prices: Sequence[float]) -> dict[str, object]:
        return {
            "directories": [{"path": os.fsdecode(path), **sums.as_json()} for path, sums in self.directories],
            "total": self.total.as_json(),
            "across_bytes": self.across_bytes,
            "pairs": [
                {"directories": [os.fsdecode(self.directories[each][0]) for each in pair], "bytes": size_bytes}
                for pair, size_bytes in sorted(self.pairs.items())
            ],
            "price_per_gb_month": list(prices),
            "cost_per_month": [cost(self.total.bytes, price) for price in prices],
            "saved_per_month": [cost(self.total.duplicate_bytes, price) for price in prices],
            "largest": [
                {
                    "digest": group.digest.hex(),
                    "size_bytes": group.size_bytes,
                    "wasted_bytes": group.wasted_bytes,
                    "paths": [os.fsdecode(path) for path in group.paths],
                }
                for group in self.largest
            ],
            "unreadable": len(self.unreadable),
            "unreadable_paths": [
                {"path": os.fsdecode(path), "reason": reason} for path, reason in self.unreadable[:_SHOWN_UNREADABLE]
            ],
        }


def cost(size_bytes: int, price: float) -> float:
    """Per month, at a price per gigabyte (10^9 bytes)."""
    return round(size_bytes / 1e9 * price, 2)


def estimate(directories: Sequence[str], *, cache: str, progress: Progress) -> Estimate:
    """Look through directories that do not overlap. `cache` is a file, made where there is none.

    Raises UsageError, SourceError. What cannot be read is told, and counted by its length.
    """
    tops = _checked(directories)
    found = Estimate([(top, Sums()) for top in tops])
    by_size: dict[int, list[File]] = defaultdict(list)
    for file in _files(tops, found, progress):
        for sums in (found.total, found.directories[file.directory][1]):
            sums.files += 1
            sums.bytes += file.stamp.size_bytes
        if file.stamp.size_bytes >= SMALLEST_SHARED_BYTES:
            by_size[file.stamp.size_bytes].append(file)
    candidates = [file for files in by_size.values() if len(files) > 1 for file in files]
    by_content: dict[tuple[int, Digest], list[File]] = defaultdict(list)
    for file, digest in _digests(candidates, cache, found, progress):
        by_content[file.stamp.size_bytes, digest].append(file)
    _sum_up(by_content, found)
    return found


def _checked(directories: Sequence[str]) -> list[bytes]:
    tops: list[bytes] = []
    for directory in directories:
        top = os.path.realpath(os.fsencode(directory))
        if not os.path.isdir(top):
            raise SourceError(f"{directory} is not a directory; name directories that hold archives")
        if os.path.lexists(os.path.join(top, STORE_DIRECTORY)):
            raise UsageError(
                f"{directory} has a dedupfs store: what is shared in it reads as zeros here; mount it, and ask dedupfs "
                "status, or estimate the mount"
            )
        for other in tops:
            if os.path.commonpath((top, other)) in (top, other):
                raise UsageError(f"{directory} and {os.fsdecode(other)} overlap; name each directory once")
        tops.append(top)
    return tops


def _files(tops: Sequence[bytes], found: Estimate, progress: Progress) -> Iterator[File]:
    """Every regular file below, each inode once, on the filesystem of its top. Links are not followed."""
    seen: set[tuple[int, int]] = set()
    for number, top in enumerate(tops):
        device = os.stat(top).st_dev
        waiting = [top]
        while waiting:
            directory = waiting.pop()
            try:
                with os.scandir(directory) as entries:
                    for entry in entries:
                        st = entry.stat(follow_symlinks=False)
                        if stat.S_ISDIR(st.st_mode) and st.st_dev == device:
                            waiting.append(entry.path)
                        elif stat.S_ISREG(st.st_mode) and (st.st_dev, st.st_ino) not in seen:
                            seen.add((st.st_dev, st.st_ino))
                            yield File(number, entry.path, st.st_dev, st.st_ino, Stamp.of(st))
                            if not len(seen) % 1000:
                                progress("looking", len(seen), None)
            except FileNotFoundError:
                continue  # removed while we looked
            except OSError as error:
                found.unreadable.append((directory, error.strerror or str(error)))


def _digests(files: Sequence[File], cache: str, found: Estimate, progress: Progress) -> Iterator[tuple[File, Digest]]:
    """In the order of their inodes, which on a disk is nearly that of their bytes."""
    total = sum(file.stamp.size_bytes for file in files)
    done = 0

    def checkpoint() -> None:
        progress("reading (MiB)", done >> 20, total >> 20)

    with _Cache(cache) as known:
        for file in sorted(files, key=lambda file: (file.device, file.ino)):
            digest = known.get(file)
            if digest is None:
                digest = _digest(file, found, checkpoint)
                if digest is not None:
                    known.put(file, digest)
                    found.read_bytes += file.stamp.size_bytes
            else:
                found.cached_files += 1
            done += file.stamp.size_bytes
            checkpoint()
            if digest is not None:
                yield file, digest


def _digest(file: File, found: Estimate, checkpoint: Checkpoint) -> Digest | None:
    try:
        fd = _open_quietly(file.path)
        try:
            digest = hash_descriptor(fd, checkpoint)
            if Stamp.of(os.fstat(fd)) == file.stamp:
                return digest
            reason = "was changed meanwhile"
        finally:
            os.close(fd)
    except OSError as error:
        reason = error.strerror or str(error)
    found.unreadable.append((file.path, reason))
    return None


def _open_quietly(path: bytes) -> int:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_NOATIME)
    except PermissionError:
        return os.open(path, flags)


def _sum_up(by_content: dict[tuple[int, Digest], list[File]], found: Estimate) -> None:
    groups = []
    for (size_bytes, digest), files in by_content.items():
        if len(files) < 2:
            continue
        counts: dict[int, int] = defaultdict(int)
        for file in files:
            counts[file.directory] += 1
        for directory, count in counts.items():
            found.directories[directory][1].duplicate_files += count - 1
            found.directories[directory][1].duplicate_bytes += size_bytes * (count - 1)
        for one, other in itertools.combinations(sorted(counts), 2):
            both = size_bytes * min(counts[one], counts[other])
            found.pairs[one, other] = found.pairs.get((one, other), 0) + both
        found.total.duplicate_files += len(files) - 1
        found.total.duplicate_bytes += size_bytes * (len(files) - 1)
        groups.append(Group(digest, size_bytes, sorted(file.path for file in files)))
    groups.sort(key=lambda group: (-group.wasted_bytes, group.paths))
    found.largest = groups[:_LARGEST]


class _Cache:
    """Digests by what tells that a file has not changed. A cache that cannot be used is begun anew."""

    def __init__(self, path: str) -> None:
        self._uncommitted = 0
        try:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            self._database = self._open(path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise SourceError(f"the cache {path} cannot be used: {error}") from None
            os.unlink(path)  # it is no database: nothing but time is lost
            self._database = self._open(path)

    @staticmethod
    def _open(path: str) -> sqlite3.Connection:
        database = sqlite3.connect(path)
        try:
            database.execute("PRAGMA synchronous = OFF")
            database.execute(
                "CREATE TABLE IF NOT EXISTS digests (device TEXT, ino TEXT, size INTEGER, mtime INTEGER, "
                "ctime INTEGER, digest BLOB, PRIMARY KEY (device, ino)) WITHOUT ROWID"
            )
        except BaseException:
            database.close()
            raise
        return database

    def get(self, file: File) -> Digest | None:
        with closing(
            self._database.execute(
                "SELECT digest FROM digests WHERE device = ? AND ino = ? AND size = ? AND mtime = ? AND ctime = ?",
                (str(file.device), str(file.ino), *file.stamp),
            )
        ) as rows:
            row = rows.fetchone()
        return Digest(row[0]) if row is not None and isinstance(row[0], bytes) and len(row[0]) == 16 else None

    def put(self, file: File, digest: Digest) -> None:
        self._database.execute(
            "INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?, ?, ?)",
            (str(file.device), str(file.ino), *file.stamp, digest),
        )
        self._uncommitted += 1
        if self._uncommitted >= _COMMITTED_FILES:
            self._database.commit()
            self._uncommitted = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.commit()
        self._database.close()
