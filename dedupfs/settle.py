"""The queue of files to settle, and the thread that works it off.

Files come from apps (written and closed: first) and from a scan. Queue and journal are in memory: a clean stop saves
the queue in the index, and after an unclean one `reconcile` finds the same work by walking. The thread takes files one
by one, lets `matching` settle each, and commits what was learned in one transaction a batch; whoever waits for one file
ends the batch. Nothing an app waits for otherwise happens here, and while apps are busy making files the thread
holds back for a moment: requests want the interpreter too. In quiet hours, and where a rate is set after so much work,
the queue rests: names are still written to the index, and files that somebody asks about are settled.

A failure never reaches an app: the file stays as it is, where it is; it is logged, and looked at again when it is next
written or scanned.
"""

import itertools
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from .backing import NO_ROOM, Backing
from .digest import Checkpoint, proceed
from .errors import DedupfsError, IndexDamaged, StoreError
from .index import Batch, Index
from .journal import Entry, Journal, Recording, Touched
from .matching import NOTHING, Looked, Matcher
from .model import ContentKey, Digest, FileState, Ino, Learned, Stamp
from .openfiles import RELEASE_S, Gate, GivenUp, InUse, Key, OpenFiles
from .readahead import ReadAhead
from .reserve import Reserve
from .sharing import Changed

log = logging.getLogger(__name__)

_BATCH_FILES = 256
_BATCH_S = 1.0
_CALM_S = 0.003  # without a change: they are not making small files by the hundred
_HELD_BACK_S = 2.0  # at most, and
_HELD_BACK_FILES = 4096  # no more than these
_POLL_S = 0.2  # for readers of a blob that nothing refers to any more
_POSTPONED_S = 60.0
_POSTPONED_BY_A_WALK_S = 3600.0  # while the walk has not ended: it offers them at its end
_CREDIT_S = 1.0  # so much work is done in one piece before the rate makes it rest
_CLOCK_S = 10.0  # until it is looked again at the clock: it may be set, or a quiet hour end
_RETRY_S = 5.0  # after the index could not be written, or a blob not be removed, for want of room
_MOST_MOVES = 8  # of one file while it is looked at, before it goes to the end of the queue


def _nobody(learned: list[Learned]) -> None:
    """Nobody wants to know."""


def _always_loud() -> str:
    """There are no quiet hours."""
    return ""


@dataclass(slots=True)
class _Pending:
    path: bytes
    digest: Digest | None = None  # computed while the file was written
    stamp: Stamp | None = None  # that it had when it was closed; None when an app has set its times since
    is_offered: bool = False  # by a scan or a name: it may be a reference that is not counted


