"""The way out, file by file: references become plain files again. Plan, show, execute.

The plan says how much room that takes, and is refused before anything is done when that is surely not there. Contents
are restored one after the other, each with all its references, and its blob goes as soon as nothing refers to it: so
the room taken beyond what the files need in the end is that of the largest content.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from .backing import Backing
from .blobs import Blobs
from .errors import SourceError, StoreError
from .fileio import FileIo
from .index import Index
from .model import SMALLEST_SHARED_BYTES, ContentKey, Ino, Progress
from .reconcile import Census, walk
from .sharing import supports_reflink
from .store import is_in_another

_RELEASED_EVERY_BYTES = (
    256 << 20
)  # so often blobs that nothing refers to any more are removed; sooner where it is tight
_SPARE_BYTES = 32 << 20


@dataclass(slots=True)
class Group:
    """The references of one content that are to be restored."""

    content: ContentKey
    size_bytes: int
    paths: list[bytes] = field(default_factory=list)
    files: int = 0  # inodes: a reference with two names is copied once
    frees_blob: bool = False  # no other reference keeps it


@dataclass(slots=True)
class Plan:
    """What is to be restored, and the room for it: `needed_bytes` at least, at the worst moment."""

    groups: list[Group]
    failed: list[dict[str, str]]
    needed_bytes: int
    available_bytes: int

    @property
    def files(self) -> int:
        return sum(group.files for group in self.groups)

    @property
    def bytes(self) -> int:
        return sum(group.files * group.size_bytes for group in self.groups)

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.available_bytes

    def require_room(self) -> None:
        """Raises OSError (ENOSPC)."""
        if not self.fits:
            needed, available = (-(-size // 2**20) for size in (self.needed_bytes, self.available_bytes))
            raise OSError(
                errno.ENOSPC,
                f"restoring {self.files:,} files takes {needed:,} MiB, and {available:,} MiB are free; nothing was "
                "done: make room, or restore parts",
            )

    def as_json(self) -> dict[str, object]:
        return {
            "files": self.files,
            "bytes": self.bytes,
            "needed_bytes": self.needed_bytes,
            "available_bytes": self.available_bytes,
            "fits": self.fits,
            "failed": self.failed,
        }


def room_needed(groups: Iterable[Group], block_bytes: int) -> int:
    """The room that restoring these takes at its worst moment, one content after the other."""
    taken = most = 0
    for group in groups:
        size = -(-group.size_bytes // block_bytes) * block_bytes
        taken += group.files * size
        most = max(most, taken)
        if group.frees_blob:
            taken -= size
    return most


class Restorer:
    """Restores in one source; one caller at a time."""

    def __init__(
        self,
        backing: Backing,
        index: Index,
        blobs: Blobs,
        io: FileIo,
        stopping: Callable[[], bool],
        release: Callable[[], None],
    ) -> None:
        """`release` removes the blobs that lost their last reference, where nothing else does."""
        self._backing, self._index, self._blobs, self._io = backing, index, blobs, io
        self._stopping, self._release = stopping, release

    def plan(self, tops: list[bytes]) -> Plan:
        """What is to be done at and below these paths. Raises SourceError for one that is not there."""
        groups: dict[ContentKey, Group] = {}
        failed: list[dict[str, str]] = []
        counted: set[Ino] = set()
        census = Census()
        for path in self._files_below(tops, census):
            try:
                reference = self._backing.read_reference(path)
                ino = Ino(self._backing.lstat(path).st_ino)
            except FileNotFoundError:
                continue
            except (OSError, StoreError) as error:
                failed.append({"path": os.fsdecode(path), "reason": str(error)})
                continue
            if reference is None or (
                is_in_another(self._backing, path) and not self._blobs.is_needed_by(reference, path)
            ):
                continue  # what is another store's, that one restores
            group = groups.setdefault(reference.content, Group(reference.content, reference.size_bytes))
            group.paths.append(path)
            group.files += ino not in counted
            counted.add(ino)
        failed += [{"path": os.fsdecode(path), "reason": reason} for path, reason in census.unreadable_paths]
        for group in groups.values():
            group.frees_blob = len(self._index.sharers(group.content)) <= group.files
        ordered = [groups[content] for content in sorted(groups)]
        st = self._backing.statvfs(b"")
        free = st.f_bfree if self._backing.privileged else st.f_bavail
        needed = 0 if not ordered or supports_reflink(self._backing) else room_needed(ordered, st.f_frsize)
        return Plan(ordered, failed, needed, free * st.f_frsize)

    def execute(self, plan: Plan, progress: Progress) -> dict[str, object]:
        """Do it; what cannot be restored is listed and left as it is. What `progress` raises ends it."""
        restored = restored_bytes = unreleased = 0
        failed = list(plan.failed)
        for group in plan.groups:
            if unreleased > _RELEASED_EVERY_BYTES or (unreleased and self._is_tight(group)):
                self._release()
                unreleased = 0
            for path in group.paths:
                progress("restoring", restored, plan.files)
                try:
                    size_bytes = self._io.restore(path)
                except FileNotFoundError:
                    reason = "was moved or removed meanwhile; run dedupfs restore again"
                    failed.append({"path": os.fsdecode(path), "reason": reason})
                    continue
                except (OSError, StoreError) as error:
                    failed.append({"path": os.fsdecode(path), "reason": str(error)})
                    continue
                if size_bytes is not None:
                    restored += 1
                    restored_bytes += size_bytes
                    unreleased += size_bytes
        self._release()
        return {"restored": restored, "bytes": restored_bytes, "failed": failed}

    def _is_tight(self, group: Group) -> bool:
        st = self._backing.statvfs(b"")
        return st.f_bavail * st.f_frsize < group.files * group.size_bytes + _SPARE_BYTES

    def _files_below(self, tops: list[bytes], census: Census) -> list[bytes]:
        found: list[bytes] = []
        for top in tops:
            try:
                st = self._backing.lstat(top)
            except OSError as error:
                raise SourceError(f"{os.fsdecode(top)}: {error.strerror}") from None
            if stat.S_ISDIR(st.st_mode):
                below = walk(self._backing, census, self._stopping, top)
                found += [
                    path for path, st in below if stat.S_ISREG(st.st_mode) and st.st_size >= SMALLEST_SHARED_BYTES
                ]
            else:
                found.append(top)
        return found
