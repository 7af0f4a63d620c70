"""Canonical contents: `.dedupfs/blobs/ab/<32 hex digits>.<collision>`, one inode each, sealed and never modified.

A blob is the inode of the first file that had the content; `publish` gives it its second name, and once that file's
path carries a reference the name here is the only one. Only `sharing` publishes and removes. Nothing here decides
whether a blob is still needed.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import suppress

from .backing import RENAME_EXCHANGE, Backing
from .digest import same_bytes
from .errors import DamagedContent
from .model import ROOT, ContentKey, Digest, Reference
from .store import BLOBS, QUARANTINE, STAGING, source_above

SEALED_MODE = 0o400


class Blobs:
    """The blobs of one store. Any thread may look; publishing and removing are serialised by `sharing`."""

    def __init__(self, backing: Backing) -> None:
        self._backing = backing
        self._lasting: set[bytes] = set()  # directories whose own names are durable; they are never removed

    @staticmethod
    def path(content: ContentKey) -> bytes:
        return b"%s/%02x/%s" % (BLOBS, content.digest[0], content.name.encode())

    def stat(self, content: ContentKey) -> os.stat_result | None:
        try:
            return self._backing.lstat(self.path(content))
        except FileNotFoundError:
            return None

    def usable(self, content: ContentKey) -> bool:
        """Whether there is such a blob and it is nobody's file as well, so that new references to it are safe."""
        st = self.stat(content)
        return st is not None and st.st_nlink == 1

    def is_needed_by(self, reference: Reference, path: bytes) -> bool:
        """Whether there is a blob of ours that the reference at `path` is to: below another source only where that
        source has none."""
        if self.stat(reference.content) is None:
            return False
        above = source_above(self._backing, path)
        if above == ROOT:
            return True
        try:
            self._backing.lstat(above + b"/" + self.path(reference.content))
        except FileNotFoundError:
            return True
        return False

    def open(self, content: ContentKey, size_bytes: int) -> int:
        """A read-only descriptor. Raises DamagedContent when the blob is missing or has another size."""
        try:
            fd = self._backing.open_quietly(self.path(content))
        except FileNotFoundError:
            raise DamagedContent(f"blob {content.name} is missing; run dedupfs fsck") from None
        if os.fstat(fd).st_size != size_bytes:
            os.close(fd)
            raise DamagedContent(f"blob {content.name} is not {size_bytes} bytes long; run dedupfs fsck")
        return fd

    def publish(self, path: bytes | int, content: ContentKey) -> None:
        """Give the inode at `path` its name among the blobs. Raises FileExistsError when there is such a blob."""
        target = self.path(content)
        try:
            self._backing.link(path, target)
        except FileNotFoundError:
            with suppress(FileExistsError):
                self._backing.mkdir(os.path.dirname(target), 0o700)
            self._backing.link(path, target)

    def supersede(self, path: bytes | int, content: ContentKey) -> None:
        """Give the inode at `path` the name of a blob that is damaged or missing.

        The damaged one goes to quarantine/ in the same instant: at no time is the name without a file.
        """
        target = self.path(content)
        aside = self._name_in_quarantine(content)
        self._unseal(target)
        self._backing.link(path, aside)
        try:
            self._backing.rename(aside, target, RENAME_EXCHANGE)
        except FileNotFoundError:
            self._backing.unlink(aside)
            self.publish(path, content)

    def quarantine(self, content: ContentKey) -> None:
        """Move a damaged blob to quarantine/: its references have no content then, until a good copy heals them.

        The caller is inside the exclusive gate.
        """
        target = self.path(content)
        self._unseal(target)
        self._backing.rename(target, self._name_in_quarantine(content))

    def drop_from_quarantine(self, ino: int) -> None:
        """Take back what `supersede` began: the second name of a file that did not become a blob."""
        for entry in self._backing.scandir(QUARANTINE):
            st = entry.stat(follow_symlinks=False)
            if st.st_ino == ino and st.st_nlink > 1:
                self._backing.unlink(QUARANTINE + b"/" + os.fsencode(entry.name))

    def detach(self, content: ContentKey) -> None:
        """Give a blob that is still somebody's file an inode of its own, with the same bytes."""
        path = self.path(content)
        draft = b"%s/detach.%s" % (STAGING, content.name.encode())
        source = self._backing.open_quietly(path)
        try:
            target = self._backing.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            try:
                self._backing.copy_range(source, target, os.fstat(source).st_size)
                self._backing.fsync(target)
                if not same_bytes(source, target):
                    raise OSError(errno.EIO, "a copy of a blob differs from it")
            finally:
                os.close(target)
        finally:
            os.close(source)
        self._unseal(path)
        self._backing.rename(draft, path)
        self.seal(content)

    def flush_name(self, content: ContentKey) -> None:
        """Make the blob's name survive a power loss."""
        directory = os.path.dirname(self.path(content))
        self._backing.fsync_directory(directory)
        if directory not in self._lasting:
            self._backing.fsync_directory(BLOBS)
            self._lasting.add(directory)

    def seal(self, content: ContentKey) -> None:
        """Take everything from the blob that was its file's: owner, mode, xattrs; last, where it can be had, the
        immutable flag goes on, which tells that all is done. Repeating it does no harm.

        Raises OSError; an unsealed blob is as safe to read as a sealed one, only less protected.
        """
        path = self.path(content)
        fd = self._backing.open_quietly(path)
        try:
            if self._backing.is_immutable(fd) or os.fstat(fd).st_nlink != 1:
                return  # sealed, or somebody's file as well
            for name in os.listxattr(fd):
                with suppress(OSError):  # a security label stays
                    os.removexattr(fd, name)
            if self._backing.privileged:
                os.fchown(fd, 0, 0)
            os.fchmod(fd, SEALED_MODE)
            self._backing.fset_immutable(fd, immutable=True)
        finally:
            os.close(fd)

    def remove(self, content: ContentKey) -> None:
        """Delete a blob that nothing refers to any more. Missing is fine."""
        path = self.path(content)
        self._unseal(path)
        with suppress(FileNotFoundError):
            self._backing.unlink(path)

    def _name_in_quarantine(self, content: ContentKey) -> bytes:
        number = 0
        while True:
            path = b"%s/%s.%d" % (QUARANTINE, content.name.encode(), number)
            try:
                self._backing.lstat(path)
            except FileNotFoundError:
                return path
            number += 1

    def _unseal(self, path: bytes) -> None:
        try:
            fd = self._backing.open_quietly(path)
        except FileNotFoundError:
            return
        try:
            self._backing.fset_immutable(fd, immutable=False)
        finally:
            os.close(fd)

    def list(self) -> Iterator[tuple[ContentKey, os.stat_result]]:
        """Every blob there is, in no order; names that are not a blob's are passed over."""
        for directory in self._backing.scandir(BLOBS):
            if not directory.is_dir(follow_symlinks=False):
                continue
            for entry in self._backing.scandir(BLOBS + b"/" + os.fsencode(directory.name)):
                content = parse_name(entry.name)
                if content is not None and entry.name.startswith(directory.name):
                    try:
                        st = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue  # its last reference went while we looked
                    yield content, st


def parse_name(name: str) -> ContentKey | None:
    """The content a blob's file name stands for, None for any other name."""
    digest, dot, collision = name.partition(".")
    try:
        content = ContentKey(Digest(bytes.fromhex(digest)), int(collision))
    except ValueError:
        return None
    plausible = dot and len(content.digest) == 16 and 0 <= content.collision < 1 << 16
    return content if plausible and content.name == name else None
