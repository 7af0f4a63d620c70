"""Thousands of system calls, made in the mount and in a plain directory beside it, by root and by an ordinary user:
the same results, errors, attributes and times, except for what is known and told here.

What is called is in `calls`. Its files are settled beforehand, so that where calls meet shared content they meet
references and shared extents.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Mounts
from tests.mount import calls
from tests.support.flavours import BOTH_STRATEGIES
from tests.support.mounted import REPOSITORY
from tests.support.tools import USER, needs_root
from tests.support.trees import shared_state

# What the mount gives instead of what a plain directory gives: a pattern for "case: call", the mount's result (None
# where it varies), and why.
KNOWN_DIFFERENCES: list[tuple[str, object, str]] = [
    ("opening: O_TMPFILE", "ENOTSUP", "libfuse has no tmpfile operation; apps fall back to a named file"),
    (
        "allocating: (collapse|insert) .*",
        None,
        "the kernel's FUSE passes neither on, and answers EOPNOTSUPP; the file stays as it was",
    ),
    ("offsets: SEEK_SET 9223372036854775807", (1 << 63) - 1, "FUSE does not know the largest file below"),
    ("direct: unaligned", 3, "O_DIRECT is aligned below by whoever does the I/O there, which is not the app"),
    ("renaming_special: whiteout", "EINVAL", "only overlayfs asks for it, and it cannot work on top of FUSE anyway"),
    (
        "what_changes_times: other: write mapped: times of other",
        "mtime ctime",
        "what the kernel has cached it does not ask the daemon for, who then moves no access time",
    ),
    (
        "what_changes_times: other: write nothing: times of other",
        "ctime",
        "opening a reference for writing brings its bytes back; whether it is one by then depends on settling",
    ),
    ("removing: (fstat of|list) a removed directory", "ESTALE", "libfuse forgets the path of a removed directory"),
    ("removing: fstat of a removed file by O_PATH", "ESTALE", "and of a file that nobody has open, as far as it knows"),
    (
        "chown: (chown (everybodys|suid) -1:-1|chown: lstat (file|suid|everybodys|fifo))",
        None,
        "libfuse drops the order to clear set-id bits that chown(-1, -1) is for the kernel (FUSE_HANDLE_KILLPRIV_V2)",
    ),
    ("the_filesystem: PC_LINK_MAX", 127, "the C library asks for the type of the filesystem, and guesses for FUSE"),
    ("the_filesystem: (FS_IOC_GETFLAGS|FICLONE)", None, "ioctls are not passed on; copy_file_range shares as well"),
]


def _make_calls(directory: Path, user: int) -> dict[str, dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.mount.calls", directory, str(user)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, dict[str, object]] = json.loads(done.stdout)
    return results


def _is_known(call: str, mount: object) -> bool:
    return any(
        re.fullmatch(pattern, call) and (result is None or result == mount) for pattern, result, _ in KNOWN_DIFFERENCES
    )


@needs_root
@BOTH_STRATEGIES
@pytest.mark.parametrize(
    ("owner", "user"), [(0, 0), (USER, USER), (USER, calls.ANOTHER_USER)], ids=["root", "owner", "group"]
)
def test_every_call_gives_what_it_gives_below(mounts: Mounts, owner: int, user: int) -> None:
    def populate(parent: Path) -> None:
        (parent / "calls").mkdir()
        for name in calls.CASES:
            calls.populate(parent / "calls" / name, owner, for_group=user != owner)
        calls.prepare_acls(parent / "calls" / calls.access_control_lists_decide.__name__)

    plain = mounts.directory("plain")
    populate(plain)
    mounted = mounts.new(prepare=populate).start()
    mounted.settle()
    assert mounted.state("calls/opening/file") == shared_state(mounted)

    mount, expected = (_make_calls(top / "calls", user) for top in (mounted.path(), plain))
    differences = []
    for name, case in expected.items():
        # Who is not the owner may not do all that a case begins with.
        assert "stopped" not in case or user != owner, f"{name}: {case['stopped']}"
        for call in dict.fromkeys([*case, *mount[name]]):
            found, wanted = mount[name].get(call, "not called"), case.get(call, "not called")
            if found != wanted and not _is_known(f"{name}: {call}", found):
                differences.append(f"{name}: {call}\n  mount: {found}\n  plain: {wanted}")
    assert not differences, f"{len(differences)} differences\n" + "\n".join(differences)
