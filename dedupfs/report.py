"""What an archive holds, what is duplicate in it, and what sharing saves: by top-level folder, and by pairs of them.

Groups come from the index, in short transactions; one walk of the tree counts the folders, and finds what the index
does not know. Called by the engine, in the thread of who asks. Nothing is changed. Memory grows with the number of
folders, not of files.
"""

import heapq
import os
import stat
from collections import defaultdict
from dataclasses import dataclass, field

from .backing import Backing
from .index import Index
from .model import SMALLEST_SHARED_BYTES, ContentKey, Damage, FileState, Ino, Progress
from .reconcile import Census, walk
from .rules import SharingRules

ROOT_FOLDER = b"."  # files that are in no folder

_LARGEST = 50
_SHOWN_PATHS = 20
_SHOWN_UNKNOWN = 200
_SHOWN_ACROSS = 50


@dataclass(slots=True)
class Folder:
    """One top-level folder. `duplicate_bytes`: what of it has an equal file somewhere, each but its first; a file whose
    first copy is in another folder counts here in full."""

    files: int = 0
    bytes: int = 0
    references: int = 0
    duplicate_files: int = 0
    duplicate_bytes: int = 0


@dataclass(order=True, slots=True)
class _Group:
    wasted_bytes: int
    digest: bytes
    size_bytes: int = field(compare=False)
    copies: int = field(compare=False)
    paths: list[bytes] = field(compare=False)


class Report:
    """Gathers; `as_json` is what it found."""

    def __init__(self, backing: Backing, index: Index, rules: SharingRules) -> None:
        self._backing, self._index, self._rules = backing, index, rules
        self._folders: dict[bytes, Folder] = defaultdict(Folder)
        self._pairs: dict[tuple[bytes, bytes], int] = defaultdict(int)
        self._largest: list[_Group] = []
        self._unknown: list[bytes] = []
        self._unreadable: list[tuple[bytes, str]] = []
        self._across: list[list[bytes]] = []
        names = ("groups", "duplicate_files", "duplicate_bytes", "unknown", "unreadable", "shared_across_domains")
        self._count = dict.fromkeys(names, 0)

    def gather(self, progress: Progress) -> None:
        """Raises StoreError when the index cannot be read, and what `progress` raises."""
        self._walk(progress)
        position = b""
        while True:
            found, position = self._index.all_duplicates(position, 200)
            for content, inodes in found:
                self._take(content, inodes)
            progress("comparing", self._count["groups"], None)
            if not position:
                return

    def _walk(self, progress: Progress) -> None:
        census, seen = Census(), set[Ino]()
        for path, st in walk(self._backing, census, lambda: False):
            if not stat.S_ISREG(st.st_mode) or (st.st_nlink > 1 and st.st_ino in seen):
                continue
            if st.st_nlink > 1:
                seen.add(Ino(st.st_ino))
            folder = self._folders[folder_of(path)]
            folder.files += 1
            folder.bytes += st.st_size
            record = self._index.file(Ino(st.st_ino))
            if record is None:
                self._count["unknown"] += 1
                if len(self._unknown) < _SHOWN_UNKNOWN:
                    self._unknown.append(path)
            elif record.state is not FileState.PLAIN:
                folder.references += 1
            census.files += 1
            if not census.files % 1000:
                progress("looking", census.files, None)
        self._count["unreadable"] = census.unreadable
        self._unreadable = census.unreadable_paths

    def _take(self, content: ContentKey, inodes: list[Ino]) -> None:
        record = self._index.file(inodes[0])
        if record is None or record.stamp.size_bytes < SMALLEST_SHARED_BYTES:
            return
        size_bytes = record.stamp.size_bytes
        named = [(ino, self._index.paths(ino, self._backing.root_ino)) for ino in inodes]
        paths = sorted(found[0] for _, found in named if found)
        if len(paths) < 2:
            return
        if self._rules.domains:
            self._look_across_domains(named)
        self._count["groups"] += 1
        self._count["duplicate_files"] += len(paths) - 1
        self._count["duplicate_bytes"] += size_bytes * (len(paths) - 1)
        copies: dict[bytes, int] = defaultdict(int)
        for number, path in enumerate(paths):
            name = folder_of(path)
            copies[name] += 1
            if number:
                folder = self._folders[name]
                folder.duplicate_files += 1
                folder.duplicate_bytes += size_bytes
        names = sorted(copies)
        for number, name in enumerate(names):
            if copies[name] > 1:
                self._pairs[name, name] += size_bytes * (copies[name] - 1)
            for other in names[number + 1 :]:
                self._pairs[name, other] += size_bytes * min(copies[name], copies[other])
        wasted = size_bytes * (len(paths) - 1)
        group = _Group(wasted, content.digest, size_bytes, len(paths), paths[:_SHOWN_PATHS])
        (heapq.heappush if len(self._largest) < _LARGEST else heapq.heappushpop)(self._largest, group)

    def _look_across_domains(self, named: list[tuple[Ino, list[bytes]]]) -> None:
        """Files of several domains that share all the same: since before, or since one was moved."""
        sharers: dict[ContentKey, list[bytes]] = defaultdict(list)
        for ino, paths in named:
            record = self._index.file(ino)
            if record is not None and record.state is not FileState.PLAIN:
                sharers[record.content] += paths
        for paths in sharers.values():
            if len({self._rules.domain_of(path) for path in paths}) > 1:
                self._count["shared_across_domains"] += 1
                if len(self._across) < _SHOWN_ACROSS:
                    self._across.append(sorted(paths)[:_SHOWN_PATHS])

    def as_json(self, damages: list[tuple[Damage, list[bytes]]]) -> dict[str, object]:
        return {
            **self._count,
            "folders": [
                {
                    "name": os.fsdecode(name),
                    "files": folder.files,
                    "bytes": folder.bytes,
                    "references": folder.references,
                    "duplicate_files": folder.duplicate_files,
                    "duplicate_bytes": folder.duplicate_bytes,
                }
                for name, folder in sorted(self._folders.items())
            ],
            "pairs": [
                {"folders": [os.fsdecode(one), os.fsdecode(other)], "bytes": size_bytes}
                for (one, other), size_bytes in sorted(self._pairs.items(), key=lambda pair: (-pair[1], pair[0]))
            ],
            "largest": [
                {
                    "digest": group.digest.hex(),
                    "size_bytes": group.size_bytes,
                    "copies": group.copies,
                    "wasted_bytes": group.wasted_bytes,
                    "paths": [os.fsdecode(path) for path in group.paths],
                }
                for group in sorted(self._largest, reverse=True)
            ],
            "unreadable_paths": [{"path": os.fsdecode(path), "reason": reason} for path, reason in self._unreadable],
            "unknown_paths": [os.fsdecode(path) for path in self._unknown],
            "across_domains": [[os.fsdecode(path) for path in paths] for paths in self._across],
            "damaged": [
                {"problem": damage.problem, "paths": [os.fsdecode(path) for path in paths]} for damage, paths in damages
            ],
        }


def folder_of(path: bytes) -> bytes:
    folder, slash, _ = path.partition(b"/")
    return folder if slash else ROOT_FOLDER
