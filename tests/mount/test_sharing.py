"""Equal files share, and whatever is done to one of them afterwards is done to that one alone."""

import fcntl
import filecmp
import os
import shutil
import sys
from pathlib import Path

import pytest
import xxhash

from tests.conftest import Mounts
from tests.support.blocks import disk_usage, files_below, is_reference, share_blocks, stored_bytes
from tests.support.flavours import BOTH_STRATEGIES, ONE_FLAVOUR, REFERENCE, REFERENCES
from tests.support.mounted import Mounted, dedupfs
from tests.support.photos import photographs
from tests.support.tools import attempt, differences, read_afresh, shell, tool
from tests.support.trees import FOLDERS, photograph, shared_copies, shared_state


def digest_of(content: bytes) -> bytes:
    return xxhash.xxh3_128_hexdigest(content).encode()


def blobs(mounted: Mounted) -> list[Path]:
    return list((mounted.store / "blobs").glob("*/*"))


# --- what was closed just before


@ONE_FLAVOUR
def test_who_asks_hears_of_what_was_closed_just_before(mounted: Mounted) -> None:
    """Also when that is another file than the one asked about."""
    names = [f"{number}.jpg" for number in range(40)]
    for number, name in enumerate(names):
        mounted.path(name).write_bytes(photograph().read_bytes())
        assert sorted(map(os.fsdecode, mounted.duplicates(names[0]))) == sorted(names[1 : number + 1])
        assert int(mounted.xattr(names[0], "refs")) == number + 1
    for number in range(40, 44):
        mounted.path(f"{number}.jpg").write_bytes(photograph().read_bytes())
        answer = mounted.run("duplicates", mounted.mountpoint, names[0], "--json").json()
        assert len(answer["paths"]) == number + 1


# --- the main job


def test_two_hundred_photographs_in_three_folders(mounts: Mounts) -> None:
    """What the whole thing is for: three folders, one set of blocks, and a way out that loses nothing."""
    # all two hundred once; the other ways of sharing are the same job
    pictures = photographs(200 if (mounts.strategy, mounts.filesystem.kind) == ("reference", "ext4") else 60)
    one_copy = mounts.directory("one copy")
    tool("cp", "-a", *pictures, one_copy)
    mounted = mounts.new().start()
    for folder in FOLDERS:
        tool("cp", "-a", one_copy, mounted.path(folder))
    mounted.settle()

    status = mounted.status()
    logical_bytes = sum(path.stat().st_size for path in pictures)
    assert status["pending"] == 0
    assert status["files"] == 3 * len(pictures)
    assert status["logical_bytes"] == 3 * logical_bytes
    assert status["stored_bytes"] == logical_bytes
    assert status["saved_bytes"] == 2 * logical_bytes
    assert status["share"] == mounts.strategy
    ours = disk_usage(mounted.store / "index") + disk_usage(mounted.store / "reserve")
    if mounts.strategy == "reference":
        # as an admin measures it
        assert disk_usage(mounted.source) <= 1.02 * disk_usage(one_copy) + ours
        assert status["references"] == 3 * len(pictures)
        assert status["blobs"] == len(blobs(mounted)) == len(pictures)
    # and block by block, which also counts right where three files have the same ones
    assert stored_bytes(mounted.backing) <= 1.02 * stored_bytes(one_copy) + ours
    if mounts.strategy == "reflink":
        assert all(share_blocks(*(mounted.below(folder, path.name) for folder in FOLDERS)) for path in pictures)

    changed = mounted.path("office", pictures[0].name)
    with open(changed, "ab") as file:
        file.write(b"changed")
    for folder in ("field", "archive"):
        assert differences(one_copy, mounted.path(folder)) == []
    assert changed.read_bytes() == pictures[0].read_bytes() + b"changed"
    shutil.copyfile(pictures[0], changed)
    shutil.copystat(one_copy / pictures[0].name, changed)

    answer = dedupfs("restore", mounted.mountpoint, "--json").json()
    if mounts.strategy == "reference":
        assert answer["restored"] >= 3 * len(pictures) - 1
    assert answer["failed"] == []
    mounted.unmount()
    for folder in FOLDERS:
        # the backing directory, without any dedupfs
        assert differences(one_copy, mounted.source / folder) == []
    assert not any(is_reference(path) for folder in FOLDERS for path in files_below(mounted.source / folder))
    assert not blobs(mounted)


