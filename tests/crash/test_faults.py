"""The disk fails, is slow or has no room for this user; descriptors run out; the source moves or changes beneath.

Each on a real mount over a real filesystem, on a real block device where that is what fails: apps meet the errno that
they would meet without dedupfs, or nothing; nothing that was saved is lost; the work is done later.
"""

import errno
import mmap
import os
import random
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.disk import Disk, disk
from tests.support.filesystems import (
    FilesystemPool,
    Unsupported,
    loop_filesystem,
    make_filesystem,
    mounted_device,
    run,
)
from tests.support.mounted import Mounted, dedupfs

PHOTO_BYTES = 200_000

# What the daemon may say while the disk does not do what it should.
TROUBLE = (
    r"(WARNING|ERROR).*(Input/output error|Read-only file system|Disk quota exceeded|Too many open files)",
    r"(WARNING|ERROR).*index cannot be (read|written)",
    r"ERROR.*the tree is walked at the next start",
    r"WARNING.*blobs that seem unused are kept",
)


def _photo(number: int, size_bytes: int = PHOTO_BYTES) -> bytes:
    return random.Random(number).randbytes(size_bytes)


def _save(path: Path, data: bytes, *, sync: bool = False) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        done = 0
        while done < len(data):
            done += os.write(fd, data[done : done + (64 << 10)])
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


def _wrong(mounted: Mounted, saved: dict[str, bytes]) -> list[str]:
    return [name for name, data in saved.items() if mounted.path(name).read_bytes() != data]


# --- a block device that fails


@dataclass(slots=True)
class Stand:
    """A filesystem on a disk that can fail, and a mount over it."""

    disk: Disk
    kind: str
    root: Path
    scratch: Path
    stack: ExitStack

    def mount(self) -> None:
        self.stack.enter_context(mounted_device(self.kind, self.disk.device, self.root))

    def remount(self) -> None:
        """With nothing in the page cache, and whatever stopped the filesystem forgotten."""
        self.stack.close()
        self.mount()

    def serve(self) -> Mounted:
        source = self.root / "source"
        options = ["share=reference"]
        return Mounted(source, self.scratch / "mount", options=options, expected_log=TROUBLE, watchdog_s=120).start()


@pytest.fixture(params=["ext4", "xfs", "btrfs"])
def stand(request: pytest.FixtureRequest, filesystem_pool: FilesystemPool, tmp_path: Path) -> Iterator[Stand]:
    image = filesystem_pool.directory / "failing.image"
    image.touch()
    os.truncate(image, 512 << 20)
    try:
        make_filesystem(request.param, image)
        root = tmp_path / "disk"
        root.mkdir()
        with disk(image) as failing, ExitStack() as stack:
            stand = Stand(failing, request.param, root, tmp_path, stack)
            stand.mount()
            yield stand
            failing.fail()
    except Unsupported as problem:
        pytest.skip(str(problem))
    finally:
        image.unlink()


def test_the_disk_cannot_be_read(stand: Stand) -> None:
    mounted = stand.serve()
    saved = {f"{side}{number}.jpg": _photo(number) for number in range(8) for side in ("left", "right")}
    for name, data in saved.items():
        _save(mounted.path(name), data)
    mounted.settle()
    mounted.unmount()
    mounted.release()
    stand.remount()
    mounted = stand.serve()
    assert mounted.path("left0.jpg").read_bytes() == saved["left0.jpg"]  # what was read once is in memory
    names = set(os.listdir(mounted.mountpoint))

    stand.disk.fail("read")
    with pytest.raises(OSError) as met:
        mounted.path("right5.jpg").read_bytes()
    assert met.value.errno == errno.EIO
    # Its other copy can be had from the app, but not compared with what is there.
    with suppress(OSError):
        _save(mounted.path("new.jpg"), _photo(6))
    assert mounted.is_alive

    stand.disk.fail()
    assert set(os.listdir(mounted.mountpoint)) - {"new.jpg"} == names
    assert _wrong(mounted, saved) == []
    _save(mounted.path("new.jpg"), _photo(6))
    dedupfs("scan", mounted.mountpoint)
    mounted.settle()
    assert mounted.state("new.jpg") == "reference"
    mounted.finish()


def test_the_disk_cannot_be_written(stand: Stand) -> None:
    mounted = stand.serve()
    saved = {f"{side}{number}.jpg": _photo(number) for number in range(4) for side in ("left", "right")}
    for name, data in saved.items():
        _save(mounted.path(name), data, sync=True)
    fd = os.open(mounted.mountpoint, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)

    stand.disk.fail("write", "flush")
    with pytest.raises(OSError) as met:
        for number in range(4, 50):
            _save(mounted.path(f"left{number}.jpg"), _photo(number), sync=True)
    # EROFS where the filesystem has by now stopped itself
    assert met.value.errno in (errno.EIO, errno.EROFS)
    for number in range(4):
        with suppress(OSError):  # duplicates, that settling cannot put anywhere
            _save(mounted.path(f"again{number}.jpg"), _photo(number))
    assert mounted.is_alive
    mounted.kill()  # a server with such a disk is switched off
    mounted.release()
    stand.disk.fail()
    stand.remount()

    mounted = stand.serve()
    mounted.expect_log(r"WARNING.*(unclean|not .*stopped)")
    assert _wrong(mounted, saved) == []
    mounted.settle()
    assert _wrong(mounted, saved) == []
    assert {mounted.state(name) for name in saved} == {"reference"}
    mounted.finish()


