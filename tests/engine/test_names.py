"""Names change at any time: while a file is pending, while it is looked at, while its inode number is used again."""

import errno
import os
import stat
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dedupfs.backing import RENAME_EXCHANGE, RENAME_NOREPLACE, Backing
from dedupfs.digest import Checkpoint
from dedupfs.model import Caller, ContentKey, Ino
from dedupfs.openfiles import Key
from dedupfs.sharing import ReflinkSharing, Settled
from dedupfs.vfs import Directory
from tests.support.filesystems import tmpfs
from tests.support.tools import USER, needs_root

from .bench import BLOCK, ME, Bench, Meeting, Running, Tampered, content, in_thread
from .test_sharing import every_strategy

DATA = content("same", 3 * BLOCK + 3)
on_ext4 = pytest.mark.parametrize("bench", [("reference", "ext4")], indirect=True, ids="-".join)
REFERENCES_ANYWHERE = [("reference", "ext4"), ("reference", "xfs"), ("reference", "btrfs")]


@pytest.fixture
def known(bench: Bench) -> Bench:
    """A store that knows one file; a pending one of the same content is to find it, wherever it is by then."""
    bench.write("known", DATA)
    bench.mkdir("d")
    bench.mkdir("d/e")
    bench.settle()
    return bench


def test_renamed_while_pending(known: Bench) -> None:
    known.write("new", DATA)
    known.rename("new", "d/e/new")
    known.settle()
    assert known.duplicates("known") == ["d/e/new"]
    assert known.state("d/e/new") == "reference"


def test_its_directory_renamed_while_pending(known: Bench) -> None:
    known.write("d/e/new", DATA)
    known.rename("d", "dir")
    known.rename("dir/e", "else")
    known.settle()
    assert known.duplicates("known") == ["else/new"]


def test_renamed_over_a_pending_one(known: Bench) -> None:
    other = content("other")
    known.write("new", DATA)
    known.write("tmp", other)
    known.rename("tmp", "new")
    known.settle()
    assert known.names() == ["d", "known", "new"]
    assert known.duplicates("known") == []
    assert known.read("new") == other
    assert known.status()["files"] == 2


def test_renamed_over_a_shared_one(known: Bench) -> None:
    known.write("new", DATA)
    known.settle()
    known.write("tmp", content("other"))
    known.rename("tmp", "new")
    known.unlink("known")
    known.settle()
    assert known.blobs() == []
    assert known.read("new") == content("other")


def test_exchanged_while_pending(known: Bench) -> None:
    other = content("other")
    known.write("d/new", DATA)
    known.write("other", other)
    known.rename("d", "other", RENAME_EXCHANGE)
    assert known.read("other/new") == DATA
    known.settle()
    assert known.duplicates("known") == ["other/new"]
    assert known.read("d") == other
    assert known.digest("d")


def test_noreplace(known: Bench) -> None:
    known.write("new", DATA)
    with pytest.raises(FileExistsError):
        known.rename("new", "known", RENAME_NOREPLACE)
    known.settle()
    assert known.duplicates("known") == ["new"]


def test_unlinked_while_pending(known: Bench) -> None:
    known.write("new", DATA)
    known.unlink("new")
    known.settle()
    assert known.duplicates("known") == []
    assert known.status()["files"] == 1


def test_unlinked_while_open_and_closed(known: Bench) -> None:
    """Unlinked while it is written: nothing of it is left, and nothing of it is reported."""
    with known.opened_new("new") as handle:
        known.write_to(handle, DATA)
        known.unlink("new")
        assert known.read_from(handle) == DATA
    known.settle()
    assert known.duplicates("known") == []
    assert known.status()["files"] == 1


HIDDEN = ".fuse_hidden0000000100000001"


