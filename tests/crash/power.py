"""Three ways to lose power under a mount on which apps work, and the look at what is left of it.

*shutdown*: the backing filesystem is stopped by ioctl, what its journal holds in memory is lost, and with it all data
that had not been written back. *snapshot*: the image of its block device lies on XFS, where a reflink copy of it is one
instant; what the filesystem had sent to the device is there, in the order in which it was sent. *cut*: the device has a
write cache, of which everything or any part is lost (tests/support/disk.py).
"""

import contextlib
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.support.disk import disk
from tests.support.filesystems import make_filesystem, mounted_device, run
from tests.support.mounted import AFTER_A_KILL, REPOSITORY, Mounted

from .durable import Promises, Seen
from .syncing import DIRECTORIES

WAYS = ("shutdown", "snapshot", "cut")
WRITERS = ("one", "two", "three")

_IMAGE_BYTES = 512 << 20
_SOURCE = "source"
_REFERENCE = "trusted.dedupfs.ref"

# The journal is written twice as often as by default or more, so that what was never fsynced gets to the disk, too; and
# ext4 is kept from flushing what is renamed over another file or rewritten, which hides mistakes.
_OPTIONS = {"ext4": "commit=1,noauto_da_alloc", "xfs": "nouuid", "btrfs": "commit=1"}

# What was edited in place and not fsynced may have lost its bytes and kept its times, by which the index knows it.
_LOST = r"WARNING .* has other bytes than when it was hashed"


@dataclass(frozen=True, slots=True)
class Loss:
    """One loss of power: the image that is left, and how long each ledger was shortly before and after."""

    image: Path
    before: tuple[int, ...]
    until: tuple[int, ...]


class _Load:
    """The writers, at work."""

    def __init__(self, mountpoint: Path, scratch: Path, rng: random.Random) -> None:
        self.ledgers = [scratch / f"{name}.ledger" for name in WRITERS]
        self._processes = []
        for number, (name, ledger) in enumerate(zip(WRITERS, self.ledgers, strict=True), start=1):
            ledger.touch()
            for directory in DIRECTORIES:
                (mountpoint / name / directory).mkdir()
            for path in (mountpoint / name, mountpoint):
                fd = os.open(path, os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)
            arguments = [os.fspath(mountpoint / name), os.fspath(ledger), f"{rng.random()}", f"{number << 24}"]
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.crash.syncing", *arguments],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    cwd=REPOSITORY,
                    env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
                )
            )

    def lengths(self) -> tuple[int, ...]:
        return tuple(ledger.stat().st_size for ledger in self.ledgers)

    def wait_until_written(self, lines: int) -> None:
        """Until each writer has written so many lines, or ended."""
        deadline = time.monotonic() + 60
        for process, ledger in zip(self._processes, self.ledgers, strict=True):
            while ledger.read_bytes().count(b"\n") < lines and process.poll() is None:
                assert time.monotonic() < deadline, f"{ledger.name} does not grow"
                time.sleep(0.02)

    def stop(self, *, may_fail: bool) -> int:
        """The number of calls."""
        calls = 0
        for process, name in zip(self._processes, WRITERS, strict=True):
            out, _ = process.communicate(timeout=60)
            assert process.returncode == 0, f"{name} ended with {process.returncode}"
            answer = json.loads(out)
            assert may_fail or answer["error"] is None, f"{name}: {answer['error']}"
            calls += answer["calls"]
        return calls