def test_the_disk_is_slow(stand: Stand) -> None:
    mounted = stand.serve()
    stand.disk.delay(0.03)
    saved = {f"{side}{number}.jpg": _photo(number, 50_000) for number in range(4) for side in ("left", "right")}
    for name, data in saved.items():
        _save(mounted.path(name), data, sync=name.startswith("left"))
    with open(mounted.path("right0.jpg"), "r+b") as file:
        file.write(b"edited")
    saved["right0.jpg"] = b"edited" + saved["right0.jpg"][6:]
    assert _wrong(mounted, saved) == []
    stand.disk.delay(0)
    mounted.settle()
    assert _wrong(mounted, saved) == []
    mounted.finish()


# --- no room for this tree


@pytest.fixture
def quota(filesystem_pool: FilesystemPool) -> Iterator[Path]:
    """A subvolume of btrfs that may hold 24 MiB, on a disk that is far from full."""
    try:
        with loop_filesystem("btrfs", filesystem_pool.directory, size_bytes=512 << 20) as filesystem:
            volume = filesystem.root / "volume"
            for command in (
                f"quota enable {filesystem.root}",
                f"subvolume create {volume}",
                f"qgroup limit 24M {volume}",
            ):
                done = run("btrfs", *command.split())
                if done.returncode:
                    raise Unsupported(f"no quota: {done.stderr.strip()}")
            yield volume
    except Unsupported as problem:
        pytest.skip(str(problem))