def test_unlinked_while_open_as_libfuse_does_it(known: Bench) -> None:
    """It renames to a hidden name, releases, and would unlink that; in between the settler may come by."""
    with known.opened_new("new") as handle:
        known.write_to(handle, DATA)
        known.hide("new", HIDDEN)
        assert known.names() == ["d", "known"]
        assert known.engine.vfs.getattr_open(handle).nlink == 1  # libfuse itself takes one off
        known.settle()
        assert known.read_from(handle) == DATA
        with known.opened(HIDDEN) as again:
            assert known.read_from(again) == DATA
        assert len(known.inside("orphans")) == 1
    assert known.inside("orphans") == []
    known.settle()
    assert known.duplicates("known") == []
    assert known.state("known") == "plain"
    assert known.status()["files"] == 1


def test_a_shared_file_unlinked_while_open_as_libfuse_does_it(known: Bench) -> None:
    known.write("new", DATA)
    known.settle()
    known.unlink("known")
    with known.opened("new") as handle:
        known.hide("new", HIDDEN)
        known.settle()
        assert known.read_from(handle) == DATA
    known.settle()
    assert known.blobs() == []
    assert known.status()["files"] == 0


def test_hidden_while_it_is_released(known: Bench) -> None:
    """The last handle goes just when libfuse hides the name: whichever is second removes it."""
    for _ in range(50):
        handle = known.create_file("new")
        known.write_to(handle, DATA)
        with in_thread(partial(known.close_file, handle)), in_thread(lambda: known.hide("new", HIDDEN)):
            pass
        assert known.inside("orphans") == []
        assert "new" not in known.names()
    known.settle()
    assert known.status()["files"] == 1


def test_many_hidden_at_once(known: Bench) -> None:
    def work(label: str) -> None:
        for number in range(40):
            name = f"{label} {number}"
            with known.opened_new(name) as handle:
                known.write_to(handle, DATA)
                known.hide(name, f".fuse_hidden{label}{number}")

    with in_thread(lambda: work("a")), in_thread(lambda: work("b")), in_thread(lambda: work("c")):
        pass
    assert known.inside("orphans") == []
    known.settle()
    assert known.status()["files"] == 1


def test_hidden_files_are_gone_after_a_crash(known: Bench) -> None:
    known.write("new", DATA)
    known.settle()
    known.open_file("new")
    known.hide("new", HIDDEN)
    known.unlink("known")
    known.crash()
    known.recover()
    assert known.inside("orphans") == []
    assert known.names() == ["d"]
    assert known.blobs() == []


@every_strategy
@pytest.mark.parametrize("what", ["unlink", "rename", "replace"])
def test_while_it_is_shared(bench: Bench, what: str) -> None:
    """The name goes just when the file has come to share its bytes, before anybody has heard of that."""
    bench.write("known", DATA)
    bench.settle()
    bench.write("new", DATA)
    strategy = bench.engine.sharing
    share = strategy.share
    happened: list[bool] = []

    def sharing(known: Settled, new: Settled, content: ContentKey) -> bool:
        if isinstance(strategy, ReflinkSharing):
            dedupe = bench.engine.backing.dedupe

            def deduping(source: int, target: int, size_bytes: int, checkpoint: Checkpoint) -> bool:
                done = dedupe(source, target, size_bytes, checkpoint)
                change()
                return done

            bench.engine.backing.dedupe = deduping  # type: ignore[method-assign]
            try:
                return share(known, new, content)
            finally:
                bench.engine.backing.dedupe = dedupe  # type: ignore[method-assign]
        answer = share(known, new, content)
        change()
        return answer

    def change() -> None:
        if not happened:
            happened.append(True)
            match what:
                case "unlink":
                    bench.unlink("new")
                case "rename":
                    bench.rename("new", "moved")
                case "replace":
                    bench.write("other", content("other"))
                    bench.rename("other", "new")

    strategy.share = sharing  # type: ignore[method-assign]
    bench.settle()
    assert happened
    strategy.share = share  # type: ignore[method-assign]
    bench.settle()
    assert bench.refs("known") == (2 if what == "rename" else 1)
    assert bench.duplicates("known") == (["moved"] if what == "rename" else [])
    assert bench.status()["files"] == (1 if what == "unlink" else 2)
    assert bench.read("known") == DATA


