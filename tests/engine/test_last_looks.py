"""Something comes between a comparison and what is concluded from it: each is seen at the last look, or kept out.

What comes is made to come at a named system call, so that nothing depends on time.
"""

import errno
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest
import xxhash

from dedupfs import matching
from dedupfs.backing import Backing
from dedupfs.digest import Checkpoint, hash_descriptor, proceed
from dedupfs.model import Caller, Digest
from dedupfs.openfiles import Watch

from .bench import BLOCK, Bench, Running, Tampered, content, few_bits

DATA = content("same", 3 * BLOCK + 100)
OTHER = content("other", len(DATA))


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


def test_written_and_closed_again_while_it_waited(bench: Bench, at: At) -> None:
    """The digest that was computed at the first close is not that of what was written then."""
    bench.write("file", DATA)
    at.do(lambda: bench.write("file", OTHER), name="lstat", of=lambda path: path == b"file")
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

    at.do(publish, name="link", of=lambda path: path == b"known")
    bench.settle()
    assert made == [bench.the_blob().stat().st_ino]
    assert bench.read("known") == bench.read("new") == DATA
    assert bench.is_reference("new")


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
