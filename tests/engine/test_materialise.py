"""A reference that is written to first gets its bytes; however that ends, no other path notices."""

import errno
import os
from collections.abc import Iterator
from typing import Any

import pytest

from dedupfs.backing import Backing

from .bench import BLOCK, ME, Bench, Killed, Mortal, Tampered, content

DATA = content("same", 5 * BLOCK + 17)


@pytest.fixture
def shared(bench: Bench) -> Iterator[Bench]:
    """Three references to one blob; whatever happens to the first, the others are read at the end."""
    for name in ("one", "two", "three"):
        bench.write(name, DATA)
        os.utime(bench.below(name), ns=(10**18, 10**18 + 7))
    bench.settle()
    assert bench.state("one") == "reference"
    yield bench
    assert bench.read("two") == bench.read("three") == DATA
    bench.settle()
    assert bench.duplicates("two") == (["one", "three"] if bench.read("one") == DATA else ["three"])


def test_reading_copies_nothing(shared: Bench) -> None:
    with shared.opened("one") as handle:
        assert shared.read_from(handle) == DATA
    assert shared.is_reference("one")
    assert shared.below("one").stat().st_blocks * 512 <= BLOCK


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND])
def test_opening_for_writing_copies(shared: Bench, flags: int) -> None:
    before = shared.below("one").stat()
    with shared.opened("one", flags):
        pass
    assert not shared.is_reference("one")
    assert shared.below("one").read_bytes() == DATA
    after = shared.below("one").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    shared.settle()
    assert shared.state("one") == "reference"  # nothing was written: it is what it was


@pytest.mark.parametrize("offset", [0, 1, BLOCK, len(DATA) - 1, len(DATA), len(DATA) + 3 * BLOCK])
def test_writing(shared: Bench, offset: int) -> None:
    shared.write_at("one", b"CHANGED", offset)
    expected = bytearray(DATA.ljust(offset, b"\0"))
    expected[offset : offset + 7] = b"CHANGED"
    assert shared.read("one") == bytes(expected)
    shared.settle()
    assert shared.state("one") == "plain"
    assert shared.read("one") == bytes(expected)


@pytest.mark.parametrize("size_bytes", [0, 1, BLOCK, BLOCK + 1, len(DATA) - 1, len(DATA), len(DATA) + 1, 20 * BLOCK])
def test_truncating(shared: Bench, size_bytes: int) -> None:
    shared.truncate("one", size_bytes)
    assert shared.read("one") == DATA[:size_bytes].ljust(size_bytes, b"\0")
    assert shared.is_reference("one") == (size_bytes == len(DATA))  # which changes no byte


@pytest.mark.parametrize("size_bytes", [0, BLOCK + 1])
def test_truncating_an_open_file(shared: Bench, size_bytes: int) -> None:
    with shared.opened("one", os.O_RDWR) as handle, shared.opened("one") as reader:
        shared.engine.vfs.truncate(None, handle, size_bytes, ME)
        assert shared.read_from(handle) == shared.read_from(reader) == DATA[:size_bytes]


def test_truncating_needs_no_copy(shared: Bench) -> None:
    """O_TRUNC and truncate to nothing do not even look at the blob; a shorter file copies only what is left."""
    calls: list[tuple[str, int]] = []

    class Counting(Backing):
        @staticmethod
        def copy_range(source: int, target: int, length: int) -> None:
            calls.append(("copy_range", length))
            Backing.copy_range(source, target, length)

    shared.reopen(backing=Counting(str(shared.source)))
    with shared.opened("one", os.O_WRONLY | os.O_TRUNC):
        pass
    assert calls == []
    shared.write("one", DATA)
    shared.settle()
    shared.truncate("one", 0)
    assert calls == []
    shared.write("one", DATA)
    shared.settle()
    assert shared.state("one") == "reference"
    shared.truncate("one", BLOCK)
    assert calls == [("copy_range", BLOCK)]