class Settler:
    """Queue, journal and thread. Apps call `enqueue`, `note` and `moved`; whoever asks calls the waiting methods."""

    def __init__(
        self,
        backing: Backing,
        index: Index,
        openfiles: OpenFiles,
        gate: Gate,
        *,
        quiet_until: Callable[[], str] = _always_loud,
        rate_bytes_s: float = 0,
    ) -> None:
        """`quiet_until`: when quiet hours end, "" outside of them. `rate_bytes_s`: how much is settled a second on the
        average, by the sizes of files; 0 sets no bound."""
        self.quiet_until, self._rate_bytes_s = quiet_until, rate_bytes_s
        self._backing, self._index, self._openfiles = backing, index, openfiles
        self._device, self._root = backing.device, backing.root_ino
        self._gate = gate
        self._readahead = ReadAhead(backing)
        self._reserve = Reserve(backing)
        self._condition = threading.Condition(threading.Lock())
        self._fresh: dict[Ino, _Pending] = {}
        self._backlog: dict[Ino, _Pending] = {}
        self._working: dict[Ino, _Pending] = {}  # the one in hand
        self._settled: dict[Ino, _Pending] = {}  # done, and not committed yet
        self._postponed: dict[Ino, bytes] = {}
        self._put_off: set[Ino] = set()  # offered, and queued again when an app has closed them
        self._complained: set[Ino] = set()  # once in a mount is enough
        self._tried_at = 0.0
        self._journal = Journal()
        self._unreferenced: set[ContentKey] = set()  # contents whose blob may have lost its last reference
        self._for_trash: set[ContentKey] = set()  # those of which nobody ever knew one
        self._remove_at_s = 0.0  # when it is tried again, after there was no room to remove one
        self._moved_directories: list[bytes] | None = None
        self._changed_at = 0.0  # when an app last changed something
        self._applied = 0  # journal entries that are in the index
        self._waiting = 0
        self._asked: Counter[Ino] = Counter()  # files that somebody waits for
        self._hurried = 0  # how many want everything done, whatever the hour and the rate
        self._owed_until_s = 0.0  # when the rate allows for all that was done; and if that is
        self._rest_until_s = 0.0  # some time ahead, when the next file may be taken
        self._stopping = False
        self._leaving = False  # the end is near: what cannot be written now is not waited for
        self._awake = False  # the thread knows that there is work
        self._thread: threading.Thread | None = None
        self._batch_lock = threading.Lock()
        self.settled = 0
        self.busy_since_s: float | None = None  # when the thread took up the batch in hand
        self.index_error = ""  # why the index cannot be written now
        self.failures = 0  # files that could not be settled, for a reason that may pass
        # No blob is removed before the index is known to hold every reference. Taken back for good when a batch is
        # lost: a reference nobody counted could then be the last one.
        self.index_is_complete = False
        self.lost_a_batch = False
        # Called after a batch was written to the index, with the files that are new duplicates; a mount sets it.
        # Settling waits for it.
        self.on_settled: Callable[[list[Learned]], None] = _nobody

    def attach(
        self,
        matcher: Matcher,
        recording: Recording,
        unlink_blob: Callable[[ContentKey], None],
        discard_blob: Callable[[ContentKey], None],
    ) -> None:
        """What it works with; each of them notes or queues something here, and so comes later. `discard_blob` keeps a
        blob for a while."""
        self._matcher, self._recording = matcher, recording
        self._unlink_blob, self._discard_blob = unlink_blob, discard_blob

    # -- called while apps wait ---------------------------------------------------------------------------------------

    def enqueue(self, ino: Ino, path: bytes, digest: Digest | None = None, stamp: Stamp | None = None) -> None:
        """A file was written and closed."""
        with self._condition:
            working = self._working.get(ino)
            is_offered = ino in self._backlog or ino in self._put_off or (working is not None and working.is_offered)
            self._put_off.discard(ino)
            self._backlog.pop(ino, None)
            queue = self._backlog if is_offered else self._fresh
            queue[ino] = _Pending(path, digest, stamp, is_offered)
            self._wake()

    def note(self, entry: Entry) -> None:
        with self._condition:
            self._journal.append(entry)
            if isinstance(entry, Touched) and entry.sets_times:
                for queue in (self._fresh, self._backlog):
                    if (item := queue.get(entry.ino)) is not None:
                        item.stamp = None
            self._wake()

    def _wake(self) -> None:
        """An app changed something. The thread is woken for the first change only: the others it finds."""
        self._changed_at = time.monotonic()
        if not self._awake:
            self._awake = True
            self._condition.notify_all()

    def moved(self, moves: dict[bytes, bytes], inodes: Collection[Ino] | None) -> None:
        """Paths changed, from the key to the value and all at once: keep those of pending files true. `inodes`: of what
        was moved; None where a directory is among it, with whatever is in that. The caller is inside the gate."""
        with self._condition:
            # What is in hand may have another inode by now; the queues may be long.
            found = [*self._working.values(), *self._settled.values()]
            for queue in (self._fresh, self._backlog):
                found += queue.values() if inodes is None else filter(None, map(queue.get, inodes))
            for item in found:
                for old, new in moves.items():
                    if item.path == old or item.path.startswith(old + b"/"):
                        item.path = new + item.path[len(old) :]
                        break

    def directory_moved(self, path: bytes) -> None:
        """A directory is at this path now: a scan that goes on may have missed what is in it."""
        with self._condition:
            if self._moved_directories is not None:
                self._moved_directories.append(path)

    def is_pending(self, ino: Ino) -> bool:
        # One that an app may write to is looked at when it is closed, also if it was not written to. Open files first:
        # a release takes a file from there into the queue, and is not to be missed between two looks.
        key = Key(self._device, ino)
        if self._openfiles.is_written(key) and self._openfiles.settle_when_closed(key):
            return True
        with self._condition:
            return ino in self._fresh or ino in self._backlog or ino in self._working

    # -- called by a scan ---------------------------------------------------------------------------------------------

    def offer(self, ino: Ino, path: bytes, *, just_seen: bool = False) -> None:
        """The index does not know this file as it is. A path that was `just_seen` takes the place of an older one."""
        with self._condition:
            if just_seen:
                self._backlog.pop(ino, None)
            if ino not in self._fresh:
                self._backlog.setdefault(ino, _Pending(path, is_offered=True))
                self._readahead.add(ino, path)
            self._condition.notify_all()

    @contextmanager
    def watching_moves(self) -> Iterator[Callable[[], list[bytes]]]:
        """Inside, directories that apps move are noted; the function takes what was noted so far."""

        def take() -> list[bytes]:
            with self._condition:
                moved, self._moved_directories = self._moved_directories or [], []
                return moved

        with self._condition:
            self._moved_directories = []
        try:
            yield take
        finally:
            with self._condition:
                self._moved_directories = None

    def declare_complete(self) -> bool:
        """The index holds every reference from now on. False when it does not, since a batch was lost."""
        with self._condition:
            self.index_is_complete = not self.lost_a_batch
            return self.index_is_complete

    # -- waiting ------------------------------------------------------------------------------------------------------

    def wait_settled(self, key: Key, timeout_s: float) -> bool:
        """Wait until this file is settled and every name as of now is in the index. False when that took too long."""
        deadline = time.monotonic() + timeout_s
        self._openfiles.wait_until_closed(key, min(timeout_s, RELEASE_S))
        queues = (self._fresh, self._backlog, self._working, self._settled)
        with self._condition:
            self._asked[key.ino] += 1
        try:
            return self._wait(lambda: not any(key.ino in queue for queue in queues), deadline - time.monotonic())
        finally:
            with self._condition:
                self._asked[key.ino] -= 1
                if not self._asked[key.ino]:
                    del self._asked[key.ino]

    def wait_noted(self, timeout_s: float) -> bool:
        """Wait until every name as of now is in the index. False when that took too long."""
        return self._wait(lambda: True, timeout_s)

    def wait_for_few(self, most: int, timeout_s: float) -> None:
        """Wait until the files that were closed by now are settled, if there are no more than `most`: for who asks what
        there is beside a file, and means those written just before. Files that rest are not waited for."""
        deadline = time.monotonic() + timeout_s
        self._openfiles.wait_for_releases(min(timeout_s, RELEASE_S))
        queues = (self._fresh, self._backlog, self._working, self._settled)
        with self._condition:
            if sum(map(len, queues)) > most:
                return
            pending = {ino for queue in queues for ino in queue}
        self._wait(
            lambda: self._rests() or not any(ino in queue for ino in pending for queue in queues),
            deadline - time.monotonic(),
        )

    def wait_idle(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing at all is pending."""
        return self._wait(lambda: not (self._fresh or self._backlog or self._working or self._settled), timeout_s)

    def _wait(self, done: Callable[[], bool], timeout_s: float | None) -> bool:
        with self._condition:
            if self._thread is None:
                return done() and not len(self._journal)
            target = self._journal.appended
            self._waiting += 1
            self._condition.notify_all()
            try:
                return self._condition.wait_for(
                    lambda: (done() and self._applied >= target) or self._stopping, timeout_s
                )
            finally:
                self._waiting -= 1

    @contextmanager
    def hurried(self) -> Iterator[None]:
        """Inside, neither the hour nor the rate holds anything back."""
        with self._condition:
            self._hurried += 1
            self._condition.notify_all()
        try:
            yield
        finally:
            with self._condition:
                self._hurried -= 1

    def wait_until_loud(self) -> None:
        """Return when quiet hours are over, somebody is in a hurry, or the end has come."""
        with self._condition:
            while not (self._stopping or self._hurried) and self.quiet_until():
                self._condition.wait(_CLOCK_S)

    def _rests(self) -> bool:
        """Whether files are to wait. The condition is held."""
        return not self._hurried and (time.monotonic() < self._rest_until_s or self.quiet_until() != "")

    def is_busy(self) -> bool:
        """Whether files are being settled, or apps are changing something just now."""
        with self._condition:
            waiting = (self._fresh or self._backlog or self._working) and not self._rests()
            return bool(waiting) or time.monotonic() - self._changed_at < _CALM_S

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Inside, what was noted and shared is on its way to the index: what ends the block early, an interruption
        too, has lost it."""
        try:
            yield
        except BaseException:
            with self._condition:
                self.index_is_complete, self.lost_a_batch = False, True
            raise

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Inside, no name and no file changes, and the index holds everything that was noted before."""
        while True:
            with self._batch_lock:
                with self._counting():
                    batch = self._index.batch()
                    self._apply_journal(batch)
                    self._commit(batch)
                with self._gate.exclusive():
                    if not len(self._journal):
                        with self._condition:
                            self._applied = self._journal.appended
                        yield
                        return

    @contextmanager
    def writing(self, alive: Checkpoint = proceed) -> Iterator[Batch]:
        """A batch of somebody else's, committed at the end of the block. In it no file is read: settling waits for it.

        `alive` is called while settling has a batch in hand, and may raise to give up waiting. Raises StoreError when
        the index cannot be written.
        """
        while not self._batch_lock.acquire(timeout=_POLL_S):
            alive()
        try:
            batch = self._index.batch()
            yield batch
            batch.commit()
            self._unreferenced |= batch.dereferenced
        finally:
            self._batch_lock.release()

    def wait_until_removed(self, timeout_s: float) -> None:
        """Wait until the blobs that lost their last reference are gone; those that an app reads stay until then."""
        with self._condition:
            if self._thread is not None and self.index_is_complete:
                self._condition.wait_for(lambda: not self._unreferenced or self._stopping, timeout_s)

    def is_dead(self) -> bool:
        """Whether the thread was started and has ended by itself."""
        thread = self._thread
        return thread is not None and not thread.is_alive() and not self._stopping

    def pending(self) -> int:
        with self._condition:
            return len(self._fresh) + len(self._backlog) + len(self._working) + len(self._settled)

    # -- life ---------------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Take over the queue of the last clean stop."""
        for ino, path in self._index.load_queue():
            self._backlog[ino] = _Pending(path, is_offered=True)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="settle", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """`stop` will be called, when those have ended who wait for this thread; they are not to wait for room."""
        with self._condition:
            self._leaving = True
            self._condition.notify_all()

    def stop(self) -> None:
        """Write the journal to the index, and save what is pending, the file in hand included.

        Raises StoreError when the index cannot be written; then it does not agree with the tree any more.
        """
        self._readahead.stop()
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        self._openfiles.give_up_all()  # hashing a large file takes its time
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._batch_lock:
            batch = self._index.batch()
            self._apply_journal(batch)
            self._commit(batch)
            self._remove_unreferenced()
            if self._unreferenced:
                self._index.set_incomplete()  # the walk of the next start finds the blobs that had to stay
        queued = {**self._settled, **self._backlog, **self._working, **self._fresh}
        waiting = {ino: item.path for ino, item in queued.items()}
        self._index.save_queue(list({**self._postponed, **waiting}.items()))

    def _run(self) -> None:
        while True:
            self._reserve.keep()
            with self._condition:
                self._condition.wait_for(self._finds_work, self._nap_s())
                self._awake = True
                self._hold_back()
                if self._stopping:
                    return
            if self._postponed and time.monotonic() - self._tried_at > self._patience_s():
                self.offer_postponed()
            try:
                self.busy_since_s = time.monotonic()
                self._work()
                self.busy_since_s = None
            except StoreError as error:
                log.error("%s; trying again", error)
                self._lose_batch()
            except Exception:
                # A bug that one file meets must not leave all others unsettled.
                log.exception("settling failed; trying again")
                self._lose_batch()

    def _finds_work(self) -> bool:
        """The condition is held."""
        self._awake = self._next() is not None or len(self._journal) > 0 or self._stopping
        return self._awake

    def _hold_back(self) -> None:
        """Return when apps have stopped making changes, or when it cannot be put off any longer."""
        until = time.monotonic() + _HELD_BACK_S
        while not (self._stopping or self._waiting or (len(self._fresh) > _HELD_BACK_FILES and not self._rests())):
            left_s = min(self._changed_at + _CALM_S, until) - time.monotonic()
            if left_s <= 0:
                return
            self._condition.wait(left_s)

    def _nap_s(self) -> float | None:
        if self._unreferenced and self.index_is_complete:
            return max(self._remove_at_s - time.monotonic(), _POLL_S)
        if self._fresh or self._backlog:  # and they rest
            return min(max(self._rest_until_s - time.monotonic(), _POLL_S), _CLOCK_S)
        return self._patience_s() if self._postponed else None

    def _patience_s(self) -> float:
        return _POSTPONED_S if self.index_is_complete else _POSTPONED_BY_A_WALK_S

    def _lose_batch(self) -> None:
        with self._condition:
            self.index_is_complete, self.lost_a_batch = False, True
            for ino, item in {**self._settled, **self._working}.items():
                self._backlog.setdefault(ino, _Pending(item.path))
            self._working.clear()
            self._settled.clear()
            self._applied = self._journal.appended - len(self._journal)
            self._condition.wait_for(lambda: self._stopping, _RETRY_S)

    def work_off(self, progress: Callable[[int, int], None]) -> None:
        """Settle everything pending in the calling thread, for commands without a mount. Raises StoreError."""
        with self.hurried():
            while True:
                with self._counting():
                    self._work()
                progress(self.settled, self.pending())
                if not self.pending() and not len(self._journal):
                    return

    def _work(self) -> None:
        """One batch: names and files in the order they came, then one transaction, then blobs nobody needs."""
        with self._batch_lock:
            batch = self._index.batch()
            deadline = time.monotonic() + _BATCH_S
            count = 0
            learned: list[tuple[_Pending, ContentKey]] = []
            while count < _BATCH_FILES and (taken := self._take(batch)) is not None:
                count += 1
                ino, item = taken
                looked = self._settle(batch, ino, item)
                if looked.duplicate is not None:
                    learned.append((item, looked.duplicate))
                with self._condition:
                    self._spend(looked.size_bytes)
                    self._settled[ino] = self._working.pop(ino, item)
                    # A batch that ends is a flush of the index: not for who waits for all of it, nor for the last.
                    wanted = any(ino not in self._fresh and ino not in self._backlog for ino in self._asked)
                    if self._stopping or wanted or time.monotonic() > deadline:
                        break
            self._apply_journal(batch)  # what sharing noted belongs into the same transaction
            applied = self._journal.appended - len(self._journal)
            self._commit(batch)
            self._remove_unreferenced()
        self.on_settled(list(self._locate(learned)))
        with self._condition:
            self._settled.clear()
            self._applied = applied
            self.settled += count
            self._condition.notify_all()

    def _locate(self, learned: list[tuple[_Pending, ContentKey]]) -> Iterator[Learned]:
        """With the inode that is there now: one that came to share its content has another than it had."""
        for item, content in learned:
            with suppress(OSError):
                yield Learned(Ino(self._backing.lstat(item.path).st_ino), item.path, content)

    def _take(self, batch: Batch) -> tuple[Ino, _Pending] | None:
        """The next file, with every name noted before it was queued applied: its inode number may have been another's,
        whose end is in the journal."""
        while True:
            with self._condition:
                if not len(self._journal):
                    ino = self._next()
                    if ino is None:
                        return None
                    queue = self._fresh if ino in self._fresh else self._backlog
                    item = self._working[ino] = queue.pop(ino)
                    self._condition.notify_all()
                    self._readahead.take(ino)
                    return ino, item
            self._apply_journal(batch)

    def _next(self) -> Ino | None:
        """Which file is to be settled now: the first, so that who asks about a file hears of those written before it;
        while they rest, one that somebody asks about. The condition is held."""
        queue = self._fresh or self._backlog
        if queue and not self._rests():
            return next(iter(queue))
        return next((ino for ino in self._asked if ino in self._fresh or ino in self._backlog), None)

    def _spend(self, size_bytes: int) -> None:
        """So much was settled. The condition is held."""
        if self._rate_bytes_s and not self._hurried:
            now_s = time.monotonic()
            self._owed_until_s = max(self._owed_until_s, now_s) + size_bytes / self._rate_bytes_s
            if self._owed_until_s > now_s + _CREDIT_S:
                self._rest_until_s = self._owed_until_s

    def _apply_journal(self, batch: Batch) -> None:
        with self._condition:
            entries = self._journal.drain()
        for entry in entries:
            self._recording.apply(batch, entry)
        self._recording.catch_up(batch)

    def _settle(self, batch: Batch, ino: Ino, item: _Pending) -> Looked:

        def written_digest(stamp: Stamp) -> Digest | None:
            """The digest of what was written, unless the file was written and closed again since it was taken."""
            with self._condition:
                if ino in self._fresh or ino in self._backlog:
                    raise Changed("written again")
                if item.stamp is not None and stamp._replace(ctime_ns=item.stamp.ctime_ns) != item.stamp:
                    return None  # somebody who goes around the mount wrote to it since it was closed
                return item.digest

        for _ in range(_MOST_MOVES):
            try:
                return self._matcher.settle(batch, ino, item.path, written_digest)
            except (InUse, GivenUp):
                with self._condition:
                    if item.is_offered:
                        self._put_off.add(ino)
                if not self._openfiles.settle_when_closed(Key(self._device, ino)):
                    self._again(ino, item)
            except (FileNotFoundError, NotADirectoryError):
                if self._find_again(batch, ino, item):
                    continue
            except Changed:
                self._again(ino, item)
            except IndexDamaged:
                raise  # what was learned so far may be a reference that nobody counted
            except (OSError, DedupfsError) as error:
                self._doubt(batch, ino)
                self._fail(item.path, error)
            except Exception:
                # A bug that one file meets must not leave all others unsettled. What was shared is noted already.
                self._doubt(batch, ino)
                log.exception("%s cannot be settled", os.fsdecode(item.path))
                self.failures += 1
            return NOTHING
        self._again(ino, item)
        return NOTHING

    @staticmethod
    def _doubt(batch: Batch, ino: Ino) -> None:
        """Its record may be of what it was before: no change of attributes is to make that look true. One of a
        reference keeps a blob."""
        record = batch.file(ino)
        if record is not None and record.state is not FileState.REFERENCE:
            batch.doubt_file(ino)

    def _find_again(self, batch: Batch, ino: Ino, item: _Pending) -> bool:
        """A file is not where it was closed: whether it is somewhere else, which is then in `item`."""
        with self._gate.exclusive():
            pass  # whoever was renaming it has noted that now
        self._apply_journal(batch)
        return any(self._leads_to(path, ino, item) for path in [item.path, *batch.paths(ino, self._root)])

    def _leads_to(self, path: bytes, ino: Ino, item: _Pending) -> bool:
        try:
            found = self._backing.lstat(path).st_ino == ino
        except OSError:
            return False
        if found:
            item.path = path
        return found

    def _fail(self, path: bytes, error: Exception) -> None:
        log.warning("%s is not settled: %s", os.fsdecode(path), error)
        if isinstance(error, PermissionError):
            with suppress(OSError):
                if self._backing.is_no_reference(self._backing.lstat(path)):
                    return  # it has bytes of its own: we do not know them, but no blob is at stake
        self.failures += 1

    def _again(self, ino: Ino, item: _Pending) -> None:
        with self._condition:
            self._put_off.discard(ino)
            queue = self._backlog if item.is_offered else self._fresh
            queue.setdefault(ino, _Pending(item.path, is_offered=item.is_offered))

    def _commit(self, batch: Batch) -> None:
        """Write a batch. Beside a mount, as often as it takes: while the disk is full, say, it waits in memory."""
        told = False
        while True:
            try:
                batch.commit()
            except IndexDamaged as error:
                if self._frees(batch) and self._reserve.give():
                    continue  # now that there is room for it
                with self._condition:
                    if self._thread is None or self._stopping or self._leaving:
                        raise
                    if not told:
                        log.error("%s; trying again until it can be", error)
                        told = True
                    self.index_error = str(error)
                    self._condition.wait_for(lambda: self._stopping or self._leaving, _RETRY_S)
                continue
            self.index_error = ""
            self._unreferenced |= batch.dereferenced
            return

    def _frees(self, batch: Batch) -> bool:
        """Whether a blob may go when this is written, or what was noted since: what is kept for a full disk is not for
        anything else, or the next one who writes would have it."""
        with self._condition:
            return bool(batch.dereferenced) or self._journal.takes_away()

    def postpone(self, ino: Ino, path: bytes) -> bool:
        """A file could not be shared, for want of space, say: it is tried again later. Answers whether that is new."""
        with self._condition:
            self._postponed[ino] = path
            new = ino not in self._complained
            self._complained.add(ino)
            return new

    def offer_postponed(self) -> None:
        with self._condition:
            postponed, self._postponed = self._postponed, {}
            self._tried_at = time.monotonic()
        for ino, path in postponed.items():
            self.offer(ino, path)

    def suspect(self, content: ContentKey, *, to_trash: bool) -> None:
        """Have the blob of this content removed, unless something refers to it after all."""
        with self._condition:
            self._unreferenced.add(content)
            if to_trash:
                self._for_trash.add(content)
            self._condition.notify_all()

    def _remove_unreferenced(self) -> None:
        """Remove the blobs that lost their last reference. The batch is committed: the index counts them all."""
        if time.monotonic() < self._remove_at_s and not self._stopping:
            return
        for content in list(self._unreferenced) if self.index_is_complete else []:
            with self._gate.exclusive():
                # Inside the gate no app makes a reference; one that was made before is still in the journal.
                # What a scan or a name offered may be one that is not counted yet.
                with self._condition:
                    undecided = len(self._journal) or self._backlog
                if undecided or self._openfiles.uses(content):
                    continue
                self._unreferenced.discard(content)
                if not self.is_referenced(content) and not self._remove(content):
                    return

    def _remove(self, content: ContentKey) -> bool:
        """Answers whether it is of use to go on with others."""
        try:
            with suppress(FileNotFoundError):
                (self._discard_blob if content in self._for_trash else self._unlink_blob)(content)
            self._for_trash.discard(content)
        except OSError as error:
            if error.errno not in NO_ROOM:
                log.warning("blob %s cannot be removed; the next scan tries again: %s", content.name, error)
                return True
            self._unreferenced.add(content)
            if self._reserve.give():
                return True
            if not self._remove_at_s:
                log.warning("blobs that nothing refers to stay until there is room to remove them: %s", error)
            self._remove_at_s = time.monotonic() + _RETRY_S
            return False
        self._remove_at_s = 0.0
        return True

    def is_referenced(self, content: ContentKey) -> bool:
        """Whether there is a reference to this content.

        One wrong record of the index must not be enough to lose it: two tables say who has the content, each of these
        has a record, and who is said to share it otherwise is looked at.
        """
        sharers = self._index.sharers(content)
        for ino in itertools.chain(sharers, self._index.iter_holders(content)):
            record = self._index.file(ino)
            if record is None or record.state is FileState.REFERENCE:
                return True
        # Where files share extents, that is what all of them are; a blob is there when it was otherwise once.
        batch = self._index.batch()
        return any(self._matcher.leads_to(batch, ino, content) for ino in sharers)
