"""What an app may do to files and directories: the same happens as on the filesystem below the mount."""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import Mounts
from tests.support.blocks import is_reference
from tests.support.filesystems import tmpfs
from tests.support.flavours import BOTH_STRATEGIES, ONE_FLAVOUR, REFERENCES
from tests.support.mounted import Mounted
from tests.support.tools import OTHER_GROUP, USER, attempt, needs_root, read_afresh, shell, tool
from tests.support.trees import photograph, shared_copies, shared_state

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

_libc = ctypes.CDLL(None, use_errno=True)


def rename(old: Path, new: Path, flags: int) -> None:
    if _libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags) != 0:
        raise OSError(ctypes.get_errno(), "renameat2")


def errno_of(call: Callable[[], object]) -> int:
    with pytest.raises(OSError) as raised:
        call()
    assert raised.value.errno is not None
    return raised.value.errno


# --- side by side with a plain directory

# Scripts that are run in the mount and in a directory beside it, by root or by an ordinary user; what they say and what
# they leave must be the same. $USER and $GROUP are numbers.
SCRIPTS = {
    "modes of what is created": """
        umask 027; mkdir d; touch f; ln -s f l; mkfifo p; umask 0; mkdir d0; touch f0; umask 777; touch none
        umask 022; mkdir -m 1777 sticky; mkdir -m 2750 setgid; install -m 6755 /dev/null both; mkfifo -m 4600 p4
    """,
    "setgid directories": """
        mkdir shared; chgrp $GROUP shared; chmod 2775 shared
        touch shared/file; mkdir shared/below; mkdir shared/below/deeper; ln -s x shared/link; mkfifo shared/fifo
        mkdir plain; touch plain/file; mv plain/file shared/moved; cp plain/../shared/file shared/copied
    """,
    "default ACLs": """
        mkdir d; setfacl -d -m u:$GROUP:rwx,g::r-x,o::--- d
        umask 077; touch d/file; mkdir d/below; touch d/below/file; install -m 640 /dev/null d/installed; mkfifo d/fifo
        umask 0; touch d/open; getfacl -nR d
    """,
    "ACLs": """
        touch f; chmod 640 f; setfacl -m u:$GROUP:rw,m::r f; getfacl -n f; chmod g+w f; getfacl -n f
        setfacl -b f; getfacl -n f; cp -p f g; setfacl -m g:$GROUP:x f; cp -p f h; getfacl -n g h; stat -c %a f g h
    """,
    "chmod of set-id bits": """
        touch f; chmod 6755 f; stat -c %a f; chmod u-s f; stat -c %a f; chmod 2644 f; stat -c %a f
        mkdir d; chmod 3770 d; stat -c %a d; chmod 770 d; stat -c %a d; chmod g-s d; stat -c %a d
    """,
    "set-id bits and writing": """
        for mode in 4755 2755 6711 2644; do
            printf content >f; chmod $mode f; printf more >>f; stat -c "%a %s" f
            chmod $mode f; truncate -s 3 f; stat -c "%a %s" f
            chmod $mode f; truncate -s 0 f; stat -c "%a %s" f
            chmod $mode f; printf x >f; stat -c "%a %s" f
            chmod $mode f; fallocate -l 100 f; stat -c "%a %s" f
            chmod $mode f; printf y | dd of=f conv=notrunc 2>/dev/null; stat -c "%a %s" f
            chmod $mode f; touch f; chgrp $(id -g) f; stat -c "%a %s" f; rm -f f
        done
    """,
    "times": """
        touch -d '2001-02-03 04:05:06.123456789' f; stat -c '%x %y' f
        touch -a -d '1969-12-31 23:59:59.5' f; stat -c '%x %y' f; touch -m -d @5000000000.25 f; stat -c '%x %y' f
        ln -s nowhere l; touch -h -d @1.000000001 l; stat -c '%x %y' l; touch -r f g; stat -c '%x %y' g
        mkdir d; touch -d @7 d; stat -c '%y' d; touch d/x; test "$(stat -c %Y d)" -gt 7; chmod 600 f; stat -c '%x %y' f
        mv f d/f; stat -c '%x %y' d/f; touch -r g d/f; truncate -s 5 d/f; test "$(stat -c %Y d/f)" -gt 7
    """,
    "hard links": """
        echo one >a; ln a b; mkdir d; ln b d/c; stat -c '%h' a b d/c; echo two >>d/c; cat a b; rm a; stat -c '%h' b d/c
        chmod 604 b; stat -c '%a' d/c; mv b d/c; ls d; ln d/c e; mv e d/e; stat -c %h d/c d/e
        truncate -s 1 d/e; cat d/c; ln -s d s; ln -P s s2; stat -c %h s s2
        mkfifo p; ln p q; stat -c %h q; ln d x 2>&1 || echo no
    """,
    "renaming": """
        mkdir -p a/b c; touch a/b/f c/f; mv -T a c 2>&1 || echo not empty; rm c/f; mv -T a c; find . | sort
        mv -T c/b/f c 2>&1 || echo no; mv -T c c/b/x 2>&1 || echo no; mv -T c d; mv -T d d2; find . | sort
        touch f; mkdir e; mv -T f e 2>&1 || echo no; mv -T e f 2>&1 || echo no; ls
    """,
    "removing": """
        mkdir d; touch d/f; rmdir d 2>&1 || echo no; rm d 2>&1 || echo no; rmdir d/f 2>&1 || echo no
        unlink d/f; rmdir d; unlink d 2>&1 || echo gone; mkdir -p x/y/z; rm -r x; ls
    """,
    "links": """
        ln -s /etc/hostname absolute; ln -s ../outside relative; ln -s self self; cat self 2>&1 || echo no
        ln -s "$(printf '%4000s' | tr ' ' x)" long; readlink long | wc -c; readlink absolute; readlink relative
        touch t; ln -s t to; chmod 640 to; stat -Lc %a to; stat -c %a t; touch to/x 2>&1 || echo no
    """,
    "holes": """
        truncate -s 1M f; printf data | dd of=f bs=1 seek=500000 conv=notrunc 2>/dev/null
        stat -c '%s %b' f; fallocate -p -o 499712 -l 8192 f; stat -c '%s %b' f; fallocate -l 2M f; stat -c %s f
        fallocate -n -l 3M f; stat -c %s f; truncate -s 5M g; printf data >>g; cp --sparse=auto g h; cmp g h
    """,
    "xattrs": """
        touch f; setfattr -n user.one -v 1 f; setfattr -n user.two -v 0x0001ff f; setfattr -n user.empty f
        getfattr -d f; setfattr -x user.one f; getfattr -d f; setfattr -x user.one f 2>&1 || echo no
        mkdir d; setfattr -n user.d -v x d; getfattr -d d; setfattr -n other.x -v 1 f 2>&1 || echo no
        setfattr -n user.long -v "$(printf '%3000s' | tr ' ' x)" f; getfattr -d f | wc -c; cp -a f g; getfattr -d g
        getfattr -n user.none f 2>&1 || echo no
    """,
    "names": """
        n=$(printf '%255s' | tr ' ' n); touch "$n"; mkdir "$n.x" 2>&1 || echo too long; rm "$n"
        mkdir "$n"; touch "$n/$n"
        touch -- -rf ' ' 'new
line' '*' '\\' "$(printf '\\377\\376')" '~' 'a b'; find . -print0 | sort -z; ls -b; rm -- -rf ' '; ls | wc -l
        deep=.; for i in $(seq 15); do deep="$deep/$(printf '%100s' | tr ' ' $((i % 10)))"; mkdir "$deep"; done
        echo deep >"$deep/file"; cat "$deep/file"; find . | wc -l
    """,
    "directories": """
        mkdir d; stat -c %h d; mkdir d/a d/b; stat -c %h d; rmdir d/a; mv d/b .; stat -c %h d b; ls -a d
        touch d/f/ 2>&1 || echo no; mkdir d/ 2>&1 || echo no
        mkdir e/; cd e; touch here; mv ../e ../g; ls; touch there; ls ../g
    """,
    "special files": """
        mkfifo p; echo through >p & cat p; wait; stat -c '%F %a' p; test ! -S p
        if [ $USER = 0 ]; then mknod c c 1 3; echo x >c; mknod b b 7 99; stat -c '%F %t %T %a' c b; fi
    """,
    "owners": """
        if [ $USER = 0 ]; then
            touch f; chown $GROUP:$GROUP f; chmod 6755 f; chown 0:0 f; stat -c '%u %g %a' f; chown :$GROUP f; chown 5 f
            stat -c '%u %g' f; ln -s f l; chown -h 7:8 l; stat -c '%u %g' l f; mkdir d; chmod 2755 d; chown 3:4 d
            stat -c '%u %g %a' d
        else
            touch f; chmod 2755 f; chown 0 f 2>&1 || echo no; chgrp 0 f 2>&1 || echo no; chgrp $GROUP f
            stat -c '%u %g %a' f
        fi
    """,
    "permissions": """
        mkdir closed; touch closed/f; chmod 0 closed; ls closed >/dev/null 2>&1 || echo no; cat closed/f 2>&1 || echo no
        chmod 500 closed; touch closed/g 2>&1 || echo no; cat closed/f; rm -f closed/f 2>&1 || echo no; chmod 700 closed
        echo text >f; chmod 200 f; cat f 2>&1 || echo no; echo more >>f; chmod 400 f; (echo more >>f) 2>&1 || echo no
        printf '#!/bin/sh\\necho ran\\n' >s; ./s 2>/dev/null || echo no; chmod 755 s; ./s; chmod 444 s; chmod 755 s; ./s
    """,
    "sticky directories": """
        mkdir -m 1777 tmp; touch tmp/mine; mv tmp/mine tmp/ours; rm tmp/ours; stat -c %a tmp
        rm -f ../theirs/file 2>&1 || echo no; mv ../theirs/file x 2>&1 || echo no
    """,
}


