"""System calls that fail: apps see what the filesystem says or nothing at all, and nothing is lost for good."""

import errno
import logging
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import pytest

from dedupfs.backing import Backing
from dedupfs.config import MountOptions, Share
from dedupfs.digest import Checkpoint, hash_descriptor, proceed
from dedupfs.engine import Engine
from dedupfs.errors import Busy, DamagedContent, IndexDamaged, Unavailable
from dedupfs.index import Batch, Index
from dedupfs.model import Digest
from dedupfs.reconcile import Reconciler

from .bench import BLOCK, ME, PATIENCE_S, Bench, Running, Tampered, content
from .test_damage import rot
from .test_sharing import every_strategy

DATA = content("same", 3 * BLOCK + 3)
OTHER = content("other", len(DATA))


class Failing(Tampered):
    """Fails at the n-th of the calls named, once; with `always` at that and all later ones."""

    def __init__(self, source: object) -> None:
        self.calls = 0
        self.fails_at = -1
        self.always = False
        self.only: str | None = None
        self.error = errno.EIO
        self.named: list[str] = []
        super().__init__(str(source))
        self.before = self._fail

    def _fail(self, name: str, arguments: tuple[object, ...]) -> None:
        if self.fails_at < 0 or (self.only is not None and name != self.only):
            return
        self.named.append(name)
        number, self.calls = self.calls, self.calls + 1
        if number == self.fails_at or (self.always and number > self.fails_at):
            raise OSError(self.error, os.strerror(self.error))


SETTLING = [
    "open", "open_quietly", "lstat", "link", "rename", "unlink", "mkdir", "set_mtime", "fset_reference", "ftruncate",
    "fdatasync", "fsync_directory", "fset_immutable", "dedupe", "fread_reference", "take_read_lease", "copy_range",
]  # fmt: skip


@pytest.mark.parametrize("bench", [("reference", "ext4"), ("reflink", "xfs")], indirect=True, ids="-".join)
def test_every_call_of_settling_fails_once(bench: Bench) -> None:
    """Sharing a file with another, and a third with the blob, where the n-th call fails: contents stay, no blob goes
    while a reference names it, and what was not done is done at the next start."""
    bench.expect_log("")
    for step in range(400):
        for name in ("one", "two", "three"):
            bench.write(name, DATA)
        bench.close()
        backing = Failing(bench.source)
        backing.error = (errno.EIO, errno.ENOSPC, errno.EMFILE)[step % 3]
        bench.open(backing=backing)
        backing.fails_at = step
        with suppress(OSError, IndexDamaged):
            bench.settle()
        done = backing.calls <= step
        backing.fails_at = -1
        told = f"step {step}: {backing.named[step] if backing.calls > step else 'none failed'}"
        assert [bench.read(name) for name in ("one", "two", "three")] == [DATA] * 3, told
        bench.settle()
        # whoever the index knows of goes; whoever it does not know of must not lose its bytes by that
        bench.unlink("three")
        bench.settle()
        bench.unlink("two")
        bench.settle()
        assert bench.read("one") == DATA, told
        bench.write("four", DATA)
        bench.settle()
        bench.unlink("four")
        bench.settle()
        assert bench.read("one") == DATA, told
        bench.reopen()
        bench.scan()
        assert bench.read("one") == DATA, told
        bench.unlink("one")
        bench.settle()
        assert bench.blobs() == [], told
        bench.close()
        assert bench.checks() == [], told
        bench.open()
        if done:
            break
    else:
        pytest.fail("it never came to its end")
    assert step > 20


