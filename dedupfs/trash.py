"""Blobs that dedupfs concluded to be unneeded: `.dedupfs/trash/`, until their time is over.

A blob whose last reference an application removed is deleted, as the application wants. One that is only *found*
without a reference, by `gc` or `fsck`, comes here first: should that be wrong, because a reference came from a backup,
or from a disk that did not show it, the blob is taken back.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from .backing import RENAME_NOREPLACE, Backing
from .blobs import Blobs, parse_name
from .digest import hash_descriptor
from .errors import DamagedContent
from .model import ContentKey
from .store import TRASH


@dataclass(frozen=True, slots=True)
class Discarded:
    """A blob in the trash, and when it came there (Unix time)."""

    name: bytes
    content: ContentKey
    time_s: int
    size_bytes: int


class Trash:
    """The trash of an owned store. While it is served, only `put`, inside the exclusive gate."""

    def __init__(self, backing: Backing) -> None:
        self._backing = backing

    def put(self, content: ContentKey, *, now_s: int) -> None:
        """Move a blob here: one rename."""
        with suppress(FileExistsError):
            self._backing.mkdir(TRASH, 0o700)
        path = Blobs.path(content)
        self._unseal(path)
        while True:
            try:
                self._backing.rename(path, b"%s/%s.%d" % (TRASH, content.name.encode(), now_s), RENAME_NOREPLACE)
            except FileExistsError:
                now_s += 1  # one that came in this very second is kept as well
            else:
                return

    def take_back(self, content: ContentKey) -> None:
        """Make the newest blob of this content that is here one again. Raises DamagedContent when none is good,
        FileExistsError when there is such a blob."""
        for discarded in sorted(self.list(), key=lambda each: -each.time_s):
            path = TRASH + b"/" + discarded.name
            if discarded.content == content and self._is_good(path, content):
                target = Blobs.path(content)
                with suppress(FileExistsError):
                    self._backing.mkdir(os.path.dirname(target), 0o700)
                self._backing.rename(path, target, RENAME_NOREPLACE)
                Blobs(self._backing).seal(content)
                return
        raise DamagedContent(f"blob {content.name} is not in the trash, or damaged")

    def remove(self, discarded: Discarded) -> None:
        path = TRASH + b"/" + discarded.name
        self._unseal(path)
        self._backing.unlink(path)

    def list(self) -> Iterator[Discarded]:
        """Every blob that is here; other names are passed over."""
        try:
            for entry in self._backing.scandir(TRASH):
                name, _, time_s = entry.name.rpartition(".")
                content = parse_name(name)
                if content is not None and time_s.isdecimal():
                    size_bytes = entry.stat(follow_symlinks=False).st_size
                    yield Discarded(os.fsencode(entry.name), content, int(time_s), size_bytes)
        except FileNotFoundError:
            return

    def _is_good(self, path: bytes, content: ContentKey) -> bool:
        fd = self._backing.open_quietly(path)
        try:
            return hash_descriptor(fd) == content.digest
        except OSError:
            return False
        finally:
            os.close(fd)

    def _unseal(self, path: bytes) -> None:
        fd = self._backing.open_quietly(path)
        try:
            self._backing.fset_immutable(fd, immutable=False)
        finally:
            os.close(fd)
