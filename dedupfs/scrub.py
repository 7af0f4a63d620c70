"""Is every content still what its digest says? Everything is read again, at a bounded rate, and compared with it.

A content is good when its blob, and every file that has bytes of its own, were read and have the digest. That is kept
in the index, so a scrub that was stopped goes on where it was. What is not good was read twice, the second time with
nobody writing, before it is called damaged. Then:

- a *blob* is healed with a plain file of that content, by settling such a file again (see `matching`). Where there is
  none it goes to quarantine/: its references answer EIO, which no program takes for a photograph, until a good copy of
  it is written. A blob that cannot be read stays where it is: a cable may be loose, and parts of it may be good.
- a *file* is named, and so is another copy that is good. Nothing is written to it. It is settled again as what it is
  now, so that it is called nobody's duplicate; that it was damaged stays in the index until it is written or goes.

One scrub at a time, in the thread of who asks. Files are read outside all locks; only the second look watches the file,
as settling does. Writers are never held up.
"""

import enum
import errno
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .backing import Backing
from .blobs import Blobs
from .digest import CHUNK_BYTES, Checkpoint, DescriptorHasher, proceed
from .errors import StoreError
from .index import Index
from .model import (
    ContentKey,
    Damage,
    DamageKind,
    Digest,
    FileRecord,
    FileState,
    Ino,
    Progress,
    ScrubPass,
    Stamp,
    Verified,
)
from .openfiles import Gate, GivenUp, InUse, Key, OpenFiles
from .settle import Settler

log = logging.getLogger(__name__)

_PAGE = 200
_SAVED_EVERY_S = 5.0
_SAVED_CONTENTS = 2000
_NO_INODE = Ino(0)
_NAP_S = 0.05  # while it waits for the rate: how soon it hears that it is to stop

_OTHER_BYTES = "its bytes are not what its digest says"
_UNSTEADY = "two readings of it differ: look at the machine's memory, controller and cables"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not good. `fate` is healed, quarantined or left; `copies`: where the same content is good."""

    kind: str
    content: ContentKey
    problem: str
    fate: str
    paths: list[bytes]
    copies: list[bytes] = field(default_factory=list)


@dataclass(slots=True)
class Report:
    """What one run did. `contents` and `bytes` are what this run read and found good."""

    contents: int = 0
    bytes: int = 0
    skipped: int = 0
    resumed: bool = False
    findings: list[Finding] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 all good, 1 all healed, 2 something is damaged."""
        if not self.findings:
            return 0
        return 1 if all(finding.fate == "healed" for finding in self.findings) else 2

    def as_json(self) -> dict[str, object]:
        return {
            "contents": self.contents,
            "bytes": self.bytes,
            "skipped": self.skipped,
            "resumed": self.resumed,
            "findings": [
                {
                    "kind": one.kind,
                    "digest": one.content.digest.hex(),
                    "problem": one.problem,
                    "fate": one.fate,
                    "paths": [os.fsdecode(path) for path in one.paths],
                    "copies": [os.fsdecode(path) for path in one.copies],
                }
                for one in self.findings
            ],
            "exit_code": self.exit_code,
        }


# What says nothing about the disk: we, or the machine, are short of something, or the file is another by now.
_PASSING = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN, errno.ELOOP, errno.ENXIO))


class _Verdict(enum.Enum):
    GOOD = enum.auto()
    SKIPPED = enum.auto()  # changed, gone or being written: it is looked at the next time
    DAMAGED = enum.auto()
    MISSING = enum.auto()
    UNREADABLE = enum.auto()
    UNSTEADY = enum.auto()


@dataclass(frozen=True, slots=True)
class _Look:
    verdict: _Verdict
    problem: str = ""
    ino: Ino = _NO_INODE


def _unreadable(error: OSError, ino: Ino) -> _Look:
    if error.errno in _PASSING:
        return _Look(_Verdict.SKIPPED)
    return _Look(_Verdict.UNREADABLE, error.strerror or str(error), ino)


