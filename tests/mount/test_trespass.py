"""Ways into the store and to other people's bytes that do not go by the front door: records carried along by tools,
handles, hard links, programs with set-id bits, and questions about files that the asker cannot see.

What a plain call gets is in test_asking.
"""

import ctypes
import errno
import os
import shutil
import stat
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import Mounts
from tests.support.blocks import is_reference
from tests.support.flavours import BOTH_STRATEGIES, ONE_FLAVOUR, REFERENCE
from tests.support.mounted import Mounted
from tests.support.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2
from tests.support.tools import OTHER_GROUP, USER, attempt, needs_root, read_afresh, shell, tool
from tests.support.trees import photograph, shared_copies

MARK = "trusted.dedupfs.ref" if os.geteuid() == 0 else "user.dedupfs.ref"

_libc = ctypes.CDLL(None, use_errno=True)
_HANDLE_BYTES = 128
_FUSE_HANDLE = 0x81  # FILEID_INO64_GEN: a node's number and generation


def errno_of(call: Callable[[], object]) -> int:
    with pytest.raises(OSError) as raised:
        call()
    assert raised.value.errno is not None
    return raised.value.errno


# --- records


def _restored(below: Path, target: Path) -> None:
    """setfattr --restore of what getfattr --dump said of the file below."""
    shutil.copyfile(below, target)
    dump = tool("getfattr", "--dump", "--match=-", "--absolute-names", below)
    attempt("setfattr", "--restore=-", stdin=dump.replace(os.fsencode(below), os.fsencode(target)))


def _untarred(below: Path, target: Path) -> None:
    packed = tool("tar", "-S", "--xattrs", "--xattrs-include=*", "-C", below.parent, "-cf", "-", below.name)
    attempt("tar", "-S", "--xattrs", "--xattrs-include=*", "-C", target.parent, "-xf", "-", stdin=packed)
    os.rename(target.parent / below.name, target)


def _by_descriptor(below: Path, target: Path) -> None:
    shutil.copyfile(below, target)
    value = os.getxattr(below, MARK)
    with open(target, "r+b") as file:
        for path in (file.fileno(), f"/proc/self/fd/{file.fileno()}"):
            for flags in (0, os.XATTR_CREATE, os.XATTR_REPLACE):
                assert errno_of(lambda path=path, flags=flags: os.setxattr(path, MARK, value, flags)) == errno.EPERM  # type: ignore[misc]


CARRIERS: dict[str, Callable[[Path, Path], object]] = {
    "cp": lambda below, target: attempt("cp", "-a", "--sparse=always", below, target),
    "rsync": lambda below, target: attempt("rsync", "-aSXA", below, target),
    "tar": _untarred,
    "setfattr": _restored,
    "descriptor": _by_descriptor,
}


@needs_root
@REFERENCE
def test_a_record_is_not_carried_into_the_mount(mounted: Mounted) -> None:
    """A tool that copies the archive past the mount carries records along. What arrives is what the tool read, zeros:
    never the content that the record names."""
    content = photograph().read_bytes()
    shared_copies(mounted, content)
    below = mounted.below("field/picture.jpg")
    assert is_reference(below)
    for name, carry in CARRIERS.items():
        carry(below, mounted.path("office", name))
    for _ in range(2):
        mounted.settle()
        for name in CARRIERS:
            target = mounted.path("office", name)
            assert read_afresh(target) == bytes(len(content)), name
            assert MARK not in os.listxattr(target)
            assert sorted(mounted.duplicates(target)) == sorted(
                b"office/" + os.fsencode(o) for o in CARRIERS if o != name
            )
        mounted.restart()
    assert mounted.path("field/picture.jpg").read_bytes() == content


@needs_root
@BOTH_STRATEGIES
def test_nothing_of_ours_is_carried_out(mounted: Mounted, tmp_path: Path) -> None:
    content = photograph().read_bytes()
    first, *_ = shared_copies(mounted, content)
    os.setxattr(first, "user.comment", b"mine")
    packed = tool("tar", "-S", "--xattrs", "--xattrs-include=*", "-C", first.parent, "-cf", "-", first.name)
    tool("tar", "-S", "--xattrs", "--xattrs-include=*", "-C", tmp_path, "-xf", "-", stdin=packed)
    tool("cp", "-a", "--sparse=always", first, tmp_path / "cp")
    tool("rsync", "-aSXA", first, tmp_path / "rsync")
    for name in (first.name, "cp", "rsync"):
        target = tmp_path / name
        assert target.read_bytes() == content
        assert [name for name in os.listxattr(target) if "dedupfs" in name] == []


# --- the store