def test_fallocate(shared: Bench) -> None:
    with shared.opened("one", os.O_RDWR) as handle:
        shared.engine.vfs.io.fallocate(handle, 3, BLOCK, BLOCK, ME)  # punch a hole
    assert shared.read("one") == DATA[:BLOCK] + bytes(BLOCK) + DATA[2 * BLOCK :]


def test_readers_from_before_see_the_change(shared: Bench) -> None:
    with shared.opened("one") as reader:
        assert shared.read_from(reader) == DATA
        shared.write_at("one", b"CHANGED", 0)
        assert shared.read_from(reader) == b"CHANGED" + DATA[7:]
        shared.truncate("one", 3)
        assert shared.read_from(reader) == b"CHA"


def test_two_writers_at_once(shared: Bench) -> None:
    with shared.opened("one", os.O_RDWR) as first, shared.opened("one", os.O_RDWR) as second:
        shared.write_to(first, b"FIRST", 0)
        shared.write_to(second, b"SECOND", BLOCK)
        expected = b"FIRST" + DATA[5:BLOCK] + b"SECOND" + DATA[BLOCK + 6 :]
        assert shared.read_from(first) == shared.read_from(second) == expected


def test_a_hard_linked_reference_changes_under_all_its_names(shared: Bench) -> None:
    shared.link("one", "uno")
    shared.settle()
    shared.write_at("uno", b"CHANGED", 0)
    assert shared.read("one") == shared.read("uno") == b"CHANGED" + DATA[7:]
    shared.settle()
    assert shared.duplicates("one") == ["uno"]


def test_lazily_after_a_copy(shared: Bench) -> None:
    """cp makes a reference while both are open; the first write to the copy gives it bytes of its own."""
    with shared.opened("one") as source:
        target = shared.create_file("copy")
        assert shared.engine.vfs.io.copy_range(source, 0, target, 0, len(DATA), ME) == len(DATA)
        assert shared.is_reference("copy")
        assert shared.read_from(target) == DATA
        shared.write_to(target, b"MORE", len(DATA))
        assert not shared.is_reference("copy")
        assert shared.read_from(target) == DATA + b"MORE"
        shared.close_file(target)
    assert shared.read("copy") == DATA + b"MORE"


def test_a_copy_is_a_reference(shared: Bench) -> None:
    blocks = shared.engine.vfs.statfs(b"").f_bfree
    assert shared.copy("one", "copy") == len(DATA)
    assert shared.is_reference("copy")
    assert shared.read("copy") == DATA
    assert blocks - shared.engine.vfs.statfs(b"").f_bfree <= 8
    shared.unlink("copy")


def test_a_copy_of_a_settled_plain_file_shares_it(bench: Bench) -> None:
    bench.write("one", DATA)
    bench.settle()
    assert bench.state("one") == "plain"
    assert bench.copy("one", "copy") == len(DATA)
    bench.settle()
    assert bench.state("one") == bench.state("copy") == "reference"
    assert bench.duplicates("one") == ["copy"]
    assert bench.read("one") == bench.read("copy") == DATA


@pytest.mark.parametrize("change", ["pending", "open", "partial", "offset", "small"])
def test_a_copy_of_anything_else_is_of_bytes(bench: Bench, change: str) -> None:
    data = DATA[:100] if change == "small" else DATA
    bench.write("one", data)
    if change != "pending":
        bench.settle()
    with bench.opened("one", os.O_RDWR if change == "open" else os.O_RDONLY) as source:
        target = bench.create_file("copy")
        offset = BLOCK if change == "offset" else 0
        length = BLOCK if change == "partial" else len(data) - offset
        done = 0
        while done < length:
            done += bench.engine.vfs.io.copy_range(source, offset + done, target, done, length - done, ME)
        assert not bench.is_reference("copy")
        bench.close_file(target)
    assert bench.read("copy") == data[offset : offset + length]