@BOTH_STRATEGIES
def test_the_same_by_one_cp_inside_the_mount(mounted: Mounted) -> None:
    pictures = photographs(12)
    mounted.path("first").mkdir()
    tool("cp", "-a", *pictures, mounted.path("first"))
    mounted.settle()
    tool("cp", "-a", mounted.path("first"), mounted.path("second"))
    assert differences(mounted.path("first"), mounted.path("second")) == []
    mounted.settle()
    assert mounted.status()["stored_bytes"] == sum(path.stat().st_size for path in pictures)
    assert differences(mounted.path("first"), mounted.path("second")) == []


@REFERENCES
@pytest.mark.parametrize("live", [True, False], ids=["mounted", "offline"])
def test_restore(mounted: Mounted, live: bool) -> None:
    pictures = photographs(6)
    for picture in pictures:
        shared_copies(mounted, picture, name=picture.name)
    mounted.settle()
    times = {path: path.stat().st_mtime_ns for path in files_below(mounted.path())}
    if not live:
        mounted.unmount()
    target = mounted.mountpoint if live else mounted.source

    # one file, then a folder, then all
    answer = dedupfs("restore", target, f"field/{pictures[0].name}", "--json").json()
    assert answer == {"restored": 1, "bytes": pictures[0].stat().st_size, "failed": []}
    assert not is_reference(mounted.below("field", pictures[0].name))
    assert is_reference(mounted.below("office", pictures[0].name))
    answer = dedupfs("restore", target, "field", "--json").json()
    assert answer["restored"] == len(pictures) - 1
    assert dedupfs("restore", target, "--json").json()["restored"] == 2 * len(pictures)
    assert dedupfs("restore", target, "--json").json() == {"restored": 0, "bytes": 0, "failed": []}

    if live:
        assert {path: path.stat().st_mtime_ns for path in times} == times
        mounted.settle()
        assert mounted.status()["references"] == 0
        mounted.unmount()
    for picture in pictures:
        for folder in FOLDERS:
            path = mounted.source / folder / picture.name
            assert filecmp.cmp(path, picture, shallow=False)
            assert path.stat().st_mtime_ns == times[mounted.path(folder, picture.name)]
    assert not any(is_reference(path) for path in files_below(mounted.source) if ".dedupfs" not in path.parts)
    assert not blobs(mounted)


@ONE_FLAVOUR
def test_what_restore_made_plain_stays_plain(mounted: Mounted) -> None:
    """Until it is written again: whoever wants to leave is not brought back by the next mount."""
    paths = shared_copies(mounted, photograph())
    dedupfs("restore", mounted.mountpoint)
    mounted.restart()
    mounted.settle()
    assert [mounted.state(path) for path in paths] == ["plain"] * 3
    assert mounted.xattr(paths[0], "refs") == b"3"


# --- unlink


@REFERENCE
def test_unlinking_the_last_reference_removes_the_blob(mounted: Mounted) -> None:
    picture = photograph()
    first, second, third = shared_copies(mounted, picture)
    (blob,) = blobs(mounted)
    first.unlink()
    second.unlink()
    mounted.settle()
    assert blobs(mounted) == [blob]
    assert read_afresh(third) == picture.read_bytes()
    assert mounted.xattr(third, "refs") == b"1"
    os.link(third, mounted.path("link.jpg"))
    third.unlink()
    mounted.settle()
    assert blobs(mounted) == [blob]
    assert read_afresh(mounted.path("link.jpg")) == picture.read_bytes()
    mounted.path("link.jpg").unlink()
    mounted.settle()
    assert blobs(mounted) == []
    assert mounted.status()["stored_bytes"] == 0


@REFERENCE
def test_a_blob_goes_when_its_last_reference_is_overwritten(mounted: Mounted) -> None:
    first, second, third = shared_copies(mounted, photograph())
    tool("mv", first, second)
    second.write_bytes(b"something else")
    mounted.settle()
    assert len(blobs(mounted)) == 1
    mounted.path("new").write_bytes(b"")
    tool("mv", mounted.path("new"), third)
    mounted.settle()
    assert blobs(mounted) == []


