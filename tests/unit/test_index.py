"""The index says what was put in, counts right whatever happened, and refuses what it cannot vouch for."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dedupfs.errors import IndexDamaged, StoreError, UnknownFormat
from dedupfs.index import Index, recompute
from dedupfs.model import ContentKey, Digest, FileRecord, FileState, Ino, Link, Stamp, Totals

ROOT = Ino(2)
IDENTITY = "a store"


def key(number: int, collision: int = 0) -> ContentKey:
    return ContentKey(Digest(number.to_bytes(16, "big")), collision)


def record(number: int = 1, state: FileState = FileState.PLAIN, size_bytes: int = 100) -> FileRecord:
    return FileRecord(Stamp(size_bytes, 5, 6), state, key(number))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "index"
    path.mkdir()
    return path


@pytest.fixture
def index(directory: Path) -> Iterator[Index]:
    with Index(str(directory), IDENTITY) as opened:
        yield opened


# -- a batch


def test_a_batch_is_readable_by_its_owner_only_until_it_is_committed(index: Index) -> None:
    batch = index.batch()
    assert len(batch) == 0
    batch.put_file(Ino(10), record(1))
    batch.put_link(Ino(10), Link(ROOT, b"file"))
    batch.put_directory(Ino(20), Link(ROOT, b"dir"))
    assert len(batch) > 0
    assert batch.file(Ino(10)) == record(1)
    assert batch.holders(key(1)) == [Ino(10)]
    assert batch.paths(Ino(10), ROOT) == [b"file"]
    assert batch.directory(Ino(20)) == Link(ROOT, b"dir")
    assert index.file(Ino(10)) is None
    assert index.holders(key(1)) == []
    assert index.directory(Ino(20)) is None
    batch.commit()
    assert len(batch) == 0
    assert index.file(Ino(10)) == record(1)
    assert index.holders(key(1)) == [Ino(10)]
    assert index.count_holders(key(1)) == 1
    assert index.paths(Ino(10), ROOT) == [b"file"]
    assert index.links(Ino(10)) == [Link(ROOT, b"file")]
    assert index.directory(Ino(20)) == Link(ROOT, b"dir")


def test_a_batch_reads_through_to_what_was_there(index: Index) -> None:
    first = index.batch()
    for number in (10, 11, 12):
        first.put_file(Ino(number), record(1, FileState.REFERENCE))
        first.put_link(Ino(number), Link(ROOT, b"%d" % number))
    first.commit()
    batch = index.batch()
    assert batch.file(Ino(10)) == record(1, FileState.REFERENCE)
    batch.put_file(Ino(10), record(2))
    assert batch.forget_file(Ino(11)) == record(1, FileState.REFERENCE)
    batch.put_file(Ino(13), record(1))
    batch.put_link(Ino(12), Link(ROOT, b"also 12"))
    batch.remove_link(Ino(12), Link(ROOT, b"12"))
    assert batch.holders(key(1)) == [Ino(12), Ino(13)]
    assert batch.sharers(key(1)) == [Ino(12)]
    assert batch.holders(key(2)) == [Ino(10)]
    assert batch.file(Ino(11)) is None
    assert batch.paths(Ino(11), ROOT) == []
    assert batch.paths(Ino(12), ROOT) == [b"also 12"]
    assert index.holders(key(1)) == [Ino(10), Ino(11), Ino(12)]
    batch.commit()
    assert index.holders(key(1)) == [Ino(12), Ino(13)]
    assert index.sharers(key(1)) == [Ino(12)]
    assert index.links(Ino(11)) == []


def test_a_batch_tells_which_contents_lost_a_reference(index: Index) -> None:
    batch = index.batch()
    for number, state in ((10, FileState.REFERENCE), (11, FileState.REFERENCE), (12, FileState.PLAIN)):
        batch.put_file(Ino(number), record(number, state))
    batch.commit()
    batch = index.batch()
    batch.put_file(Ino(11), record(11))
    batch.forget_file(Ino(12))
    assert batch.dereferenced == {key(11)}
    batch.forget_file(Ino(10))
    assert batch.dereferenced == {key(10), key(11)}


def test_a_commit_that_fails_changes_nothing(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = index.batch()
    batch.put_file(Ino(10), record(1))
    batch.put_link(Ino(10), Link(ROOT, b"x" * 600))  # longer than LMDB takes, and than any name
    with pytest.raises(IndexDamaged):
        batch.commit()
    assert index.file(Ino(10)) is None
    assert index.totals() == Totals()
    assert len(batch) > 0
    batch.remove_link(Ino(10), Link(ROOT, b"x" * 600))
    batch = index.batch()
    batch.put_file(Ino(10), record(1))
    batch.commit()
    assert index.totals() == recompute(index) == Totals(1, 100, 100)


def test_a_full_map_is_an_error_and_no_damage(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dedupfs.environment._MAP_BYTES", 1 << 20)
    with Index(str(directory), IDENTITY) as index:
        batch = index.batch()
        for number in range(100):
            batch.put_file(Ino(number), record(number))
        batch.commit()
        batch = index.batch()
        for number in range(100, 20000):
            batch.put_file(Ino(number), record(number))
        with pytest.raises(IndexDamaged):
            batch.commit()
        assert index.totals().files == 100
        assert index.totals() == recompute(index)
    with Index(str(directory), IDENTITY) as index:
        assert index.totals().files == 100


# -- paths


def test_paths_follow_directories(index: Index) -> None:
    batch = index.batch()
    batch.put_directory(Ino(20), Link(ROOT, b"a"))
    batch.put_directory(Ino(21), Link(Ino(20), b"b"))
    batch.put_file(Ino(10), record())
    batch.put_link(Ino(10), Link(Ino(21), b"file"))
    batch.put_link(Ino(10), Link(ROOT, b"too"))
    assert sorted(batch.paths(Ino(10), ROOT)) == [b"a/b/file", b"too"]
    batch.commit()
    assert sorted(index.paths(Ino(10), ROOT)) == [b"a/b/file", b"too"]
    batch = index.batch()
    batch.put_directory(Ino(20), Link(ROOT, b"renamed"))
    assert sorted(batch.paths(Ino(10), ROOT)) == [b"renamed/b/file", b"too"]
    assert sorted(index.paths(Ino(10), ROOT)) == [b"a/b/file", b"too"]
    batch.commit()
    assert sorted(index.paths(Ino(10), ROOT)) == [b"renamed/b/file", b"too"]
    batch = index.batch()
    batch.put_directory(Ino(21), Link(ROOT, b"b"))
    batch.forget_directory(Ino(20))
    assert sorted(batch.paths(Ino(10), ROOT)) == [b"b/file", b"too"]
    batch.commit()
    assert sorted(index.paths(Ino(10), ROOT)) == [b"b/file", b"too"]
    assert index.directory(Ino(20)) is None


def test_a_name_in_an_unknown_directory_is_no_path(index: Index) -> None:
    batch = index.batch()
    batch.put_link(Ino(10), Link(Ino(99), b"file"))
    assert batch.paths(Ino(10), ROOT) == []
    batch.commit()
    assert index.paths(Ino(10), ROOT) == []


def test_directories_that_contain_each_other_are_no_endless_path(index: Index) -> None:
    batch = index.batch()
    batch.put_directory(Ino(20), Link(Ino(21), b"x" * 200))
    batch.put_directory(Ino(21), Link(Ino(20), b"y" * 200))
    batch.put_link(Ino(10), Link(Ino(20), b"file"))
    assert batch.paths(Ino(10), ROOT) == []
    batch.commit()
    assert index.paths(Ino(10), ROOT) == []


def test_deep_paths_and_any_bytes(index: Index) -> None:
    batch = index.batch()
    parent = ROOT
    for number in range(200):
        batch.put_directory(Ino(100 + number), Link(parent, b"\xff" * 200))
        parent = Ino(100 + number)
    batch.put_link(Ino(10), Link(parent, b"\n \x01"))
    batch.commit()
    assert index.paths(Ino(10), ROOT) == [b"/".join([b"\xff" * 200] * 200 + [b"\n \x01"])]


# -- walking the tables


def test_pages(index: Index) -> None:
    batch = index.batch()
    for number in range(25):
        batch.put_file(Ino(number * 3), record(number // 4))
        batch.put_link(Ino(number * 3), Link(ROOT, b"a%d" % number))
        batch.put_link(Ino(number * 3), Link(ROOT, b"b%d" % number))
    batch.put_directory(Ino(7), Link(ROOT, b"d"))
    batch.commit()
    files: list[Ino] = []
    after = Ino(-1)
    while chunk := index.all_files(after, 7):
        assert len(chunk) <= 7
        files += [ino for ino, _ in chunk]
        after = chunk[-1][0]
    assert files == [number * 3 for number in range(25)]
    links: list[tuple[Ino, int]] = []
    after = Ino(-1)
    while named := index.all_links(after, 4):
        assert len(named) <= 4
        links += [(ino, len(found)) for ino, found in named]
        after = named[-1][0]
    assert links == [(number * 3, 2) for number in range(25)]
    assert index.all_directories() == [(Ino(7), Link(ROOT, b"d"))]


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
@pytest.mark.parametrize("sizes", [[], [1], [2], [1, 2, 3, 1, 5, 2], [2, 2, 2], [1, 1, 1]])
def test_groups_come_in_pages(index: Index, limit: int, sizes: list[int]) -> None:
    batch = index.batch()
    ino = 0
    expected = []
    for number, size in enumerate(sizes):
        members = [Ino(ino + member) for member in range(size)]
        ino += size
        for member in members:
            batch.put_file(member, record(number))
        expected.append((key(number), members))
    batch.commit()
    found: list[tuple[ContentKey, list[Ino]]] = []
    position = b""
    for _ in range(20):
        page, position = index.all_groups(position, limit)
        assert len(page) <= limit
        found += page
        if not position:
            break
    else:
        pytest.fail("it never ends")
    assert found == expected


def test_a_group_that_goes_between_two_pages(index: Index) -> None:
    batch = index.batch()
    for number in range(8):
        batch.put_file(Ino(number), record(number // 2))
    batch.commit()
    _, position = index.all_groups(b"", 2)
    batch = index.batch()
    for number in (2, 3):
        batch.forget_file(Ino(number))
    batch.commit()
    page, _ = index.all_groups(position, 5)
    assert [content for content, _ in page] == [key(2), key(3)]


def test_numbers_of_a_digest(index: Index) -> None:
    batch = index.batch()
    for number, collision in ((10, 0), (11, 3), (12, 3), (13, 256)):
        batch.put_file(Ino(number), record(1)._replace(content=key(1, collision)))
    batch.put_file(Ino(14), record(2))
    assert sorted(batch.numbers(key(1).digest)) == [0, 3, 256]
    batch.commit()
    assert sorted(index.numbers(key(1).digest)) == [0, 3, 256]
    assert sorted(index.numbers(key(3).digest)) == []


# -- what is said of the whole


def test_the_queue_is_replaced(index: Index) -> None:
    assert index.load_queue() == []
    index.save_queue([(Ino(5), b"five"), (Ino(1), b"\xff/one")])
    assert index.load_queue() == [(Ino(5), b"five"), (Ino(1), b"\xff/one")]
    index.save_queue([(Ino(7), b"seven")])
    assert index.load_queue() == [(Ino(7), b"seven")]
    index.save_queue([])
    assert index.load_queue() == []


def test_complete_until_it_is_said_otherwise(directory: Path) -> None:
    with Index(str(directory), IDENTITY) as index:
        assert not index.is_complete()
        index.set_complete()
    with Index(str(directory), IDENTITY) as index:
        assert index.is_complete()
        index.set_incomplete()
        index.set_incomplete()
    with Index(str(directory), IDENTITY) as index:
        assert not index.is_complete()


def test_clear_forgets_everything_but_whose_it_is(directory: Path) -> None:
    with Index(str(directory), IDENTITY) as index:
        batch = index.batch()
        batch.put_file(Ino(10), record())
        batch.put_link(Ino(10), Link(ROOT, b"x"))
        batch.put_directory(Ino(11), Link(ROOT, b"d"))
        batch.commit()
        index.set_complete()
        index.save_queue([(Ino(1), b"x")])
        index.clear()
        assert index.totals() == Totals()
        assert index.all_files(Ino(-1), 10) == []
        assert index.all_directories() == []
        assert index.holders(key(1)) == []
        assert index.load_queue() == []
        assert not index.is_complete()
    with Index(str(directory), IDENTITY):
        pass


def test_totals_of_each_state(index: Index) -> None:
    batch = index.batch()
    for ino, number, state in (
        (1, 1, FileState.PLAIN), (2, 2, FileState.PLAIN), (3, 3, FileState.REFERENCE), (4, 3, FileState.REFERENCE),
        (5, 4, FileState.SHARED), (6, 4, FileState.SHARED), (7, 4, FileState.PLAIN),
    ):  # fmt: skip
        batch.put_file(Ino(ino), record(number, state, 100 * number))
    batch.commit()
    assert index.totals() == Totals(
        files=7,
        logical_bytes=100 + 200 + 300 * 2 + 400 * 3,
        stored_bytes=100 + 200 + 300 + 400 + 400,
        references=2,
        shared_files=2,
        contents_shared=2,
    )
    assert index.totals().saved_bytes == 300 + 400
    assert recompute(index) == index.totals()


# -- what it refuses


def test_the_index_of_another_store(directory: Path) -> None:
    with Index(str(directory), IDENTITY):
        pass
    with pytest.raises(IndexDamaged) as caught:
        Index(str(directory), "another store")
    assert "another store" in str(caught.value)
    with Index(str(directory), IDENTITY):
        pass


@pytest.mark.parametrize("version", [b"0", b"3", b"", b"11", b"22"])
def test_another_schema(directory: Path, version: bytes) -> None:
    with Index(str(directory), IDENTITY) as index, index._write() as (txn, tables):
        txn.put(b"version", version, db=tables.meta)
    with pytest.raises(UnknownFormat):
        Index(str(directory), IDENTITY)


@pytest.mark.parametrize("damage", ["garbage", "empty", "cut short", "pages", "directory", "text"])
def test_a_file_that_is_no_index(directory: Path, damage: str) -> None:
    """None of these may end the process, as LMDB does when it trusts what it maps."""
    with Index(str(directory), IDENTITY) as index:
        batch = index.batch()
        for number in range(2000):
            batch.put_file(Ino(number), record(number))
            batch.put_link(Ino(number), Link(ROOT, b"%d" % number))
        batch.commit()
    data = directory / "data.mdb"
    match damage:
        case "garbage":
            data.write_bytes(os.urandom(data.stat().st_size))
        case "empty":
            data.write_bytes(b"")
        case "cut short":
            os.truncate(data, data.stat().st_size // 2)
        case "pages":
            with open(data, "r+b") as file:
                file.seek(8192)
                file.write(os.urandom(data.stat().st_size - 8192))
        case "directory":
            data.unlink()
            data.mkdir()
        case "text":
            data.write_text("not an index" * 1000)
    with pytest.raises(StoreError):
        Index(str(directory), IDENTITY)


def test_a_value_that_is_no_record(index: Index) -> None:
    with index._write() as (txn, tables):
        txn.put((10).to_bytes(8, "big"), b"garbage", db=tables.files)
        txn.put(b"count.files", b"garbage", db=tables.meta)
    with pytest.raises(IndexDamaged):
        index.file(Ino(10))
    with pytest.raises(IndexDamaged):
        index.totals()
    with pytest.raises(IndexDamaged):
        index.all_files(Ino(-1), 10)
    batch = index.batch()
    with pytest.raises(IndexDamaged):
        batch.put_file(Ino(10), record())


def test_what_lmdb_says_is_translated(index: Index) -> None:
    with pytest.raises(IndexDamaged), index._read():
        raise lmdb.Error("no")
    with pytest.raises(IndexDamaged), index._write():
        raise lmdb.Error("no")


def test_nobody_else_can_read_it(directory: Path) -> None:
    with Index(str(directory), IDENTITY):
        assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}


# -- against a model


class Model(RuleBasedStateMachine):
    """Random batches, held against dictionaries. The counters always are what counting anew says."""

    inodes = st.integers(1, 6).map(Ino)
    contents = st.integers(1, 3)
    links = st.builds(Link, st.sampled_from([ROOT, Ino(100), Ino(101)]), st.sampled_from([b"a", b"b"]))

    @initialize()
    def begin(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="dedupfs-index.")
        self.index = Index(self.directory, IDENTITY)
        self.batch = self.index.batch()
        self.files: dict[Ino, FileRecord] = {}
        self.names: dict[Ino, set[Link]] = {}
        self.committed: tuple[dict[Ino, FileRecord], dict[Ino, set[Link]]] = ({}, {})

    def teardown(self) -> None:
        if hasattr(self, "index"):
            self.index.close()
            shutil.rmtree(self.directory)

    @rule(ino=inodes, content=contents, state=st.sampled_from(FileState))
    def put(self, ino: Ino, content: int, state: FileState) -> None:
        self.files[ino] = record(content, state, 100 * content)  # equal contents have equal sizes
        self.batch.put_file(ino, self.files[ino])

    @rule(ino=inodes)
    def forget(self, ino: Ino) -> None:
        assert self.batch.forget_file(ino) == self.files.pop(ino, None)
        self.names.pop(ino, None)

    @rule(ino=inodes, link=links)
    def name(self, ino: Ino, link: Link) -> None:
        self.batch.put_link(ino, link)
        self.names.setdefault(ino, set()).add(link)

    @rule(ino=inodes, link=links)
    def unname(self, ino: Ino, link: Link) -> None:
        self.batch.remove_link(ino, link)
        self.names.get(ino, set()).discard(link)

    @rule()
    def commit(self) -> None:
        self.batch.commit()
        self.committed = (dict(self.files), {ino: set(links) for ino, links in self.names.items()})

    @rule()
    def lose(self) -> None:
        self.batch = self.index.batch()
        files, names = self.committed
        self.files, self.names = dict(files), {ino: set(links) for ino, links in names.items()}

    @rule()
    def reopen(self) -> None:
        self.commit()
        self.index.close()
        self.index = Index(self.directory, IDENTITY)
        self.batch = self.index.batch()

    @invariant()
    def agrees(self) -> None:
        for ino in range(1, 7):
            assert self.batch.file(Ino(ino)) == self.files.get(Ino(ino))
            expected = sorted(link.name for link in self.names.get(Ino(ino), ()) if link.parent == ROOT)
            assert sorted(self.batch.paths(Ino(ino), ROOT)) == expected
            assert set(self.index.links(Ino(ino))) == self.committed[1].get(Ino(ino), set())
        for number in range(1, 4):
            holders = {ino for ino, held in self.files.items() if held.content == key(number)}
            sharers = {ino for ino in holders if self.files[ino].state is not FileState.PLAIN}
            assert sorted(self.batch.holders(key(number))) == sorted(holders)
            assert sorted(self.batch.sharers(key(number))) == sorted(sharers)
            known = {ino for ino, held in self.committed[0].items() if held.content == key(number)}
            assert self.index.holders(key(number)) == sorted(known)
            assert self.index.count_holders(key(number)) == len(known)

    @invariant()
    def counts_right(self) -> None:
        committed = self.committed[0].values()
        plain = sum(held.stamp.size_bytes for held in committed if held.state is FileState.PLAIN)
        shared = {held.content: held.stamp.size_bytes for held in committed if held.state is not FileState.PLAIN}
        expected = Totals(
            files=len(committed),
            logical_bytes=sum(held.stamp.size_bytes for held in committed),
            stored_bytes=plain + sum(shared.values()),
            references=sum(held.state is FileState.REFERENCE for held in committed),
            shared_files=sum(held.state is FileState.SHARED for held in committed),
            contents_shared=len(shared),
        )
        assert self.index.totals() == recompute(self.index) == expected


Model.TestCase.settings = settings(max_examples=30, stateful_step_count=30)
TestAgainstAModel = Model.TestCase