@every_strategy
def test_a_full_disk_while_sharing(bench: Bench) -> None:
    """Every call that needs room fails, and goes on failing: files stay plain, and are shared when there is room."""
    backing = Failing(bench.source)
    bench.reopen(backing=backing)
    backing.error, backing.always = errno.ENOSPC, True
    backing.only = "dedupe" if bench.share == "reflink" else "fset_reference"
    backing.fails_at = 0
    bench.expect_log("cannot share")
    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.settle()
    assert bench.state("one") == bench.state("two") == "plain"
    assert bench.duplicates("one") == ["two"]
    assert bench.inside("staging") == []
    assert bench.blobs() == []
    backing.fails_at = -1
    bench.write("three", DATA)
    bench.settle()
    assert bench.duplicates("three") == ["one", "two"]
    assert bench.state("three") != "plain"


def test_the_directory_of_blobs_cannot_be_flushed(bench: Bench) -> None:
    """After the known file has become a reference: it must be counted, or its blob goes with another's last use."""
    backing = Failing(bench.source)
    bench.reopen(backing=backing)
    backing.only, backing.fails_at = "fsync_directory", 0
    bench.expect_log("cannot share", "is not settled")
    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.settle()
    backing.fails_at = -1
    bench.write("three", DATA)
    bench.settle()
    for name in ("two", "three"):
        bench.unlink(name)
        bench.settle()
    assert bench.read("one") == DATA


def test_no_descriptor_left_for_its_readers(bench: Bench) -> None:
    """The known file is open, and becomes a blob; there is no descriptor for what its readers need then."""
    backing = Failing(bench.source)
    bench.reopen(backing=backing)
    bench.write("one", DATA)
    bench.settle()
    reader = bench.open_file("one")
    bench.write("two", DATA)
    backing.error, backing.only, backing.fails_at = errno.EMFILE, "open", 0
    backing.always = True
    bench.expect_log("")
    bench.settle()
    assert bench.read_from(reader) == DATA
    backing.fails_at = -1
    bench.close_file(reader)
    bench.settle()
    assert bench.read("one") == bench.read("two") == DATA


@pytest.mark.parametrize("failing", ["fset_reference", "ftruncate"])
def test_a_copy_that_cannot_refer_is_of_bytes(bench: Bench, failing: str) -> None:
    backing = Failing(bench.source)
    bench.reopen(backing=backing)
    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.settle()
    backing.error, backing.only, backing.fails_at = errno.ENOSPC, failing, 0
    bench.copy("one", "copy")
    assert bench.read("copy") == DATA
    assert not bench.is_reference("copy")
    bench.append("copy", b"more")
    assert bench.read("copy") == DATA + b"more"


def test_a_record_that_does_not_go_from_an_emptied_file(bench: Bench) -> None:
    """Where a quota of btrfs is used up, no xattr goes. What is written beside the record of a reference would be
    nobody's content: it is refused until the record can go."""
    backing = Failing(bench.source)
    bench.reopen(backing=backing)
    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.settle()
    backing.only, backing.error, backing.always, backing.fails_at = "fremove_reference", errno.EDQUOT, True, 0
    with pytest.raises(OSError, match=os.strerror(errno.EDQUOT)):
        bench.truncate("one", 0)
    written = b""
    with suppress(OSError):
        bench.append("one", OTHER)
        written = OTHER
    backing.fails_at = -1
    assert bench.read("one") == written
    bench.append("one", b"more")
    assert bench.read("one") == written + b"more"
    assert bench.read("two") == DATA


def test_healing_that_cannot_be_undone(bench: Bench) -> None:
    """A copy has become the blob, and there is room neither to go on nor to give the blob an inode of its own: better
    there is no blob than one that is an app's file as well."""
    bench.expect_log(
        "cannot share three now", "cannot get an inode of its own", "was (damaged|missing); healed with four"
    )
    backing = Tampered(bench.source)
    bench.reopen(backing=backing)
    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.settle()
    rot(bench.the_blob())
    bench.write("three", DATA)

    def before(name: str, arguments: tuple[object, ...]) -> None:
        if (name == "rename" and arguments[1] == b"three") or name == "copy_range":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    backing.before = before
    bench.settle()
    backing.before = lambda name, arguments: None
    bench.write_at("three", b"CHANGED", 0)
    assert bench.read("three") == b"CHANGED" + DATA[7:]
    with suppress(DamagedContent):
        assert bench.read("one") == DATA
    bench.write("four", DATA)
    bench.settle()
    assert bench.read("one") == bench.read("two") == bench.read("four") == DATA
    assert os.listdir(bench.source / ".dedupfs/staging")
    bench.close()
    assert not os.listdir(bench.source / ".dedupfs/staging")


