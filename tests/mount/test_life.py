"""Mounting and unmounting: whose store it is, what is found there, and how it is left."""

import errno
import fcntl
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import xxhash

from tests.conftest import Mounts
from tests.support.blocks import disk_usage, files_below, is_reference
from tests.support.filesystems import is_mountpoint, tmpfs, unmount
from tests.support.flavours import BOTH_STRATEGIES, ONE_FLAVOUR, REFERENCE, REFERENCES, flavours
from tests.support.mounted import Mounted, dedupfs
from tests.support.photos import photographs
from tests.support.tools import USER, attempt, differences, needs_root, read_afresh, tool
from tests.support.trees import FOLDERS, make_tree, photograph, shared_copies, shared_state

# What is said of an index that is not there or cannot be used.
NEW_INDEX = r"WARNING.*(index|beginning a new one)"


def answers(mounted: Mounted) -> dict[str, object]:
    """Everything that dedupfs says about every file of the mount."""
    said: dict[str, object] = {
        os.fsencode(path).decode(errors="backslashreplace"): [
            mounted.xattr(path, name) for name in ("digest", "state", "refs", "duplicates")
        ]
        for path in files_below(mounted.path())
    }
    status = mounted.status()
    for name in ("files", "logical_bytes", "stored_bytes", "saved_bytes", "references", "blobs"):
        said[f"status {name}"] = status[name]
    said["duplicates"] = sorted(map(str, dedupfs("duplicates", mounted.mountpoint, "--json").json()))
    return said


# --- an archive that exists


@pytest.mark.parametrize("over_itself", [False, True], ids=["elsewhere", "over itself"])
def test_mounting_an_existing_archive(mounts: Mounts, over_itself: bool) -> None:
    """It serves at once, and shares in the background what it finds; nobody else notices."""
    original = mounts.directory("original")
    make_tree(original, copies=3)
    mounted = mounts.new(over_itself=over_itself, prepare=lambda source: tool("cp", "-aT", original, source))
    # the store is a new entry of the archive's own directory, and changes its time
    look = ["find", ".", "-mindepth", "1", "-printf", r"%y %m %U %G %n %T@ %s %P\0"]
    before = sorted(tool(*look, cwd=original).split(b"\0"))

    mounted.start()
    assert set(differences(original, mounted.path())) <= {b".d..t...... ./"}
    mounted.settle()
    assert mounted.status()["saved_bytes"] >= 2 * sum(path.stat().st_size for path in photographs(6))
    assert sorted(tool(*look, cwd=mounted.path()).split(b"\0")) == before
    assert set(differences(original, mounted.path())) <= {b".d..t...... ./"}
    picture = photographs(6)[0].name
    assert mounted.state(f"folder 0/2019/Sommer – Ausflug/{picture}") == shared_state(mounted)
    if mounts.strategy == "reference":
        assert sum(is_reference(path) for path in files_below(mounted.below("folder 0"))) == 6

    # and what was known is known again, without another look at every file
    said = answers(mounted)
    mounted.restart()
    assert answers(mounted) == said
    assert sorted(tool(*look, cwd=mounted.path()).split(b"\0")) == before


@BOTH_STRATEGIES
def test_a_mount_over_itself(mounts: Mounts) -> None:
    """No path changes, and what was written through the mount is there without it."""
    picture = photograph()
    mounted = mounts.new(over_itself=True, prepare=lambda source: shutil.copyfile(picture, source / "before.jpg"))
    mounted.start()
    assert mounted.source == mounted.mountpoint
    shutil.copyfile(picture, mounted.source / "during.jpg")
    (mounted.source / "note.txt").write_text("written during the mount")
    mounted.settle()
    assert mounted.duplicates("before.jpg") == [b"during.jpg"]
    assert ".dedupfs" not in os.listdir(mounted.source)
    assert dedupfs("status", mounted.source, "--json").json()["files"] == 3
    mounted.unmount()
    assert sorted(os.listdir(mounted.source)) == [".dedupfs", "before.jpg", "during.jpg", "note.txt"]
    assert (mounted.source / "note.txt").read_text() == "written during the mount"
    dedupfs("restore", mounted.source)
    assert (mounted.source / "during.jpg").read_bytes() == picture.read_bytes()
    assert (mounted.source / "before.jpg").read_bytes() == picture.read_bytes()


@BOTH_STRATEGIES
def test_work_that_is_left_at_a_clean_stop_is_done_after_the_next_start(mounted: Mounted) -> None:
    pictures = photographs(20)
    for folder in FOLDERS:
        mounted.path(folder).mkdir()
        for picture in pictures:
            shutil.copyfile(picture, mounted.path(folder, picture.name))
    mounted.restart()
    mounted.settle()
    assert mounted.status()["stored_bytes"] == sum(path.stat().st_size for path in pictures)
    for picture in pictures:
        assert len(mounted.duplicates(f"field/{picture.name}")) == 2


