"""Builds every object of an owned source once, wires them, and answers the commands that need more than one of them.

A mount starts its threads; an offline command does not, and does its work in its own thread. `close` leaves the store
clean if everything that happened is in the index, and otherwise leaves it to the next start to reconcile.
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Self

from . import history
from .asking import AsCaller
from .backing import Backing
from .blobs import Blobs
from .claims import NamePattern
from .config import MountOptions
from .digest import Checkpoint, DescriptorHasher, hash_descriptor, proceed
from .duplicates import Answers, Group
from .errors import Busy, IndexDamaged, StoreError, Unavailable, UnknownFormat, UsageError
from .fileio import FileIo
from .health import Health, look
from .index import Index
from .journal import Recording
from .matching import Matcher
from .model import UNKNOWN_PATH, Caller, ContentKey, Damage, FileState, Ino, Progress
from .openfiles import RELEASE_S, Gate, Key, OpenFiles
from .orphans import Orphans
from .reconcile import Census, Reconciler, Stopped
from .report import Report
from .restore import Restorer
from .scrub import Scrubber
from .settle import Settler
from .sharing import ReferenceSharing, ReflinkSharing, Sharing, supports_reflink
from .store import INDEX, QUARANTINE, Store
from .trash import Trash
from .vfs import Vfs

if TYPE_CHECKING:
    from .imaging import Imaging

log = logging.getLogger(__name__)

_NOT_DESCRIBING = "only a mount that is not read-only describes"
_HISTORY_S = 3600.0
_SCAN_AGAIN_S = 60.0  # after one that failed; doubled each time,
_SCAN_AGAIN_AT_MOST_S = 3600.0  # up to this
_HEALING_S = 600.0  # how long a scrub waits for a copy to be settled, which may be behind others


class Engine:
    """An owned source, ready to be served or worked on."""

    def __init__(
        self,
        source: str,
        options: MountOptions,
        *,
        backing: Backing | None = None,
        hasher: DescriptorHasher = hash_descriptor,
    ) -> None:
        """Take the store. Raises what `Store` raises, and Unavailable when the wanted sharing cannot be had."""
        self._read_only = options.read_only
        self._name_pattern = NamePattern(options.name_pattern) if options.name_pattern else None
        self._preferred = options.prefer
        self.backing = backing or Backing(source, noatime=options.noatime)
        with ExitStack() as stack:
            stack.callback(self.backing.close)
            self.store = Store(self.backing)
            stack.callback(self.store.close)
            try:
                by_reflink = self._shares_by_reflink(options.share)
                self.index = _open_index(self.backing, self.store.identity)
            except (Unavailable, UnknownFormat, OSError):
                if self.store.was_clean:
                    with suppress(OSError):  # on a full disk, say: then the tree is walked
                        self.store.mark_clean()  # nothing was touched
                raise
            stack.callback(self.index.close)
            self._build(options, hasher, by_reflink=by_reflink)
            stack.pop_all()

    def _build(self, options: MountOptions, hasher: DescriptorHasher, *, by_reflink: bool) -> None:
        backing = self.backing
        rules = self._rules = self.store.read_rules() if options.rules is None else options.rules
        self.openfiles, self.gate, self.blobs = OpenFiles(), Gate(), Blobs(backing)
        self._quiet = options.quiet
        self.settler = Settler(
            backing,
            self.index,
            self.openfiles,
            self.gate,
            quiet_until=lambda: self.quiet_until(),
            rate_bytes_s=options.settle_rate_mb_s * 10**6,
        )
        note = self.settler.note
        self.references = ReferenceSharing(backing, self.blobs, self.openfiles, self.gate, note)
        self.references.sweep()
        self._orphans = Orphans(backing, self.openfiles, self.settler)
        self._orphans.sweep()
        self.sharing: Sharing = ReflinkSharing(backing, self.gate, note) if by_reflink else self.references
        recording = Recording(
            backing,
            self.settler.is_pending,
            self.settler.offer,
            lambda path: self.on_replaced(path),
            lambda: self.settler.index_is_complete,
        )
        self.settler.attach(
            Matcher(
                backing,
                self.blobs,
                self.openfiles,
                self.references,
                self.sharing,
                hasher,
                recording,
                lambda path: self.on_replaced(path),
                self.settler.offer,
                self.settler.postpone,
                lambda: self.settler.index_is_complete,
                rules=rules,
            ),
            recording,
            self.references.unlink_blob,
            lambda content: Trash(backing).put(content, now_s=int(time.time())),
        )
        if not self.store.was_clean:
            # Said in the index, so that it stays said until a walk has come to its end, however many starts that takes.
            self.index.set_incomplete()
        self.settler.index_is_complete = self.index.is_complete()
        self.settler.load()
        # Called with every path that got another inode, so that caches can be told; a mount sets it.
        self.on_replaced: Callable[[bytes], None] = _nobody
        # Why the kernel does not read and write files without us, "" where it does; a mount sets it.
        self.why_no_passthrough: Callable[[], str] = _not_mounted
        self._as_caller = AsCaller(backing)
        self.answers = Answers(backing, self.index, self.settler, self._as_caller)
        io = FileIo(
            backing,
            self.index,
            self.blobs,
            self.openfiles,
            self.gate,
            self.references,
            self.settler,
            self._orphans,
            copies_refer=self.sharing is self.references,
            noatime=options.noatime,
            rules=rules,
        )
        self.vfs = Vfs(backing, self.openfiles, self.gate, self.settler, io, self._answer, self._orphans)
        self._reconciler = Reconciler(backing, self.index, self.blobs, self.settler)
        self._scrubber = Scrubber(
            backing,
            self.index,
            self.blobs,
            self.openfiles,
            self.gate,
            self.settler,
            hasher,
            lambda path: self.on_replaced(path),
            self._settle_again,
        )
        self._restorer = Restorer(
            backing, self.index, self.blobs, io, lambda: self._stopping.is_set(), self._release_blobs
        )
        self._workers = options.workers
        self._scrub_rate_bytes_s = int(options.scrub_rate_mb_s * 10**6)
        self._scrub_lock = threading.Lock()
        self.imaging: Imaging | None = None  # of a mount that describes pictures
        self._stopping = threading.Event()
        self._scan_lock = threading.Lock()
        self._scanner: threading.Thread | None = None
        self._scan_rests = threading.Event()  # it failed, and is not yet tried again
        self._scan_problem = ""  # why the last one did not make the index complete
        self._historian: threading.Thread | None = None
        self._running = False
        self._closed = False

    def _shares_by_reflink(self, wanted: str) -> bool:
        if wanted != "reference" and supports_reflink(self.backing):
            return True
        if wanted == "reflink":
            where = self.backing.filesystem or "this filesystem"
            raise Unavailable(f"{where} cannot share extents between files; use share=reference")
        return False

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to settle in the background, and to reconcile where that is needed."""
        if self._read_only:
            return
        self._running = True
        self._start_imaging()
        self.settler.start()
        self._historian = threading.Thread(target=self._keep_history, name="history", daemon=True)
        self._historian.start()
        if not self.settler.index_is_complete:
            self._scanner = threading.Thread(target=self._scan_in_background, name="scan", daemon=True)
            self._scanner.start()

    def _keep_history(self) -> None:
        self._record_day()
        while not self._stopping.wait(_HISTORY_S):
            self._record_day()

    def _record_day(self) -> None:
        """A report can do without a day; while the index does not hold everything, there is nothing to be told."""
        try:
            if self.settler.index_is_complete:
                history.record(self.backing, self.index.totals(), day=time.strftime("%Y-%m-%d"))
        except (OSError, StoreError) as error:
            log.info("the day is not recorded: %s", error)

    def quiet_until(self) -> str:
        """When the quiet hours end in which work in the background waits, as HH:MM; "" outside of them."""
        now = time.localtime()
        return self._quiet.until(now.tm_hour, now.tm_min)

    def _start_imaging(self) -> None:
        self.imaging = self._make_imaging()
        self.imaging.describer.start()

    def _make_imaging(self) -> "Imaging":
        from .imaging import Imaging  # loads numpy, which most commands without a mount do without

        return Imaging(
            self.backing,
            self.index,
            self.blobs,
            self.settler,
            self.answers,
            self._as_caller,
            name_pattern=self._name_pattern,
            preferred=self._preferred,
            at_a_time=self._workers,
        )

    def _answer(self, path: bytes, name: bytes, caller: Caller) -> bytes:
        """The value of `user.dedupfs.<name>` of a file."""
        if self.imaging is not None and self.imaging.answers(name):
            return self.imaging.xattr(path, name, caller)
        return self.answers.xattr(path, name, caller)

    def _scan_in_background(self) -> None:
        def stopping() -> bool:
            self.settler.wait_until_loud()
            return self._stopping.is_set()

        delay_s = _SCAN_AGAIN_S
        while not self.settler.index_is_complete:  # somebody may have asked for a scan meanwhile
            try:
                self._scan(lambda phase, done, total: None, stopping)
                return
            except Stopped:
                return
            except StoreError as error:
                self._scan_problem = _scan_failed(str(error))
                log.error("%s; the scan is tried again in %.0f seconds", error, delay_s)
            except Exception as error:
                self._scan_problem = _scan_failed(repr(error))
                log.exception("the scan failed; it is tried again in %.0f seconds", delay_s)
            self._scan_rests.set()
            if self._stopping.wait(delay_s):
                return
            self._scan_rests.clear()
            delay_s = min(2 * delay_s, _SCAN_AGAIN_AT_MOST_S)

    def close(self) -> None:
        """Stop everything, save what is pending, and leave the store clean if it is."""
        if self._closed:
            return
        self._closed = True
        self._stopping.set()
        self.settler.leave()
        if self._scanner is not None:
            with self.settler.hurried():  # or it would sit out quiet hours
                self._scanner.join()
        if self.imaging is not None:
            self.imaging.stop()
        agrees = True
        try:
            self.vfs.io.release_all()
            self._orphans.sweep()
            self.settler.stop()
            self.references.sweep()  # what could not be taken back when it failed
        except (StoreError, OSError) as error:
            agrees = False
            log.error("%s; the tree is walked at the next start", error)
        if self._historian is not None:
            self._historian.join()
            self._record_day()
        self._as_caller.close()
        self.index.close()
        self.store.withdraw()
        if agrees and not self.settler.lost_a_batch:
            try:
                self.store.mark_clean()
            except OSError as error:
                log.warning("the store cannot be marked clean, and its tree is walked at the next start: %s", error)
        self.store.close()
        self.backing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- commands -----------------------------------------------------------------------------------------------------

    def settle(self, progress: Progress, *, exact: bool = False) -> dict[str, object]:
        """Wait until nothing is pending, first scan included, nor any picture to be described unless `exact`.

        Neither the hour nor a rate holds that back.
        """
        before = self.settler.settled
        with self.settler.hurried():
            self._settle(progress, before)
        if self.imaging is not None and not exact:
            self.imaging.settle(progress)
        return {"settled": self.settler.settled - before}

    def _settle(self, progress: Progress, before: int) -> None:
        for _ in range(3):  # what a reader just closed is shared at its release, which is on the way
            closed = self.openfiles.wait_until_closed(None, RELEASE_S)
            while not self._is_idle():
                progress("settling", self.settler.settled - before, None)
                if not self._running:
                    self._work_off(progress)
                elif self.settler.wait_idle(0.5) and self._scanner is not None:
                    self._scanner.join(0.5)
            if not closed or self.openfiles.wait_until_closed(None, 0):
                break  # it is open elsewhere, or nothing is
        self.settler.wait_until_removed(RELEASE_S)

    def _is_idle(self) -> bool:
        scanning = self._scanner is not None and self._scanner.is_alive() and not self._scan_rests.is_set()
        return not scanning and (self._read_only or self.settler.wait_idle(0))

    def _work_off(self, progress: Progress) -> None:
        self.settler.work_off(lambda done, left: progress("settling", done, done + left))

    def status(self) -> dict[str, object]:
        totals, pictures = self.index.totals(), self.index.images.totals()
        scanning = self._scan_lock.locked()
        return {
            "source": os.fsdecode(self.backing.source),
            "files": totals.files,
            "logical_bytes": totals.logical_bytes,
            "stored_bytes": totals.stored_bytes,
            "saved_bytes": totals.saved_bytes,
            "references": totals.references,
            "shared_files": totals.shared_files,
            "blobs": totals.contents_shared if self.sharing is self.references else self._count_blobs(),
            "pending": self.settler.pending(),
            "scanning": scanning,
            "quiet_until": self.quiet_until(),
            "share": self.sharing.name,
            "passthrough": not (reason := self.why_no_passthrough()),
            "passthrough_reason": reason,
            "pictures_described": pictures.described,
            "pictures_waiting": pictures.waiting,
            "pictures_undescribable": pictures.undescribable,
            "pictures_reason": self.imaging.describer.why_not if self.imaging is not None else _NOT_DESCRIBING,
        }

    def _count_blobs(self) -> int:
        return sum(1 for _ in self.blobs.list())

    def replace_index(self) -> None:
        """Begin a new index; a scan fills it. Only before `start`."""
        self.index.clear()
        self.settler.index_is_complete = False

    def look_again(self, content: ContentKey, alive: Checkpoint = proceed) -> list[Ino]:
        """Forget what is known of files that hold this content themselves, and queue them: one of them may heal its
        blob. Answers which they are."""
        found: dict[Ino, bytes] = {}
        with self.settler.writing(alive) as batch:
            for ino in [ino for copy in self.index.copies(content) for ino in batch.holders(copy)]:
                record = batch.file(ino)
                if record is not None and record.state is not FileState.REFERENCE:
                    paths = self.index.paths(ino, self.backing.root_ino)
                    batch.doubt_file(ino)
                    found[ino] = paths[0] if paths else UNKNOWN_PATH
        for ino, path in found.items():
            self.settler.offer(ino, path)
        return list(found)

    def _settle_again(self, content: ContentKey, alive: Checkpoint) -> None:
        offered = self.look_again(content, alive)
        if not self._running:
            self._work_off(lambda phase, done, total: alive())
        deadline = time.monotonic() + _HEALING_S
        for ino in offered if self._running else ():
            while not self.settler.wait_settled(Key(self.backing.device, ino), 0.5) and time.monotonic() < deadline:
                alive()

    def scrub(self, progress: Progress, rate_mb_s: float | None = None) -> dict[str, object]:
        """Read every content again (see `scrub`); 0 sets no bound, None takes the mount's. Raises Busy beside another
        scrub, UsageError where nothing may be healed."""
        if self._read_only:
            raise UsageError("the mount is read-only, and a scrub heals what it can; mount without ro to scrub")
        if not self._scrub_lock.acquire(blocking=False):
            raise Busy("a scrub of this source is running already; wait for it to end")
        try:
            if not self._running and not self.settler.index_is_complete:
                self.scan(progress)
            totals = self.index.totals()
            report = self._scrubber.run(
                rate_bytes_s=self._scrub_rate_bytes_s if rate_mb_s is None else int(rate_mb_s * 10**6),
                total_bytes=totals.stored_bytes if self.sharing is self.references else totals.logical_bytes,
                progress=progress,
            )
            if not self._running:
                self._work_off(lambda phase, done, total: None)
        finally:
            self._scrub_lock.release()
        return report.as_json()

    def scan(self, progress: Progress) -> dict[str, object]:
        """Walk the tree and settle everything that the index does not know as it is, at once. Raises Stopped."""
        with self.settler.hurried():
            return self._scan(progress, self._stopping.is_set)

    def _scan(self, progress: Progress, stopping: Callable[[], bool]) -> dict[str, object]:
        def settle() -> None:
            if self._running:
                while not self.settler.wait_idle(0.5) and not self._stopping.is_set():
                    progress("settling", self.settler.settled, self.settler.settled + self.settler.pending())
            else:
                self._work_off(progress)

        with self._scan_lock:
            self.settler.offer_postponed()
            census = self._reconciler.run(progress, settle=settle, stopping=stopping)
            self._scan_problem = _not_all_was_seen(census) if census.unreadable else ""
            self.settler.offer_postponed()  # what waited to know whose a blob is
            settle()
        return {
            "files": census.files,
            "directories": census.directories,
            "bytes": census.bytes,
            "looked_at": census.offered,
            "unreadable_directories": census.unreadable,
        }

    def health(self) -> Health:
        """Whether all is well, as far as a look tells."""
        problem = "" if self.settler.index_is_complete else self._scan_problem
        return look(self.backing, self.index, self.settler, damaged=len(self.damages()), scan_problem=problem)

    def describe(self) -> str:
        """What it is doing, in a few words."""
        pending = self.settler.pending()
        quiet = f", until {until}" if (until := self.quiet_until()) else ""
        if self._scan_lock.locked():
            return f"serving; a scan is running, {pending:,} files wait{quiet}"
        return f"serving; {pending:,} files wait{quiet}" if pending else "serving"

    def metrics(self) -> dict[str, object]:
        """What is told to who watches: numbers, and which checks fail."""
        damaged, health, scrub = len(self.damages()), self.health(), self.index.scrub_pass()
        return {
            **self.status(),
            **health.as_json(),
            "settled": self.settler.settled,
            "damaged": damaged,
            "failing": {problem.check for problem in health.problems},
            "scrub_finished_s": 0 if scrub is None else scrub.finished_s,
        }

    def report(self, progress: Progress, *, thumbnails: bool = False) -> dict[str, object]:
        """What is duplicate where (see `report`), what resembles what, how it was day by day, and what `status` says.

        With `thumbnails`, what is shown of pictures comes with small views of them.
        """
        if not self._running and not self.settler.index_is_complete:
            self.scan(progress)
        report = Report(self.backing, self.index, self._rules)
        report.gather(progress)
        imaging = self.imaging or self._make_imaging()
        return {
            **self.status(),
            **report.as_json(self.damages()),
            **imaging.pictures.overview(lambda done: progress("grouping", done, None), thumbnails=thumbnails),
            "history": history.read(self.backing),
        }

    def damages(self) -> list[tuple[Damage, list[bytes]]]:
        """What a scrub found damaged and nobody has put right, each with its paths."""
        return self._scrubber.damages()

    def duplicates(self, path: bytes | None) -> object:
        """One group for a path, or all groups. Raises OSError (ENODATA) for a path that has no settled content."""
        if path is not None:
            return _as_json(self.answers.group(path))
        return [_as_json(group) for group in self.answers.groups()]

    def restore(self, paths: list[bytes], progress: Progress, *, dry_run: bool = False) -> dict[str, object]:
        """Make every reference at or below these paths (all, if none is named) a plain file, content verified by its
        copy and flushed; what cannot be restored is listed and left as it is. `dry_run` answers what that takes.

        Raises OSError (ENOSPC), with nothing done, when there surely is no room.
        """
        if not dry_run and not self._running and not self.settler.index_is_complete:
            self.scan(progress)
        plan = self._restorer.plan(paths or [b""])
        if dry_run:
            return plan.as_json()
        plan.require_room()
        return self._restorer.execute(plan, progress)

    def _release_blobs(self) -> None:
        """Beside a mount its thread does that."""
        if not self._running:
            self._work_off(lambda phase, done, total: None)


