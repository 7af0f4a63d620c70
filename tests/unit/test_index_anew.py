"""LMDB cannot write its root page, and refuses everything from then on: the index opens it anew, and loses nothing."""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import lmdb
import pytest

from dedupfs.environment import Tables
from dedupfs.errors import IndexDamaged
from dedupfs.imagetables import Described
from dedupfs.index import Batch, Index, recompute
from dedupfs.model import (
    Alike,
    ContentKey,
    Damage,
    DamageKind,
    Digest,
    FileRecord,
    FileState,
    ImageEntry,
    ImageState,
    Ino,
    Link,
    Relation,
    ScrubPass,
    Stamp,
    Thumbnails,
    Verified,
)
from tests.unit.test_authority import RECORD

IDENTITY = "a store"
ROOT = Ino(2)
VIEWS = Thumbnails(bytes(range(256)) * 16)
VERIFIED = Verified(3, 12)
SCRUB = ScrubPass(3, 11)


def key(number: int) -> ContentKey:
    return ContentKey(Digest(number.to_bytes(16, "big")))


DAMAGE = Damage(key(10), DamageKind.FILE, Ino(10), 100, 5, 12, "its bytes differ")


def put_file(batch: Batch, number: int) -> None:
    batch.put_file(Ino(number), FileRecord(Stamp(100, 5, 6), FileState.REFERENCE, key(number)))
    batch.put_link(Ino(number), Link(Ino(1000), b"%d" % number))


def put_everything(batch: Batch) -> None:
    """Something for every table."""
    put_file(batch, 10)
    put_file(batch, 11)
    batch.put_directory(Ino(1000), Link(ROOT, b"d"))
    batch.put_image(key(10), Described(ImageEntry(ImageState.DESCRIBED, record=RECORD), VIEWS))
    batch.put_image(
        key(11), Described(ImageEntry(ImageState.DESCRIBED, record=RECORD), VIEWS, [Alike(key(10), Relation.TONE, 1)])
    )
    batch.put_verified(key(10), VERIFIED)
    batch.put_damage(DAMAGE)
    batch.put_scrub_pass(SCRUB)


def everything(index: Index) -> list[object]:
    return [
        index.all_files(Ino(-1), 1000),
        index.all_links(Ino(-1), 1000),
        index.all_directories(),
        index.all_groups(b"", 1000),
        index.paths(Ino(10), ROOT),
        index.sharers(key(10)),
        index.totals(),
        index.load_queue(),
        index.is_complete(),
        index.verified(key(10)),
        index.damages(),
        index.scrub_pass(),
        index.images.totals(),
        index.images.picture(key(10)),
        list(index.images.all_alike()),
        index.images.described_by(),
    ]