class RenamesSlowly(Tampered):
    """Stops after a rename has happened, before anybody was told."""

    def __init__(self, source: object, name: bytes) -> None:
        self.meeting = Meeting()
        super().__init__(str(source))

        def after(call: str, arguments: tuple[object, ...]) -> None:
            if call == "rename" and arguments[0] == name:
                self.meeting.wait()

        self.after = after


def test_settled_in_the_middle_of_a_rename(known: Bench) -> None:
    """The file is not where it was, and nobody has said yet where it is."""
    backing = RenamesSlowly(known.source, b"new")
    known.reopen(backing=backing)
    known.write("new", DATA)
    with in_thread(lambda: known.rename("new", "d/new")):
        backing.meeting.reached()
        with in_thread(known.settle) as settling:
            settling.ended(0.2)
            backing.meeting.release()
    known.settle()
    assert known.duplicates("known") == ["d/new"]


def test_settled_in_the_middle_of_a_rename_of_its_directory(known: Bench) -> None:
    backing = RenamesSlowly(known.source, b"d/e")
    known.reopen(backing=backing)
    known.write("d/e/new", DATA)
    with in_thread(lambda: known.rename("d/e", "f")):
        backing.meeting.reached()
        with in_thread(known.settle) as settling:
            settling.ended(0.2)
            backing.meeting.release()
    known.settle()
    assert known.duplicates("known") == ["f/new"]


def test_a_changed_mode_is_noted_in_the_middle_of_a_rename_above(known: Bench) -> None:
    """A settled file's attributes changed, which the index follows; and the directory above it is not where it was."""
    backing = RenamesSlowly(known.source, b"d/e")
    known.reopen(backing=backing)
    known.write("d/e/new", content("unique"))
    known.settle()
    known.engine.vfs.chmod(b"d/e/new", None, 0o600)
    with in_thread(lambda: known.rename("d/e", "f")):
        backing.meeting.reached()
        with in_thread(known.settle) as settling:
            settling.ended(0.2)
            backing.meeting.release()
    known.settle()  # whose fsck at the end finds no record that is behind


def test_a_release_between_two_looks_is_not_missed(known: Bench) -> None:
    """From the open files into the queue: whoever looks at both finds it in one of them."""
    handle = known.create_file("new")
    known.write_to(handle, DATA)
    ino, files = handle.inode.key.ino, known.engine.openfiles
    look = files.is_written

    def released_meanwhile(key: Key) -> bool:
        known.close_file(handle)
        return look(key)

    files.is_written = released_meanwhile  # type: ignore[method-assign]
    assert known.engine.settler.is_pending(ino)
    del files.is_written


def test_renamed_between_release_and_queue(known: Bench) -> None:
    """rsync writes, closes and renames; the release comes when it likes."""
    meeting = Meeting()

    class Slow(Backing):
        def path_of(self, fd: int) -> bytes | None:
            path = super().path_of(fd)
            if path == b"tmp":
                meeting.wait()
            return path

    known.reopen(backing=Slow(str(known.source)))
    handle = known.create_file("tmp")
    known.write_to(handle, DATA)
    with in_thread(lambda: known.close_file(handle)):
        meeting.reached()
        with in_thread(lambda: known.rename("tmp", "d/final")) as renaming:
            renaming.ended(0.2)
            meeting.release()
    known.settle()
    assert known.duplicates("known") == ["d/final"]
    assert known.state("d/final") == "reference"


@pytest.mark.parametrize("how", ["unlinked", "hidden"])
def test_written_under_a_name_that_goes_while_another_stays(known: Bench, how: str) -> None:
    known.write("new", content("before"))
    known.link("new", "d/other name")
    known.settle()
    with known.opened("new", os.O_RDWR | os.O_TRUNC) as handle:
        known.write_to(handle, DATA)
        if how == "unlinked":
            known.unlink("new")
        else:
            known.hide("new", HIDDEN)
    known.settle()
    assert known.read("d/other name") == DATA
    assert known.duplicates("known") == ["d/other name"]