@ONE_FLAVOUR
def test_no_way_round_leads_into_the_store(mounted: Mounted) -> None:
    first, *_ = shared_copies(mounted, photograph())
    root = mounted.path()
    os.symlink("../.dedupfs", root / "field" / "in")
    os.symlink(root / ".dedupfs", root / "absolute")
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY)
    below_root = os.open(root / "field", os.O_RDONLY | os.O_DIRECTORY)
    try:
        ways = [
            f"{root}/field/../.dedupfs",
            f"{root}//.dedupfs",
            f"{root}/./.dedupfs/.",
            f"{root}/field/in",
            f"{root}/absolute",
            f"/proc/self/fd/{directory}/.dedupfs",
            f"/proc/self/fd/{below_root}/../.dedupfs",
            f"{root}/field/../../{root.name}/.dedupfs",
        ]
        for way in ways:
            for tail in ("", "/format", "/blobs", "/staging/x"):
                for call in (os.stat, os.listdir, lambda path: os.open(path, os.O_PATH)):
                    assert errno_of(lambda way=way, tail=tail, call=call: call(way + tail)) == errno.ENOENT, way  # type: ignore[misc]
        for fd, name in ((directory, ".dedupfs"), (below_root, "../.dedupfs")):
            assert errno_of(lambda fd=fd, name=name: os.stat(name, dir_fd=fd)) == errno.ENOENT  # type: ignore[misc]
            assert errno_of(lambda fd=fd, name=name: os.open(name, os.O_RDONLY, dir_fd=fd)) == errno.ENOENT  # type: ignore[misc]
    finally:
        os.close(directory)
        os.close(below_root)
    # in the place of the store, or with it, nothing is renamed
    store = os.fsencode(root / ".dedupfs")
    for path in (os.fsencode(first), os.fsencode(root / "office")):
        for flags in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
            for old, new in ((path, store), (store, path), (path, store + b"/blobs/x"), (store + b"/format", path)):
                code = errno_of(lambda old=old, new=new, flags=flags: renameat2(old, new, flags))  # type: ignore[misc]
                assert code in (errno.ENOENT, errno.EPERM, errno.EEXIST), (old, new, flags)
    assert first.exists()
    assert (mounted.store / "format").exists()


@needs_root
@ONE_FLAVOUR
def test_no_handle_leads_into_the_store(mounted: Mounted) -> None:
    """Root may open whatever the kernel knows by number: that is never something that no path leads to."""
    shared_copies(mounted, photograph())
    mounted.settle()
    inside = {path.lstat().st_ino for path in [mounted.store, *mounted.store.rglob("*")]}
    root = os.open(mounted.mountpoint, os.O_RDONLY | os.O_DIRECTORY)
    try:
        answered = 0
        for node in range(1, 400):
            for generation in range(2):
                handle = struct.pack("=IiIII", 12, _FUSE_HANDLE, 0, node, generation)
                fd = _libc.open_by_handle_at(root, ctypes.create_string_buffer(handle, _HANDLE_BYTES), os.O_PATH)
                if fd < 0:
                    assert ctypes.get_errno() in (errno.ESTALE, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOENT)
                    continue
                answered += 1
                try:
                    with suppress(OSError):  # of a file that is gone
                        assert os.fstat(fd).st_ino not in inside, os.readlink(f"/proc/self/fd/{fd}")
                finally:
                    os.close(fd)
        request = ctypes.create_string_buffer(struct.pack("=Ii", _HANDLE_BYTES - 8, 0), _HANDLE_BYTES)
        mount_id = ctypes.c_int()
        code = _libc.name_to_handle_at(root, b".dedupfs", request, ctypes.byref(mount_id), 0)
        assert (code, ctypes.get_errno()) == (-1, errno.ENOENT)
        assert answered, "not even the root was opened: this shows nothing"
    finally:
        os.close(root)


@needs_root
@ONE_FLAVOUR
def test_the_daemons_descriptors_are_its_own(mounted: Mounted) -> None:
    first, *_ = shared_copies(mounted, photograph())
    with open(first, "rb"):
        for path in ("fd", "root", "cwd", "map_files"):
            refused = attempt("ls", f"/proc/{mounted.pid}/{path}/", user=USER)
            assert refused.returncode != 0, path
            assert b"Permission denied" in refused.stderr, path


