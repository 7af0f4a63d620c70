"""What was done behind our back, or lost with the daemon, is found by a walk; and no walk is believed too soon."""

import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from dedupfs import readahead
from dedupfs.digest import Checkpoint, hash_descriptor, proceed
from dedupfs.engine import rebuild
from dedupfs.errors import IndexDamaged
from dedupfs.gc import gc
from dedupfs.index import Batch
from dedupfs.model import Digest
from dedupfs.reconcile import Census, Reconciler, Stopped
from tests.support.filesystems import remove_tree
from tests.support.tools import needs_root, tool

from .bench import BLOCK, PATIENCE_S, Bench, Meeting, Tampered, content, failing_to_list, in_thread, me, silent
from .test_damage import unprotect
from .test_fsck import half_materialised
from .test_sharing import every_strategy

DATA = content("same", 3 * BLOCK + 3)
OTHER = content("other", 3 * BLOCK + 3)


def answers(bench: Bench) -> object:
    """What the index says of every file, by path; all that a rebuilt one must say as well."""
    found = {}
    for directory, directories, names in os.walk(bench.source):
        if ".dedupfs" in directories:
            directories.remove(".dedupfs")
        for name in names:
            path = os.path.relpath(os.path.join(directory, name), bench.source)
            found[path] = (bench.digest(path), bench.state(path), bench.refs(path), bench.duplicates(path))
    status = bench.status()
    for name in ("pending", "pictures_waiting", "pictures_reason"):
        del status[name]
    return found, status, bench.engine.duplicates(None)


def fill(bench: Bench) -> None:
    for directory in ("a", "a/deep", "b"):
        bench.mkdir(directory)
    for number, name in enumerate(("one", "a/two", "a/deep/three", "b/four", "b/five", "b/six")):
        bench.write(name, (DATA, OTHER, content("unique"))[number % 3])
    bench.write("b/small", b"small")
    bench.link("b/small", "a/small too")
    bench.write("empty", b"")
    bench.settle()


def never_seen(bench: Bench) -> None:
    """A directory as it was before dedupfs first came to it."""
    bench.close()
    remove_tree(bench.source / ".dedupfs")


# -- a first scan


def test_a_scan_leaves_access_times(bench: Bench) -> None:
    never_seen(bench)
    bench.put("a/deep/file", content("unique"))
    paths = [bench.below(path) for path in ("a", "a/deep", "a/deep/file")]
    for path in paths:
        os.utime(path, ns=(10**18, path.stat().st_mtime_ns))
    bench.open()
    bench.scan()
    assert [path.stat().st_atime_ns for path in paths] == [10**18] * 3


@every_strategy
def test_an_existing_archive(bench: Bench) -> None:
    never_seen(bench)
    for number in range(30):
        bench.put(f"dir {number % 4}/file {number}", content(f"{number % 10}"))
    os.symlink("nowhere", bench.source / "link")
    os.mkfifo(bench.source / "fifo")
    bench.open(start=True)
    bench.settle()
    assert bench.status()["files"] == 30
    bench.scan()
    for number in range(30):
        assert bench.read(f"dir {number % 4}/file {number}") == content(f"{number % 10}")
        assert bench.refs(f"dir {number % 4}/file {number}") == 3
    assert bench.status()["stored_bytes"] == 10 * len(content("0"))
    assert (bench.source / "link").is_symlink()


def test_a_scan_can_be_stopped_and_goes_on(bench: Bench) -> None:
    never_seen(bench)
    for number in range(50):
        bench.put(f"d{number}/file", DATA)
    bench.open()
    seen = 0

    def stopping(phase: str, done: int, total: int | None) -> None:
        nonlocal seen
        seen += 1
        bench.engine._stopping.set()

    with pytest.raises(Stopped):
        bench.engine.scan(stopping)
    assert seen
    bench.reopen()
    assert not bench.engine.settler.index_is_complete
    bench.scan()
    assert bench.refs("d0/file") == 50


