"""Sixteen clients at work on one mount: every byte is what its owner wrote, and nothing is left behind.

A minute, or `DEDUPFS_LOAD_MINUTES` with either way of sharing. The seed decides what each client does, not how they
come between each other; DEDUPFS_SEED repeats it.
"""

import os
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dedupfs import fusefs
from tests.support.flavours import BOTH_STRATEGIES, ONE_FLAVOUR
from tests.support.mounted import REPOSITORY, Mounted
from tests.support.photos import photographs

CLIENTS = 16
MINUTES = float(os.environ.get("DEDUPFS_LOAD_MINUTES", "0"))
LOAD_S = 60 * MINUTES or 54.0
WARM_UP_S = 6.0

_MASTERS = 12
_PATIENCE_S = 30.0
# Those that serve requests, which stay; and of settling, scanning, control and the like a few each.
_MOST_THREADS = fusefs._THREADS + 8
_MOST_GROWTH_BYTES = 48 << 20
# The index, the rest of each file's last block, and what the filesystem keeps for itself.
_MOST_UNACCOUNTED_BYTES = 16 << 20


def load(mounted: Mounted, directory: Path, seed: int, seconds: float, numbers: range) -> dict[str, bytes]:
    """What the clients leave. Fails with what any of them says."""
    directory.mkdir()
    clients = []
    for number in numbers:
        arguments = [str(mounted.mountpoint), str(number), str(seed), str(seconds), str(directory / str(number))]
        command = [sys.executable, "-m", "tests.mount.loading", *arguments]
        with open(directory / f"{number}.err", "wb") as stderr:
            clients.append(subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=stderr))
    failed = [number for number, client in zip(numbers, clients, strict=True) if client.wait() != 0]
    assert not failed, f"seed {seed}: " + "\n".join((directory / f"{n}.err").read_text()[-600:] for n in failed)
    calls, left = 0, {}
    for number in numbers:
        made, files = pickle.loads((directory / str(number)).read_bytes())
        calls += made
        left.update(files)
    print(f"seed {seed}: {len(numbers)} clients made {calls} calls in {seconds:.0f} s and left {len(left)} files")
    assert calls > 10 * len(numbers), "hardly anything was done"
    return left


class Daemon:
    """What a process of this id holds."""

    def __init__(self, pid: int) -> None:
        self._place = Path(f"/proc/{pid}")

    def descriptors(self) -> int:
        return len(os.listdir(self._place / "fd"))

    def threads(self) -> int:
        return len(os.listdir(self._place / "task"))

    def anonymous_bytes(self) -> int:
        """Memory that no file is behind: the pages of the index come and go as the kernel likes."""
        lines = (self._place / "status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def eventually(value: Callable[[], int], most: int) -> int:
    """The kernel tells of closes and forgets when it likes: the value when it came down, or did not."""
    deadline = time.monotonic() + _PATIENCE_S
    while (found := value()) > most and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def unaccounted_bytes(mounted: Mounted) -> int:
    """What the filesystem has no room for, beyond the contents that the mount speaks of. Among it are files that are
    gone, but not for somebody who has them open: the daemon, or the kernel by a backing id."""
    st, status = os.statvfs(mounted.source), mounted.status()
    content_bytes: int = status["logical_bytes"] - status["saved_bytes"]
    return (st.f_blocks - st.f_bfree) * st.f_frsize - content_bytes


def compare(mounted: Mounted, left: dict[str, bytes]) -> None:
    wrong = [path for path, content in left.items() if mounted.path(path).read_bytes() != content]
    assert not wrong, f"{len(wrong)} of {len(left)} files have other bytes: {wrong[:5]}"


@pytest.mark.timeout(300 + 60 * 2 * MINUTES)
@(BOTH_STRATEGIES if MINUTES else ONE_FLAVOUR)
def test_sixteen_clients(mounted: Mounted, tmp_path: Path, rng: random.Random) -> None:
    seed = rng.randrange(1 << 32)
    pictures = photographs(_MASTERS)
    for directory in ("masters", "inbox"):
        mounted.path(directory).mkdir()
    for number, picture in enumerate(pictures):
        mounted.path("masters", f"{number}.jpg").write_bytes(picture.read_bytes())
    daemon = Daemon(mounted.pid)
    left = load(mounted, tmp_path / "warm up", seed, WARM_UP_S, range(CLIENTS, 2 * CLIENTS))
    mounted.settle()
    descriptors, memory_bytes, disk_bytes = daemon.descriptors(), daemon.anonymous_bytes(), unaccounted_bytes(mounted)

    left |= load(mounted, tmp_path / "load", seed + 1, LOAD_S, range(CLIENTS))
    mounted.settle()
    compare(mounted, left)
    assert mounted.status()["pending"] == 0
    assert eventually(daemon.descriptors, descriptors) <= descriptors
    disk_bytes = eventually(lambda: unaccounted_bytes(mounted), disk_bytes + _MOST_UNACCOUNTED_BYTES) - disk_bytes
    print(f"{disk_bytes >> 10} KiB more than the contents came to lie on the disk")
    assert disk_bytes <= _MOST_UNACCOUNTED_BYTES
    threads = eventually(daemon.threads, _MOST_THREADS)
    assert threads <= _MOST_THREADS
    growth_bytes = daemon.anonymous_bytes() - memory_bytes
    print(f"{growth_bytes >> 10} KiB more, {threads} threads")
    assert growth_bytes < _MOST_GROWTH_BYTES, f"{growth_bytes >> 20} MiB more than after the warming up"
    for name in ("staging", "orphans", "quarantine"):
        assert os.listdir(mounted.store / name) == [], name

    status = mounted.status()
    names = sorted(os.fsdecode(path) for path in left)
    assert status["files"] == len(names) + len(pictures)
    assert status["logical_bytes"] == sum(map(len, left.values())) + sum(path.stat().st_size for path in pictures)
    assert status["saved_bytes"] > 0
    mounted.restart()
    compare(mounted, left)
    print(f"{status['references']} references")
