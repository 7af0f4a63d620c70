"""What a script may ask of a file through extended attributes, and what nobody may learn or pretend."""

import errno
import itertools
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from tests.conftest import Mounts
from tests.support.blocks import is_reference
from tests.support.flavours import BOTH_STRATEGIES, ONE_FLAVOUR
from tests.support.mounted import Mounted, dedupfs
from tests.support.photos import photographs
from tests.support.tools import OTHER_GROUP, USER, attempt, needs_root, read_afresh, tool
from tests.support.trees import photograph, shared_copies, shared_state

pytestmark = pytest.mark.either_way

OURS = ["digest", "state", "refs", "duplicates", "image", "phash", "similar", "authoritative", "conflicts"]
MADE_UP = ["user.dedupfs.digest", "user.dedupfs.ref", "user.dedupfs.whatever", "user.dedupfs."]
MARKS = ["trusted.dedupfs.ref", "user.dedupfs.ref"]


def errno_of(call: Callable[[], object]) -> int:
    with pytest.raises(OSError) as raised:
        call()
    assert raised.value.errno is not None
    return raised.value.errno


# --- answers


def test_the_answers(mounted: Mounted) -> None:
    picture, other = photographs(2)
    content = picture.read_bytes()
    paths = shared_copies(mounted, picture)
    mounted.path("unique.jpg").write_bytes(other.read_bytes())
    # each through getfattr as a script would, without the hexadecimal of binary values
    command = ["getfattr", "--only-values", "--absolute-names", "--name"]
    digest = xxhash.xxh3_128_hexdigest(content).encode()
    assert tool(*command, "user.dedupfs.digest", paths[0]) == digest
    assert tool(*command, "user.dedupfs.state", paths[0]) == shared_state(mounted).encode()
    assert tool(*command, "user.dedupfs.refs", paths[0]) == b"3"
    assert tool(*command, "user.dedupfs.duplicates", paths[1]) == b"archive/picture.jpg\0field/picture.jpg\0"
    assert mounted.xattr("unique.jpg", "state") == b"plain"
    assert mounted.xattr("unique.jpg", "refs") == b"1"
    assert mounted.xattr("unique.jpg", "duplicates") == b""
    assert mounted.xattr("unique.jpg", "digest") == xxhash.xxh3_128_hexdigest(other.read_bytes()).encode()
    # the same by the command line
    group = {"digest": digest.decode(), "size_bytes": len(content)}
    group["paths"] = ["archive/picture.jpg", "field/picture.jpg", "office/picture.jpg"]
    assert dedupfs("duplicates", mounted.mountpoint, paths[0], "--json").json() == group
    assert dedupfs("duplicates", mounted.mountpoint, "--json").json() == [group]


@ONE_FLAVOUR
def test_who_writes_and_then_asks_gets_the_answer(mounted: Mounted) -> None:
    """Without any settle: asking waits for the file that is asked about."""
    for number, picture in enumerate(photographs(10)):
        content = picture.read_bytes()
        for copy in range(2):
            path = mounted.path(f"{number}.{copy}.jpg")
            path.write_bytes(content)
            assert mounted.xattr(path, "digest") == xxhash.xxh3_128_hexdigest(content).encode()
        assert mounted.duplicates(path) == [b"%d.0.jpg" % number]
        assert mounted.state(path) == "reference"
        # and again, of what was written over it
        path.write_bytes(content + b"!")
        assert mounted.xattr(path, "digest") == xxhash.xxh3_128_hexdigest(content + b"!").encode()
        assert mounted.duplicates(path) == []


def _in_one_go(fd: int, content: bytes) -> None:
    os.write(fd, content)


