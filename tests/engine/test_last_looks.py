"""Something comes between a comparison and what is concluded from it: each is seen at the last look, or kept out.

What comes is made to come at a named system call, so that nothing depends on time.
"""

import errno
import os
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import xxhash

from dedupfs import matching, settle
from dedupfs.backing import Backing
from dedupfs.digest import Checkpoint, hash_descriptor, proceed
from dedupfs.index import Batch
from dedupfs.journal import Entry, Restored, Shared
from dedupfs.model import Caller, ContentKey, Digest, Ino, Stamp
from dedupfs.openfiles import Watch

from .bench import BLOCK, ME, PATIENCE_S, Bench, Running, Tampered, content, few_bits, silent
from .test_failures import Failing

DATA = content("same", 3 * BLOCK + 100)
OTHER = content("other", len(DATA))
CHANGED = b"CHANGED" + DATA[7:]


class At(Tampered):
    """Does something before (or after) the first call of this name whose first argument is what was asked for."""

    def __init__(self, source: Path) -> None:
        super().__init__(source)
        self.done = False

    def do(self, action: Any, *, name: str, of: Any = None, after: bool = False) -> None:
        self.done = False

        def hook(called: str, arguments: tuple[Any, ...]) -> None:
            if not self.done and called == name and (of is None or of(arguments[0])):
                self.done = True
                action()

        if after:
            self.after = hook
        else:
            self.before = hook


@pytest.fixture
def at(bench: Bench) -> At:
    backing = At(bench.source)
    bench.reopen(backing=backing)
    return backing


