"""The control socket answers its own people, survives everybody else, and stops when it is told to."""

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path

import pytest

from dedupfs import control, errors
from dedupfs.backing import Backing
from dedupfs.control import Command, Server
from dedupfs.errors import Busy, DedupfsError, NotMounted, SourceError, StoreError, UsageError
from dedupfs.model import Progress
from dedupfs.store import Store

PATIENCE_S = 10.0

Start = Callable[[Mapping[str, Command]], Server]


def no_progress(_phase: str, _done: int, _total: int | None) -> None:
    pass


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short, because the path of a socket may have 107 bytes only."""
    path = Path(tempfile.mkdtemp(prefix="dedupfs-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def start(directory: Path) -> Iterator[Start]:
    servers = []

    def begin(commands: Mapping[str, Command]) -> Server:
        server = Server(str(directory / "run" / "x.sock"), commands)
        servers.append(server)
        server.start()
        return server

    threads = set(threading.enumerate())
    yield begin
    for server in servers:
        server.close()
    assert set(threading.enumerate()) == threads


def echo(arguments: Mapping[str, object], _progress: Progress) -> object:
    return dict(arguments)


def send(server: Server, request: bytes) -> dict[str, object]:
    """The last line that comes back for these bytes."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server.path)
        with suppress(BrokenPipeError):
            connection.sendall(request)
        with connection.makefile("rb") as file:
            answer = json.loads(file.readlines()[-1])
    assert isinstance(answer, dict)
    return answer


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def all_errors() -> list[type[DedupfsError]]:
    """Every kind of error that has an exit code of its own, or its parent's."""
    classes = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, DedupfsError)]
    return [each for each in classes if each is not DedupfsError]


# -- answers


def test_arguments_reach_the_command_and_its_result_comes_back(start: Start) -> None:
    server = start({"echo": echo})
    arguments = {"path": os.fsdecode(b"caf\xe9/\n"), "deep": {"n": [1, None, True]}}
    assert control.call(server.path, "echo", arguments, no_progress) == arguments


def test_progress_reaches_the_caller(start: Start) -> None:
    def count(_arguments: Mapping[str, object], progress: Progress) -> object:
        for done in range(1000):
            progress("counting", done, 1000)
        progress("counting", 1000, 1000)
        progress("resting", 0, None)
        return None

    seen: list[tuple[str, int, int | None]] = []
    assert control.call(start({"count": count}).path, "count", {}, lambda *report: seen.append(report)) is None
    assert seen[0] == ("counting", 0, 1000)
    assert seen[-2:] == [("counting", 1000, 1000), ("resting", 0, None)]
    assert len(seen) < 100, "a line for every step would slow down the work it tells about"


def test_a_long_result_arrives_whole(start: Start) -> None:
    names = [f"photographs/{number}.jpg" for number in range(100_000)]
    assert control.call(start({"list": lambda _arguments, _progress: names}).path, "list", {}, no_progress) == names


def test_every_error_of_ours_comes_back_as_its_kind(start: Start) -> None:
    kinds = all_errors()
    assert errors.DamagedContent in kinds

    def fail(arguments: Mapping[str, object], _progress: Progress) -> object:
        raise kinds[int(str(arguments["number"]))]("what happened; what to do")

    server = start({"fail": fail})
    for number, kind in enumerate(kinds):
        with pytest.raises(DedupfsError, match=r"^what happened; what to do$") as caught:
            control.call(server.path, "fail", {"number": number}, no_progress)
        assert caught.value.exit_code == kind.exit_code
        assert isinstance(caught.value, next(each for each in kind.__mro__ if DedupfsError in each.__bases__))


def test_an_error_of_the_system_names_the_file(start: Start) -> None:
    def fail(_arguments: Mapping[str, object], _progress: Progress) -> object:
        raise OSError(28, "No space left on device", b"caf\xe9")

    with pytest.raises(DedupfsError, match="caf\udce9: No space left on device") as caught:
        control.call(start({"fail": fail}).path, "fail", {}, no_progress)
    assert caught.value.exit_code == errors.EXIT_OS_ERROR


