"""Near-duplicates in directories that have no store: versions of one photograph whose bytes differ.

As in a mount, each content is described once, by workers that are shut in, and compared with those before it, by one
that is handed no picture; nothing is decoded here. Left out is what a mount does beyond that: it also looks for cuts
among all pictures of a folder. What was described and found alike is kept in the cache, so an interrupted run goes on
where it was.
Used by one thread; two more wait for workers.
"""

import hashlib
import json
import os
from collections import Counter, defaultdict, deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

from . import codec
from .authority import Candidate, rank
from .errors import StoreError
from .likeness import Picture
from .magic import HEAD_BYTES, looks_like_picture
from .model import Alike, ContentKey, Digest, Progress, Relation, Stamp
from .similar import Search, alike_nearest_first, grouped
from .survey import Cache, File, open_quietly
from .workers import Refused, Workers

# Somebody waits for this, and the workers have the lowest priority.
_AT_A_TIME = max(1, min(4, os.cpu_count() or 1))
_AHEAD = 4 * _AT_A_TIME

_SHOWN_GROUPS = 50
_SHOWN_MEMBERS = 11

# How what was seen of a file is kept: one byte, and what goes with it.
_NO_PICTURE, _REFUSED, _DESCRIBED = b"0", b"R", b"D"


@dataclass(frozen=True, slots=True)
class Version:
    """Equal files that are a version of a photograph. `relation`: to the authoritative one, None for that itself."""

    files: Sequence[File]
    relation: Relation | None
    picture: Picture


@dataclass(slots=True)
class Lookalikes:
    """`near_*`: pictures beyond the authoritative one of each group, each content counted once."""

    pictures: int = 0
    groups: int = 0
    near: int = 0
    near_bytes: int = 0
    relations: Counter[Relation] = field(default_factory=Counter)
    largest: list[tuple[list[Version], int]] = field(default_factory=list)  # the first ones of a group, how many more
    undescribable: list[tuple[Sequence[File], str]] = field(default_factory=list)


def look(contents: Sequence[Sequence[File]], cache: Cache, progress: Progress) -> Lookalikes:
    """`contents`: equal files together. What cannot be read, or changes meanwhile, is passed over.

    Raises Unavailable where no worker can be had, SourceError when the cache cannot be used.
    """
    workers, comparer = Workers(_AT_A_TIME), Workers(1)
    try:
        return _Looking(contents, cache, workers, comparer).look(progress)
    finally:
        workers.close()
        comparer.close()