def digest_of(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


# -- writers who go around the mount, and had the file open before anybody could take a lease


@pytest.fixture
def no_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on filesystems that have none: what is left are looks at the stamp."""
    monkeypatch.setattr(Backing, "take_read_lease", lambda _backing, _fd: False)


@pytest.mark.parametrize("bench", [("reference", "ext4"), ("reference", "xfs")], indirect=True, ids="-".join)
@pytest.mark.parametrize(("who", "settled"), [("known", True), ("known", False), ("new", False), ("third", False)])
@pytest.mark.parametrize("writes", [True, False], ids=["writes", "idle"])
def test_shared_when_nobody_has_it_open_for_writing(bench: Bench, who: str, settled: bool, writes: bool) -> None:
    """What he writes next would go into a blob, or into an inode that no path leads to."""
    for name in ("known", "new", "third"):
        if name != who or settled:
            bench.write(name, DATA)
            bench.settle()
        else:
            bench.put(name, DATA)
        if name == who:
            outside = open(bench.below(name), "r+b", buffering=0)  # noqa: SIM115
            bench.scan()
    others = sorted({"known", "new", "third"} - {who})
    with outside:
        if not settled:
            with pytest.raises(OSError, match="No data"):  # who can say what he writes meanwhile
                bench.digest(who)
        bench.engine.settler.offer_postponed()
        bench.settle()
        assert set(bench.duplicates(others[0])) == {others[1]}
        if writes:
            os.pwrite(outside.fileno(), b"CHANGED", 0)
    bench.engine.settler.offer_postponed()
    bench.settle()
    assert (bench.engine.backing.read_reference(who.encode()) is None) == writes
    assert bench.read(who) == (CHANGED if writes else DATA)
    assert bench.duplicates(who) == ([] if writes else others)
    assert bench.state(who) == ("plain" if writes else "reference")
    assert {bench.read(name) for name in others} == {DATA}


def test_whoever_is_just_letting_go_is_waited_for(bench: Bench) -> None:
    """In passthrough the kernel closes what it has open of a file a moment after the mount has heard of that."""
    backing = Tampered(bench.source)
    bench.reopen(backing=backing)
    asked: list[str] = []
    path = bench.put("file", DATA)
    with open(path, "r+b") as outside:

        def before(name: str, _arguments: tuple[Any, ...]) -> None:
            if name == "take_read_lease":
                asked.append(name)
                if len(asked) == 2:
                    outside.close()

        backing.before = before
        ino = Ino(path.stat().st_ino)
        bench.engine.settler.offer(ino, b"file")
        bench.settle()
    record = bench.engine.index.file(ino)
    assert record is not None
    assert record.stamp == Stamp.of(path.stat())


def test_the_server_gives_no_lease(bench: Bench) -> None:
    """That says nothing of who has it open: files of NFS and SMB are settled without."""
    bench.engine.backing.filesystem = "nfs4"
    with open(bench.put("file", DATA), "r+b"):
        bench.scan()
        assert bench.digest("file") == digest_of(DATA)


@pytest.mark.parametrize("bench", [("reference", "ext4"), ("reference", "xfs")], indirect=True, ids="-".join)
def test_copied_while_somebody_has_it_open_for_writing(bench: Bench) -> None:
    """A copy by reference would make the file a blob."""
    bench.write("known", DATA)
    bench.settle()
    with open(bench.below("known"), "r+b", buffering=0) as outside:
        bench.copy("known", "copy")
        os.pwrite(outside.fileno(), b"CHANGED", 0)
    assert bench.read("known") == CHANGED
    assert bench.read("copy") == DATA
    bench.scan()


@pytest.mark.usefixtures("no_leases")
@pytest.mark.parametrize("who", ["known", "new"])
def test_written_between_the_comparison_and_the_rename(bench: Bench, at: At, who: str) -> None:
    for name in ("known", "new"):
        bench.write(name, DATA)
        if name == "known":
            bench.settle()
    with open(bench.below(who), "r+b", buffering=0) as outside:
        at.do(lambda: os.pwrite(outside.fileno(), b"CHANGED", 0), name="fdatasync")
        bench.settle()
    assert at.done
    changed = b"CHANGED" + DATA[7:]
    assert bench.read(who) == changed
    assert bench.read("new" if who == "known" else "known") == DATA
    bench.scan()
    assert bench.digest(who) == digest_of(changed)
    assert bench.duplicates(who) == []


@pytest.mark.usefixtures("no_leases")
def test_written_while_it_is_hashed(bench: Bench, at: At) -> None:
    with open(bench.put("file", DATA), "r+b", buffering=0) as outside:
        writes = iter([b"CHANGED"])

        def hasher(fd: int, checkpoint: Checkpoint = proceed) -> Digest:
            found = hash_descriptor(fd, checkpoint)
            for data in writes:
                os.pwrite(outside.fileno(), data, 0)
            return found

        bench.reopen(hasher=hasher)
        bench.scan()
    assert next(writes, None) is None
    assert bench.digest("file") == digest_of(b"CHANGED" + DATA[7:])


@pytest.mark.usefixtures("no_leases")
def test_written_after_the_last_look_at_its_stamp(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest is of the former bytes, and must not be put down beside a stamp that the file got later."""
    digest = matching.Matcher._digest
    writes = iter([b"CHANGED"])
    with open(bench.put("file", DATA), "r+b", buffering=0) as outside:

        def late(*arguments: Any) -> Digest:
            found = digest(*arguments)
            for data in writes:
                os.pwrite(outside.fileno(), data, 0)
            return found

        monkeypatch.setattr(matching.Matcher, "_digest", late)
        for _ in range(2):
            bench.scan()
    assert next(writes, None) is None
    assert bench.digest("file") == digest_of(CHANGED)


@pytest.mark.usefixtures("no_leases")
@pytest.mark.parametrize("bench", [("reflink", "xfs")], indirect=True, ids="-".join)
def test_written_after_the_kernel_compared(bench: Bench, at: At) -> None:
    """It has its extents in common with the other one no more, and its stamp is not that of what was compared."""
    bench.write("known", DATA)
    bench.settle()
    bench.write("new", DATA)
    with open(bench.below("new"), "r+b", buffering=0) as outside:
        at.do(lambda: os.pwrite(outside.fileno(), b"CHANGED", 0), name="dedupe", after=True)
        bench.settle()
    assert at.done
    bench.scan()
    assert bench.digest("new") == digest_of(CHANGED)
    assert bench.duplicates("known") == []


def test_replaced_before_it_is_linked_as_a_blob(bench: Bench, at: At) -> None:
    """What gets the blob's name is what was compared, not what is at its path by then."""
    bench.write("known", DATA)
    bench.settle()
    bench.write("new", DATA)
    saved = bench.put("saved", OTHER)
    at.do(lambda: saved.replace(bench.below("known")), name="link")
    bench.settle()
    assert at.done
    assert bench.read("new") == DATA
    assert bench.read("known") == OTHER


def write_around(bench: Bench, path: str) -> None:
    """At a later tick of the clock than what was written before."""
    bench.wait_for(lambda: time.time_ns() - bench.below(path).stat().st_mtime_ns >= matching._TICK_NS)
    with open(bench.below(path), "r+b", buffering=0) as outside:
        outside.write(b"CHANGED")


def check_what_was_recorded(bench: Bench, path: str) -> None:
    """A copy may make a blob of a file that was changed; whoever has the former bytes must not take it for his, and
    heal it."""
    bench.copy(path, "copy")
    bench.settle()
    bench.write("former", DATA)
    bench.settle()
    assert bench.read(path) == bench.read("copy") == CHANGED
    assert bench.read("former") == DATA
    bench.scan()
    assert bench.digest(path) == bench.digest("copy") == digest_of(CHANGED)
    assert bench.duplicates("former") == []


def change_attributes(bench: Bench, how: str) -> str:
    """Of `file`. Answers where it is then."""
    match how:
        case "rename":
            bench.rename("file", "moved")
            return "moved"
        case "chmod":
            bench.engine.vfs.chmod(b"file", None, 0o600)
        case "times":
            bench.engine.vfs.utimens(b"file", None, None)
    return "file"


def test_written_around_the_mount_while_it_waits(bench: Bench) -> None:
    """The digest that was computed while an app wrote it is not that of what was written since."""
    bench.write("file", DATA)
    write_around(bench, "file")
    bench.settle()
    check_what_was_recorded(bench, "file")


@pytest.mark.parametrize("how", ["rename", "chmod"])
def test_written_around_the_mount_before_its_attributes_change(bench: Bench, how: str) -> None:
    """The record follows what an app does to the attributes, and must not look as if it were of what was written."""
    bench.write("file", DATA)
    bench.settle()
    write_around(bench, "file")
    path = change_attributes(bench, how)
    bench.settle()
    check_what_was_recorded(bench, path)


@pytest.mark.parametrize("how", ["rename", "chmod", "times"])
def test_what_could_not_be_settled_gets_other_attributes(bench: Bench, how: str) -> None:
    """Its record is of the former bytes, and must not come to look true by that."""
    bench.write("file", DATA)
    bench.settle()
    backing = Failing(bench.source)
    bench.reopen(backing=backing)
    bench.write_at("file", b"CHANGED", 0)
    backing.only, backing.fails_at, backing.error = "open_quietly", 0, errno.EMFILE
    bench.expect_log("file is not settled")
    bench.settle()
    assert backing.named
    backing.fails_at = -1
    path = change_attributes(bench, how)
    bench.settle()
    check_what_was_recorded(bench, path)


def test_opened_for_writing_while_it_is_hashed(bench: Bench) -> None:
    """Who opens the file around the mount is held up by a lease. When he is let go he writes into the file, at his
    leisure: it must not have become a reference by then, whose old inode nobody sees."""
    writers: list[Running] = []
    path = bench.below("new")
    may_write = threading.Event()

    def write() -> None:
        with open(path, "r+b", buffering=0) as file:
            may_write.wait()
            file.write(b"OUTSIDE")

    def hasher(fd: int, checkpoint: Checkpoint = proceed) -> Digest:
        found = hash_descriptor(fd, checkpoint)
        if not writers and os.path.exists(path) and os.path.samestat(os.fstat(fd), path.stat()):
            writers.append(Running(write))
            bench.wait_for(lambda: Backing.lease_is_breaking(fd))
        return found

    bench.reopen(hasher=hasher)
    bench.write("known", DATA)
    bench.settle()
    bench.put("new", DATA)
    bench.scan()
    may_write.set()
    writers[0].join()
    bench.scan()
    assert bench.read("new") == b"OUTSIDE" + DATA[7:]
    assert bench.read("known") == DATA


def held_up(bench: Bench, path: Path, write: Callable[[], None]) -> Running:
    """Somebody who opens a file that settling has a lease on. He waits for that."""
    fd = next(int(fd) for fd, target in bench._open_descriptors() if target == str(path))
    writer = Running(write)
    bench.wait_for(lambda: Backing.lease_is_breaking(fd))
    return writer


@pytest.mark.parametrize(("who", "moment"), [("known", "fdatasync"), ("new", "set_mtime")])
def test_opened_for_writing_after_the_comparison(bench: Bench, at: At, who: str, moment: str) -> None:
    """As above, later: the last look before a file becomes a blob, or is replaced, is at its lease."""
    bench.write("known", DATA)
    bench.settle()
    bench.write("new", DATA)
    writers: list[Running] = []
    path = bench.below(who)
    may_write = threading.Event()

    def write() -> None:
        with open(path, "r+b", buffering=0) as file:
            may_write.wait()
            file.write(b"CHANGED")

    at.do(lambda: writers.append(held_up(bench, path, write)), name=moment)
    bench.settle()
    may_write.set()
    writers[0].join()
    assert {name: bench.read(name) for name in ("known", "new")} == {"known": DATA, "new": DATA, who: CHANGED}
    bench.scan()
    assert bench.digest(who) == digest_of(CHANGED)


@pytest.mark.parametrize("bench", [("reference", "ext4"), ("reference", "xfs")], indirect=True, ids="-".join)
@pytest.mark.parametrize("moment", ["link", "rename"])
def test_opened_for_writing_while_it_becomes_a_blob(bench: Bench, at: At, moment: str) -> None:
    """As above, for the known file: what was opened is the blob by the time that it is written to. ext4 writes to
    nothing that is immutable, whenever it was opened; elsewhere the blob becomes another inode."""
    bench.write("known", DATA)
    bench.settle()
    bench.write("new", DATA)
    writers: list[Running] = []
    path = bench.below("known")

    def write() -> None:
        with open(path, "r+b", buffering=0) as file, suppress(PermissionError):
            file.write(b"OUTSIDE")

    at.do(lambda: writers.append(held_up(bench, path, write)), name=moment)
    bench.settle()
    writers[0].join()
    assert bench.read("known") == bench.read("new") == DATA
    assert bench.the_blob().read_bytes() == DATA


def test_a_digest_is_taken_down_when_its_time_stamp_can_have_no_second_meaning(bench: Bench, at: At) -> None:
    """A write within the same tick of the clock would leave the stamp as it is, so that tick has to be over."""
    ages = []

    def look() -> None:
        ages.append(time.time_ns() - os.stat(bench.below("file")).st_ctime_ns)

    at.do(look, name="lease_is_breaking")
    bench.write("file", DATA)
    bench.settle()
    assert ages
    assert ages[0] >= matching._TICK_NS


# -- apps


def test_a_writer_who_came_in_time_finds_the_file_as_it_was(bench: Bench, at: At) -> None:
    """He is told of before the rename, and so it is left: his file has its own bytes, and nothing need be copied."""
    bench.write("known", DATA)
    bench.settle()
    bench.write("new", DATA)
    inode = bench.key("known")
    watches: list[Watch] = []
    writers: list[Running] = []

    def come() -> None:
        watches.append(bench.engine.openfiles._watches[inode])
        writers.append(Running(lambda: bench.write_at("known", b"CHANGED", 0)))
        bench.wait_for(lambda: watches[0].given_up)

    at.do(come, name="fdatasync")
    bench.settle()
    writers[0].join()
    assert bench.key("known") == inode
    bench.settle()
    assert bench.read("known") == b"CHANGED" + DATA[7:]
    assert bench.read("new") == DATA


@pytest.mark.parametrize("purpose", ["publish", "refer"])
def test_no_name_changes_while_a_path_gets_another_inode(bench: Bench, at: At, purpose: str) -> None:
    bench.write("known", DATA)
    bench.settle()
    bench.write("new", DATA)
    name = "known" if purpose == "publish" else "new"
    apps: list[Running] = []
    early: list[bool] = []

    def come() -> None:
        apps.append(Running(lambda: bench.rename(name, "elsewhere")))
        early.append(apps[0].ended(0.3))

    at.do(come, name="rename", of=lambda path: path.startswith(b".dedupfs/staging/" + purpose.encode()))
    bench.settle()
    apps[0].join()
    assert early == [False], "an app renamed the file in the middle of it"
    bench.settle()
    assert not bench.below(name).exists()
    assert bench.read("elsewhere") == DATA


class Noting:
    """An app removes or renames a file when it is about to be noted what the file is. It has to wait until that is
    done: the index believes what it hears last."""

    def __init__(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch, kind: type[Shared | Restored], path: str, how: str
    ) -> None:
        self._bench, self._kind, self._note = bench, kind, bench.engine.settler.note
        self._app = (lambda: bench.unlink(path)) if how == "unlink" else (lambda: bench.rename(path, "elsewhere"))
        self._path, self._apps, self._early = os.fsencode(path), list[Running](), False
        monkeypatch.setattr(bench.engine.settler, "note", self._come_and_note)
        monkeypatch.setattr(bench.engine.sharing, "_note", self._come_and_note)

    def _come_and_note(self, entry: Entry) -> None:
        is_of_it = not isinstance(entry, Shared) or entry.path == self._path
        if isinstance(entry, self._kind) and is_of_it and not self._apps:
            self._apps.append(Running(self._app))
            self._early = self._apps[0].ended(0.3)
        self._note(entry)

    def check(self) -> None:
        """And fsck, at the end of the test, finds that the index says what the tree says."""
        self._apps[0].join()
        assert not self._early, "an app came between"
        self._bench.settle()


@pytest.mark.parametrize("bench", [("reflink", "xfs")], indirect=True, ids="-".join)
@pytest.mark.parametrize("who", ["known", "new"])
@pytest.mark.parametrize("how", ["unlink", "rename"])
def test_no_name_changes_while_it_is_noted_that_extents_are_shared(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, who: str, how: str
) -> None:
    bench.write("known", DATA)
    bench.settle()
    bench.write("new", DATA)
    noting = Noting(bench, monkeypatch, Shared, who, how)
    bench.settle()
    noting.check()


@pytest.mark.parametrize("how", ["unlink", "rename"])
def test_no_name_changes_while_it_is_noted_that_a_copy_refers(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.settle()
    noting = Noting(bench, monkeypatch, Shared, "copy", how)
    assert bench.copy("one", "copy") == len(DATA)
    noting.check()


@pytest.mark.parametrize("how", ["unlink", "rename"])
def test_no_name_changes_while_it_is_noted_that_a_file_is_restored(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    for name in ("one", "two", "three"):
        bench.write(name, DATA)
    bench.settle()
    noting = Noting(bench, monkeypatch, Restored, "one", how)
    bench.engine.restore([b"one"], silent)
    noting.check()


def test_written_and_closed_again_while_it_waited(bench: Bench, at: At) -> None:
    """The digest that was computed at the first close is not that of what was written then, whatever its times say."""
    bench.write("file", DATA)
    path = bench.below("file")
    written_ns = path.stat().st_mtime_ns

    def write() -> None:
        bench.write("file", OTHER)
        os.utime(path, ns=(written_ns, written_ns))

    at.do(write, name="lstat", of=lambda path: path == b"file")
    bench.settle()
    assert at.done
    assert bench.digest("file") == digest_of(OTHER)
    bench.write("two", OTHER)
    bench.settle()
    assert bench.duplicates("file") == ["two"]


def test_another_file_comes_to_the_path_that_a_writer_looked_up(bench: Bench, at: At) -> None:
    """He has announced himself to the one that was there; who looks at the other has to be told as well."""
    bench.write("one", DATA)
    bench.write("other", OTHER)
    bench.settle()
    at.do(lambda: bench.rename("other", "one"), name="open", of=lambda path: path == b"one")
    with bench.engine.openfiles.watch(bench.key("other")) as watch:
        writer = Running(lambda: bench.write_at("one", b"CHANGED", 0))
        assert not writer.ended(0.3), "somebody else still looks at this file"
        assert watch.given_up
    writer.join()
    bench.settle()
    assert bench.read("one") == b"CHANGED" + OTHER[7:]


@pytest.mark.parametrize("bench", [("reflink", "xfs")], indirect=True, ids="-".join)
def test_another_file_comes_to_the_path_whose_extents_are_shared(bench: Bench, at: At) -> None:
    for name, data in (("known", DATA), ("other", OTHER)):
        bench.write(name, data)
    bench.settle()
    bench.write("new", DATA)
    at.do(lambda: bench.rename("other", "new"), name="dedupe", after=True)
    bench.settle()
    assert at.done
    assert bench.digest("new") == digest_of(OTHER)
    assert bench.duplicates("known") == []


# -- the blob


def test_no_descriptor_left_for_the_blob_that_its_readers_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The known file is open for reading and is to become a blob: who has it open has to know of that, or who writes
    beside him changes what others read."""
    bench.expect_log("cannot share new now")
    bench.write("known", DATA)
    bench.settle()
    bench.write("new", DATA)
    really_open = os.open
    failed: list[str] = []

    def failing(path: str | bytes, flags: int, *arguments: Any, **keywords: Any) -> int:
        if not failed and os.fsdecode(path).startswith("/proc/self/fd/") and flags == os.O_RDONLY:
            failed.append(os.fsdecode(path))
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return really_open(path, flags, *arguments, **keywords)

    with bench.opened("known") as reader:
        with monkeypatch.context() as patched:
            patched.setattr(os, "open", failing)
            bench.settle()
        assert failed
        assert bench.read_from(reader) == bench.read("known") == DATA
        bench.write_at("known", b"CHANGED", 0)
    assert bench.read("known") == CHANGED
    assert bench.read("new") == DATA


def test_a_blob_that_somebody_else_published_meanwhile_stays(bench: Bench, at: At) -> None:
    """Undoing takes back the name that one gave to a file oneself, no other."""
    bench.write("known", DATA)
    bench.settle()
    bench.write("new", DATA)
    made: list[int] = []

    def publish() -> None:
        path = bench.source / os.fsdecode(b".dedupfs/blobs/" + digest_of(DATA)[:2].encode())
        path.mkdir(exist_ok=True)
        blob = path / f"{digest_of(DATA)}.0"
        blob.write_bytes(DATA)
        blob.chmod(0o400)
        made.append(blob.stat().st_ino)

    at.do(publish, name="link")
    bench.settle()
    assert made == [bench.the_blob().stat().st_ino]
    assert bench.read("known") == bench.read("new") == DATA
    assert bench.is_reference("new")


def test_a_copy_that_could_not_be_replaced_heals_all_the_same(bench: Bench, at: At) -> None:
    """References read the good bytes by then: undoing leaves them these, in an inode that is nobody's file."""

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.settle()
    blob = bench.the_blob()
    with open(blob, "rb") as file:
        Backing.fset_immutable(file.fileno(), immutable=False)
    blob.write_bytes(bytes(len(DATA)))
    bench.expect_log("cannot share", "was damaged; healed with")
    bench.write("three", DATA)
    at.do(fail, name="rename", of=lambda path: path.startswith(b".dedupfs/staging/heal"))
    bench.settle()
    assert at.done
    assert bench.read("one") == bench.read("two") == bench.read("three") == DATA
    assert bench.the_blob().stat().st_nlink == bench.below("three").stat().st_nlink == 1
    bench.write_at("three", b"CHANGED", 0)
    assert bench.read("one") == DATA


@pytest.mark.parametrize("call", ["rename", "open", "set_mtime"])
def test_a_file_that_could_not_be_replaced_is_no_blob(bench: Bench, at: At, call: str) -> None:
    """Whoever wrote to it would change what others read."""

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    bench.expect_log("cannot share")
    bench.write("known", DATA)
    bench.settle()
    bench.write("new", DATA)
    with bench.opened("known"):
        staging = b".dedupfs/staging/publish"
        at.do(fail, name=call, of=lambda path: call == "set_mtime" or path.startswith(staging))
        bench.settle()
    assert at.done
    if call == "set_mtime":  # after the rename, and not worth undoing anything for
        assert bench.is_reference("known")
        return
    assert bench.below("known").stat().st_nlink == 1
    assert bench.blobs() == []
    assert bench.inside("staging") == []
    assert bench.read("known") == bench.read("new") == DATA


@pytest.mark.parametrize("listed", [False, True], ids=["asked for", "listed"])
def test_nobody_sees_that_a_directory_changes_as_a_file_in_it_is_shared(bench: Bench, at: At, listed: bool) -> None:
    """The kernel would keep what it is told in between, and rsync take the directory for changed."""
    bench.mkdir("folder")
    for name in ("folder/known", "folder/new"):
        bench.write(name, DATA)
    before = 10**18
    os.utime(bench.below("folder"), ns=(before, before))
    times: list[int] = []
    vfs, looked = bench.engine.vfs, threading.Event()

    def look() -> None:
        if not listed:
            times.append(vfs.getattr(b"folder").st.st_mtime_ns)
            return
        top = vfs.opendir(b"")
        entries = {entry.name: entry.attributes for entry in vfs.readdir(top, 0)}
        os.close(top.fd)
        attributes = entries[b"folder"]
        assert attributes is not None
        times.append(attributes.st.st_mtime_ns)

    running: list[Running] = []

    def meanwhile() -> None:
        assert bench.below("folder").stat().st_mtime_ns != before
        at.after = notice
        running.append(Running(look))
        if not listed or bench.engine.backing.replaces_in_place:  # elsewhere a listing waits for sharing
            assert looked.wait(PATIENCE_S)

    def notice(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "lstat" and arguments[0] == b"folder":
            looked.set()

    at.do(meanwhile, name="set_mtime")
    bench.settle()
    running[0].join()
    assert times == [before]


@pytest.mark.parametrize("queue", ["of this mount", "of the last one"])
@pytest.mark.parametrize("named", ["kept", "gone"])
def test_a_reference_that_waits_to_be_counted_keeps_its_blob(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, named: str, queue: str
) -> None:
    """It came from a backup, and a scan met it; then an app moved it, so that it has to be looked at again, and in the
    same moment the last reference that the index knows of was removed."""
    monkeypatch.setattr(settle, "_BATCH_S", 0.0)  # batches of one file
    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.settle()
    reference = os.getxattr(bench.below("one"), bench.reference_xattr)
    bench.unlink("two")
    bench.settle()
    bench.below("brought").touch()
    os.truncate(bench.below("brought"), len(DATA))
    os.setxattr(bench.below("brought"), bench.reference_xattr, reference)
    bench.write("other", OTHER)
    bench.settle()

    def move() -> None:
        bench.rename("other", "brought", 2)
        if named == "gone":
            bench.unlink("one")

    at = At(bench.source)
    if queue == "of this mount":
        bench.reopen(backing=at)
    bench.engine.settler.offer(bench.key("brought").ino, b"brought", just_seen=True)
    if queue == "of the last one":
        bench.reopen(backing=at)
        assert bench.engine.settler.pending() == 1
    # After the first look at it: the second finds another file there.
    at.do(move, name="open_quietly", of=lambda path: path == b"brought", after=True)
    bench.settle()
    assert at.done
    assert bench.read("other") == DATA
    assert bench.read("brought") == OTHER


def test_a_blob_that_is_somebodys_file_as_well_gets_no_new_references(bench: Bench) -> None:
    """Who writes to that file would change what the references read."""
    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.settle()
    blob = bench.the_blob()
    with open(blob, "rb") as file:
        Backing.fset_immutable(file.fileno(), immutable=False)
    outside = bench.below("outside")
    os.link(blob, outside)
    bench.write("three", DATA)
    bench.settle()
    assert not bench.is_reference("three")
    assert bench.read("three") == DATA
    outside.unlink()
    bench.expect_findings()


@pytest.mark.parametrize(("why", "known"), [("small", "plain"), ("linked", "plain"), ("linked", "shared")])
def test_what_is_not_shared_is_compared_as_well(bench: Bench, why: str, known: str) -> None:
    """Two contents of one digest and one size, of which the second cannot be shared: it is no duplicate either."""
    bench.reopen(hasher=few_bits(0))
    size_bytes = 1000 if why == "small" else len(DATA)

    def put(name: str, data: bytes) -> None:
        bench.put(name, data)  # not through dedupfs, which would hash what is written by itself
        if name == "other" and why == "linked":
            os.link(bench.below(name), bench.below("other too"))
        bench.scan()

    put("one", content("same", size_bytes))
    if known == "shared":
        put("two", content("same", size_bytes))
        assert bench.is_reference("one")
    put("other", content("other", size_bytes))
    assert "other" not in bench.duplicates("one")
    assert "one" not in bench.duplicates("other")


@pytest.mark.parametrize("bench", [("reference", "ext4")], indirect=True, ids="-".join)
@pytest.mark.parametrize("moment", ["before the look at the journal", "after it"])
def test_a_copy_is_made_while_its_blob_is_being_removed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The last reference is gone, but for a reader who copies it at the last moment, and closes it."""
    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.settle()
    source = bench.open_file("one")
    assert bench.read_from(source) == DATA
    for name in ("one", "two"):
        bench.unlink(name)
    bench.settle()
    assert len(bench.blobs()) == 1
    copies: list[Running] = []
    target = bench.create_file("copy")

    def copy() -> None:
        assert bench.engine.vfs.io.copy_range(source, 0, target, 0, len(DATA), ME) == len(DATA)
        bench.close_file(target)
        bench.close_file(source)

    def begin_copy() -> None:
        if not copies:
            copies.append(Running(copy))
            copies[0].ended(0.3)  # it may have to wait

    if moment == "after it":
        uses = bench.engine.openfiles.uses

        def uses_later(key: ContentKey) -> bool:
            begin_copy()
            return uses(key)

        monkeypatch.setattr(bench.engine.openfiles, "uses", uses_later)
    else:
        commit = Batch.commit

        def commit_and_copy(batch: Batch) -> None:
            commit(batch)
            begin_copy()

        monkeypatch.setattr(Batch, "commit", commit_and_copy)
    bench.write("another", OTHER)
    bench.settle()
    copies[0].join()
    bench.settle()
    assert bench.read("copy") == DATA
    bench.unlink("copy")
    bench.settle()
    assert bench.blobs() == []


def test_a_new_file_with_two_names_is_left_alone(bench: Bench) -> None:
    """And nobody tries again and again to share it."""
    bench.write("one", DATA)
    bench.settle()
    os.link(bench.put("new", DATA), bench.below("new too"))
    bench.scan()
    assert not bench.is_reference("new")
    assert sorted(bench.duplicates("new")) == ["new too", "one"]
    assert bench.below("new").samefile(bench.below("new too"))


def test_a_reference_that_was_written_to_keeps_its_blob_without_an_index(bench: Bench) -> None:
    """Which of the two contents is wanted a person has to say, also after a rebuild."""
    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.settle()
    bench.unlink("two")
    bench.settle()
    bench.close()
    with open(bench.below("one"), "r+b") as file:
        file.write(b"OUTSIDE")
    bench.open()
    bench.engine.replace_index()
    bench.expect_log("written to from outside")
    bench.expect_findings("foreign-write", "index-stamp")
    bench.scan()
    bench.settle()
    assert bench.the_blob().read_bytes() == DATA


def test_what_is_somebodys_file_as_well_is_not_sealed(bench: Bench) -> None:
    """Else a file that was to become a blob, and did not, could never be changed again."""
    bench.write("one", DATA)
    bench.settle()
    key = ContentKey(Digest(bytes(16)))
    bench.engine.blobs.publish(b"one", key)
    bench.engine.blobs.seal(key)
    assert stat.S_IMODE(bench.below("one").stat().st_mode) == 0o644
    bench.engine.blobs.remove(key)
    bench.write_at("one", b"CHANGED", 0)


# -- privileges


def test_a_link_in_the_place_of_a_file_is_not_followed(bench: Bench) -> None:
    """It may have come there after the kernel looked the name up, and lead anywhere."""
    bench.write("file", DATA)
    bench.settle()
    bench.below("file").unlink()
    bench.below("file").symlink_to("/etc/passwd")
    for flags in (os.O_RDONLY, os.O_RDWR):
        with pytest.raises(OSError):
            bench.open_file("file", flags)
    with pytest.raises(OSError):
        bench.engine.backing.open_quietly(b"file")
    bench.below("file").unlink()
    bench.scan()


def test_an_ordinary_users_write_takes_set_id_bits(bench: Bench) -> None:
    bench.write("tool", DATA)
    for caller, mode in ((Caller(0, 0, 1), 0o6755), (Caller(12345, 12345, 1), 0o755)):
        os.chmod(bench.below("tool"), 0o6755)
        with bench.opened("tool", os.O_RDWR) as handle:
            bench.engine.vfs.io.write(handle, memoryview(b"#!"), 0, caller, cached=False)
        assert stat.S_IMODE(bench.below("tool").stat().st_mode) == mode
