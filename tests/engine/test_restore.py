"""The way out: references become plain files again, verified, and stay so."""

import os
from contextlib import AbstractContextManager
from typing import Any

import pytest
import xxhash

from dedupfs.errors import SourceError
from dedupfs.openfiles import Handle

from .bench import BLOCK, Bench, Tampered, content, failing_to_list, silent
from .test_damage import DATA, unprotect

OTHER = content("other", 4 * BLOCK)


@pytest.fixture
def shared(bench: Bench) -> Bench:
    for directory in ("a", "a/deep", "b"):
        bench.mkdir(directory)
    for name in ("one", "a/two", "a/deep/three", "b/four"):
        bench.write(name, DATA)
        os.utime(bench.below(name), ns=(10**18, 10**18 + 7))
    for name in ("b/five", "a/six"):
        bench.write(name, OTHER)
    bench.settle()
    assert len(bench.blobs()) == 2
    return bench


def restore(bench: Bench, *paths: str) -> dict[str, Any]:
    return dict(bench.engine.restore([os.fsencode(path) for path in paths], silent))


def plain(bench: Bench) -> list[str]:
    return sorted(
        name for name in ("one", "a/two", "a/deep/three", "b/four", "b/five", "a/six") if not bench.is_reference(name)
    )


def test_everything(shared: Bench) -> None:
    assert restore(shared) == {"restored": 6, "bytes": 4 * len(DATA) + 2 * len(OTHER), "failed": []}
    shared.settle()
    assert shared.blobs() == []
    for name in ("one", "a/two", "a/deep/three", "b/four"):
        assert shared.below(name).read_bytes() == DATA  # without dedupfs
        assert shared.below(name).stat().st_mtime_ns == 10**18 + 7
    assert shared.below("b/five").read_bytes() == OTHER


def test_a_part(shared: Bench) -> None:
    assert restore(shared, "a", "b/five")["restored"] == 4
    assert plain(shared) == ["a/deep/three", "a/six", "a/two", "b/five"]
    shared.settle()
    assert shared.read("one") == shared.read("b/four") == DATA
    assert len(shared.blobs()) == 1


def test_it_is_not_shared_again_at_once(shared: Bench) -> None:
    restore(shared)
    shared.settle()
    shared.reopen(start=True)
    shared.settle()
    shared.engine.scan(silent)
    assert len(plain(shared)) == 6
    assert shared.state("one") == "plain"
    assert shared.duplicates("one") == ["a/deep/three", "a/two", "b/four"]  # still known
    assert shared.status()["saved_bytes"] == 0


def test_again_finds_nothing_to_do(shared: Bench) -> None:
    restore(shared)
    assert restore(shared) == {"restored": 0, "bytes": 0, "failed": []}


def test_of_a_running_engine(shared: Bench) -> None:
    shared.reopen(start=True)
    with shared.opened("one") as reader, shared.opened("a/two", os.O_RDWR) as writer:
        shared.write_to(writer, b"CHANGED")
        assert restore(shared)["restored"] == 5
        assert shared.read_from(reader) == DATA
    shared.settle()
    assert shared.read("a/two") == b"CHANGED" + DATA[7:]
    assert shared.below("one").read_bytes() == DATA
    shared.wait_for(lambda: shared.blobs() == [])


@pytest.mark.parametrize("bench", [("reference", "ext4"), ("reference", "xfs")], indirect=True, ids="-".join)
@pytest.mark.parametrize("size_bytes", [BLOCK, BLOCK + 1, 5 * BLOCK])
def test_small_files_with_long_xattrs(bench: Bench, size_bytes: int) -> None:
    """A block of xattrs makes a small reference look as if it had all its blocks."""
    data = content("small", size_bytes)
    for name in ("one", "two"):
        bench.write(name, data)
        for number in range(3):
            os.setxattr(bench.below(name), f"user.long{number}", b"x" * 1000)
        if bench.engine.backing.filesystem == "xfs":
            os.setxattr(bench.below(name), "user.longer", b"x" * 60000)
    bench.settle()
    assert bench.is_reference("one")
    assert bench.read("one") == data
    assert restore(bench)["restored"] == 2
    assert bench.below("one").read_bytes() == data
    assert bench.below("two").read_bytes() == data
    bench.settle()


def test_hard_linked_references(shared: Bench) -> None:
    shared.link("one", "uno")
    shared.settle()
    assert restore(shared)["failed"] == []
    assert shared.below("one").read_bytes() == shared.below("uno").read_bytes() == DATA
    assert shared.below("one").stat().st_ino == shared.below("uno").stat().st_ino


def test_what_cannot_be_restored_is_listed_and_left(shared: Bench) -> None:
    (blob,) = (path for path in (shared.source / ".dedupfs/blobs").rglob("*.0") if path.stat().st_size == len(OTHER))
    unprotect(blob)
    blob.rename(shared.source / "rescued")
    answer = restore(shared)
    assert answer["restored"] == 4
    assert sorted(each["path"] for each in answer["failed"]) == ["a/six", "b/five"]
    assert all("missing" in each["reason"] for each in answer["failed"])
    assert shared.is_reference("b/five")
    shared.expect_findings()


