"""The life of a mount: checked, built once, served, taken down in order; started in the background.

`serve` is the daemon: it runs in the foreground of its process and is the only place where an engine, a control socket
and a FUSE session meet. `spawn` runs such a process in the background.
"""

import errno
import faulthandler
import logging
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from . import control
from .backing import Backing
from .config import FUSE_CONFIGURATION, MountOptions, control_directory, notify_socket, user_may_allow_other
from .engine import Engine
from .errors import Busy, DedupfsError, SourceError, Unavailable, UsageError
from .model import STORE_DIRECTORY, Progress
from .notify import Herald
from .unmount import FUSERMOUNT, beneath, detach_dead, is_dead, mount_over_dead

if TYPE_CHECKING:
    from .pictures import Pictures

log = logging.getLogger(__name__)

LOG = STORE_DIRECTORY + b"/daemon.log"

_FUSE_DEVICE = "/dev/fuse"
_READY = b"ready\n"

_LINE = "%(asctime)s %(levelname)s %(threadName)s %(name)s: %(message)s"
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.NOTSET, 7))


# -- serving ----------------------------------------------------------------------------------------------------------


def serve(
    source: str, mountpoint: str, options: MountOptions, *, on_ready: Callable[[], None], background: bool = False
) -> None:
    """Mount `source` at `mountpoint` and serve it until it is unmounted, by whatever means.

    What a killed daemon left there stays beneath it as long, for root. `on_ready` is called once, when the mount
    answers, from any thread. With `background`, standard error then goes to the log in the store. Returns when the
    store is closed and marked clean. Raises what keeps it from mounting.
    """
    from . import fusefs  # chooses and loads libfuse, which no other command needs

    source, mountpoint = os.path.abspath(source), os.path.realpath(mountpoint)

    dead = os.geteuid() == 0 and is_dead(mountpoint)

    def look() -> Backing:
        _check_before_mounting(source, mountpoint, options)
        return Backing(source, noatime=options.noatime, own_mounts=dead)

    def mount_with(mount: Callable[[], int]) -> int:
        if not dead:
            return mount()
        failed = mount_over_dead(mountpoint, mount)
        if not failed:
            shutdown.callback(detach_dead, mountpoint)  # when ours is unmounted
        return failed

    backing = beneath(mountpoint, look) if dead else look()
    with _signals() as hold_signals, ExitStack() as shutdown:
        engine = Engine(source, options, backing=backing)
        shutdown.callback(engine.close)
        if options.rules is not None:
            engine.store.keep_rules(options.rules)
        log_fd = backing.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if background else None
        if log_fd is not None:
            shutdown.callback(os.close, log_fd)

        # A copy of a store has its identity, too, and may be mounted beside it: no two have the same directory.
        name = f"{engine.store.uuid}.{engine.backing.device:x}.{engine.backing.root_ino:x}.sock"
        path = os.path.join(control_directory(uid=os.geteuid()), name)
        server = control.Server(path, commands(engine), streams(engine))
        shutdown.callback(server.close)
        shutdown.callback(engine.settler.leave)  # or a scan that somebody asked for would wait for room on a full disk
        engine.vfs.control_path = os.fsencode(path)
        engine.start()
        server.start()
        if options.metrics:
            from .metrics import Exporter

            exporter = Exporter(options.metrics, engine.metrics)
            shutdown.callback(exporter.close)
            exporter.start()
        engine.store.announce(mountpoint=mountpoint, socket=path)
        shutdown.callback(hold_signals)

        herald = Herald(notify_socket(), engine.describe)
        shutdown.callback(herald.stop)
        ready = threading.Event()

        def when_ready(mount: fusefs.Mount) -> None:
            engine.on_replaced = mount.forget
            engine.why_no_passthrough = mount.why_no_passthrough
            if log_fd is not None:
                os.dup2(log_fd, sys.stderr.fileno())
            log.info("serving %s at %s", source, mountpoint)
            ready.set()
            herald.ready()
            on_ready()

        words = [*options.fuse_words, f"subtype={control.FUSE_TYPE.removeprefix('fuse.')}"]
        try:
            fusefs.serve(
                engine,
                mountpoint,
                words,
                fsname=source,
                wanted=options.passthrough,
                mount_with=mount_with,
                on_ready=when_ready,
            )
        except Exception:
            if background and ready.is_set():  # nobody else is left to hear of it
                log.exception("the mount at %s ended", mountpoint)
            raise
        log.info("unmounted %s", mountpoint)


