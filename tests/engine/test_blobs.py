"""A blob goes when its last reference has gone, and not a moment before."""

import os

import pytest

from .bench import BLOCK, ME, Bench, Meeting, Tampered, content, in_thread, silent

DATA = content("same", 3 * BLOCK + 3)


@pytest.fixture
def shared(bench: Bench) -> Bench:
    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.settle()
    assert len(bench.blobs()) == 1
    return bench


def test_it_goes_with_the_last_unlink(shared: Bench) -> None:
    shared.unlink("one")
    shared.settle()
    assert len(shared.blobs()) == 1
    assert shared.read("two") == DATA
    shared.unlink("two")
    shared.settle()
    assert shared.blobs() == []
    assert shared.status()["stored_bytes"] == 0


@pytest.mark.parametrize("how", ["write", "truncate", "overwrite", "rename over", "restore"])
def test_it_goes_when_the_last_reference_becomes_something_else(shared: Bench, how: str) -> None:
    shared.unlink("two")
    match how:
        case "write":
            shared.write_at("one", b"CHANGED", 0)
        case "truncate":
            shared.truncate("one", BLOCK)
        case "overwrite":
            shared.write("one", content("other"))
        case "rename over":
            shared.write("tmp", content("other"))
            shared.rename("tmp", "one")
        case "restore":
            shared.engine.restore([b"one"], lambda phase, done, total: None)
    shared.settle()
    assert shared.blobs() == []


def test_removed_just_before_the_end(shared: Bench) -> None:
    """The last reference goes, and the store is closed before anybody settled that."""
    shared.unlink("one")
    shared.unlink("two")
    shared.close()
    assert shared.blobs() == []
    assert shared.checks() == []
    shared.open()


def test_removed_just_before_the_end_beside_a_backlog(shared: Bench) -> None:
    """The same with a file waiting that nobody has looked at yet, and which might be a reference."""
    shared.write("new", b"new")
    shared.reopen()  # the queue that was saved is a backlog now
    shared.unlink("one")
    shared.unlink("two")
    shared.reopen()
    shared.engine.scan(silent)  # as a mount does at its start: the stop left word that there is something to find
    assert shared.blobs() == []


def test_it_stays_while_an_open_handle_reads_it(shared: Bench) -> None:
    reader = shared.open_file("one")
    shared.unlink("one")
    shared.unlink("two")
    shared.settle()
    assert len(shared.blobs()) == 1
    assert shared.read_from(reader) == DATA
    shared.close_file(reader)
    shared.settle()
    assert shared.blobs() == []


def test_it_goes_when_the_reader_does_without_anything_else_happening(shared: Bench) -> None:
    shared.reopen(start=True)
    reader = shared.open_file("one")
    shared.unlink("one")
    shared.unlink("two")
    shared.settle()
    assert len(shared.blobs()) == 1
    shared.close_file(reader)
    shared.wait_for(lambda: shared.blobs() == [])


def test_it_stays_while_an_open_handle_writes_a_copy_of_it(shared: Bench) -> None:
    """copy_file_range made the open, nameless target stand for it."""
    with shared.opened("one") as source, shared.opened_new("copy") as target:
        shared.engine.vfs.io.copy_range(source, 0, target, 0, len(DATA), ME)
        shared.unlink("copy")
        shared.unlink("one")
        shared.unlink("two")
        shared.settle()
        assert shared.read_from(target) == shared.read_from(source) == DATA
    shared.settle()
    assert shared.blobs() == []


def test_it_stays_when_a_copy_was_made_just_before(shared: Bench) -> None:
    """The copy's reference is only in the journal yet, while the index knows of no reference any more."""
    with shared.opened("one") as source:
        shared.unlink("one")
        shared.unlink("two")
        target = shared.create_file("copy")
        shared.engine.vfs.io.copy_range(source, 0, target, 0, len(DATA), ME)
        shared.close_file(target)
    shared.settle()
    assert shared.read("copy") == DATA
    assert len(shared.blobs()) == 1


