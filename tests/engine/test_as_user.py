"""Without root: references are kept in user.*, blobs are the user's own, and permissions bind dedupfs itself."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from dedupfs.engine import rebuild
from dedupfs.errors import DedupfsError
from tests.support.acting import as_user
from tests.support.filesystems import FilesystemPool, Unsupported, remove_tree
from tests.support.tools import attempt, needs_root

from .bench import BLOCK, ME, Bench, Running, Tampered, content, silent

ALICE = 20001
DATA = content("same", 3 * BLOCK + 3)

Run = Callable[[Callable[[Bench], None]], None]


@pytest.fixture(params=["ext4", "xfs"])
def run(request: pytest.FixtureRequest, filesystem_pool: FilesystemPool) -> Iterator[Run]:
    """Runs a test at a bench of Alice's own."""
    try:
        source = filesystem_pool.get(request.param).directory(request.node.name)
    except Unsupported as problem:
        pytest.skip(str(problem))
    if os.geteuid() == 0:
        os.chown(source, ALICE, ALICE)

    def run_it(test: Callable[[Bench], None]) -> None:
        def act() -> None:
            bench = Bench(source)
            bench.open()
            bench.scan()
            test(bench)
            bench.finish()

        as_user(ALICE, act)

    yield run_it
    remove_tree(source)


def share(bench: Bench, *names: str) -> None:
    for name in names:
        bench.write(name, DATA)
    bench.settle()
    assert all(bench.state(name) == "reference" for name in names)


def test_the_life_of_a_file(run: Run) -> None:
    def test(bench: Bench) -> None:
        share(bench, "one", "two", "three")
        assert bench.duplicates("one") == ["three", "two"]
        assert os.getxattr(bench.below("one"), "user.dedupfs.ref")
        assert bench.engine.vfs.listxattr(b"one", ME) == []
        bench.write_at("one", b"CHANGED", 5)
        bench.copy("two", "four")
        bench.settle()
        assert bench.read("one") == DATA[:5] + b"CHANGED" + DATA[12:]
        assert bench.read("four") == DATA
        bench.crash()
        bench.recover()
        assert bench.duplicates("two") == ["four", "three"]
        assert bench.engine.restore([], silent)["restored"] == 3
        bench.settle()
        assert bench.blobs() == []
        assert bench.below("three").read_bytes() == DATA

    run(test)


def test_another_file_comes_to_the_path_while_it_is_restored(run: Run) -> None:
    """Its mode is its own, and stays."""

    def test(bench: Bench) -> None:
        share(bench, "one", "two")
        bench.engine.vfs.chmod(b"one", None, 0o444)
        bench.write("other", content("other"), mode=0o640)
        bench.settle()
        backing = Tampered(bench.source)
        bench.reopen(backing=backing)
        apps: list[Running] = []

        def rename(name: str, arguments: tuple[object, ...]) -> None:
            if name == "chmod" and arguments[0] == b"one":
                apps.append(Running(lambda: bench.rename("other", "one")))
                apps[0].ended(0.3)

        backing.before = rename
        bench.engine.restore([b"one"], silent)
        apps[0].join()
        assert bench.below("one").stat().st_mode & 0o7777 == 0o640
        assert bench.read("one") == content("other")

    run(test)


@pytest.mark.parametrize("how", ["scan", "fsck"])
def test_what_cannot_be_looked_at_is_not_gone(run: Run, how: str) -> None:
    """The owner closes a directory for a while, and the references in it are the only ones there are."""

    def test(bench: Bench) -> None:
        bench.mkdir("folder")
        share(bench, "folder/one", "folder/two")
        bench.engine.vfs.chmod(b"folder", None, 0)
        bench.settle()
        bench.expect_log("cannot list", "could not look at everything")
        if how == "scan":
            bench.scan()
        else:
            bench.close()
            assert "readable" in bench.checks(repair=True)
            bench.open()
        assert len(bench.blobs()) == 1
        bench.engine.vfs.chmod(b"folder", None, 0o755)
        assert bench.read("folder/one") == DATA
        bench.scan()
        assert bench.engine.settler.index_is_complete

    run(test)


@pytest.mark.parametrize("mode", [0o444, 0o400, 0o555])
def test_restoring_what_may_not_be_written(run: Run, mode: int) -> None:
    """The owner may not write to it; it is to be a plain file all the same, with the mode it had."""

    def test(bench: Bench) -> None:
        share(bench, "one", "two")
        for name in ("one", "two"):
            bench.engine.vfs.chmod(name.encode(), None, mode)
        bench.settle()
        answer = bench.engine.restore([], silent)
        assert (answer["restored"], answer["failed"]) == (2, [])
        assert bench.below("one").read_bytes() == DATA
        assert bench.below("one").stat().st_mode & 0o7777 == mode
        bench.settle()
        assert bench.blobs() == []

    run(test)


def test_the_mode_of_what_cannot_be_restored(run: Run) -> None:
    """It was made writable for that, and is no longer when its blob turns out to be missing."""

    def test(bench: Bench) -> None:
        share(bench, "one", "two")
        bench.engine.vfs.chmod(b"one", None, 0o444)
        bench.settle()
        blob, aside = bench.the_blob(), bench.source / ".dedupfs/aside"
        os.rename(blob, aside)
        bench.expect_log("is missing")
        answer = bench.engine.restore([b"one"], silent)
        os.rename(aside, blob)
        assert answer["restored"] == 0
        assert answer["failed"]
        assert bench.below("one").stat().st_mode & 0o7777 == 0o444
        assert bench.read("one") == DATA

    run(test)


