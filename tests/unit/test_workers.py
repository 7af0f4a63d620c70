"""Workers are shut in, are replaced whatever happens to them, and never take the daemon with them."""

import io
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

from dedupfs import likeness, phash
from dedupfs.errors import Unavailable
from dedupfs.likeness import Picture
from dedupfs.workers import Refused, Workers, _likeness_in, _Silent
from tests.support import hostile, raws, users
from tests.support.mounted import REPOSITORY
from tests.support.photos import photographs
from tests.support.tools import USER, needs_root

# What a worker tries from inside, each with what may come of it.
_ATTEMPTS = """
import ctypes, os, signal, socket, sys
from dedupfs import sandbox
outside, daemon = int(sys.argv[1]), int(sys.argv[2])
if sys.argv[3] == "without namespaces":
    sandbox._CLONE_NEWUSER = 0  # refused for want of rights, as where user namespaces are forbidden
sandbox.enter(sandbox.Limits(1 << 30, 100))

def connect(kind, address):
    with socket.socket(kind, socket.SOCK_DGRAM if kind == socket.AF_INET else socket.SOCK_STREAM) as one:
        one.connect(address)
        one.send(b"x")

def memory():
    bytearray(2 << 30)

def mount():
    if ctypes.CDLL(None, use_errno=True).mount(b"none", b"/", b"tmpfs", 0, None):
        raise OSError

def ptrace():
    if ctypes.CDLL(None).ptrace(16, daemon, 0, 0):
        raise OSError

def call(number, *arguments):
    found = ctypes.CDLL(None, use_errno=True).syscall(number, *arguments, 0, 0, 0)
    if found == 0:
        os._exit(0)  # the child of what should not be
    if found < 0:
        raise OSError

attempts = {
    "read a file": lambda: open("/etc/passwd").read(),
    "make a file": lambda: open("file", "w"),
    "list": lambda: os.listdir("/") and None,
    "list here": lambda: os.listdir("."),
    "through proc": lambda: open("/proc/self/mem"),
    "escape by a directory": lambda: os.open("..", os.O_RDONLY, dir_fd=outside),
    "start": lambda: os.execv("/bin/true", ["true"]),
    "fork": lambda: os.fork() or os._exit(0),
    "spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "another process": lambda: call(56 if os.uname().machine == "x86_64" else 220, 17),
    "vfork": lambda: call(58 if os.uname().machine == "x86_64" else 435, 0, 0),
    "clone3": lambda: call(435, 0, 0),
    "udp": lambda: connect(socket.AF_INET, ("127.0.0.1", 9)),
    "socket": socket.socket,
    "unix socket": lambda: socket.socket(socket.AF_UNIX),
    "io_uring": lambda: call(425, 1, ctypes.create_string_buffer(512)),
    "become root": lambda: os.setuid(0),
    "signal": lambda: os.kill(daemon, 0),
    "chroot": lambda: os.chroot("."),
    "mount": mount,
    "ptrace": ptrace,
    "memory": memory,
    "priority": lambda: os.nice(-5),
    "limits": lambda: __import__("resource").setrlimit(__import__("resource").RLIMIT_AS, (-1, -1)),
}
for name, attempt in attempts.items():
    try:
        attempt()
        print("CAN", name)
    except (OSError, MemoryError, ValueError):
        print("cannot", name)
print("uid", os.getuid(), os.getgroups())
"""


@pytest.fixture
def workers() -> Iterator[Workers]:
    pool = Workers(1)
    yield pool
    pool.close()


def ask(pool: Workers, data: bytes, directory: Path) -> str:
    """The format that it is found to be, or why it is not."""
    path = directory / "file"
    path.write_bytes(data)
    with open(path, "rb") as file:
        try:
            return pool.describe(file.fileno())[0].format
        except Refused as reason:
            return str(reason)


def test_what_it_answers_is_the_description(workers: Workers) -> None:
    for path in photographs(5):
        with open(path, "rb") as file:
            found = workers.describe(file.fileno())
        assert found == phash.describe(io.BytesIO(path.read_bytes()))
    assert workers.version == phash.VERSION
    assert workers.started == 1