def commands(engine: Engine) -> dict[str, control.Command]:
    """What the control socket answers. The arguments come from another process and are checked here."""

    def status(_arguments: Mapping[str, object], _progress: Progress) -> object:
        return engine.status()

    def health(_arguments: Mapping[str, object], _progress: Progress) -> object:
        return engine.health().as_json()

    def settle(arguments: Mapping[str, object], progress: Progress) -> object:
        return engine.settle(progress, exact=bool(arguments.get("exact")))

    def scan(_arguments: Mapping[str, object], progress: Progress) -> object:
        return engine.scan(progress)

    def restore(arguments: Mapping[str, object], progress: Progress) -> object:
        paths = arguments.get("paths", [])
        if not isinstance(paths, list):
            raise UsageError("the paths to restore are not a list")
        dry_run = arguments.get("dry_run") is True
        return engine.restore([_path(path) for path in paths], progress, dry_run=dry_run)

    def report(arguments: Mapping[str, object], progress: Progress) -> object:
        return engine.report(progress, thumbnails=arguments.get("thumbnails") is True)

    def scrub(arguments: Mapping[str, object], progress: Progress) -> object:
        rate = arguments.get("rate")
        if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1e9):
            raise UsageError(f"a rate of {rate!r} MB/s makes no sense; give a number, 0 for no bound")
        return engine.scrub(progress, rate)

    def duplicates(arguments: Mapping[str, object], _progress: Progress) -> object:
        path = arguments.get("path")
        return engine.duplicates(None if path is None else _path(path))

    found: dict[str, control.Command] = {
        "status": status,
        "health": health,
        "settle": settle,
        "scan": scan,
        "restore": restore,
        "scrub": scrub,
        "report": report,
        "duplicates": duplicates,
    }
    return found | _picture_commands(engine)


def streams(engine: Engine) -> dict[str, control.Listen]:
    """What the control socket goes on telling."""

    def watch(_arguments: Mapping[str, object]) -> control.Stream:
        if engine.imaging is None:
            raise Unavailable("nothing is settled or described in a mount that is read-only")
        return engine.imaging.watching.subscribe()

    return {"watch": watch}


def _picture_commands(engine: Engine) -> dict[str, control.Command]:
    def pictures() -> "Pictures":
        if engine.imaging is None:
            raise Unavailable("pictures are not described in a mount that is read-only")
        return engine.imaging.pictures

    def similar(arguments: Mapping[str, object], _progress: Progress) -> object:
        return pictures().similar(_path(arguments.get("path")))

    def find(arguments: Mapping[str, object], _progress: Progress) -> object:
        return pictures().find(_text(arguments, "file"))

    def groups(arguments: Mapping[str, object], progress: Progress) -> object:
        relations = arguments.get("relations", [])
        if not isinstance(relations, list):
            raise UsageError("the relations are not a list")
        return pictures().groups([str(each) for each in relations], lambda done: progress("grouping", done, None))

    def authoritative(arguments: Mapping[str, object], _progress: Progress) -> object:
        path = _path(arguments.get("path"))
        action = arguments.get("action")
        if action is None:
            return pictures().authoritative(path)
        if action not in ("pin", "unpin", "note"):
            raise UsageError(f"{action!r} is nothing that can be decided")
        return pictures().decide(path, str(action), who=_text(arguments, "who"), text=_text(arguments, "text"))

    def history(arguments: Mapping[str, object], _progress: Progress) -> object:
        return pictures().history(_path(arguments.get("path")))

    def not_similar(arguments: Mapping[str, object], _progress: Progress) -> object:
        one, other = _path(arguments.get("path")), _path(arguments.get("other"))
        return pictures().not_similar(one, other, who=_text(arguments, "who"))

    def conflicts(_arguments: Mapping[str, object], _progress: Progress) -> object:
        return pictures().conflicts()

    return {
        "similar": similar,
        "find": find,
        "groups": groups,
        "authoritative": authoritative,
        "history": history,
        "not-similar": not_similar,
        "conflicts": conflicts,
    }


def _text(arguments: Mapping[str, object], name: str) -> str:
    value = arguments.get(name, "")
    if not isinstance(value, str):
        raise UsageError(f"{name} is not a text")
    return value


def _path(value: object) -> bytes:
    """A path of a request, which has to stay in the source and out of the store."""
    try:
        path = os.fsencode(value) if isinstance(value, str) else None
    except UnicodeEncodeError:
        path = None
    parts = path.split(b"/") if path else []
    if path is None or b"\0" in path or (path and not set(parts).isdisjoint({b"", b".", b".."})):
        raise UsageError(f"{value!r} is not a path relative to the mount")
    if parts and parts[0] == STORE_DIRECTORY:
        raise SourceError(f"{value} does not exist in the mount")
    return path