@ONE_FLAVOUR
def test_files_changed_while_nothing_was_mounted(mounted: Mounted) -> None:
    content = photograph().read_bytes()
    mounted.path("a.jpg").write_bytes(content)
    mounted.path("b.jpg").write_bytes(b"x" + content)
    mounted.settle()
    mounted.unmount()
    times = mounted.below("b.jpg").stat()
    mounted.below("b.jpg").write_bytes(content + b"x")
    os.utime(mounted.below("b.jpg"), ns=(times.st_atime_ns, times.st_mtime_ns))
    mounted.below("new.jpg").write_bytes(content)
    mounted.start()
    assert mounted.xattr("b.jpg", "digest") == xxhash.xxh3_128_hexdigest(content + b"x").encode()
    assert mounted.duplicates("new.jpg") == [b"a.jpg"]
    mounted.unmount()
    mounted.below("new.jpg").unlink()
    mounted.start()
    dedupfs("scan", mounted.mountpoint)
    mounted.settle()
    assert mounted.duplicates("a.jpg") == []
    assert read_afresh(mounted.path("a.jpg")) == content


@REFERENCE
def test_a_reference_written_to_behind_the_mount_is_never_mistaken(mounted: Mounted) -> None:
    """Neither its blob nor its own blocks can be called its content: EIO, and fsck names it."""
    content = photograph().read_bytes()
    first, *others = shared_copies(mounted, content)
    mounted.unmount()
    with open(mounted.below("field/picture.jpg"), "r+b") as file:
        file.seek(8192)
        file.write(b"scribbled")
    mounted.expect_log(r"ERROR.*", r"WARNING.*field/picture.jpg")
    mounted.expect_damage()
    mounted.start()
    with pytest.raises(OSError) as raised:
        first.read_bytes()
    assert raised.value.errno == errno.EIO
    with pytest.raises(OSError):
        first.open("r+b").close()
    assert [read_afresh(path) for path in others] == [content, content]
    mounted.unmount()
    answer = dedupfs("fsck", mounted.source, "--json", exit_code=2)
    assert "field/picture.jpg" in str(answer.json())
    # truncating makes no use of any content, and puts the path in order
    mounted.start()
    os.truncate(first, 0)
    first.write_bytes(content)
    mounted.unmount()
    dedupfs("fsck", mounted.source)


# --- the index is no more than an index


def _delete(index: Path, _: Path, __: random.Random) -> None:
    shutil.rmtree(index)


def _empty(index: Path, _: Path, __: random.Random) -> None:
    os.truncate(index / "data.mdb", 0)


def _truncate(index: Path, _: Path, __: random.Random) -> None:
    os.truncate(index / "data.mdb", (index / "data.mdb").stat().st_size // 2 // 4096 * 4096)


def _overwrite(index: Path, _: Path, rng: random.Random) -> None:
    (index / "data.mdb").write_bytes(rng.randbytes(65536))


def _overwrite_behind_the_header(index: Path, _: Path, rng: random.Random) -> None:
    with open(index / "data.mdb", "r+b") as file:
        file.seek(2 * 4096)
        file.write(rng.randbytes(os.fstat(file.fileno()).st_size - 2 * 4096))


def _exchange(index: Path, other_index: Path, _: random.Random) -> None:
    shutil.copyfile(other_index / "data.mdb", index / "data.mdb")


def _replace_by_a_file(index: Path, _: Path, __: random.Random) -> None:
    shutil.rmtree(index)
    index.write_text("not even a directory")


DAMAGES = {
    "deleted": _delete,
    "empty": _empty,
    "truncated": _truncate,
    "random": _overwrite,
    "random pages": _overwrite_behind_the_header,
    "of another store": _exchange,
    "a file": _replace_by_a_file,
}


@pytest.mark.either_way
@REFERENCE
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=[name.replace(" ", "-") for name in DAMAGES])
def test_the_index_is_made_again(
    mounts: Mounts, damage: Callable[[Path, Path, random.Random], None], rng: random.Random
) -> None:
    check_that_the_index_is_made_again(mounts, damage, rng)


@pytest.mark.either_way
@flavours(("reflink", "xfs"))
def test_the_index_is_made_again_where_extents_are_shared(mounts: Mounts, rng: random.Random) -> None:
    check_that_the_index_is_made_again(mounts, _delete, rng)