@REFERENCES
def test_a_whole_tree_removed(mounted: Mounted) -> None:
    for picture in photographs(10):
        shared_copies(mounted, picture, name=picture.name)
    tool("rm", "-r", *(mounted.path(folder) for folder in FOLDERS))
    mounted.settle()
    assert blobs(mounted) == []
    assert mounted.status()["files"] == 0


# --- truncating and writing


def test_truncating_a_reference(mounted: Mounted) -> None:
    content = photograph().read_bytes()
    sizes = (0, 1, 4095, 4096, 20_000)
    copies = {size: shared_copies(mounted, content, name=str(size)) for size in sizes}
    for size, (by_path, by_descriptor, untouched) in copies.items():
        os.truncate(by_path, size)
        with open(by_descriptor, "r+b") as file:
            file.truncate(size)
            assert os.fstat(file.fileno()).st_size == size
            file.seek(0)
            assert file.read() == content[:size]
        for path in (by_path, by_descriptor):
            assert read_afresh(path) == content[:size]
        os.truncate(by_path, size + 5000)
        assert read_afresh(by_path) == content[:size] + bytes(5000)
        assert read_afresh(untouched) == content
    mounted.settle()
    for size, (by_path, _, untouched) in copies.items():
        assert read_afresh(by_path) == content[:size] + bytes(5000)
        assert not is_reference(mounted.below(f"field/{size}"))
        assert read_afresh(untouched) == content


@BOTH_STRATEGIES
def test_lengthening_a_reference(mounted: Mounted) -> None:
    content = photograph().read_bytes()
    longer, *others = shared_copies(mounted, content)
    os.truncate(longer, len(content) + 100_000)
    assert read_afresh(longer) == content + bytes(100_000)
    assert [read_afresh(path) for path in others] == [content, content]


@REFERENCE
def test_o_trunc_of_a_reference_copies_nothing(mounted: Mounted) -> None:
    content = os.urandom(8 << 20)
    first, *others = shared_copies(mounted, content)
    before = dict(line.split(": ") for line in Path(f"/proc/{mounted.pid}/io").read_text().splitlines())
    descriptor = os.open(first, os.O_WRONLY | os.O_TRUNC)
    assert os.fstat(descriptor).st_size == 0
    os.close(descriptor)
    after = dict(line.split(": ") for line in Path(f"/proc/{mounted.pid}/io").read_text().splitlines())
    assert int(after["wchar"]) - int(before["wchar"]) < 1 << 20
    assert first.read_bytes() == b""
    assert mounted.below("field/picture.jpg").stat().st_blocks == 0
    assert [read_afresh(path) for path in others] == [content, content]


@BOTH_STRATEGIES
def test_appending_to_a_reference(mounted: Mounted) -> None:
    content = photograph().read_bytes()
    first, *others = shared_copies(mounted, content)
    with open(first, "ab") as file:
        for number in range(100):
            file.write(b"%d\n" % number)
            file.flush()
    expected = content + b"".join(b"%d\n" % number for number in range(100))
    assert read_afresh(first) == expected
    assert mounted.xattr(first, "digest") == digest_of(expected)
    assert [read_afresh(path) for path in others] == [content, content]


@BOTH_STRATEGIES
def test_opening_for_writing_without_writing(mounted: Mounted) -> None:
    """The file becomes plain, or not; what it holds and when it was changed stays the same, and it shares again."""
    content = photograph().read_bytes()
    first, *_ = shared_copies(mounted, content)
    os.utime(first, ns=(10**18, 10**18 + 3))
    for flags in (os.O_RDWR, os.O_WRONLY | os.O_APPEND):
        os.close(os.open(first, flags))
    assert first.stat().st_mtime_ns == 10**18 + 3
    mounted.settle()
    assert first.stat().st_mtime_ns == 10**18 + 3
    assert read_afresh(first) == content
    assert mounted.state(first) == shared_state(mounted)


