"""What has to be done before what, as system calls: mistakes that no kill of a process shows, only a loss of power.

Each test records the calls that are made on the source, and looks at the order of those that matter. What the order is
for stands in the docstring of `dedupfs.sharing` and in docs/format.md.
"""

import errno
import fcntl
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dedupfs import backing as backing_module
from dedupfs import fileio
from dedupfs.backing import Backing
from dedupfs.model import Reference
from dedupfs.store import BLOBS

from .bench import BLOCK, ME, Bench, Tampered, content

DATA = content("same", 3 * BLOCK + 100)


class Recorded(Tampered):
    """Keeps every call with its first argument: a path, or the inode of a descriptor."""

    def __init__(self, source: Path, *, ordered: bool = True) -> None:
        self.calls: list[tuple[str, object]] = []
        super().__init__(source)
        self.orders_metadata = ordered
        self.before = self._record

    def _record(self, name: str, arguments: tuple[Any, ...]) -> None:
        first = arguments[0] if arguments else None
        self.calls.append((name, os.fstat(first).st_ino if isinstance(first, int) else first))

    def place(self, name: str, subject: object = None) -> int:
        """Where the first such call is; of anything, or of one file. Fails the test when it was never made."""
        for number, (called, of) in enumerate(self.calls):
            if called == name and (subject is None or of == subject):
                return number
        raise AssertionError(f"{name} of {subject!r} was not called, only {self.calls}")

    def renamed_from_staging(self, purpose: bytes) -> tuple[int, int]:
        """Where a staged reference was renamed into the tree, and the inode it has."""
        for number, (name, path) in enumerate(self.calls):
            if name == "rename" and isinstance(path, bytes) and path.startswith(b".dedupfs/staging/" + purpose):
                return number, self._staged[path]
        raise AssertionError(f"nothing was renamed for {purpose!r}: {self.calls}")

    def watch_staging(self) -> None:
        """From now on, remember which inode a staged name had."""
        self._staged: dict[bytes, int] = {}
        record = self.before

        def look(name: str, arguments: tuple[Any, ...]) -> None:
            record(name, arguments)
            if name == "rename" and arguments[0].startswith(b".dedupfs/staging/"):
                self._staged[arguments[0]] = os.lstat(os.path.join(self.source, arguments[0])).st_ino

        self.before = look


def recorded(bench: Bench, *, ordered: bool = True) -> Recorded:
    backing = Recorded(bench.source, ordered=ordered)
    bench.reopen(backing=backing)
    backing.watch_staging()
    return backing


def share(bench: Bench, *names: str) -> None:
    for name in names:
        bench.write(name, DATA)
        bench.settle()


# -- sharing


def test_a_file_is_flushed_before_it_becomes_a_blob(bench: Bench) -> None:
    backing = recorded(bench)
    bench.write("one", DATA)
    known = bench.key("one").ino
    share(bench, "two")
    assert backing.place("fdatasync", known) < backing.place("link", known)


def test_a_file_is_flushed_before_a_copy_refers_to_it(bench: Bench) -> None:
    share(bench, "one")
    backing = recorded(bench)
    known = bench.key("one").ino
    bench.copy("one", "two")
    assert bench.is_reference("two")
    copied = backing.place("fset_reference", bench.key("two").ino)
    assert backing.place("fdatasync", known) < backing.place("link", known) < copied


def test_a_good_copy_is_flushed_before_it_heals(bench: Bench) -> None:
    share(bench, "one", "two")
    blob = bench.the_blob()
    backing = recorded(bench)
    with open(blob, "rb") as file:
        Backing.fset_immutable(file.fileno(), immutable=False)
    blob.write_bytes(bytes(len(DATA)))
    bench.expect_log("was damaged; healed with")
    bench.write("three", DATA)
    good = bench.key("three").ino
    bench.settle()
    assert bench.read("one") == DATA
    assert backing.place("fdatasync", good) < backing.place("link", good)


def test_where_metadata_keep_no_order_each_step_is_flushed(bench: Bench) -> None:
    backing = recorded(bench, ordered=False)
    bench.write("one", DATA)
    known = bench.key("one").ino
    share(bench, "two")
    key = bench.blob_of("one")
    directory = b"%s/%02x" % (BLOBS, key.digest[0])
    published, inode_of_one = backing.renamed_from_staging(b"publish")
    referred, inode_of_two = backing.renamed_from_staging(b"refer")
    linked = backing.place("link", known)
    assert linked < backing.place("fsync_directory", directory) < published
    assert linked < backing.place("fsync_directory", BLOBS) < published
    assert backing.place("fsync", inode_of_one) < published
    assert backing.place("fsync", inode_of_two) < referred


