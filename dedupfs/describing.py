"""The backlog of contents to describe, and the thread that works it off.

What waits is in the index, put there with the first file of a content, so nothing is lost whatever happens. The thread
takes the newest, finds a file or a blob with that content, looks whether it begins like a picture, and hands the open
descriptor to a worker; records are written in groups, each in one transaction. It holds back while files are settled
and while apps change things, for a moment each time; whoever asks about a picture has that one described next.

A file that changes while it is described is left waiting: its content is another one then, or it is looked at again.
"""

import itertools
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import NamedTuple

from .backing import Backing
from .blobs import Blobs
from .errors import DamagedContent, StoreError, Unavailable
from .imagetables import Described
from .index import Index
from .magic import HEAD_BYTES, looks_like_picture
from .model import ContentKey, FileState, ImageEntry, ImageState, ImageTotals, Ino, Stamp
from .settle import Settler
from .similar import Similar
from .workers import Refused, Workers

log = logging.getLogger(__name__)

_GROUP = 64  # contents a transaction, or
_ROUND = 4  # contents a worker, before it is looked again what is next
_GROUP_S = 1.0  # what comes in this time
_HELD_BACK_S = 1.0  # at most, before each round of workers
_LOOK_S = 0.05
_SOON_S = 0.1  # until what could not be read is tried again: most often it was just shared. Doubled each time,
_LATER_S = 30.0  # up to this,
_MOMENT_S = 1.6  # and up to this, whoever waits for it goes on waiting
_REST_S = 30.0  # without work, until the workers go
_WITHOUT_WORKERS_S = 60.0  # until it is tried again whether they can be had
_CLOCK_S = 10.0  # until it is looked again whether quiet hours are over
_RETRY_S = 5.0  # after the index could not be written
_PUT_BACK = 500
_MOST_ENTRIES = 1000  # of a directory that are looked at, and
_MOST_BESIDE = 64  # files of it a picture is compared with beside those that are near


class _PutOff(NamedTuple):
    """What could not be read, and when it is tried again."""

    until_s: float  # as time.monotonic counts
    delay_s: float

    @property
    def is_for_a_moment(self) -> bool:
        return self.delay_s <= _MOMENT_S


def _but_sealed(stamp: Stamp) -> Stamp:
    """Of a blob, whose change time tells when it was sealed."""
    return stamp._replace(ctime_ns=0)


def _nobody(contents: list[ContentKey]) -> None:
    """Nobody wants to know."""