@needs_root
@BOTH_STRATEGIES
@pytest.mark.parametrize("user", [0, USER], ids=["root", "user"])
def test_the_same_as_in_a_plain_directory(mounts: Mounts, user: int) -> None:
    """All scripts in one mount, each in a directory of its own; each is run again once everything is settled."""
    plain = mounts.directory("plain")
    mounted = mounts.new().start()
    group = USER + 1 if user else OTHER_GROUP
    look = r"find . -printf '%P %y %m %U %G %n %l ' ! -type d -printf '%s' -printf '\0' | sort -z"

    def run(top: Path, name: str, script: str) -> tuple[int, bytes, bytes, bytes]:
        place = top / f"{name} {user}"
        place.mkdir()
        os.chown(place, user, user)
        done = attempt(
            "sh",
            "-uc",
            script,
            cwd=place,
            user=user,
            groups=[OTHER_GROUP, group],
            environment={"USER": str(user), "GROUP": str(OTHER_GROUP)},
        )
        return done.returncode, done.stdout, done.stderr, shell(look, place)

    for top in (plain, mounted.path()):
        (top / "theirs").mkdir()
        (top / "theirs" / "file").write_text("root's")
        os.chmod(top / "theirs", 0o1777)
    for name, script in SCRIPTS.items():
        assert run(mounted.path(), name, script) == run(plain, name, script), name
    mounted.settle()
    for name in SCRIPTS:
        assert shell(look, mounted.path(f"{name} {user}")) == shell(look, plain / f"{name} {user}"), name