def test_what_is_in_a_directory_that_cannot_be_listed(shared: Bench) -> None:
    """There may be references in it: that is not everything."""
    backing = Tampered(shared.source)
    shared.reopen(backing=backing)
    backing.before = failing_to_list(b"a/deep")
    shared.expect_log("cannot list")
    answer = restore(shared)
    backing.before = lambda name, arguments: None
    assert answer["restored"] == 5
    assert [each["path"] for each in answer["failed"]] == ["a/deep"]
    assert shared.is_reference("a/deep/three")


def test_what_is_moved_before_it_is_its_turn(shared: Bench) -> None:
    """It is restored where it is now, or named: nobody is told that all is plain while it is not."""
    moved: list[str] = []

    def progress(phase: str, done: int, total: int | None) -> None:
        if not moved:
            moved.append("b")
            shared.rename("b", "moved")

    answer = shared.engine.restore([], progress)
    assert moved
    assert answer["failed"] or not any(shared.is_reference(name) for name in ("moved/four", "moved/five"))


def test_a_full_disk(shared: Bench) -> None:
    backing = Tampered(shared.source)
    shared.reopen(backing=backing)
    copied = []

    def before(name: str, arguments: tuple[object, ...]) -> None:
        if name == "copy_range":
            copied.append(arguments)
            if len(copied) > 3:
                raise OSError(28, "No space left on device")

    backing.before = before
    answer = restore(shared)
    assert answer["restored"] == 3
    assert len(answer["failed"]) == 3
    backing.before = lambda name, arguments: None
    for name in ("one", "a/two", "a/deep/three", "b/four"):
        assert shared.read(name) == DATA
    assert restore(shared)["restored"] == 3


def test_a_copy_that_differs_is_not_relied_on(shared: Bench) -> None:
    """Bytes are compared before the reference is given up."""
    backing = Tampered(shared.source)
    shared.reopen(backing=backing)

    def after(name: str, arguments: tuple[object, ...]) -> None:
        if name == "copy_range":
            target = arguments[1]
            assert isinstance(target, int)
            os.pwrite(target, b"ROTTEN", BLOCK)

    backing.after = after
    answer = restore(shared, "one")
    assert (answer["restored"], len(answer["failed"])) == (0, 1)
    assert shared.is_reference("one")
    backing.after = lambda name, arguments: None
    assert shared.read("one") == DATA


@pytest.mark.parametrize("what", ["unlink", "rename", "replace"])
def test_while_an_app_takes_the_name_away(shared: Bench, what: str) -> None:
    backing = Tampered(shared.source)
    shared.reopen(backing=backing)

    def before(name: str, arguments: tuple[object, ...]) -> None:
        if name == "fremove_reference":
            backing.before = lambda name, arguments: None
            match what:
                case "unlink":
                    shared.unlink("one")
                case "rename":
                    shared.rename("one", "moved")
                case "replace":
                    shared.rename("a/two", "one")

    backing.before = before
    restore(shared, "one")
    shared.settle()
    assert shared.status()["files"] == (6 if what == "rename" else 5)
    if what == "rename":
        assert shared.below("moved").read_bytes() == DATA
        assert shared.duplicates("moved") == ["a/deep/three", "a/two", "b/four"]
    assert shared.read("b/four") == DATA


def test_written_before_it_is_noted(shared: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """An app that writes to a file that is restored: its record is not of what was written since."""
    shared.unlink("a/six")  # or there would be others to compare it with
    shared.settle()
    backing = Tampered(shared.source)
    shared.reopen(backing=backing)
    gate = shared.engine.gate
    exclusive = gate.exclusive
    restored: list[str] = []
    writers: list[Handle] = []

    def after(name: str, arguments: tuple[object, ...]) -> None:
        if name == "fremove_reference":
            restored.append(name)

    def write_first() -> AbstractContextManager[None]:
        if restored and not writers:
            writers.append(shared.open_file("b/five", os.O_RDWR))
            shared.write_to(writers[0], b"CHANGED")
        return exclusive()

    backing.after = after
    with monkeypatch.context() as patched:
        patched.setattr(gate, "exclusive", write_first)
        restore(shared, "b/five")
    (writer,) = writers
    shared.close_file(writer)
    shared.settle()
    changed = b"CHANGED" + OTHER[7:]
    assert shared.read("b/five") == changed
    assert shared.digest("b/five") == xxhash.xxh3_128_hexdigest(changed)


def test_of_what_is_not_there(shared: Bench) -> None:
    with pytest.raises(SourceError):
        restore(shared, "nowhere")


def test_of_an_unclean_store(shared: Bench) -> None:
    shared.write("new", DATA)
    shared.crash()
    shared.open()
    answer = restore(shared)
    assert answer["failed"] == []
    assert answer["restored"] >= 6
    assert shared.below("new").read_bytes() == DATA
    assert shared.below("one").read_bytes() == DATA
    shared.settle()
    assert shared.blobs() == []
