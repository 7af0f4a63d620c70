"""Sharing beside apps that have the files open: readers notice nothing, writers do not wait, nothing is forgotten."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import xxhash

from dedupfs.digest import Checkpoint, hash_descriptor, proceed
from dedupfs.model import Digest
from dedupfs.openfiles import Key, Watch
from dedupfs.vfs import Attributes

from .bench import BLOCK, ME, Bench, Meeting, content, few_bits, impatient, in_thread
from .test_sharing import every_strategy

DATA = content("same", 4 * BLOCK + 3)


class HeldHasher:
    """A hasher that stops in the middle of a file, the first time, until the test lets it go on."""

    def __init__(self) -> None:
        self.meeting = Meeting()
        self.ended = threading.Event()

    def __call__(self, fd: int, checkpoint: Checkpoint = proceed) -> Digest:
        try:
            checkpoint()
            self.meeting.wait()
            return hash_descriptor(fd, checkpoint)
        finally:
            self.ended.set()


# -- readers


def test_publishing_under_a_reader(bench: Bench) -> None:
    """The known file is open when it becomes a blob: its reader goes on, and acts on the reference from then on."""
    bench.write("one", DATA)
    bench.settle()
    with bench.opened("one") as reader:
        bench.write("two", DATA)
        bench.settle()
        assert bench.state("one") == bench.state("two") == "reference"
        assert bench.read_from(reader) == DATA
        with bench.opened("one") as later:
            assert bench.read_from(later) == DATA
            assert later.inode is reader.inode
        # what is done through the old descriptor is done to the file, not to the blob
        bench.engine.vfs.chmod(None, reader, 0o604)
        bench.engine.vfs.chown(None, reader, os.geteuid(), os.getegid())
        assert bench.below("one").stat().st_mode & 0o7777 == 0o604
        assert bench.the_blob().stat().st_mode & 0o7777 == 0o400
        seen: Attributes = bench.engine.vfs.getattr_open(reader)
        assert seen.st.st_ino == bench.below("one").stat().st_ino
        assert seen.st.st_size == len(DATA)
        assert seen.blocks == (len(DATA) + BLOCK - 1) // BLOCK * 8  # of its content
        bench.engine.vfs.io.fsync(reader, data_only=False)
        bench.engine.vfs.io.fsync(reader, data_only=True)
        # and it sees what is written afterwards
        bench.write_at("one", b"CHANGED", 3)
        assert bench.read_from(reader) == DATA[:3] + b"CHANGED" + DATA[10:]
    assert bench.read("two") == DATA
    bench.settle()


def test_several_readers_of_the_known_file(bench: Bench) -> None:
    bench.write("one", DATA)
    bench.settle()
    readers = [bench.open_file("one") for _ in range(5)]
    bench.write("two", DATA)
    bench.settle()
    assert bench.state("one") == "reference"
    for number, reader in enumerate(readers):
        assert bench.read_from(reader) == DATA
        if number % 2:
            bench.close_file(reader)
    bench.write("two", b"")
    bench.write_at("one", b"CHANGED", 0)
    assert bench.read_from(readers[0]) == b"CHANGED" + DATA[7:]
    for reader in readers[::2]:
        bench.close_file(reader)
    bench.settle()


def test_copying_an_open_plain_file_publishes_it(bench: Bench) -> None:
    bench.write("one", DATA)
    bench.settle()
    with bench.opened("one") as reader:
        bench.copy("one", "two")
        assert bench.is_reference("one")
        assert bench.read_from(reader) == DATA


def test_the_new_file_waits_for_its_reader(bench: Bench) -> None:
    """Its own inode goes: that has to wait until nobody reads it."""
    bench.write("one", DATA)
    bench.settle()
    bench.write("two", DATA)
    with bench.opened("two") as reader, bench.opened("two") as other:
        bench.settle()
        assert not bench.is_reference("two")
        assert bench.duplicates("two") == ["one"]  # known, if not shared
        assert bench.read_from(reader) == bench.read_from(other) == DATA
    bench.settle()
    assert bench.state("two") == "reference"
    assert bench.status()["stored_bytes"] == len(DATA)


def test_the_new_file_is_closed_while_it_is_compared(bench: Bench) -> None:
    """No close falls between the look at who has it open and the wait for them."""
    bench.write("one", DATA)
    bench.settle()
    bench.write("two", DATA)
    reader = bench.open_file("two")
    original = bench.engine.openfiles.settle_when_closed

    def closing(key: object) -> bool:
        bench.close_file(reader)
        return original(key)  # type: ignore[arg-type]

    bench.engine.openfiles.settle_when_closed = closing  # type: ignore[method-assign]
    bench.settle()
    assert bench.state("two") == "reference"


@every_strategy
def test_readers_and_sharing_at_once(bench: Bench) -> None:
    """Readers open, read, look and close all the time; each finds the whole content, and no descriptor is lost."""
    bench.reopen(start=True)
    stop = threading.Event()
    names = [f"copy {number}" for number in range(6)]
    for name in names:
        bench.write(name, b"")

    def read_on() -> None:
        while not stop.is_set():
            for name in names:
                with bench.opened(name) as handle:
                    st = bench.engine.vfs.getattr_open(handle).st
                    data = bench.read_from(handle)
                    assert data in (b"", DATA) or DATA.startswith(data)
                    assert st.st_size <= len(DATA)
                time.sleep(0.001)

    with in_thread(read_on), in_thread(read_on):
        for round_number in range(4):
            for name in names:
                bench.write(name, DATA)
                if round_number % 2:
                    bench.settle()
            bench.settle()
            for name in names[::2]:
                bench.write_at(name, b"", 0)
        stop.set()
    bench.settle()
    assert all(bench.read(name) == DATA for name in names)
    assert bench.refs(names[0]) == len(names)


# -- writers


@every_strategy
def test_files_open_for_writing_wait(bench: Bench) -> None:
    bench.write("one", DATA)
    bench.settle()
    bench.write("two", DATA)
    with bench.opened("two", os.O_RDWR):
        bench.settle()
        assert not bench.is_reference("two")
        with pytest.raises(OSError):
            bench.digest("two")
    bench.settle()
    assert bench.duplicates("two") == ["one"]
    assert bench.state("two") != "plain"


@every_strategy
def test_a_reader_who_stays_does_not_hold_up_what_waited_for_a_writer(bench: Bench) -> None:
    """The file was pending when somebody opened it to write, and did not; a reader has it open all the time."""
    bench.write("file", DATA)
    bench.settle()
    known = bench.digest("file")
    bench.truncate("file", 5)
    with bench.opened("file"):
        with bench.opened("file", os.O_RDWR):
            bench.engine._work_off(impatient())
        bench.engine._work_off(impatient())
        assert bench.digest("file") == xxhash.xxh3_128_hexdigest(DATA[:5]) != known


def test_a_known_file_open_for_writing_is_left_alone(bench: Bench) -> None:
    """Nobody knows what it will be: equal or not is found out when it is closed."""
    bench.write("one", DATA)
    bench.write("other", DATA)
    bench.settle()
    bench.unlink("other")
    bench.write("one", b"")
    bench.write("one", DATA)
    bench.settle()
    with bench.opened("one", os.O_RDWR):
        bench.write("two", DATA)
        bench.settle()
        assert bench.read("two") == DATA
    bench.settle()
    assert bench.duplicates("two") == ["one"]
    assert bench.state("one") == bench.state("two") != "plain"


def test_a_hash_alone_never_says_equal(bench: Bench) -> None:
    """The same with a hash that says equal of all: bytes were not compared, so nothing may be concluded."""
    bench.reopen(hasher=few_bits(0))
    other = content("other", len(DATA))
    for name, data in (("one", DATA), ("two", other)):
        bench.write(name, b"")
        bench.write_at(name, data[BLOCK:], BLOCK)
        bench.write_at(name, data[:BLOCK], 0)
        if name == "one":
            bench.settle()
            held = bench.open_file("one", os.O_RDWR)
    bench.settle()
    assert bench.duplicates("two") == []
    bench.close_file(held)
    bench.settle()
    assert bench.duplicates("one") == bench.duplicates("two") == []
    assert bench.read("one") == DATA
    assert bench.read("two") == other


class Held(Watch):
    """Stops at the second piece, until the test lets it go on."""

    meeting: Meeting
    pieces: int

    def checkpoint(self) -> None:
        self.pieces += 1
        if self.pieces == 2:
            self.meeting.wait()
        super().checkpoint()


@pytest.mark.parametrize("who", ["new", "known"])
@every_strategy
def test_a_writer_does_not_wait_for_a_comparison(bench: Bench, who: str) -> None:
    """Two large files are compared; a writer comes to one of them: comparing ends at once, and is made up for later."""
    large = content("large", (20 << 20) if bench.share == "reflink" else (6 << 20))
    bench.write("known", large)
    bench.settle()
    bench.write("new", large)
    openfiles, key = bench.engine.openfiles, bench.key(who)
    watch = openfiles.watch
    held = Held(key)
    held.meeting, held.pieces = Meeting(), 0

    @contextmanager
    def watch_held(of: Key) -> Iterator[Watch]:
        with watch(of) as made:
            if of == key:
                openfiles._watches[of] = made = held
            yield made

    openfiles.watch = watch_held  # type: ignore[assignment, method-assign]
    with in_thread(bench.settle):
        held.meeting.reached()
        with in_thread(lambda: bench.write_at(who, b"CHANGED", 5)) as writer:
            assert not writer.ended(0.1)  # not before the comparison has let go
            openfiles.watch = watch  # type: ignore[method-assign]
            held.meeting.release()
        assert held.pieces <= 3  # not on to the end of the file
    bench.settle()
    assert bench.read(who) == large[:5] + b"CHANGED" + large[12:]
    assert bench.read("known" if who == "new" else "new") == large
    assert bench.duplicates("new") == []


def test_a_writer_does_not_wait_for_hashing(bench: Bench) -> None:
    hasher = HeldHasher()
    bench.reopen(hasher=hasher)
    bench.write("one", DATA)
    bench.write_at("one", b"X", 0)  # not written from start to end: it has to be hashed
    with in_thread(bench.settle):
        hasher.meeting.reached()
        with in_thread(lambda: bench.write_at("one", b"Y", 0)) as writer:
            assert not writer.ended(0.1)
            hasher.meeting.release()
    bench.settle()
    assert bench.read("one") == b"Y" + DATA[1:]
    bench.write("two", b"Y" + DATA[1:])
    bench.settle()
    assert bench.duplicates("one") == ["two"]


def test_nobody_waits_for_a_comparison_who_does_not_write(bench: Bench) -> None:
    """Readers, names and attributes go on beside it."""
    hasher = HeldHasher()
    bench.reopen(hasher=hasher)
    bench.write("one", DATA)
    bench.write_at("one", b"X", 0)
    with in_thread(bench.settle):
        hasher.meeting.reached()
        assert bench.read("one") == b"X" + DATA[1:]
        bench.engine.vfs.chmod(b"one", None, 0o640)
        bench.write("two", DATA)
        bench.rename("one", "uno")
        bench.mkdir("d")
        assert bench.names() == ["d", "two", "uno"]
        hasher.meeting.release()
    bench.settle()
    assert bench.read("uno") == b"X" + DATA[1:]
    assert bench.duplicates("uno") == []
    assert bench.below("uno").stat().st_mode & 0o7777 == 0o640


def test_a_write_from_outside_while_hashing_is_noticed(bench: Bench) -> None:
    """A lease tells of a writer that goes around the mount, even one that puts the times back."""
    hasher = HeldHasher()
    bench.reopen(hasher=hasher)
    bench.write("one", DATA)
    bench.write_at("one", b"X", 0)

    def write() -> None:
        with open(bench.below("one"), "r+b") as file:  # held up by the lease
            file.write(b"OUTSIDE")

    with in_thread(bench.settle):
        hasher.meeting.reached()
        with in_thread(write):
            time.sleep(0.1)
            hasher.meeting.release()
    bench.scan()
    assert bench.read("one") == b"OUTSIDE" + DATA[7:]
    bench.write("two", b"OUTSIDE" + DATA[7:])
    bench.settle()
    assert bench.duplicates("one") == ["two"]


# -- pending


def test_asking_a_file_that_is_being_written(bench: Bench) -> None:
    """There is no answer yet, and nobody waits a minute for one."""
    with bench.opened_new("one") as handle:
        bench.write_to(handle, DATA)
        start = time.monotonic()
        with pytest.raises(OSError):
            bench.digest("one")
        assert time.monotonic() - start < 5
    bench.settle()
    assert bench.digest("one")


def test_close_leaves_what_is_pending_for_the_next_start(bench: Bench) -> None:
    for number in range(5):
        bench.write(f"file {number}", content(f"{number % 2}"))
    assert bench.status()["pending"] == 5
    bench.reopen()
    assert bench.status()["pending"] == 5
    assert (bench.source / ".dedupfs/clean").exists() is False
    bench.settle()
    assert bench.duplicates("file 0") == ["file 2", "file 4"]


def test_files_still_open_at_the_end_are_pending_at_the_next_start(bench: Bench) -> None:
    """The kernel may take down a mount before it has told of the last close."""
    bench.write("known", DATA)
    bench.settle()
    new = bench.create_file("new")
    bench.write_to(new, DATA)
    changed = bench.open_file("known", os.O_RDWR)
    bench.write_to(changed, b"CHANGED")
    bench.open_file("known")
    bench.close()
    assert bench.checks() == []
    bench.open()
    bench.settle()
    assert bench.read("new") == DATA
    assert bench.read("known") == b"CHANGED" + DATA[7:]
    assert bench.duplicates("new") == []
    bench.write("third", DATA)
    bench.settle()
    assert bench.duplicates("new") == ["third"]


def test_settle_waits_for_closes_on_their_way(bench: Bench) -> None:
    """close() has returned to the app, its release is still to come."""
    bench.reopen(start=True)
    handle = bench.create_file("one")
    bench.write_to(handle, DATA)
    bench.engine.vfs.io.flush(handle)
    late = threading.Timer(0.3, lambda: bench.engine.vfs.io.release(handle))
    late.start()
    bench.engine.settle(impatient())
    late.join()
    assert bench.digest("one")
    assert bench.engine.openfiles.get(bench.key("one")) is None


def test_append_by_two_handles(bench: Bench) -> None:
    with bench.opened_new("one"):
        pass
    first = bench.open_file("one", os.O_WRONLY | os.O_APPEND)
    second = bench.open_file("one", os.O_WRONLY | os.O_APPEND)
    for number in range(10):
        bench.write_to(first if number % 2 else second, b"%d" % number, 0)
    bench.close_file(first)
    bench.close_file(second)
    assert bench.read("one") == b"0123456789"
    assert ME.pid == os.getpid()


def test_asking_while_a_release_is_on_its_way(bench: Bench) -> None:
    """close() has returned, and nothing was to be settled at the release when the question came."""
    other = content("other")
    bench.put("file", DATA)
    bench.reopen(start=True)
    bench.settle()
    bench.below("file").write_bytes(other)  # behind our back: what is known of it is not true any more
    handle = bench.open_file("file", os.O_RDWR)
    bench.engine.vfs.io.flush(handle)
    found: list[str] = []
    with in_thread(lambda: found.append(bench.digest("file"))):
        bench.wait_for(lambda: handle.inode.resettle)
        bench.engine.vfs.io.release(handle)
    assert found == [xxhash.xxh3_128_hexdigest(other)]