def test_no_descriptor_is_left_to_undo_with(bench: Bench) -> None:
    """What it was done with gives one back. Without, a name of the blob stays beside that of the file."""
    backing = Tampered(bench.source)
    bench.reopen(backing=backing)
    bench.write("known", DATA)
    bench.settle()
    bench.write("new", DATA)
    bench.expect_log("cannot share (new|known) now")
    taken: list[int] = []

    def before(name: str, arguments: tuple[object, ...]) -> None:
        if name == "rename" and arguments[1] == b"known":
            with pytest.raises(OSError, match="Too many open files") as met:
                while True:
                    taken.append(os.dup(0))
            raise met.value

    backing.before = before
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
    try:
        bench.settle()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in taken:
            os.close(fd)
    backing.before = lambda name, arguments: None
    assert taken
    assert not os.listdir(bench.source / ".dedupfs/staging")
    assert bench.blobs() == []


# -- a blob that cannot be removed: where a quota of btrfs is used up, the immutable flag does not come off


@pytest.fixture
def full(bench: Bench) -> Failing:
    """Two pairs of files that share are gone, and there is no room to remove what they shared."""
    bench.close()
    backing = Failing(bench.source)
    bench.open(backing=backing)
    fill_and_empty(bench, backing)
    return backing


def fill_and_empty(bench: Bench, backing: Failing) -> None:
    pairs = {f"{side}{number}": content(f"pair {number}", 3 * BLOCK) for side in "ab" for number in (1, 2)}
    for name, data in pairs.items():
        bench.write(name, data)
    bench.settle()
    assert len(bench.blobs()) == 2
    backing.only, backing.error, backing.always, backing.fails_at = "fset_immutable", errno.EDQUOT, True, 0
    backing.calls = 0
    for name in pairs:
        bench.unlink(name)


def test_what_is_kept_for_a_full_disk_is_given_for_a_blob(bench: Bench, full: Failing) -> None:
    reserve = bench.source / ".dedupfs/reserve"
    reserve.write_bytes(bytes(100_000))
    full.always = False
    bench.settle()
    assert not reserve.exists()
    bench.settle()
    assert bench.blobs() == []