def test_a_full_disk_leaves_the_reference(shared: Bench) -> None:
    """Opening for writing fails with what the filesystem says, and nothing has changed."""
    backing = Tampered(shared.source)
    shared.reopen(backing=backing)

    def full(name: str, arguments: tuple[object, ...]) -> None:
        if name == "copy_range":
            raise OSError(errno.ENOSPC, "full")

    backing.before = full
    before = shared.below("one").stat()
    with pytest.raises(OSError) as caught:
        shared.open_file("one", os.O_RDWR)
    assert caught.value.errno == errno.ENOSPC
    assert shared.is_reference("one")
    assert shared.read("one") == DATA
    after = shared.below("one").stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    backing.before = lambda name, arguments: None


def test_a_copy_that_fails_half_way_leaves_the_reference(shared: Bench) -> None:
    backing = Tampered(shared.source)
    shared.reopen(backing=backing)

    def failing(name: str, arguments: tuple[object, ...]) -> None:
        if name == "copy_range":
            source, target, _ = arguments
            assert isinstance(source, int)
            assert isinstance(target, int)
            os.pwrite(target, os.pread(source, 2 * BLOCK + 5, 0), 0)
            raise OSError(errno.EIO, "rotten disk")

    backing.before = failing
    with pytest.raises(OSError) as caught:
        shared.open_file("one", os.O_WRONLY)
    assert caught.value.errno == errno.EIO
    backing.before = lambda name, arguments: None
    assert shared.read("one") == DATA
    shared.write_at("one", b"CHANGED", 0)
    assert shared.read("one") == b"CHANGED" + DATA[7:]


def _die_in_materialising(bench: Bench, *, data_bytes: int) -> None:
    """Open for writing, and be killed with so much copied."""
    backing = Tampered(bench.source)
    bench.reopen(backing=backing)

    def kill(name: str, arguments: tuple[object, ...]) -> None:
        if name == "copy_range":
            source, target, _ = arguments
            assert isinstance(source, int)
            assert isinstance(target, int)
            os.pwrite(target, os.pread(source, data_bytes, 0), 0)
            raise Killed

    backing.before = kill
    with pytest.raises(Killed):
        bench.open_file("one", os.O_RDWR)
    bench.crash()


@pytest.mark.parametrize("data_bytes", [0, 2 * BLOCK, len(DATA)])
def test_abandoned_and_read(shared: Bench, data_bytes: int) -> None:
    """The mark says that the blob is the truth, whatever is in the file's own blocks."""
    _die_in_materialising(shared, data_bytes=data_bytes)
    shared.open()
    assert shared.read("one") == DATA
    assert os.stat(shared.below("one")).st_size == len(DATA)
    shared.scan()
    assert shared.below("one").stat().st_blocks * 512 <= BLOCK  # mended


@pytest.mark.parametrize("data_bytes", [0, 2 * BLOCK, len(DATA)])
def test_abandoned_and_written(shared: Bench, data_bytes: int) -> None:
    _die_in_materialising(shared, data_bytes=data_bytes)
    shared.open()
    shared.write_at("one", b"CHANGED", len(DATA) - 7)
    assert shared.read("one") == DATA[:-7] + b"CHANGED"
    shared.scan()


@pytest.mark.parametrize("size_bytes", [0, 1, 3 * BLOCK])
def test_abandoned_and_truncated(shared: Bench, size_bytes: int) -> None:
    _die_in_materialising(shared, data_bytes=2 * BLOCK)
    shared.open()
    shared.truncate("one", size_bytes)
    assert shared.read("one") == DATA[:size_bytes]
    shared.scan()


def test_abandoned_and_reconciled(shared: Bench) -> None:
    _die_in_materialising(shared, data_bytes=2 * BLOCK)
    shared.recover()
    assert shared.state("one") == "reference"
    assert shared.below("one").stat().st_mtime_ns == 10**18 + 7
    shared.close()
    assert shared.checks() == []
    shared.open()


