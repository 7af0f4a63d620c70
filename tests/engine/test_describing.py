"""Describing gives way: to an index that cannot be written, to files that change, to who takes the mount down."""

import io
import os

import pytest
import xxhash
from PIL import Image

from dedupfs import describing
from dedupfs.errors import IndexDamaged
from dedupfs.imagetables import Described
from dedupfs.index import Batch
from dedupfs.magic import looks_like_picture
from dedupfs.model import ContentKey, Digest, ImageState, Ino
from tests.engine.bench import Bench, impatient
from tests.support import hostile
from tests.support.photos import photographs


def picture(number: int = 0) -> bytes:
    return photographs(number + 1, jpeg=True)[number].read_bytes()


def state_of(bench: Bench, path: str) -> ImageState | None:
    record = bench.engine.index.file(Ino(os.lstat(bench.below(path)).st_ino))
    assert record is not None
    entry = bench.engine.index.images.entry(record.content)
    return None if entry is None else entry.state


def test_without_a_mount_pictures_wait_for_one(bench: Bench) -> None:
    bench.write("one.jpg", picture())
    bench.write("text", b"no picture")
    bench.settle()
    assert bench.status()["pictures_waiting"] == 1
    bench.reopen(start=True)
    bench.settle()
    assert state_of(bench, "one.jpg") is ImageState.DESCRIBED
    assert state_of(bench, "text") is ImageState.NO_PICTURE
    assert bench.status()["pictures_waiting"] == 0