@needs_root
@ONE_FLAVOUR
def test_the_group_that_a_filesystem_gives(mounts: Mounts) -> None:
    """Mounted with grpid, ext4 gives everything the group of its directory, set-group-ID bit or not."""
    mounted = mounts.new("allow_other").start()
    root = mounts.filesystem.root
    tool("mount", "-o", "remount,grpid", root)
    try:
        seen = []
        for top in (mounts.directory("plain"), mounted.path()):
            folder = top / "folder"
            folder.mkdir()
            os.chmod(top, 0o777)
            os.chmod(folder, 0o777)
            os.chown(folder, 0, OTHER_GROUP)
            script = "touch file; mkdir directory; ln -s x link; mkfifo fifo; stat -c '%n %u %g' *"
            seen.append(shell(script, folder, user=USER))
        assert seen[0] == seen[1]
    finally:
        tool("mount", "-o", "remount,nogrpid", root)


@needs_root
@ONE_FLAVOUR
def test_who_is_not_of_the_group_takes_the_set_group_id_bit_with_an_acl(mounts: Mounts) -> None:
    mounted = mounts.new("allow_other").start()
    seen = []
    for top in (mounts.directory("plain"), mounted.path()):
        os.chmod(top, 0o777)
        for name, groups in (("stranger", []), ("member", [OTHER_GROUP])):
            path = top / name
            path.write_bytes(b"")
            os.chown(path, USER, OTHER_GROUP)
            os.chmod(path, 0o2755)
            tool("setfacl", "--modify", "u:12345:r", path, user=USER, groups=groups)
            seen.append(oct(path.stat().st_mode))
    assert seen[:2] == seen[2:] == ["0o100755", "0o102755"]


# --- renaming


@BOTH_STRATEGIES
def test_rename_with_flags(mounted: Mounted) -> None:
    content = photograph().read_bytes()
    first, second, third = shared_copies(mounted, content)
    second.write_bytes(b"second")
    assert errno_of(lambda: rename(first, second, RENAME_NOREPLACE)) == errno.EEXIST
    assert second.read_bytes() == b"second"
    assert errno_of(lambda: rename(first, mounted.path("nothing"), RENAME_EXCHANGE)) == errno.ENOENT
    assert errno_of(lambda: rename(first, second, RENAME_NOREPLACE | RENAME_EXCHANGE)) == errno.EINVAL
    rename(first, mounted.path("new"), RENAME_NOREPLACE)
    assert not first.exists()
    assert mounted.path("new").read_bytes() == content

    rename(mounted.path("new"), second, RENAME_EXCHANGE)
    assert mounted.path("new").read_bytes() == b"second"
    assert second.read_bytes() == content
    mounted.settle()
    assert mounted.duplicates(third) == [b"office/picture.jpg"]
    assert mounted.state(second) == shared_state(mounted)
    assert mounted.duplicates("new") == []

    # a directory for a file, and back
    rename(mounted.path("office"), mounted.path("new"), RENAME_EXCHANGE)
    assert mounted.path("office").read_bytes() == b"second"
    assert mounted.duplicates(third) == [b"new/picture.jpg"]
    assert read_afresh(mounted.path("new/picture.jpg")) == content
    mounted.restart()
    assert mounted.duplicates(third) == [b"new/picture.jpg"]


@BOTH_STRATEGIES
def test_renaming_over_a_file_that_is_open(mounted: Mounted) -> None:
    content = photograph().read_bytes()
    first, second, third = shared_copies(mounted, content)
    mounted.path("other").write_bytes(b"other")
    with open(first, "rb", buffering=0) as reader, open(second, "r+b", buffering=0) as writer:
        mounted.path("other").rename(first)
        third.rename(second)
        assert reader.readall() == content
        writer.write(b"nobody reads this")
        assert os.pread(writer.fileno(), 6, 0) == b"nobody"
        assert first.read_bytes() == b"other"
        assert read_afresh(second) == content
        assert os.fstat(reader.fileno()).st_nlink == 0
    mounted.settle()
    assert read_afresh(second) == content
    assert sorted(os.listdir(mounted.path())) == ["archive", "field", "office"]
    assert os.listdir(mounted.path("archive")) == []


REFUSALS = {"another filesystem": errno.EXDEV, "immutable": errno.EPERM, "whiteout": errno.EINVAL}