def test_files_are_read_before_they_are_hashed(bench: Bench) -> None:
    """While the first one is in hand, the kernel is asked for those that follow, and for all of them in the end."""
    never_seen(bench)
    count = 2 * readahead._MOST_FILES
    for number in range(count):
        bench.put(f"file {number}", content(f"{number}", BLOCK + number))
    backing = Tampered(bench.source)
    asked: set[object] = set()
    several = threading.Event()

    def before(name: str, arguments: tuple[object, ...]) -> None:
        if name == "will_need":
            asked.add(arguments[0])
            if len(asked) == readahead._MOST_FILES // 2:
                several.set()
        elif name == "open_quietly":
            assert several.wait(PATIENCE_S)

    backing.before = before
    bench.open(backing=backing)
    bench.scan()
    ahead = bench.engine.settler._readahead
    assert (ahead._waiting, ahead._ahead, ahead._ahead_bytes) == ({}, {}, 0)
    backing.before = lambda name, arguments: None


def test_what_may_have_a_duplicate_is_settled_first(bench: Bench) -> None:
    """Space is saved before the rest is read, and equal files follow each other while the bytes are in memory."""
    never_seen(bench)
    for number in range(12):
        bench.put(f"d{number % 5}/file {number}", content(f"{number % 6}", (100 + number % 6) * BLOCK))
        bench.put(f"d{number % 5}/alone {number}", content(f"alone {number}", 20 * BLOCK + number))
    hashed: list[int] = []

    def hasher(fd: int, checkpoint: Checkpoint = proceed) -> Digest:
        hashed.append(os.fstat(fd).st_size)
        return hash_descriptor(fd, checkpoint)

    bench.open(hasher=hasher)
    bench.scan()
    assert hashed[:12] == [blocks * BLOCK for blocks in range(100, 106) for _ in range(2)]
    assert sorted(hashed[12:]) == [20 * BLOCK + number for number in range(12)]
    assert bench.status()["saved_bytes"] == sum(blocks * BLOCK for blocks in range(100, 106))