def test_it_stays_when_a_copy_is_made_while_it_is_being_removed(shared: Bench) -> None:
    """The remover holds the gate: the copy is made before, and seen, or after, and made of bytes."""
    meeting = Meeting()
    shared.close()
    backing = Tampered(shared.source)
    shared.open(backing=backing)
    shared.write("three", content("three"))
    shared.settle()
    source = shared.open_file("one")
    shared.unlink("one")
    shared.unlink("two")
    shared.close_file(source)

    def before(name: str, arguments: tuple[object, ...]) -> None:
        if name == "fset_immutable":
            meeting.wait()

    backing.before = before
    with in_thread(shared.settle):
        meeting.reached()
        with in_thread(lambda: shared.write("new", DATA)) as writing:
            writing.ended(0.1)
            meeting.release()
    shared.settle()
    assert shared.read("new") == DATA


def test_opening_the_last_reference_while_it_is_unlinked(shared: Bench) -> None:
    """Who has opened it reads it, however fast it goes afterwards."""
    meeting = Meeting()
    shared.unlink("two")
    shared.settle()
    shared.close()
    backing = Tampered(shared.source)
    shared.open(backing=backing)

    def before(name: str, arguments: tuple[object, ...]) -> None:
        if name == "fread_reference":
            meeting.wait()

    backing.before = before
    found: list[bytes] = []
    with in_thread(lambda: found.append(shared.read("one"))):
        meeting.reached()
        shared.unlink("one")
        with in_thread(shared.settle) as settling:
            settling.ended(0.2)
            meeting.release()
    assert found == [DATA]
    shared.settle()
    assert shared.blobs() == []


def test_a_hard_linked_reference_keeps_it(shared: Bench) -> None:
    shared.link("one", "uno")
    shared.unlink("one")
    shared.unlink("two")
    shared.settle()
    assert len(shared.blobs()) == 1
    assert shared.read("uno") == DATA
    shared.unlink("uno")
    shared.settle()
    assert shared.blobs() == []


def test_edited_in_both_places(shared: Bench) -> None:
    """Both references change to the same new content: the old blob goes, the new one comes."""
    for name in ("one", "two"):
        shared.write_at(name, b"CHANGED", 0)
    shared.settle()
    assert shared.duplicates("one") == ["two"]
    assert len(shared.blobs()) == 1


def test_it_comes_back(shared: Bench) -> None:
    for _ in range(3):
        shared.unlink("one")
        shared.unlink("two")
        shared.settle()
        assert shared.blobs() == []
        for name in ("one", "two"):
            shared.write(name, DATA)
        shared.settle()
        assert len(shared.blobs()) == 1


def test_it_comes_back_before_it_is_gone(shared: Bench) -> None:
    shared.unlink("one")
    shared.unlink("two")
    shared.write("three", DATA)
    shared.settle()
    assert shared.read("three") == DATA
    shared.write("four", DATA)
    shared.settle()
    assert shared.duplicates("three") == ["four"]


def test_not_before_the_tree_was_walked(shared: Bench) -> None:
    """After an unclean stop nobody knows yet who refers to it."""
    shared.crash()
    shared.open()
    shared.unlink("one")
    shared.unlink("two")
    shared.settle()
    assert len(shared.blobs()) == 1
    shared.scan()
    assert shared.blobs() == []


def test_strange_things_in_blobs(shared: Bench) -> None:
    """What is not a blob is left alone, and told of."""
    blobs = shared.source / ".dedupfs/blobs"
    (blobs / "README").write_text("not ours")
    (next(path for path in blobs.iterdir() if path.is_dir()) / "0123").write_text("not ours")
    shared.crash()
    shared.recover()
    assert shared.read("one") == DATA
    shared.close()
    assert "blob-names" in shared.checks()
    assert "blob-names" in shared.checks(repair=True)
    os.unlink(blobs / "README")
    shared.expect_findings()
    shared.open()