@BOTH_STRATEGIES
def test_written_back_to_what_it_was(mounted: Mounted) -> None:
    content = photograph().read_bytes()
    first, *_ = shared_copies(mounted, content)
    with open(first, "r+b") as file:
        file.write(b"other")
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        file.write(content[:5])
    mounted.settle()
    assert mounted.state(first) == shared_state(mounted)
    assert len(mounted.duplicates(first)) == 2


# --- what is not shared


def test_files_below_one_block_are_known_but_not_shared(mounted: Mounted) -> None:
    sizes = (0, 1, 4095)
    for size in sizes:
        content = bytes([size % 251]) * size
        mounted.path(str(size)).mkdir()
        for name in ("a", "b", "c"):
            mounted.path(str(size), name).write_bytes(content)
    mounted.settle()
    for size in sizes:
        assert [mounted.state(f"{size}/{name}") for name in ("a", "b", "c")] == ["plain"] * 3
        assert mounted.duplicates(f"{size}/b") == [b"%d/a" % size, b"%d/c" % size]
        assert mounted.xattr(f"{size}/b", "refs") == b"3"
        assert mounted.xattr(f"{size}/b", "digest") == digest_of(bytes([size % 251]) * size)
    groups = dedupfs("duplicates", mounted.mountpoint, "--json").json()
    assert {(group["size_bytes"], *group["paths"]) for group in groups} == {
        (size, f"{size}/a", f"{size}/b", f"{size}/c") for size in sizes
    }
    # one block is enough
    shared_copies(mounted, os.urandom(4096))


@BOTH_STRATEGIES
def test_hard_linked_files_are_known_but_not_shared(mounted: Mounted) -> None:
    content = photograph().read_bytes()
    mounted.path("a").write_bytes(content)
    os.link(mounted.path("a"), mounted.path("also a"))
    mounted.path("b").write_bytes(content)
    mounted.settle()
    if mounted.state("b") != "shared":  # extents can be shared whatever names there are
        assert mounted.state("a") == mounted.state("b") == "plain"
    assert mounted.path("a").stat().st_ino == mounted.path("also a").stat().st_ino
    assert mounted.xattr("a", "refs") == b"2"
    assert mounted.duplicates("b") == [b"a", b"also a"]
    assert mounted.duplicates("a") == [b"also a", b"b"]
    with open(mounted.path("also a"), "ab") as file:
        file.write(b"more")
    assert read_afresh(mounted.path("a")) == content + b"more"
    assert read_afresh(mounted.path("b")) == content


@REFERENCE
def test_a_reference_with_hard_links(mounted: Mounted) -> None:
    content = photograph().read_bytes()
    first, second, third = shared_copies(mounted, content)
    also = mounted.path("also first")
    os.link(first, also)
    assert mounted.xattr(first, "refs") == b"3"
    assert mounted.duplicates(second) == [b"also first", b"archive/picture.jpg", b"field/picture.jpg"]
    assert first.stat().st_nlink == also.stat().st_nlink == 2
    with open(also, "r+b") as file:
        file.write(b"new head")
    assert read_afresh(first) == read_afresh(also) == b"new head" + content[8:]
    assert first.stat().st_ino == also.stat().st_ino
    assert read_afresh(second) == read_afresh(third) == content
    first.unlink()
    assert also.stat().st_nlink == 1


@ONE_FLAVOUR
def test_a_name_made_of_an_open_file_whose_own_is_unlinked(mounted: Mounted) -> None:
    """What is told are the names it has, not the one that it has in the store for as long as it is open."""
    content = photograph().read_bytes()
    mounted.path("a").write_bytes(content)
    os.link(mounted.path("a"), mounted.path("b"))
    with open(mounted.path("a"), "rb") as file:
        mounted.path("a").unlink()
        # by linkat(2), which follows the link; Python takes link(2) where no directory is given
        os.link(f"/proc/self/fd/{file.fileno()}", mounted.path("c"), src_dir_fd=file.fileno(), follow_symlinks=True)
        mounted.path("d").write_bytes(content)
        mounted.settle()
        assert mounted.duplicates("d") == [b"b", b"c"]
    mounted.settle()
    assert mounted.duplicates("d") == [b"b", b"c"]


# --- open files