def test_an_index_that_cannot_be_written_now(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Describing goes on when it can be, and does not keep the mount from going down meanwhile."""
    commit, refused = Batch.commit, []

    def commit_without_pictures(batch: Batch) -> None:
        if batch._described:
            refused.append(batch)
            raise IndexDamaged("the index cannot be written (a full disk)")
        commit(batch)

    monkeypatch.setattr(describing, "_RETRY_S", 0.02)
    monkeypatch.setattr(Batch, "commit", commit_without_pictures)
    bench.expect_log("describing goes on later")
    bench.reopen(start=True)
    bench.write("one.jpg", picture())
    bench.engine.settle(impatient(), exact=True)
    bench.wait_for(lambda: len(refused) > 3)
    bench.reopen(start=True)
    bench.wait_for(lambda: len(refused) > 6)
    assert state_of(bench, "one.jpg") is ImageState.WAITING
    monkeypatch.setattr(Batch, "commit", commit)
    bench.settle()
    assert state_of(bench, "one.jpg") is ImageState.DESCRIBED


def test_a_file_that_changed_behind_our_back_is_not_described_as_what_it_was(bench: Bench) -> None:
    bench.write("one.jpg", picture())
    bench.settle()
    bench.below("one.jpg").write_bytes(picture(1))
    bench.reopen(start=True)
    assert bench.engine.imaging is not None
    assert bench.engine.imaging.describer.wait_idle(30)
    assert state_of(bench, "one.jpg") is ImageState.WAITING
    bench.scan()
    bench.settle()
    assert state_of(bench, "one.jpg") is ImageState.DESCRIBED
    assert bench.status()["pictures_waiting"] == 0


def test_one_content_is_described_once_from_file_or_blob(bench: Bench) -> None:
    bench.reopen(start=True)
    for name in ("one.jpg", "two.jpg", "three.jpg"):
        bench.write(name, picture())
    bench.settle()
    assert bench.is_reference("one.jpg")
    assert bench.status()["pictures_described"] == 1
    bench.unlink("one.jpg")
    bench.unlink("two.jpg")
    bench.settle()
    assert bench.status()["pictures_described"] == 1
    bench.unlink("three.jpg")
    bench.settle()
    assert bench.status()["pictures_described"] == 0


def test_a_file_that_becomes_a_blob_just_now_is_described(bench: Bench) -> None:
    """The tree has a reference in its place, and the index has not heard of that: who asks about it is answered."""
    bench.reopen(start=True)
    bench.write("one.jpg", picture())
    bench.settle()
    engine = bench.engine
    record = engine.index.file(Ino(bench.below("one.jpg").stat().st_ino))
    assert record is not None
    assert engine.imaging is not None
    describer, commit, described = engine.imaging.describer, engine.settler._commit, []

    def look_and_commit(batch: Batch) -> None:
        if bench.is_reference("one.jpg"):
            described.append(describer._describe(record.content))
        commit(batch)

    engine.settler._commit = look_and_commit  # type: ignore[method-assign]
    bench.write("two.jpg", picture())
    bench.settle()
    engine.settler._commit = commit  # type: ignore[method-assign]
    assert described
    assert None not in described


def test_a_file_that_becomes_a_blob_while_it_is_described(bench: Bench) -> None:
    """What was described may be of a file that somebody was writing to; so it is again, and who asks waits for that."""
    bench.reopen(start=True)
    engine = bench.engine
    assert engine.imaging is not None
    describer, described = engine.imaging.describer, []
    describe = describer._describe_open

    def describe_and_share(fd: int) -> Described:
        described.append(describe(fd))
        if len(described) == 1:
            bench.write("two.jpg", picture())
            assert engine.settler.wait_idle(30)
        return described[-1]

    describer._describe_open = describe_and_share  # type: ignore[method-assign]
    bench.write("one.jpg", picture())
    entry = describer.entry(ContentKey(Digest(xxhash.xxh3_128_digest(picture())), 0), 30)
    bench.settle()
    entry = entry or describer.entry(ContentKey(Digest(xxhash.xxh3_128_digest(picture())), 0), 30)
    assert bench.is_reference("one.jpg")
    assert entry is not None
    assert entry.state is ImageState.DESCRIBED
    assert len(described) == 2


def test_what_cannot_be_read_and_goes_is_forgotten_under_a_steady_stream(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is always another file to be described, so that nobody rests."""
    bench.reopen(start=True)
    assert bench.engine.imaging is not None
    describer = bench.engine.imaging.describer
    monkeypatch.setattr(describer, "_describe", lambda content: None)
    monkeypatch.setattr(describer, "_rest", lambda: describer._pause(0.01))
    gone, stays = (ContentKey(Digest(xxhash.xxh3_128_digest(picture(number))), 0) for number in (0, 1))
    for number, name in enumerate(("gone.jpg", "stays.jpg")):
        bench.write(name, picture(number))
    bench.wait_for(lambda: {gone, stays} <= describer._put_off.keys())
    bench.unlink("gone.jpg")
    bench.wait_for(lambda: gone not in describer._put_off)
    assert stays in describer._put_off
    monkeypatch.undo()


def test_what_is_no_picture_never_waits(bench: Bench) -> None:
    """Settling has its first bytes in memory, and nobody opens it for them again."""
    bench.write("notes.jpg", b"no picture, whatever it is called" * 200)
    bench.write("again.txt", b"no picture, whatever it is called" * 200)
    bench.write("one", picture())
    bench.settle()
    assert state_of(bench, "notes.jpg") is ImageState.NO_PICTURE
    assert state_of(bench, "one") is ImageState.WAITING
    assert bench.status()["pictures_waiting"] == 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "HEIF"])
def test_a_picture_is_known_by_its_first_bytes(kind: str) -> None:
    out = io.BytesIO()
    Image.new("RGB", (20, 20)).save(out, kind)
    assert looks_like_picture(out.getvalue()[:32])


@pytest.mark.parametrize("head", [b"", b"B", b"BM", b"GIF", b"%PDF-1.7", b"PK\3\4", b"RIFF\0\0\0\0WAVE", b"text"])
def test_what_is_no_picture(head: bytes) -> None:
    assert not looks_like_picture(head)


def test_hostile_files_look_like_pictures() -> None:
    """Or they would never come to a worker."""
    assert sum(looks_like_picture(data[:32]) for _, data in hostile.malformed(200, 3)) > 120
