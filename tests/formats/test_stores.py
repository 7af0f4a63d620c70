"""Stores put together by hand from docs/format.md, without the code that writes them: this release reads version 1, and
refuses what it does not know before it changes anything."""

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from dedupfs.config import MountOptions, Share
from dedupfs.engine import Engine
from dedupfs.errors import DedupfsError, SourceError, StoreError, UnknownFormat
from dedupfs.fsck import fsck
from dedupfs.model import Caller
from tests.support.filesystems import FilesystemPool, Unsupported, remove_tree

PICTURE = b"photograph" * 1000
DIGEST = "6918c49309adce5b9f820ad8f3980c7a"  # xxhsum -H2
MTIME_NS = 1_234_567_890_123_456_789
NAMESPACE = "trusted" if os.geteuid() == 0 else "user"
XATTR = f"{NAMESPACE}.dedupfs.ref"
ME = Caller(os.geteuid(), os.getegid(), os.getpid())


def silent(phase: str, done: int, total: int | None) -> None:
    pass


def record(flags: int = 0, collision: int = 0, mtime_ns: int = 0, version: int = 1) -> bytes:
    body = bytes([version, flags]) + collision.to_bytes(2, "big") + len(PICTURE).to_bytes(8, "big")
    body += bytes.fromhex(DIGEST) + (mtime_ns // 10**9).to_bytes(8, "big") + (mtime_ns % 10**9).to_bytes(4, "big")
    return body + zlib.crc32(body).to_bytes(4, "big")


def refer(path: Path, value: bytes, size_bytes: int = len(PICTURE)) -> None:
    path.write_bytes(b"")
    os.setxattr(path, XATTR, value)
    os.truncate(path, size_bytes)
    path.chmod(0o640)
    os.utime(path, ns=(MTIME_NS, MTIME_NS))


@pytest.fixture
def source(filesystem_pool: FilesystemPool, request: pytest.FixtureRequest) -> Iterator[Path]:
    """An archive of version 1: two references, a plain file, and a store without an index, as after a long time."""
    try:
        directory = filesystem_pool.get("ext4").directory(request.node.name)
    except Unsupported as problem:
        pytest.skip(str(problem))
    store = directory / ".dedupfs"
    for name in ("blobs/69", "staging", "orphans", "quarantine"):
        (store / name).mkdir(parents=True)
    identity = {"version": 1, "uuid": "0b1c2d3e-0000-4000-8000-0123456789ab", "references": NAMESPACE}
    (store / "format").write_text(json.dumps(identity))
    (store / "lock").touch()
    blob = store / "blobs/69" / f"{DIGEST}.0"
    blob.write_bytes(PICTURE)
    blob.chmod(0o400)
    (directory / "sub").mkdir()
    refer(directory / "one.jpg", record())
    refer(directory / "sub/two.jpg", record())
    (directory / "plain.jpg").write_bytes(b"plain" * 2000)
    yield directory
    remove_tree(directory)


def read(engine: Engine, path: str) -> bytes:
    handle = engine.vfs.open(os.fsencode(path), os.O_RDONLY, ME)
    try:
        buffer = bytearray(1 << 20)
        return bytes(buffer[: engine.vfs.io.read(handle, memoryview(buffer), 0)])
    finally:
        engine.vfs.io.release(handle)


def test_it_is_read_at_once(source: Path) -> None:
    with Engine(str(source), MountOptions(share=Share.REFERENCE)) as engine:
        assert read(engine, "one.jpg") == read(engine, "sub/two.jpg") == PICTURE
        assert read(engine, "plain.jpg") == b"plain" * 2000
        engine.scan(silent)
        group = engine.duplicates(b"one.jpg")
        assert group == {"digest": DIGEST, "size_bytes": len(PICTURE), "paths": ["one.jpg", "sub/two.jpg"]}
    assert fsck(str(source), repair=False, progress=silent).findings == []


def test_it_is_taken_apart_again(source: Path) -> None:
    with Engine(str(source), MountOptions(share=Share.REFERENCE)) as engine:
        assert engine.restore([], silent)["restored"] == 2
    remove_tree(source / ".dedupfs")
    for path in (source / "one.jpg", source / "sub/two.jpg"):
        assert path.read_bytes() == PICTURE
        assert (path.stat().st_mode & 0o7777, path.stat().st_mtime_ns) == (0o640, MTIME_NS)
        assert os.listxattr(path) == []


@pytest.mark.parametrize("copied_bytes", [0, 5000, len(PICTURE)])
def test_an_unfinished_copy(source: Path, copied_bytes: int) -> None:
    path = source / "one.jpg"
    os.setxattr(path, XATTR, record(flags=1, mtime_ns=MTIME_NS))
    with open(path, "r+b") as file:
        file.write(PICTURE[:copied_bytes])
    with Engine(str(source), MountOptions(share=Share.REFERENCE)) as engine:
        assert read(engine, "one.jpg") == PICTURE
        engine.scan(silent)
    assert os.getxattr(path, XATTR) == record()
    assert path.stat().st_mtime_ns == MTIME_NS
    assert fsck(str(source), repair=False, progress=silent).findings == []


def test_a_record_on_an_empty_file(source: Path) -> None:
    refer(source / "one.jpg", record(), size_bytes=0)
    with Engine(str(source), MountOptions(share=Share.REFERENCE)) as engine:
        assert read(engine, "one.jpg") == b""
        engine.scan(silent)
    assert fsck(str(source), repair=False, progress=silent).findings == []


@pytest.mark.parametrize(
    "value",
    [b"", b"\x01", record()[:-1], record() + b"\0", record(version=2), record(flags=2), record()[:-1] + b"\xff"],
    ids=["empty", "short", "shorter", "longer", "newer", "unknown flag", "checksum"],
)
def test_a_reference_that_is_not_understood(source: Path, value: bytes) -> None:
    """It is an error for that file, and no blob goes while nobody knows which one it names."""
    os.setxattr(source / "one.jpg", XATTR, value)
    os.unlink(source / "sub/two.jpg")
    with Engine(str(source), MountOptions(share=Share.REFERENCE)) as engine:
        with pytest.raises(StoreError):
            read(engine, "one.jpg")
        engine.scan(silent)
    assert (source / ".dedupfs/blobs/69" / f"{DIGEST}.0").read_bytes() == PICTURE
    report = fsck(str(source), repair=True, progress=silent)
    assert report.exit_code == 2
    assert (source / ".dedupfs/blobs/69" / f"{DIGEST}.0").read_bytes() == PICTURE
    assert os.getxattr(source / "one.jpg", XATTR) == value


def _snapshot(source: Path) -> object:
    found = {}
    for directory, directories, names in os.walk(source):
        for name in directories + names:
            path = Path(directory, name)
            data = path.read_bytes() if path.is_file() else None
            attributes = {each: os.getxattr(path, each) for each in os.listxattr(path)}
            found[str(path.relative_to(source))] = (path.stat().st_mode, path.stat().st_mtime_ns, data, attributes)
    return found


REFUSED: dict[str, tuple[object, type[DedupfsError]]] = {
    "newer": ({"version": 2, "uuid": "x", "references": NAMESPACE}, UnknownFormat),
    "much newer": ({"version": "1.0-beta", "layout": []}, StoreError),
    "no version": ({"uuid": "x"}, StoreError),
    "no identity": ({"version": 1}, StoreError),
    "not an object": ([], StoreError),
    "of the other kind": (
        {"version": 1, "uuid": "x", "references": "user" if NAMESPACE == "trusted" else "trusted"},
        SourceError,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_format_that_is_not_known(source: Path, case: str) -> None:
    content, error = REFUSED[case]
    (source / ".dedupfs/format").write_text(json.dumps(content))
    (source / ".dedupfs/clean").touch()
    before = _snapshot(source)
    for action in (
        lambda: Engine(str(source), MountOptions(share=Share.REFERENCE)).close(),
        lambda: fsck(str(source), repair=True, progress=silent),
    ):
        with pytest.raises(error):
            action()
    assert _snapshot(source) == before


def test_an_index_of_a_newer_schema(source: Path) -> None:
    """It may hold what we would not understand, but nothing that the tree does not: refused, it may be deleted."""
    with Engine(str(source), MountOptions(share=Share.REFERENCE)) as engine:
        engine.scan(silent)
    with lmdb.open(str(source / ".dedupfs/index"), max_dbs=8) as env:
        meta = env.open_db(b"meta", create=False)
        with env.begin(write=True) as txn:
            assert txn.get(b"version", db=meta) == b"2"
            txn.put(b"version", b"3", db=meta)
    with pytest.raises(UnknownFormat):
        Engine(str(source), MountOptions(share=Share.REFERENCE))
    shutil.rmtree(source / ".dedupfs/index")
    with Engine(str(source), MountOptions(share=Share.REFERENCE)) as engine:
        engine.scan(silent)
        assert read(engine, "sub/two.jpg") == PICTURE


def test_an_index_from_before_pictures(source: Path) -> None:
    """Schema 1 is this one without the tables of pictures: it is taken over, and its contents wait to be described."""
    with Engine(str(source), MountOptions(share=Share.REFERENCE)) as engine:
        engine.scan(silent)
    with lmdb.open(str(source / ".dedupfs/index"), max_dbs=16) as env:
        tables = {name: env.open_db(name, create=False) for name in (b"meta", b"images", b"backlog")}
        with env.begin(write=True) as txn:
            txn.put(b"version", b"1", db=tables[b"meta"])
            for name in (b"images", b"backlog"):
                txn.drop(tables[name])
    before = _snapshot(source / ".dedupfs/index")
    with pytest.raises(SourceError, match="of an older version"):
        fsck(str(source), repair=False, progress=silent)
    assert _snapshot(source / ".dedupfs/index") == before
    assert (source / ".dedupfs/clean").exists()
    with Engine(str(source), MountOptions(share=Share.REFERENCE)) as engine:
        assert engine.index.is_complete()
        assert engine.index.images.described_by() is None
        assert engine.index.images.put_back(b"", 100) == b""
        assert len(engine.index.images.waiting(100)) == engine.index.images.totals().waiting == 2


def test_the_tables_of_the_index(source: Path) -> None:
    """As documented, read without our code."""
    with Engine(str(source), MountOptions(share=Share.REFERENCE)) as engine:
        engine.scan(silent)
    inodes = {name: (source / name).stat().st_ino.to_bytes(8, "big") for name in ("one.jpg", "sub/two.jpg", "sub")}
    content = bytes.fromhex(DIGEST) + b"\0\0"
    with (
        lmdb.open(str(source / ".dedupfs/index"), max_dbs=16, readonly=True) as env,
        env.begin() as txn,
    ):
        tables = {}
        for name in ("meta", "files", "links", "dirs", "holders", "sharers", "queue", "images", "backlog"):
            with txn.cursor(env.open_db(name.encode(), txn=txn, create=False)) as cursor:
                tables[name] = list(cursor)
    root = source.stat().st_ino.to_bytes(8, "big")
    assert dict(tables["meta"])[b"version"] == b"2"
    assert dict(tables["meta"])[b"complete"] == b"1"
    assert dict(tables["meta"])[b"count.files"] == (3).to_bytes(8, "big")
    assert (inodes["one.jpg"], root + b"one.jpg") in tables["links"]
    assert (inodes["sub/two.jpg"], inodes["sub"] + b"two.jpg") in tables["links"]
    assert (inodes["sub"], root + b"sub") in tables["dirs"]
    assert sorted(value for key, value in tables["holders"] if key == content) == sorted(
        [inodes["one.jpg"], inodes["sub/two.jpg"]]
    )
    assert [key for key, _ in tables["sharers"]] == [content, content]
    assert tables["queue"] == []
    waiting = {key: bytes([1, 1]) + place for place, key in tables["backlog"]}
    assert set(waiting) == {content}
    assert dict(tables["images"]) == dict.fromkeys((key for key, _ in tables["holders"]), bytes([1, 0])) | waiting
    st = (source / "one.jpg").stat()
    expected = bytes([1, 2]) + b"".join(
        number.to_bytes(8, "big") for number in (st.st_size, st.st_mtime_ns, st.st_ctime_ns)
    )
    assert dict(tables["files"])[inodes["one.jpg"]] == expected + content
