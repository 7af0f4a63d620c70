"""Whoever asks for duplicates learns only of paths that they could list and read themselves."""

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dedupfs.asking import AsCaller, supplementary_groups
from dedupfs.backing import Backing
from dedupfs.model import Caller
from tests.support.acting import as_user
from tests.support.filesystems import FilesystemPool, Unsupported, remove_tree

ALICE, BOB = 20001, 20002
STAFF, GUESTS = 30001, 30002

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can ask for others")


class Process:
    """A process with these supplementary groups, that does nothing."""

    def __init__(self, uid: int, gid: int, groups: list[int]) -> None:
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", "echo; read line"],
            user=uid, group=gid, extra_groups=groups, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/",
        )  # fmt: skip
        assert self._process.stdout is not None
        self._process.stdout.readline()
        self.caller = Caller(uid, gid, self._process.pid)

    def end(self) -> None:
        self._process.communicate(b"\n")


@pytest.fixture
def tree(filesystem_pool: FilesystemPool, request: pytest.FixtureRequest) -> Iterator[Path]:
    try:
        directory = filesystem_pool.get("ext4").directory(request.node.name)
    except Unsupported as problem:
        pytest.skip(str(problem))
    directory.chmod(0o755)
    yield directory
    remove_tree(directory)


@pytest.fixture
def asking(tree: Path) -> Iterator[AsCaller]:
    backing = Backing(str(tree))
    made = AsCaller(backing)
    yield made
    made.close()
    backing.close()


def make(tree: Path, path: str, mode: int = 0o644, owner: tuple[int, int] = (0, 0)) -> bytes:
    target = tree / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(b"")
    os.chown(target, *owner)
    target.chmod(mode)
    return os.fsencode(path)


def caller(uid: int, gid: int = GUESTS) -> Caller:
    """Somebody without supplementary groups beyond those of this test: with the pid of a process that has ended, none
    would be known, and nothing answered."""
    return Caller(uid, gid, os.getpid())


def acl(path: Path, *entries: str, default: bool = False) -> None:
    for entry in entries:
        subprocess.run(["setfacl", *(["-d"] if default else []), "-m", entry, str(path)], check=True)


@needs_root
def test_modes_of_files(tree: Path, asking: AsCaller) -> None:
    everybody = make(tree, "everybody", 0o644)
    owner = make(tree, "owner", 0o600, (ALICE, GUESTS))
    group = make(tree, "group", 0o640, (0, STAFF))
    nobody = make(tree, "nobody", 0o000)
    only_writable = make(tree, "write only", 0o622)
    all_paths = [everybody, owner, group, nobody, only_writable]
    assert asking.readable(all_paths, caller(0)) == all_paths
    assert asking.readable(all_paths, caller(ALICE)) == [everybody, owner]
    assert asking.readable(all_paths, caller(BOB)) == [everybody]
    assert asking.readable(all_paths, caller(BOB, STAFF)) == [everybody, group]


@needs_root
def test_an_owner_who_denied_himself(tree: Path, asking: AsCaller) -> None:
    """The mode's first class that fits decides, also against its owner and its group."""
    mine = make(tree, "mine", 0o044, (ALICE, STAFF))
    groups = make(tree, "groups", 0o604, (0, STAFF))
    assert asking.readable([mine, groups], caller(ALICE)) == [groups]
    assert asking.readable([mine, groups], caller(BOB, STAFF)) == [mine]


@needs_root
@pytest.mark.parametrize(
    ("mode", "expected"), [(0o755, True), (0o711, False), (0o744, False), (0o700, False), (0o750, False)], ids=oct
)
def test_modes_of_directories(tree: Path, asking: AsCaller, mode: int, expected: bool) -> None:
    """A file is found by listing: its directory has to be readable and passable, and all above it."""
    below = make(tree, "a/b/file")
    beside = make(tree, "a/beside")
    (tree / "a").chmod(mode)
    assert asking.readable([below, beside], caller(ALICE)) == ([below, beside] if expected else [])
    (tree / "a").chmod(0o755)
    (tree / "a/b").chmod(mode)
    assert asking.readable([below, beside], caller(ALICE)) == ([below, beside] if expected else [beside])


@needs_root
def test_the_sources_own_directory_counts(tree: Path, asking: AsCaller) -> None:
    path = make(tree, "file")
    tree.chmod(0o711)
    assert asking.readable([path], caller(ALICE)) == []
    assert asking.readable([path], caller(0)) == [path]