def check_that_the_index_is_made_again(
    mounts: Mounts, damage: Callable[[Path, Path, random.Random], None], rng: random.Random
) -> None:
    mounted = mounts.new().start()
    for picture in photographs(4):
        shared_copies(mounted, picture, name=picture.name)
    for name in ("small", "small too"):
        mounted.path(name).write_bytes(b"too small to share")
    mounted.path("office", photographs(4)[0].name).unlink()
    mounted.settle()
    said = answers(mounted)
    mounted.unmount()
    other = mounts.new()
    if damage is _exchange:
        other.start()
        shared_copies(other, photographs(8)[-1])
        other.unmount()

    damage(mounted.store / "index", other.store / "index", rng)
    mounted.expect_log(NEW_INDEX)
    mounted.start()
    for picture in photographs(4):
        assert read_afresh(mounted.path("field", picture.name)) == picture.read_bytes()
    mounted.settle()
    assert answers(mounted) == said
    for picture in photographs(4)[1:]:
        for folder in FOLDERS:
            mounted.path(folder, picture.name).unlink()
    mounted.settle()
    assert mounted.status()["files"] == 4


@REFERENCE
def test_rebuild(mounted: Mounted) -> None:
    for picture in photographs(4):
        shared_copies(mounted, picture, name=picture.name)
    mounted.settle()
    said = answers(mounted)
    mounted.unmount()
    dedupfs("rebuild", mounted.source)
    mounted.start()
    assert answers(mounted) == said
    dedupfs("rebuild", mounted.source, exit_code=75)


# --- one owner


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@ONE_FLAVOUR
def test_a_store_has_one_owner(mounts: Mounts) -> None:
    mounted = mounts.new().start()
    shared_copies(mounted, photograph())
    elsewhere = mounts.directory("elsewhere")
    answer = dedupfs("mount", mounted.source, elsewhere, exit_code=75)
    assert str(mounted.source) in answer.stderr
    assert answer.stderr.count("\n") == 1
    dedupfs("mount", mounted.source, mounted.mountpoint, exit_code=75)
    dedupfs("fsck", mounted.source, exit_code=75)
    dedupfs("fsck", mounted.source, "--repair", exit_code=75)
    dedupfs("rebuild", mounted.source, exit_code=75)
    assert not is_mountpoint(elsewhere)
    # these ask the mount, whichever of the two directories is named
    assert dedupfs("status", mounted.source, "--json").json() == mounted.status()
    dedupfs("scan", mounted.source)
    mounted.unmount()
    # an owner that is no mount
    with _locked(mounted.store / "lock"):
        for command in ("scan", "restore", "rebuild", "fsck"):
            assert dedupfs(command, mounted.source, exit_code=75).stderr.count("\n") == 1
        dedupfs("mount", mounted.source, elsewhere, exit_code=75)
    assert not is_mountpoint(elsewhere)
    assert (mounted.store / "clean").exists()


@pytest.mark.either_way
@ONE_FLAVOUR
def test_a_store_of_a_format_that_is_not_known(mounted: Mounted) -> None:
    picture = photograph()
    shared_copies(mounted, picture)
    mounted.unmount()
    description = mounted.store / "format"
    ours = description.read_bytes()

    def look() -> dict[str, Any]:
        return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in mounted.store.rglob("*")}

    mount: list[str | Path] = ["mount", mounted.source, mounted.mountpoint]
    every_command = [mount] + [[name, mounted.source] for name in ("scan", "restore", "rebuild", "fsck")]
    for content, exit_code, commands in (
        (json.dumps(json.loads(ours) | {"version": 2}), 76, every_command),
        ('{"version": 99}', 76, [mount]),
        ("scrambled", 65, every_command),
        ("[]", 65, [mount]),
    ):
        description.write_text(content)
        before = look()
        for command in commands:
            answer = dedupfs(*command, exit_code=exit_code)
            assert answer.stderr.count("\n") == 1, answer
            assert "format" in answer.stderr
        assert not is_mountpoint(mounted.mountpoint)
        assert look() == before
    description.write_bytes(ours)
    mounted.start()
    assert mounted.path("field/picture.jpg").read_bytes() == picture.read_bytes()


# --- options


@REFERENCE
def test_read_only(mounts: Mounts) -> None:
    picture = photograph()
    mounted = mounts.new().start()
    shared_copies(mounted, picture)
    said = answers(mounted)
    mounted.restart("ro", *mounted.options)
    first = mounted.path("field/picture.jpg")
    assert read_afresh(first) == picture.read_bytes()
    assert answers(mounted) == said
    for call in (
        lambda: first.write_bytes(b"x"),
        lambda: os.truncate(first, 0),
        lambda: first.unlink(),
        lambda: first.rename(mounted.path("y")),
        lambda: mounted.path("new").touch(),
        lambda: mounted.path("new").mkdir(),
        lambda: os.chmod(first, 0o600),
        lambda: os.setxattr(first, "user.x", b"x"),
        lambda: os.utime(first),
    ):
        with pytest.raises(OSError) as raised:
            call()
        assert raised.value.errno == errno.EROFS
    mounted.settle()
    mounted.restart(*mounted.options[1:])
    assert answers(mounted) == said