def test_a_scan_beside_a_mount_flushes_the_index_once_for_many_files(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for everything does not end a batch, as one does who asks about one file."""
    never_seen(bench)
    for number in range(600):
        bench.put(f"d{number % 7}/file {number}", content(f"{number}"))
    files: list[int] = []
    commit = Batch.commit

    def counting(batch: Batch) -> None:
        files.append(len(batch))
        commit(batch)

    monkeypatch.setattr(Batch, "commit", counting)
    bench.open(start=True)
    bench.settle()
    assert bench.status()["files"] == 600
    assert max(files) > 200, files


def test_closing_in_the_middle_of_the_first_scan(bench: Bench) -> None:
    """What was not looked at yet is not taken for looked at."""
    never_seen(bench)
    for number in range(200):
        bench.put(f"d{number}/file", content(str(number % 100)))
    for _ in range(3):
        bench.open(start=True)
        bench.close()
    bench.open(start=True)
    bench.settle()
    bench.wait_for(lambda: bench.engine.settler.index_is_complete)
    assert bench.refs("d0/file") == 2
    assert bench.status()["files"] == 200


# -- behind our back


@every_strategy
def test_changes_behind_our_back(bench: Bench) -> None:
    fill(bench)
    bench.close()
    bench.put("added", DATA)
    bench.put("new directory/added", OTHER)
    bench.below("b/six").unlink()
    bench.below("b/five").unlink()
    bench.put("b/five", b"changed")
    os.rename(bench.below("b/four"), bench.below("renamed"))
    os.rename(bench.below("a"), bench.below("b/a"))
    bench.open()
    bench.scan()
    assert bench.read("added") == DATA
    assert bench.duplicates("added") == ["one", "renamed"]
    assert bench.duplicates("new directory/added") == ["b/a/two"]
    assert bench.read("b/five") == b"changed"
    assert bench.duplicates("b/small") == ["b/a/small too"]
    assert bench.status()["files"] == 9
    assert bench.state("added") != "plain"
    bench.reopen()
    assert bench.scan()["looked_at"] == 0


def test_a_link_made_behind_our_back(bench: Bench) -> None:
    bench.write("one", DATA)
    bench.settle()
    os.link(bench.below("one"), bench.below("uno"))
    bench.write("two", DATA)
    bench.settle()
    bench.scan()
    assert bench.duplicates("two") == ["one", "uno"]
    assert bench.read("two") == DATA


def test_moved_between_two_looks(bench: Bench) -> None:
    """Somebody moves a file behind our back, from where the walk has not been to where it has: it is not dropped."""
    for name in ("a/file", "z/file"):
        bench.put(name, content(name))
    bench.scan()
    backing = Tampered(bench.source)
    bench.reopen(backing=backing)
    order: list[bytes] = []

    def before(name: str, arguments: tuple[object, ...]) -> None:
        if name == "scandir" and isinstance(arguments[0], bytes) and arguments[0] in (b"a", b"z"):
            order.append(arguments[0])
            if len(order) == 2:
                os.rename(bench.below(os.fsdecode(order[1]) + "/file"), bench.below(os.fsdecode(order[0]) + "/moved"))

    backing.before = before
    bench.scan()
    backing.before = lambda name, arguments: None
    moved = os.fsdecode(order[0]) + "/moved"
    assert bench.digest(moved)
    assert bench.status()["files"] == 2


# -- unclean stops


@every_strategy
def test_after_an_unclean_stop(bench: Bench) -> None:
    """Nothing of the last session is in the index: neither files nor names nor ends."""
    fill(bench)
    bench.crash()
    bench.open()
    bench.write("seven", DATA)
    bench.unlink("b/four")
    bench.rename("a/deep", "deeper")
    bench.write_at("b/five", b"CHANGED", 0)
    bench.write("pending", OTHER)
    bench.crash()
    bench.recover()
    assert bench.duplicates("one") == ["seven"]
    assert bench.duplicates("pending") == ["a/two"]
    assert bench.read("deeper/three") == content("unique")
    assert bench.duplicates("deeper/three") == ["b/six"]
    assert bench.read("b/five") == b"CHANGED" + OTHER[7:]


def test_an_unclean_store_stays_unclean_until_it_was_walked(bench: Bench) -> None:
    """However often it is opened and closed, read-only or stopped early: what nobody has counted keeps its blob."""
    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.settle()
    bench.reopen()
    bench.copy("one", "uncounted")
    bench.crash()
    for read_only in (True, False):
        bench.open(read_only=read_only, start=read_only)
        assert not bench.engine.settler.index_is_complete
        bench.close()
    bench.open()
    for name in ("one", "two"):
        bench.unlink(name)
    bench.settle()
    assert bench.read("uncounted") == DATA
    bench.scan()
    assert bench.read("uncounted") == DATA
    assert bench.engine.settler.index_is_complete


def test_a_read_only_mount_of_a_clean_store_leaves_it_clean(bench: Bench) -> None:
    fill(bench)
    before = answers(bench)
    bench.reopen(read_only=True, start=True)
    assert bench.engine.settler.index_is_complete
    assert answers(bench) == before
    bench.reopen()
    assert bench.engine.settler.index_is_complete


def test_apps_work_while_the_store_is_reconciled(bench: Bench) -> None:
    for number in range(100):
        bench.write(f"file {number:03d}", content(str(number % 10)))
    bench.settle()
    bench.crash()
    bench.open(start=True)
    for number in range(100):
        assert bench.read(f"file {number:03d}") == content(str(number % 10))
        if number % 3 == 0:
            bench.rename(f"file {number:03d}", f"moved {number:03d}")
        if number % 5 == 0:
            bench.write(f"new {number:03d}", content(str(number % 10)))
    bench.settle()
    assert bench.status()["files"] == 120
    assert bench.refs("moved 000") == 20
    assert bench.refs("file 001") == 10


# -- references that a walk might miss


@pytest.fixture
def uncounted(bench: Bench) -> Iterator[Bench]:
    """References that no index knows, in directories a/ to e/; each with a blob of its own, named by nothing else."""
    for name in "abcde":
        bench.mkdir(name)
        bench.mkdir(f"{name}/below")
        bench.write(f"{name}/below/file", content(name))
        bench.write(f"{name}/gone", content(name))
    bench.settle()
    for name in "abcde":
        bench.unlink(f"{name}/gone")
    bench.settle()
    assert len(bench.blobs()) == 5
    bench.close()
    shutil.rmtree(bench.source / ".dedupfs/index")
    yield bench
    bench.settle()
    found = sorted(bench.read(os.path.relpath(path, bench.source)) for path in bench.source.rglob("file*"))
    assert found == sorted(content(name) for name in "abcde")


@pytest.mark.parametrize("what", ["directory", "file", "link", "exchange"])
def test_moved_by_an_app_while_the_walk_goes_on(uncounted: Bench, what: str) -> None:
    """From where the walk has not been to where it has: its references would never be met."""
    bench = uncounted
    backing = Tampered(bench.source)
    bench.open(backing=backing)
    seen: list[str] = []

    def before(name: str, arguments: tuple[object, ...]) -> None:
        if name != "scandir" or not isinstance(arguments[0], bytes) or b"/" not in arguments[0]:
            return
        directory = os.fsdecode(arguments[0]).split("/")[0]
        if directory not in "abcde" or directory in seen:
            return
        seen.append(directory)
        if len(seen) == 2:
            (later, *_) = (other for other in "abcde" if other not in seen)
            match what:
                case "directory":
                    bench.rename(f"{later}/below", f"{seen[0]}/moved")
                case "file":
                    bench.rename(f"{later}/below/file", f"{seen[0]}/file moved")
                case "link":
                    bench.link(f"{later}/below/file", f"{seen[0]}/file moved")
                    bench.unlink(f"{later}/below/file")
                case "exchange":
                    bench.mkdir("x")
                    bench.rename(f"{later}/below", f"{seen[0]}/below", 2)

    backing.before = before
    bench.scan()
    backing.before = lambda name, arguments: None
    assert len(seen) >= 2
    assert len(bench.blobs()) == 5


def test_moved_by_an_app_after_the_walk(uncounted: Bench) -> None:
    """The walk has ended, and is about to be believed: now the last thing it does is looking for missing files."""
    bench = uncounted
    bench.open()
    reconciler = bench.engine._reconciler
    drop = reconciler._drop_records_of_missing_files
    moved: list[bool] = []

    def moving(census: Census, stopping: Callable[[], bool]) -> None:
        drop(census, stopping)
        if not moved:
            moved.append(True)
            bench.mkdir("late")
            bench.rename("a/below", "late/below")
            bench.rename("b/below/file", "late/file")

    reconciler._drop_records_of_missing_files = moving  # type: ignore[method-assign]
    bench.scan()
    assert moved
    assert len(bench.blobs()) == 5


def test_a_link_out_of_the_source_in_the_place_of_a_directory(bench: Bench, beside: Path) -> None:
    """An app moves a directory away before the walk comes to what is in it: what the link leads to is not ours."""
    (beside / "below").mkdir()
    (beside / "below/file").write_bytes(DATA)
    for name in ("folder/below/one", "two"):
        bench.put(name, DATA)
    backing = Tampered(bench.source)
    bench.reopen(backing=backing)

    def before(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "scandir" and arguments[0] == b"folder/below":
            backing.before = lambda name, arguments: None
            bench.rename("folder", "moved")
            bench.engine.vfs.symlink(os.fsencode(beside), b"folder", me())

    backing.before = before
    bench.scan()
    assert bench.below("folder").is_symlink()
    assert (beside / "below/file").read_bytes() == DATA
    assert bench.reference_xattr not in os.listxattr(beside / "below/file")
    assert bench.read("moved/below/one") == bench.read("two") == DATA


def test_a_reference_where_the_scan_could_not_look(bench: Bench) -> None:
    """Somebody copied it past the mount: when an app removes the last one that is counted, its blob is kept."""
    bench.mkdir("folder")
    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.settle()
    bench.close()
    tool("cp", "-a", bench.below("one"), bench.below("folder/three"))
    backing = Tampered(bench.source)
    bench.open(backing=backing)
    backing.before = failing_to_list(b"folder")
    bench.expect_log("cannot list", "could not look at everything")
    bench.scan()
    backing.before = lambda name, arguments: None
    for name in ("one", "two"):
        bench.unlink(name)
    bench.settle()
    assert len(bench.blobs()) == 1
    bench.scan()
    assert bench.read("folder/three") == DATA
    assert bench.engine.settler.index_is_complete


@pytest.mark.parametrize("bench", [("reference", "ext4"), ("reference", "xfs")], indirect=True, ids="-".join)
def test_a_small_reference_with_long_xattrs_is_met_by_the_last_look(bench: Bench) -> None:
    """It was not in the tree while the walks went on. It owns more blocks than its content would need."""
    data = content("small", BLOCK)
    for name in ("one", "two"):
        bench.write(name, data)
        os.setxattr(bench.below(name), "user.long", b"x" * 3000)
        if bench.engine.backing.filesystem == "xfs":
            os.setxattr(bench.below(name), "user.longer", b"x" * 60000)
    bench.settle()
    bench.unlink("two")
    bench.settle()
    bench.close()
    shutil.rmtree(bench.source / ".dedupfs/index")
    aside = bench.source / ".dedupfs/aside"
    bench.below("one").rename(aside)
    bench.open()
    reconciler = bench.engine._reconciler
    drop = reconciler._drop_records_of_missing_files

    def bring_back(census: Census, stopping: Callable[[], bool]) -> None:
        drop(census, stopping)
        if aside.exists():
            aside.rename(bench.below("one"))

    reconciler._drop_records_of_missing_files = bring_back  # type: ignore[method-assign]
    bench.scan()
    assert not aside.exists()
    assert bench.engine.settler.index_is_complete
    assert bench.read("one") == data


def test_an_app_comes_to_a_reference_that_waits_to_be_counted(bench: Bench) -> None:
    """It came from a backup, and a scan met it in quiet hours. An app queues it once more: it is still to be counted
    before blobs go that nothing else refers to."""
    hour = "06:00"
    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.settle()
    reference = os.getxattr(bench.below("one"), bench.reference_xattr)
    bench.put("brought", b"")
    os.truncate(bench.below("brought"), len(DATA))
    os.setxattr(bench.below("brought"), bench.reference_xattr, reference)
    bench.reopen(start=True, quiet_until=lambda: hour)
    settler = bench.engine.settler
    settler.offer(bench.key("brought").ino, b"brought")
    bench.truncate("brought", len(DATA))  # as long as it was: it stays a reference
    assert settler.pending() == 1
    for name in ("one", "two"):
        bench.unlink(name)
    assert settler.wait_noted(PATIENCE_S)
    settler.wait_until_removed(0.5)  # by then it would be gone
    assert bench.read("brought") == DATA
    hour = ""
    bench.settle()
    assert bench.read("brought") == DATA
    bench.unlink("brought")
    bench.settle()
    bench.wait_for(lambda: bench.blobs() == [])


def test_a_directory_that_cannot_be_listed(uncounted: Bench) -> None:
    """What may be in it may be a reference."""
    bench = uncounted
    backing = Tampered(bench.source)
    backing.before = failing_to_list(b"c/below")
    bench.expect_log("cannot list", "could not look at everything")
    bench.open(backing=backing)
    bench.scan()
    assert len(bench.blobs()) == 5
    assert not bench.engine.settler.index_is_complete
    backing.before = lambda name, arguments: None
    bench.scan()
    assert bench.engine.settler.index_is_complete


@pytest.mark.parametrize("at", [1, 2, 3], ids=["first walk", "second walk", "last look"])
def test_what_the_disk_does_not_give_back_is_not_gone(bench: Bench, at: int) -> None:
    """A directory can be listed again when the cable is in its place: its references are the only ones there are."""
    bench.mkdir("folder")
    for name in ("folder/one", "folder/two"):
        bench.write(name, DATA)
    bench.write("changed", OTHER)
    bench.settle()
    bench.below("changed").unlink()  # so that something is missing, and looked for
    backing = Tampered(bench.source)
    bench.reopen(backing=backing)
    listed: list[bytes] = []

    def before(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "scandir" and arguments[0] == b"folder":
            listed.append(arguments[0])
        beneath = name in ("scandir", "lstat", "read_reference") and arguments[0].startswith(b"folder")
        if beneath and len(listed) >= at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    backing.before = before
    bench.expect_log("cannot list", "could not look at everything")
    bench.scan()
    assert len(listed) >= at
    assert len(bench.blobs()) == 1
    backing.before = lambda name, arguments: None
    assert bench.read("folder/one") == bench.read("folder/two") == DATA
    bench.scan()
    assert bench.duplicates("folder/one") == ["folder/two"]


@pytest.mark.parametrize("times", [1, 10**9], ids=["once", "for long"])
@pytest.mark.parametrize("call", ["open_quietly", "fread_reference"])
def test_a_file_that_cannot_be_looked_at(uncounted: Bench, call: str, times: int) -> None:
    bench = uncounted
    backing = Tampered(bench.source)
    failed: list[str] = []

    def before(name: str, arguments: tuple[object, ...]) -> None:
        if name == call and len(failed) < times and (call != "open_quietly" or arguments[0] == b"c/below/file"):
            failed.append(name)
            raise OSError(24, "Too many open files")

    backing.before = before
    bench.expect_log("is not settled", "could not look at everything")
    bench.open(backing=backing)
    bench.scan()
    assert failed
    assert len(bench.blobs()) == 5
    backing.before = lambda name, arguments: None
    bench.scan()
    assert bench.engine.settler.index_is_complete
    assert len(bench.blobs()) == 5


@pytest.mark.parametrize("calls", [("punch", "ftruncate"), ("fset_reference",)], ids=["emptied", "marked"])
def test_a_copy_that_cannot_be_undone(bench: Bench, calls: tuple[str, ...]) -> None:
    """A crash left half of it, and the index is gone: the scan comes to an end, and the next one undoes it."""
    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.settle()
    half_materialised(bench)
    bench.crash()
    shutil.rmtree(bench.source / ".dedupfs/index")
    backing = Tampered(bench.source)
    failed: list[str] = []

    def before(name: str, arguments: tuple[Any, ...]) -> None:
        if name in calls:
            failed.append(name)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    backing.before = before
    bench.expect_log("is not settled", "could not look at everything")
    bench.open(backing=backing)
    bench.scan()
    assert failed
    assert len(bench.blobs()) == 1
    backing.before = lambda name, arguments: None
    bench.scan()
    assert bench.engine.settler.index_is_complete
    assert bench.read("one") == bench.read("two") == DATA


@pytest.mark.parametrize("linked", [False, True], ids=["blobs sealed", "blobs linked"])
@pytest.mark.parametrize("how", ["scan", "rebuild", "fsck"])
def test_a_directory_that_becomes_another_store(uncounted: Bench, beside: Path, how: str, linked: bool) -> None:
    """An app unpacks somebody's store: the references beside it are ours all the same. Also where a backup links to the
    blobs (cp -al)."""
    bench = uncounted
    if linked:
        for blob in (bench.source / ".dedupfs/blobs").rglob("*.0"):
            unprotect(blob)
            os.link(blob, beside / blob.name)
    bench.open()
    bench.mkdir("c/.dedupfs")
    bench.write("c/.dedupfs/format", b"{}")
    bench.expect_log("")
    bench.expect_findings()
    if how == "scan":
        bench.scan()
    else:
        bench.scan()
        bench.close()
        if how == "rebuild":
            rebuild(str(bench.source), silent)
        else:
            bench.fsck(repair=True)
        bench.open()
    assert bench.read("c/below/file") == content("c")
    assert len(bench.blobs()) == 5


def test_another_mount_below(uncounted: Bench) -> None:
    """A store of its own below ours is left to itself."""
    bench = uncounted
    bench.open()
    bench.scan()
    other = bench.source / "other"
    other.mkdir()
    inner = Bench(other)
    inner.open()
    for name in ("x", "y"):
        inner.write(name, DATA)
    inner.settle()
    inner.close()
    inner.finish()
    bench.write("mine", DATA)
    bench.scan()
    assert bench.duplicates("mine") == []
    inner = Bench(other)
    inner.open()
    assert inner.read("x") == DATA
    inner.finish()


class Cover:
    """Mounts something over directories and files."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._places = bench, list[Path]()

    def put(self, path: str) -> None:
        place = self._bench.below(path)
        what = ["-t", "tmpfs", "none"] if place.is_dir() else ["--bind", "/dev/null"]
        subprocess.run(["mount", *what, place], check=True)
        self._places.append(place)

    def take_away(self) -> None:
        while self._places:
            subprocess.run(["umount", self._places.pop()], check=True)


@pytest.fixture
def cover(bench: Bench) -> Iterator[Cover]:
    made = Cover(bench)
    yield made
    made.take_away()


@needs_root
@pytest.mark.parametrize("over", ["folder", "folder/below", "folder/below/one"])
@pytest.mark.parametrize("how", ["scan", "crash", "rebuild", "gc", "fsck"])
def test_what_a_mount_hides_is_not_gone(bench: Bench, cover: Cover, over: str, how: str) -> None:
    bench.mkdir("folder")
    bench.mkdir("folder/below")
    for name in ("folder/below/one", "two"):
        bench.write(name, DATA)
    bench.settle()
    bench.unlink("two")
    bench.settle()
    cover.put(over)
    bench.expect_log("cannot look at .*hides references", "could not look at everything")
    match how:
        case "scan":
            bench.scan()
        case "crash":
            bench.crash()
            bench.recover()
            (problem,) = [each.problem for each in bench.engine.health().problems if each.check == "index"]
            assert over in problem
        case _:
            bench.close()
            if how == "rebuild":
                rebuild(str(bench.source), silent)
            elif how == "gc":
                assert gc(str(bench.source), keep_days=0, dry_run=False, progress=silent).problems
            else:
                assert "readable" in bench.checks(repair=True)
            bench.open()
            bench.scan()
    assert len(bench.blobs()) == 1
    cover.take_away()
    assert bench.read("folder/below/one") == DATA
    bench.scan()
    assert bench.engine.settler.index_is_complete


@needs_root
def test_a_mount_that_hides_no_reference_of_ours(bench: Bench, cover: Cover) -> None:
    """An empty directory, files of their own, and another store that is mounted over itself."""
    for name in ("empty", "plain", "other"):
        bench.mkdir(name)
    bench.write("plain/file", content("plain"))
    for name in ("x", "y"):
        bench.write(name, DATA)
    bench.settle()
    inner = Bench(bench.below("other"))
    inner.open()
    for name in ("x", "y"):
        inner.write(name, DATA)  # of which it has a blob as well as we
    inner.settle()
    inner.close()
    inner.finish()
    for name in ("empty", "plain", "other"):
        cover.put(name)
    bench.crash()
    bench.recover()
    assert bench.engine.settler.index_is_complete


# -- a new index


def test_a_copy_without_xattrs(bench: Bench, beside: Path) -> None:
    """Its references are files of zeros; the blobs are all there is of their contents, and who looks can find them."""
    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.settle()
    assert len(bench.blobs()) == 1
    bench.close()
    copy = beside / "copy"
    tool("cp", "-r", bench.source, copy)
    bench.expect_log("the index describes another store")
    rebuild(str(copy), silent)
    assert any(path.is_file() and path.read_bytes() == DATA for path in copy.rglob("*"))


@every_strategy
@pytest.mark.parametrize("how", ["rebuild", "deleted", "garbage", "cut short", "of another store", "a file missing"])
def test_a_new_index_gives_the_same_answers(bench: Bench, how: str) -> None:
    fill(bench)
    before = answers(bench)
    bench.close()
    index = bench.source / ".dedupfs/index"
    match how:
        case "rebuild":
            rebuild(str(bench.source), silent)
        case "deleted":
            shutil.rmtree(index)
        case "garbage":
            (index / "data.mdb").write_bytes(os.urandom(1 << 16))
            bench.expect_log("beginning a new one")
        case "cut short":
            os.truncate(index / "data.mdb", 3 * BLOCK)
            bench.expect_log("beginning a new one")
        case "of another store":
            other = Bench(bench.source / "elsewhere")
            other.source.mkdir()
            other.open()
            other.finish()
            shutil.copy(other.source / ".dedupfs/index/data.mdb", index / "data.mdb")
            shutil.rmtree(other.source)
            bench.expect_log("beginning a new one")
        case "a file missing":
            (index / "data.mdb").unlink()
    bench.open(start=True)
    bench.settle()
    assert answers(bench) == before
    bench.scan()
    assert answers(bench) == before


class Failing:
    """A walk that fails as often as it is told, with one of two errors, and then is as ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: float) -> None:
        self.left, self._run = times, Reconciler.run
        monkeypatch.setattr(
            Reconciler, "run", lambda reconciler, *args, **how: self._fail_or_run(reconciler, args, how)
        )

    def _fail_or_run(self, reconciler: Reconciler, args: Any, how: Any) -> Census:
        self.left -= 1
        if self.left >= 0:
            raise RuntimeError("a bug") if self.left % 2 else IndexDamaged("the index cannot be written (disk full)")
        return self._run(reconciler, *args, **how)


def test_a_scan_that_fails_is_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    never_seen(bench)
    bench.put("one", DATA)
    bench.put("two", DATA)
    monkeypatch.setattr("dedupfs.engine._SCAN_AGAIN_S", 0.01)
    failing = Failing(monkeypatch, times=4)
    bench.expect_log("is tried again in")
    bench.open(start=True)
    bench.wait_for(lambda: bench.engine.settler.index_is_complete)
    assert failing.left == -1
    bench.settle()
    assert bench.refs("one") == bench.refs("two") == 2


def test_nobody_waits_for_a_scan_that_is_to_be_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    never_seen(bench)
    bench.put("one", DATA)
    failing = Failing(monkeypatch, times=1)
    bench.expect_log("is tried again in 60 seconds")
    bench.open(start=True)
    bench.settle()
    assert failing.left == 0
    assert bench.status()["files"] == 0
    assert "disk full" in " ".join(problem.problem for problem in bench.engine.health().problems)
    bench.scan()
    assert bench.status()["files"] == 1
    assert "disk full" not in " ".join(problem.problem for problem in bench.engine.health().problems)
    assert bench.engine.settler.index_is_complete


def test_rebuilding_waits_for_nobody(bench: Bench) -> None:
    """Two scans at once take turns."""
    fill(bench)
    bench.reopen(start=True)
    meeting = Meeting()
    with in_thread(bench.scan), in_thread(bench.scan):
        meeting.release()
    assert bench.status()["files"] == 8


def test_an_index_ahead_of_its_tree_damages_no_blob(bench: Bench) -> None:
    """After a power loss LMDB's pages may be on disk where the renames that they tell of are not."""
    for name in ("one", "two", "three"):
        bench.write(name, DATA)
    bench.settle()
    bench.crash()
    for name in ("one", "two"):
        bench.below(name).unlink()
    remove_tree(bench.source / ".dedupfs/blobs")
    (bench.source / ".dedupfs/blobs").mkdir()
    bench.below("three").unlink()
    bench.put("three", DATA)
    bench.recover()  # and no word in the log of a blob that was healed
    assert bench.digest("three") == xxhash.xxh3_128_hexdigest(DATA)
    assert (bench.state("three"), bench.refs("three")) == ("plain", 1)
    assert bench.engine.index.numbers(Digest(bytes.fromhex(bench.digest("three")))) == [0]
