"""The tables of pictures keep in step with the files, in every order of events, and say so when they are not."""

import os
import random
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedupfs import codec
from dedupfs.errors import StoreError
from dedupfs.imagetables import Described
from dedupfs.index import Index
from dedupfs.model import (
    Alike,
    ContentKey,
    Digest,
    FileRecord,
    FileState,
    ImageEntry,
    ImageRecord,
    ImageState,
    ImageTotals,
    Ino,
    Relation,
    Stamp,
    Thumbnails,
)
from tests.unit.test_authority import RECORD

VIEWS = Thumbnails(bytes(range(256)) * 16)

texts = st.text(st.characters(exclude_categories=("C", "Z")), max_size=60)
marks = st.sampled_from([b"", bytes(range(16))])
records = st.builds(
    ImageRecord,
    version=st.integers(0, 2**32 - 1),
    format=texts,
    width=st.integers(1, 2**32 - 1),
    height=st.integers(1, 2**32 - 1),
    orientation=st.integers(1, 8),
    phash=st.binary(min_size=32, max_size=32),
    trimmed_phash=st.sampled_from([b"", bytes(32)]),
    scan=marks,
    pixels=marks,
    quality=st.integers(0, 100),
    contrast=st.integers(0, 2**16 - 1),
    bright_permille=st.integers(0, 1000),
    is_grey=st.booleans(),
    taken=texts,
    zone=texts,
    make=texts,
    camera=texts,
    serial=texts,
    software=texts,
    has_gps=st.booleans(),
)


# -- the bytes


@given(records)
def test_image_records(record: ImageRecord) -> None:
    assert codec.decode_image(codec.encode_image(record)) == record
    entry = ImageEntry(ImageState.DESCRIBED, record=record)
    assert codec.decode_image_entry(codec.encode_image_entry(entry)) == entry
    views = Thumbnails(VIEWS.full, VIEWS.full if record.trimmed_phash else b"")
    assert codec.decode_description(codec.encode_description(record, views)) == (record, views)


@given(st.binary(max_size=400))
def test_whatever_a_worker_answers_is_a_description_or_an_error(value: bytes) -> None:
    for decode in (codec.decode_description, codec.decode_image, codec.decode_thumbnails, codec.decode_image_entry):
        try:
            decode(value)
        except StoreError:
            continue


@given(records, st.randoms(use_true_random=False))
def test_a_description_with_changed_bytes_is_one_or_an_error(record: ImageRecord, noise: random.Random) -> None:
    value = bytearray(codec.encode_description(record, Thumbnails(VIEWS.full, VIEWS.full)))
    for _ in range(3):
        value[noise.randrange(len(value))] = noise.randrange(256)
    try:
        found, views = codec.decode_description(bytes(value))
    except StoreError:
        return
    assert len(views.full) == 4096
    assert all(text.isprintable() for text in (found.make, found.camera, found.software, found.taken))


def test_a_thumbnail_that_would_fill_the_memory() -> None:
    with pytest.raises(StoreError):
        codec.decode_thumbnails(b"\1" + zlib.compress(bytes(100 << 20)))


@pytest.mark.parametrize("relation", Relation)
def test_likenesses(relation: Relation) -> None:
    alike = Alike(content(7), relation, 256)
    assert codec.decode_alike(codec.encode_alike(alike)) == alike


# -- the tables


def content(number: int) -> ContentKey:
    return ContentKey(Digest(number.to_bytes(16, "big")))


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    (tmp_path / "index").mkdir()
    with Index(os.fspath(tmp_path / "index"), "a store") as opened:
        yield opened
        assert list(opened.images.problems()) == []


def put_files(index: Index, *numbers: int, first_ino: int = 0) -> None:
    batch = index.batch()
    for number in numbers:
        record = FileRecord(Stamp(10, 1, 1), FileState.PLAIN, content(number))
        batch.put_file(Ino(first_ino or number), record)
    batch.commit()


def described(*alike: int) -> Described:
    entry = ImageEntry(ImageState.DESCRIBED, record=RECORD)
    return Described(entry, VIEWS, [Alike(content(number), Relation.RESIZED, 3) for number in alike])


def put_images(index: Index, images: dict[int, Described]) -> None:
    batch = index.batch()
    for number, each in images.items():
        batch.put_image(content(number), each)
    batch.commit()


def forget(index: Index, number: int) -> None:
    batch = index.batch()
    batch.forget_file(Ino(number))
    batch.commit()


def test_the_newest_is_next(index: Index) -> None:
    put_files(index, 5, 1, 9)
    put_files(index, 3)
    assert index.images.waiting(10) == [content(number) for number in (3, 9, 1, 5)]
    assert index.images.waiting(2) == [content(3), content(9)]
    assert index.images.totals() == ImageTotals(0, 4, 0)
    put_images(index, {3: described(), 1: Described(ImageEntry(ImageState.UNDESCRIBABLE, reason="damaged"))})
    put_images(index, {9: Described(ImageEntry(ImageState.NO_PICTURE))})
    assert index.images.waiting(10) == [content(5)]
    assert index.images.totals() == ImageTotals(1, 1, 1)
    assert list(index.images.all_undescribable()) == [(content(1), "damaged")]
    assert index.images.picture(content(3)) == (RECORD, VIEWS)
    assert list(index.images.all_pictures()) == [(content(3), RECORD)]