@ONE_FLAVOUR
def test_read_only_from_the_start(mounts: Mounts) -> None:
    """Of what was never scanned there is nothing to tell, and nothing of it is changed."""
    picture = photograph()

    def prepare(source: Path) -> None:
        for name in ("a.jpg", "b.jpg"):
            shutil.copyfile(picture, source / name)

    mounted = mounts.new("ro", prepare=prepare).start()
    inodes = [mounted.below(name).stat().st_ino for name in ("a.jpg", "b.jpg")]
    assert read_afresh(mounted.path("a.jpg")) == picture.read_bytes()
    with pytest.raises(OSError) as raised:
        mounted.xattr("a.jpg", "digest")
    assert raised.value.errno == errno.ENODATA
    mounted.settle()
    assert [mounted.below(name).stat().st_ino for name in ("a.jpg", "b.jpg")] == inodes
    mounted.restart("rw", "share=reference")
    mounted.settle()
    assert mounted.duplicates("a.jpg") == [b"b.jpg"]
    assert mounted.state("a.jpg") == "reference"


@needs_root
@ONE_FLAVOUR
def test_options_of_mount_8(mounted: Mounted) -> None:
    script = mounted.path("script")
    script.write_text("#!/bin/sh\necho ran\n")
    script.chmod(0o755)
    os.mknod(mounted.path("null"), 0o20666, os.makedev(1, 3))
    shutil.copyfile("/usr/bin/id", mounted.path("id"))
    os.chmod(mounted.path("id"), 0o4755)

    def flags() -> set[str]:
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields = line.split(" ")
            if fields[4] == str(mounted.mountpoint):
                return set(fields[5].split(","))
        raise AssertionError("not mounted")

    # root's mount without options is like any of his
    assert tool(script) == b"ran\n"
    assert tool("sh", "-c", 'echo x >"$1"', "sh", mounted.path("null")) == b""
    assert tool(mounted.path("id"), "-u", user=USER) == b"0\n"
    assert flags().isdisjoint({"nodev", "nosuid", "noexec", "ro"})
    assert tool("cat", script, user=USER)
    mounted.restart("noexec", "nodev", "nosuid", "noatime", *mounted.options)
    assert {"nodev", "nosuid", "noexec"} <= flags()
    assert attempt("sh", "-c", '"$1"', "sh", script).returncode == 126
    assert b"Permission denied" in attempt("sh", "-c", 'echo x >"$1"', "sh", mounted.path("null")).stderr
    os.utime(script, ns=(10**18, 10**18 + 10**9))
    assert read_afresh(script).startswith(b"#!")
    assert mounted.below("script").stat().st_atime_ns == 10**18
    mounted.restart("noexec,exec", "ro,rw", *mounted.options[4:])
    assert tool(script) == b"ran\n"
    script.write_text("x")


@pytest.mark.either_way
@ONE_FLAVOUR
def test_what_cannot_be_mounted(mounts: Mounts) -> None:
    mounted = mounts.new()
    inside = mounted.source / "inside"
    inside.mkdir()
    file = mounts.directory("other") / "file"
    file.touch()
    for arguments, exit_code, words in (
        ([mounted.source, mounted.source / "nowhere"], 66, ["nowhere", "does not exist"]),
        ([mounted.source / "nowhere", mounted.mountpoint], 66, ["nowhere", "does not exist"]),
        ([mounted.source, inside], 66, ["inside"]),
        ([mounted.source, mounted.source.parent], 66, ["inside"]),
        ([mounted.source, file], 66, ["not a directory"]),
        ([mounted.source, mounted.mountpoint, "-o", "ro,swift"], 64, ["swift", "noatime", "share=reflink"]),
        ([mounted.source, mounted.mountpoint, "-o", "share=reflink"], 69, ["share=reference"]),
        ([mounted.source], 64, ["MOUNTPOINT"]),
    ):
        answer = dedupfs("mount", *arguments, exit_code=exit_code)
        assert answer.stderr.startswith("dedupfs: ")
        assert answer.stderr.count("\n") == 1, answer
        assert all(word in answer.stderr for word in words), answer
    assert not is_mountpoint(mounted.mountpoint)
    mounted.start("share=reference")


# --- other filesystems