@needs_root
def test_supplementary_groups(tree: Path, asking: AsCaller) -> None:
    path = make(tree, "d/file", 0o640, (0, STAFF))
    with_group, without = Process(ALICE, GUESTS, [STAFF]), Process(ALICE, GUESTS, [])
    try:
        assert supplementary_groups(with_group.caller.pid) == [STAFF]
        assert supplementary_groups(without.caller.pid) == []
        assert asking.readable([path], with_group.caller) == [path]
        assert asking.readable([path], without.caller) == []
        os.chown(tree / "d", 0, STAFF)
        (tree / "d").chmod(0o750)
        assert asking.readable([path], with_group.caller) == [path]
        assert asking.readable([path], without.caller) == []
    finally:
        with_group.end()
        without.end()


@needs_root
def test_roots_groups_are_not_the_callers(tree: Path, asking: AsCaller) -> None:
    """What our own process may do is nobody's gain, before and after."""
    path = make(tree, "file", 0o640, (0, 0))
    process = Process(ALICE, GUESTS, [])
    try:
        for _ in range(3):
            assert asking.readable([path], process.caller) == []
            assert asking.readable([path], caller(0)) == [path]
    finally:
        process.end()
    assert os.geteuid() == 0
    make(tree, "still root", 0o600)


@needs_root
def test_acls(tree: Path, asking: AsCaller) -> None:
    path = make(tree, "d/file", 0o600)
    other = make(tree, "d/other", 0o644)
    acl(tree / "d/file", f"u:{ALICE}:r", f"g:{STAFF}:r")
    acl(tree / "d/other", f"u:{BOB}:-")
    assert asking.readable([path, other], caller(ALICE)) == [path, other]
    assert asking.readable([path, other], caller(BOB)) == []
    assert asking.readable([path, other], caller(BOB, STAFF)) == [path]
    acl(tree / "d", f"u:{ALICE}:x")
    assert asking.readable([path, other], caller(ALICE)) == []
    acl(tree / "d", f"u:{ALICE}:rx")
    assert asking.readable([path, other], caller(ALICE)) == [path, other]


@needs_root
def test_a_caller_who_is_gone_learns_nothing(tree: Path, asking: AsCaller) -> None:
    """Whose groups cannot be known may be denied by one of them."""
    path = make(tree, "file")
    process = Process(ALICE, GUESTS, [])
    process.end()
    assert supplementary_groups(process.caller.pid) is None
    assert asking.readable([path], process.caller) == []


@needs_root
def test_what_is_not_there(tree: Path, asking: AsCaller) -> None:
    path = make(tree, "file")
    assert asking.readable([b"gone", path, b"gone/too", b"file/below"], caller(ALICE)) == [path]


@needs_root
def test_a_symbolic_link_is_not_followed(tree: Path, asking: AsCaller) -> None:
    make(tree, "secret", 0o600)
    (tree / "link").symlink_to("secret")
    assert asking.readable([b"link"], caller(ALICE)) in ([], [b"link"])  # its own mode is everybody's
    assert asking.readable([b"secret"], caller(ALICE)) == []


@needs_root
def test_many_paths_and_callers_at_once(tree: Path, asking: AsCaller) -> None:
    paths = [make(tree, f"{number % 5}/{number}", 0o600, (ALICE if number % 2 else BOB, 0)) for number in range(60)]
    wrong: list[object] = []

    def ask(uid: int) -> None:
        expected = [path for number, path in enumerate(paths) if (number % 2 == 1) == (uid == ALICE)]
        for _ in range(20):
            found = asking.readable(paths, caller(uid))
            if found != expected:
                wrong.append((uid, found))

    threads = [threading.Thread(target=ask, args=(uid,)) for uid in (ALICE, BOB, ALICE, BOB)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_we_ask_for_ourselves(tree: Path, asking: AsCaller) -> None:
    path = os.fsencode("file")
    (tree / "file").write_bytes(b"")
    assert asking.readable([path], Caller(os.geteuid(), os.getegid(), os.getpid())) == [path]


@needs_root
def test_a_user_cannot_ask_for_others(tree: Path) -> None:
    """Who mounts without being root can take on nobody: others are told nothing."""
    path = make(tree, "file")

    def ask() -> None:
        backing = Backing(str(tree))
        asking = AsCaller(backing)
        assert asking.readable([path], Caller(ALICE, GUESTS, os.getpid())) == [path]
        assert asking.readable([path], Caller(BOB, GUESTS, os.getpid())) == []
        assert asking.readable([path], Caller(0, 0, os.getpid())) == []
        asking.close()

    as_user(ALICE, ask)
