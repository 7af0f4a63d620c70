"""The kernel reads and writes open files without the daemon, where it can; and what must not go past the daemon does
not. Everything else that files do is tried in both ways by all other tests of a mount (DEDUPFS_TEST_PASSTHROUGH)."""

import mmap
import os
import sys
from pathlib import Path

from tests.conftest import Mounts
from tests.support.flavours import BOTH_STRATEGIES, ONE_FLAVOUR, REFERENCE
from tests.support.mounted import Mounted, dedupfs
from tests.support.tools import USER, attempt, needs_root, read_afresh, tool

SIZE_BYTES = 8 << 20


def _moved_bytes(pid: int) -> int:
    """What a daemon has read and written so far, by itself."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(fields["rchar"]) + int(fields["wchar"])


def test_status_says_whether_and_why_not(mounted: Mounted) -> None:
    status = mounted.status()
    assert bool(status["passthrough_reason"]) is not status["passthrough"]
    mounted.restart("passthrough=off", *(option for option in mounted.options if "passthrough" not in option))
    assert (mounted.status()["passthrough"], mounted.status()["passthrough_reason"]) == (False, "passthrough=off")
    assert "no: passthrough=off" in dedupfs("status", mounted.mountpoint).stdout


@ONE_FLAVOUR
def test_what_cannot_be_had_is_refused(mounts: Mounts) -> None:
    mounted = mounts.new("passthrough=auto").start()
    status = mounted.status()
    mounted.unmount()
    if status["passthrough"]:
        mounted.start("passthrough=on")
        return
    answer = mounted.run("mount", mounted.source, mounted.mountpoint, "-o", "passthrough=on", exit_code=69)
    assert answer.stderr == (
        f"dedupfs: no passthrough: {status['passthrough_reason']}; leave passthrough=on out to do without\n"
    )


@BOTH_STRATEGIES
def test_the_daemon_moves_no_bytes(mounts: Mounts) -> None:
    mounted = mounts.new().start()
    passes = mounted.status()["passthrough"]
    content = os.urandom(SIZE_BYTES)
    before = _moved_bytes(mounted.pid)
    with open(mounted.path("one"), "w+b", buffering=0) as file:
        file.write(content)
        assert os.pread(file.fileno(), SIZE_BYTES, 0) == content
        with mmap.mmap(file.fileno(), 0) as mapping:
            mapping[:5] = b"first"
        # still open, so that nothing of this is the hashing
        assert (_moved_bytes(mounted.pid) - before < SIZE_BYTES) == passes
    content = b"first" + content[5:]
    tool("cp", mounted.below("one"), mounted.path("two"))
    mounted.settle()
    before = _moved_bytes(mounted.pid)
    assert read_afresh(mounted.path("one")) == read_afresh(mounted.path("two")) == content
    if passes:
        assert _moved_bytes(mounted.pid) - before < SIZE_BYTES


def test_what_was_written_unseen_is_settled(mounted: Mounted) -> None:
    """In every way in which bytes come into a file: the digest is that of what is there in the end."""
    for name, change in {
        "write": "os.pwrite(fd, b'changed', 5000)",
        "map": "m = mmap.mmap(fd, 0); m[9000:9007] = b'changed'; m.close()",
        "append": "os.lseek(fd, 0, os.SEEK_END); os.write(fd, b'more')",
        "truncate": "os.ftruncate(fd, 5000)",
        "truncate and write": "os.ftruncate(fd, 0); os.pwrite(fd, b'new' * 3000, 0)",
        "nothing": "pass",
    }.items():
        path, twin = mounted.path(name), mounted.path(f"{name}, changed below")
        path.write_bytes(os.urandom(20_000))
        twin.write_bytes(path.read_bytes())
        mounted.settle()
        tool(sys.executable, "-c", f"import mmap, os, sys; fd = os.open(sys.argv[1], os.O_RDWR); {change}", path)
        digest = mounted.xattr(name, "digest")
        mounted.path("same").write_bytes(path.read_bytes())
        assert mounted.xattr("same", "digest") == digest, name
        assert (mounted.xattr(twin.name, "digest") == digest) == (name == "nothing")


@ONE_FLAVOUR
def test_times_of_what_was_written_through_a_mapping(mounted: Mounted) -> None:
    path = mounted.path("file")
    path.write_bytes(bytes(10_000))
    os.utime(path, ns=(10**18, 10**18))
    with open(path, "r+b") as file:
        assert os.fstat(file.fileno()).st_mtime_ns == 10**18
        with mmap.mmap(file.fileno(), 0) as mapping:
            mapping[0] = 1
            mapping.flush()
        assert os.fstat(file.fileno()).st_mtime_ns == mounted.below("file").stat().st_mtime_ns > 10**18


@REFERENCE
def test_nothing_is_kept_of_a_file_that_is_gone(mounted: Mounted) -> None:
    """A backing id that is not given back keeps the blocks of its file."""
    tool("sync", "--file-system", mounted.source)
    free = os.statvfs(mounted.source).f_bfree
    path = mounted.path("file")
    for _ in range(5):
        path.write_bytes(os.urandom(SIZE_BYTES))
        with open(path, "rb") as one, open(path, "rb") as another:
            assert one.read(1) == another.read(1)
        path.unlink()
    mounted.settle()
    tool("sync", "--file-system", mounted.source)
    assert os.statvfs(mounted.source).f_bfree >= free - SIZE_BYTES // 4096 // 4


@ONE_FLAVOUR
@needs_root
def test_a_write_clears_set_id_bits(mounted: Mounted) -> None:
    path = mounted.path("program")
    path.write_bytes(bytes(5000))
    path.chmod(0o6777)
    attempt("sh", "-c", 'echo x >>"$1"', "sh", path, user=USER)
    assert path.read_bytes().endswith(b"x\n")
    assert mounted.below("program").stat().st_mode & 0o7777 == 0o777