def test_what_may_not_be_read_keeps_its_blob(run: Run) -> None:
    """chmod 000 of a reference: dedupfs cannot see what it is, and must not take its blob for unused."""

    def test(bench: Bench) -> None:
        share(bench, "one", "two", "three")
        bench.engine.vfs.chmod(b"one", None, 0)
        bench.unlink("two")
        bench.unlink("three")
        bench.settle()
        assert len(bench.blobs()) == 1
        bench.close()
        rebuild(str(bench.source), silent)
        assert len(bench.blobs()) == 1
        assert bench.fsck(repair=True).exit_code in (0, 2)
        assert len(bench.blobs()) == 1
        bench.open()
        bench.engine.vfs.chmod(b"one", None, 0o600)
        assert bench.read("one") == DATA
        bench.scan()
        bench.expect_log("cannot be read|is not settled", "could not look at everything")

    run(test)


def test_a_directory_that_may_not_be_listed_keeps_its_blobs(run: Run) -> None:
    def test(bench: Bench) -> None:
        bench.mkdir("d")
        share(bench, "d/one", "two")
        bench.unlink("two")
        bench.settle()
        bench.below("d").chmod(0o300)
        bench.close()
        rebuild(str(bench.source), silent)
        assert len(bench.blobs()) == 1
        bench.below("d").chmod(0o755)
        bench.open()
        bench.scan()
        assert bench.read("d/one") == DATA
        bench.expect_log("cannot list", "could not look at everything")

    run(test)


def test_a_file_that_may_not_be_read_is_left_alone(run: Run) -> None:
    def test(bench: Bench) -> None:
        for name in ("one", "two"):
            bench.write(name, DATA, 0o000)
        bench.settle()
        assert not bench.is_reference("one") if os.access(bench.below("one"), os.R_OK) else True
        assert bench.blobs() == []
        bench.expect_log("cannot be read|is not settled")
        for name in ("one", "two"):
            bench.below(name).chmod(0o600)
        bench.scan()
        assert bench.state("one") == "reference"

    run(test)


@needs_root
def test_another_users_store_below(bench: Bench, beside: Path) -> None:
    """What is in it is that store's business, though we may not look into it."""
    inner = Bench(beside / "inner")
    inner.source.mkdir()
    inner.open()
    inner.scan()
    inner.close()
    for name in ("inner/one", "two"):
        (beside / name).write_bytes(DATA)
    for name in ("", "inner", "inner/one", "two"):
        os.chown(beside / name, ALICE, ALICE)

    def act() -> None:
        outer = Bench(beside)
        outer.expect_log("cannot list", "could not look at everything")
        outer.expect_findings("readable")
        outer.open()
        outer.scan()
        outer.finish()

    as_user(ALICE, act)
    inner.open()
    assert inner.read("one") == DATA
    inner.scan()
    inner.finish()


@needs_root
def test_the_users_store_without_its_format(bench: Bench, beside: Path) -> None:
    """Nobody knows any more how its references are kept: to root they are files of zeros. Their blob is not removed."""
    os.chown(beside, ALICE, ALICE)

    def act() -> None:
        made = Bench(beside)
        made.open()
        made.scan()
        share(made, "one", "two")
        made.finish()

    as_user(ALICE, act)
    (beside / ".dedupfs/format").unlink()
    with suppress(DedupfsError):
        rebuild(str(beside), silent)
    assert any(path.is_file() and path.read_bytes() == DATA for path in beside.rglob("*"))


@needs_root
@pytest.mark.parametrize("command", [["rebuild"], ["fsck", "--repair"], ["gc", "--keep", "0"], ["leave"]], ids=" ".join)
def test_root_who_may_not_see_its_references(bench: Bench, command: list[str]) -> None:
    """In a container, say: without CAP_SYS_ADMIN there seem to be no trusted xattrs."""
    share(bench, "one", "two")
    bench.close()
    without = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
    done = attempt(*without, sys.executable, "-m", "dedupfs", *command, bench.source)
    assert done.returncode
    assert len(bench.blobs()) == 1
    bench.open()
    assert bench.read("one") == bench.read("two") == DATA


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root and somebody else")
def test_roots_store_is_not_the_users(filesystem_pool: FilesystemPool) -> None:
    directory = filesystem_pool.get("ext4").directory("roots store")
    bench = Bench(directory)
    bench.open()
    share(bench, "one", "two")
    bench.finish()
    before = _files(directory)
    os.chown(directory, ALICE, ALICE)
    os.chown(directory / ".dedupfs", ALICE, ALICE)
    for name in ("format", "lock"):
        os.chown(directory / ".dedupfs" / name, ALICE, ALICE)

    def refuse() -> None:
        with pytest.raises(DedupfsError):
            Bench(directory).open()

    as_user(ALICE, refuse)
    assert _files(directory) == before
    remove_tree(directory)


def _files(directory: Path) -> list[str]:
    return sorted(str(path) for path in directory.rglob("*"))
