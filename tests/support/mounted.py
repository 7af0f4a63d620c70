"""A store mounted by the real command line, and the checks that every test owes it at the end.

Whatever a test did, `finish` unmounts and then demands a clean fsck, a log without complaints, no descriptor left
open, no mount and no process left behind.
"""

import contextlib
import errno
import json
import os
import re
import select
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dedupfs.backing import Backing

from . import users
from .filesystems import is_mountpoint, remove_tree, unmount

REPOSITORY = Path(__file__).resolve().parents[2]

# What a healthy daemon has no reason to write, Python's own complaints included.
_COMPLAINT = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b|Traceback|Warning:|Fatal Python error|Exception ignored")

# What a daemon may say after it was killed: that it found this out.
AFTER_A_KILL = (r"WARNING.*(unclean|not .*stopped)",)

_PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What one run of the command line said."""

    command: tuple[str, ...]
    exit_code: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        return json.loads(self.stdout)

    def __str__(self) -> str:
        return f"{' '.join(self.command)}\nexit code {self.exit_code}\n{self.stdout}{self.stderr}".rstrip()


def dedupfs(
    *arguments: str | bytes | Path,
    exit_code: int | None = 0,
    timeout_s: float = 120,
    environment: Mapping[str, str] | None = None,
    user: int | None = None,
) -> Answer:
    """Run `dedupfs` with these arguments, as `user` if given.

    Fails the test when it exits with anything but `exit_code`; with None every exit code is taken.
    """
    command = [os.fsdecode(argument) for argument in arguments]
    python, where = sys.executable, {"PYTHONPATH": str(REPOSITORY)}
    if user is not None:
        python, where = str(users.interpreter()), users.environment(REPOSITORY)
    full = {**os.environ, **where, "PYTHONFAULTHANDLER": "1", **(environment or {})}
    # Files, not pipes: a daemon that keeps a pipe open would keep us waiting for its end.
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        done = subprocess.run(
            [python, "-m", "dedupfs", *command],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            timeout=timeout_s,
            env=full,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )
        stdout.seek(0)
        stderr.seek(0)
        answer = Answer(
            ("dedupfs", *command),
            done.returncode,
            stdout.read().decode(errors="surrogateescape"),
            stderr.read().decode(errors="surrogateescape"),
        )
    assert exit_code is None or answer.exit_code == exit_code, f"expected exit code {exit_code} of {answer}"
    return answer


def _has_ended(process: int, *, patience_s: float) -> bool:
    """Wait until a process that need not be our child is gone (or a zombie)."""
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(patience_s * 1000))


class Mounted:
    """One store and its mount. Also a context manager: entering mounts, leaving is `finish`.

    `source` equal to `mountpoint` mounts the archive over itself. A mount that has not finished `watchdog_s` after it
    started is taken for hung: its daemon is told to write down what its threads do and is killed, so that the test
    fails with an error instead of hanging in the kernel where no signal reaches it.
    """

    def __init__(
        self,
        source: Path,
        mountpoint: Path,
        *,
        options: Sequence[str] = (),
        expected_log: Iterable[str] = (),
        environment: Mapping[str, str] | None = None,
        watchdog_s: float = 270,
        user: int | None = None,
    ) -> None:
        """With `user`, everything is done by that user, who owns both directories."""
        self.source = source
        self.mountpoint = mountpoint
        self.options = tuple(options)
        self.pid = 0
        self._expected_log = list(expected_log)
        self._environment = dict(environment or {})
        self._user = user
        if user is not None:
            self._environment.setdefault("XDG_RUNTIME_DIR", str(users.runtime_directory()))
        self._watchdog_s = watchdog_s
        self._watchdog: threading.Timer | None = None
        self._hung = False
        self._process = -1  # pidfd of the daemon
        self._needs_reconcile = False
        self._check_store = True
        self._check_descriptors = True
        for directory in (source, mountpoint):
            directory.mkdir(exist_ok=True)
            if user is not None:
                os.chown(directory, user, user)
        # Opened before anything is mounted over it, this is the backing directory for good.
        self._source_fd = os.open(source, os.O_PATH | os.O_DIRECTORY)

    # --- where things are

    @property
    def backing(self) -> Path:
        """The backing directory as the filesystem below has it, also where the mount lies over it."""
        return Path(f"/proc/{os.getpid()}/fd/{self._source_fd}")

    @property
    def store(self) -> Path:
        return self.backing / ".dedupfs"

    @property
    def is_alive(self) -> bool:
        return self._process >= 0 and not _has_ended(self._process, patience_s=0)

    def path(self, *parts: str | bytes) -> Path:
        """A path in the mount."""
        return self.mountpoint.joinpath(*map(os.fsdecode, parts))

    def below(self, *parts: str | bytes) -> Path:
        """The same path in the backing directory: a plain file, or a reference."""
        return self.backing.joinpath(*map(os.fsdecode, parts))

    def run(self, command: str, *arguments: str | bytes | Path, exit_code: int | None = 0) -> Answer:
        """Run a command of dedupfs as whoever this mount belongs to."""
        return dedupfs(command, *arguments, exit_code=exit_code, environment=self._environment, user=self._user)

    # --- mounting

    def start(self, *options: str) -> Self:
        """Mount; with options, from now on with those instead."""
        self.options = options or self.options
        arguments = ["-o", ",".join(self.options)] if self.options else []
        answer = self.run("mount", self.source, self.mountpoint, *arguments, exit_code=None)
        assert answer.exit_code == 0, f"{answer}\n{self.log()}"
        self.pid = int(json.loads((self.store / "daemon.json").read_bytes())["pid"])
        self._process = os.pidfd_open(self.pid)
        self._watchdog = threading.Timer(self._watchdog_s, self._end_hung_daemon)
        self._watchdog.daemon = True
        self._watchdog.start()
        assert is_mountpoint(self.mountpoint), f"dedupfs mount returned, but {self.mountpoint} is not mounted"
        return self

    def unmount(self) -> None:
        """`dedupfs umount`, which returns when everything is down and marked clean."""
        self.run("umount", self.mountpoint)
        assert not is_mountpoint(self.mountpoint), f"dedupfs umount returned, but {self.mountpoint} is still mounted"
        assert _has_ended(self._process, patience_s=1), f"dedupfs umount returned, but process {self.pid} runs on"
        self._forget_process()
        assert (self.store / "clean").exists(), "unmounted, but the store is not marked clean"
        self._needs_reconcile = False

    def wait_until_dead(self) -> None:
        """Somebody killed the daemon."""
        assert _has_ended(self._process, patience_s=_PATIENCE_S), f"process {self.pid} runs on"

    def wait_until_ended(self) -> None:
        """Somebody else ended the mount: its daemon goes, and leaves a clean store."""
        assert _has_ended(self._process, patience_s=_PATIENCE_S), f"process {self.pid} runs on"
        self._forget_process()
        assert not is_mountpoint(self.mountpoint)

    def kill(self, *, stays: bool = False) -> None:
        """SIGKILL the daemon and take away the dead mount, as an operator would, unless that `stays`."""
        assert self._process >= 0, "nothing is mounted"
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process, signal.SIGKILL)
        assert _has_ended(self._process, patience_s=_PATIENCE_S), f"process {self.pid} survives SIGKILL"
        self._forget_process()
        while is_mountpoint(self.mountpoint) and not stays:
            unmount(self.mountpoint, patience_s=0)
        self._needs_reconcile = True
        self._expected_log += AFTER_A_KILL

    def restart(self, *options: str) -> Self:
        """Unmount, unless the daemon was killed, and mount again."""
        if self._process >= 0:
            self.unmount()
        return self.start(*options)

    def _forget_process(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None
        if self._process >= 0:
            os.close(self._process)
            self._process = -1

    def _end_hung_daemon(self) -> None:
        self._hung = True
        with contextlib.suppress(OSError):
            # faulthandler answers SIGABRT with the stacks of all threads, in the log
            signal.pidfd_send_signal(self._process, signal.SIGABRT)
            _has_ended(self._process, patience_s=2)
            signal.pidfd_send_signal(self._process, signal.SIGKILL)

    # --- asking

    def settle(self) -> None:
        self.run("settle", self.mountpoint)

    def status(self) -> dict[str, Any]:
        answer = self.run("status", self.mountpoint, "--json").json()
        assert isinstance(answer, dict)
        return answer

    def passes_blobs_through(self) -> bool:
        """Whether the kernel reads blobs without asking the daemon."""
        if not self.status()["passthrough"]:
            return False
        with contextlib.closing(Backing(os.fspath(self.backing))) as backing:
            return backing.immutable_binds_mappings

    def xattr(self, path: str | bytes | Path, name: str) -> bytes:
        """The value of `user.dedupfs.<name>` of a path in the mount; OSError as the mount raises it."""
        return os.getxattr(self.mountpoint / os.fsdecode(path), f"user.dedupfs.{name}", follow_symlinks=False)

    def state(self, path: str | bytes | Path) -> str:
        return self.xattr(path, "state").decode()

    def duplicates(self, path: str | bytes | Path) -> list[bytes]:
        return sorted(self.xattr(path, "duplicates").split(b"\0")[:-1])

    def log(self) -> str:
        try:
            return (self.store / "daemon.log").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    # --- what a test may say about its end

    def expect_log(self, *patterns: str) -> None:
        """Lines of the log that match one of these regular expressions are no complaint."""
        self._expected_log += patterns

    def expect_damage(self) -> None:
        """The test leaves the store damaged on purpose: no fsck at the end."""
        self._check_store = False

    def expect_open_files(self) -> None:
        """Somebody still has files of the mount open at the end."""
        self._check_descriptors = False

    # --- the end

    def release(self) -> None:
        """Let go of everything, without a look at what is left: the filesystem below is to go."""
        if self._process >= 0:
            self.kill()
        os.close(self._source_fd)
        self._source_fd = -1

    def finish(self) -> None:
        """Unmount, check everything, remove the store. Raises AssertionError with all that was found."""
        problems: list[str] = []

        def attempt(step: Callable[[], None]) -> None:
            try:
                step()
            except (AssertionError, OSError, ValueError, subprocess.SubprocessError) as problem:
                problems.append(f"{type(problem).__name__}: {problem}")

        try:
            if self._hung:
                problems.append(f"the mount hung for {self._watchdog_s:.0f} s and its daemon was killed")
            elif self._process >= 0 and not self.is_alive:
                problems.append(f"the daemon (process {self.pid}) has died")
            elif self._needs_reconcile and self._process < 0 and self._check_store:
                # fsck judges a store that had the chance to put itself in order
                attempt(self._reconcile)
            if self.is_alive:
                if self._check_descriptors:
                    problems += self._leaked_descriptors()
                attempt(self.unmount)
            if self._process >= 0:
                attempt(self.kill)
            elif is_mountpoint(self.mountpoint):
                problems.append(f"{self.mountpoint} is still mounted")
            while is_mountpoint(self.mountpoint):
                unmount(self.mountpoint, patience_s=1)
            # a daemon that had to be killed just now is a problem already, and what it left is no news
            if self._check_store and not self._needs_reconcile and (self.source / ".dedupfs").exists():
                attempt(self._demand_clean_fsck)
            problems += self._complaints()
            if problems:
                problems.append(f"daemon.log:\n{self.log()[-8000:]}")
        finally:
            self._forget_process()
            os.close(self._source_fd)
            self._source_fd = -1
            remove_tree(self.source)
            if self.mountpoint != self.source:
                remove_tree(self.mountpoint)
        assert not problems, "\n".join(problems)

    def _reconcile(self) -> None:
        self.start()
        self.settle()

    def _demand_clean_fsck(self) -> None:
        answer = self.run("fsck", self.source, "--json", exit_code=None)
        assert answer.exit_code == 0, f"the store is not clean: {answer}"

    def _complaints(self) -> list[str]:
        expected = [re.compile(pattern) for pattern in self._expected_log]
        return [
            f"daemon.log: {line}"
            for line in self.log().splitlines()
            if _COMPLAINT.search(line) and not any(pattern.search(line) for pattern in expected)
        ]

    def _leaked_descriptors(self) -> list[str]:
        """Files of the archive or of the blobs that the daemon holds open though no app does.

        The kernel tells the daemon of a close after the app's close() returned, and settling opens files: wait a while.
        """
        deadline = time.monotonic() + _PATIENCE_S
        while leaked := self._open_content():
            if time.monotonic() > deadline:
                return [f"the daemon holds open: {path}" for path in leaked]
            time.sleep(0.05)
        return []

    def _open_content(self) -> list[str]:
        found = []
        source = str(self.source.resolve())
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                try:
                    target = os.readlink(entry)
                except OSError as error:
                    if error.errno != errno.ENAMETOOLONG:
                        raise
                    found.append(f"{entry}, at a path beyond PATH_MAX")
                    continue
                inside = target.removeprefix(source + "/")
                if inside == target or not stat.S_ISREG(entry.stat().st_mode):
                    continue
                # Its own furniture, in .dedupfs/ itself and in index/, is meant to stay open.
                if not re.match(r"\.dedupfs/([^/]*|index/.*)$", inside):
                    found.append(target)
        return found

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()
