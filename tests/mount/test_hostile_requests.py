"""Whatever is said to the control socket of a live mount: it is answered, or not, and the mount goes on serving."""

import json
import random
import socket
from contextlib import suppress

import pytest

from tests.support.flavours import ONE_FLAVOUR
from tests.support.fuzz import FACTOR
from tests.support.mounted import Mounted
from tests.support.trees import photograph, shared_copies

ROUNDS = 150 * FACTOR

_COMMANDS = ["status", "settle", "scan", "restore", "duplicates", "umount", "", "__class__", "\udcff"]
_VALUES: list[object] = [
    *(None, True, -1, 2**70, 1e308, "", ".", "..", "/", "nothing", "../../etc/passwd", ".dedupfs", ".dedupfs/format"),
    *("a\0b", "x" * 5000, "/" * 300, "\udcff", [], {}, [[]], ["\0"], [None], [{"path": 1}], ["nothing", 3]),
]


def _json(rng: random.Random) -> bytes:
    request: dict[str, object] = {"command": rng.choice(_COMMANDS)}
    for name in ("path", "paths", "command" if rng.random() < 0.1 else "x"):
        if rng.random() < 0.7:
            request[name] = rng.choice(_VALUES)
    return json.dumps(request).encode()


def _broken(rng: random.Random) -> bytes:
    line = bytearray(_json(rng))
    for _ in range(rng.randrange(1, 4)):
        line[rng.randrange(len(line))] = rng.randrange(256)
    return bytes(line[: rng.randrange(len(line) + 1)])


def _any_bytes(rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice([0, 1, 10, 1000, 100_000]))


def _deep(rng: random.Random) -> bytes:
    return rng.choice([b"[", b'{"command":', b"[[{}],"]) * rng.randrange(1, 50_000)


def _ask(path: str, request: bytes, *, ended: bool) -> list[dict[str, object]]:
    """The lines of the answer."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(path)
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(request + b"\n" * ended)
            connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as file, suppress(ConnectionResetError):
            return [json.loads(line) for line in file]
    return []


@pytest.mark.timeout(300 * FACTOR)
@ONE_FLAVOUR
def test_anything_is_said_to_a_live_mount(mounted: Mounted, rng: random.Random) -> None:
    content = photograph().read_bytes()
    first, *_ = shared_copies(mounted, content)
    path = mounted.xattr("", "control").decode()
    answered = refused = 0
    for number in range(ROUNDS):
        request = rng.choice([_json, _json, _broken, _any_bytes, _deep])(rng)
        for line in _ask(path, request, ended=rng.random() < 0.8):
            # 70 is a bug; what the system refused, and a mistake of the client's, are not
            assert line.get("exit_code", 0) in (0, 64, 66, 71), (request[:200], line)
            answered += "result" in line
            refused += "error" in line
        if number % 50 == 0:
            assert first.read_bytes() == content
            assert mounted.status()["pending"] == 0
    print(f"{ROUNDS} requests: {answered} answered, {refused} refused")
    assert answered
    assert refused
    assert first.read_bytes() == content


@ONE_FLAVOUR
def test_clients_that_say_nothing_and_do_not_go(mounted: Mounted) -> None:
    """Hundreds of connections at once keep neither apps nor the command line from being served."""
    content = photograph().read_bytes()
    first, *_ = shared_copies(mounted, content)
    path = mounted.xattr("", "control").decode()
    idle = []
    try:
        for _ in range(200):
            connection = socket.socket(socket.AF_UNIX)
            idle.append(connection)
            connection.connect(path)
        assert mounted.status()["files"] == 3
        assert first.read_bytes() == content
    finally:
        for connection in idle:
            connection.close()