def test_both_names_unlinked_at_once(known: Bench) -> None:
    """Each of two threads removes one name of an inode, and the last one knows that it was the last."""
    both = threading.Barrier(2)

    def before(call: str, arguments: tuple[object, ...]) -> None:
        if call == "unlink" and arguments[0] in (b"new", b"also new"):
            both.wait(10)

    backing = Tampered(known.source)
    known.reopen(backing=backing)
    known.write("new", DATA)
    known.settle()
    known.link("new", "also new")
    known.settle()
    assert known.state("known") == "reference"
    backing.before = before
    with in_thread(lambda: known.unlink("new")), in_thread(lambda: known.unlink("also new")):
        pass
    backing.before = lambda call, arguments: None
    known.unlink("known")
    known.settle()
    assert known.blobs() == []
    assert known.status()["files"] == 0


def _reuse(bench: Bench, ino: int, wanted: str, data: bytes) -> None:
    """Make files until one gets the inode number; the others go again."""
    made = []
    for number in range(500):
        name = f"try {number}"
        bench.write(name, data)
        if bench.below(name).stat().st_ino == ino:
            bench.rename(name, wanted)
            break
        made.append(name)
    else:
        pytest.skip("the filesystem does not use the number again")
    for name in made:
        bench.unlink(name)


@on_ext4
@pytest.mark.parametrize("settled", [True, False])
def test_an_inode_number_that_is_used_again(known: Bench, settled: bool) -> None:
    """ext4 gives the number of a file just removed to the next one: never its digest, its names, or its place."""
    other = content("other", len(DATA))
    known.write("old", DATA)
    if settled:
        known.settle()
    ino = known.below("old").stat().st_ino
    known.unlink("old")
    _reuse(known, ino, "young", other)
    known.settle()
    assert known.read("young") == other
    assert known.duplicates("young") == []
    assert known.duplicates("known") == []
    assert known.digest("young") != known.digest("known")
    assert [link.name for link in known.engine.index.links(Ino(ino))] == [b"young"]


@on_ext4
@pytest.mark.parametrize("then", ["nothing", "directory renamed", "file renamed"])
def test_a_reference_that_uses_a_number_again(known: Bench, then: str) -> None:
    """Sharing makes an inode whose number was another file's a moment ago: what is still to be told of that one, and
    renames that come at the same time, must not make it unknown."""
    known.reopen(backing=Tampered(known.source))
    known.write("victim", DATA)
    known.write("third", DATA)
    known.settle()
    number = known.below("victim").stat().st_ino
    known.write("d/new", DATA)
    backing = known.engine.backing
    assert isinstance(backing, Tampered)
    happened: list[str] = []

    def before(call: str, arguments: tuple[object, ...]) -> None:
        if call == "open_quietly" and str(arguments[0]).startswith("b'.dedupfs/blobs/") and not happened:
            happened.append("unlinked")
            known.unlink("victim")

    def on_replaced(path: bytes) -> None:
        if path == b"d/new" and len(happened) == 1:
            happened.append("moved")
            if then == "directory renamed":
                known.rename("d", "else")
            elif then == "file renamed":
                known.rename("d/new", "moved")

    backing.before = before
    known.engine.on_replaced = on_replaced
    known.settle()
    assert happened == ["unlinked", "moved"]
    path = {"nothing": "d/new", "directory renamed": "else/new", "file renamed": "moved"}[then]
    if known.below(path).stat().st_ino != number:
        pytest.skip("the filesystem did not use the number again")
    for name in ("known", "third"):
        known.unlink(name)
    known.settle()
    assert known.read(path) == DATA
    assert known.state(path) == "reference"
    assert known.status()["files"] == 1


