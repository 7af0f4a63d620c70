"""The gate and the table of open files, with threads that meet where the test wants them to."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dedupfs.model import ContentKey, Digest, Ino, Reference
from dedupfs.openfiles import Gate, GivenUp, Handle, InUse, Key, OpenFiles

KEY = Key(1, Ino(10))
OTHER = Key(1, Ino(11))
REFERENCE = Reference(ContentKey(Digest(b"d" * 16)), 5)

_PATIENCE_S = 10.0
_A_WHILE_S = 0.05


class Worker:
    """A thread that does something and tells when it is done."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.done = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(action,), daemon=True)
        self._thread.start()

    def _run(self, action: Callable[[], object]) -> None:
        action()
        self.done.set()

    def waits(self) -> bool:
        return not self.done.wait(_A_WHILE_S)

    def ends(self) -> None:
        assert self.done.wait(_PATIENCE_S)
        self._thread.join()


@pytest.fixture
def files() -> OpenFiles:
    return OpenFiles()


@pytest.fixture
def descriptor(tmp_path: Path) -> Callable[[], int]:
    """Descriptors that the table may close."""
    (tmp_path / "file").write_bytes(b"bytes")
    return lambda: os.open(tmp_path / "file", os.O_RDWR)


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def nothing() -> None:
    pass


# -- the gate


def test_many_pass_shared() -> None:
    gate = Gate()
    together = threading.Barrier(5)

    def passing() -> None:
        with gate.shared():
            together.wait(_PATIENCE_S)

    for worker in [Worker(passing) for _ in range(5)]:
        worker.ends()


def test_one_passes_exclusively() -> None:
    gate = Gate()
    inside = 0
    most = 0

    def passing() -> None:
        nonlocal inside, most
        for _ in range(200):
            with gate.exclusive():
                inside += 1
                most = max(most, inside)
                inside -= 1

    for worker in [Worker(passing) for _ in range(4)]:
        worker.ends()
    assert (inside, most) == (0, 1)


def test_exclusive_waits_for_shared_and_is_not_overtaken() -> None:
    gate = Gate()
    order: list[str] = []
    leave = threading.Event()
    entered = threading.Event()

    def first() -> None:
        with gate.shared():
            entered.set()
            leave.wait(_PATIENCE_S)
            order.append("first")

    def exclusive() -> None:
        with gate.exclusive():
            order.append("exclusive")

    def second() -> None:
        with gate.shared():
            order.append("second")

    reader = Worker(first)
    entered.wait(_PATIENCE_S)
    changer = Worker(exclusive)
    assert changer.waits()
    late = Worker(second)
    assert late.waits()
    leave.set()
    for worker in (reader, changer, late):
        worker.ends()
    assert order == ["first", "exclusive", "second"]


def test_shared_waits_for_exclusive() -> None:
    gate = Gate()
    with gate.exclusive():

        def passing() -> None:
            with gate.shared():
                pass

        worker = Worker(passing)
        assert worker.waits()
    worker.ends()


def test_an_exception_opens_the_gate() -> None:
    gate = Gate()
    for entering in (gate.shared, gate.exclusive):
        with pytest.raises(ZeroDivisionError), entering():
            raise ZeroDivisionError
    with gate.exclusive():
        pass
    with gate.shared():
        pass


def test_no_update_is_lost_between_the_two() -> None:
    gate = Gate()
    value = 0
    seen: list[int] = []

    def changing() -> None:
        nonlocal value
        for _ in range(100):
            with gate.exclusive():
                value += 1
                time.sleep(0)
                value += 1

    def looking() -> None:
        for _ in range(300):
            with gate.shared():
                seen.append(value)

    for worker in [Worker(changing), Worker(looking), Worker(looking), Worker(changing)]:
        worker.ends()
    assert value == 400
    assert all(number % 2 == 0 for number in seen)


# -- the table


def test_handles_of_an_inode_share_what_is_known(files: OpenFiles, descriptor: Callable[[], int]) -> None:
    first = files.register(KEY, descriptor(), writes=False)
    second = files.register(KEY, descriptor(), writes=True, appends=True)
    other = files.register(OTHER, descriptor(), writes=False)
    assert first.inode is second.inode is files.get(KEY)
    assert other.inode is not first.inode
    assert len(files.handles_of(KEY)) == 2
    assert files.handles_of(Key(2, Ino(10))) == []
    assert len(files) == 2
    assert files.is_written(KEY)
    assert not files.is_written(OTHER)
    for handle in (first, second, other):
        files.release(handle, nothing)
    assert len(files) == 0
    assert files.get(KEY) is None


def releasing(files: OpenFiles, handle: Handle) -> int:
    """How often releasing it says that the file is to be settled."""
    calls = []
    files.release(handle, lambda: calls.append(1))
    return len(calls)


