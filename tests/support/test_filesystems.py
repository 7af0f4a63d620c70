"""The filesystems under the tests can do what the tests take for granted."""

import errno
import fcntl
import os
import struct
from pathlib import Path

import pytest

from .filesystems import Filesystem, FilesystemPool, Unsupported, is_mountpoint, loop_filesystem, remove_tree
from .photos import photographs

_FICLONE = 0x40049409
ALL = pytest.mark.parametrize("filesystem", ["ext4", "xfs", "btrfs"], indirect=True)


@ALL
def test_it_has_what_a_reference_needs(filesystem: Filesystem, scratch: Path) -> None:
    first = scratch / "first"
    first.write_bytes(b"x" * 10000)
    os.link(first, scratch / "second")
    os.setxattr(first, "user.dedupfs.test", b"value")
    os.truncate(scratch / "second", 1 << 20)
    assert first.stat().st_nlink == 2
    assert first.stat().st_blocks * 512 < 1 << 20
    if os.geteuid() == 0:
        os.setxattr(first, "trusted.dedupfs.test", b"value")


@ALL
def test_reflinks(filesystem: Filesystem, scratch: Path) -> None:
    with open(scratch / "source", "wb+") as source, open(scratch / "copy", "wb+") as copy:
        source.write(os.urandom(65536))
        source.flush()
        if filesystem.kind == "ext4":
            with pytest.raises(OSError, match="not supported") as refused:
                fcntl.ioctl(copy, _FICLONE, source.fileno())
            assert refused.value.errno == errno.EOPNOTSUPP
        else:
            fcntl.ioctl(copy, _FICLONE, source.fileno())
            assert os.fstat(copy.fileno()).st_size == 65536


def test_a_filesystem_goes_without_trace(filesystem_pool: FilesystemPool) -> None:
    try:
        with loop_filesystem("ext4", filesystem_pool.directory, size_bytes=64 << 20, patience_s=0.2) as filesystem:
            root = filesystem.root
            assert is_mountpoint(root)
            busy = os.open(root, os.O_RDONLY)
    except Unsupported as problem:
        pytest.skip(str(problem))
    os.close(busy)
    assert not is_mountpoint(root)
    assert not root.exists()
    assert not root.with_suffix(".image").exists()


def test_immutable_files_are_removed(filesystem: Filesystem) -> None:
    if os.geteuid() != 0:
        pytest.skip("setting the immutable flag needs root")
    directory = filesystem.directory("immutable")
    (directory / "below").mkdir()
    with open(directory / "below" / "blob", "wb") as blob:
        fcntl.ioctl(blob, 0x40086602, struct.pack("l", 0x10))
    with pytest.raises(PermissionError):
        (directory / "below" / "blob").unlink()
    remove_tree(directory)
    assert not directory.exists()


@pytest.mark.parametrize("jpeg", [False, True])
def test_photographs_are_distinct_and_as_many_as_asked_for(jpeg: bool) -> None:
    found = photographs(30, jpeg=jpeg)
    contents = {path.read_bytes() for path in found}
    assert len(contents) == 30
    assert all(len(content) >= 4096 for content in contents)
    assert not jpeg or all(content.startswith(b"\xff\xd8\xff") for content in contents)
