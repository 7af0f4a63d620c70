"""Break dedupfs at a named step: kill the process before or after a call that changes the disk, or fail that call.

A step is a call of one of `Backing`'s methods that change something, or of the few such functions of `os` that other
modules call themselves. It is called by its name and by how many of that name came before: `rename:2`. Calls inside a
step are part of it. Counting begins when the steps are armed.

Jobs run in processes that may die. `Crasher` keeps one server process, which has imported everything and forks for each
job, so that hundreds of crashes take seconds; `SteppedMount` is a real mount whose daemon breaks. By hand:

    python -m tests.support.crashing run MODULE:FUNCTION '{"argument": …}' [--kill before:rename:2] [--fail link:1:EIO]
    python -m tests.support.crashing mount SOURCE MOUNTPOINT [-o OPTIONS] [--armed-by FILE] [--kill …] [--fail …]
    … --record FILE    writes the steps that came

A job is a function `f(steps, **arguments)` whose arguments and answer are JSON; it arms the steps itself. The steps of
a mount count from when FILE exists.
"""

import argparse
import contextlib
import errno
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from dedupfs import control, fusefs, mount
from dedupfs.backing import Backing
from dedupfs.config import control_directory, parse_options
from dedupfs.engine import Engine

from .filesystems import is_mountpoint, unmount
from .mounted import REPOSITORY

T = TypeVar("T")

_METHODS = [
    *("mkdir", "mknod", "symlink", "unlink", "rmdir", "link", "rename"),
    *("chmod", "chown", "utime", "set_mtime", "utimensat", "futimens", "setxattr", "removexattr", "fset_immutable"),
    *("fset_reference", "fremove_reference", "truncate", "ftruncate", "fallocate", "clone", "dedupe"),
    *("fsync", "fsync_directory"),
]

_FUNCTIONS = ["fchmod", "fchown", "utime", "setxattr", "removexattr", "pwrite", "copy_file_range", "sync", "fdatasync"]

_EVERY = 0


class Kill(NamedTuple):
    """`when` is "before" or "after"."""

    when: str
    step: str
    number: int

    @classmethod
    def parse(cls, text: str) -> "Kill":
        when, step, number = text.split(":")
        if when not in ("before", "after"):
            raise ValueError(f"{text}: kill before or after?")
        return cls(when, step, int(number))


class Fail(NamedTuple):
    """`number` 0, written `*`: every such call."""

    step: str
    number: int
    code: int

    @classmethod
    def parse(cls, text: str) -> "Fail":
        step, number, name = text.split(":")
        return cls(step, _EVERY if number == "*" else int(number), getattr(errno, name))


class Steps:
    """Counts the steps of a process and breaks one of them. Any thread."""

    def __init__(
        self, kill: Kill | None = None, fail: Fail | None = None, *, armed_by: Path | None = None, record: int = -1
    ) -> None:
        """`record`: a descriptor that gets each step's name on a line."""
        self.names: list[str] = []
        self.failed = False  # the call that was to fail has failed
        self._kill, self._fail = kill, fail
        self._armed_by = armed_by
        self._armed = False
        self._record = record
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._inside = threading.local()

    def arm(self) -> None:
        self._armed = True

    def disarm(self) -> None:
        self._armed, self._armed_by = False, None

    def _is_armed(self) -> bool:
        if not self._armed and self._armed_by is not None and self._armed_by.exists():
            self._armed = True
        return self._armed

    def perform(self, step: str, call: Callable[[], T]) -> T:
        if getattr(self._inside, "a_step", False) or not self._is_armed():
            return call()
        with self._lock:
            self._counts[step] += 1
            number = self._counts[step]
            self.names.append(f"{step}:{number}")
            if self._record >= 0:
                os.write(self._record, f"{step}:{number}\n".encode())
        self._die_if(Kill("before", step, number))
        if self._fail is not None and self._fail[:2] in ((step, number), (step, _EVERY)):
            self.failed = True
            raise OSError(self._fail.code, os.strerror(self._fail.code))
        self._inside.a_step = True
        try:
            return call()
        finally:
            self._inside.a_step = False
            self._die_if(Kill("after", step, number))

    def _die_if(self, here: Kill) -> None:
        if here == self._kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, step: str, call: Callable[..., T]) -> Callable[..., T]:
        def stepping(*args: Any, **options: Any) -> T:
            return self.perform(step, lambda: call(*args, **options))

        return stepping

    def take_functions(self) -> None:
        """Make steps of the functions of `os`, in this whole process, until it ends."""
        for name in _FUNCTIONS:
            setattr(os, name, self.wrap(f"os.{name}", getattr(os, name)))