def test_the_last_reference_is_gone_for_good_before_its_blob_is(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    backing = recorded(bench, ordered=False)
    share(bench, "one", "two")
    blob = backing_path(bench)
    sync = os.sync

    def record() -> None:
        backing.calls.append(("os.sync", None))
        sync()

    monkeypatch.setattr(os, "sync", record)
    for name in ("one", "two"):
        bench.unlink(name)
    bench.settle()
    assert bench.blobs() == []
    assert backing.place("unlink", b"two") < backing.place("os.sync") < backing.place("unlink", blob)


def backing_path(bench: Bench) -> bytes:
    return os.fsencode(bench.the_blob().relative_to(bench.source))


# -- materialising, and back


def test_the_mark_is_there_from_before_the_copy_until_it_is_flushed(bench: Bench) -> None:
    share(bench, "one", "two")
    backing = recorded(bench)
    inode = bench.key("two").ino
    bench.write_at("two", b"CHANGED", 0)
    marked = backing.place("fset_reference", inode)
    assert marked < backing.place("copy_range") < backing.place("fsync", inode)
    assert backing.place("fsync", inode) < backing.place("fremove_reference", inode)
    assert bench.read("two") == b"CHANGED" + DATA[7:]


@pytest.mark.parametrize("holes", [True, False], ids=["with holes", "without"])
@pytest.mark.parametrize("bench", [("reference", "ext4"), ("reference", "xfs")], indirect=True, ids="-".join)
def test_an_unfinished_copy_is_gone_before_its_mark_is(bench: Bench, holes: bool) -> None:
    """The disk is full when all but the flush is done; where a filesystem punches no holes it goes another way."""
    share(bench, "one", "two")
    backing = recorded(bench)
    inode = bench.key("two").ino
    left = []

    def fail(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "fsync":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if name == "punch" and not holes:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if name == "fset_reference" and isinstance(arguments[1], Reference) and not arguments[1].materialising:
            left.append(Backing.has_data(arguments[0]))

    backing.before = fail
    with pytest.raises(OSError) as refused:
        bench.write_at("two", b"CHANGED", 0)
    backing.before = backing._record
    assert refused.value.errno == errno.ENOSPC
    assert left == [False], "the blob is the truth no longer, and the copy still is there"
    assert bench.key("two").ino == inode
    assert bench.is_reference("two")
    assert bench.read("two") == DATA


def test_truncating_a_reference_begins_with_its_size(bench: Bench) -> None:
    share(bench, "one", "two")
    backing = recorded(bench)
    inode = bench.key("two").ino
    bench.truncate("two", 0)
    assert backing.place("ftruncate", inode) < backing.place("fremove_reference", inode)


def test_a_copy_becomes_a_reference_by_its_record_first(bench: Bench) -> None:
    share(bench, "one", "two")
    backing = recorded(bench)
    bench.copy("one", "three")
    inode = bench.key("three").ino
    assert backing.place("fset_reference", inode) < backing.place("ftruncate", inode)


@pytest.mark.parametrize("bench", [("reference", "ext4"), ("reference", "xfs")], indirect=True, ids="-".join)
@pytest.mark.parametrize("size_bytes", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 100])
def test_punching_leaves_no_block(bench: Bench, size_bytes: int) -> None:
    """To the exact size, the last block would be kept, full of zeros."""
    with open(bench.put("file", content("any", size_bytes)), "r+b") as file:
        os.fsync(file.fileno())
        bench.engine.backing.punch(file.fileno(), size_bytes)
        assert not Backing.has_data(file.fileno())
        assert os.fstat(file.fileno()).st_size == size_bytes


# -- a blob that gets an inode of its own


def test_a_detached_blob_is_flushed_before_it_takes_the_place(bench: Bench) -> None:
    share(bench, "one", "two")
    backing = recorded(bench)
    content_key = bench.blob_of("one")
    backing.calls.clear()
    bench.engine.blobs.detach(content_key)
    assert backing.place("copy_range") < backing.place("fsync") < backing.place("rename")
    assert bench.read("one") == bench.read("two") == DATA


def test_a_detached_blob_is_compared_before_it_takes_the_place(bench: Bench) -> None:
    share(bench, "one", "two")
    backing = recorded(bench)
    before = bench.the_blob().stat().st_ino

    def spoil(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "copy_range":
            os.pwrite(arguments[1], b"X", BLOCK)

    backing.after = spoil
    with pytest.raises(OSError, match="differs"):
        bench.engine.blobs.detach(bench.blob_of("one"))
    assert bench.the_blob().stat().st_ino == before
    assert bench.read("one") == DATA
    bench.close()
    bench.open()  # what it left in staging goes
    assert bench.inside("staging") == []


# -- what an app asked for


def test_fsync_of_a_reference_flushes_its_blob_itself_and_its_name(bench: Bench) -> None:
    bench.mkdir("d")
    share(bench, "d/one", "d/two")
    backing = recorded(bench)
    with bench.opened("d/two") as handle:
        bench.engine.vfs.io.fsync(handle, data_only=False)
    assert backing.place("fsync", bench.the_blob().stat().st_ino) < backing.place("fsync", bench.key("d/two").ino)
    assert backing.place("fsync_directory", b"d")


@pytest.mark.parametrize("data_only", [False, True])
def test_fsync_of_a_plain_file_flushes_it(bench: Bench, data_only: bool) -> None:
    bench.write("one", DATA)
    backing = recorded(bench)
    with bench.opened("one", os.O_RDWR) as handle:
        bench.write_to(handle, b"CHANGED")
        bench.engine.vfs.io.fsync(handle, data_only=data_only)
    assert backing.place("fdatasync" if data_only else "fsync", bench.key("one").ino)


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC])
def test_who_opens_with_o_sync_writes_with_it(bench: Bench, flag: int) -> None:
    for handle in (
        bench.engine.vfs.create(b"new", os.O_RDWR | os.O_CREAT | os.O_EXCL | flag, 0o100644, ME),
        bench.open_file("new", os.O_WRONLY | flag),
    ):
        assert fcntl.fcntl(handle.own_fd, fcntl.F_GETFL) & flag == flag
        bench.close_file(handle)