@BOTH_STRATEGIES
def test_a_file_open_for_writing_waits(mounted: Mounted) -> None:
    content = photograph().read_bytes()
    mounted.path("a").write_bytes(content)
    with open(mounted.path("b"), "wb") as writer:
        writer.write(content)
        writer.flush()
        os.fsync(writer.fileno())
        mounted.settle()
        assert mounted.state("a") == "plain"
        assert mounted.duplicates("a") == []
        assert not is_reference(mounted.below("b"))
        # and what is written last counts
        writer.seek(0)
        writer.write(b"B")
        writer.flush()
        writer.seek(0)
        writer.write(content[:1])
    assert mounted.state("b") == shared_state(mounted)
    assert mounted.duplicates("b") == [b"a"]


@BOTH_STRATEGIES
def test_the_other_copy_open_for_writing(mounted: Mounted) -> None:
    content = photograph().read_bytes()
    mounted.path("a").write_bytes(content)
    mounted.settle()
    with open(mounted.path("a"), "r+b") as writer:
        mounted.path("b").write_bytes(content)
        mounted.settle()
        assert not is_reference(mounted.below("a"))
        writer.write(b"A")
    mounted.settle()
    assert read_afresh(mounted.path("a")) == b"A" + content[1:]
    assert read_afresh(mounted.path("b")) == content
    assert mounted.state("b") == "plain"