@contextmanager
def _signals() -> Iterator[Callable[[], None]]:
    """A function that makes the process deaf to being asked to end, until the end of the block.

    Before it is called, libfuse answers signals by unmounting; afterwards a second one would only leave the store
    unclean.
    """
    handlers: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def hold() -> None:
        if threading.current_thread() is threading.main_thread():  # elsewhere signals are somebody else's
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                handlers[number] = signal.signal(number, signal.SIG_IGN)

    try:
        yield hold
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _check_before_mounting(source: str, mountpoint: str, options: MountOptions) -> None:
    """Find what libfuse and fusermount3 would refuse, or worse accept, while it can be said in one clear line."""
    for path in dict.fromkeys((source, mountpoint)):
        _check_directory(path)
    if not os.path.samefile(source, mountpoint):
        fronted = os.path.realpath(source)
        common = os.path.commonpath((fronted, mountpoint))
        if common == fronted:
            raise SourceError(f"{mountpoint} lies inside {source}; mount over {source} itself, or outside of it")
        if common == mountpoint:
            raise SourceError(f"{source} lies inside {mountpoint}, which would hide it; mount over {source} itself")
    if control.find_mount(source) is not None:
        raise Busy(f"{source} is mounted already; dedupfs status {source} asks that mount")
    with suppress(UsageError):  # a directory deep inside another mount may be mounted over
        if control.mount_at(mountpoint) is not None:
            raise Busy(f"a dedupfs is mounted at {mountpoint} already; run dedupfs umount {mountpoint} first")
    if not os.path.exists(_FUSE_DEVICE):
        raise Unavailable(f"{_FUSE_DEVICE} is missing; load it with: modprobe fuse (in a container: pass the device)")
    if os.geteuid() != 0:
        _check_user(mountpoint, options)


def _check_directory(path: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist; make the directory first") from None
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise SourceError(f"the mount at {path} is dead; run dedupfs umount {path}") from None
        raise SourceError(f"cannot use {path}: {error.strerror}") from None
    if not stat.S_ISDIR(mode):
        raise SourceError(f"{path} is not a directory")


def _check_user(mountpoint: str, options: MountOptions) -> None:
    if not os.access(_FUSE_DEVICE, os.R_OK | os.W_OK):
        raise Unavailable(f"{_FUSE_DEVICE} may not be opened by this user; ask the administrator, or mount as root")
    if shutil.which(FUSERMOUNT) is None:
        raise Unavailable(f"{FUSERMOUNT} is missing, without which only root can mount; install the package fuse3")
    if not os.access(mountpoint, os.W_OK):
        raise SourceError(f"{mountpoint} is not writable for this user, who therefore may not mount over it")
    if options.allow_other and not user_may_allow_other():
        raise UsageError(
            f"allow_other needs the line user_allow_other in {FUSE_CONFIGURATION}; add it, or leave allow_other out"
        )


# -- in the background ------------------------------------------------------------------------------------------------


def spawn(source: str, mountpoint: str, option_text: str) -> int:
    """Start a daemon that serves `source` at `mountpoint`, and wait until it does.

    Returns 0 then; otherwise the exit code of the daemon, which has said on standard error what is wrong.
    """
    reader, writer = os.pipe()
    arguments = ["mount", "--foreground", "--ready-fd", str(writer), "-o", option_text]
    try:
        # -P and our own search path: whatever lies in the working directory is not for us to import and run.
        daemon = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "dedupfs",
                *arguments,
                "--",
                os.path.abspath(source),
                os.path.abspath(mountpoint),
            ],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(writer,),
            start_new_session=True,
        )
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        try:
            served = answer.readline() == _READY
        except BaseException:
            # Ctrl-C does not reach a session of its own.
            daemon.terminate()
            daemon.wait()
            raise
    if served:
        daemon.returncode = 0  # it outlives us: init is to reap it
        return 0
    code = daemon.wait()
    if code <= 0:
        fate = f"was killed by {signal.Signals(-code).name}" if code else "ended"
        raise DedupfsError(f"the daemon {fate} before it served {mountpoint}; run with --foreground to see why")
    return code


@dataclass(frozen=True, slots=True)
class Readiness:
    """The daemon's end of `spawn`'s pipe."""

    fd: int

    def __post_init__(self) -> None:
        os.set_inheritable(self.fd, False)  # fusermount3 is not to hold it open

    def report(self) -> None:
        with suppress(BrokenPipeError):  # nobody waits any more
            os.write(self.fd, _READY)
        os.close(self.fd)


def prepare_process() -> None:
    """Make the process a good daemon: what it logs, and its stacks should it crash, go to standard error; and it may
    hold as many descriptors as all apps together."""
    handler = _LogHandler(sys.stderr)
    handler.setFormatter(_JournalLines() if _is_journal(sys.stderr) else logging.Formatter(_LINE))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    faulthandler.enable()
    # How long a request waits for the interpreter while settling computes; by default 5 ms.
    sys.setswitchinterval(0.0002)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _is_journal(stream: TextIO) -> bool:
    """Whether systemd reads what is written there, and not somebody to whom it was redirected since."""
    try:
        st = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{st.st_dev}:{st.st_ino}"


class _JournalLines(logging.Formatter):
    """Each line with its priority in front, as sd-daemon(3) has it; the journal knows the time."""

    def __init__(self) -> None:
        super().__init__("%(threadName)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        priority = next(number for level, number in _PRIORITIES if record.levelno >= level)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).split("\n"))


class _LogHandler(logging.StreamHandler[TextIO]):
    """A line that the disk has no room for is lost; what else goes wrong with a line is told, as everywhere."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)