class SteppingBacking(Backing):
    """A backing whose calls that change something are steps."""

    def __init__(self, source: str | bytes, steps: Steps) -> None:
        super().__init__(source)
        for name in _METHODS:
            setattr(self, name, steps.wrap(name, getattr(self, name)))
        copy, open_ = Backing.copy_range, self.open

        def copy_range(source: int, target: int, length: int) -> None:
            # Also to be caught between its parts.
            steps.perform("copy_range.half", lambda: copy(source, target, length // 2))
            steps.perform("copy_range", lambda: copy(source, target, length))

        def open_or_create(path: bytes, flags: int, mode: int = 0o600) -> int:
            if flags & (os.O_CREAT | os.O_TRUNC):
                return steps.perform("create", lambda: open_(path, flags, mode))
            return open_(path, flags, mode)

        set_flag = self.fset_immutable

        def fset_immutable(fd: int, *, immutable: bool) -> None:
            with contextlib.suppress(OSError):  # it never raises one
                set_flag(fd, immutable=immutable)

        setattr(self, "copy_range", copy_range)  # noqa: B010 - methods replaced on purpose
        setattr(self, "open", open_or_create)  # noqa: B010
        setattr(self, "fset_immutable", fset_immutable)  # noqa: B010


# --- jobs


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended. `steps` are those that came, as far as it got."""

    killed: bool
    result: Any
    error: str  # the traceback of an exception
    steps: list[str]
    log: str  # what it wrote to standard error, its logging included

    def check(self) -> Any:
        """The result of a job that should have come to its end."""
        assert not self.killed, "the job was killed"
        assert not self.error, f"{self.error}\n{self.log}"
        return self.result


def _run_job(call: str, arguments: dict[str, Any], steps: Steps) -> Any:
    module, _, function = call.partition(":")
    steps.take_functions()
    return getattr(importlib.import_module(module), function)(steps, **arguments)


def _serve_jobs() -> None:
    """Read jobs, a JSON object a line, and answer each; until end of input."""
    for line in sys.stdin:
        job = json.loads(line)
        importlib.import_module(job["call"].partition(":")[0])  # here once, not in each job
        with tempfile.TemporaryFile() as log, tempfile.TemporaryFile() as record, tempfile.TemporaryFile() as answer:
            child = os.fork()
            if child == 0:
                _be_job(job, log.fileno(), record.fileno(), answer.fileno())
            _, status = os.waitpid(child, 0)
            texts = []
            for file in (log, record, answer):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
            said: dict[str, Any] = json.loads(texts[2]) if texts[2] else {}
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            if not killed and not said:
                said = {"error": f"the job ended with wait status {status}"}
            outcome = {
                "killed": killed,
                "result": said.get("result"),
                "error": said.get("error", ""),
                "steps": texts[1].split(),
                "log": texts[0],
            }
        print(json.dumps(outcome), flush=True)


def _no_imaging(_engine: Engine) -> None:
    pass


def _be_job(job: dict[str, Any], log: int, record: int, answer: int) -> None:
    """Do the job and end this process."""
    try:
        os.dup2(log, sys.stderr.fileno())
        # Nothing here is a picture, and none of the processes that describe them is to be waited for at each step:
        # tests/mount/test_pictures.py kills those.
        setattr(Engine, "_start_imaging", _no_imaging)  # noqa: B010 - mypy knows no other way
        if job["user"] is not None:
            os.setgroups([])
            os.setgid(job["user"])
            os.setuid(job["user"])
        kill = Kill.parse(job["kill"]) if job["kill"] else None
        fail = Fail.parse(job["fail"]) if job["fail"] else None
        said = {"result": _run_job(job["call"], job["arguments"], Steps(kill, fail, record=record))}
    except BaseException:  # noqa: BLE001 - whatever it is, it is told to who asked
        said = {"error": traceback.format_exc()}
    os.write(answer, json.dumps(said).encode())
    os._exit(0)


class Crasher:
    """Runs jobs, one at a time, each in a process of its own."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", __name__, "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )

    def run(
        self,
        call: str,
        arguments: Mapping[str, object],
        *,
        kill: str | None = None,
        fail: str | None = None,
        user: int | None = None,
    ) -> Outcome:
        """Call `MODULE:FUNCTION` with these arguments, as `user` if given. `Kill` and `Fail` parse the orders."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        job = {"call": call, "arguments": arguments, "kill": kill, "fail": fail, "user": user}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return Outcome(**json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        self._server.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# --- a mount


def _serve_mount(source: str, mountpoint: str, options: str, steps: Steps) -> None:
    """What `dedupfs.mount.serve` does, with a backing that breaks. Says "ready" on standard output."""
    steps.take_functions()
    parsed = parse_options(options, privileged=os.geteuid() == 0)
    with Engine(source, parsed, backing=SteppingBacking(source, steps)) as engine:
        path = os.path.join(control_directory(uid=os.geteuid()), f"{engine.store.uuid}.sock")
        server = control.Server(path, mount.commands(engine))
        engine.vfs.control_path = os.fsencode(path)
        engine.start()
        server.start()
        engine.store.announce(mountpoint=mountpoint, socket=path)

        def ready(mount_: fusefs.Mount) -> None:
            engine.on_replaced = mount_.forget
            print("ready", flush=True)

        words = [*parsed.fuse_words, f"subtype={control.FUSE_TYPE.removeprefix('fuse.')}"]
        fusefs.serve(
            engine,
            mountpoint,
            words,
            fsname=source,
            wanted=parsed.passthrough,
            mount_with=lambda mount: mount(),
            on_ready=ready,
        )
        server.close()


class SteppedMount:
    """A mount in a process of its own that breaks at a step once it is armed. A context manager, like a mount."""

    def __init__(
        self, source: Path, mountpoint: Path, scratch: Path, *options: str, kill: str = "", fail: str = ""
    ) -> None:
        """`scratch`: a directory outside of both, for what this has to note."""
        self.mountpoint = mountpoint
        mountpoint.mkdir(exist_ok=True)
        self._armed = scratch / "armed"
        self._armed.unlink(missing_ok=True)
        self._record = scratch / "steps"
        self._record.unlink(missing_ok=True)
        self._log = scratch / "log"
        command: list[str | Path] = [sys.executable, "-m", __name__, "mount", source, mountpoint]
        command += ["-o", ",".join(options)]
        command += ["--armed-by", self._armed, "--record", self._record]
        command += [word for name, value in (("--kill", kill), ("--fail", fail)) if value for word in (name, value)]
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONFAULTHANDLER": "1"},
            )
        assert self.process.stdout is not None
        if self.process.stdout.readline() != b"ready\n":
            self.process.kill()
            self.process.communicate()
            raise AssertionError(f"the mount did not come up: {self.log}")

    def arm(self) -> None:
        self._armed.touch()

    @property
    def steps(self) -> list[str]:
        return self._record.read_text().split() if self._record.exists() else []

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def was_killed(self, patience_s: float = 0) -> bool:
        """Whether the daemon died of SIGKILL, after waiting for that at most so long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(patience_s) == -signal.SIGKILL
        return False

    def close(self) -> None:
        """Unmount, whether the daemon lives or not."""
        if is_mountpoint(self.mountpoint):
            unmount(self.mountpoint, patience_s=0 if self.process.poll() is not None else 5)
        try:
            self.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # faulthandler writes down what the threads do
            time.sleep(1)
            self.process.kill()
            self.process.communicate()
            raise AssertionError(f"the daemon does not end: {self.log}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# --- the script


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.crashing", description="Break dedupfs at a step.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("serve", help="run jobs read from standard input")
    job = verbs.add_parser("run", help="run one job")
    job.add_argument("call", metavar="MODULE:FUNCTION")
    job.add_argument("arguments", type=json.loads, metavar="JSON")
    mounting = verbs.add_parser("mount", help="mount in the foreground")
    mounting.add_argument("source", type=os.path.abspath)
    mounting.add_argument("mountpoint", type=os.path.realpath)
    mounting.add_argument("-o", dest="options", default="")
    mounting.add_argument("--armed-by", type=Path)
    for verb in (job, mounting):
        verb.add_argument("--kill", type=Kill.parse, metavar="before|after:STEP:NUMBER")
        verb.add_argument("--fail", type=Fail.parse, metavar="STEP:NUMBER|*:ERRNO")
        verb.add_argument("--record", metavar="FILE")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(threadName)s %(name)s: %(message)s")
    if chosen.verb == "serve":
        _serve_jobs()
        return
    record = os.open(chosen.record, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) if chosen.record else -1
    steps = Steps(chosen.kill, chosen.fail, armed_by=getattr(chosen, "armed_by", None), record=record)
    if chosen.verb == "run":
        print(json.dumps(_run_job(chosen.call, chosen.arguments, steps), indent=2))
    else:
        _serve_mount(chosen.source, chosen.mountpoint, chosen.options, steps)


if __name__ == "__main__":
    _main()