@needs_root
@ONE_FLAVOUR
@pytest.mark.parametrize(("why", "expected"), REFUSALS.items(), ids=[why.replace(" ", "-") for why in REFUSALS])
def test_a_rename_that_fails_over_a_file_that_is_open(mounts: Mounts, why: str, expected: int) -> None:
    """The file that was to be replaced is there as before, under its name, for everybody."""
    mounted = mounts.new()
    with tmpfs(mounted.source / "other"), contextlib.ExitStack() as stack:
        mounted.start()
        kept = mounted.path("kept")
        new = mounted.path("other/new" if why == "another filesystem" else "new")
        kept.write_bytes(b"kept")
        new.write_bytes(b"new")
        if why == "immutable":
            mounted.settle()
            tool("chattr", "+i", mounted.below("new"))
            stack.callback(mounted.run, "scan", mounted.mountpoint)  # chattr(1) is news from past the mount
            stack.callback(tool, "chattr", "-i", mounted.below("new"))
        with open(kept, "r+b", buffering=0) as file:
            flags = RENAME_WHITEOUT if why == "whiteout" else 0
            assert errno_of(lambda: rename(new, kept, flags)) == expected
            assert mounted.below("kept").read_bytes() == b"kept"
            assert kept.read_bytes() == b"kept"
            assert not any(name.startswith(".fuse_hidden") for name in os.listdir(mounted.path()))
            file.write(b"KEPT")
            assert kept.read_bytes() == b"KEPT"
        assert kept.read_bytes() == mounted.below("kept").read_bytes() == b"KEPT"
        assert kept.stat().st_nlink == 1
        assert new.read_bytes() == b"new"
        # and when nothing is in the way
        kept.rename(mounted.path("renamed"))
        assert mounted.path("renamed").read_bytes() == b"KEPT"
        mounted.settle()
        assert list((mounted.store / "orphans").iterdir()) == []


# --- files without a name


@BOTH_STRATEGIES
@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared"])
def test_a_file_that_is_unlinked_while_open(mounted: Mounted, shared: bool) -> None:
    content = photograph().read_bytes()
    folder = mounted.path("field")
    if shared:
        path = shared_copies(mounted, content)[0]
    else:
        folder.mkdir()
        path = folder / "picture.jpg"
        path.write_bytes(content)
        mounted.settle()
    with open(path, "r+b", buffering=0) as file, open(path, "rb", buffering=0) as reader:
        path.unlink()
        assert os.listdir(folder) == []
        assert not path.exists()
        st = os.fstat(file.fileno())
        assert (st.st_nlink, st.st_size, stat.S_IFMT(st.st_mode)) == (0, len(content), stat.S_IFREG)
        # what is made in its place is another file
        path.write_bytes(b"another")
        assert reader.readall() == content
        file.seek(3)
        file.write(b"written afterwards")
        assert os.pread(reader.fileno(), 21, 0) == content[:3] + b"written afterwards"
        file.truncate(10)
        assert os.fstat(reader.fileno()).st_size == 10
        os.fchmod(file.fileno(), 0o600)
        os.utime(file.fileno(), ns=(5, 7))
        os.fsync(file.fileno())
        st = os.fstat(file.fileno())
        assert (st.st_mode & 0o777, st.st_mtime_ns) == (0o600, 7)
        path.unlink()
        folder.rmdir()
        assert os.pread(file.fileno(), 100, 0) == content[:3] + b"written"
        assert not any(name.startswith(".fuse_hidden") for _, _, names in os.walk(mounted.path()) for name in names)
    mounted.settle()
    assert list((mounted.store / "orphans").iterdir()) == []
    if shared:
        assert read_afresh(mounted.path("office/picture.jpg")) == content


@needs_root
@ONE_FLAVOUR
@pytest.mark.parametrize("how", ["unlinked", "replaced"])
def test_a_file_of_another_filesystem_goes_while_open(mounts: Mounts, how: str) -> None:
    """The store cannot take it in, which is on this filesystem."""
    mounted = mounts.new()
    with tmpfs(mounted.source / "other"):
        mounted.start()
        path = mounted.path("other/file")
        path.write_bytes(b"old")
        with open(path, "rb", buffering=0) as file:
            if how == "unlinked":
                path.unlink()
                assert not path.exists()
            else:
                mounted.path("other/new").write_bytes(b"new")
                mounted.path("other/new").rename(path)
                assert path.read_bytes() == b"new"
            assert file.readall() == b"old"
        mounted.unmount()  # by then everything is released
        assert os.listdir(mounted.below("other")) == ([] if how == "unlinked" else ["file"])


@ONE_FLAVOUR
@pytest.mark.parametrize("what", ["read", "written", "unlinked"])
def test_a_file_that_is_called_as_an_unlinked_one_is(mounted: Mounted, what: str) -> None:
    """libfuse numbers the names it gives to unlinked files, and another mount left one of them in the archive."""
    gone, folder = mounted.path("gone"), mounted.path("folder")
    gone.write_bytes(b"unlinked")
    folder.mkdir()
    with open(gone, "r+b", buffering=0) as file:
        gone.unlink()
        (name,) = os.listdir(mounted.store / "orphans")
        left, left_below = folder / name, mounted.below("folder", name)
        left_below.write_bytes(b"a photograph")
        match what:
            case "read":
                assert left.read_bytes() == b"a photograph"
            case "written":
                left.write_bytes(b"another photograph")
                assert left_below.read_bytes() == b"another photograph"
            case "unlinked":
                left.unlink()
                assert not left_below.exists()
        assert os.listdir(mounted.store / "orphans") == [name]
        assert file.readall() == b"unlinked"
    mounted.run("scan", mounted.mountpoint)


