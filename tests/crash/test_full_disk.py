"""A small disk fills up while files are shared: apps meet ENOSPC where they would without dedupfs, and nowhere else."""

import errno
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.filesystems import Filesystem, FilesystemPool, Unsupported, fill, loop_filesystem
from tests.support.mounted import Mounted, dedupfs

DISK_BYTES = 48 << 20
PHOTO_BYTES = 300_000
PAIRS = 20

# What the daemon may say while nothing fits.
FULL = (
    r"WARNING.*(cannot share|is not settled).*No space left",
    r"(WARNING|ERROR).*index cannot be written.*",
)


@contextmanager
def _loop_filesystem(pool: FilesystemPool, kind: str, size_bytes: int) -> Iterator[Filesystem]:
    try:
        with loop_filesystem(kind, pool.directory, size_bytes=size_bytes) as filesystem:
            yield filesystem
    except Unsupported as problem:
        pytest.skip(str(problem))


@pytest.fixture
def small_disk(filesystem_pool: FilesystemPool) -> Iterator[Filesystem]:
    with _loop_filesystem(filesystem_pool, "ext4", DISK_BYTES) as filesystem:
        yield filesystem


@pytest.fixture
def mounted(small_disk: Filesystem, tmp_path: Path) -> Iterator[Mounted]:
    mounted = Mounted(
        small_disk.root / "source", tmp_path / "mount", options=["share=reference"], expected_log=FULL, watchdog_s=200
    ).start()
    yield mounted
    mounted.finish()


def _photo(number: int, size_bytes: int = PHOTO_BYTES) -> bytes:
    return random.Random(number).randbytes(size_bytes)