class Describer:
    """One for a mount. `start` and `stop` by its owner; `wake` when files were settled; asking from any thread."""

    def __init__(
        self,
        backing: Backing,
        index: Index,
        blobs: Blobs,
        settler: Settler,
        similar: Similar,
        workers: Workers,
        comparer: Workers,
        *,
        at_a_time: int,
    ) -> None:
        self._backing, self._index, self._blobs = backing, index, blobs
        self._settler, self._similar, self._workers, self._comparer = settler, similar, workers, comparer
        self._at_a_time = at_a_time
        self._condition = threading.Condition()
        self._urgent: dict[ContentKey, None] = {}
        self._put_off: dict[ContentKey, _PutOff] = {}
        self._awake = False
        self._stopping = False
        self._idle = False
        self._waiting = self._asking = 0  # how many wait; how many of them for one picture
        self._thread: threading.Thread | None = None
        self._complained = ""  # once is enough
        # Called with new pictures that resemble others, once the index knows; a mount sets it. Describing waits for it.
        self.on_described: Callable[[list[ContentKey]], None] = _nobody
        self.why_not = ""  # why no picture can be described
        self.described = 0

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="describe", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and the workers, at once: what was not written waits in the index."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        self._workers.close()
        self._comparer.close()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wake(self) -> None:
        """There may be something to describe."""
        with self._condition:
            self._awake = True
            self._idle = False
            self._condition.notify_all()

    # -- asking -------------------------------------------------------------------------------------------------------

    def totals(self) -> ImageTotals:
        return self._index.images.totals()

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing waits to be described, but for what cannot be read now."""
        with self._patiently():
            return self._condition.wait_for(lambda: self._idle or self._ended(), timeout_s)

    def wait_for_few(self, most: int, timeout_s: float) -> None:
        """Wait until the pictures that wait by now are described, but for what cannot be read now, if there are no more
        than `most`."""
        waiting = set(self._index.images.waiting(most + 1))
        if len(waiting) > most:
            return

        def done() -> bool:
            over = [each for each in waiting if self._is_out_of_reach(each) or not self._waits(each)]
            waiting.difference_update(over)
            return not waiting or self._ended()

        with self._patiently():
            self._condition.wait_for(done, timeout_s)

    def wait_loaded(self, timeout_s: float) -> bool:
        """Wait until what was described before is known to the search."""
        with self._patiently():
            return self._condition.wait_for(lambda: self._similar.is_loaded or self._idle or self._ended(), timeout_s)

    def entry(self, content: ContentKey, timeout_s: float) -> ImageEntry | None:
        """What is known of a content as a picture, once it is described. None for one that nobody holds any more, or
        that is not described in time."""
        deadline = time.monotonic() + timeout_s
        with self._patiently(), self._asking_for_one():
            while True:
                entry = self._index.images.entry(content)
                if entry is None or entry.state is not ImageState.WAITING:
                    return entry
                left_s = deadline - time.monotonic()
                if left_s <= 0 or self._ended() or self._is_out_of_reach(content):
                    return None
                put_off = self._put_off.get(content)
                if put_off is not None and (again_s := put_off.until_s - time.monotonic()) > 0:
                    self._condition.wait(min(left_s, again_s))
                    continue
                self._urgent[content] = None
                self._awake = True
                self._idle = False
                self._condition.notify_all()
                self._condition.wait(left_s)

    def _is_out_of_reach(self, content: ContentKey) -> bool:
        """Whether it cannot be read now, and that is not just for a moment. The condition is held."""
        put_off = self._put_off.get(content)
        return put_off is not None and not put_off.is_for_a_moment

    def _ended(self) -> bool:
        return self._stopping or bool(self.why_not) or self._thread is None

    @contextmanager
    def _patiently(self) -> Iterator[None]:
        with self._condition:
            self._waiting += 1
            self._condition.notify_all()
            try:
                yield
            finally:
                self._waiting -= 1

    @contextmanager
    def _asking_for_one(self) -> Iterator[None]:
        """Inside, with the condition held, what is described is written at once."""
        self._asking += 1
        try:
            yield
        finally:
            self._asking -= 1

    # -- working ------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with ThreadPoolExecutor(self._at_a_time, thread_name_prefix="describe") as pool:
            while not self._stopping:
                self._sit_out_quiet_hours()
                try:
                    if not self._prepare() or not self._work(pool):
                        self._rest()
                except Unavailable as reason:
                    if self._stopping:
                        return
                    self._complain(str(reason))
                except StoreError as error:
                    if self._complained != str(error):
                        log.error("%s; describing goes on later", error)
                        self._complained = str(error)
                    self._pause(_RETRY_S)
                except Exception:
                    # A bug that one picture meets must not leave all others undescribed.
                    log.exception("describing failed; it goes on later")
                    self._pause(_RETRY_S)

    def _sit_out_quiet_hours(self) -> None:
        """Return when they are over, or somebody asks."""
        with self._condition:
            while not (self._stopping or self._waiting) and self._settler.quiet_until():
                self._condition.wait(_CLOCK_S)

    def _complain(self, reason: str) -> None:
        """No worker can be had. Whoever waits is told, and it is tried again later."""
        with self._condition:
            if self._complained != reason:
                log.warning("pictures are not described: %s", reason)
            self.why_not = self._complained = reason
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._stopping, _WITHOUT_WORKERS_S)
            self.why_not = ""

    def _pause(self, seconds: float) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._stopping, seconds)

    def _rest(self) -> None:
        """Nothing to do, until somebody says otherwise or it is time to try something again."""
        with self._condition:
            if not self._awake:
                self._idle = not any(each.is_for_a_moment for each in self._put_off.values())
                self._condition.notify_all()
                until_s = min([each.until_s for each in self._put_off.values()], default=time.monotonic() + _REST_S)
                self._condition.wait_for(lambda: self._awake or self._stopping, max(until_s - time.monotonic(), 0.0))
            rested = not self._awake
            self._awake = False
            self._forget_who_waits_no_more()
        if rested and not self._put_off:
            self._workers.rest()
            self._comparer.rest()

    def _prepare(self) -> bool:
        """Load what was described before, and put back what another describing path described. Answers whether there
        is anything at all to do or to know."""
        images = self._index.images
        totals = images.totals()
        if self._similar.is_loaded:
            return totals.waiting > 0
        if totals == ImageTotals() and images.described_by() is not None:
            return False
        if totals == ImageTotals() and not self._index.totals().files:
            return False
        version = self._workers.version
        if images.described_by() != version:
            position = b""
            while not self._stopping:
                with self._settler.writing():
                    position = images.put_back(position, _PUT_BACK)
                if not position:
                    with self._settler.writing():
                        images.set_described_by(version)
                    break
        self._similar.load(version)
        with self._condition:
            self._condition.notify_all()
        return True

    def _work(self, pool: ThreadPoolExecutor) -> bool:
        """Describe one group. False when nothing waits but what is to wait."""
        done: dict[ContentKey, Described] = {}
        deadline = time.monotonic() + _GROUP_S
        took = False
        while len(done) < _GROUP and not self._stopping and (not done or time.monotonic() < deadline):
            chosen = self._choose(done)
            if not chosen:
                break
            took = True
            for content, described in zip(chosen, pool.map(self._describe, chosen), strict=True):
                self._hold_back()
                if described is None:
                    self._try_later(content)
                else:
                    done[content] = self._compared(content, described)
            if self._asking and done:
                break
        if done:
            self._write(done)
        return took

    def _try_later(self, content: ContentKey) -> None:
        with self._condition:
            before = self._put_off.get(content)
            delay_s = _SOON_S if before is None else min(2 * before.delay_s, _LATER_S)
            self._put_off[content] = _PutOff(time.monotonic() + delay_s, delay_s)
            self._condition.notify_all()

    def _choose(self, done: dict[ContentKey, Described]) -> list[ContentKey]:
        with self._condition:
            urgent, now_s = list(self._urgent), time.monotonic()
            self._urgent.clear()
            self._forget_who_waits_no_more()  # here as well, for under a steady stream of files there is no rest
            put_off = {content for content, each in self._put_off.items() if each.until_s > now_s}
        skipped = put_off.union(done)
        most = _ROUND * self._at_a_time  # some are described while others are compared
        waiting = self._index.images.waiting(most + len(skipped))
        chosen = dict.fromkeys(content for content in (*urgent, *waiting) if content not in skipped)
        first = list(chosen)[: len(urgent) or most]
        return [content for content in first if self._waits(content)]

    def _forget_who_waits_no_more(self) -> None:
        """Of those that were put off until now, the ones that are gone. The condition is held."""
        now_s = time.monotonic()
        for content in [each for each, put_off in self._put_off.items() if put_off.until_s <= now_s]:
            if not self._waits(content):
                del self._put_off[content]

    def _waits(self, content: ContentKey) -> bool:
        entry = self._index.images.entry(content)
        return entry is not None and entry.state is ImageState.WAITING

    def _hold_back(self) -> None:
        """Files come first: return when none is being settled, when somebody asks, or after a moment anyway."""
        until = time.monotonic() + _HELD_BACK_S
        with self._condition:
            while not (self._stopping or self._waiting) and self._settler.is_busy() and time.monotonic() < until:
                self._condition.wait(_LOOK_S)

    def _compared(self, content: ContentKey, described: Described) -> Described:
        record, thumbnails = described.entry.record, described.thumbnails
        if record is None or thumbnails is None:
            return described
        alike = self._similar.introduce(content, record, thumbnails, self._beside(content))
        return Described(described.entry, thumbnails, alike)

    def _beside(self, content: ContentKey) -> list[ContentKey]:
        """What else is in the directory of a content's first file, the nearest in time first."""
        for ino in itertools.islice(self._index.iter_holders(content), 1):
            for path in self._index.paths(ino, self._backing.root_ino)[:1]:
                try:
                    found = self._contents_of(os.path.dirname(path), self._backing.lstat(path).st_mtime_ns)
                except OSError:
                    break  # moved meanwhile
                return [other for other in found if other != content]
        return []

    def _contents_of(self, directory: bytes, time_ns: int) -> list[ContentKey]:
        files: list[tuple[int, Ino]] = []
        with closing(self._backing.scandir(directory)) as entries:
            for entry in itertools.islice(entries, _MOST_ENTRIES):
                st = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(st.st_mode):
                    files.append((abs(st.st_mtime_ns - time_ns), Ino(st.st_ino)))
        records = (self._index.file(ino) for _, ino in sorted(files)[:_MOST_BESIDE])
        return list(dict.fromkeys(record.content for record in records if record is not None))

    def _write(self, done: dict[ContentKey, Described]) -> None:
        new = [content for content, described in done.items() if described.alike and self._index.images.is_new(content)]
        with self._settler.writing() as batch:
            for content, described in done.items():
                batch.put_image(content, described)
        self._similar.written()
        with self._condition:
            for content in done:
                self._put_off.pop(content, None)
            self.described += len(done)
            self._condition.notify_all()
        self.on_described(new)

    def _describe(self, content: ContentKey) -> Described | None:
        """None when no file with this content can be read as it was settled. In a thread of the pool."""
        with closing(self._sources(content)) as sources:
            for fd, stamp in sources:
                try:
                    described = self._describe_open(fd)
                except OSError as error:
                    log.info("content %s cannot be read: %s", content.name, error)
                    continue
                if stamp in (now := Stamp.of(os.fstat(fd)), _but_sealed(now)):
                    return described
        return None

    def _describe_open(self, fd: int) -> Described:
        if not looks_like_picture(os.pread(fd, HEAD_BYTES, 0)):
            return Described(ImageEntry(ImageState.NO_PICTURE))
        try:
            record, thumbnails = self._workers.describe(fd)
        except Refused as reason:
            return Described(ImageEntry(ImageState.UNDESCRIBABLE, reason=str(reason)))
        return Described(ImageEntry(ImageState.DESCRIBED, record=record), thumbnails)

    def _sources(self, content: ContentKey) -> Generator[tuple[int, Stamp], None, None]:
        """Descriptors of what has this content, and what each looks like while that is true; closed when the next one
        is asked for."""
        for ino in self._index.iter_holders(content):
            record = self._index.file(ino)
            if record is None or record.content != content:
                continue
            paths = [] if record.state is FileState.REFERENCE else self._index.paths(ino, self._backing.root_ino)
            try:
                for path in paths:
                    fd = self._backing.open_quietly(path)
                    try:
                        st = os.fstat(fd)
                        if st.st_ino == ino and Stamp.of(st) == record.stamp:
                            yield fd, record.stamp
                    finally:
                        os.close(fd)
                # Also of a file that had its own bytes: it may have become a blob just now.
                if self._blobs.usable(content):
                    fd = self._blobs.open(content, record.stamp.size_bytes)
                    try:
                        yield fd, _but_sealed(Stamp.of(os.fstat(fd)))
                    finally:
                        os.close(fd)
            except (OSError, DamagedContent):
                continue  # moved, changed, or damaged: the next one may do
