"""Names of blobs, and what the blobs of a store do on their own."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedupfs.backing import Backing
from dedupfs.blobs import Blobs, parse_name
from dedupfs.errors import DamagedContent
from dedupfs.model import ContentKey, Digest
from dedupfs.store import Store
from tests.support.filesystems import remove_tree

KEY = ContentKey(Digest(bytes(range(16))), 0)
NAME = "000102030405060708090a0b0c0d0e0f"


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    remove_tree(tmp_path / ".dedupfs")


@pytest.fixture
def blobs(source: Path) -> Iterator[Blobs]:
    backing = Backing(str(source))
    with Store(backing):
        yield Blobs(backing)
    backing.close()


@given(st.binary(min_size=16, max_size=16).map(Digest), st.integers(0, 65535))
def test_a_name_names_its_content(digest: Digest, number: int) -> None:
    content = ContentKey(digest, number)
    assert parse_name(content.name) == content
    assert Blobs.path(content) == b".dedupfs/blobs/%s/%s" % (content.name[:2].encode(), content.name.encode())


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", NAME, f"{NAME}.", f"{NAME}.x", f"{NAME}.-1", f"{NAME}.65536", f"{NAME}.01", f"{NAME}.+1",
     f"{NAME}.1.0", f"{NAME}. 1", f"{NAME}.0 ", f"{NAME}.1_0", f"{NAME}.\u0661", f"{NAME[:-2]}.0", f"{NAME}00.0",
     f"{NAME.upper()}.0", f"{NAME[:2]} {NAME[2:]}.0", f"x{NAME[1:]}.0"],
)  # fmt: skip
def test_other_names_are_not_blobs(name: str) -> None:
    assert parse_name(name) is None


@given(st.text())
def test_no_text_is_misread(name: str) -> None:
    content = parse_name(name)
    assert content is None or content.name == name


def test_publish_open_remove(source: Path, blobs: Blobs) -> None:
    (source / "file").write_bytes(b"content")
    assert not blobs.usable(KEY)
    assert blobs.stat(KEY) is None
    blobs.publish(b"file", KEY)
    assert not blobs.usable(KEY)  # it is somebody's file as well
    os.unlink(source / "file")
    assert blobs.usable(KEY)
    blobs.seal(KEY)
    blobs.seal(KEY)
    fd = blobs.open(KEY, 7)
    assert os.read(fd, 10) == b"content"
    os.close(fd)
    assert [content for content, _ in blobs.list()] == [KEY]
    blobs.remove(KEY)
    assert blobs.stat(KEY) is None
    blobs.remove(KEY)
    assert list(blobs.list()) == []


def test_publishing_twice_is_refused(source: Path, blobs: Blobs) -> None:
    for name in ("one", "two"):
        (source / name).write_bytes(name.encode())
    blobs.publish(b"one", KEY)
    with pytest.raises(FileExistsError):
        blobs.publish(b"two", KEY)
    fd = blobs.open(KEY, 3)
    assert os.read(fd, 10) == b"one"
    os.close(fd)


def test_what_cannot_be_vouched_for_is_not_opened(source: Path, blobs: Blobs) -> None:
    with pytest.raises(DamagedContent):
        blobs.open(KEY, 7)
    (source / "file").write_bytes(b"content")
    blobs.publish(b"file", KEY)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DamagedContent):
        blobs.open(KEY, 8)
    assert len(os.listdir("/proc/self/fd")) == before


def test_supersede_keeps_both(source: Path, blobs: Blobs) -> None:
    (source / "bad").write_bytes(b"bad")
    blobs.publish(b"bad", KEY)
    os.unlink(source / "bad")
    blobs.seal(KEY)
    for number in range(2):
        (source / "good").write_bytes(b"good%d" % number)
        blobs.supersede(b"good", KEY)
        os.unlink(source / "good")
        blobs.seal(KEY)
    assert (source / os.fsdecode(Blobs.path(KEY))).read_bytes() == b"good1"
    kept = sorted(path.read_bytes() for path in (source / ".dedupfs/quarantine").iterdir())
    assert kept == [b"bad", b"good0"]


def test_supersede_what_is_missing(source: Path, blobs: Blobs) -> None:
    (source / "good").write_bytes(b"good")
    blobs.supersede(b"good", KEY)
    assert (source / os.fsdecode(Blobs.path(KEY))).read_bytes() == b"good"
    assert os.listdir(source / ".dedupfs/quarantine") == []


def test_detach_parts_a_blob_from_a_file(source: Path, blobs: Blobs) -> None:
    (source / "file").write_bytes(b"content")
    blobs.publish(b"file", KEY)
    blobs.detach(KEY)
    assert blobs.usable(KEY)
    (source / "file").write_bytes(b"changed")
    fd = blobs.open(KEY, 7)
    assert os.read(fd, 10) == b"content"
    os.close(fd)


def test_the_seal_takes_what_was_the_files(source: Path, blobs: Blobs) -> None:
    (source / "file").write_bytes(b"content")
    os.setxattr(source / "file", "user.comment", b"mine")
    blobs.publish(b"file", KEY)
    os.unlink(source / "file")
    blobs.seal(KEY)
    path = source / os.fsdecode(Blobs.path(KEY))
    assert path.stat().st_mode & 0o7777 == 0o400
    assert "user.comment" not in os.listxattr(path)


def test_what_goes_while_it_is_listed_is_passed_over(source: Path, blobs: Blobs) -> None:
    """As the last reference of a blob may, beside a scan."""
    keys = {ContentKey(KEY.digest, number) for number in range(3)}
    for key in keys:
        (source / "file").write_bytes(b"content")
        blobs.publish(b"file", key)
        os.unlink(source / "file")
    found = blobs.list()
    keys.remove(next(found)[0])
    for key in keys:
        blobs.remove(key)
    assert list(found) == []


def test_strangers_are_passed_over(source: Path, blobs: Blobs) -> None:
    directory = source / ".dedupfs/blobs"
    (directory / "stray").write_bytes(b"")
    (directory / "ab").mkdir()
    (directory / "ab" / "stray").write_bytes(b"")
    (directory / "ab" / f"{NAME}.0.new").write_bytes(b"")
    assert list(blobs.list()) == []