def _backwards(fd: int, content: bytes) -> None:
    for start in range(len(content) // 5000 * 5000, -1, -5000):
        os.pwrite(fd, content[start : start + 5000], start)


def _around_a_hole(fd: int, content: bytes) -> None:
    os.ftruncate(fd, len(content))
    os.pwrite(fd, content[:9000], 0)
    os.pwrite(fd, content[59_000:], 59_000)


def _over_and_over(fd: int, content: bytes) -> None:
    os.write(fd, content)
    os.ftruncate(fd, 10_000)
    os.pwrite(fd, content[:5000], 0)
    os.pwrite(fd, content[5000:], 5000)


def _other_bytes_first(fd: int, content: bytes) -> None:
    os.write(fd, content[:5000])
    os.pwrite(fd, b"other", 100)
    os.pwrite(fd, content[5000:], 5000)
    os.pwrite(fd, content[100:105], 100)


def _mapped(fd: int, content: bytes) -> None:
    os.ftruncate(fd, len(content))
    with mmap.mmap(fd, len(content)) as pages:
        pages[:] = content


@ONE_FLAVOUR
def test_the_digest_is_of_the_content_however_it_was_written(mounted: Mounted) -> None:
    original = photograph().read_bytes()
    content = original[:9000] + bytes(50_000) + original[9000:]
    ways = (_in_one_go, _backwards, _around_a_hole, _over_and_over, _other_bytes_first, _mapped)
    for number, write in enumerate(ways):
        # each with bytes of its own, or a file would share with the one before
        own = content + b"%d" % number
        path = mounted.path(write.__name__)
        with open(path, "w+b", buffering=0) as file:
            write(file.fileno(), own)
        assert mounted.xattr(path, "digest") == xxhash.xxh3_128_hexdigest(own).encode(), write
        assert read_afresh(path) == own, write
        assert mounted.state(path) == "plain"


@BOTH_STRATEGIES
def test_they_are_not_listed_and_not_carried_away(mounted: Mounted) -> None:
    first, *_ = shared_copies(mounted, photograph())
    os.setxattr(first, "user.comment", b"mine")
    assert os.listxattr(first) == ["user.comment"]
    assert tool("getfattr", "--dump", "--match=-", "--absolute-names", first).splitlines()[1:] == [
        b'user.comment="mine"',
        b"",
    ]


@ONE_FLAVOUR
def test_more_duplicates_than_an_xattr_can_hold(mounted: Mounted) -> None:
    folder = mounted.path("n" * 200)
    folder.mkdir()
    for number in range(400):
        (folder / f"{number:04d}").write_bytes(b"the same in all")
    mounted.settle()
    answer = mounted.xattr(folder / "0000", "duplicates")
    assert answer.endswith(b"\0")
    paths = answer.split(b"\0")[:-1]
    whole = {os.fsencode(f"{folder.name}/{number:04d}") for number in range(1, 400)}
    assert set(paths) < whole
    assert len(set(paths)) == len(paths)
    assert 65536 - 206 <= len(answer) <= 65536
    assert mounted.xattr(folder / "0000", "refs") == b"400"
    (group,) = dedupfs("duplicates", mounted.mountpoint, "--json").json()
    assert len(group["paths"]) == 400


@ONE_FLAVOUR
def test_names_of_any_bytes_in_the_answers(mounted: Mounted) -> None:
    names = [b"caf\xe9", b"new\nline", b"tab\t and \\ and \x1b[2J", "日本".encode(), b"-rf", b" "]
    content = photograph().read_bytes()
    for name in names:
        mounted.path(name).write_bytes(content)
    mounted.settle()
    for name in names:
        assert mounted.duplicates(os.fsdecode(name)) == sorted(set(names) - {name})
    answer = dedupfs("duplicates", "--json", mounted.mountpoint, "--", os.fsdecode(b"caf\xe9")).json()
    assert sorted(map(os.fsencode, answer["paths"])) == sorted(names)


@ONE_FLAVOUR
def test_asking_for_what_has_no_answer(mounted: Mounted) -> None:
    mounted.path("directory").mkdir()
    mounted.path("link").symlink_to("directory")
    mounted.path("file").write_bytes(b"content")
    os.mkfifo(mounted.path("fifo"))
    for name in OURS:
        for path in ("directory", "fifo", "."):
            assert errno_of(lambda path=path, name=name: mounted.xattr(path, name)) == errno.ENODATA  # type: ignore[misc]
        # the kernel itself refuses user xattrs of symbolic links
        assert errno_of(lambda name=name: mounted.xattr("link", name)) in (errno.ENODATA, errno.EPERM)  # type: ignore[misc]
    assert errno_of(lambda: mounted.xattr("file", "phash2")) == errno.ENODATA
    assert errno_of(lambda: mounted.xattr("nothing", "digest")) == errno.ENOENT
    assert mounted.xattr("file", "digest")


@ONE_FLAVOUR
def test_renames_and_removals_show_in_the_answers(mounted: Mounted) -> None:
    first, second, third = shared_copies(mounted, photograph())
    deep = mounted.path("a/b")
    deep.mkdir(parents=True)
    second.rename(deep / "x.jpg")
    assert mounted.duplicates(first) == [b"a/b/x.jpg", b"archive/picture.jpg"]
    mounted.path("a").rename(mounted.path("z"))
    assert mounted.duplicates(first) == [b"archive/picture.jpg", b"z/b/x.jpg"]
    os.link(third, mounted.path("z/third"))
    assert mounted.duplicates(first) == [b"archive/picture.jpg", b"z/b/x.jpg", b"z/third"]
    assert mounted.xattr(first, "refs") == b"3"
    third.unlink()
    assert mounted.duplicates(first) == [b"z/b/x.jpg", b"z/third"]
    (mounted.path("z/b/x.jpg")).unlink()
    assert mounted.duplicates(first) == [b"z/third"]
    assert mounted.xattr(first, "refs") == b"2"
    mounted.restart()
    assert mounted.duplicates(first) == [b"z/third"]


# --- who may know


@needs_root
@BOTH_STRATEGIES
def test_only_paths_that_the_asker_may_see(mounted: Mounted) -> None:
    content = photograph().read_bytes()
    folders = {"public": (0o755, 0), "secret": (0o700, 0), "team": (0o750, OTHER_GROUP), "theirs": (0o700, None)}
    for folder, (mode, group) in folders.items():
        mounted.path(folder).mkdir()
        mounted.path(folder, "copy.jpg").write_bytes(content)
        os.chown(mounted.path(folder), USER if group is None else 0, group or 0)
        os.chmod(mounted.path(folder), mode)
    # seen by everybody, and read by nobody: that it has this content is as good as reading it
    mounted.path("public/unreadable.jpg").write_bytes(content)
    os.chmod(mounted.path("public/unreadable.jpg"), 0o600)
    mounted.path("public/secret").mkdir(mode=0o700)
    mounted.path("public/secret/copy.jpg").write_bytes(content)
    mounted.settle()

    def asked_by(user: int | None, *groups: int) -> list[bytes]:
        command = ["getfattr", "--only-values", "--absolute-names", "--name=user.dedupfs.duplicates"]
        answer = tool(*command, mounted.path("public/copy.jpg"), user=user, groups=groups)
        return sorted(answer.split(b"\0")[:-1])

    everything = [
        b"public/secret/copy.jpg",
        b"public/unreadable.jpg",
        b"secret/copy.jpg",
        b"team/copy.jpg",
        b"theirs/copy.jpg",
    ]
    assert asked_by(None) == everything
    assert asked_by(USER) == [b"theirs/copy.jpg"]
    assert asked_by(USER, OTHER_GROUP) == [b"team/copy.jpg", b"theirs/copy.jpg"]
    assert asked_by(12345) == []
    assert asked_by(12345, OTHER_GROUP) == [b"team/copy.jpg"]
    # an ACL counts as well as a mode
    tool("setfacl", "--modify", "u:12345:rx", mounted.path("secret"))
    assert asked_by(12345) == [b"secret/copy.jpg"]
    # and root afterwards still is root
    assert asked_by(None) == everything
    assert mounted.xattr("secret/copy.jpg", "refs") == b"6"


@needs_root
@ONE_FLAVOUR
def test_who_cannot_read_a_file_learns_nothing_of_its_content(mounted: Mounted) -> None:
    path = mounted.path("private.jpg")
    path.write_bytes(photograph().read_bytes())
    os.chmod(path, 0o600)
    mounted.settle()
    for name in OURS:
        refused = attempt("getfattr", "--only-values", f"--name=user.dedupfs.{name}", path, user=USER)
        assert refused.stdout == b""
        assert b"Permission denied" in refused.stderr
    # nor by the command line, which is the owner's
    answer = dedupfs("duplicates", mounted.mountpoint, path, exit_code=None, user=USER)
    assert answer.exit_code == 71
    assert answer.stdout == ""
    assert dedupfs("status", mounted.mountpoint, exit_code=None, user=USER).exit_code == 71


@needs_root
@BOTH_STRATEGIES
def test_a_shared_file_is_read_and_written_by_its_own_permissions(mounted: Mounted) -> None:
    """A blob belongs to root; what counts is the path that leads to it."""
    content = photograph().read_bytes()
    mine, theirs, _ = shared_copies(mounted, content)
    os.chmod(mine, 0o640)
    os.chown(theirs, USER, USER)
    os.chmod(theirs, 0o600)
    assert b"Permission denied" in attempt("cat", mine, user=USER).stderr
    assert tool("cat", mine, user=12345, groups=[0]) == content
    assert b"Permission denied" in attempt("cat", theirs, user=12345).stderr
    assert tool("cat", theirs, user=USER) == content
    tool("sh", "-c", 'echo more >>"$1"', "sh", theirs, user=USER)
    assert read_afresh(theirs) == content + b"more\n"
    assert b"Permission denied" in attempt("sh", "-c", 'echo more >>"$1"', "sh", mine, user=12345, groups=[0]).stderr
    assert read_afresh(mine) == content
    assert theirs.stat().st_uid == USER


# --- what nobody may set


@pytest.mark.parametrize("user", [None, pytest.param(USER, marks=needs_root)], ids=["root", "user"])
@ONE_FLAVOUR
def test_answers_cannot_be_set_or_removed(mounted: Mounted, user: int | None) -> None:
    content = photograph().read_bytes()
    first, second, _ = shared_copies(mounted, content)
    if user is not None:
        os.chown(first, user, user)
        os.chown(second.parent, user, user)
    before = {name: mounted.xattr(first, name) for name in OURS}
    for name in [f"user.dedupfs.{ours}" for ours in OURS] + MADE_UP + ["user.dedupfs.control"]:
        for options in (["--name", name, "--value", "x"], ["--remove", name]):
            for path in (first, second.parent):
                refused = attempt("setfattr", *options, path, user=user)
                assert refused.returncode == 1, options
                assert b"Operation not permitted" in refused.stderr, options
    assert {name: mounted.xattr(first, name) for name in OURS} == before


@needs_root
@BOTH_STRATEGIES
def test_a_reference_cannot_be_forged(mounted: Mounted) -> None:
    """With the mark of another file one would read what one may not."""
    content = photograph().read_bytes()
    first, *_ = shared_copies(mounted, content)
    below = mounted.below("field/picture.jpg")
    stolen = os.getxattr(below, "trusted.dedupfs.ref") if is_reference(below) else b"\1" * 40
    forged = mounted.path("forged.jpg")
    forged.touch()
    os.truncate(forged, len(content))
    for user, mark in itertools.product((None, USER), MARKS):
        os.chown(forged, user or 0, user or 0)
        option = ["--name", mark, "--value", f"0x{stolen.hex()}"]
        refused = attempt("setfattr", *option, forged, user=user)
        assert refused.returncode == 1
        assert b"Operation not permitted" in refused.stderr
        # the mark that is there is neither seen nor taken away
        for path in (first, forged):
            assert attempt("getfattr", "--name", mark, path, user=user).returncode == 1
            assert attempt("setfattr", "--remove", mark, path, user=user).returncode == 1
    assert read_afresh(forged) == bytes(len(content))
    assert read_afresh(first) == content
    mounted.restart()
    assert read_afresh(forged) == bytes(len(content))
    assert read_afresh(first) == content


@needs_root
@ONE_FLAVOUR
def test_a_mark_that_an_ordinary_user_could_have_set_below_is_none(mounts: Mounts) -> None:
    """Under root's mount a user xattr in the backing tree means nothing, is not shown, and does no harm."""
    picture = photograph()

    def prepare(source: Path) -> None:
        (source / "known.jpg").write_bytes(picture.read_bytes())
        (source / "known too.jpg").write_bytes(picture.read_bytes())

    mounted = mounts.new(prepare=prepare).start()
    mounted.settle()
    mark = os.getxattr(mounted.below("known.jpg"), "trusted.dedupfs.ref")
    planted = mounted.below("planted.jpg")
    planted.touch()
    os.truncate(planted, picture.stat().st_size)
    os.setxattr(planted, "user.dedupfs.ref", mark)
    os.setxattr(planted, "user.dedupfs.digest", b"0" * 32)
    mounted.restart()
    dedupfs("scan", mounted.mountpoint)
    path = mounted.path("planted.jpg")
    assert read_afresh(path) == bytes(picture.stat().st_size)
    assert os.listxattr(path) == []
    assert mounted.xattr(path, "digest") != b"0" * 32
    assert mounted.duplicates(path) == []


# --- the store


@ONE_FLAVOUR
def test_the_store_is_invisible_and_unreachable(mounted: Mounted) -> None:
    first, *_ = shared_copies(mounted, photograph())
    root, store = mounted.path(), mounted.path(".dedupfs")
    assert (mounted.backing / ".dedupfs").is_dir()
    assert ".dedupfs" not in os.listdir(root)
    assert b".dedupfs" not in tool("ls", "-A", root).split()
    assert b".dedupfs" not in tool("find", root)
    calls: list[Callable[[str], object]] = [
        os.stat,
        os.lstat,
        os.listdir,
        os.chdir,
        os.unlink,
        os.rmdir,
        lambda path: os.open(path, os.O_RDONLY),
        lambda path: os.rename(path, root / "out"),
        lambda path: os.link(path, root / "out"),
        lambda path: os.chmod(path, 0o777),
        lambda path: os.truncate(path, 0),
        lambda path: os.getxattr(path, "user.x"),
    ]
    for tail in ("", "/format", "/lock", "/index/data.mdb", "/blobs", "/../field/picture.jpg", "/new"):
        for call in calls:
            assert errno_of(lambda call=call, tail=tail: call(f"{store}{tail}")) == errno.ENOENT, tail  # type: ignore[misc]
    # nothing of that name can be made either, at the root
    calls = [
        os.mkdir,
        os.mkfifo,
        lambda path: os.open(path, os.O_CREAT | os.O_WRONLY),
        lambda path: os.symlink("field", path),
        lambda path: os.rename(first, path),
        lambda path: os.rename(mounted.path("office"), path),
        lambda path: os.link(first, path),
    ]
    for call in calls:
        assert errno_of(lambda call=call: call(str(store))) in (errno.EPERM, errno.ENOENT)  # type: ignore[misc]
    assert errno_of(lambda: os.mkdir(store / "new")) == errno.ENOENT
    os.symlink(".dedupfs/format", root / "link")
    assert errno_of(lambda: os.stat(root / "link")) == errno.ENOENT
    assert first.exists()


@ONE_FLAVOUR
def test_elsewhere_the_name_is_like_any_other(mounted: Mounted) -> None:
    folder = mounted.path("folder")
    folder.mkdir()
    (folder / ".dedupfs").mkdir()
    (folder / ".dedupfs" / "notes").write_text("mine")
    mounted.path(".dedupfs2").write_text("mine")
    mounted.path("x.dedupfs").write_text("mine")
    assert os.listdir(folder) == [".dedupfs"]
    assert sorted(os.listdir(mounted.path())) == [".dedupfs2", "folder", "x.dedupfs"]
    mounted.settle()
    assert mounted.duplicates("folder/.dedupfs/notes") == [b".dedupfs2", b"x.dedupfs"]
    mounted.path("folder").rename(mounted.path("renamed"))
    assert mounted.path("renamed/.dedupfs/notes").read_text() == "mine"


@ONE_FLAVOUR
def test_the_control_socket_is_its_owners(mounted: Mounted) -> None:
    path = os.getxattr(mounted.mountpoint, "user.dedupfs.control")
    assert Path(os.fsdecode(path)).is_socket()
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700
    assert mounted.status()["pending"] == 0
