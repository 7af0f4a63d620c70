"""The store has one owner, says whether it was left in order, and refuses what it does not know."""

import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dedupfs import store as stores
from dedupfs.backing import Backing
from dedupfs.errors import Busy, SourceError, StoreError, UnknownFormat
from dedupfs.store import Store
from tests.support.acting import as_user
from tests.support.filesystems import FilesystemPool
from tests.support.tools import needs_root


@pytest.fixture
def backing(tmp_path: Path) -> Iterator[Backing]:
    opened = Backing(str(tmp_path))
    yield opened
    opened.close()


@pytest.fixture
def store(tmp_path: Path, backing: Backing) -> Path:
    """A store that was made and left."""
    with Store(backing) as made:
        made.mark_clean()
    return tmp_path / ".dedupfs"


def test_the_first_use_makes_it(tmp_path: Path, backing: Backing) -> None:
    with Store(backing) as made:
        assert not made.was_clean
        inside = tmp_path / ".dedupfs"
        assert stat.S_IMODE(inside.stat().st_mode) == 0o700
        known = json.loads((inside / "format").read_text())
        assert known["version"] == 1
        assert known["uuid"] == made.uuid == str(uuid.UUID(made.uuid))
        assert known["references"] == ("trusted" if os.geteuid() == 0 else "user")
        assert {"blobs", "index", "staging", "orphans", "quarantine", "lock", "format", "README"} == set(
            os.listdir(inside)
        )


def test_it_keeps_its_name(store: Path, backing: Backing) -> None:
    first = json.loads((store / "format").read_text())["uuid"]
    with Store(backing) as again:
        assert again.uuid == first


def test_one_owner(tmp_path: Path, backing: Backing) -> None:
    other = Backing(str(tmp_path))
    with Store(backing):
        assert stores.is_owned(other)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(Busy) as caught:
            Store(other)
        assert "offline command" in str(caught.value)
        assert len(os.listdir("/proc/self/fd")) == before
    assert not stores.is_owned(other)
    with Store(other):
        pass
    other.close()


