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
from tests.support.mounted import REPOSITORY
from tests.support.tools import USER, needs_root

# What the mount gives instead of what a plain directory gives: a pattern for "case: call", the mount's result (None
# where it varies), and why.
KNOWN_DIFFERENCES: list[tuple[str, object, str]] = []


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
@pytest.mark.parametrize("user", [0, USER], ids=["root", "user"])
def test_every_call_gives_what_it_gives_below(mounts: Mounts, user: int) -> None:
    mounted = mounts.new().start()
    plain = mounts.directory("plain")
    sides = (mounted.path("calls"), plain / "calls")
    for top in sides:
        top.mkdir()
        for name in calls.CASES:
            calls.populate(top / name, user)
        calls.prepare_acls(top / calls.access_control_lists_decide.__name__)
    mounted.settle()
    mount, expected = (_make_calls(top, user) for top in sides)
    differences = []
    for name, case in expected.items():
        for call in dict.fromkeys([*case, *mount[name]]):
            found, wanted = mount[name].get(call, "not called"), case.get(call, "not called")
            if found != wanted and not _is_known(f"{name}: {call}", found):
                differences.append(f"{name}: {call}\n  mount: {found}\n  plain: {wanted}")
    assert not differences, f"{len(differences)} differences\n" + "\n".join(differences)