def test_the_last_writer_settles(files: OpenFiles, descriptor: Callable[[], int]) -> None:
    writers = [files.register(KEY, descriptor(), writes=True) for _ in range(2)]
    reader = files.register(KEY, descriptor(), writes=False)
    writers[0].inode.dirty = True
    assert releasing(files, writers[0]) == 0
    assert releasing(files, writers[1]) == 1
    assert not reader.inode.dirty
    assert releasing(files, reader) == 0


def test_who_wrote_nothing_settles_nothing(files: OpenFiles, descriptor: Callable[[], int]) -> None:
    assert releasing(files, files.register(KEY, descriptor(), writes=True)) == 0
    assert releasing(files, files.register(KEY, descriptor(), writes=False)) == 0


def test_the_last_reader_settles_what_waited_for_it(files: OpenFiles, descriptor: Callable[[], int]) -> None:
    assert not files.settle_when_closed(KEY)
    readers = [files.register(KEY, descriptor(), writes=False) for _ in range(2)]
    assert files.settle_when_closed(KEY)
    assert releasing(files, readers[0]) == 0
    assert releasing(files, readers[1]) == 1
    assert not files.settle_when_closed(KEY)


def test_settling_is_said_before_the_file_counts_as_closed(files: OpenFiles, descriptor: Callable[[], int]) -> None:
    """Nobody finds it neither open nor pending."""
    handle = files.register(KEY, descriptor(), writes=True)
    handle.inode.dirty = True
    pending = threading.Event()
    seen: list[bool] = []

    def settle() -> None:
        looker = Worker(lambda: seen.append(files.is_written(KEY) or pending.is_set()))
        looker.waits()
        pending.set()

    files.release(handle, settle)
    deadline = time.monotonic() + _PATIENCE_S
    while not seen:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert seen == [True]


def test_handles_can_be_listed(files: OpenFiles, descriptor: Callable[[], int]) -> None:
    made = {files.register(key, descriptor(), writes=False) for key in (KEY, KEY, OTHER)}
    assert set(files.handles()) == made
    for handle in made:
        files.release(handle, nothing)
    assert files.handles() == []


# -- watching


def test_a_file_that_is_written_is_not_watched(files: OpenFiles, descriptor: Callable[[], int]) -> None:
    writer = files.register(KEY, descriptor(), writes=True)
    reader = files.register(KEY, descriptor(), writes=False)
    writer.inode.dirty = True
    with pytest.raises(InUse), files.watch(KEY):
        pass
    files.release(writer, nothing)
    with files.watch(KEY) as watch:  # a reader does no harm
        watch.checkpoint()
    files.release(reader, nothing)


def test_one_watches_at_a_time(files: OpenFiles) -> None:
    with files.watch(KEY), files.watch(OTHER), pytest.raises(InUse), files.watch(KEY):
        pass
    with files.watch(KEY):
        pass


def test_a_writer_tells_the_watcher_and_waits_for_it(files: OpenFiles) -> None:
    entered = threading.Event()

    def write() -> None:
        with files.writing_intent(KEY):
            entered.set()

    with files.watch(KEY) as watch:
        watch.checkpoint()
        writer = Worker(write)
        deadline = time.monotonic() + _PATIENCE_S
        while not watch.given_up:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        with pytest.raises(GivenUp):
            watch.checkpoint()
        assert not entered.is_set()
    writer.ends()
    assert entered.is_set()


def test_nobody_begins_to_watch_while_a_writer_is_coming(files: OpenFiles) -> None:
    with files.writing_intent(KEY):
        with pytest.raises(InUse), files.watch(KEY):
            pass
        with files.writing_intent(KEY), files.watch(OTHER):
            pass
        with pytest.raises(InUse), files.watch(KEY):
            pass
    with files.watch(KEY):
        pass


def test_a_writer_of_another_file_does_not_wait(files: OpenFiles) -> None:
    with files.watch(KEY) as watch, files.writing_intent(OTHER):
        watch.checkpoint()


def test_a_watch_that_fails_is_over(files: OpenFiles) -> None:
    with pytest.raises(ZeroDivisionError), files.watch(KEY):
        raise ZeroDivisionError
    with files.writing_intent(KEY):
        pass


# -- where the bytes are


def test_a_reference_reads_from_its_blob_until_it_is_plain(files: OpenFiles, descriptor: Callable[[], int]) -> None:
    reader = files.register(KEY, descriptor(), writes=False)
    inode = reader.inode
    blob = descriptor()
    with inode.lock:
        inode.become_reference(REFERENCE, blob)
    assert (reader.read_fd, inode.loaded) == (blob, True)
    late = files.register(KEY, descriptor(), writes=False)
    with inode.lock:
        inode.direct(late)
    assert late.read_fd == blob
    assert files.uses(REFERENCE.content)
    assert not files.uses(ContentKey(REFERENCE.content.digest, 1))
    with inode.lock:
        inode.become_plain()
    assert (reader.read_fd, late.read_fd) == (reader.own_fd, late.own_fd)
    os.fstat(blob)  # somebody may be reading from it this moment
    for handle in (reader, late):
        files.release(handle, nothing)
    with pytest.raises(OSError):
        os.fstat(blob)