def test_a_blob_stays_until_there_is_room(
    bench: Bench, full: Failing, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench.expect_log("WARNING.*until there is room")
    monkeypatch.setattr("dedupfs.settle._POLL_S", 0.01)
    monkeypatch.setattr("dedupfs.settle._RETRY_S", 0.1)
    bench.engine.start()
    bench.wait_for(lambda: full.calls > 2)
    assert len(bench.blobs()) == 2
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    full.fails_at = -1
    bench.wait_for(lambda: bench.blobs() == [])


def test_one_that_cannot_be_removed_otherwise_waits_for_the_next_scan(bench: Bench, full: Failing) -> None:
    bench.expect_log("WARNING.*the next scan tries again")
    full.error, full.always = errno.EIO, False
    for _ in range(2):
        bench.settle()
        assert len(bench.blobs()) == 1
    bench.scan()
    bench.settle()
    assert bench.blobs() == []


def test_it_is_not_tried_all_the_time(bench: Bench, full: Failing) -> None:
    bench.expect_log("WARNING.*until there is room")
    for _ in range(3):
        bench.settle()
    assert full.calls == 1
    full.fails_at = -1
    bench.close()
    assert (bench.source / ".dedupfs/clean").exists()
    bench.open()
    assert bench.engine.settler.index_is_complete
    assert bench.blobs() == []


def test_each_time_that_there_is_no_room_is_told(
    bench: Bench, full: Failing, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench.expect_log("WARNING.*until there is room")
    monkeypatch.setattr("dedupfs.settle._RETRY_S", 0)
    bench.settle()
    full.fails_at = -1
    bench.settle()
    assert bench.blobs() == []
    fill_and_empty(bench, full)
    bench.settle()
    assert [record.levelname for record in caplog.records].count("WARNING") == 2


def test_the_flag_cannot_be_cleared_for_want_of_room(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def answering(number: int) -> Callable[..., bytes]:
        def ioctl(fd: int, request: int, *_: object) -> bytes:
            raise OSError(number, os.strerror(number))

        return ioctl

    bench.write("one", DATA)
    with open(bench.source / "one", "rb") as file, monkeypatch.context() as patched:
        for number in (errno.ENOSPC, errno.EDQUOT, errno.ENOTTY, errno.EPERM):
            patched.setattr("dedupfs.backing.fcntl.ioctl", answering(number))
            Backing.fset_immutable(file.fileno(), immutable=True)
            refused = pytest.raises(OSError, match=os.strerror(number))
            with refused if number in (errno.ENOSPC, errno.EDQUOT) else nullcontext():
                Backing.fset_immutable(file.fileno(), immutable=False)


# -- the index


@contextmanager
def no_room(bench: Bench) -> Iterator[None]:
    """The index cannot be written."""
    index = bench.engine.index

    class NoRoom(Index):
        @contextmanager
        def _write(self) -> Iterator[object]:  # type: ignore[override]
            raise IndexDamaged("the index cannot be written (disk full)")
            yield

    kind = type(index)
    index.__class__ = NoRoom
    try:
        yield
    finally:
        index.__class__ = kind


def test_what_cannot_be_written_waits(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: nothing is forgotten, and nothing removed, until there is room again."""
    monkeypatch.setattr("dedupfs.settle._RETRY_S", 0.05)
    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.settle()
    bench.reopen(start=True)
    bench.expect_log("cannot be written")
    with no_room(bench):
        bench.write("three", DATA)
        bench.wait_for(lambda: bench.is_reference("three"))
        for name in ("one", "two"):
            bench.unlink(name)
        bench.rename("three", "four")
        assert bench.read("four") == DATA
        assert bench.status()["pending"] > 0
    bench.settle()
    assert bench.read("four") == DATA
    assert bench.duplicates("four") == []
    assert bench.status()["files"] == 1
    bench.reopen()
    assert bench.engine.settler.index_is_complete
    bench.unlink("four")
    bench.settle()
    assert bench.blobs() == []


def test_the_index_is_full(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large as it can get, which ought never to be: apps go on, and what they delete makes room."""
    monkeypatch.setattr("dedupfs.settle._RETRY_S", 0.05)
    with monkeypatch.context() as small:
        small.setattr("dedupfs.environment._MAP_BYTES", 1 << 20)
        bench.reopen()
    bench.expect_log("cannot be written")
    names: list[str] = []
    is_full = False
    while not is_full:
        names.append(f"{len(names)} of several")
        bench.write(names[-1], content(names[-1]))
        try:
            if not len(names) % 50:
                bench.settle()
        except IndexDamaged:
            is_full = True
        assert len(names) < 10_000
    bench.write("one more", DATA)
    bench.rename("one more", names[0])
    bench.write_at(names[1], b"CHANGED", 0)
    assert bench.read(names[0]) == DATA
    assert bench.read(names[1]) == b"CHANGED" + content(names[1])[7:]
    for name in names[2:]:
        assert bench.read(name) == content(name)
        bench.unlink(name)
    bench.settle()
    assert bench.status()["files"] == 2
    bench.write("again", DATA)
    bench.settle()
    assert bench.is_reference("again")
    bench.expect_findings("clean")  # a batch was lost: the next start walks


def share_without_room_for_the_index(bench: Bench) -> None:
    """`three` refers to what `one` and `two` have, and the index cannot be told."""
    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.settle()
    bench.write("three", DATA)
    with no_room(bench), pytest.raises(IndexDamaged):
        bench.settle()
    assert bench.is_reference("three")


def test_killed_while_the_index_cannot_be_written(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    share_without_room_for_the_index(bench)
    bench.crash()
    bench.open()
    for name in ("one", "two"):
        bench.unlink(name)
    bench.settle()
    assert bench.read("three") == DATA
    bench.scan()
    assert bench.read("three") == DATA
    assert len(bench.blobs()) == 1


def test_a_batch_is_lost_beside_no_mount(bench: Bench) -> None:
    """A command shares a file, and cannot write that down: no blob goes after its orderly end."""
    share_without_room_for_the_index(bench)
    check_that_nothing_uncounted_is_lost(bench, "three", "one", "two")


def test_names_are_lost_as_somebody_asks_for_quiet(bench: Bench) -> None:
    bench.write("one", DATA)
    bench.settle()
    bench.copy("one", "two")
    with no_room(bench), pytest.raises(IndexDamaged), bench.engine.settler.quiet():
        pass
    check_that_nothing_uncounted_is_lost(bench, "one", "two")


def test_interrupted_beside_no_mount(bench: Bench) -> None:
    """Ctrl-C in the middle of a scan, when a file was shared and that is not written down."""
    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.settle()
    bench.close()
    bench.put("three", DATA)
    for number in range(20):
        bench.put(f"unique {number}", content(f"unique {number}"))

    def hasher(fd: int, checkpoint: Checkpoint = proceed) -> Digest:
        if bench.is_reference("three"):
            raise KeyboardInterrupt
        return hash_descriptor(fd, checkpoint)

    bench.open(hasher=hasher)
    with pytest.raises(KeyboardInterrupt):
        bench.scan()
    check_that_nothing_uncounted_is_lost(bench, "three", "one", "two")


def check_that_nothing_uncounted_is_lost(bench: Bench, uncounted: str, *counted: str) -> None:
    assert bench.is_reference(uncounted)
    bench.reopen()
    bench.settle()
    for name in counted:
        bench.unlink(name)
    bench.settle()
    assert bench.read(uncounted) == DATA
    bench.scan()
    assert bench.read(uncounted) == DATA
    bench.unlink(uncounted)
    bench.settle()
    assert bench.blobs() == []


def test_a_lost_batch_removes_no_blob_and_is_made_up_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something that nobody thought of: what was learned is gone, and with it the certainty about references."""
    monkeypatch.setattr("dedupfs.settle._RETRY_S", 0.05)
    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.settle()
    bench.reopen(start=True)
    bench.expect_log("settling failed")
    remaining = ["once"]
    commit = bench.engine.settler._commit

    def failing(batch: Batch) -> None:
        if remaining and bench.is_reference("three"):
            remaining.clear()
            raise RuntimeError("a bug")
        commit(batch)

    bench.engine.settler._commit = failing  # type: ignore[method-assign]
    bench.write("three", DATA)
    bench.wait_for(lambda: bench.engine.settler.lost_a_batch)
    bench.settle()
    assert bench.read("three") == DATA
    for name in ("one", "two"):
        bench.unlink(name)
    bench.settle()
    assert bench.read("three") == DATA
    bench.engine.settler.declare_complete()  # a scan cannot make up for it: it may have been past that place
    assert not bench.engine.settler.index_is_complete
    bench.settle()
    assert bench.read("three") == DATA
    bench.close()
    assert not (bench.source / ".dedupfs/clean").exists()
    bench.open()
    assert not bench.engine.settler.index_is_complete
    bench.scan()
    assert bench.read("three") == DATA
    bench.unlink("three")
    bench.settle()
    assert bench.blobs() == []


def test_no_room_at_the_end(bench: Bench) -> None:
    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.settle()
    bench.unlink("one")
    bench.expect_log("cannot be written")
    with no_room(bench):
        bench.close()
    assert not (bench.source / ".dedupfs/clean").exists()
    bench.recover()
    assert bench.read("two") == DATA
    assert bench.status()["files"] == 1


def test_no_room_at_the_end_while_a_scan_goes_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for names to be written down, which there is no room for: nobody waits for it and for room."""
    monkeypatch.setattr("dedupfs.settle._RETRY_S", 0.05)
    bench.crash()
    bench.open()
    settler = bench.engine.settler
    look = Reconciler._offer_uncounted_references
    is_full = threading.Event()
    bench.expect_log("cannot be written")
    with ExitStack() as full:

        def fill(*arguments: Any) -> bool:
            found = look(*arguments)
            if not is_full.is_set():
                full.enter_context(no_room(bench))
                bench.write("file", DATA)
                bench.wait_for(lambda: settler.index_error != "")
                is_full.set()
            return found

        monkeypatch.setattr(Reconciler, "_offer_uncounted_references", fill)
        bench.engine.start()
        assert is_full.wait(PATIENCE_S)
        closing = Running(bench.close)
        try:
            assert closing.ended(PATIENCE_S / 2), "it waits for room"
        finally:
            full.close()
            closing.join()
    assert not (bench.source / ".dedupfs/clean").exists()
    bench.recover()
    assert bench.read("file") == DATA
    assert bench.status()["files"] == 1


def test_no_room_for_the_clean_mark(bench: Bench) -> None:
    bench.close()
    backing = Failing(bench.source)
    bench.open(backing=backing)
    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.settle()
    bench.expect_log("the store cannot be marked clean")
    backing.only, backing.error, backing.always, backing.fails_at = "rename", errno.EDQUOT, True, 0
    bench.close()
    assert backing.named == ["rename"]
    assert not (bench.source / ".dedupfs/clean").exists()
    bench.recover()
    assert bench.read("one") == bench.read("two") == DATA


def test_apps_go_on_without_an_index(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that an app does with files needs the index."""
    monkeypatch.setattr("dedupfs.settle._RETRY_S", 0.05)
    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.settle()
    bench.reopen(start=True)
    bench.expect_log("cannot be written")
    with no_room(bench):
        bench.write_at("one", b"CHANGED", 0)
        bench.rename("two", "three")
        bench.copy("three", "four")
        bench.link("four", "five")
        bench.mkdir("d")
        bench.truncate("five", BLOCK)
        assert bench.read("one") == b"CHANGED" + DATA[7:]
        assert bench.read("three") == DATA
        assert bench.read("four") == DATA[:BLOCK]
    bench.settle()


# -- starting


def test_a_second_owner_is_refused(bench: Bench) -> None:
    with pytest.raises(Busy):
        Engine(str(bench.source), MountOptions(share=Share.REFERENCE))
    bench.write("one", DATA)
    bench.settle()


@pytest.mark.parametrize("bench", [("reference", "ext4")], indirect=True, ids="-".join)
def test_a_refused_strategy_leaves_the_store_as_it_was(bench: Bench) -> None:
    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.settle()
    bench.close()
    with pytest.raises(Unavailable) as caught:
        Engine(str(bench.source), MountOptions(share=Share.REFLINK))
    assert "share=reference" in str(caught.value)
    bench.open()
    assert bench.engine.settler.index_is_complete


def test_the_log_is_heard(bench: Bench) -> None:
    """The bench would notice a complaint."""
    logging.getLogger("dedupfs.test").warning("a complaint")
    bench.expect_log("a complaint")
    assert ME.uid == os.geteuid()