class Bench:
    """Loses power again and again, and holds what is left against what was promised."""

    def __init__(self, scratch: Path, way: str, kind: str, strategy: str) -> None:
        """`scratch`: a directory that is made, on XFS for snapshots."""
        self._scratch = scratch
        self._way, self._kind, self._strategy = way, kind, strategy
        self.losses = self.calls = self.certain = self.references = 0

    def run(self, rounds: int, ledgers: Path, rng: random.Random) -> None:
        """One load, on a new filesystem, with at most so many losses of power. `ledgers`: a directory elsewhere.

        Raises AssertionError with everything that is not as it was promised.
        """
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir()
        load, losses = self._lose(rounds, ledgers, rng)
        for number, loss in enumerate(losses):
            found = self._look(loss, load.ledgers)
            assert not found, f"loss {number} of {len(losses)} by {self._way}:\n" + "\n".join(found)
            loss.image.unlink()
            self.losses += 1

    def _lose(self, rounds: int, ledgers: Path, rng: random.Random) -> tuple[_Load, list[Loss]]:
        image = self._scratch / "live.image"
        image.touch()
        os.truncate(image, _IMAGE_BYTES)
        make_filesystem(self._kind, image)
        root = self._scratch / "live"
        root.mkdir()
        losses: list[Loss] = []
        with contextlib.ExitStack() as stack:
            device = image
            if self._way == "cut":
                volatile = stack.enter_context(disk(image))
                device = volatile.device
            stack.enter_context(mounted_device(self._kind, device, root, _OPTIONS[self._kind]))
            mounted = Mounted(
                root / _SOURCE, self._scratch / "mount", options=[f"share={self._strategy}"], watchdog_s=240
            ).start()
            try:
                load = _Load(mounted.mountpoint, ledgers, rng)
                load.wait_until_written(20)
                while len(losses) < rounds:
                    time.sleep(rng.uniform(0.05, 0.5))
                    target = self._scratch / f"{len(losses)}.image"
                    before = load.lengths()
                    if self._way == "snapshot":
                        copied = run("cp", "--reflink=always", image, target)
                        assert not copied.returncode, copied.stderr
                    elif self._way == "cut":
                        volatile.cut(target, f"{rng.random()}")
                    else:
                        flag = ["-f"] if rng.random() < 0.3 else []
                        done = run("xfs_io", "-x", "-c", " ".join(["shutdown", *flag]), root)
                        assert not done.returncode, done.stderr
                        mounted.kill()
                        self.calls += load.stop(may_fail=True)
                        return load, [Loss(image, before, load.lengths())]
                    losses.append(Loss(target, before, load.lengths()))
                self.calls += load.stop(may_fail=False)
            finally:
                if self._way == "shutdown":
                    # Nothing of it can be read any more.
                    mounted.release()
                else:
                    mounted.finish()
        image.unlink()
        return load, losses

    def _look(self, loss: Loss, ledgers: list[Path]) -> list[str]:
        root = self._scratch / "recovered"
        root.mkdir(exist_ok=True)
        promises = {
            name: Promises(ledger, before, until)
            for name, ledger, before, until in zip(WRITERS, ledgers, loss.before, loss.until, strict=True)
        }
        self.certain += sum(each.certain_count() for each in promises.values())
        with mounted_device(self._kind, loss.image, root, _OPTIONS[self._kind]):
            source = root / _SOURCE
            references = _references(source)
            self.references += len(references)
            mounted = Mounted(
                source,
                self._scratch / "mount",
                options=[f"share={self._strategy}"],
                expected_log=[*AFTER_A_KILL, _LOST],
                watchdog_s=120,
            )
            problems: list[str] = []
            try:
                mounted.start()
                for settled in (False, True):
                    if settled:
                        mounted.settle()
                    for name, each in promises.items():
                        own = {path.removeprefix(f"{name}/") for path in references if path.startswith(f"{name}/")}
                        found = each.check(_tree(mounted.path(name)), own, settled=settled)
                        when = "settled" if settled else "mounted again"
                        problems += [f"{when}: {name}: {problem}" for problem in found]
                        if found:
                            problems.append(f"what {name} did last:\n{each.tail()}")
            except OSError as error:
                problems.append(f"{error}\n{mounted.log()}")
            try:
                mounted.finish()
            except AssertionError as error:
                problems.append(str(error))
            return problems


def _references(source: Path) -> set[str]:
    """The paths that are references, as the backing directory has them. An empty one is an empty file."""
    found = set()
    for directory, subdirectories, files in os.walk(source):
        if ".dedupfs" in subdirectories:
            subdirectories.remove(".dedupfs")
        for name in files:
            path = os.path.join(directory, name)
            if _REFERENCE in os.listxattr(path) and os.stat(path).st_size:
                found.add(os.path.relpath(path, source))
    return found


def _tree(root: Path) -> dict[str, Seen]:
    seen = {}
    for directory, _, files in os.walk(root, onerror=_raise):
        for name in files:
            path = os.path.join(directory, name)
            with open(path, "rb") as file:
                data, st = file.read(), os.fstat(file.fileno())
            seen[os.path.relpath(path, root)] = Seen(data, stat.S_IMODE(st.st_mode), st.st_mtime_ns)
    return seen


def _raise(error: OSError) -> None:
    raise error
