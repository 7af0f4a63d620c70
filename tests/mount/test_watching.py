"""Who watches a mount is told what is found as it is found, at his own pace, and holds up nobody."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
from PIL import ImageDraw

from tests.mount.test_pictures import camera_exif, jpeg, picture
from tests.support.flavours import ONE_FLAVOUR
from tests.support.mounted import REPOSITORY, Mounted, dedupfs
from tests.support.tools import USER, needs_root

pytestmark = pytest.mark.either_way

PATIENCE_S = 60.0


class Watcher:
    """A running `dedupfs watch`."""

    def __init__(self, mountpoint: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dedupfs", "watch", mountpoint],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._errors = ""
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,))
        self._reader.start()
        assert b"watching" in self.process.stderr.readline()

    def _read(self, stdout: IO[bytes]) -> None:
        for line in stdout:
            self._lines.put(line)

    def next(self) -> dict[str, Any]:
        event = json.loads(self._lines.get(timeout=PATIENCE_S))
        assert isinstance(event, dict)
        assert event.pop("at").endswith("Z")
        return event

    def end(self, signal_number: int = signal.SIGINT) -> tuple[int, str]:
        """Its exit code, and what it says last."""
        self.process.send_signal(signal_number)
        return self.ended()

    def ended(self) -> tuple[int, str]:
        assert self.process.stderr is not None
        self._errors += self.process.stderr.read().decode()
        self._reader.join()
        return self.process.wait(PATIENCE_S), self._errors


@contextmanager
def watching(mounted: Mounted) -> Iterator[Watcher]:
    watcher = Watcher(mounted.mountpoint)
    try:
        yield watcher
    finally:
        with watcher.process:  # closes its pipes
            watcher.end(signal.SIGKILL)


@ONE_FLAVOUR
def test_what_is_told(mounted: Mounted) -> None:
    image = picture()
    original = jpeg(image, 95, exif=camera_exif())
    mounted.path("a.jpg").write_bytes(original)
    mounted.settle()
    with watching(mounted) as one, watching(mounted) as other:
        mounted.path("b.jpg").write_bytes(original)
        event = one.next()
        assert len(event.pop("digest")) == 32
        assert event == {"event": "duplicate", "path": "b.jpg", "copies": 2, "duplicates": ["a.jpg"]}

        mounted.path("small.jpg").write_bytes(jpeg(image.resize((400, 300)), 80))
        event = one.next()
        assert (event["event"], event["path"]) == ("near-duplicate", "small.jpg")
        assert {(each["path"], each["relation"]) for each in event["similar"]} == {
            ("a.jpg", "resized"),
            ("b.jpg", "resized"),
        }

        changed = image.copy()
        ImageDraw.Draw(changed).rectangle((60, 60, image.width // 3, image.height // 3), fill="black")
        mounted.path("changed.jpg").write_bytes(jpeg(changed, 90, exif=camera_exif()))
        assert one.next()["event"] == "near-duplicate"
        event = one.next()
        assert (event["event"], event["path"]) == ("conflict", "changed.jpg")
        assert {each["path"] for each in event["conflicts"]} == {"a.jpg", "b.jpg"}
        assert {each["claim"] for each in event["conflicts"]} == {"taken 2026-01-02T03:04:05.25 by Model"}

        # a further file of a picture that is in conflict
        mounted.path("c.jpg").write_bytes(original)
        assert one.next()["duplicates"] == ["a.jpg", "b.jpg"]
        event = one.next()
        assert (event["event"], event["path"]) == ("conflict", "c.jpg")
        assert [each["path"] for each in event["conflicts"]] == ["changed.jpg"]

        assert [other.next()["event"] for _ in range(6)] == [
            "duplicate",
            "near-duplicate",
            "near-duplicate",
            "conflict",
            "duplicate",
            "conflict",
        ]
        code, errors = one.end()
        assert (code, errors.splitlines()[-1]) == (130, "dedupfs: interrupted")


@ONE_FLAVOUR
def test_what_is_no_news_is_not_told(mounted: Mounted) -> None:
    """Attributes, names, and files that become references because another one came."""
    for name in ("a", "b"):
        mounted.path(name).write_bytes(b"the same" * 1000)
    mounted.settle()
    with watching(mounted) as watcher:
        mounted.path("a").chmod(0o600)
        mounted.path("a").rename(mounted.path("c"))
        mounted.settle()
        mounted.run("scan", mounted.mountpoint)
        mounted.path("new").write_bytes(b"the same" * 1000)
        event = watcher.next()
        assert (event["path"], sorted(event["duplicates"])) == ("new", ["b", "c"])


@ONE_FLAVOUR
def test_a_file_that_is_renamed_at_once(mounted: Mounted) -> None:
    """As upload programs do: whatever name it had when it was settled, the one that is told leads to it."""
    data = b"the same" * 1000
    mounted.path("first").write_bytes(data)
    mounted.settle()
    with watching(mounted) as watcher:
        for number in range(50):
            mounted.path("upload.part").write_bytes(data)
            mounted.path("upload.part").rename(mounted.path(f"{number}.jpg"))
        mounted.settle()
        told = [watcher.next() for _ in range(50)]
    assert {event["event"] for event in told} == {"duplicate"}
    # Each is told once, under the name that it had just then.
    paths = [event["path"] for event in told if event["path"] != "upload.part"]
    assert len(set(paths)) == len(paths)
    assert set(paths) <= {f"{number}.jpg" for number in range(50)}


def connected(mounted: Mounted) -> socket.socket:
    """A watcher that has begun, and has read nothing since."""
    listener = socket.socket(socket.AF_UNIX)
    listener.settimeout(PATIENCE_S)
    listener.connect(os.fsdecode(mounted.xattr("", "control")))
    listener.sendall(b'{"command": "watch"}\n')
    assert b"progress" in listener.recv(100)
    return listener


@ONE_FLAVOUR
def test_one_that_does_not_read_holds_up_nobody_and_is_told_what_it_missed(mounted: Mounted) -> None:
    data = b"the same" * 100
    count = 3000
    folder = mounted.path("a folder" * 25)
    folder.mkdir()
    with connected(mounted) as slow, watching(mounted) as watcher:
        # Long names, so that a few thousand lines are more than is kept.
        for number in range(count):
            (folder / f"{number:0240}").write_bytes(data)
        mounted.settle()
        told = [watcher.next() for _ in range(count - 1)]
        assert {event["event"] for event in told} == {"duplicate"}
        assert told[-1]["copies"] >= told[0]["copies"]

        with slow.makefile("rb") as lines:
            events: list[dict[str, Any]] = []
            while not events or events[-1]["event"] == "duplicate":
                events.append(json.loads(lines.readline())["event"])
            kept, missed = len(events) - 1, events[-1]
            assert missed["event"] == "missed"
            assert kept + missed["count"] == count - 1
            assert missed["count"] > 0
            # and from now on it is told again
            mounted.path("one more").write_bytes(data)
            assert json.loads(lines.readline())["event"]["path"] == "one more"


@ONE_FLAVOUR
def test_one_that_dies_is_forgotten(mounted: Mounted) -> None:
    assert connections_of(mounted) == 1  # where it listens
    with watching(mounted) as watcher:
        assert connections_of(mounted) == 2
        watcher.end(signal.SIGKILL)
        wait_for(lambda: connections_of(mounted) == 1)
    mounted.path("file").write_bytes(b"data")
    mounted.settle()


def connections_of(mounted: Mounted) -> int:
    """How many sockets at the control socket's path the daemon has: the one that listens, and those of requests."""
    path = os.fsdecode(mounted.xattr("", "control"))
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    inodes = {row[6] for row in rows if row[7:] == [path]}
    found = 0
    for fd in Path(f"/proc/{mounted.pid}/fd").iterdir():
        try:
            found += os.readlink(fd).removeprefix("socket:[").removesuffix("]") in inodes
        except FileNotFoundError:
            continue
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


@ONE_FLAVOUR
def test_the_end_of_the_mount_ends_it(mounted: Mounted) -> None:
    for stop in (mounted.unmount, mounted.kill):
        with watching(mounted) as watcher, connected(mounted):
            stop()
            code, errors = watcher.ended()
            assert code == 67
            assert errors.count("\n") == 1, errors
            mounted.start()


@needs_root
@ONE_FLAVOUR
def test_only_for_whom_the_mount_answers(mounted: Mounted) -> None:
    assert dedupfs("watch", mounted.mountpoint, exit_code=None, user=USER).exit_code == 71


@ONE_FLAVOUR
def test_a_mount_that_is_read_only_has_nothing_to_tell(mounted: Mounted) -> None:
    mounted.restart("share=reference", "ro")
    assert "read-only" in mounted.run("watch", mounted.mountpoint, exit_code=69).stderr