@ONE_FLAVOUR
def test_links_do_not_cross_the_edge(mounted: Mounted, tmp_path: Path) -> None:
    first, *_ = shared_copies(mounted, photograph())
    outside = tmp_path / "outside"
    outside.write_bytes(b"outside")
    assert errno_of(lambda: os.link(first, tmp_path / "in")) == errno.EXDEV
    assert errno_of(lambda: os.link(outside, mounted.path("in"))) == errno.EXDEV
    # nor with what lies beneath, which is the same file
    beside = (
        mounted.backing.parent / "beside" if mounted.source == mounted.mountpoint else mounted.source.parent / "beside"
    )
    beside.write_bytes(b"beside")
    try:
        assert errno_of(lambda: os.link(first, beside.with_name("beside too"))) == errno.EXDEV
        assert errno_of(lambda: os.link(beside, mounted.path("in"))) == errno.EXDEV
    finally:
        beside.unlink()
    # a symbolic link out of the tree is the kernel's to follow: the daemon reads its text and nothing else
    os.symlink(outside, mounted.path("link"))
    mounted.settle()
    assert mounted.path("link").read_bytes() == b"outside"
    assert errno_of(lambda: os.open(mounted.path("link"), os.O_RDONLY | os.O_NOFOLLOW)) == errno.ELOOP
    assert mounted.status()["files"] == 3


@needs_root
@ONE_FLAVOUR
def test_an_unlinked_file_is_nobodys_to_find(mounts: Mounts) -> None:
    """It was in a directory that the user may not enter, and what libfuse calls it now can be guessed."""
    mounted = mounts.new("allow_other").start()
    os.chmod(mounted.mountpoint, 0o777)
    private = mounted.path("private")
    private.mkdir(mode=0o700)
    secret = private / "secret"
    secret.write_bytes(b"secret")
    with open(secret, "rb", buffering=0) as file:
        secret.unlink()
        (name,) = os.listdir(mounted.store / "orphans")
        for folder in ("", "office"):
            mounted.path(folder).mkdir(exist_ok=True)
            guessed = mounted.path(folder, name)
            for command in (["cat"], ["stat"], ["chmod", "666"], ["rm"]):
                refused = attempt(*command, guessed, user=USER)
                assert refused.returncode != 0, command
                assert b"No such file" in refused.stderr, command
            with pytest.raises(FileNotFoundError):
                guessed.stat()
        assert os.listdir(mounted.store / "orphans") == [name]
        assert file.readall() == b"secret"


# --- links put into the archive past the mount

# What a user does in the mount, $1, once the kernel has seen his directory there; past it, in $2, he puts a symbolic
# link to $3 in the place of something that was his.
DEEDS = {
    "chmod": 'rm "$2/file"; ln -s "$3/shadow" "$2/file"; chmod 666 "$1/file"',
    "unlink": 'rm -f "$1/sub/shadow"',
    "create": 'echo evil >"$1/sub/evil"',
    "mkdir": 'mkdir "$1/sub/evil"',
    "rename": 'mv "$1/sub/shadow" "$1/stolen"',
    "ask": 'getfattr --name=user.dedupfs.digest "$1/sub/shadow"',
}


@needs_root
@ONE_FLAVOUR
@pytest.mark.parametrize("deed", DEEDS)
def test_a_link_of_an_ordinary_user_leads_the_daemon_nowhere(mounts: Mounts, deed: str) -> None:
    """Who may write to the source itself (an archive of several users, mounted elsewhere) can change what is below the
    mount faster than the kernel looks; root, who serves it, goes where he could not go himself."""
    content = photograph().read_bytes()
    outside = mounts.directory("outside")
    shadow = outside / "shadow"
    shadow.write_bytes(content)
    before = shadow.stat()
    mounted = mounts.new("allow_other").start()
    mounted.expect_log("is not settled")
    os.chmod(mounted.mountpoint, 0o777)
    mounted.path("known").write_bytes(content)
    mounted.settle()
    shell("mkdir his his/sub; echo x >his/file; echo x >his/sub/shadow; ls -lR his", mounted.path(), user=USER)
    below = mounted.source / "his"
    swap = "" if deed == "chmod" else 'rm -r "$2/sub"; ln -s "$3" "$2/sub";'
    script = f'ls -lR "$1"; {swap} {DEEDS[deed]}'
    attempt("sh", "-c", script, "sh", mounted.path("his"), below, outside, user=USER)
    mounted.settle()
    tool("rm", "-r", below)
    mounted.run("scan", mounted.mountpoint)
    after = shadow.stat()
    assert os.listdir(outside) == ["shadow"]
    assert (after.st_mode, after.st_ino, after.st_blocks) == (before.st_mode, before.st_ino, before.st_blocks)
    assert os.listxattr(shadow) == []
    assert shadow.read_bytes() == content


# --- set-id bits