@pytest.mark.parametrize("opened_again", [False, True])
def test_fdatasync_of_a_materialised_file_flushes_that_its_mark_is_gone(bench: Bench, opened_again: bool) -> None:
    """ext4's own fdatasync leaves xattrs out: with the mark back after a power loss, the blob would be the truth."""
    share(bench, "one", "two")
    inode = bench.key("two").ino
    backing = recorded(bench)
    if opened_again:
        bench.append("two", b"appended")
    with bench.opened("two", os.O_RDWR) as handle:
        bench.write_to(handle, b"CHANGED")
        unmarked = backing.place("fremove_reference", inode)
        before = len(backing.calls)
        bench.engine.vfs.io.fsync(handle, data_only=True)
        assert unmarked < before
        assert backing.calls[before:] == [("fsync", inode)]
        # once is enough
        bench.write_to(handle, b"CHANGED AGAIN")
        bench.engine.vfs.io.fsync(handle, data_only=True)
        assert backing.calls[-1] == ("fdatasync", inode)


@pytest.mark.parametrize("lazily", [False, True])
def test_o_dsync_flushes_that_the_mark_is_gone(bench: Bench, lazily: bool) -> None:
    share(bench, "one", "two")
    backing = recorded(bench)
    if lazily:  # an empty file that becomes a reference by a copy, while it is open
        handle = bench.engine.vfs.create(b"copy", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DSYNC, 0o100644, ME)
        with bench.opened("one") as source:
            assert bench.engine.vfs.io.copy_range(source, 0, handle, 0, len(DATA), ME) == len(DATA)
    else:
        handle = bench.open_file("two", os.O_WRONLY | os.O_DSYNC)
    bench.write_to(handle, b"CHANGED")
    inode = os.fstat(handle.own_fd).st_ino
    after = backing.calls[backing.place("fremove_reference", inode) :]
    assert ("fsync", inode) in after
    bench.close_file(handle)


def test_what_is_known_to_be_unflushed_has_an_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fileio, "_MOST_UNMARKED", 3)
    names = [f"{number}" for number in range(8)]
    share(bench, *names)
    backing = recorded(bench)
    for name in names:
        bench.write_at(name, b"CHANGED", 0)
    assert len(bench.engine.vfs.io._unmarked) <= 3
    assert backing.place("sync")


# -- what need not be flushed again


def test_what_changed_about_the_time_of_a_flush_is_not_called_flushed(bench: Bench) -> None:
    """Time stamps lag behind the clock: what carries one of just before may have been written just after."""
    backing = bench.engine.backing
    backing.sync()
    at = backing._synced_ns

    def flushed(ctime_ns: int) -> bool:
        return backing.is_on_disk(SimpleNamespace(st_ctime_ns=ctime_ns))  # type: ignore[arg-type]

    assert flushed(at - 2 * 10**9)
    assert not flushed(at - 10**9 // 2)
    assert not flushed(at)


def test_a_flush_counts_from_its_beginning(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    backing = bench.engine.backing
    now_ns = time.time_ns()
    times = iter([now_ns, now_ns, now_ns + 60 * 10**9, now_ns + 60 * 10**9])
    monkeypatch.setattr(time, "time_ns", lambda: next(times))
    backing.sync()
    assert backing._synced_ns == now_ns


def test_a_clock_that_was_set_tells_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set back, it gives a file that is written now a time from before the flush."""
    backing = bench.engine.backing
    backing.sync()
    old = SimpleNamespace(st_ctime_ns=backing._synced_ns - 60 * 10**9)
    assert backing.is_on_disk(old)  # type: ignore[arg-type]
    clock_ns = backing_module._clock_ns
    monkeypatch.setattr(backing_module, "_clock_ns", lambda: clock_ns() - 3600 * 10**9)
    assert not backing.is_on_disk(old)  # type: ignore[arg-type]


def test_a_copy_of_what_ends_early_is_an_error(bench: Bench) -> None:
    source, target = bench.put("source", DATA[:BLOCK]), bench.put("target", b"")
    with open(source, "rb") as from_file, open(target, "r+b") as to_file, pytest.raises(OSError) as raised:
        bench.engine.backing.copy_range(from_file.fileno(), to_file.fileno(), len(DATA))
    assert raised.value.errno == errno.EIO