@needs_root
@ONE_FLAVOUR
def test_another_filesystem_inside_the_source(mounts: Mounts) -> None:
    """It is served, and not shared with."""
    content = photograph().read_bytes()

    def prepare(source: Path) -> None:
        (source / "other").mkdir()
        tool("mount", "-t", "tmpfs", "-o", "size=16m", "none", source / "other")
        (source / "other" / "there.jpg").write_bytes(content)

    mounted = mounts.new(prepare=prepare).start()
    try:
        mounted.path("here.jpg").write_bytes(content)
        mounted.path("other/new.jpg").write_bytes(content)
        mounted.settle()
        assert mounted.state("here.jpg") == "plain"
        assert mounted.duplicates("here.jpg") == []
        assert mounted.path("other/new.jpg").read_bytes() == content
        for name in ("there.jpg", "new.jpg"):
            with pytest.raises(OSError) as raised:
                mounted.xattr(f"other/{name}", "digest")
            assert raised.value.errno == errno.ENODATA
        with pytest.raises(OSError) as raised:
            os.rename(mounted.path("here.jpg"), mounted.path("other/here.jpg"))
        assert raised.value.errno == errno.EXDEV
        tool("cp", mounted.path("here.jpg"), mounted.path("other/copy.jpg"))
        tool("mv", mounted.path("here.jpg"), mounted.path("other/here.jpg"))
        assert sorted(os.listdir(mounted.path("other"))) == ["copy.jpg", "here.jpg", "new.jpg", "there.jpg"]
        assert (mounted.path("other/copy.jpg")).read_bytes() == content
        mounted.settle()
        assert mounted.status()["files"] == 0
    finally:
        mounted.unmount()
        tool("umount", mounted.source / "other")


def numbered(folder: Path, number: int, make: Callable[[Path], object]) -> Path:
    """One of what is made in this directory of a tmpfs, which counts its inodes: the one with this inode number."""
    count = itertools.count()
    while True:
        last = folder / f"{next(count)}"
        make(last)
        if last.stat().st_ino >= number:
            assert last.stat().st_ino == number, "it has been given already"
            return last


@pytest.mark.either_way
@needs_root
@ONE_FLAVOUR
@pytest.mark.parametrize("what", ["made", "removed", "renamed", "replaced"])
def test_directories_of_another_filesystem_have_its_numbers(mounts: Mounts, what: str) -> None:
    """What becomes of one changes nothing for the directory of the archive that has the same inode number."""
    mounted = mounts.new()
    with tmpfs(mounted.source / "other") as below:
        mounted.start()
        folder, other = mounted.path("folder"), mounted.path("other")
        folder.mkdir()
        for name in ("a", "b"):
            (folder / name).write_bytes(photograph().read_bytes())
        mounted.settle()
        assert mounted.duplicates("folder/a") == [b"folder/b"]
        number = mounted.below("folder").stat().st_ino
        # past the mount, but for the last call
        match what:
            case "made":
                numbered(below, number - 1, os.mkdir)
                (other / "made").mkdir()
                assert (below / "made").stat().st_ino == number
            case "removed":
                (other / numbered(below, number, os.mkdir).name).rmdir()
            case "renamed":
                (other / numbered(below, number, os.mkdir).name).rename(other / "renamed")
            case "replaced":
                replaced = other / numbered(below, number, os.mkdir).name
                (below / "new").mkdir()
                (other / "new").rename(replaced)
        mounted.settle()
        assert mounted.duplicates("folder/a") == [b"folder/b"]


@needs_root
@ONE_FLAVOUR
@pytest.mark.parametrize("what", ["chmod", "utime", "fchmod"])
def test_files_of_another_filesystem_have_its_numbers(mounts: Mounts, what: str) -> None:
    """What becomes of one changes nothing for the file of the archive that has the same inode number, nor when size and
    time are the same as well: a copy with its times."""
    content = photograph().read_bytes()
    mounted = mounts.new()
    with tmpfs(mounted.source / "other") as below:
        mounted.start()
        for name in ("a", "b"):
            mounted.path(name).write_bytes(content)
        mounted.settle()
        assert mounted.duplicates("a") == [b"b"]
        st = mounted.below("b").stat()
        last = numbered(below, st.st_ino, Path.touch)
        last.write_bytes(content[::-1])
        times = (st.st_atime_ns, st.st_mtime_ns)
        os.utime(last, ns=times)
        there = mounted.path("other", last.name)
        match what:
            case "chmod":
                there.chmod(0o600)
            case "utime":
                os.utime(there, ns=times)
            case "fchmod":
                with open(there, "rb") as file:
                    os.fchmod(file.fileno(), 0o600)
        mounted.settle()
        assert mounted.duplicates("a") == [b"b"]