@pytest.mark.parametrize(
    "command",
    [lambda _arguments, _progress: 1 // 0, lambda _arguments, _progress: {"path": b"not JSON"}],
    ids=["raises", "answers nonsense"],
)
def test_a_bug_is_logged_and_answered(start: Start, caplog: pytest.LogCaptureFixture, command: Command) -> None:
    server = start({"bug": command, "echo": echo})
    with pytest.raises(DedupfsError, match="internal error") as caught:
        control.call(server.path, "bug", {}, no_progress)
    assert caught.value.exit_code == errors.EXIT_INTERNAL
    assert [(record.levelno, bool(record.exc_info)) for record in caplog.records] == [(logging.ERROR, True)]
    assert control.call(server.path, "echo", {}, no_progress) == {}


# -- requests that are none


@pytest.mark.parametrize(
    "request_line",
    [
        b"\n",
        b"[]\n",
        b"{\n",
        b"no newline",
        b"\xff\xfe\n",
        b'"echo"\n',
        b"{}\n",
        b'{"command": null}\n',
        b'{"command": ["echo"]}\n',
        b'{"command": "frob"}\n',
        b"[" * 100_000 + b"\n",
        b"1" * 10_000 + b"\n",
    ],
    ids=lambda line: repr(line[:20]),
)
def test_a_malformed_request_is_a_mistake_not_a_bug(
    start: Start, caplog: pytest.LogCaptureFixture, request_line: bytes
) -> None:
    server = start({"echo": echo})
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server.path)
        connection.sendall(request_line)
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as file:
            answer = json.loads(file.read())
    assert answer["exit_code"] == UsageError.exit_code
    assert "\n" not in answer["error"]
    assert not caplog.records
    assert control.call(server.path, "echo", {}, no_progress) == {}


def test_a_request_has_a_limit(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_REQUEST_LIMIT_BYTES", 1 << 20)
    server = start({"echo": echo})
    with pytest.raises(UsageError, match="MiB"):
        control.call(server.path, "echo", {"paths": ["x" * 1000] * 5000}, no_progress)


# -- clients that go away


def test_a_client_that_goes_away_stops_its_command(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    ended = threading.Event()

    def work(_arguments: Mapping[str, object], progress: Progress) -> object:
        try:
            for step in range(10_000):
                progress(f"step {step}", step, None)
                time.sleep(0.001)
        finally:
            ended.set()
        return None

    def interrupt(_phase: str, done: int, _total: int | None) -> None:
        if done == 5:
            raise KeyboardInterrupt

    server = start({"work": work, "echo": echo})
    with pytest.raises(KeyboardInterrupt):
        control.call(server.path, "work", {}, interrupt)
    assert ended.wait(PATIENCE_S)
    assert control.call(server.path, "echo", {}, no_progress) == {}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_client_that_says_nothing_does_no_harm(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_PATIENCE_S", 0.1)
    server = start({"echo": echo})
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server.path)
        assert control.call(server.path, "echo", {}, no_progress) == {}
        connection.settimeout(PATIENCE_S)
        assert connection.recv(1) == b""


def test_a_client_that_never_reads_stops_its_command(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_PATIENCE_S", 0.1)
    ended = threading.Event()

    def work(_arguments: Mapping[str, object], progress: Progress) -> object:
        try:
            while True:
                for phase in ("x" * 10_000, "y" * 10_000):
                    progress(phase, 0, None)
        finally:
            ended.set()

    server = start({"work": work})
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server.path)
        connection.sendall(b'{"command": "work"}\n')
        assert ended.wait(PATIENCE_S)


# -- strangers


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_is_refused(start: Start) -> None:
    server = start({"echo": echo})
    os.chmod(os.path.dirname(os.path.dirname(server.path)), 0o755)
    os.chmod(os.path.dirname(server.path), 0o755)
    os.chmod(server.path, 0o666)
    stranger = (
        "import os, socket, sys\n"
        "connection = socket.socket(socket.AF_UNIX)\n"
        "os.setuid(65534)\n"
        "connection.connect(sys.argv[1])\n"
        "print(connection.recv(4096).decode())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", stranger, server.path], check=True, capture_output=True, timeout=PATIENCE_S
    )
    answer = json.loads(done.stdout)
    assert answer["exit_code"] == errors.EXIT_OS_ERROR
    assert "only root and the user who mounted" in answer["error"]


def test_nobody_else_reaches_the_socket(start: Start) -> None:
    path = start({}).path
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700


def test_a_lax_directory_is_tightened(directory: Path, start: Start) -> None:
    (directory / "run").mkdir()
    (directory / "run").chmod(0o777)
    start({})
    assert (directory / "run").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_no_directory_of_ours_is_refused(directory: Path, kind: str) -> None:
    if kind == "file":
        (directory / "run").touch()
    else:
        (directory / "run").symlink_to(directory)
    with pytest.raises(SourceError, match="XDG_RUNTIME_DIR"):
        Server(str(directory / "run" / "x.sock"), {})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_else_is_refused(directory: Path) -> None:
    (directory / "run").mkdir()
    os.chown(directory / "run", 65534, 65534)
    with pytest.raises(SourceError, match="somebody else"):
        Server(str(directory / "run" / "x.sock"), {})


# -- beginning and end


def test_the_socket_of_a_dead_daemon_is_replaced(directory: Path, start: Start) -> None:
    path = directory / "run" / "x.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()
    assert control.call(start({"echo": echo}).path, "echo", {}, no_progress) == {}


def test_close_stops_a_running_command(start: Start) -> None:
    running = threading.Event()

    def work(_arguments: Mapping[str, object], progress: Progress) -> object:
        while True:
            progress("working", 0, None)
            running.set()
            time.sleep(0.001)

    server = start({"work": work})

    def close_later() -> None:
        running.wait(PATIENCE_S)
        server.close()

    closer = threading.Thread(target=close_later)
    closer.start()
    with pytest.raises(Busy, match="going down"):
        control.call(server.path, "work", {}, no_progress)
    closer.join()


def test_close_does_not_wait_for_a_client_that_says_nothing(start: Start) -> None:
    server = start({})
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server.path)
        assert eventually(lambda: len(server._requests) == 1)
        began = time.monotonic()
        server.close()
        assert time.monotonic() - began < PATIENCE_S