@pytest.mark.parametrize(
    ("user", "how"),
    [
        pytest.param(None, "", id="root", marks=needs_root),
        pytest.param(USER, "", id="user"),
        pytest.param(USER, "without namespaces", id="user-without-namespaces"),
    ],
)
def test_what_a_worker_can_do(user: int | None, how: str) -> None:
    if os.geteuid() != 0:
        user = None
    python, where = sys.executable, {"PYTHONPATH": str(REPOSITORY)}
    if user is not None:
        python, where = str(users.interpreter()), users.environment(REPOSITORY)
    outside = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    try:
        done = subprocess.run(
            [python, "-c", _ATTEMPTS, str(outside), str(os.getpid()), how],
            env={**os.environ, **where},
            pass_fds=(outside,),
            capture_output=True,
            text=True,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
            check=False,
        )
    finally:
        os.close(outside)
    assert done.returncode == 0, done.stderr
    can = [line for line in done.stdout.splitlines() if line.startswith("CAN")]
    # Of a root directory that does not exist any more there is nothing to list.
    assert set(can) <= {"CAN list", "CAN list here"}, done.stdout
    assert "uid 65534 []" in done.stdout or user is not None


@pytest.mark.parametrize("kind", hostile.FORMATS)
def test_every_format_is_decoded_where_it_is_shut_in(workers: Workers, tmp_path: Path, kind: str) -> None:
    """Some decoders start threads, and there is nothing to load a library from."""
    assert ask(workers, hostile.sound(kind), tmp_path) == kind
    assert workers.started == 1


def test_previews_of_raw_files(workers: Workers, tmp_path: Path) -> None:
    for make in raws.ALL.values():
        assert ask(workers, make(Image.linear_gradient("L").convert("RGB")), tmp_path) == "RAW"
    assert workers.started == 1


def test_many_open_files_do_not_matter(workers: Workers, tmp_path: Path) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(3000, most[1]), most[1]))
    fds: list[int] = []
    try:
        while not fds or fds[-1] < 1100:
            fds.append(os.open("/dev/null", os.O_RDONLY))
        assert ask(workers, hostile.sound("JPEG"), tmp_path) == "JPEG"
    finally:
        for fd in fds:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, most)


def test_the_difference_of_two(workers: Workers, tmp_path: Path) -> None:
    paths = [tmp_path / "one", tmp_path / "other", tmp_path / "bad"]
    for path, data in zip(paths, (hostile.sound("JPEG"), hostile.sound("PNG", 1), b"no picture"), strict=True):
        path.write_bytes(data)
    with ExitStack() as stack:
        one, other, bad = (stack.enter_context(open(path, "rb")).fileno() for path in paths)
        width, height, pixels = workers.difference(one, other)
        assert len(pixels) == 3 * width * height
        with pytest.raises(Refused):
            workers.difference(one, bad)
        assert workers.difference(one, other) == (width, height, pixels)
    assert workers.started == 1


def pictures_with_all_relations() -> list[Picture]:
    image = Image.open(photographs(1, jpeg=True)[0]).convert("RGB").resize((600, 450))
    other = Image.open(photographs(2, jpeg=True)[1]).convert("RGB")
    inner = image.crop((60, 45, 600, 450))
    described = []
    for each in (image, image.resize((300, 225)), image.transpose(Image.Transpose.ROTATE_90), inner, other) * 8:
        out = io.BytesIO()
        each.save(out, "JPEG", quality=90)
        described.append(phash.describe(out))
    return list(described)


@pytest.mark.parametrize("cuts", [False, True])
def test_comparing_is_the_same_there_as_here(workers: Workers, *, cuts: bool) -> None:
    ours, *others = pictures_with_all_relations()
    expected = likeness.compare_each(ours, others, cuts=cuts)
    assert len({found.relation for found in expected if found is not None}) >= (1 if cuts else 3)
    assert None in expected
    assert workers.compare(ours, others, cuts=cuts) == expected
    assert workers.compare(ours, [], cuts=cuts) == []
    assert workers.compare(ours, others[:1], cuts=cuts) == expected[:1]
    assert workers.started == 1
    workers._idle[0]._process.kill()
    assert workers.compare(ours, others, cuts=cuts) == expected
    assert workers.started == 2
    workers.close()
    with pytest.raises(Unavailable):
        workers.compare(ours, others, cuts=cuts)