@needs_root
@REFERENCE
def test_a_store_inside_a_larger_archive(mounts: Mounts) -> None:
    """A department's directory, mounted by itself once: its references are its own, and nobody reads zeros."""
    picture = photograph()
    content = picture.read_bytes()
    inner = mounts.new("share=reference").start()
    shared_copies(inner, picture)
    inner.unmount()

    def prepare(source: Path) -> None:
        tool("cp", "-a", inner.source, source / "department")
        shutil.copyfile(picture, source / "a.jpg")
        shutil.copyfile(picture, source / "b.jpg")

    outer = mounts.new(prepare=prepare)
    outer.expect_log(r"ERROR.*department", r"WARNING.*department")
    outer.start()
    (blob,) = (outer.below("department/.dedupfs/blobs")).glob("*/*")
    before = blob.stat()
    outer.settle()
    assert b"b.jpg" in outer.duplicates("a.jpg")
    assert sorted(os.listdir(outer.path("department"))) == [".dedupfs", *sorted(FOLDERS)]
    for name in ("a.jpg", "b.jpg"):
        outer.path(name).unlink()
    outer.settle()
    try:
        assert read_afresh(outer.path("department/field/picture.jpg")) == content
    except OSError as error:
        if error.errno != errno.EIO:
            raise
    assert blob.read_bytes() == content
    assert (blob.stat().st_ino, blob.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    outer.unmount()
    dedupfs("fsck", outer.source)
    # and the department can still be brought back by itself
    outer.expect_damage()
    department = outer.source / "department"
    dedupfs("restore", department)
    for folder in FOLDERS:
        assert (department / folder / "picture.jpg").read_bytes() == content


# --- unmounting


@ONE_FLAVOUR
@pytest.mark.parametrize("how", ["umount", "fusermount3", "SIGTERM", "SIGINT"])
def test_every_way_to_end_a_mount_leaves_it_clean(mounted: Mounted, how: str) -> None:
    paths = shared_copies(mounted, photograph())
    with open(paths[0], "ab") as file:
        file.write(b"just before")
    assert not (mounted.store / "clean").exists()
    if how == "umount" and os.geteuid() == 0:
        tool("umount", mounted.mountpoint)
    elif how.startswith("SIG"):
        os.kill(mounted.pid, signal.Signals[how])
    else:
        tool("fusermount3", "-u", mounted.mountpoint)
    mounted.wait_until_ended()
    assert (mounted.store / "clean").exists()
    assert not (mounted.store / "daemon.json").exists()
    dedupfs("status", mounted.mountpoint, exit_code=67)
    dedupfs("umount", mounted.mountpoint, exit_code=67)
    mounted.start()
    assert paths[0].read_bytes() == photograph().read_bytes() + b"just before"


@ONE_FLAVOUR
def test_a_signal_ends_a_mount_that_is_at_work(mounted: Mounted) -> None:
    """Apps save and read while what they saved is shared, so that there is always a file that the kernel is told of."""
    content = photograph().read_bytes()

    def work(folder: str, saved: set[str]) -> None:
        for number in range(1000):
            name = f"{folder}/{number}.jpg"
            try:
                mounted.path(name).write_bytes(content)
                saved.add(name)
                assert mounted.path(f"{folder}/{number // 2}.jpg").read_bytes() == content
            except OSError:
                return

    for round_ in range(4):
        saved: set[str] = set()
        apps = []
        for folder in (f"{round_} left", f"{round_} right"):
            mounted.path(folder).mkdir()
            apps.append(threading.Thread(target=work, args=(folder, saved)))
        for app in apps:
            app.start()
        while len(saved) < 20 * round_:
            time.sleep(0.001)
        held = [os.open(mounted.path(f"{round_} open.jpg"), flags) for flags in (os.O_RDWR | os.O_CREAT, os.O_RDONLY)]
        os.write(held[0], content)
        os.kill(mounted.pid, signal.SIGTERM)
        for app in apps:
            app.join()
        mounted.wait_until_ended()
        for fd in held:
            with suppress(OSError):  # nobody is there any more to tell
                os.close(fd)
        assert (mounted.store / "clean").exists()
        mounted.start()
        assert mounted.path(f"{round_} open.jpg").read_bytes() == content
        assert [name for name in saved if mounted.path(name).read_bytes() != content] == []


@ONE_FLAVOUR
def test_a_mount_in_use_is_not_ended(mounted: Mounted) -> None:
    path = mounted.path("open")
    with open(path, "wb") as file:
        answer = dedupfs("umount", mounted.mountpoint, exit_code=75)
        assert "in use" in answer.stderr
        assert answer.stderr.count("\n") == 1
        file.write(b"still writing")
    assert path.read_bytes() == b"still writing"
    assert mounted.is_alive


@pytest.fixture(params=[False, True], ids=["elsewhere", "over itself"])
def dead(mounts: Mounts, request: pytest.FixtureRequest) -> Iterator[Mounted]:
    """A mount whose daemon was killed, twice: the second one in the place of the first. Another filesystem is mounted
    inside the source."""

    def prepare(source: Path) -> None:
        (source / "other").mkdir()
        tool("mount", "-t", "tmpfs", "-o", "size=16m", "none", source / "other")

    mounted = mounts.new("noatime", over_itself=request.param, prepare=prepare).start()
    shared_copies(mounted, photograph())
    mounted.path("other/there").write_bytes(b"there")
    try:
        for _ in range(2):
            mounted.kill(stays=True)
            assert dead_at(mounted.mountpoint)
            mounted.start()
        mounted.kill(stays=True)
        yield mounted
    finally:
        if mounted.is_alive:
            mounted.unmount()
        while is_mountpoint(mounted.mountpoint):
            unmount(mounted.mountpoint, patience_s=0)
        unmount(mounted.source / "other", patience_s=0)


def dead_at(path: Path) -> bool:
    """A worker that was just being started keeps the connection for a moment longer than the daemon lives: who asks
    meanwhile waits for that, and hears of it by ECONNABORTED."""
    try:
        os.listdir(path)  # attributes would come from the kernel's cache
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


@needs_root
@REFERENCES
def test_a_dead_mount_is_replaced(dead: Mounted) -> None:
    dead.start()
    for path in dead.mountpoint.glob("*/*.jpg"):
        assert path.read_bytes() == photograph().read_bytes()
    assert dead.path("other/there").read_bytes() == b"there"
    dead.path("new").write_bytes(photograph().read_bytes())
    dead.settle()
    assert dead.state("new") == "reference"
    assert times_mounted(dead) == 2  # what the daemon killed last left is beneath, and nothing of the ones before
    dead.unmount()
    assert times_mounted(dead) == 0


def times_mounted(mounted: Mounted) -> int:
    table = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    return len([line for line in table if line.split()[4] == os.fspath(mounted.mountpoint)])


READER = """
import errno, os, select, sys

path, wanted = sys.argv[1:]
with open(wanted, "rb") as file:
    wanted = file.read()
while not select.select([sys.stdin], [], [], 0)[0]:
    try:
        with open(path, "rb") as file:
            found = file.read()
    except OSError as error:
        if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
            print(error)
    else:
        if found != wanted:
            print(f"{len(found)} wrong bytes")
"""


@pytest.mark.either_way
@needs_root
@REFERENCES
def test_nobody_sees_what_a_dead_mount_hides(dead: Mounted) -> None:
    """Not for a moment: zeros that somebody copies just then are what the copy has."""
    path = os.fspath(next(dead.below().glob("*/*.jpg")).relative_to(dead.below()))
    command = [sys.executable, "-c", READER, dead.path(path), photograph()]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    readers = [subprocess.Popen(command, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    for _ in range(3):
        dead.start()
        assert dead.path(path).read_bytes() == photograph().read_bytes()
        dead.kill(stays=True)
    assert [reader.communicate("\n")[0] for reader in readers] == ["", ""]


@pytest.mark.either_way
@needs_root
@REFERENCES
def test_a_dead_mount_stays_until_another_one_can_take_its_place(dead: Mounted) -> None:
    """Who reads or writes in the bare directory meanwhile does harm; who gets an error does none."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        metrics = f"metrics=127.0.0.1:{taken.getsockname()[1]}"
        options = ",".join((*dead.options, metrics))
        answer = dedupfs("mount", dead.source, dead.mountpoint, "-o", options, exit_code=None)
        assert answer.exit_code not in (0, 70)
        assert dead_at(dead.mountpoint)
    wrong = dedupfs("mount", dead.source, dead.mountpoint, "-o", "no_such_option", exit_code=64)
    assert "no_such_option" in wrong.stderr
    assert dead_at(dead.mountpoint)
    dead.start()


@needs_root
@ONE_FLAVOUR
def test_a_mount_that_a_container_has_still(mounted: Mounted) -> None:
    """Who unmounts is told why it does not end, and waits."""
    container = subprocess.Popen(
        ["unshare", "--mount", "--propagation=private", "sh", "-c", "echo; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with container:
        assert container.stdin is not None
        assert container.stdout is not None
        container.stdout.readline()  # it has its own mounts now
        command = [sys.executable, "-m", "dedupfs", "umount", str(mounted.mountpoint)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as umount:
            assert umount.stderr is not None
            line = umount.stderr.readline()
            assert f"process {mounted.pid}" in line
            assert "another mount namespace" in line
            assert not is_mountpoint(mounted.mountpoint)
            assert mounted.is_alive
            container.stdin.close()
            assert umount.wait(30) == 0
            assert umount.stderr.read() == ""
    mounted.wait_until_ended()
    assert (mounted.store / "clean").exists()


# --- an ordinary user


@pytest.fixture
def fuse_for_everybody() -> Iterator[None]:
    """/dev/fuse as udev leaves it on any machine; in containers it may be root's alone."""
    with open("/dev/fuse", "rb") as device:
        fcntl.flock(device, fcntl.LOCK_EX)  # another worker may be about to close it again
        mode = os.fstat(device.fileno()).st_mode
        os.chmod("/dev/fuse", mode | 0o666)
        yield
        os.chmod("/dev/fuse", mode)


@needs_root
@REFERENCES
@pytest.mark.usefixtures("fuse_for_everybody")
def test_an_ordinary_user_mounts(mounts: Mounts) -> None:
    """Through fusermount3. His references are marked by an xattr that he could set, but not through the mount."""
    picture = photograph()

    def prepare(source: Path) -> None:
        (source / "field").mkdir()
        shutil.copyfile(picture, source / "field" / "picture.jpg")
        shutil.copyfile(picture, source / "before.jpg")
        tool("chown", "-R", f"{USER}:{USER}", source)

    mounted = mounts.new(user=USER, prepare=prepare).start()
    root = mounted.path()
    # nobody else gets in, not even root
    with pytest.raises(PermissionError):
        os.listdir(root)
    tool("mkdir", root / "office", user=USER)
    tool("cp", root / "field/picture.jpg", root / "office/picture.jpg", user=USER)
    tool("sh", "-c", 'cat >"$1"', "sh", root / "new.jpg", stdin=picture.read_bytes(), user=USER)
    mounted.settle()
    for name in ("before.jpg", "field/picture.jpg", "office/picture.jpg", "new.jpg"):
        assert "user.dedupfs.ref" in os.listxattr(mounted.below(name))
        assert mounted.below(name).stat().st_blocks * 512 <= 4096
        ask = ["getfattr", "--only-values", "--absolute-names", "--name"]
        assert tool(*ask, "user.dedupfs.state", root / name, user=USER) == b"reference"
        assert tool(*ask, "user.dedupfs.refs", root / name, user=USER) == b"4"
        assert tool("getfattr", "--dump", "--match=-", root / name, user=USER) == b""
        assert attempt(*ask, "user.dedupfs.ref", root / name, user=USER).returncode == 1
        assert b"not permitted" in attempt("setfattr", "-x", "user.dedupfs.ref", root / name, user=USER).stderr
        assert (
            b"not permitted" in attempt("setfattr", "-n", "user.dedupfs.ref", "-v", "x", root / name, user=USER).stderr
        )
        assert tool("cat", root / name, user=USER) == picture.read_bytes()
    assert tool(*ask, "user.dedupfs.duplicates", root / "new.jpg", user=USER).count(b"\0") == 3
    tool("sh", "-c", 'echo more >>"$1"', "sh", root / "new.jpg", user=USER)
    assert tool("cat", root / "before.jpg", user=USER) == picture.read_bytes()
    assert tool("cat", root / "new.jpg", user=USER) == picture.read_bytes() + b"more\n"
    assert mounted.status()["share"] == "reference"
    refused = mounted.run("mount", mounted.source, mounted.mountpoint, "-o", "dev", exit_code=64)
    assert "root" in refused.stderr
    mounted.unmount()
    mounted.run("restore", mounted.source)
    for name in ("before.jpg", "field/picture.jpg", "office/picture.jpg"):
        assert mounted.below(name).read_bytes() == picture.read_bytes()
        assert mounted.below(name).stat().st_uid == USER
        assert os.listxattr(mounted.below(name)) == []


@needs_root
@ONE_FLAVOUR
@pytest.mark.usefixtures("fuse_for_everybody")
def test_an_ordinary_user_cannot_mount_what_is_not_his(mounts: Mounts) -> None:
    mounted = mounts.new()
    answer = dedupfs("mount", mounted.source, mounted.mountpoint, user=USER, exit_code=66)
    assert answer.stderr.count("\n") == 1
    assert not is_mountpoint(mounted.mountpoint)
    assert list(mounted.source.iterdir()) == []


@ONE_FLAVOUR
def test_disk_space_is_that_of_the_backing_filesystem(mounted: Mounted) -> None:
    shared_copies(mounted, photograph())
    here, below = os.statvfs(mounted.path()), os.statvfs(mounted.backing)
    for field in ("f_bsize", "f_frsize", "f_blocks", "f_files", "f_namemax"):
        assert getattr(here, field) == getattr(below, field)
    assert abs(here.f_bavail - below.f_bavail) * here.f_frsize < 64 << 20
    assert disk_usage(mounted.path()) >= 3 * photograph().stat().st_size