@needs_root
@BOTH_STRATEGIES
def test_programs_with_set_id_bits(mounted: Mounted) -> None:
    """Shared, they go on being what they are; whoever is no longer the only writer of one takes its powers."""
    program = Path(shutil.which("id") or "/usr/bin/id").resolve()
    content = program.read_bytes()
    copies = [mounted.path(name) for name in ("one", "two", "three")]
    for copy in copies:
        copy.write_bytes(content)
        os.chown(copy, 0, OTHER_GROUP)
        os.chmod(copy, 0o6777)
    mounted.settle()
    assert {mounted.state(copy) for copy in copies} in ({"reference"}, {"shared"})
    assert all(copy.stat().st_mode == stat.S_IFREG | 0o6777 for copy in copies)
    assert tool(copies[0], "-u", user=USER).strip() == b"0"
    assert tool(copies[0], "-g", user=USER).strip() == str(OTHER_GROUP).encode()
    # the common content has no powers of its own
    for blob in (mounted.store / "blobs").rglob("*.*"):
        assert stat.S_IMODE(blob.stat().st_mode) == 0o400
    # an ordinary user's write brings the bytes back, and takes the bits
    tool("sh", "-c", 'printf x | dd of="$1" conv=notrunc oflag=append status=none', "sh", copies[0], user=USER)
    assert stat.S_IMODE(copies[0].stat().st_mode) == 0o777
    assert read_afresh(copies[0]) == content + b"x"
    tool("truncate", "--size=-1", copies[1], user=USER)
    assert stat.S_IMODE(copies[1].stat().st_mode) == 0o777
    assert read_afresh(copies[1]) == content[:-1]
    # nobody else's is touched by that
    assert stat.S_IMODE(copies[2].stat().st_mode) == 0o6777
    assert read_afresh(copies[2]) == content
    # written back to what it was it is shared again, and stays without
    copies[0].write_bytes(content)
    assert mounted.state(copies[0]) != "plain"
    assert stat.S_IMODE(copies[0].stat().st_mode) & 0o777 == 0o777
    assert tool(copies[2], "-u", user=USER).strip() == b"0"


# --- who may know, by groups and ACLs


@needs_root
@ONE_FLAVOUR
def test_duplicates_by_groups_and_acls(mounted: Mounted) -> None:
    content = photograph().read_bytes()
    asked = mounted.path("asked.jpg")
    asked.write_bytes(content)
    nobody, group, outsider = 12345, OTHER_GROUP, 23456
    cases = {
        # name: (mode of the directory, its ACL, mode of the file, its ACL, whom it is shown to)
        "search only": (0o711, "", 0o644, "", set()),
        "list only": (0o744, "", 0o644, "", set()),
        "by group": (0o750, f"g:{group}:rx", 0o644, "", {group}),
        "by group, masked": (0o750, f"g:{group}:rx,m::---", 0o644, "", set()),
        "all but one": (0o755, f"u:{nobody}:---", 0o644, "", {group, outsider}),
        "file by user": (0o755, "", 0o600, f"u:{nobody}:r", {nobody}),
        "file by group": (0o755, "", 0o600, f"g:{group}:r", {group}),
        "file all but one": (0o755, "", 0o644, f"u:{outsider}:---", {nobody, group}),
        "file masked": (0o755, "", 0o600, f"u:{nobody}:r,m::---", set()),
        "both": (0o700, f"u:{nobody}:rx", 0o600, f"u:{nobody}:r", {nobody}),
        "directory only": (0o700, f"u:{nobody}:rx", 0o600, "", set()),
        "file only": (0o700, "", 0o600, f"u:{nobody}:r", set()),
    }
    for name, (directory_mode, directory_acl, file_mode, file_acl, _) in cases.items():
        directory = mounted.path(name)
        directory.mkdir()
        path = directory / "copy.jpg"
        path.write_bytes(content)
        for target, mode, acl in ((path, file_mode, file_acl), (directory, directory_mode, directory_acl)):
            os.chmod(target, mode)
            if acl:
                tool("setfacl", "--no-mask" if "m::" in acl else "--mask", "--modify", acl, target)
    mounted.settle()
    for who, groups in ((nobody, [nobody]), (outsider, [outsider]), (outsider + 1, [group])):
        answer = tool(
            *("getfattr", "--only-values", "--absolute-names", "--name=user.dedupfs.duplicates", asked),
            user=who,
            groups=groups,
        )
        shown = {os.fsdecode(path).partition("/")[0] for path in answer.split(b"\0")[:-1]}
        mine = group if group in groups else who
        assert shown == {name for name, case in cases.items() if mine in case[4]}, who
        # what is shown is what he can find and read, asked of the kernel by himself
        found = attempt(
            "sh", "-c", "find . -name copy.jpg -readable 2>/dev/null", cwd=mounted.path(), user=who, groups=groups
        )
        assert {os.fsdecode(line).split("/")[1] for line in found.stdout.splitlines()} == shown, who