class Pace:
    """Bounds how many bytes a second are read; 0 sets no bound. `alive` is called at least every 50 ms, and may raise
    to stop."""

    def __init__(self, rate_bytes_s: int, alive: Callable[[], None]) -> None:
        self._rate_bytes_s, self._alive = rate_bytes_s, alive
        self._free_at_s = time.monotonic()

    def spend(self, size_bytes: int) -> None:
        """Return when so many bytes may be read. Time that was not used is not saved up."""
        self._alive()
        if not self._rate_bytes_s:
            return
        while (wait_s := self._free_at_s - time.monotonic()) > 0:
            time.sleep(min(wait_s, _NAP_S))
            self._alive()
        self._free_at_s = max(self._free_at_s, time.monotonic()) + size_bytes / self._rate_bytes_s


class Scrubber:
    """Reads one source's contents."""

    def __init__(
        self,
        backing: Backing,
        index: Index,
        blobs: Blobs,
        openfiles: OpenFiles,
        gate: Gate,
        settler: Settler,
        hasher: DescriptorHasher,
        on_replaced: Callable[[bytes], None],
        settle_again: Callable[[ContentKey, Checkpoint], None],
    ) -> None:
        """`on_replaced` is called with each path whose bytes are others; `settle_again` has all files settled that hold
        the content as their own, and returns when that is done; meanwhile it calls its second argument."""
        self._backing, self._index, self._blobs = backing, index, blobs
        self._openfiles, self._gate, self._settler, self._hash = openfiles, gate, settler, hasher
        self._on_replaced, self._settle_again = on_replaced, settle_again
        self._alive: Checkpoint = proceed  # called while anything takes its time; raises to stop

    def run(self, *, rate_bytes_s: int, total_bytes: int, progress: Progress) -> Report:
        """Read what the scrub under way has not read yet; begin one when there is none.

        What `progress` raises stops it; it goes on where it was. Raises StoreError when the index cannot be used.
        """
        report = Report()
        self._alive = lambda: progress("scrubbing (MiB)", report.bytes >> 20, total_bytes >> 20)
        pace = Pace(rate_bytes_s, self._alive)
        scrub, report.resumed = self._begin()
        good: list[ContentKey] = []
        saved_s = time.monotonic()
        try:
            position = b""
            while True:
                found, position = self._index.all_groups(position, _PAGE)
                for content, holders in found:
                    known = self._index.verified(content)
                    if known is not None and known.scrub == scrub.number:
                        continue
                    if self._check(content, holders, report, pace):
                        good.append(content)
                        report.contents += 1
                    if len(good) >= _SAVED_CONTENTS or time.monotonic() - saved_s > _SAVED_EVERY_S:
                        self._save(scrub, good)
                        saved_s = time.monotonic()
                if not position:
                    break
        finally:
            self._save(scrub, good)
        self._finish(scrub)
        report.findings += self._known_damages(report)
        return report

    def _begin(self) -> tuple[ScrubPass, bool]:
        last = self._index.scrub_pass()
        if last is not None and not last.finished_s:
            return last, True
        scrub = ScrubPass((last.number if last is not None else 0) + 1, int(time.time()))
        with self._settler.writing(self._alive) as batch:
            batch.put_scrub_pass(scrub)
        return scrub, False

    def _save(self, scrub: ScrubPass, good: list[ContentKey]) -> None:
        """Keep what was found good; what was called damaged before, and could be read now, is so no more."""
        if not good:
            return
        found = set(good)
        over = [damage for damage in self._index.damages() if damage.content in found and self._stands_for(damage)]
        with self._settler.writing(self._alive) as batch:
            for content in good:
                batch.put_verified(content, Verified(scrub.number, int(time.time())))
            for damage in over:
                batch.drop_damage(damage)
        good.clear()

    def _stands_for(self, damage: Damage) -> bool:
        """Whether what was damaged is part of its content still; a file with other bytes was settled as what it is."""
        record = self._index.file(damage.ino)
        return damage.kind is DamageKind.BLOB or (record is not None and record.content == damage.content)

    def _finish(self, scrub: ScrubPass) -> None:
        """Forget the contents that nobody has any more, and say that this scrub is done."""
        position = b""
        while True:
            found, position = self._index.all_verified(position, _PAGE)
            gone = [content for content in found if not self._index.count_holders(content)]
            if gone:
                with self._settler.writing(self._alive) as batch:
                    for content in gone:
                        batch.put_verified(content, None)
            if not position:
                break
        with self._settler.writing(self._alive) as batch:
            batch.put_scrub_pass(scrub._replace(finished_s=int(time.time())))

    # -- one content --------------------------------------------------------------------------------------------------

    def _check(self, content: ContentKey, holders: list[Ino], report: Report, pace: Pace) -> bool:
        """Whether all of it is good."""
        looks: dict[Ino, tuple[FileRecord, _Look, list[bytes]]] = {}
        referring: list[bytes] = []
        for ino in holders:
            record = self._index.file(ino)
            if record is None or record.content != content:
                continue  # settled otherwise meanwhile
            if record.state is FileState.REFERENCE:
                referring += self._referring(ino, content)
            else:
                paths = self._paths(ino)
                looks[ino] = record, self._look_at_file(ino, record, paths, report, pace), paths
        good = [path for _, look, paths in looks.values() if look.verdict is _Verdict.GOOD for path in paths]
        fine = all(look.verdict is _Verdict.GOOD for _, look, _ in looks.values())
        report.skipped += sum(look.verdict is _Verdict.SKIPPED for _, look, _ in looks.values())
        if referring:
            blob = self._look_at_blob(content, report, pace)
            if blob.verdict is _Verdict.GOOD:
                good += referring
            elif blob.verdict is _Verdict.SKIPPED:
                fine = False
                report.skipped += 1
            else:
                fine = False
                self._deal_with_blob(content, blob, referring, good, report)
        for ino, (record, look, paths) in looks.items():
            if look.verdict not in (_Verdict.GOOD, _Verdict.SKIPPED):
                self._deal_with_file(ino, record, look, paths, good, report)
        return fine

    def _paths(self, ino: Ino) -> list[bytes]:
        """Where an inode is, as far as that is so."""
        paths = self._index.paths(ino, self._backing.root_ino)
        return [path for path in paths if self._backing.may_be_at(path, ino)]

    def _referring(self, ino: Ino, content: ContentKey) -> list[bytes]:
        """The paths of a reference that is one, and to this content: the index may be ahead of the tree."""
        found = []
        for path in self._paths(ino):
            try:
                reference = self._backing.read_reference(path)
                if reference is None or reference.content != content:
                    continue
            except (FileNotFoundError, NotADirectoryError, StoreError):
                continue
            except OSError:
                pass  # it is what the index says, as far as can be known
            found.append(path)
        return found

    def _look_at_file(self, ino: Ino, record: FileRecord, paths: list[bytes], report: Report, pace: Pace) -> _Look:
        for path in paths:
            try:
                fd = self._backing.open_quietly(path)
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                continue
            except OSError as error:
                return _unreadable(error, ino)
            try:
                st = os.fstat(fd)
                if st.st_ino == ino and st.st_dev == self._backing.device and Stamp.of(st) == record.stamp:
                    return self._look_twice(fd, ino, record, report, pace)
            finally:
                os.close(fd)
        return _Look(_Verdict.SKIPPED)

    def _look_twice(self, fd: int, ino: Ino, record: FileRecord, report: Report, pace: Pace) -> _Look:
        try:
            if self._read(fd, report, pace) == record.content.digest:
                return _Look(_Verdict.GOOD)
            with self._openfiles.watch(Key(self._backing.device, ino)) as watch:
                self._backing.forget_cached(fd)

                def checkpoint() -> None:
                    watch.checkpoint()
                    self._alive()

                again = self._hash(fd, checkpoint)
                if Stamp.of(os.fstat(fd)) != record.stamp or self._index.file(ino) != record:
                    return _Look(_Verdict.SKIPPED)
        except (InUse, GivenUp):
            return _Look(_Verdict.SKIPPED)
        except OSError as error:
            return _unreadable(error, ino)
        if again == record.content.digest:
            return _Look(_Verdict.UNSTEADY, _UNSTEADY, ino)
        return _Look(_Verdict.DAMAGED, _OTHER_BYTES, ino)

    def _look_at_blob(self, content: ContentKey, report: Report, pace: Pace) -> _Look:
        """Nobody writes to a blob; it may be replaced meanwhile, which is seen when it is dealt with."""
        try:
            fd = self._backing.open_quietly(Blobs.path(content))
        except FileNotFoundError:
            return _Look(_Verdict.MISSING, "it is missing")
        except OSError as error:
            return _unreadable(error, self._ino_of_blob(content))
        try:
            ino = Ino(os.fstat(fd).st_ino)
            try:
                if self._read(fd, report, pace) == content.digest:
                    return _Look(_Verdict.GOOD, ino=ino)
                self._backing.forget_cached(fd)
                again = self._hash(fd, self._alive)
            except OSError as error:
                return _unreadable(error, ino)
        finally:
            os.close(fd)
        if again == content.digest:
            return _Look(_Verdict.UNSTEADY, _UNSTEADY, ino)
        return _Look(_Verdict.DAMAGED, _OTHER_BYTES, ino)

    def _ino_of_blob(self, content: ContentKey) -> Ino:
        st = self._blobs.stat(content)
        return Ino(0) if st is None else Ino(st.st_ino)

    def _read(self, fd: int, report: Report, pace: Pace) -> Digest:
        """The digest of what the disk has, not of what lies in memory; and memory is left to those who need it."""
        left = os.fstat(fd).st_size

        def checkpoint() -> None:
            nonlocal left
            count = min(CHUNK_BYTES, left)
            pace.spend(count)
            left -= count
            report.bytes += count

        self._backing.forget_cached(fd)
        try:
            return self._hash(fd, checkpoint)
        finally:
            self._backing.forget_cached(fd)

    # -- what is done about it ----------------------------------------------------------------------------------------

    def _deal_with_blob(
        self, content: ContentKey, look: _Look, referring: list[bytes], good: list[bytes], report: Report
    ) -> None:
        fate = "left"
        if look.verdict is not _Verdict.UNSTEADY:
            if good:
                if look.verdict is _Verdict.UNREADABLE:
                    # Settling compares with the blob, which cannot be done. Nothing is lost: there is a good copy.
                    self._quarantine(content, look.ino, referring)
                self._settle_again(content, self._alive)
            elif look.verdict is not _Verdict.UNREADABLE and len(self._index.copies(content)) > 1:
                self._settle_again(content, self._alive)  # who has the same bytes may be allowed to heal these
            if self._is_another_and_good(content, look.ino):
                fate = "healed"
            elif look.verdict is _Verdict.UNREADABLE and good:
                fate = "quarantined"
            elif look.verdict is _Verdict.DAMAGED:
                quarantined = self._quarantine(content, look.ino, referring)
                if quarantined is None:
                    report.skipped += 1
                    return  # somebody healed it, or the last reference went
                fate = "quarantined" if quarantined else "left"
        finding = Finding(DamageKind.BLOB.word, content, look.problem, fate, sorted(referring), sorted(good))
        report.findings.append(finding)
        level = logging.WARNING if fate == "healed" else logging.ERROR
        named = ", ".join(os.fsdecode(path) for path in finding.paths[:10])
        log.log(level, "scrub: blob %s of %s: %s (%s)", content.name, named, look.problem, fate)
        if fate != "healed" and look.verdict is not _Verdict.UNSTEADY:
            with self._settler.writing(self._alive) as batch:
                batch.put_damage(Damage(content, DamageKind.BLOB, look.ino, 0, 0, int(time.time()), look.problem))

    def _is_another_and_good(self, content: ContentKey, ino: Ino) -> bool:
        try:
            fd = self._backing.open_quietly(Blobs.path(content))
        except OSError:
            return False
        try:
            return os.fstat(fd).st_ino != ino and self._hash(fd, self._alive) == content.digest
        except OSError:
            return False
        finally:
            os.close(fd)

    def _quarantine(self, content: ContentKey, ino: Ino, referring: list[bytes]) -> bool | None:
        """Whether it is in quarantine/ now; None when it is not that blob any more."""
        with self._gate.exclusive():
            if self._ino_of_blob(content) != ino:
                return None
            try:
                self._blobs.quarantine(content)
            except OSError as error:
                log.error("scrub: blob %s cannot be set aside: %s", content.name, error)
                return False
        for path in referring:
            self._on_replaced(path)
        return True

    def _deal_with_file(
        self, ino: Ino, record: FileRecord, look: _Look, paths: list[bytes], good: list[bytes], report: Report
    ) -> None:
        report.findings.append(
            Finding(DamageKind.FILE.word, record.content, look.problem, "left", sorted(paths), sorted(good))
        )
        named = ", ".join(os.fsdecode(path) for path in sorted(paths)[:10])
        copy = f"; a good copy is {os.fsdecode(min(good))}" if good else ""
        log.error("scrub: %s: %s%s", named, look.problem, copy)
        if look.verdict is _Verdict.UNSTEADY:
            return
        stamp = record.stamp
        with self._settler.writing(self._alive) as batch:
            batch.put_damage(
                Damage(
                    record.content,
                    DamageKind.FILE,
                    ino,
                    stamp.size_bytes,
                    stamp.mtime_ns,
                    int(time.time()),
                    look.problem,
                )
            )
            if look.verdict is _Verdict.DAMAGED and batch.file(ino) == record:
                batch.doubt_file(ino)
        if look.verdict is _Verdict.DAMAGED:
            self._settler.offer(ino, paths[0])

    # -- what is known ------------------------------------------------------------------------------------------------

    def damages(self) -> list[tuple[Damage, list[bytes]]]:
        """What was found damaged and still is, with its paths. Any thread."""
        looked_at = [(damage, self._damaged_paths(damage)) for damage in self._index.damages()]
        return [(damage, paths) for damage, paths in looked_at if paths]

    def _damaged_paths(self, damage: Damage) -> list[bytes]:
        if damage.kind is DamageKind.BLOB:
            st = self._blobs.stat(damage.content)
            if st is not None and st.st_ino != damage.ino:
                return []
            return sorted(
                path for ino in self._index.sharers(damage.content) for path in self._referring(ino, damage.content)
            )
        found = []
        for path in self._paths(damage.ino):
            try:
                st = self._backing.lstat(path)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    found.append(path)
                continue
            stamp = Stamp.of(st)
            if (stamp.size_bytes, stamp.mtime_ns) == (damage.size_bytes, damage.mtime_ns):
                found.append(path)
        return sorted(found)

    def _known_damages(self, report: Report) -> list[Finding]:
        """What an earlier run found, and nobody has put right. The rest is forgotten."""
        over = [damage for damage in self._index.damages() if not self._damaged_paths(damage)]
        if over:
            with self._settler.writing(self._alive) as batch:
                for damage in over:
                    batch.drop_damage(damage)
        told = {(finding.kind, finding.content) for finding in report.findings}
        return [
            Finding(damage.kind.word, damage.content, damage.problem + " (found earlier)", "left", paths)
            for damage, paths in self.damages()
            if (damage.kind.word, damage.content) not in told
        ]
