"""The search finds what is near, in whatever form, and nothing else; and is as fast and as small as promised."""

import random
import time
from dataclasses import replace

import numpy as np
import pytest

from dedupfs.gallery import Gallery, columns_of
from dedupfs.likeness import FORMS, UPRIGHT_RADIUS, distance, form_of, hash_of, levels_of
from dedupfs.model import ContentKey, Digest, ImageRecord, Thumbnails
from tests.unit.test_authority import RECORD


def content(number: int) -> ContentKey:
    return ContentKey(Digest(number.to_bytes(16, "big")))


def picture(noise: random.Random) -> tuple[ImageRecord, Thumbnails]:
    coarse = np.frombuffer(noise.randbytes(144), dtype=np.uint8).reshape(12, 12)
    levels = np.kron(coarse, np.ones((6, 6), dtype=np.uint8))[:64, :64]
    thumbnails = Thumbnails(np.ascontiguousarray(levels).tobytes())
    return replace(RECORD, phash=hash_of(levels_of(thumbnails.full))), thumbnails


def changed(hashed: bytes, bits: int, noise: random.Random) -> bytes:
    mask = sum(1 << place for place in noise.sample(range(256), bits))
    return (int.from_bytes(hashed) ^ mask).to_bytes(32)


def test_it_finds_what_is_near_and_says_how_near() -> None:
    noise = random.Random(1)
    gallery = Gallery()
    record, thumbnails = picture(noise)
    gallery.add([(content(number), [noise.randbytes(32)]) for number in range(5000)])
    for number, bits in ((6000, 0), (6001, 30), (6002, 84), (6003, 85)):
        gallery.add([(content(number), [changed(record.phash, bits, noise)])])
    two_views = [noise.randbytes(32), changed(record.phash, 10, noise)]
    gallery.add([(content(6004), two_views), (content(6005), [noise.randbytes(32)])])
    assert len(gallery) == 5006
    expected = [(0, content(6000)), (10, content(6004)), (30, content(6001)), (84, content(6002))]
    assert gallery.near(record, thumbnails, 100) == expected
    assert gallery.near(record, thumbnails, 2) == expected[:2]
    gallery.clear()
    assert gallery.near(record, thumbnails, 100) == []


def test_it_finds_all_eight_forms() -> None:
    noise = random.Random(2)
    for _ in range(20):
        gallery = Gallery()
        record, thumbnails = picture(noise)
        levels = levels_of(thumbnails.full)
        for form in range(len(FORMS)):
            gallery.add([(content(form), [changed(hash_of(form_of(levels, form)), 12, noise)])])
        found = {one.digest[-1] for far, one in gallery.near(record, thumbnails, 100) if far <= 20}
        assert found == set(range(8))


def test_it_finds_the_same_by_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = random.Random(5)
    gallery = Gallery()
    record, thumbnails = picture(noise)
    hashes = [[changed(record.phash, noise.randint(0, 128), noise) for _ in range(2)] for _ in range(3000)]
    gallery.add([(content(number), views) for number, views in enumerate(hashes)])
    alone = gallery.near(record, thumbnails, 5000)
    assert alone == sorted(
        (nearest, content(number))
        for number, views in enumerate(hashes)
        if (nearest := min(distance(record.phash, view) for view in views)) <= UPRIGHT_RADIUS
    )
    monkeypatch.setattr("dedupfs.gallery._WORTH_A_THREAD", 1000)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(3))
    assert gallery.near(record, thumbnails, 5000) == alone
    assert gallery.near(record, thumbnails, 7) == alone[:7]


def test_the_distance_of_columns_is_the_distance_of_hashes() -> None:
    noise = random.Random(3)
    hashes = [noise.randbytes(32) for _ in range(50)]
    columns = columns_of(hashes)
    for number in range(49):
        by_columns = int(np.bitwise_count(columns[:, number] ^ columns[:, number + 1]).sum())
        assert by_columns == distance(hashes[number], hashes[number + 1])


def test_size_and_time_with_a_hundred_thousand() -> None:
    """The real figures are in docs/similarity.md; this is so that nothing becomes ten times as slow unnoticed."""
    noise = random.Random(4)
    gallery = Gallery()
    gallery.add([(content(number), [noise.randbytes(32)]) for number in range(100_000)])
    assert gallery.size_bytes / len(gallery) < 100
    record, thumbnails = picture(noise)
    gallery.near(record, thumbnails, 10)
    begin = time.process_time()
    for _ in range(10):
        gallery.near(record, thumbnails, 10)
    assert (time.process_time() - begin) / 10 < 0.05