def test_a_directory_removed_while_another_gets_its_number(known: Bench) -> None:
    """Removed, and before that is told, its number belongs to a new one."""
    known.mkdir("old")
    known.settle()
    ino = known.below("old").stat().st_ino
    backing = Tampered(known.source)
    known.reopen(backing=backing)
    meeting = Meeting()

    def after(call: str, arguments: tuple[object, ...]) -> None:
        if call == "rmdir":
            meeting.wait()

    backing.after = after
    with in_thread(lambda: known.rmdir("old")):
        meeting.reached()
        for number in range(100):
            known.mkdir(f"d{number}")
            if known.below(f"d{number}").stat().st_ino == ino:
                break
        known.write(f"d{number}/new", DATA)
        meeting.release()
    known.settle()
    assert known.duplicates("known") == [f"d{number}/new"]


@on_ext4
def test_a_directorys_inode_number_that_is_used_again(known: Bench) -> None:
    known.mkdir("old")
    known.write("old/file", DATA)
    known.settle()
    ino = known.below("old").stat().st_ino
    known.unlink("old/file")
    known.rmdir("old")
    for number in range(500):
        known.mkdir(f"d{number}")
        if known.below(f"d{number}").stat().st_ino == ino:
            break
    else:
        pytest.skip("the filesystem does not use the number again")
    known.write(f"d{number}/file", DATA)
    known.settle()
    assert known.duplicates("known") == [f"d{number}/file"]


def test_renaming_a_directory_touches_no_file(known: Bench) -> None:
    for number in range(20):
        known.write(f"d/e/{number:02d}", DATA)
    known.settle()
    known.rename("d", "archive")
    known.settle()
    assert known.engine.settler.pending() == 0
    assert known.duplicates("known") == [f"archive/e/{number:02d}" for number in range(20)]
    known.rename("archive/e", "archive/f")
    known.mkdir("x")
    known.rename("archive", "x/archive")
    known.settle()
    assert known.duplicates("known") == [f"x/archive/f/{number:02d}" for number in range(20)]


def test_names_that_come_before_their_directory_is_known(known: Bench) -> None:
    known.mkdir("fresh")
    known.mkdir("fresh/below")
    known.link("known", "fresh/below/link")
    known.rename("known", "fresh/moved")
    known.settle()
    known.write("new", DATA)
    known.settle()
    assert known.duplicates("new") == ["fresh/below/link", "fresh/moved"]


def test_attributes_do_not_make_a_file_unknown(known: Bench) -> None:
    """chmod, chown, times, xattrs, links and renames change the ctime, not what is known."""
    settled = known.engine.settler.settled
    vfs = known.engine.vfs
    vfs.chmod(b"known", None, 0o600)
    vfs.chown(b"known", None, os.geteuid(), os.getegid())
    vfs.utimens(b"known", None, None)
    vfs.setxattr(b"known", b"user.comment", b"x", 0, ME)
    vfs.removexattr(b"known", b"user.comment")
    known.link("known", "d/link")
    known.rename("known", "d/known")
    known.unlink("d/link")
    with known.opened("d/known") as handle:
        vfs.chmod(None, handle, 0o640)
        vfs.utimens(None, handle, None)
    known.settle()
    assert known.engine.settler.settled == settled
    assert known.digest("d/known")
    assert known.engine.settler.settled == settled


def test_a_write_between_two_looks_is_not_hidden_by_a_chmod(known: Bench) -> None:
    """The record follows a chmod, but never over a change of the content; however the two fall together."""
    meeting = Meeting()
    known.close()

    class Slow(Tampered):
        pass

    backing = Slow(known.source)
    known.open(backing=backing)
    known.engine.vfs.chmod(b"known", None, 0o600)

    # The settler's thread is about to look at the file for the chmod's sake.
    def before(call: str, arguments: tuple[object, ...]) -> None:
        if call == "lstat" and arguments[0] == b"known" and threading.current_thread() is settler:
            meeting.wait()

    changed = b"!" + DATA[1:]
    errors: list[BaseException] = []

    def settle() -> None:
        try:
            known.settle()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    settler = threading.Thread(target=settle)
    backing.before = before
    settler.start()
    meeting.reached()
    known.write_at("known", changed, 0)
    meeting.release()
    settler.join()
    assert not errors
    backing.before = lambda call, arguments: None
    known.settle()
    known.write("new", changed)
    known.settle()
    assert known.duplicates("new") == ["known"]
    assert Key.of(known.below("known").stat()) != Key.of(known.below("new").stat())