def test_close_leaves_nothing(start: Start) -> None:
    server = start({"echo": echo})
    server.close()
    server.close()
    assert not os.path.lexists(server.path)
    with pytest.raises(NotMounted):
        control.call(server.path, "echo", {}, no_progress)


def test_close_without_start(directory: Path) -> None:
    Server(str(directory / "run" / "x.sock"), {}).close()


def test_a_daemon_that_dies_in_the_middle(directory: Path) -> None:
    path = str(directory / "x.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def die() -> None:
            connection, _ = listener.accept()
            connection.recv(100)
            connection.sendall(b'{"progress": ["working", 1, 2]}\n{"resu')
            connection.close()

        thread = threading.Thread(target=die)
        thread.start()
        with pytest.raises(NotMounted, match="went down"):
            control.call(path, "echo", {}, no_progress)
        thread.join()
    with pytest.raises(NotMounted, match="no mount answers"):
        control.call(path, "echo", {}, no_progress)


def test_the_daemon_is_known_by_the_kernels_word(start: Start) -> None:
    assert control.daemon_pid(start({}).path) == os.getpid()


# -- finding a mount


@pytest.fixture
def source(directory: Path) -> Path:
    path = directory / "source"
    path.mkdir()
    return path


def test_the_source_of_a_live_mount_leads_to_it(source: Path, start: Start) -> None:
    server = start({})
    with closing(Backing(str(source))) as backing, Store(backing) as store:
        assert control.find_mount(str(source)) is None  # owned, and nothing announced yet
        store.announce(mountpoint="/mnt", socket=server.path)
        assert control.find_mount(str(source)) == server.path
    assert control.find_mount(str(source)) is None


def test_the_word_of_a_killed_daemon_is_not_believed(source: Path, directory: Path) -> None:
    with closing(Backing(str(source))) as backing, Store(backing) as store:
        store.announce(mountpoint="/mnt", socket=str(directory / "gone.sock"))
        assert control.find_mount(str(source)) is None


def test_an_ordinary_directory_is_no_mount(source: Path) -> None:
    assert control.find_mount(str(source)) is None
    assert control.mount_at(str(source)) is None


def test_an_xattr_on_an_ordinary_filesystem_is_not_believed(source: Path, start: Start) -> None:
    with suppress(OSError):  # then the filesystem of the test cannot be used for this trick
        os.setxattr(source, control.CONTROL_XATTR, os.fsencode(start({}).path))
    assert control.find_mount(str(source)) is None


@pytest.mark.parametrize("name", ["absent", "file/absent"])
def test_there_has_to_be_something_to_look_at(source: Path, name: str) -> None:
    (source / "file").touch()
    with pytest.raises(SourceError, match=name):
        control.find_mount(str(source / name))


def test_a_file_is_no_source(source: Path) -> None:
    (source / "file").touch()
    with pytest.raises(SourceError, match="not a directory"):
        control.find_mount(str(source / "file"))


def test_an_error_code_of_the_future_is_kept(directory: Path) -> None:
    path = str(directory / "x.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b'{"error": "new trouble", "exit_code": 99}\n')

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(DedupfsError, match="new trouble") as caught:
            control.call(path, "echo", {}, no_progress)
        thread.join()
    assert caught.value.exit_code == 99
    assert not isinstance(caught.value, StoreError)
