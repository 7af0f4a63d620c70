"""A store that a release left is served as it was, whatever became of its index; an index of an older schema is taken
over after it was copied, wherever that is interrupted."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import lmdb
import pytest

from dedupfs import environment
from dedupfs import index as index_module
from dedupfs.index import Index
from tests.support.filesystems import Unsupported, make_work_directory, remove_work_directory
from tests.support.mounted import Mounted, dedupfs

from .released import IMAGES, tree, unpacked

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the images are mounted on loop devices")

IMAGE = IMAGES / "schema-2.img.xz"
_PICTURES = (b"images", b"thumbnails", b"backlog", b"alike")


@pytest.fixture
def filesystem() -> Iterator[Path]:
    directory = make_work_directory()
    try:
        with unpacked(IMAGE, directory) as found:
            yield found
    except Unsupported as problem:
        pytest.skip(str(problem))
    finally:
        remove_work_directory(directory)


@pytest.fixture
def archive(filesystem: Path) -> Path:
    return filesystem / "archive"


@pytest.fixture
def manifest(filesystem: Path) -> dict[str, Any]:
    return dict(json.loads((filesystem / "manifest.json").read_text()))


@pytest.fixture
def mounted(archive: Path, tmp_path: Path) -> Iterator[Mounted]:
    """Not mounted yet; at the end fsck and the log are without complaints."""
    expected: list[str] = []
    found = Mounted(
        archive, tmp_path / "view", options=("share=reference", "domain=police/"), expected_log=expected, watchdog_s=60
    )
    yield found
    found.finish()


def check(mounted: Mounted, manifest: dict[str, Any]) -> None:
    assert tree(mounted.mountpoint) == manifest
    mounted.settle()
    assert tree(mounted.mountpoint) == manifest
    others = [b"inspections/one again", b"permits/caf\xe9 \xff\n.tif", b"police/one", b"police/one again"]
    assert mounted.duplicates("permits/2024/one") == others
    blobs = sorted(path.name.partition(".")[2] for path in (mounted.store / "blobs").rglob("*.*") if path.is_file())
    assert blobs == ["0", "0", "0", "256"]
    assert mounted.run("report", mounted.mountpoint, "--json").json()["shared_across_domains"] == 0
    assert {mounted.state(path) for path in ("permits/2024/one", "permits/sparse too", "inspections/a.jpg")} == {
        "reference"
    }
    answer = mounted.run("similar", mounted.mountpoint, "permits/2024/a.jpg", "--json").json()
    assert [found["path"] for found in answer["similar"]] == ["inspections/a.jpg", "inspections/smaller.jpg"]
    assert mounted.run("authoritative", mounted.mountpoint, "permits/2024/a.jpg", "--json").json()["pinned"]
    assert mounted.run("scrub", mounted.mountpoint, "--json", "--rate", "0").json()["findings"] == []


def test_it_is_served_at_once(mounted: Mounted, manifest: dict[str, Any]) -> None:
    before = (mounted.store / "index/data.mdb").stat().st_ino
    mounted.start()
    status = mounted.status()
    assert (status["scanning"], status["pending"], status["references"]) == (False, 0, 9)
    check(mounted, manifest)
    # At once, or anew where pictures are described otherwise since.
    status = mounted.status()
    assert (status["pictures_described"], status["pictures_waiting"]) == (2, 0)
    assert (mounted.store / "index/data.mdb").stat().st_ino == before
    assert os.listdir(mounted.store / "quarantine") == []
    days = mounted.run("report", mounted.mountpoint, "--json").json()["history"]
    assert days[0]["files"] == days[-1]["files"] == len([each for each in manifest.values() if "size" in each]) - 1


def test_it_is_served_without_its_index(mounted: Mounted, manifest: dict[str, Any]) -> None:
    shutil.rmtree(mounted.store / "index")
    check(mounted.start(), manifest)


def test_it_can_be_left(archive: Path, manifest: dict[str, Any]) -> None:
    os.unlink(archive / ".dedupfs/decisions.jsonl")
    dedupfs("leave", archive)
    assert not (archive / ".dedupfs").exists()
    assert tree(archive) == manifest


# -- the index


def lower(directory: Path) -> None:
    """Make it an index of schema 1."""
    with lmdb.open(str(directory), max_dbs=32, map_size=1 << 30) as env:
        meta = env.open_db(b"meta", create=False)
        tables = [env.open_db(name, create=False) for name in _PICTURES]
        with env.begin(write=True) as txn:
            txn.put(b"version", b"1", db=meta)
            for key in (b"described", b"count.described", b"count.undescribable"):
                txn.delete(key, db=meta)
            for table in tables:
                txn.drop(table)
    with suppress(FileNotFoundError):
        os.unlink(directory / "lock.mdb")


def contents(path: Path) -> dict[bytes, list[tuple[bytes, bytes]]]:
    """The tables of an index, read without our code."""
    found = {}
    with lmdb.open(str(path), subdir=False, max_dbs=32, readonly=True, lock=False) as env, env.begin() as txn:
        with txn.cursor() as cursor:
            names = list(cursor.iternext(values=False))
        for name in names:
            with txn.cursor(env.open_db(name, txn=txn, create=False)) as cursor:
                found[name] = list(cursor)
    return found


def test_an_older_index_is_taken_over(mounted: Mounted, manifest: dict[str, Any]) -> None:
    directory = mounted.store / "index"
    lower(directory)
    before = contents(directory / "data.mdb")
    mounted.start()
    assert contents(directory / "schema-1.mdb") == before
    assert not mounted.status()["scanning"]
    check(mounted, manifest)
    assert mounted.status()["pictures_described"] == 2
    mounted.unmount()
    # The way back, as it is documented: what this release has changed is found by a walk.
    mounted.start()
    mounted.path("new").write_bytes(mounted.path("alone").read_bytes())
    mounted.path("inspections/one again").unlink()
    mounted.unmount()
    os.rename(directory / "schema-1.mdb", directory / "data.mdb")
    os.unlink(mounted.store / "clean")
    assert dict(contents(directory / "data.mdb")[b"meta"])[b"version"] == b"1"
    mounted.start()
    mounted.settle()
    assert mounted.duplicates("new") == [b"alone"]
    assert mounted.duplicates("permits/2024/one") == [
        *(b"permits/caf\xe9 \xff\n.tif", b"police/one", b"police/one again"),
    ]


def test_a_store_with_a_copy_of_its_index_can_be_left(archive: Path) -> None:
    lower(archive / ".dedupfs/index")
    os.unlink(archive / ".dedupfs/decisions.jsonl")
    (archive / ".dedupfs/index/schema-1.mdb.new").write_bytes(b"half")
    dedupfs("leave", archive)
    assert not (archive / ".dedupfs").exists()


def test_no_room_for_the_copy(mounted: Mounted, manifest: dict[str, Any]) -> None:
    """Then nothing is taken over, nor lost: not even that the store was clean."""
    directory = mounted.store / "index"
    lower(directory)
    before = contents(directory / "data.mdb")
    filler = mounted.below("filler")
    with open(filler, "wb") as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    refusal = mounted.run("mount", mounted.source, mounted.mountpoint, exit_code=71).stderr
    assert "cannot be copied before it is taken over" in refusal
    assert refusal.count("\n") == 1
    assert contents(directory / "data.mdb") == before
    assert sorted(os.listdir(directory)) == ["data.mdb"]
    filler.unlink()
    mounted.start()
    assert not mounted.status()["scanning"]
    check(mounted, manifest)


def test_a_newer_index_is_refused_as_it_is(mounted: Mounted) -> None:
    directory = mounted.store / "index"
    with lmdb.open(str(directory), max_dbs=32, lock=False, map_size=1 << 30) as env:
        meta, images = env.open_db(b"meta", create=False), env.open_db(b"images", create=False)
        with env.begin(write=True) as txn:
            txn.put(b"version", b"3", db=meta)
            txn.drop(images)  # it may have other tables
    before = contents(directory / "data.mdb")
    refusal = mounted.run("mount", mounted.source, mounted.mountpoint, exit_code=76).stderr
    assert refusal == "dedupfs: the index has schema b'3', this dedupfs knows b'2'; use a newer one\n"
    assert contents(directory / "data.mdb") == before
    assert (mounted.store / "clean").exists()
    mounted.expect_damage()


def in_child(action: Callable[[], object]) -> int:
    """The signal that ended a process which does this, 0 for none."""
    child = os.fork()
    if not child:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_killed_at_every_line_of_taking_over(tmp_path: Path) -> None:
    """A line that begins is one that SIGKILL may have come before."""
    directory, identity = tmp_path / "index", "a store"
    directory.mkdir()
    with Index(str(directory), identity):
        pass
    lower(directory)
    before = contents(directory / "data.mdb")
    kept = (directory / "data.mdb").read_bytes()

    def open_until(line: int) -> None:
        passed = 0

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal passed
            if frame.f_code.co_filename not in (index_module.__file__, environment.__file__):
                return None
            if event == "line":
                passed += 1
                if passed == line:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        Index(str(directory), identity)

    line = 0
    with_copy = taken_over = 0
    while True:
        line += 1
        (directory / "data.mdb").write_bytes(kept)
        (directory / "schema-1.mdb").unlink(missing_ok=True)
        if in_child(partial(open_until, line)) == 0:
            break
        version = dict(contents(directory / "data.mdb")[b"meta"])[b"version"]
        if (directory / "schema-1.mdb").exists():
            with_copy += 1
            assert contents(directory / "schema-1.mdb") == before, line
        taken_over += version == b"2"
        assert version == b"1" or (directory / "schema-1.mdb").exists(), line
        with Index(str(directory), identity):
            pass
        assert dict(contents(directory / "data.mdb")[b"meta"])[b"version"] == b"2"
        assert contents(directory / "schema-1.mdb") == before
    assert line > with_copy > taken_over > 1