def test_linked_while_pending_and_written_through_the_other_name(known: Bench) -> None:
    known.write("new", content("before"))
    known.link("new", "d/other name")
    known.write("d/other name", DATA)
    known.settle()
    assert known.duplicates("known") == ["d/other name", "new"]


def test_renamed_while_open_for_writing_and_not_written(known: Bench) -> None:
    """Its ctime changes, its content does not."""
    with known.opened("known", os.O_RDWR):
        known.rename("known", "d/moved")
        known.settle()
    known.settle()
    assert known.digest("d/moved")


@pytest.mark.parametrize("touch", ["unlink", "chmod", "xattr", "link"])
def test_a_link_goes_and_then_its_directory_moves(known: Bench, touch: str) -> None:
    """What changes the ctime is told before the path is another one, and looked at after."""
    known.write("d/file", content("lonely"))
    known.link("d/file", "link")
    known.settle()
    settled = known.engine.settler.settled
    match touch:
        case "unlink":
            known.unlink("link")
        case "chmod":
            known.unlink("link")
            known.settle()
            known.engine.vfs.chmod(b"d/file", None, 0o600)
        case "xattr":
            known.engine.vfs.setxattr(b"d/file", b"user.comment", b"x", 0, ME)
        case "link":
            known.link("d/file", "d/e/third")
    known.rename("d", "moved")
    known.settle()
    assert known.digest("moved/file")
    assert known.engine.settler.settled == settled


@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory"])
def test_something_else_takes_its_place_and_its_number(known: Bench, kind: str) -> None:
    """rm file; ln -s x file: the same path, and on ext4 the same inode number, but no file any more."""
    known.write("file", content("something"))
    known.settle()
    known.unlink("file")
    match kind:
        case "symlink":
            known.engine.vfs.symlink(b"known", b"file", ME)
        case "fifo":
            known.engine.vfs.mknod(b"file", stat.S_IFIFO | 0o600, 0, ME)
        case "directory":
            known.mkdir("file")
    known.settle()
    assert known.status()["files"] == 1
    assert known.refs("known") == 1


def test_both_names_stay_when_it_has_to_be_looked_at_again(known: Bench) -> None:
    """Nobody can be compared with: what is known of it is dropped, its names are not."""
    known.link("known", "d/other name")
    known.settle()
    with known.opened("known", os.O_RDWR):
        known.write("new", DATA)
        known.settle()
    known.settle()
    assert known.duplicates("new") == ["d/other name", "known"]


def test_many_changes_in_one_batch_take_linear_time(bench: Bench) -> None:
    """rm -rf of a large directory reaches the index in one piece."""
    bench.mkdir("d")
    count = 3000
    for number in range(count):
        bench.put(f"d/{number}", b"%d" % number)
    bench.scan()
    for number in range(count):
        bench.rename(f"d/{number}", f"d/x{number}")
    for number in range(count):
        bench.unlink(f"d/x{number}")
    bench.settle()
    assert bench.status()["files"] == 0