def test_a_second_file_with_a_content_changes_nothing(index: Index) -> None:
    put_files(index, 1)
    put_images(index, {1: described()})
    put_files(index, 1, first_ino=100)
    forget(index, 1)
    assert index.images.picture(content(1)) == (RECORD, VIEWS)
    assert index.images.totals() == ImageTotals(1, 0, 0)


def test_the_last_file_takes_everything_with_it(index: Index) -> None:
    put_files(index, 1, 2, 3, 4)
    put_images(index, {1: described(), 2: described(1), 3: described(1, 2)})
    assert [alike.content for alike in index.images.alike(content(1))] == [content(2), content(3)]
    forget(index, 2)
    assert [alike.content for alike in index.images.alike(content(1))] == [content(3)]
    assert dict(index.images.all_alike()) == {
        content(1): [Alike(content(3), Relation.RESIZED, 3)],
        content(3): [Alike(content(1), Relation.RESIZED, 3)],
    }
    for number in (1, 3, 4):
        forget(index, number)
    assert index.images.totals() == ImageTotals()
    assert index.images.entry(content(4)) is None
    assert list(index.images.all_alike()) == []


def test_what_was_described_of_a_content_that_is_gone_is_dropped(index: Index) -> None:
    put_files(index, 1, 2)
    forget(index, 1)
    put_images(index, {1: described(), 2: described(1)})
    assert index.images.entry(content(1)) is None
    assert index.images.alike(content(2)) == []


def test_a_file_that_changes_and_changes_back_in_one_batch(index: Index) -> None:
    put_files(index, 1)
    put_images(index, {1: described()})
    batch = index.batch()
    batch.doubt_file(Ino(1))
    batch.put_file(Ino(1), FileRecord(Stamp(10, 2, 2), FileState.PLAIN, content(1)))
    batch.commit()
    assert index.images.picture(content(1)) is not None


def test_another_describing_path_puts_all_back_behind_what_is_new(index: Index) -> None:
    put_files(index, *range(1, 8))
    put_images(index, {number: described() for number in range(1, 7)})
    index.images.set_described_by(1)
    assert index.images.described_by() == 1
    position, rounds = b"", 0
    while rounds == 0 or position:
        position = index.images.put_back(position, 2)
        rounds += 1
        assert index.images.described_by() is None
    put_files(index, 9)
    assert index.images.waiting(2) == [content(9), content(7)]
    assert index.images.totals() == ImageTotals(0, 8, 0)
    index.images.set_described_by(2)


def test_random_events_keep_them_in_step(index: Index) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    noise = random.Random(seed)
    held: dict[int, int] = {}
    for _ in range(300):
        batch = index.batch()
        for _ in range(noise.randrange(1, 5)):
            ino = noise.randrange(1, 15)
            if noise.random() < 0.6:
                held[ino] = noise.randrange(1, 12)
                record = FileRecord(Stamp(10, 1, 1), FileState.PLAIN, content(held[ino]))
                batch.put_file(Ino(ino), record)
            else:
                held.pop(ino, None)
                batch.forget_file(Ino(ino))
        for number in noise.sample(range(1, 12), noise.randrange(3)):
            others = [other for other in noise.sample(range(1, 12), 2) if other != number]
            batch.put_image(content(number), noise.choice((described(*others), described())))
        batch.commit()
        known = {number for number in range(1, 12) if index.images.entry(content(number)) is not None}
        assert known == set(held.values())
    assert list(index.images.problems()) == []


def test_clearing_clears_all(index: Index) -> None:
    put_files(index, 1, 2)
    put_images(index, {1: described(), 2: described(1)})
    index.clear()
    assert index.images.totals() == ImageTotals()
    assert list(index.images.all_alike()) == []
    assert list(index.images.all_pictures()) == []


def test_fsck_is_told_of_disagreement(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    with Index(os.fspath(tmp_path / "index"), "a store") as index:
        put_files(index, 1, 2)
        put_images(index, {1: described(), 2: described(1)})
        images = index.images
        with index._write() as (txn, tables):
            txn.delete(codec.encode_content(content(1)), db=tables.thumbnails)
            txn.put(
                codec.encode_content(content(5)),
                codec.encode_image_entry(ImageEntry(ImageState.NO_PICTURE)),
                db=tables.images,
            )
            txn.put(
                codec.encode_content(content(1)),
                codec.encode_alike(Alike(content(6), Relation.TONE, 1)),
                db=tables.alike,
            )
        found = list(images.problems())
    assert len(found) == 4, found


def test_records_of_another_version_differ(index: Index) -> None:
    put_files(index, 1)
    other = Described(ImageEntry(ImageState.DESCRIBED, record=replace(RECORD, version=7)), VIEWS)
    put_images(index, {1: other})
    assert [record.version for _, record in index.images.all_pictures()] == [7]
