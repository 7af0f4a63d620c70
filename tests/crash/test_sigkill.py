"""The daemon is SIGKILLed at random instants while several programs write.

Each round: mount, let the writers work for a moment, kill the daemon, mount again, and hold every file against what
its writer was told: a call that had returned has happened, the one that the kill interrupted has happened or not, or
half where it would be so on any filesystem. Some rounds go on at once on what the kill has left, others first let
dedupfs put it in order and have fsck look. `DEDUPFS_KILLS` asks for so many on each filesystem; DEDUPFS_SEED repeats
the choices, the instants of course differ.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dedupfs.fsck import fsck
from tests.conftest import Mounts
from tests.support import photos
from tests.support.mounted import REPOSITORY, Mounted

from .ledger import Ledger
from .writers import PathApp

KILLS = int(os.environ.get("DEDUPFS_KILLS", "0"))
# Otherwise: enough on the filesystem that most have, some on each other way of sharing.
ROUNDS = {("reference", "ext4"): 50, ("reference", "xfs"): 8, ("reflink", "xfs"): 12}
WRITERS = ("upload", "field app", "scans")
PHOTOGRAPHS = 12
LARGEST_BYTES = 150_000


class WriterProcess:
    """A writer, for many rounds."""

    def __init__(self, name: str, pictures: list[Path], scratch: Path) -> None:
        self.name = name
        self._scratch = scratch
        self.ledger = scratch / f"{name}.0"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.writers", name, *pictures],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )

    def _order(self, *words: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words).encode() + b"\n")
        self._process.stdin.flush()

    def go(self, mountpoint: Path, number: int, seed: str) -> None:
        before = Ledger.load(self.ledger) if number else Ledger()
        uncertain = sorted({path for world in before.possible for path in world})
        self.ledger = self._scratch / f"{self.name}.{number + 1}"
        self._order("go", str(mountpoint), str(self.ledger), seed, uncertain)

    def wait(self, word: str) -> int:
        """Until it has begun ("ready") or the mount has died under it ("calls"). Answers the number it gives."""
        assert self._process.stdout is not None
        answer = json.loads(self._process.stdout.readline())
        assert word in answer, f"{self.name}: {answer}"
        return int(answer[word])

    def check(self, mountpoint: Path, *, looked_at: bool) -> list[str]:
        directory = os.open(mountpoint / self.name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            app = PathApp(directory, Ledger.load(self.ledger))
            return [f"{self.name}: {problem}" for problem in app.check(looked_at=looked_at)]
        finally:
            os.close(directory)

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[list[WriterProcess]]:
    pictures = [path for path in photos.photographs(40) if path.stat().st_size <= LARGEST_BYTES][:PHOTOGRAPHS]
    processes = [WriterProcess(name, pictures, tmp_path) for name in WRITERS]
    yield processes
    for process in processes:
        process.close()


def _escape(problems: list[str]) -> str:
    return "\n".join(problems).encode(errors="backslashreplace").decode()


def _fsck_is_clean(mounted: Mounted) -> None:
    report = fsck(os.fspath(mounted.source), repair=False, progress=lambda phase, done, total: None)
    assert report.findings == []


@pytest.mark.timeout(600 + 5 * KILLS)
@pytest.mark.parametrize("mounts", ROUNDS, indirect=True, ids="-".join)
def test_killed_while_writing(mounts: Mounts, writers: list[WriterProcess], rng: random.Random) -> None:
    rounds = KILLS or ROUNDS[mounts.strategy, mounts.filesystem.kind]
    over_itself = (mounts.strategy, mounts.filesystem.kind) == ("reference", "xfs")  # one of them, for a change
    mounted = mounts.new(over_itself=over_itself).start()
    for name in WRITERS:
        mounted.path(name).mkdir()

    def check(when: str, *, looked_at: bool) -> None:
        found = [problem for writer in writers for problem in writer.check(mounted.mountpoint, looked_at=looked_at)]
        assert not found, f"{when}:\n{_escape(found)}"

    calls = 0
    for number in range(rounds):
        for writer in writers:
            writer.go(mounted.mountpoint, number, f"{rng.random()}")
        for writer in writers:
            writer.wait("ready")
        time.sleep(rng.uniform(0.1, 0.4))
        mounted.kill()
        calls += sum(writer.wait("calls") for writer in writers)
        mounted.start()
        check(f"after kill {number}", looked_at=False)
        if rng.random() < 0.4:
            mounted.settle()
            check(f"after kill {number} and settling", looked_at=True)
            mounted.unmount()
            _fsck_is_clean(mounted)
            mounted.start()
    print(f"{rounds} kills, {calls} calls")
    assert calls > 100 * rounds, "the writers hardly came to write"