def test_another_file_comes_to_the_path_while_a_copy_is_undone(shared: Bench) -> None:
    """A program that was killed with the daemon saves once more, by a rename: that file is not what is undone."""
    _die_in_materialising(shared, data_bytes=2 * BLOCK)
    backing = Tampered(shared.source)
    shared.open(backing=backing)
    saved = content("saved anew", len(DATA))
    shared.write("draft", saved)

    def rename(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "fread_reference" and backing.path_of(arguments[0]) == b"one":  # the mark was seen
            backing.after = lambda name, arguments: None
            shared.rename("draft", "one")

    backing.after = rename
    shared.scan()
    assert not shared.below("draft").exists()
    assert shared.read("one") == saved


ACTIONS = {
    "write": lambda bench: bench.write_at("one", b"CHANGED", 0),
    "overwrite": lambda bench: bench.write("one", b"CHANGED"),
    "truncate": lambda bench: bench.truncate("one", 2 * BLOCK + 5),
    "empty": lambda bench: bench.truncate("one", 0),
    "extend": lambda bench: bench.truncate("one", 9 * BLOCK),
    "copy": lambda bench: bench.copy("one", "copy"),
    "unlink": lambda bench: bench.unlink("one"),
    "rename over": lambda bench: bench.rename("two", "one"),
    "restore": lambda bench: bench.engine.restore([b"one"], lambda phase, done, total: None),
}


@pytest.mark.parametrize("bench", [("reference", "ext4"), ("reference", "xfs")], indirect=True, ids="-".join)
@pytest.mark.parametrize("action", ACTIONS)
def test_killed_at_every_step(bench: Bench, action: str) -> None:
    """Killed at each system call in turn, then found as before the action, or as after it, and never otherwise."""
    possible: dict[str, list[bytes | None]] = {
        "write": [b"CHANGED" + DATA[7:]],
        "overwrite": [b"CHANGED", b""],
        "truncate": [DATA[: 2 * BLOCK + 5]],
        "empty": [b""],
        "extend": [DATA.ljust(9 * BLOCK, b"\0")],
        "unlink": [None],
    }
    after = possible.get(action, [DATA])
    for name in ("one", "two", "three"):
        bench.write(name, DATA)
    bench.settle()
    bench.close()
    for step in range(100):
        backing = Mortal(bench.source, step)
        bench.open(backing=backing)
        backing.armed = True
        try:
            ACTIONS[action](bench)
            bench.settle()
        except Killed:
            pass
        backing.armed = False
        survived = not backing.dead
        bench.crash()
        bench.open()  # an app may come before the tree has been walked
        found = bench.read("one") if "one" in bench.names() else None
        assert found in [DATA, *after], f"killed at {backing.calls[-1]}, step {step}"
        if "copy" in bench.names():
            assert bench.read("copy") in (DATA, b"")
        bench.scan()
        found_later = bench.read("one") if "one" in bench.names() else None
        assert found_later == found, f"killed at {backing.calls[-1]}, step {step}"
        if action != "rename over":
            assert bench.read("two") == DATA
        assert bench.read("three") == DATA
        for name in ("one", "copy"):
            if name in bench.names() and len(bench.read(name)) < len(DATA):
                bench.append(name, b"more")  # whatever was left of a record must not be in the way
                assert bench.read(name).endswith(b"more")
        bench.settle()
        bench.close()
        assert bench.checks() == [], f"killed at {backing.calls[-1]}, step {step}"
        bench.open()
        for name in ("one", "two"):
            if name not in bench.names() or not bench.is_reference(name):
                bench.write(name, DATA)
        if "copy" in bench.names():
            bench.unlink("copy")
        bench.settle()
        assert bench.state("one") == bench.state("two") == bench.state("three") == "reference"
        bench.close()
        if survived:
            break
    else:
        pytest.fail("it never came to its end")
    assert step > 0
    bench.open()
