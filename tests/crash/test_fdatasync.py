"""Power is lost right after fdatasync, or a write through O_DSYNC, of a file that was a reference until just before.

The journal is not written by itself meanwhile, so what these calls leave out is not on disk by accident.
"""

import contextlib
import os
from pathlib import Path

import pytest

from tests.support.disk import disk
from tests.support.filesystems import FilesystemPool, Unsupported, make_filesystem, mounted_device
from tests.support.mounted import AFTER_A_KILL, Mounted

from .scenarios import PIECE, photo

_OPTIONS = {"ext4": "commit=300,noauto_da_alloc", "xfs": "nouuid"}
_OFFSET = 5000


def _edit(path: Path, how: str, content: bytes) -> None:
    """Somewhere in the middle: no block is allocated and the size stays, so that there is little else to flush."""
    fd = os.open(path, os.O_RDWR | {"O_DSYNC": os.O_DSYNC, "O_TRUNC": os.O_TRUNC}.get(how, 0))
    try:
        if how == "O_TRUNC":
            os.pwrite(fd, content, 0)
        if how == "opened twice":  # the first time makes it plain
            os.close(os.open(path, os.O_RDWR))
        os.pwrite(fd, PIECE, _OFFSET)
        if how != "O_DSYNC":
            os.fdatasync(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("kind", "how"),
    [("ext4", "fdatasync"), ("ext4", "opened twice"), ("ext4", "O_DSYNC"), ("ext4", "O_TRUNC"), ("xfs", "fdatasync")],
)
def test_power_is_lost_after(
    filesystem_pool: FilesystemPool, request: pytest.FixtureRequest, kind: str, how: str
) -> None:
    try:
        scratch = filesystem_pool.get("xfs").directory(request.node.name)
    except Unsupported as problem:
        pytest.skip(str(problem))
    image, left = scratch / "live.image", scratch / "left.image"
    image.touch()
    os.truncate(image, 512 << 20)
    make_filesystem(kind, image)
    (scratch / "live").mkdir()
    (scratch / "recovered").mkdir()
    content = photo("a")
    edited = content[:_OFFSET] + PIECE + content[_OFFSET + len(PIECE) :]
    options = ["share=reference"]
    with contextlib.ExitStack() as stack:
        volatile = stack.enter_context(disk(image))
        stack.enter_context(mounted_device(kind, volatile.device, scratch / "live", _OPTIONS[kind]))
        with Mounted(scratch / "live/source", scratch / "mount", options=options) as mounted:
            for name in ("one", "two"):
                mounted.path(name).write_bytes(content)
            mounted.settle()
            assert mounted.state("two") == "reference"
            os.sync()
            _edit(mounted.path("two"), how, content)
            volatile.cut(left, "nothing that was not flushed")
    with mounted_device(kind, left, scratch / "recovered", _OPTIONS[kind]):
        source = scratch / "recovered/source"
        with Mounted(source, scratch / "mount", options=options, expected_log=AFTER_A_KILL) as mounted:
            for _ in range(2):
                assert mounted.path("two").read_bytes() == edited
                assert mounted.path("one").read_bytes() == content
                mounted.settle()
