"""What apps did to names and attributes reaches the index in order, and never takes over another file's record."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dedupfs.backing import Backing
from dedupfs.index import Batch, Index
from dedupfs.journal import DirectoryNamed, Entry, Found, Journal, Named, Recording, Restored, Shared, Touched, Unnamed
from dedupfs.model import UNKNOWN_PATH, ContentKey, Digest, FileRecord, FileState, Ino, Link, Stamp

CONTENT = ContentKey(Digest(b"c" * 16))
OTHER = ContentKey(Digest(b"o" * 16))


class Bench:
    """A tree, an index in memory of one batch, and who is pending."""

    def __init__(self, source: Path, index: Index) -> None:
        self.source = source
        self.backing = Backing(str(source))
        self.batch: Batch = index.batch()
        self.pending: set[Ino] = set()
        self.offered: list[tuple[Ino, bytes]] = []
        self.replaced: list[bytes] = []
        self.complete = True
        self.recording = Recording(
            self.backing,
            self.pending.__contains__,
            lambda ino, path: self.offered.append((ino, path)),
            self.replaced.append,
            lambda: self.complete,
        )

    def make(self, path: str, data: bytes = b"data") -> Ino:
        target = self.source / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        return Ino(target.stat().st_ino)

    def settle(self, path: str, state: FileState = FileState.PLAIN, content: ContentKey = CONTENT) -> Ino:
        st = (self.source / path).stat()
        self.recording.put(self.batch, self.link(path), os.fsencode(path), st, state, content)
        return Ino(st.st_ino)

    def link(self, path: str) -> Link:
        target = self.source / path
        return Link(Ino(target.parent.stat().st_ino), os.fsencode(target.name))

    def paths(self, ino: Ino) -> list[bytes]:
        return sorted(self.batch.paths(ino, self.backing.root_ino))

    def stamp(self, path: str) -> Stamp:
        return Stamp.of((self.source / path).stat())


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    (tmp_path / "index").mkdir()
    (tmp_path / "source").mkdir()
    with Index(str(tmp_path / "index"), "a store") as index:
        made = Bench(tmp_path / "source", index)
        yield made
        made.backing.close()


def test_entries_keep_their_order() -> None:
    journal = Journal()
    entries = [Unnamed(Ino(number), Link(Ino(2), b"x"), gone=False) for number in range(5)]
    for entry in entries:
        journal.append(entry)
    assert (len(journal), journal.appended) == (5, 5)
    assert list(journal.drain()) == entries
    assert (len(journal), journal.appended) == (0, 5)
    assert not journal.drain()


def test_a_settled_file_is_recorded_with_its_directories(bench: Bench) -> None:
    bench.make("a/b/file")
    ino = bench.settle("a/b/file")
    assert bench.batch.file(ino) == FileRecord(bench.stamp("a/b/file"), FileState.PLAIN, CONTENT)
    assert bench.paths(ino) == [b"a/b/file"]


def test_a_settled_file_whose_directory_moved_on(bench: Bench) -> None:
    """Its path has changed, its link has not."""
    ino = bench.make("d/file")
    bench.settle("d/file")
    st, link = (bench.source / "d/file").stat(), bench.link("d/file")
    os.rename(bench.source / "d", bench.source / "e")
    bench.recording.put(bench.batch, link, b"d/file", st, FileState.REFERENCE, CONTENT)
    bench.recording.apply(bench.batch, DirectoryNamed(link.parent, bench.link("e")))
    assert bench.paths(ino) == [b"e/file"]


def test_names_come_and_go(bench: Bench) -> None:
    bench.make("file")
    ino = bench.settle("file")
    os.link(bench.source / "file", bench.source / "link")
    bench.recording.apply(bench.batch, Named(ino, bench.link("link"), b"link"))
    assert bench.paths(ino) == [b"file", b"link"]
    link = bench.link("file")
    os.unlink(bench.source / "file")
    bench.recording.apply(bench.batch, Unnamed(ino, link, gone=False))
    assert bench.paths(ino) == [b"link"]
    record = bench.batch.file(ino)
    assert record is not None
    assert record.stamp == bench.stamp("link")  # follows the ctime


def test_a_name_in_a_directory_that_is_not_known(bench: Bench) -> None:
    bench.make("file")
    ino = bench.settle("file")
    (bench.source / "new/below").mkdir(parents=True)
    os.rename(bench.source / "file", bench.source / "new/below/file")
    bench.recording.apply(bench.batch, Named(ino, bench.link("new/below/file"), b"new/below/file"))
    assert b"new/below/file" in bench.paths(ino)


def test_a_name_of_an_unknown_file_has_it_looked_at(bench: Bench) -> None:
    """A scan that had not come to it may never come."""
    ino = bench.make("file")
    bench.recording.apply(bench.batch, Named(ino, bench.link("file"), b"file"))
    assert bench.offered == [(ino, b"file")]
    bench.pending.add(ino)
    bench.recording.apply(bench.batch, Named(ino, bench.link("file"), b"file"))
    assert len(bench.offered) == 1


def test_directories_are_renamed_and_removed(bench: Bench) -> None:
    bench.make("d/file")
    ino = bench.settle("d/file")
    directory = Ino((bench.source / "d").stat().st_ino)
    os.rename(bench.source / "d", bench.source / "e")
    bench.recording.apply(bench.batch, DirectoryNamed(directory, bench.link("e")))
    assert bench.paths(ino) == [b"e/file"]
    os.unlink(bench.source / "e/file")
    os.rmdir(bench.source / "e")
    bench.recording.apply(bench.batch, DirectoryNamed(directory, None))
    assert bench.paths(ino) == []


def test_attributes_let_the_record_follow(bench: Bench) -> None:
    bench.make("file")
    ino = bench.settle("file")
    os.chmod(bench.source / "file", 0o600)
    bench.recording.apply(bench.batch, Touched(ino, b"file"))
    os.utime(bench.source / "file", ns=(1, 2))
    bench.recording.apply(bench.batch, Touched(ino, b"file", sets_times=True))
    record = bench.batch.file(ino)
    assert record is not None
    assert record.stamp == bench.stamp("file")


@pytest.mark.parametrize("how", ["pending", "size", "time", "another inode"])
def test_the_record_does_not_follow_a_change_of_content(bench: Bench, how: str) -> None:
    bench.make("file")
    ino = bench.settle("file")
    known = bench.batch.file(ino)
    match how:
        case "pending":
            bench.pending.add(ino)
            (bench.source / "file").write_bytes(b"DATA")
        case "size":
            (bench.source / "file").write_bytes(b"more data")
        case "time":
            os.utime(bench.source / "file", ns=(1, 2))
        case "another inode":
            os.rename(bench.source / "file", bench.source / "moved")
            bench.make("file")
    bench.recording.apply(bench.batch, Touched(ino, b"file"))
    assert bench.batch.file(ino) == known
    bench.recording.catch_up(bench.batch)
    assert bench.batch.file(ino) == known
    assert bench.offered == ([] if how == "pending" else [(ino, UNKNOWN_PATH)])


def test_before_a_walk_has_seen_it_a_record_follows_nothing(bench: Bench) -> None:
    """The file may have been changed before a crash, and then renamed: only its stamp still tells."""
    bench.make("file")
    ino = bench.settle("file")
    known = bench.batch.file(ino)
    (bench.source / "file").write_bytes(b"DATA")  # as long as before
    bench.complete = False
    bench.recording.apply(bench.batch, Touched(ino, b"file"))
    assert bench.batch.file(ino) == known
    assert bench.offered == [(ino, b"file")]


def test_a_file_that_is_gone_is_forgotten(bench: Bench) -> None:
    bench.make("file")
    ino = bench.settle("file", FileState.REFERENCE)
    link = bench.link("file")
    os.unlink(bench.source / "file")
    bench.recording.apply(bench.batch, Unnamed(ino, link, gone=True))
    assert bench.batch.file(ino) is None
    assert bench.paths(ino) == []
    assert bench.batch.holders(CONTENT) == []


def test_what_came_to_be_shared(bench: Bench) -> None:
    """It is another inode, in the place of the one that was known."""
    bench.make("file")
    old = bench.settle("file")
    new = bench.make("staged")
    os.rename(bench.source / "staged", bench.source / "file")
    st = (bench.source / "file").stat()
    bench.recording.apply(
        bench.batch, Shared(st, bench.link("file"), b"file", FileState.REFERENCE, CONTENT, replaced=old)
    )
    record = bench.batch.file(new)
    assert record is not None
    assert (record.state, record.content) == (FileState.REFERENCE, CONTENT)
    assert bench.batch.file(old) is None
    assert bench.batch.sharers(CONTENT) == [new]
    assert bench.paths(new) == [b"file"]
    assert bench.replaced == [b"file"]


@pytest.mark.parametrize("renamed", [False, True])
def test_a_number_that_is_used_again_by_what_came_to_be_shared(bench: Bench, renamed: bool) -> None:
    """The end of the number's former owner was noted before, and is applied before, whatever was renamed since."""
    bench.make("d/file")
    bench.make("victim")
    old = bench.settle("victim", FileState.REFERENCE, OTHER)
    gone = Unnamed(old, bench.link("victim"), gone=True)
    os.unlink(bench.source / "d/file")
    os.rename(bench.source / "victim", bench.source / "d/file")  # stands for a new inode with that number
    st, link = (bench.source / "d/file").stat(), bench.link("d/file")
    entries: list[Entry] = [gone, Shared(st, link, b"d/file", FileState.REFERENCE, CONTENT, replaced=None)]
    path = b"d/file"
    if renamed:
        os.rename(bench.source / "d", bench.source / "e")
        entries.append(DirectoryNamed(link.parent, bench.link("e")))
        path = b"e/file"
    for entry in entries:
        bench.recording.apply(bench.batch, entry)
    record = bench.batch.file(old)
    assert record is not None
    assert record.content == CONTENT
    assert bench.paths(old) == [path]


def test_a_restored_file_is_plain_and_known(bench: Bench) -> None:
    bench.make("file")
    ino = bench.settle("file", FileState.REFERENCE)
    st = (bench.source / "file").stat()
    bench.recording.apply(bench.batch, Restored(st, CONTENT))
    record = bench.batch.file(ino)
    assert record is not None
    assert record.state is FileState.PLAIN
    assert bench.batch.holders(CONTENT) == [ino]
    assert bench.batch.sharers(CONTENT) == []


def test_what_a_scan_found(bench: Bench) -> None:
    bench.make("d/file")
    ino = bench.settle("d/file")
    os.link(bench.source / "d/file", bench.source / "link")
    bench.recording.apply(bench.batch, Found(ino, b"link"))
    bench.recording.apply(bench.batch, Found(ino, b"not there"))
    bench.recording.apply(bench.batch, Found(Ino(ino + 12345), b"link"))
    assert bench.paths(ino) == [b"d/file", b"link"]
    (bench.source / "empty/below").mkdir(parents=True)
    below = Ino((bench.source / "empty/below").stat().st_ino)
    bench.recording.apply(bench.batch, Found(below, b"empty/below"))
    assert bench.batch.directory(below) == bench.link("empty/below")
