"""Leaving: every file is made its own again and proven against its digest, and then `.dedupfs` goes.

Works on a store that nobody owns. Nothing is removed before the whole tree was read and every file in it is plain and
what its digest says; what could not be restored, read or proven is told, and the store stays. It can be killed at any
time and run again: until the last file is proven only references became plain files, each durably; afterwards what is
removed is not needed any more, and the store's `format` goes last, so that what is left is still known for a store.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from .backing import Backing
from .blobs import Blobs, parse_name
from .config import MountOptions, Share
from .decisions import DECISIONS
from .digest import hash_descriptor
from .engine import Engine
from .errors import Busy, StoreError
from .index import TAKEN_OVER, backup_name
from .model import STORE_DIRECTORY, FileState, Ino, Progress, Stamp
from .reconcile import Census, refuse_references_elsewhere, walk
from .rules import NOTHING
from .store import BLOBS, INDEX, ORPHANS, QUARANTINE, STAGING, TRASH, Store, is_in_another

# What dedupfs itself puts into a store, and may therefore take away.
_FURNITURE = (b"README", b"clean", b"daemon.json", b"daemon.log", b"history.jsonl", b"reserve", b"sharing.json")
_LAST = (b"format", b"lock")
# What it made for people, which is theirs.
_KEPT = {DECISIONS: "says what people decided about pictures; move it to where you keep it"}
_INDEX_FILES = (
    b"data.mdb",
    b"lock.mdb",
    *(os.fsencode(backup_name(version) + end) for version in TAKEN_OVER for end in ("", ".new")),
)
_DIRECTORIES = (BLOBS, INDEX, STAGING, ORPHANS, TRASH, QUARANTINE)


@dataclass(slots=True)
class Departure:
    """What came of it. Only without `refused` is the store gone (or would it go, in a dry run)."""

    restored: int = 0
    proven: int = 0
    proven_bytes: int = 0
    refused: list[dict[str, str]] = field(default_factory=list)
    plan: dict[str, object] | None = None

    def refuse(self, path: bytes, reason: str) -> None:
        self.refused.append({"path": os.fsdecode(path), "reason": reason})

    def as_json(self) -> dict[str, object]:
        return {
            "restored": self.restored,
            "proven": self.proven,
            "bytes": self.proven_bytes,
            "refused": self.refused,
            "left": not self.refused and self.plan is None,
            **({} if self.plan is None else {"plan": self.plan}),
        }


def leave(source: str, *, dry_run: bool, progress: Progress) -> Departure:
    """Make every file of `source` plain, prove it, and remove the store.

    `dry_run`: say what is in the way, and how much room it takes. Raises Busy when the store is in use, OSError when
    there is no room, and what `Store` raises.
    """
    departure = Departure()
    with Engine(source, MountOptions(share=Share.REFERENCE, rules=NOTHING)) as engine:
        if dry_run:
            departure.plan = engine.restore([], progress, dry_run=True)
        else:
            _restore_and_prove(engine, departure, progress)
        for path in _strangers(engine.backing):
            departure.refuse(path, _KEPT.get(path, "would be lost with the store; look at it, and move it away"))
    if not departure.refused and not dry_run:
        _remove(source)
    return departure


def _restore_and_prove(engine: Engine, departure: Departure, progress: Progress) -> None:
    # First, and not from what the scan tells: that has no say where a reference is on another filesystem.
    census = Census()
    for _ in walk(engine.backing, census, lambda: False):
        progress("looking", census.directories, None)
    refuse_references_elsewhere(engine.backing, census)
    for path, reason in census.unreadable_paths:
        departure.refuse(path, reason)
    if departure.refused:
        return
    unseen = engine.scan(progress)["unreadable_directories"]
    if unseen:
        departure.refuse(b"", f"{unseen} directories or files cannot be looked at")
    answer = engine.restore([], progress)
    departure.restored = int(str(answer["restored"]))
    failed = answer["failed"]
    departure.refused += failed if isinstance(failed, list) else []
    engine.settle(progress)
    for damage, paths in engine.damages():
        for path in paths:
            departure.refuse(path, f"is damaged ({damage.problem}); write a good copy, or touch it to keep it as it is")
    if not departure.refused:
        _prove(engine, departure, progress)


def _prove(engine: Engine, departure: Departure, progress: Progress) -> None:
    """Read every file: it is plain, and has the digest that is known of it."""
    backing, index = engine.backing, engine.index
    total = index.totals().logical_bytes
    known: set[Ino] = set()
    for path, st in walk(backing, Census(), lambda: False):
        if not stat.S_ISREG(st.st_mode) or st.st_ino in known:
            continue
        known.add(Ino(st.st_ino))
        try:
            problem = _problem_of(engine, path, st)
        except (OSError, StoreError) as error:
            problem = str(error)
        if problem:
            departure.refuse(path, problem)
        else:
            departure.proven += 1
            departure.proven_bytes += st.st_size
        progress("proving (MiB)", departure.proven_bytes >> 20, total >> 20)


def _problem_of(engine: Engine, path: bytes, st: os.stat_result) -> str:
    backing = engine.backing
    reference = backing.read_reference(path)
    if is_in_another(backing, path):
        needed = reference is not None and engine.blobs.is_needed_by(reference, path)
        return "needs a blob of this store, though another store is above it" if needed else ""
    if reference is not None:
        return "is still a reference"
    record = engine.index.file(Ino(st.st_ino))
    if record is None or record.stamp != Stamp.of(st) or record.state is FileState.REFERENCE:
        return "is not known as it is: it could not be read, or was changed just now"
    fd = backing.open_quietly(path)
    try:
        if hash_descriptor(fd) != record.content.digest:
            return "its bytes are not what its digest says; run dedupfs scrub"
        return "" if Stamp.of(os.fstat(fd)) == record.stamp else "was changed just now"
    finally:
        os.close(fd)


def _strangers(backing: Backing) -> Iterator[bytes]:
    """What is in the store and must not be deleted with it: what dedupfs did not make, and what it keeps for people."""
    directories = {path.rpartition(b"/")[2] for path in _DIRECTORIES}
    for name in _names(backing, STORE_DIRECTORY):
        if name not in directories and name.removesuffix(b".new") not in (*_FURNITURE, *_LAST):
            yield STORE_DIRECTORY + b"/" + name
    for name in _names(backing, QUARANTINE):
        if name != b"index":
            yield QUARANTINE + b"/" + name
    for directory in (STAGING, ORPHANS):
        yield from (directory + b"/" + name for name in _names(backing, directory))
    yield from (INDEX + b"/" + name for name in _names(backing, INDEX) if name not in _INDEX_FILES)
    for name in _names(backing, BLOBS):
        for blob in _names(backing, BLOBS + b"/" + name):
            if parse_name(os.fsdecode(blob)) is None:
                yield BLOBS + b"/" + name + b"/" + blob


def _names(backing: Backing, path: bytes) -> list[bytes]:
    """What is in a directory; of anything else, nothing."""
    try:
        return sorted(os.fsencode(entry.name) for entry in backing.scandir(path))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _remove(source: str) -> None:
    """Raises Busy when somebody came between, OSError; run again after either."""
    with ExitStack() as stack:
        backing = Backing(source)
        stack.callback(backing.close)
        stack.enter_context(Store(backing))
        for path, st in walk(backing, census := Census(), lambda: False):
            # Nobody else has the store now. What was proven may have been mounted and shared again before that.
            if stat.S_ISREG(st.st_mode) and _needs_us(backing, path):
                raise Busy(f"{os.fsdecode(path)} became a reference meanwhile; run dedupfs leave again")
        refuse_references_elsewhere(backing, census)
        strangers = list(_strangers(backing))
        if census.unreadable or strangers:
            raise Busy("the archive or its store was changed meanwhile; run dedupfs leave again")
        # What was restored must last before what it was restored from goes.
        backing.sync()
        blobs = Blobs(backing)
        for content, _ in list(blobs.list()):
            blobs.remove(content)
        for directory in _names(backing, BLOBS):
            backing.rmdir(BLOBS + b"/" + directory)
        for name in _names(backing, TRASH):
            _unlink_sealed(backing, TRASH + b"/" + name)
        for index in (INDEX, QUARANTINE + b"/index"):
            for name in _names(backing, index):
                backing.unlink(index + b"/" + name)
        with suppress(FileNotFoundError):
            backing.rmdir(QUARANTINE + b"/index")
        for directory in _DIRECTORIES:
            with suppress(FileNotFoundError):
                backing.rmdir(directory)
        for name in (*_FURNITURE, *_LAST):
            for path in (STORE_DIRECTORY + b"/" + name + b".new", STORE_DIRECTORY + b"/" + name):
                with suppress(FileNotFoundError):
                    backing.unlink(path)
        backing.rmdir(STORE_DIRECTORY)
        backing.fsync_directory(b"")


def _needs_us(backing: Backing, path: bytes) -> bool:
    reference = backing.read_reference(path)
    return reference is not None and (not is_in_another(backing, path) or Blobs(backing).is_needed_by(reference, path))


def _unlink_sealed(backing: Backing, path: bytes) -> None:
    fd = backing.open_quietly(path)
    try:
        backing.fset_immutable(fd, immutable=False)
    finally:
        os.close(fd)
    backing.unlink(path)