def test_becoming_a_reference_twice_closes_both_in_the_end(files: OpenFiles, descriptor: Callable[[], int]) -> None:
    handle = files.register(KEY, descriptor(), writes=True)
    for _ in range(3):
        with handle.inode.lock:
            handle.inode.become_reference(REFERENCE, descriptor())
            handle.inode.become_plain()
    files.release(handle, nothing)


def test_readers_follow_a_published_file(files: OpenFiles, descriptor: Callable[[], int]) -> None:
    readers = [files.register(KEY, descriptor(), writes=False) for _ in range(2)]
    before = [handle.own_fd for handle in readers]
    blob, fresh = descriptor(), [descriptor() for _ in range(3)]
    files.follow(KEY, OTHER, REFERENCE, [blob, *fresh])
    assert files.get(KEY) is None
    inode = files.get(OTHER)
    assert inode is not None
    assert inode is readers[0].inode
    assert inode.key == OTHER
    assert {handle.own_fd for handle in readers} <= set(fresh)
    assert readers[0].own_fd != readers[1].own_fd
    assert readers[0].read_fd == readers[1].read_fd == blob
    assert os.pread(readers[0].read_fd, 9, 0) == b"bytes"
    for fd in before:
        os.fstat(fd)  # a reader may hold its number
    (spare,) = set(fresh) - {handle.own_fd for handle in readers}
    with pytest.raises(OSError):
        os.fstat(spare)
    for handle in readers:
        files.release(handle, nothing)
    assert len(files) == 0


def test_following_a_file_that_is_not_open(files: OpenFiles, descriptor: Callable[[], int]) -> None:
    descriptors = [descriptor(), descriptor()]
    files.follow(KEY, OTHER, REFERENCE, list(descriptors))
    assert len(files) == 0
    for fd in descriptors:
        with pytest.raises(OSError):
            os.fstat(fd)


# -- waiting for closes


def test_waiting_for_a_release_on_its_way(files: OpenFiles, descriptor: Callable[[], int]) -> None:
    handle = files.register(KEY, descriptor(), writes=True)
    handle.inode.dirty = True
    assert files.wait_until_closed(KEY, 0)  # nobody has closed it: nothing to wait for
    handle.flushed = True
    assert not files.wait_until_closed(KEY, _A_WHILE_S)
    assert not files.wait_until_closed(None, _A_WHILE_S)
    assert files.wait_until_closed(OTHER, 0)
    waiter = Worker(lambda: files.wait_until_closed(KEY, _PATIENCE_S))
    assert waiter.waits()
    files.release(handle, nothing)
    waiter.ends()
    assert files.wait_until_closed(None, 0)


def test_waiting_for_a_reader_that_may_have_closed(files: OpenFiles, descriptor: Callable[[], int]) -> None:
    reader = files.register(KEY, descriptor(), writes=False)
    assert files.wait_until_closed(KEY, _PATIENCE_S)  # nothing is to be done at its release
    files.settle_when_closed(KEY)
    assert not files.wait_until_closed(KEY, _A_WHILE_S)
    waiter = Worker(lambda: files.wait_until_closed(KEY, _PATIENCE_S))
    assert waiter.waits()
    files.release(reader, nothing)
    waiter.ends()
    assert files.wait_until_closed(None, 0)


def test_waiting_for_a_writer_that_may_have_closed(files: OpenFiles, descriptor: Callable[[], int]) -> None:
    writer = files.register(KEY, descriptor(), writes=True)
    writer.inode.dirty, writer.silent = True, True
    assert not files.wait_until_closed(KEY, _PATIENCE_S)  # nor for long
    waiter = Worker(lambda: files.wait_until_closed(KEY, _PATIENCE_S))
    assert waiter.waits()
    files.release(writer, nothing)
    waiter.ends()
    assert files.wait_until_closed(None, 0)


def test_waiting_for_releases_of_whatever_file(files: OpenFiles, descriptor: Callable[[], int]) -> None:
    """Each is waited for once."""
    silent = files.register(KEY, descriptor(), writes=True)
    silent.inode.dirty, silent.silent = True, True
    announced = files.register(OTHER, descriptor(), writes=True)
    announced.inode.dirty = announced.flushed = True
    waiter = Worker(lambda: files.wait_for_releases(_PATIENCE_S))
    assert waiter.waits()
    files.release(announced, nothing)
    waiter.ends()
    assert silent.outlasted
    files.wait_for_releases(_PATIENCE_S)
    # until another close() is seen
    silent.flushed, silent.outlasted = True, False
    waiter = Worker(lambda: files.wait_for_releases(_PATIENCE_S))
    assert waiter.waits()
    files.release(silent, nothing)
    waiter.ends()