@pytest.mark.parametrize("strategy", ["reference", "reflink"])
def test_the_quota_is_used_up(quota: Path, tmp_path: Path, strategy: str) -> None:
    options = [f"share={strategy}"]
    saved: dict[str, bytes] = {}
    with Mounted(
        quota / "source", tmp_path / "mount", options=options, expected_log=TROUBLE, watchdog_s=200
    ) as mounted:
        with pytest.raises(OSError) as met:
            for number in range(500):
                name, data = f"{number}.jpg", _photo(number // 2)
                _save(mounted.path(name), data, sync=True)
                saved[name] = data
        assert met.value.errno == errno.EDQUOT
        assert _wrong(mounted, saved) == []
        mounted.path(f"{len(saved)}.jpg").unlink(missing_ok=True)
        # Every path of every third content: what is left of only one of two would free nothing.
        for number in [number for number in range(len(saved)) if number // 2 % 3 == 0]:
            mounted.path(f"{number}.jpg").unlink()
            del saved[f"{number}.jpg"]
        mounted.settle()  # their blobs go in the background, and btrfs counts what has gone at its next commit
        os.sync()
        data = _photo(1000)
        _save(mounted.path("again.jpg"), data)
        _save(mounted.path("and again.jpg"), data)
        saved |= {"again.jpg": data, "and again.jpg": data}
        dedupfs("scan", mounted.mountpoint)
        mounted.settle()
        assert _wrong(mounted, saved) == []
        assert mounted.state("again.jpg") == {"reference": "reference", "reflink": "shared"}[strategy]


# --- no descriptor left


def test_no_descriptor_is_left(mounted: Mounted) -> None:
    """Whatever an app meets passes with the shortage."""
    mounted.expect_log(*TROUBLE)
    saved = {f"{side}{number}.jpg": _photo(number) for number in range(6) for side in ("left", "right")}
    for name in ("left0.jpg", "right0.jpg"):
        _save(mounted.path(name), saved[name])
    mounted.settle()
    used = len(os.listdir(f"/proc/{mounted.pid}/fd"))
    before = resource.prlimit(mounted.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(mounted.pid, resource.RLIMIT_NOFILE, (used + 6, before[1]))
    held = []
    try:
        with pytest.raises(OSError) as met:
            for _ in range(50):
                held.append(os.open(mounted.path("left0.jpg"), os.O_RDONLY))
        assert met.value.errno in (errno.EMFILE, errno.ENFILE)
        assert os.pread(held[0], PHOTO_BYTES, 0) == saved["left0.jpg"]
        mounted.path("left0.jpg").stat()
    finally:
        for fd in held:
            with suppress(OSError):
                os.close(fd)
    for name, data in saved.items():
        with suppress(OSError):
            _save(mounted.path(name), data)
    resource.prlimit(mounted.pid, resource.RLIMIT_NOFILE, before)
    for name, data in saved.items():
        _save(mounted.path(name), data)
    dedupfs("scan", mounted.mountpoint)
    mounted.settle()
    assert _wrong(mounted, saved) == []
    assert mounted.state("left5.jpg") != "plain"


# --- the ground moves


def test_the_source_is_unmounted_beneath(filesystem_pool: FilesystemPool, tmp_path: Path) -> None:
    """Lazily, as only root can: the daemon holds it, and goes on as if nothing had happened."""
    image = filesystem_pool.directory / "lazy.image"
    image.touch()
    os.truncate(image, 512 << 20)
    root = tmp_path / "disk"
    root.mkdir()
    saved = {f"{side}{number}.jpg": _photo(number) for number in range(4) for side in ("left", "right")}
    try:
        make_filesystem("ext4", image)
        with mounted_device("ext4", image, root):
            mounted = Mounted(root / "source", tmp_path / "mount", options=["share=reference"]).start()
            _save(mounted.path("left0.jpg"), saved["left0.jpg"])
            # Another mount keeps the place for the one that ends the context.
            assert run("umount", "-l", root).returncode == 0
            assert run("mount", "-t", "tmpfs", "none", root).returncode == 0
            for name, data in saved.items():
                _save(mounted.path(name), data)
            mounted.settle()
            assert _wrong(mounted, saved) == []
            assert {mounted.state(name) for name in saved} == {"reference"}
            mounted.unmount()
            mounted.release()
        with mounted_device("ext4", image, root):
            mounted = Mounted(root / "source", tmp_path / "mount", options=["share=reference"]).start()
            assert _wrong(mounted, saved) == []
            mounted.finish()
    except Unsupported as problem:
        pytest.skip(str(problem))
    finally:
        image.unlink()


def test_the_source_is_replaced_beneath(mounted: Mounted) -> None:
    """The daemon stays with the directory that it was given, wherever that goes."""
    saved = {f"{side}{number}.jpg": _photo(number) for number in range(4) for side in ("left", "right")}
    _save(mounted.path("left0.jpg"), saved["left0.jpg"])
    aside = mounted.source.with_name("aside")
    mounted.source.rename(aside)
    mounted.source.mkdir()
    (mounted.source / "left0.jpg").write_bytes(b"somebody else's")
    for name, data in saved.items():
        _save(mounted.path(name), data)
    mounted.settle()
    assert _wrong(mounted, saved) == []
    assert "plain" not in {mounted.state(name) for name in saved}
    assert os.listdir(mounted.source) == ["left0.jpg"]
    mounted.unmount()
    (mounted.source / "left0.jpg").unlink()
    mounted.source.rmdir()
    aside.rename(mounted.source)
    mounted.start()
    assert _wrong(mounted, saved) == []


def _whose_pages(data: bytes) -> str:
    """Which photograph this is; of a mixture, which one each page is of."""
    photos = {str(number): _photo(number) for number in range(5)}
    whole = [name for name, photo in photos.items() if photo == data]
    if whole:
        return whole[0]
    pages = []
    for at in range(0, len(data), mmap.PAGESIZE):
        page = data[at : at + mmap.PAGESIZE]
        owners = [name for name, photo in photos.items() if photo[at : at + mmap.PAGESIZE] == page]
        pages.append(owners[0] if owners else "." if not any(page) else "?")
    return f"{len(data)} bytes: {''.join(pages)}"


def _meddle(directory: Path, rng: random.Random, until: Callable[[], bool]) -> None:
    """Somebody works in the backing directory, on files of his own beside those of the apps."""
    names = [f"foreign{number}" for number in range(6)]
    while not until():
        one, other = directory / rng.choice(names), directory / rng.choice(names)
        with suppress(FileNotFoundError):
            match rng.randrange(5):
                case 0:
                    # Never into what may be a reference: a new file takes its place.
                    (directory / "draft").write_bytes(_photo(rng.randrange(5)))
                    (directory / "draft").rename(one)
                case 1:
                    one.unlink()
                case 2:
                    one.rename(other)
                case 3:
                    os.utime(one, ns=(0, rng.randrange(10**18)))
                case 4:
                    one.chmod(rng.choice((0o600, 0o644)))


def test_somebody_changes_the_source_meanwhile(mounted: Mounted, rng: random.Random) -> None:
    mounted.expect_log(r"WARNING.*foreign\d")
    over = threading.Event()
    thread = threading.Thread(target=_meddle, args=(mounted.backing, random.Random(rng.random()), over.is_set))
    saved: dict[str, bytes] = {}
    thread.start()
    try:
        for number in range(60):
            name = f"{number % 25}.jpg"
            saved[name] = _photo(rng.randrange(5))
            _save(mounted.path(name), saved[name])
            if not number % 10:
                dedupfs("scan", mounted.mountpoint)
            for foreign in os.listdir(mounted.mountpoint):
                with suppress(OSError):
                    mounted.path(foreign).read_bytes()
        assert _wrong(mounted, saved) == []
    finally:
        over.set()
        thread.join()
    dedupfs("scan", mounted.mountpoint)
    mounted.settle()
    assert _wrong(mounted, saved) == []
    for foreign in set(os.listdir(mounted.mountpoint)) - set(saved):
        assert _whose_pages(mounted.path(foreign).read_bytes()) in ("0", "1", "2", "3", "4")