@needs_root
@pytest.mark.parametrize("kind", ["file", "node", "directory", "symlink"])
def test_what_cannot_be_given_to_who_made_it_is_not_made(bench: Bench, kind: str) -> None:
    """His quota is used up: what answers EDQUOT is giving it to him."""
    backing = Tampered(bench.source)
    bench.reopen(backing=backing)

    def refuse(call: str, arguments: tuple[object, ...]) -> None:
        if "chown" in call:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    backing.before = refuse
    vfs = bench.engine.vfs
    somebody = Caller(uid=USER, gid=USER, pid=os.getpid(), umask=0o022)
    with pytest.raises(OSError) as raised:
        match kind:
            case "file":
                vfs.create(b"new", os.O_RDWR | os.O_CREAT, stat.S_IFREG | 0o644, somebody)
            case "node":
                vfs.mknod(b"new", stat.S_IFREG | 0o644, 0, somebody)
            case "directory":
                vfs.mkdir(b"new", 0o755, somebody)
            case "symlink":
                vfs.symlink(b"target", b"new", somebody)
    assert raised.value.errno == errno.EDQUOT
    assert bench.names() == []


# -- listing


@needs_root
def test_the_root_of_another_filesystem_is_listed_as_a_whole(tmp_path: Path) -> None:
    """It has the inode number of the source, which is the root of a filesystem as well. What is called as the store is
    there is somebody else's."""
    with tmpfs(tmp_path / "source") as source, tmpfs(source / "other") as other:
        assert other.stat().st_ino == source.stat().st_ino
        (other / ".dedupfs").mkdir()
        (other / "file").touch()
        bench = Bench(source)
        try:
            bench.open()
            assert bench.names("other") == [".dedupfs", "file"]
            assert bench.names() == ["other"]
        finally:
            bench.finish()


# -- listing a directory in which files come to share, each another inode by the same name


def listed(bench: Bench, directory: Directory) -> set[str]:
    return {os.fsdecode(entry.name) for entry in bench.engine.vfs.readdir(directory, 0)}


@pytest.mark.parametrize("bench", REFERENCES_ANYWHERE, indirect=True, ids="-".join)
def test_what_came_to_share_since_a_directory_was_opened_is_listed(bench: Bench) -> None:
    names = {f"file {number}" for number in range(20)}
    for name in names:
        bench.write(name, DATA)
    directory = bench.engine.vfs.opendir(b"")
    try:
        bench.settle()
        assert listed(bench, directory) == names
        for name in names:
            bench.rename(name, f"{name}, renamed")
        assert listed(bench, directory) == {f"{name}, renamed" for name in names}
    finally:
        os.close(directory.fd)


@pytest.mark.parametrize("bench", REFERENCES_ANYWHERE, indirect=True, ids="-".join)
def test_what_comes_to_share_while_names_are_read_is_listed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {f"file {number}" for number in range(20)}
    for name in names:
        bench.write(name, DATA)
    directory = bench.engine.vfs.opendir(b"")
    listdir, settling = os.listdir, list[Running]()

    def settle_and_list(fd: int) -> list[str]:
        settling.append(Running(bench.settle))
        settling[0].ended(0.3)  # where it may
        return listdir(fd)

    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "listdir", settle_and_list)
            assert listed(bench, directory) == names
        settling[0].join()
        assert all(map(bench.is_reference, names))
    finally:
        os.close(directory.fd)


def test_a_hidden_file_goes_while_another_takes_its_place(bench: Bench) -> None:
    """The release of a file that was just closed overtakes the rename over it, which is not to fail for that."""
    backing = Tampered(bench.source)
    bench.reopen(backing=backing)
    for name in ("file", "new"):
        bench.write(name, content(name))
    handle, vfs = bench.open_file("file"), bench.engine.vfs
    hidden = ".fuse_hidden0000000200000001"
    bench.hide("file", hidden)

    def release(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "lstat" and arguments[0].startswith(b".dedupfs/orphans/"):
            backing.before = lambda name, arguments: None
            bench.close_file(handle)

    backing.before = release
    assert not vfs.unhide(hidden.encode(), b"file", b"new")
    assert bench.inside("orphans") == []
    vfs.put_back(hidden.encode(), b"file")  # as after a rename that failed: it is not there any more
    bench.rename("new", "file")
    assert bench.read("file") == content("new")