def test_the_lock_of_a_store_that_was_removed(
    tmp_path: Path, backing: Backing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our opening the lock and taking it, the store was removed and made anew: it has one owner still."""
    other = Backing(str(tmp_path))
    began: list[Store] = []
    opening = backing.open

    def late(path: bytes, *how: Any) -> int:
        fd = opening(path, *how)
        if path == b".dedupfs/lock" and not began:
            shutil.rmtree(tmp_path / ".dedupfs")
            began.append(Store(other))
        return fd

    monkeypatch.setattr(backing, "open", late)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Busy):
        Store(backing)
    (owner,) = began
    owner.close()
    other.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1  # that of `other`


def test_who_owns_it_is_told(tmp_path: Path, backing: Backing) -> None:
    with Store(backing) as made:
        made.announce(mountpoint="/mnt/archive", socket="/run/x")
        assert stores.read_daemon(backing) == {"pid": os.getpid(), "mountpoint": "/mnt/archive", "socket": "/run/x"}
        other = Backing(str(tmp_path))
        with pytest.raises(Busy) as caught:
            Store(other)
        assert "/mnt/archive" in str(caught.value)
        assert str(os.getpid()) in str(caught.value)
        other.close()
        made.withdraw()
        made.withdraw()
        assert stores.read_daemon(backing) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"pid": 1}', b"\xff"])
def test_an_illegible_announcement_is_none(store: Path, backing: Backing, content: bytes) -> None:
    (store / "daemon.json").write_bytes(content)
    assert stores.read_daemon(backing) is None


def test_asking_who_owns_what_was_never_a_store(backing: Backing, tmp_path: Path) -> None:
    assert not stores.is_owned(backing)
    assert stores.read_daemon(backing) is None
    assert os.listdir(tmp_path) == []


def test_the_clean_mark_is_taken_away_while_it_is_owned(store: Path, backing: Backing) -> None:
    assert (store / "clean").exists()
    with Store(backing) as owned:
        assert owned.was_clean
        assert not (store / "clean").exists()
    with Store(backing) as owned:  # it was not marked before it was left
        assert not owned.was_clean
        owned.mark_clean()
        assert (store / "clean").exists()
    with Store(backing) as owned:
        assert owned.was_clean


@pytest.mark.parametrize("version", [0, 2, 99, "3"])
def test_another_format_is_refused(store: Path, backing: Backing, version: object) -> None:
    known = json.loads((store / "format").read_text())
    (store / "format").write_text(json.dumps({**known, "version": version}))
    with pytest.raises(UnknownFormat):
        Store(backing)
    (store / "format").write_text(json.dumps({"version": version}))  # which may look quite different
    with pytest.raises(UnknownFormat):
        Store(backing)
    assert (store / "clean").exists()  # not ours to touch
    assert not stores.is_owned(backing)


@pytest.mark.parametrize(
    "content", [b"garbage", b"{}", b"[]", b"null", b"1", b'{"version": 1}', b'{"version": "x"}', b"\xff\xfe", b'"x"']
)
def test_a_damaged_format_is_refused(store: Path, backing: Backing, content: bytes) -> None:
    (store / "format").write_bytes(content)
    with pytest.raises(StoreError) as caught:
        Store(backing)
    assert not isinstance(caught.value, UnknownFormat)
    assert "format" in str(caught.value)
    assert (store / "format").read_bytes() == content
    assert (store / "clean").exists()


def test_the_store_of_another_kind_of_user_is_refused(store: Path, backing: Backing) -> None:
    """Its references are kept under another name: to us they would be files of zeros."""
    known = json.loads((store / "format").read_text())
    other = "user" if known["references"] == "trusted" else "trusted"
    (store / "format").write_text(json.dumps({**known, "references": other}))
    with pytest.raises(SourceError) as caught:
        Store(backing)
    assert "made by" in str(caught.value)
    assert (store / "clean").exists()


def test_a_crash_before_the_format_was_written(tmp_path: Path, backing: Backing) -> None:
    (tmp_path / ".dedupfs").mkdir()
    (tmp_path / ".dedupfs/format.new").write_bytes(b'{"vers')
    with Store(backing) as made:
        assert made.uuid
    assert json.loads((tmp_path / ".dedupfs/format").read_text())["uuid"] == made.uuid


@pytest.mark.parametrize("who", [pytest.param("another's", marks=needs_root), "writable by all"])
def test_a_store_that_somebody_prepared(tmp_path: Path, backing: Backing, who: str) -> None:
    """Who can move the directories in it can put other contents in the place of ours."""
    inside = tmp_path / ".dedupfs"
    (inside / "blobs").mkdir(parents=True)
    if who == "another's":
        os.chown(inside, 20001, 20001)
    else:
        inside.chmod(0o777)
    with pytest.raises(SourceError) as caught:
        Store(backing)
    assert ".dedupfs" in str(caught.value)
    assert os.listdir(inside) == ["blobs"]


def test_directories_that_are_missing_are_made(store: Path, backing: Backing) -> None:
    for name in ("staging", "orphans", "quarantine"):
        (store / name).rmdir()
    with Store(backing):
        assert (store / "staging").is_dir()
        assert (store / "quarantine").is_dir()


def test_a_source_that_cannot_be_written(filesystem_pool: FilesystemPool) -> None:
    directory = filesystem_pool.get("ext4").directory("not writable")
    directory.chmod(0o555)

    def refuse() -> None:
        opened = Backing(str(directory))
        with pytest.raises(SourceError) as caught:
            Store(opened)
        assert str(directory) in str(caught.value)
        opened.close()

    as_user(20001, refuse)
    assert list(directory.iterdir()) == []


def test_a_copy_of_the_store_is_told_from_it(tmp_path: Path, backing: Backing) -> None:
    """The index names inodes by number: those of a copy are others."""
    with Store(backing) as made:
        identity = made.identity
    os.rename(tmp_path / ".dedupfs/format", tmp_path / ".dedupfs/format.old")
    (tmp_path / ".dedupfs/format").write_bytes((tmp_path / ".dedupfs/format.old").read_bytes())
    with Store(backing) as made:
        assert made.identity != identity


def test_a_store_below(tmp_path: Path, backing: Backing) -> None:
    (tmp_path / "a/b/c").mkdir(parents=True)
    inner = Backing(str(tmp_path / "a/b"))
    with Store(inner):
        pass
    inner.close()
    assert stores.is_in_another(backing, b"a/b/c/file")
    assert stores.is_in_another(backing, b"a/b/file")
    assert not stores.is_in_another(backing, b"a/file")
    assert not stores.is_in_another(backing, b"file")
    with Store(backing):
        assert not stores.is_in_another(backing, b"file")