@pytest.mark.parametrize(
    "answer",
    [
        *(
            b"",
            b"{}",
            b"[]",
            b"x",
            b'["pixels", 0]',
            b'["nothing", 0, {}]',
            b'["pixels", -1, {}]',
            b'["pixels", 257, {}]',
        ),
        *(b'["pixels", "0", {}]', b'["pixels", 0, []]', b"[[], 0, {}]", b"[" * 5000, b"\xff"),
    ],
)
def test_an_answer_that_is_no_likeness(answer: bytes) -> None:
    with pytest.raises(_Silent):
        _likeness_in(answer)


@needs_root
def test_a_descriptor_is_all_it_has(workers: Workers, tmp_path: Path) -> None:
    assert ask(workers, hostile.sound("PNG"), tmp_path) == "PNG"
    (process,) = [worker._process.pid for worker in workers._idle]
    status = Path(f"/proc/{process}/status").read_text()
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert f"{name}:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    assert "Threads:\t1\n" in status
    assert os.readlink(f"/proc/{process}/root").endswith(" (deleted)")
    assert os.stat(f"/proc/{process}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino
    open_files = [os.readlink(f"/proc/{process}/fd/{fd}") for fd in os.listdir(f"/proc/{process}/fd")]
    assert sorted(name.split(":")[0] for name in open_files) == ["/dev/null"] * 3 + ["socket"]


def test_one_that_is_killed_is_replaced(workers: Workers, tmp_path: Path) -> None:
    for _ in range(3):
        assert ask(workers, hostile.sound("JPEG"), tmp_path) == "JPEG"
        workers._idle[0]._process.kill()
    assert ask(workers, hostile.sound("GIF"), tmp_path) == "GIF"
    assert workers.started == 4


def test_one_that_may_not_be_killed_ends_by_itself(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root without CAP_KILL may not signal a process of another user."""

    def refuse(process: "subprocess.Popen[bytes]") -> None:
        raise PermissionError

    ask(workers, hostile.sound("PNG"), tmp_path)
    process = workers._idle[0]._process
    monkeypatch.setattr(subprocess.Popen, "kill", refuse)
    workers.rest()
    assert process.poll() == 0
    assert ask(workers, hostile.sound("PNG"), tmp_path) == "PNG"


def test_one_that_hangs_is_replaced(tmp_path: Path) -> None:
    pool = Workers(1, picture_s=0.5)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    # Both ends: reading waits for ever, as from a disk that does not answer.
    fd = os.open(fifo, os.O_RDWR)
    try:
        with pytest.raises(Refused, match="took longer than"):
            pool.describe(fd)
        pool._picture_s = 60
        assert ask(pool, hostile.sound("PNG"), tmp_path) == "PNG"
        assert pool.started == 3
    finally:
        os.close(fd)
        pool.close()


def test_it_is_relieved_after_its_share(tmp_path: Path) -> None:
    pool = Workers(1, share=2)
    for _ in range(5):
        assert ask(pool, hostile.sound("PNG"), tmp_path) == "PNG"
    assert pool.started == 3
    pool.close()


def test_hostile_files_have_a_reason_and_no_effect(workers: Workers, tmp_path: Path) -> None:
    for name, data in hostile.malformed(60, 7):
        answer = ask(workers, data, tmp_path)
        assert answer, name
        assert answer.isprintable(), name
    assert ask(workers, hostile.sound("PNG"), tmp_path) == "PNG"


def test_closing_ends_all_and_tells_who_waits(tmp_path: Path) -> None:
    pool = Workers(1)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    fd = os.open(fifo, os.O_RDWR)
    told: list[BaseException] = []

    def wait() -> None:
        try:
            pool.describe(fd)
        except Unavailable as error:
            told.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    pool.close()
    waiting.join(30)
    assert len(told) == 1
    with pytest.raises(Unavailable):
        pool.describe(fd)
    os.close(fd)