def rebuild(source: str, progress: Progress) -> dict[str, object]:
    """Throw the index away and make it again from the tree. Raises Busy when the store is owned by somebody."""
    with Engine(source, MountOptions()) as engine:
        engine.replace_index()
        return engine.scan(progress)


def _scan_failed(why: str) -> str:
    return f"the scan failed ({why}), and is tried again; dedupfs scan tries now"


def _not_all_was_seen(census: Census) -> str:
    path, reason = census.unreadable_paths[0]
    return (
        f"{census.unreadable:,} directories or files cannot be looked at ({os.fsdecode(path)!r}: {reason}), and until "
        "dedupfs scan can, contents that seem unused are kept"
    )


def _nobody(path: bytes) -> None:
    """Nobody caches anything."""


def _not_mounted() -> str:
    return "nothing is mounted"


def _as_json(group: Group) -> dict[str, object]:
    return {
        "digest": group.content.digest.hex(),
        "size_bytes": group.size_bytes,
        "paths": [os.fsdecode(path) for path in group.paths],
    }


def _open_index(backing: Backing, identity: str) -> Index:
    """The index; a new, empty one when the old one cannot be used."""
    directory = b"/proc/self/fd/%d/%s" % (backing.root_fd, INDEX)
    try:
        return Index(directory, identity)
    except IndexDamaged as error:
        log.warning("%s: beginning a new one; the tree is scanned", error)
    _set_index_aside(backing)
    return Index(directory, identity)


def _set_index_aside(backing: Backing) -> None:
    """Move the index to quarantine/, replacing what was there: it holds nothing that the tree does not."""
    aside = QUARANTINE + b"/index"
    with suppress(FileNotFoundError):
        shutil.rmtree(os.fsdecode(aside), dir_fd=backing.root_fd)
    with suppress(FileNotFoundError):
        backing.rename(INDEX, aside)
    backing.mkdir(INDEX, 0o700)