def meta_descriptor() -> int:
    """Through which LMDB writes the root page: each write is durable at once, which no other of its descriptors is."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            path, info = os.readlink(f"/proc/self/fd/{name}"), Path(f"/proc/self/fdinfo/{name}").read_text()
        except FileNotFoundError:
            continue  # that of the listing
        flags = int(info.split("flags:")[1].split()[0], 8)
        if path.endswith("/data.mdb") and flags & os.O_DSYNC:
            found.append(int(name))
    (fd,) = found
    return fd


def held() -> tuple[int, int, int]:
    """Descriptors, mappings of the index and of the tables of readers."""
    mapped = Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/fd")), mapped.count("/data.mdb"), mapped.count("/lock.mdb")


def kill(write: Callable[[], object]) -> None:
    """Have a write fail just when LMDB comes to the root page."""
    reading = os.open(os.devnull, os.O_RDONLY)
    os.dup2(reading, meta_descriptor())
    os.close(reading)
    with pytest.raises((IndexDamaged, lmdb.Error)):
        write()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "index"
    path.mkdir()
    return path


@pytest.fixture
def index(directory: Path) -> Iterator[Index]:
    with Index(os.fspath(directory), IDENTITY) as opened:
        batch = opened.batch()
        put_everything(batch)
        batch.commit()
        opened.save_queue([(Ino(1), b"one")])
        opened.images.set_described_by(7)
        yield opened
        assert opened.totals() == recompute(opened)
        assert list(opened.images.problems()) == []


def test_nothing_is_lost(index: Index) -> None:
    before = everything(index)
    batch = index.batch()
    put_file(batch, 12)
    kill(batch.commit)
    assert everything(index) == before
    batch.commit()
    assert index.holders(key(12)) == [Ino(12)]
    assert index.paths(Ino(12), ROOT) == [b"d/12"]
    assert index.images.is_new(key(12))
    assert index.totals().files == 3


def test_who_writes_may_be_the_next(index: Index) -> None:
    batch = index.batch()
    put_everything(batch)
    put_file(batch, 12)
    kill(batch.commit)
    batch.commit()
    assert index.totals().files == 3
    for number in (1, 2):
        kill(index.set_complete)
        index.save_queue([(Ino(number), b"next")])
        assert not index.is_complete()
        assert index.load_queue() == [(Ino(number), b"next")]
    kill(index.set_complete)
    index.clear()
    assert index.totals().files == 0


def test_a_batch_that_is_written_twice(index: Index) -> None:
    """As where the root page had been written, though not durably, when the disk failed."""
    batch = index.batch()
    put_everything(batch)
    before = everything(index)
    batch.commit()
    assert everything(index) == before


@pytest.mark.parametrize("ask", [Index.used_share, Index.is_complete, lambda index: index.images.waiting(1)])
def test_who_asks_may_be_the_next(index: Index, ask: Callable[[Index], object]) -> None:
    expected = ask(index)
    kill(index.set_complete)
    assert ask(index) == expected


def test_readers_notice_nothing(index: Index) -> None:
    """However often it happens, and nothing of what was open stays."""
    images, expected, before = index.images, everything(index), held()
    over = threading.Event()

    def read() -> int:
        times = 0
        while not over.is_set():
            assert everything(index)[:7] == expected[:7]
            assert images.picture(key(10)) == (RECORD, VIEWS)
            times += 1
        return times

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        try:
            for number in range(20):
                kill(index.set_complete)
                index.save_queue([(Ino(number), b"some")])
                index.save_queue([(Ino(1), b"one")])
        finally:
            over.set()
        assert all(reader.result() for reader in readers)
    assert held() == before


def test_who_reads_is_waited_for(index: Index) -> None:
    """What is written next would take the pages that are being read."""
    with ThreadPoolExecutor(1) as pool:
        with index._read() as (txn, tables):
            kill(index.set_complete)
            writing = pool.submit(index.save_queue, [])
            with pytest.raises(TimeoutError):
                writing.result(0.3)
            assert [value for _, value in txn.cursor(tables.queue)]
        writing.result()
    assert index.load_queue() == []


def test_who_reads_for_ever_is_not(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dedupfs.environment._READING_S", 0.01)
    with pytest.raises(IndexDamaged), index._read() as (txn, tables):
        kill(index.set_complete)
        index.save_queue([])
        txn.get(b"complete", db=tables.meta)
    assert index.load_queue() == []


def test_it_is_opened_once(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two who write would each think that they are the only one."""
    opened: list[Tables] = []
    open_all = Tables.open_all

    def counting(tables: Tables) -> None:
        opened.append(tables)
        open_all(tables)

    monkeypatch.setattr(Tables, "open_all", counting)
    kill(index.set_complete)
    with ThreadPoolExecutor(8) as pool:
        with index._environment._opening:
            asking = [pool.submit(index.is_complete) for _ in range(8)]
            with pytest.raises(TimeoutError):
                asking[-1].result(0.3)
        assert not any(each.result() for each in asking)
    assert opened == [index._environment.tables]


@pytest.mark.parametrize("use", [Index.is_complete, Index.set_incomplete])
def test_what_was_opened_may_be_dead_as_well(
    index: Index, monkeypatch: pytest.MonkeyPatch, use: Callable[[Index], object]
) -> None:
    """Somebody else was there between, and met the quota again."""
    open_all, times = Tables.open_all, iter(range(10))

    def deadly(tables: Tables) -> None:
        def write() -> None:
            with tables.env.begin(write=True) as txn:
                txn.put(b"complete", b"1", db=tables.meta)

        open_all(tables)
        if next(times) < 2:
            kill(write)

    monkeypatch.setattr(Tables, "open_all", deadly)
    kill(index.set_complete)
    assert not use(index)
    assert next(times) == 3