@ONE_FLAVOUR
def test_one_of_two_names_unlinked_while_open(mounted: Mounted) -> None:
    path, link = mounted.path("a"), mounted.path("b")
    path.write_bytes(b"content")
    os.link(path, link)
    with open(path, "r+b", buffering=0) as file:
        path.unlink()
        assert os.fstat(file.fileno()).st_nlink == 1
        assert link.stat().st_nlink == 1
        file.write(b"CON")
        assert link.read_bytes() == b"CONtent"
    assert link.read_bytes() == b"CONtent"
    assert link.stat().st_nlink == 1


@ONE_FLAVOUR
def test_a_hard_link_shows_what_is_being_written_by_its_other_name(mounted: Mounted) -> None:
    """Also what the kernel has cached of it: each name is another file for it."""
    path, link, renamed = mounted.path("a"), mounted.path("b"), mounted.path("c")
    path.write_bytes(b"x" * 5000)
    os.link(path, link)

    def seen() -> tuple[int, bytes]:
        return link.stat().st_size, link.read_bytes()

    assert seen() == (5000, b"x" * 5000)
    for flags in (os.O_WRONLY, os.O_RDWR):
        fd = os.open(path, flags | os.O_TRUNC)
        assert seen() == (0, b"")
        os.pwrite(fd, b"one", 0)
        assert seen() == (3, b"one")
        os.rename(path, renamed)
        os.pwrite(fd, b"two", 3)
        assert seen() == (6, b"onetwo")
        os.posix_fallocate(fd, 0, 8)
        assert seen() == (8, b"onetwo\0\0")
        os.pwrite(fd, b"!!", 0)  # as long as before
        assert seen() == (8, b"!!etwo\0\0")
        os.ftruncate(fd, 2)
        assert seen() == (2, b"!!")
        os.close(fd)
        os.rename(renamed, path)


def test_writers_by_two_names_of_a_file_do_not_wait_for_each_other(mounted: Mounted) -> None:
    """Each holds a page of its name while the daemon wants the other's dropped."""
    names = [mounted.path("a"), mounted.path("b")]
    names[0].write_bytes(bytes(20000))
    os.link(*names)

    def write(name: Path) -> None:
        with name.open("r+b", buffering=0) as file:
            for _ in range(30):
                file.seek(4096)
                file.write(b"within a page")

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, names))
    assert names[0].read_bytes() == names[1].read_bytes() == bytes(4096) + b"within a page" + bytes(20000 - 4096 - 13)


def test_many_files_unlinked_while_open_and_a_daemon_that_ends(mounted: Mounted) -> None:
    files = []
    for number in range(50):
        path = mounted.path(f"{number}")
        files.append(open(path, "w+b", buffering=0))  # noqa: SIM115
        files[-1].write(b"%d" % number)
        path.unlink()
    assert os.listdir(mounted.path()) == []
    mounted.kill()
    for file in files:
        with contextlib.suppress(OSError):  # there is nobody to tell
            file.close()
    mounted.start()
    assert os.listdir(mounted.path()) == []
    assert list((mounted.store / "orphans").iterdir()) == []


# --- locks