def test_a_reader_holds_a_file_while_it_becomes_shared(mounted: Mounted) -> None:
    content = photograph().read_bytes()
    mounted.path("a").write_bytes(content)
    mounted.settle()
    with open(mounted.path("a"), "rb", buffering=0) as first, open(mounted.path("a"), "rb", buffering=0) as second:
        assert first.read(1000) == content[:1000]
        fcntl.flock(first, fcntl.LOCK_EX)
        mounted.path("b").write_bytes(content)
        mounted.settle()
        os.posix_fadvise(first.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert first.readall() == content[1000:]
        assert second.readall() == content
        assert os.fstat(first.fileno()).st_size == len(content)
        # a lock belongs to the file, whatever inode is behind it
        assert attempt("flock", "--nonblock", mounted.path("a"), "true").returncode == 1
    mounted.settle()
    assert attempt("flock", "--nonblock", mounted.path("a"), "true").returncode == 0
    assert mounted.state("a") == mounted.state("b") == shared_state(mounted)
    assert read_afresh(mounted.path("a")) == read_afresh(mounted.path("b")) == content


@BOTH_STRATEGIES
def test_a_reader_holds_the_later_copy(mounted: Mounted) -> None:
    content = photograph().read_bytes()
    mounted.path("a").write_bytes(content)
    mounted.settle()
    with open(mounted.path("b"), "wb") as writer:
        writer.write(content)
        writer.flush()
        reader = os.open(mounted.path("b"), os.O_RDONLY)
    mounted.settle()
    assert os.pread(reader, 1 << 26, 0) == content
    os.close(reader)
    mounted.settle()
    assert mounted.state("b") == shared_state(mounted)


def test_a_reader_of_a_reference_while_it_is_written(mounted: Mounted) -> None:
    """A reader sees what is written at once, as on any filesystem; where the kernel reads the blob for him, he goes on
    reading what he opened, and whoever opens the file afterwards sees what was written."""
    content = photograph().read_bytes()
    first, second, _ = shared_copies(mounted, content)
    with open(first, "rb", buffering=0) as reader:
        assert reader.read(100) == content[:100]
        with open(first, "r+b", buffering=0) as writer:
            writer.write(b"changed")
            if mounted.passes_blobs_through():
                assert os.pread(reader.fileno(), 1 << 26, 0) == content
                assert os.pread(writer.fileno(), 1 << 26, 0) == first.read_bytes() == b"changed" + content[7:]
                writer.truncate(50)
                assert first.read_bytes() == b"changed" + content[7:50]
                assert read_afresh(second) == content
                return
            assert os.pread(reader.fileno(), 7, 0) == b"changed"
            os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(reader.fileno(), 1 << 26, 0) == b"changed" + content[7:]
            writer.truncate(50)
            assert os.pread(reader.fileno(), 1 << 26, 0) == b"changed" + content[7:50]
    assert read_afresh(second) == content


@REFERENCES
def test_nobody_writes_to_a_blob_through_a_mapping(mounted: Mounted) -> None:
    """Who opens a file to write while the kernel has its blob for a reader maps what the kernel has."""
    content = photograph().read_bytes()
    first, second, third = shared_copies(mounted, content)
    writes = "m = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 0); m[0:7] = b'changed'; m.flush()"
    with open(first, "rb", buffering=0):
        attempt(sys.executable, "-c", f"import mmap, os, sys; {writes}", first)
    assert read_afresh(first) in (content, b"changed" + content[7:])
    assert read_afresh(second) == read_afresh(third) == content
    # and who maps a file that a reader had open while it came to be shared
    alone = mounted.path("alone")
    alone.write_bytes(content[::-1])
    mounted.settle()
    with open(alone, "rb", buffering=0):
        tool("cp", alone, mounted.path("copy of it"))
        mounted.settle()
        attempt(sys.executable, "-c", f"import mmap, os, sys; {writes}", alone)
    assert read_afresh(mounted.path("copy of it")) == content[::-1]


@REFERENCE
def test_a_reader_of_a_reference_that_is_unlinked(mounted: Mounted) -> None:
    content = photograph().read_bytes()
    paths = shared_copies(mounted, content)
    with open(paths[0], "rb", buffering=0) as reader:
        for path in paths:
            path.unlink()
        mounted.settle()
        os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert reader.readall() == content
    mounted.settle()
    tool("sync", "--file-system", mounted.source)
    assert mounted.status()["files"] == 0


# --- metadata


@REFERENCES
def test_becoming_a_reference_changes_nothing_anybody_sees(mounted: Mounted) -> None:
    content = photograph().read_bytes()
    folder = mounted.path("folder")
    folder.mkdir()
    for name, mode in (("a", 0o604), ("b", 0o4750)):
        path = folder / name
        path.write_bytes(content)
        os.setxattr(path, "user.comment", name.encode() * 500)
        tool("setfacl", "--modify", "u:1234:r", path)
        if os.geteuid() == 0:
            os.chown(path, 1000, 2000)
        os.chmod(path, mode)
        os.utime(path, ns=(10**18 + 5, 10**18 + 7))
    os.utime(folder, ns=(10**18, 10**18 + 1))
    look = r"find folder -printf '%y %m %u %g %s %n %T@ %P\0' | sort -z; getfacl --numeric folder/*"
    before = shell(look, mounted.path())
    mounted.settle()
    assert is_reference(mounted.below("folder/a"))
    assert is_reference(mounted.below("folder/b"))
    assert shell(look, mounted.path()) == before
    for name in ("a", "b"):
        # XFS shows root how it keeps an ACL
        names = set(os.listxattr(folder / name)) - {"trusted.SGI_ACL_FILE"}
        assert names == {"user.comment", "system.posix_acl_access"}
        assert os.getxattr(folder / name, "user.comment") == name.encode() * 500
    # each is its own file still
    os.chmod(folder / "a", 0o600)
    os.setxattr(folder / "a", "user.comment", b"new")
    assert (folder / "b").stat().st_mode & 0o7777 == 0o4750
    assert os.getxattr(folder / "b", "user.comment") == b"b" * 500


@REFERENCE
def test_blobs_are_sealed(mounted: Mounted) -> None:
    shared_copies(mounted, photograph())
    mounted.settle()
    (blob,) = blobs(mounted)
    st = blob.stat()
    assert st.st_mode & 0o7777 == 0o400
    assert st.st_nlink == 1
    assert st.st_uid == os.geteuid()
    assert os.listxattr(blob) == []
    if os.geteuid() == 0:
        with pytest.raises(PermissionError):
            os.open(blob, os.O_WRONLY)
        assert b"i" in tool("lsattr", blob).split()[0]


@BOTH_STRATEGIES
def test_fsync_of_a_reference(mounted: Mounted) -> None:
    first, *_ = shared_copies(mounted, photograph())
    descriptor = os.open(first, os.O_RDONLY)
    os.fsync(descriptor)
    os.fdatasync(descriptor)
    os.close(descriptor)
    directory = os.open(first.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