def _save(path: Path, data: bytes) -> None:
    """As apps do: in pieces, to the end or to the first error."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        done = 0
        while done < len(data):
            done += os.write(fd, data[done : done + (64 << 10)])
    finally:
        os.close(fd)


def _assert_full(error: OSError) -> None:
    assert error.errno == errno.ENOSPC, f"an app met {error!r}"


def test_apps_fill_the_disk(mounted: Mounted) -> None:
    saved: dict[str, bytes] = {}
    with pytest.raises(OSError) as met:
        for number in range(1000):
            # Each third one has the content of the one before.
            data = _photo(number - (number % 3 == 2))
            _save(mounted.path(f"{number}.jpg"), data)
            saved[f"{number}.jpg"] = data
    _assert_full(met.value)
    assert len(saved) > 50

    def check() -> None:
        wrong = [name for name, data in saved.items() if mounted.path(name).read_bytes() != data]
        assert not wrong

    check()
    mounted.path(f"{len(saved)}.jpg").unlink()  # what did not fit
    for name in list(saved)[::2]:
        mounted.path(name).unlink()
        del saved[name]
    data = _photo(5000)
    _save(mounted.path("again.jpg"), data)
    _save(mounted.path("and again.jpg"), data)
    saved |= {"again.jpg": data, "and again.jpg": data}
    mounted.settle()
    check()
    assert mounted.state("again.jpg") == "reference"


def test_sharing_without_a_free_block(mounted: Mounted, small_disk: Filesystem) -> None:
    pairs = {f"{side}{number}.jpg": _photo(number) for number in range(PAIRS) for side in ("left", "right")}
    for name, data in pairs.items():
        _save(mounted.path(name), data)
    fill(small_disk.root / "filler")

    wrong = [name for name, data in pairs.items() if mounted.path(name).read_bytes() != data]
    assert not wrong
    with pytest.raises(OSError) as met:
        _save(mounted.path("one more.jpg"), _photo(6000))
    _assert_full(met.value)
    mounted.path("one more.jpg").unlink(missing_ok=True)
    mounted.path("left0.jpg").rename(mounted.path("renamed.jpg"))
    pairs["renamed.jpg"] = pairs.pop("left0.jpg")
    dedupfs("status", mounted.mountpoint, "--json")

    (small_disk.root / "filler").unlink()
    # One look at the archive, in case that a failure is not tried again by itself before.
    dedupfs("scan", mounted.mountpoint)
    mounted.settle()
    wrong = [name for name, data in pairs.items() if mounted.path(name).read_bytes() != data]
    assert not wrong
    assert {name: mounted.state(name) for name in pairs} == dict.fromkeys(pairs, "reference")


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_deleting_frees_a_disk_without_a_free_block(filesystem_pool: FilesystemPool, tmp_path: Path, kind: str) -> None:
    """The index has to be written before a blob goes, and has no room but what was kept for that."""
    with (
        _loop_filesystem(filesystem_pool, kind, 320 << 20) as disk,
        Mounted(
            disk.root / "source", tmp_path / "mount", options=["share=reference"], expected_log=FULL, watchdog_s=200
        ) as mounted,
    ):
        reserve = mounted.store / "reserve"
        pairs = {f"{number}.{side}.jpg": _photo(number, 50_000) for number in range(200) for side in ("one", "two")}
        for name, data in pairs.items():
            mounted.path(name).write_bytes(data)
        mounted.settle()
        kept_bytes = os.stat(reserve).st_blocks * 512
        assert kept_bytes >= 256 << 10
        fill(disk.root / "filler")
        deleted = [name for name in pairs if int(name.partition(".")[0]) < 100]
        for name in deleted:
            mounted.path(name).unlink()
        mounted.settle()
        assert sum(1 for _ in (mounted.store / "blobs").glob("*/*")) == 100
        os.sync()
        freed = os.statvfs(disk.root)
        assert freed.f_bavail * freed.f_frsize > 2_000_000  # of 5,000,000 and the reserve
        mounted.path("fits.jpg").write_bytes(_photo(1000, 1_000_000))

        (disk.root / "filler").unlink()
        os.sync()
        until = time.monotonic() + 60
        while not reserve.exists() or os.stat(reserve).st_blocks * 512 < kept_bytes:
            assert time.monotonic() < until, "no room is kept again"
            mounted.path("something to do.jpg").write_bytes(_photo(2000))
            mounted.settle()
        assert [name for name in pairs if name not in deleted and mounted.path(name).read_bytes() != pairs[name]] == []


def test_a_reference_cannot_be_materialised(mounted: Mounted, small_disk: Filesystem) -> None:
    """It takes room that an ordinary file would not need: the app is told so by open, and loses nothing."""
    data = _photo(1, 4 << 20)
    for name in ("left.jpg", "right.jpg"):
        _save(mounted.path(name), data)
    mounted.settle()
    assert mounted.state("left.jpg") == "reference"
    fill(small_disk.root / "filler")

    for flags in (os.O_RDWR, os.O_WRONLY | os.O_APPEND):
        with pytest.raises(OSError) as met:
            os.close(os.open(mounted.path("left.jpg"), flags))
        _assert_full(met.value)
    with pytest.raises(OSError) as met:
        os.truncate(mounted.path("left.jpg"), 3 << 20)
    _assert_full(met.value)
    assert mounted.path("left.jpg").read_bytes() == data
    assert mounted.path("left.jpg").stat().st_size == len(data)
    # What needs no room works.
    os.truncate(mounted.path("right.jpg"), 0)
    assert mounted.path("right.jpg").read_bytes() == b""
    mounted.path("right.jpg").unlink()

    (small_disk.root / "filler").unlink()
    with open(mounted.path("left.jpg"), "r+b") as file:
        file.write(b"edited")
    assert mounted.path("left.jpg").read_bytes() == b"edited" + data[6:]
    mounted.settle()


def test_leaving_needs_room(mounted: Mounted) -> None:
    """Ten photographs, six times each: together more than the disk holds. What has no room is not begun."""
    photos = {number: _photo(number, 1_000_000) for number in range(10)}
    for number, data in photos.items():
        _save(mounted.path(f"{number}-0"), data)
        for copy in range(1, 6):
            _save(mounted.path(f"{number}-{copy}"), data)
            mounted.settle()
    mounted.unmount()
    plan = dedupfs("leave", "--dry-run", mounted.source, "--json").json()["plan"]
    assert (plan["files"], plan["bytes"], plan["fits"]) == (60, 60_000_000, False)
    assert plan["needed_bytes"] > plan["available_bytes"]
    for command in ("leave", "restore"):
        refusal = dedupfs(command, mounted.source, exit_code=71).stderr
        assert "restoring 60 files takes " in refusal
        assert "nothing was done" in refusal
    assert dedupfs("restore", mounted.source, "0-0", "1-0", "--json").json()["restored"] == 2
    mounted.start()
    for number in photos:
        for copy in range(3, 6):
            mounted.path(f"{number}-{copy}").unlink()
    mounted.settle()
    mounted.unmount()
    assert dedupfs("leave", "--dry-run", mounted.source, "--json").json()["plan"]["fits"]
    answer = dedupfs("leave", mounted.source, "--json").json()
    assert (answer["restored"], answer["proven"], answer["left"]) == (28, 30, True)
    assert not mounted.store.exists()
    assert {path.name: path.read_bytes() for path in mounted.source.iterdir() if path.name != "lost+found"} == {
        f"{number}-{copy}": data for number, data in photos.items() for copy in range(3)
    }