@ONE_FLAVOUR
def test_locks_between_processes(mounted: Mounted) -> None:
    path, link = mounted.path("file"), mounted.path("link")
    path.write_bytes(bytes(100))
    link.symlink_to("file")
    another = (
        "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+b'), fcntl.LOCK_EX | fcntl.LOCK_NB, 10, int(sys.argv[2]))"
    )

    def lockable(start: int) -> bool:
        return (
            subprocess.run([sys.executable, "-c", another, path, str(start)], stderr=subprocess.DEVNULL).returncode == 0
        )

    with open(path, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert attempt("flock", "--nonblock", link, "true").returncode == 1
        assert attempt("flock", "--nonblock", "--shared", path, "true").returncode == 1
        fcntl.flock(file, fcntl.LOCK_SH)
        assert attempt("flock", "--nonblock", "--shared", path, "true").returncode == 0
        fcntl.lockf(file, fcntl.LOCK_EX, 10, 50)
        assert not lockable(55)
        assert lockable(60)
        fcntl.lockf(file, fcntl.LOCK_UN, 10, 50)
        assert lockable(55)
    assert attempt("flock", "--nonblock", path, "true").returncode == 0


@BOTH_STRATEGIES
def leases(source: Path) -> list[str]:
    """Of files on the filesystem of `source`: a writer would wait for them."""
    device = source.stat().st_dev
    place = f" {os.major(device):02x}:{os.minor(device):02x}:"
    return [line for line in Path("/proc/locks").read_text().splitlines() if "LEASE" in line and place in line]


def test_a_lock_outlives_sharing_and_materialising(mounted: Mounted) -> None:
    content = photograph().read_bytes()
    mounted.path("a").write_bytes(content)
    mounted.settle()
    with open(mounted.path("a"), "rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        mounted.path("b").write_bytes(content)
        mounted.settle()
        assert attempt("flock", "--nonblock", mounted.path("a"), "true").returncode == 1
        assert not leases(mounted.source)
        with open(mounted.path("a"), "ab") as writer:
            writer.write(b"more")
        mounted.settle()
        assert attempt("flock", "--nonblock", mounted.path("a"), "true").returncode == 1
    assert attempt("flock", "--nonblock", mounted.path("a"), "true").returncode == 0


# --- flags of an open file


@ONE_FLAVOUR
def test_appending_is_taken_back(mounts: Mounts) -> None:
    """fcntl(2) without O_APPEND: what is written goes where it is told, until that is set again. Not where the kernel
    writes without asking the daemon: it goes by the flags that the file was opened with."""
    mounted = mounts.new("passthrough=off").start()
    path = mounted.path("log")
    path.write_bytes(b"0123456789")
    fd = os.open(path, os.O_RDWR | os.O_APPEND)
    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        os.write(fd, b"end")
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_APPEND)
        os.pwrite(fd, b"HEAD", 0)
        assert path.read_bytes() == b"HEAD456789end"
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        os.pwrite(fd, b"!", 0)
    finally:
        os.close(fd)
    assert read_afresh(path) == mounted.below("log").read_bytes() == b"HEAD456789end!"


@ONE_FLAVOUR
@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared"])
def test_opened_for_ioctls_only(mounted: Mounted, shared: bool) -> None:
    """Access mode 3 of open(2): whoever may read and write gets a descriptor for neither."""
    content = photograph().read_bytes()
    if shared:
        path = shared_copies(mounted, content)[0]
    else:
        path = mounted.path("picture.jpg")
        path.write_bytes(content)
    fd = os.open(path, os.O_ACCMODE)
    try:
        assert os.fstat(fd).st_size == len(content)
        assert errno_of(lambda: os.read(fd, 1)) == errno_of(lambda: os.write(fd, b"x")) == errno.EBADF
    finally:
        os.close(fd)
    mounted.settle()
    assert read_afresh(path) == content


# --- several writers


def append_at_once(*paths: Path) -> None:
    """One process for each path, appending 100 lines of 80 bytes one by one."""
    script = 'for i in $(seq 100); do printf "%s %076d\\n" "$1" $i; done >>"$2"'
    writers = [
        subprocess.Popen(["bash", "-c", script, "bash", f"{number:02d}", path]) for number, path in enumerate(paths)
    ]
    assert [writer.wait() for writer in writers] == [0] * len(paths)


def assert_all_appended(path: Path, writers: int) -> None:
    lines = read_afresh(path).splitlines()
    assert len(lines) == 100 + 100 * writers
    for number in range(writers):
        own = [line for line in lines if line.startswith(b"%02d " % number)]
        assert own == [b"%02d %076d" % (number, i) for i in range(1, 101)]


_LINES = b"".join(b"== %076d\n" % number for number in range(100))


@BOTH_STRATEGIES
def test_appending_by_several_processes(mounted: Mounted) -> None:
    first, second, _ = shared_copies(mounted, _LINES)
    mounted.path("link").symlink_to(first)
    append_at_once(first, first, mounted.path("link"), first)
    assert_all_appended(first, 4)
    assert read_afresh(second) == _LINES


@BOTH_STRATEGIES
def test_appending_by_several_processes_through_several_names(mounted: Mounted) -> None:
    """For the kernel each name of a hard link is a file of its own, whose size it remembers."""
    first, second, _ = shared_copies(mounted, _LINES)
    links = [mounted.path(f"link {number}") for number in range(2)]
    for link in links:
        os.link(first, link)
    append_at_once(first, first, *links)
    for path in (first, *links):
        assert_all_appended(path, 4)
    assert read_afresh(second) == _LINES


@BOTH_STRATEGIES
def test_writing_at_once_to_the_same_file(mounted: Mounted) -> None:
    """Writers of different parts of a reference: one of them materialises it, none loses anything."""
    content = photograph().read_bytes()[: 1 << 16]
    first, second, _ = shared_copies(mounted, content)
    script = 'dd if=/dev/zero of="$1" bs=1000 seek="$2" count=8 conv=notrunc status=none'
    writers = [subprocess.Popen(["sh", "-c", script, "sh", first, str(10 * number)]) for number in range(6)]
    assert [writer.wait() for writer in writers] == [0] * 6
    expected = bytearray(content)
    for number in range(6):
        expected[10_000 * number : 10_000 * number + 8000] = bytes(8000)
    assert read_afresh(first) == bytes(expected)
    assert read_afresh(second) == content


# --- mapped files


def test_a_shared_mapping(mounted: Mounted) -> None:
    content = photograph().read_bytes()
    first, second, third = shared_copies(mounted, content)
    os.utime(first, ns=(5, 7))
    with (
        open(first, "r+b") as file,
        open(second, "rb") as other,
        mmap.mmap(file.fileno(), 0) as pages,
        mmap.mmap(other.fileno(), 0, prot=mmap.PROT_READ) as others,
    ):
        assert pages[:] == others[:] == content
        pages[5000:5007] = b"changed"
        # seen at once by whoever reads or has it mapped, and by nobody who reads another path
        assert os.pread(file.fileno(), 7, 5000) == b"changed"
        assert tool("cmp", "--bytes=5000", first, second) == b""
        assert others[5000:5007] == content[5000:5007]
        pages.flush()
        assert read_afresh(first) == content[:5000] + b"changed" + content[5007:]
        pages[0:1] = b"\0"
    expected = b"\0" + content[1:5000] + b"changed" + content[5007:]
    assert first.read_bytes() == expected
    mounted.settle()
    assert read_afresh(first) == expected
    assert read_afresh(second) == read_afresh(third) == content
    assert first.stat().st_mtime_ns > 7
    assert not is_reference(mounted.below("field/picture.jpg"))


def test_a_private_mapping(mounted: Mounted) -> None:
    content = photograph().read_bytes()
    first, second, _ = shared_copies(mounted, content)
    with open(first, "rb") as file:
        pages = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        pages[0:7] = b"private"
        assert pages[:8] == b"private" + content[7:8]
        pages.close()
    assert read_afresh(first) == read_afresh(second) == content
    mounted.settle()
    assert mounted.state(first) == shared_state(mounted)


# Python's own mapping has a descriptor of its own, which is open for as long as the mapping is there.
_WITH_A_MAPPING = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
fd = os.open(sys.argv[1], os.O_RDWR)
pages = libc.mmap(None, 8192, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
os.close(fd)
print("mapped", flush=True)
sys.stdin.readline()
ctypes.memmove(pages + 100, b"late", 4)
"""


def _mapping(path: Path) -> "subprocess.Popen[bytes]":
    """A program that has mapped the file, and writes to it when it is given a line."""
    program = subprocess.Popen(
        [sys.executable, "-c", _WITH_A_MAPPING, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert program.stdout is not None
    assert program.stdout.readline() == b"mapped\n"
    return program


@BOTH_STRATEGIES
@pytest.mark.parametrize("which", [0, 1])
def test_a_mapping_that_outlives_its_descriptor(mounted: Mounted, which: int) -> None:
    """With passthrough the file is closed as far as the mount can tell."""
    content = photograph().read_bytes()
    copies = [mounted.path("first.jpg"), mounted.path("second.jpg")]
    late = content[:100] + b"late" + content[104:]
    programs = []
    for path in copies:
        path.write_bytes(content)
        if path is copies[which]:
            programs.append(_mapping(path))
        mounted.settle()
    assert copies[which].read_bytes() == content
    for program in programs:
        program.communicate(b"\n")
        assert program.returncode == 0
    mounted.settle()
    assert [read_afresh(path) for path in copies] == [late if path is copies[which] else content for path in copies]
    mounted.run("scan", mounted.mountpoint)
    assert mounted.xattr(copies[which], "digest") != mounted.xattr(copies[1 - which], "digest")


@needs_root
@REFERENCES
def test_a_mapping_that_outlives_its_daemon(mounted: Mounted) -> None:
    """With passthrough the kernel goes on for whoever has it, beside the next mount."""
    content = photograph().read_bytes()
    passes = mounted.status()["passthrough"]
    mounted.path("one").write_bytes(content)
    mounted.path("two").write_bytes(content)
    program = _mapping(mounted.path("two"))
    mounted.kill(stays=True)
    mounted.start()
    mounted.run("scan", mounted.mountpoint)
    mounted.settle()
    program.communicate(b"\n")
    # Without, what he writes is lost with the daemon; whether he is told depends on what the kernel has in memory.
    assert program.returncode in ((0,) if passes else (0, -signal.SIGBUS))
    mounted.run("scan", mounted.mountpoint)
    mounted.settle()
    late = content[:100] + b"late" + content[104:] if passes else content
    assert read_afresh(mounted.path("two")) == late
    assert read_afresh(mounted.path("one")) == content
    mounted.unmount()


# --- times


@ONE_FLAVOUR
def test_reading_and_writing_move_the_times(mounted: Mounted) -> None:
    first, *_ = shared_copies(mounted, photograph())
    os.utime(first, ns=(1, 1))
    before = first.stat()
    with open(first, "r+b") as file:
        file.write(b"x")
        file.flush()
        inside = os.fstat(file.fileno())
    after = first.stat()
    assert before.st_mtime_ns == 1
    assert inside.st_mtime_ns > 1
    assert after.st_mtime_ns >= inside.st_mtime_ns
    assert after.st_ctime_ns > before.st_ctime_ns
    below = mounted.below("field/picture.jpg").stat()
    assert (after.st_mtime_ns, after.st_ctime_ns) == (below.st_mtime_ns, below.st_ctime_ns)


# --- large directories and long paths


@ONE_FLAVOUR
def test_a_directory_of_a_hundred_thousand_entries(mounts: Mounts) -> None:
    count = 100_000

    def prepare(source: Path) -> None:
        (source / "big").mkdir()
        descriptor = os.open(source / "big", os.O_RDONLY)
        for number in range(count):
            os.mknod(f"entry {number:06d}", 0o100644, dir_fd=descriptor)
        os.close(descriptor)

    # read-only, for the time that the first scan takes
    mounted = mounts.new("ro", prepare=prepare).start()
    listed = os.listdir(mounted.path("big"))
    assert len(listed) == count
    assert set(listed) == {f"entry {number:06d}" for number in range(count)}
    assert tool("find", mounted.path("big"), "-type", "f", "-printf", ".") == b"." * count
    for name in listed[:: count // 500]:
        st = mounted.path("big", name).stat()
        assert (st.st_size, st.st_nlink) == (0, 1)
    with pytest.raises(FileNotFoundError):
        mounted.path("big", "entry 100000").stat()


@BOTH_STRATEGIES
def test_a_directory_that_changes_while_it_is_listed(mounted: Mounted) -> None:
    """Each entry that stays is listed, and none twice."""
    count = 600
    names = [f"{number:03d} {'x' * 150}" for number in range(count)]  # more than one call of the kernel takes
    for name in names:
        mounted.path(name).touch()
    seen = []
    with os.scandir(mounted.path()) as entries:
        for number, entry in enumerate(entries):
            if number % 20 == 0 and number < count:
                mounted.path(f"new {number}").touch()
                mounted.path(names[count - 1 - number // 20]).unlink()
            seen.append(entry.name)
    assert len(seen) == len(set(seen))
    assert set(seen) >= set(names[: count - 30])
    assert len(os.listdir(mounted.path())) == count


@ONE_FLAVOUR
def test_a_directory_read_from_the_middle(mounted: Mounted) -> None:
    """telldir and seekdir: what was said of a position holds, also after a rewind."""
    for number in range(500):
        mounted.path(f"{number:03d}").touch()
    libc = ctypes.CDLL(None)
    libc.opendir.restype = libc.readdir64.restype = ctypes.c_void_p
    libc.telldir.restype = ctypes.c_long
    for name in ("readdir64", "telldir", "closedir", "rewinddir"):
        getattr(libc, name).argtypes = [ctypes.c_void_p]
    libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
    directory = libc.opendir(os.fsencode(mounted.path()))

    def rest() -> list[bytes]:
        names = []
        while entry := libc.readdir64(directory):
            names.append(ctypes.string_at(entry + 19))
        return names

    everything = rest()
    assert sorted(everything) == sorted([b".", b"..", *(b"%03d" % number for number in range(500))])
    libc.rewinddir(directory)
    for _ in range(200):
        libc.readdir64(directory)
    position = libc.telldir(directory)
    tail = rest()
    libc.seekdir(directory, position)
    assert rest() == tail == everything[200:]
    mounted.path("new").touch()
    libc.rewinddir(directory)
    assert b"new" in rest()
    libc.closedir(directory)


@ONE_FLAVOUR
def test_a_path_of_the_greatest_length(mounted: Mounted) -> None:
    """PATH_MAX counts from where one starts: an app goes to a deep directory, and works there."""
    here = os.open(mounted.path(), os.O_RDONLY)
    made = 0
    for _ in range(30):
        try:
            os.mkdir("d" * 200, dir_fd=here)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            break  # beyond what the daemon can name below; nothing else may go wrong
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
        descriptor = os.open("file", os.O_CREAT | os.O_RDWR, 0o644, dir_fd=here)
        os.write(descriptor, b"content")
        assert os.pread(descriptor, 10, 0) == b"content"
        os.fchmod(descriptor, 0o600)
        os.utime(descriptor, ns=(5, 7))
        os.close(descriptor)
        made += 1
    os.close(here)
    mounted.settle()
    assert made >= 18
    # -execdir goes there as well, and no descriptor is left behind (which every test looks for)
    look = 'find . -name file -execdir stat --format="%s %a %Y" {} ";"'
    assert shell(look, mounted.path()).splitlines() == [b"7 600 0"] * made
    assert mounted.status()["files"] >= made - 2


# --- errors


@ONE_FLAVOUR
def test_errors_are_those_of_the_backing_filesystem(mounted: Mounted) -> None:
    root = mounted.path()
    (root / "file").write_bytes(b"x")
    (root / "directory" / "below").mkdir(parents=True)
    (root / "loop").symlink_to("loop")
    for call, expected in (
        (lambda: os.open(root / "none", os.O_RDONLY), errno.ENOENT),
        (lambda: os.open(root / "file" / "x", os.O_RDONLY), errno.ENOTDIR),
        (lambda: os.open(root / "directory", os.O_WRONLY), errno.EISDIR),
        (lambda: os.open(root / "file", os.O_RDONLY | os.O_DIRECTORY), errno.ENOTDIR),
        (lambda: os.open(root / "file", os.O_CREAT | os.O_EXCL), errno.EEXIST),
        (lambda: os.open(root / "loop", os.O_RDONLY), errno.ELOOP),
        (lambda: os.mkdir(root / "file"), errno.EEXIST),
        (lambda: os.mkdir(root / "none" / "x"), errno.ENOENT),
        (lambda: os.mkdir(root / ("n" * 256)), errno.ENAMETOOLONG),
        (lambda: os.rmdir(root / "directory"), errno.ENOTEMPTY),
        (lambda: os.rmdir(root / "file"), errno.ENOTDIR),
        (lambda: os.unlink(root / "directory"), errno.EISDIR),
        (lambda: os.rename(root / "file", root / "directory"), errno.EISDIR),
        (lambda: os.rename(root / "directory", root / "file"), errno.ENOTDIR),
        (lambda: os.rename(root / "directory", root / "directory" / "below" / "x"), errno.EINVAL),
        (lambda: os.link(root / "directory", root / "x"), errno.EPERM),
        (lambda: os.link(root / "file", root / "directory"), errno.EEXIST),
        (lambda: os.symlink("x", root / "file"), errno.EEXIST),
        (lambda: os.readlink(root / "file"), errno.EINVAL),
        (lambda: os.truncate(root / "directory", 0), errno.EISDIR),
        (lambda: os.truncate(root / "file", 1 << 62), errno.EFBIG),
        (lambda: os.getxattr(root / "file", "user.none"), errno.ENODATA),
        (lambda: os.setxattr(root / "file", "user.x", bytes(70_000)), errno.E2BIG),
        (lambda: os.setxattr(root / "file", "user.x", b"", os.XATTR_REPLACE), errno.ENODATA),
    ):
        assert errno_of(call) == expected
    descriptor = os.open(root / "file", os.O_RDONLY)
    assert errno_of(lambda: os.write(descriptor, b"x")) == errno.EBADF
    assert errno_of(lambda: os.lseek(descriptor, 100, os.SEEK_DATA)) == errno.ENXIO
    os.close(descriptor)
    assert (root / "file").read_bytes() == b"x"
