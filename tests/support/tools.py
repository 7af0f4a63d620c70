"""Ordinary programs, run by ordinary users, and what they are needed for: an app is not written in our Python."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

# Debian's nobody and nogroup, and a group nobody is in unless the test says so.
USER = 65534
GROUP = 65534
OTHER_GROUP = 54321

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

_ENVIRONMENT = {
    "LC_ALL": "C",
    "TZ": "UTC",
    "HOME": "/nonexistent",
    # A user's own settings must not decide whether a test passes.
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    "GIT_AUTHOR_NAME": "A. Tester",
    "GIT_AUTHOR_EMAIL": "tester@example.org",
    "GIT_COMMITTER_NAME": "A. Tester",
    "GIT_COMMITTER_EMAIL": "tester@example.org",
}


def attempt(
    *command: str | bytes | Path,
    cwd: Path | None = None,
    user: int | None = None,
    groups: Sequence[int] = (),
    stdin: bytes = b"",
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 120,
) -> subprocess.CompletedProcess[bytes]:
    """Run a program, as `user` in the group of the same number and in `groups` if given; failing is the caller's to
    judge. Skips the test when the program is not installed."""
    try:
        return subprocess.run(
            command,
            cwd=cwd,
            input=stdin,
            capture_output=True,
            timeout=timeout_s,
            env={"PATH": os.environ["PATH"], **_ENVIRONMENT, **(environment or {})},
            user=user,
            group=user,
            extra_groups=None if user is None else list(groups),
            umask=0o022,
        )
    except FileNotFoundError as error:
        if error.filename != command[0]:
            raise
        pytest.skip(f"{os.fsdecode(command[0])} is not installed (scripts/setup --test)")


def tool(
    *command: str | bytes | Path,
    cwd: Path | None = None,
    user: int | None = None,
    groups: Sequence[int] = (),
    stdin: bytes = b"",
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 120,
) -> bytes:
    """Like `attempt`, for what must succeed. Answers standard output."""
    done = attempt(
        *command, cwd=cwd, user=user, groups=groups, stdin=stdin, environment=environment, timeout_s=timeout_s
    )
    assert done.returncode == 0, (
        f"exit code {done.returncode} of {' '.join(map(os.fsdecode, command))}\n"
        f"{(done.stdout + done.stderr).decode(errors='replace')}"
    )
    return done.stdout


def shell(script: str, cwd: Path, *arguments: str | Path, user: int | None = None, groups: Sequence[int] = ()) -> bytes:
    """Run a shell script that stops at its first error."""
    return tool("sh", "-euc", script, "sh", *arguments, cwd=cwd, user=user, groups=groups)


def differences(one: Path, other: Path) -> list[bytes]:
    """What rsync would change to make `other` the same as `one`: content, names, hard links, modes, owners, times of
    files, ACLs and xattrs. Nothing is changed."""
    answer = tool("rsync", "-naHAX", "--checksum", "--delete", "--itemize-changes", f"{one}/", f"{other}/")
    return answer.splitlines()


def read_afresh(path: Path) -> bytes:
    """The content as the filesystem has it, not as the kernel remembers it from writing."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()