class _Looking:
    def __init__(self, contents: Sequence[Sequence[File]], cache: Cache, workers: Workers, comparer: Workers) -> None:
        # On a disk the order of inodes is nearly that of the bytes; and the next run takes the same file of each.
        self._contents = sorted(
            (sorted(files, key=_place) for files in contents if files), key=lambda files: _place(files[0])
        )
        self._cache, self._workers = cache, workers
        self._search = Search(self._picture, comparer.compare)
        # Who came before, in order: what was found alike among them holds while they are the same ones.
        self._before: list[ContentKey] = []
        self._number: dict[ContentKey, int] = {}  # its place there
        self._among = hashlib.blake2b(digest_size=16)
        self._neighbours: dict[ContentKey, list[Alike]] = defaultdict(list)
        self._found = Lookalikes()

    def look(self, progress: Progress) -> Lookalikes:
        with closing(self._seen(progress)) as all_seen:
            for number, seen in enumerate(all_seen):
                if seen[:1] == _REFUSED:
                    self._found.undescribable.append((self._contents[number], seen[1:].decode(errors="replace")))
                elif seen[:1] == _DESCRIBED:
                    self._compare(_key(number), codec.decode_description(seen[1:]))
        self._group()
        return self._found

    # -- describing ---------------------------------------------------------------------------------------------------

    def _seen(self, progress: Progress) -> Generator[bytes, None, None]:
        """What there is to see in each content, in order; described some way ahead of what is asked for."""
        ahead: deque[bytes | Future[bytes]] = deque()
        waiting = iter(self._contents)
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            try:
                for number in range(len(self._contents)):
                    while len(ahead) < _AHEAD and (files := next(waiting, None)) is not None:
                        known = self._known(files[0])
                        ahead.append(pool.submit(self._look_at, files[0]) if known is None else known)
                    first = ahead.popleft()
                    if isinstance(first, Future):
                        seen = first.result()
                        if seen:
                            self._cache.put_picture(self._contents[number][0], self._workers.version, seen)
                        first = seen
                    progress("looking at pictures", number + 1, len(self._contents))
                    yield first
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._workers.close()  # nobody waits for the pictures in hand
                raise

    def _known(self, file: File) -> bytes | None:
        seen = self._cache.picture(file, self._workers.version)
        if seen is not None and seen[:1] == _DESCRIBED:
            try:
                codec.decode_description(seen[1:])
            except StoreError:
                return None
        return seen

    def _look_at(self, file: File) -> bytes:
        """b"" for what cannot be read as it was found. In a thread of the pool. Raises Unavailable."""
        try:
            fd = open_quietly(file.path)
        except OSError:
            return b""
        try:
            seen = self._look_into(fd)
            return seen if Stamp.of(os.fstat(fd)) == file.stamp else b""
        except OSError:
            return b""
        finally:
            os.close(fd)

    def _look_into(self, fd: int) -> bytes:
        if not looks_like_picture(os.pread(fd, HEAD_BYTES, 0)):
            return _NO_PICTURE
        try:
            return _DESCRIBED + codec.encode_description(*self._workers.describe(fd))
        except Refused as reason:
            return _REFUSED + str(reason).encode(errors="replace")

    # -- comparing ----------------------------------------------------------------------------------------------------

    def _picture(self, content: ContentKey) -> Picture | None:
        seen = self._cache.picture(self._files(content)[0], self._workers.version)
        return codec.decode_description(seen[1:]) if seen is not None and seen[:1] == _DESCRIBED else None

    def _files(self, content: ContentKey) -> Sequence[File]:
        return self._contents[int.from_bytes(content.digest, "big")]

    def _compare(self, content: ContentKey, picture: Picture) -> None:
        self._found.pictures += 1
        file, among = self._files(content)[0], self._among.digest()
        alikes = self._decoded(self._cache.compared(file, among))
        if alikes is None:
            alikes = [
                Alike(other, likeness.relation, likeness.distance)
                for other, likeness in self._search.find(*picture)
                if likeness.relation.is_same_picture
            ]
            numbers = [(self._number[each.content], each.relation, each.distance) for each in alikes]
            self._cache.put_compared(file, among, json.dumps(numbers).encode())
        for alike in alikes:
            self._neighbours[content].append(alike)
            self._neighbours[alike.content].append(alike._replace(content=content))
        self._search.add(content, picture[0])
        self._number[content] = len(self._before)
        self._before.append(content)
        self._among.update(repr((picture[0].version, file.device, file.ino, file.stamp)).encode())

    def _decoded(self, found: bytes | None) -> list[Alike] | None:
        """None for what is none."""
        if found is None:
            return None
        try:
            return [
                Alike(self._before[number], Relation(relation), distance)
                for number, relation, distance in json.loads(found)
            ]
        except (ValueError, TypeError, IndexError):
            return None

    def _group(self) -> None:
        candidates = {}
        for content in self._neighbours:
            if (picture := self._picture(content)) is not None:
                seen_ns = min(file.stamp.mtime_ns for file in self._files(content))
                candidates[content] = Candidate(content, picture[0], seen_ns, pinned=False)
        best_first = (candidate.content for candidate in sorted(candidates.values(), key=rank))
        groups = []
        for centre, members in grouped(self._neighbours, best_first):
            self._found.groups += 1
            self._found.near += len(members)
            self._found.near_bytes += sum(self._files(each.content)[0].stamp.size_bytes for each in members)
            self._found.relations.update(each.relation for each in members)
            groups.append((centre, members))
        groups.sort(key=lambda group: -len(group[1]))
        for centre, members in groups[:_SHOWN_GROUPS]:
            members.sort(key=alike_nearest_first)
            shown = [(centre, None), *((each.content, each.relation) for each in members[:_SHOWN_MEMBERS])]
            versions = [
                Version(self._files(content), relation, picture)
                for content, relation in shown
                if (picture := self._picture(content)) is not None
            ]
            self._found.largest.append((versions, len(members) + 1 - len(shown)))


def _place(file: File) -> tuple[int, int]:
    return file.device, file.ino


def _key(number: int) -> ContentKey:
    """Contents have numbers here: no digest is known of a file whose size no other has."""
    return ContentKey(Digest(number.to_bytes(16, "big")))