def test_what_was_opened_may_be_of_no_use_for_another_reason(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is not opened once more."""
    open_all = Tables.open_all
    held: list[lmdb.Transaction[bytes]] = []

    def write_in(tables: Tables) -> None:
        assert not held
        open_all(tables)
        held.append(tables.env.begin(write=True))

    monkeypatch.setattr(Tables, "open_all", write_in)
    kill(index.set_complete)
    with pytest.raises(IndexDamaged):
        index.set_complete()
    held.pop().abort()
    index.set_complete()


def test_nothing_else_has_it_opened_again(index: Index) -> None:
    with index._write() as (txn, tables):
        with pytest.raises(IndexDamaged):
            index.set_complete()  # within another, which would wait for ever
        txn.put(b"complete", b"1", db=tables.meta)
    assert index._environment.tables is tables
    assert index.is_complete()


# -- it cannot be opened


def test_another_file_is_in_its_place(index: Index, directory: Path) -> None:
    expected = everything(index)
    data, aside = directory / "data.mdb", directory / "aside"
    kill(index.set_complete)
    data.rename(aside)
    for _ in range(2):
        with pytest.raises(IndexDamaged):
            index.is_complete()
    assert not data.exists()
    shutil.copy(aside, data)
    with pytest.raises(IndexDamaged):
        index.is_complete()
    with pytest.raises(IndexDamaged):
        index.set_complete()
    aside.rename(data)
    assert everything(index) == expected


def no_room(_: str) -> None:
    raise OSError(errno.EMFILE, "no descriptor is left")


class Fails:
    def __contains__(self, name: str) -> bool:
        raise lmdb.DiskError("the disk fails")


@pytest.mark.parametrize(("part", "failing"), [("_lock_in_memory", no_room), ("_DUPSORT", Fails())])
def test_it_is_tried_again(index: Index, monkeypatch: pytest.MonkeyPatch, part: str, failing: object) -> None:
    expected, before = everything(index), held()
    kill(index.set_complete)
    with monkeypatch.context() as patched:
        patched.setattr(f"dedupfs.environment.{part}", failing)
        with pytest.raises(IndexDamaged, match=r"cannot be opened again.*(no descriptor|disk fails)") as reading:
            index.is_complete()
        with pytest.raises(IndexDamaged, match=r"cannot be opened again.*(no descriptor|disk fails)") as writing:
            index.set_complete()
        with pytest.raises(IndexDamaged):
            index.used_share()
    assert everything(index) == expected
    assert held() == before
    assert reading.value is not writing.value  # who keeps an error keeps nothing open


def test_one_that_was_cut_short_is_refused_and_closed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dedupfs.environment._VERIFIED_BYTES", 0)
    with Index(os.fspath(directory), IDENTITY) as index:
        index.save_queue([(Ino(number), b"x" * 100) for number in range(1000)])
    data = directory / "data.mdb"
    whole = data.read_bytes()
    os.truncate(data, len(whole) // 2)
    with pytest.raises(IndexDamaged) as refused:
        Index(os.fspath(directory), IDENTITY)
    data.write_bytes(whole)
    with Index(os.fspath(directory), IDENTITY) as index:
        assert len(index.load_queue()) == 1000
    assert "bytes" in str(refused.value)  # who keeps the error keeps nothing open


# -- it is closed


@pytest.fixture
def dead(directory: Path) -> Index:
    index = Index(os.fspath(directory), IDENTITY)
    index.set_complete()
    kill(index.set_incomplete)
    return index


def test_closed_when_it_is_dead(dead: Index, directory: Path) -> None:
    dead.close()
    with pytest.raises(IndexDamaged):
        dead.is_complete()
    with Index(os.fspath(directory), IDENTITY) as again:
        assert again.is_complete()


def test_closed_when_it_could_not_be_opened(dead: Index, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("dedupfs.environment._DUPSORT", Fails())
        with pytest.raises(IndexDamaged):
            dead.is_complete()
    dead.close()
    with pytest.raises(IndexDamaged):
        dead.is_complete()
    with Index(os.fspath(directory), IDENTITY) as again:
        assert again.is_complete()


def test_closed_while_it_is_opened(dead: Index, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, going_on = threading.Event(), threading.Event()
    open_all = Tables.open_all

    def slowly(tables: Tables) -> None:
        begun.set()
        assert going_on.wait(30)
        open_all(tables)

    monkeypatch.setattr(Tables, "open_all", slowly)
    with ThreadPoolExecutor(2) as pool:
        asking = pool.submit(dead.is_complete)
        assert begun.wait(30)
        closing = pool.submit(dead.close)
        with pytest.raises(TimeoutError):
            closing.result(0.3)
        going_on.set()
        closing.result()
        with suppress(IndexDamaged):
            asking.result()
    with Index(os.fspath(directory), IDENTITY) as again:
        assert again.is_complete()
