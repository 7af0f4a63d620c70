"""One process that does random I/O to files of a directory and checks every byte against what it remembers.

    python -m tests.random.exerciser DIRECTORY NAME SEED SECONDS

What it does depends on the seed alone, not on time, so that the same seed does the same again; when it happens does
not. It writes, resizes, maps, copies and reopens one file of its own; it keeps copies of earlier states of it, which
must stay as they are; and now and then its file becomes one of a few contents that all processes have in common, so
that files are shared while others are taken apart. Prints what its files must contain at the end, as JSON of path and
digest; on the first wrong byte it tells the last operations and exits with 1.
"""

import json
import mmap
import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import xxhash

from tests.support import syscalls
from tests.support.syscalls import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE

_LARGEST_BYTES = 256 << 10
_MOST_COPIES = 4


def common_contents() -> list[bytes]:
    """What every process's file is now and then."""
    noise = random.Random(20)
    base = noise.randbytes(_LARGEST_BYTES)
    return [
        base,
        base[:-1] + b"!",
        base[:4096],
        base[:100_001],
        bytes(65536),
        base[:8192] + bytes(20_000) + base[:8192],
    ]


class Wrong(Exception):
    """Something reads differently from what was written."""


class Exerciser:
    """One file, what it must contain, and the copies made of it."""

    def __init__(self, directory: Path, name: str, rng: random.Random) -> None:
        self._path = directory / name
        self._rng = rng
        self._contents = common_contents()
        self._model = bytearray()
        self._copies: dict[Path, bytes] = {}
        self._number = 0
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self.log: deque[str] = deque(maxlen=40)
        self._operations: list[tuple[int, Callable[[], None]]] = [
            (10, self.read),
            (10, self.write),
            (3, self.append),
            (3, self.truncate),
            (4, self.write_mapped),
            (3, self.read_mapped),
            (3, self.copy_within),
            (2, self.allocate),
            (2, self.punch),
            (2, self.sync),
            (8, self.reopen),
            (4, self.check_path),
            (6, self.become_common),
            (3, self.become_common_in_place),
            (5, self.copy),
            (5, self.check_copy),
            (2, self.drop_copy),
            (2, self.replace_by_copy),
            (3, self.ask),
        ]

    def step(self) -> None:
        operations = [operation for _, operation in self._operations]
        weights = [weight for weight, _ in self._operations]
        self._rng.choices(operations, weights)[0]()

    def finish(self) -> dict[str, str]:
        """Check everything once more. Answers the digest of each file."""
        os.close(self._fd)
        self._compare_file(self._path, bytes(self._model))
        for path, content in self._copies.items():
            self._compare_file(path, content)
        everything = {self._path: bytes(self._model), **self._copies}
        return {os.fspath(path): xxhash.xxh3_128_hexdigest(content) for path, content in everything.items()}

    # -- checking

    def _compare(self, what: str, found: bytes, expected: bytes, offset: int = 0) -> None:
        if found == expected:
            return
        shorter = min(len(found), len(expected))
        first = next((i for i in range(shorter) if found[i] != expected[i]), shorter)
        wrong = sum(a != b for a, b in zip(found, expected, strict=False))
        raise Wrong(
            f"{what}: {len(found)} bytes at {offset}, expected {len(expected)}; {wrong} bytes differ, "
            f"the first at {offset + first}: {found[first : first + 8]!r} for {expected[first : first + 8]!r}"
        )

    def _compare_file(self, path: Path, expected: bytes) -> None:
        """By a descriptor of its own, and as the filesystem has it."""
        fd = os.open(path, os.O_RDONLY)
        try:
            if self._rng.random() < 0.5:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            size = os.fstat(fd).st_size
            if size != len(expected):
                raise Wrong(f"{path.name} has {size} bytes instead of {len(expected)}")
            self._compare(path.name, _pread(fd, 0, size + 1), expected)
        finally:
            os.close(fd)

    # -- the file

    def _place(self, *, beyond: int = 0) -> tuple[int, int]:
        """A random offset and length, inside the file or up to so many bytes beyond its end."""
        end = min(len(self._model) + beyond, _LARGEST_BYTES)
        offset = self._rng.choice([0, self._rng.randrange(end + 1), self._rng.randrange(end + 1) & ~4095])
        longest = max(0, end - offset)
        return offset, self._rng.choice([min(longest, 4096), self._rng.randrange(longest + 1)])

    def _put(self, offset: int, data: bytes) -> None:
        if not data:
            return
        if offset > len(self._model):
            self._model += bytes(offset - len(self._model))
        self._model[offset : offset + len(data)] = data

    def _data(self, length: int) -> bytes:
        common = self._rng.choice(self._contents)
        if self._rng.random() < 0.3 and length <= len(common):
            return common[:length]
        return self._rng.randbytes(length)

    def read(self) -> None:
        offset, length = self._place(beyond=10_000)
        self.log.append(f"read {length} at {offset}")
        self._compare("read", _pread(self._fd, offset, length), bytes(self._model[offset : offset + length]), offset)

    def write(self) -> None:
        offset, length = self._place(beyond=20_000)
        self.log.append(f"write {length} at {offset}")
        data = self._data(length)
        _pwrite(self._fd, offset, data)
        self._put(offset, data)

    def append(self) -> None:
        data = self._data(min(self._rng.randrange(5000), _LARGEST_BYTES - len(self._model)))
        self.log.append(f"append {len(data)} to {len(self._model)}")
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            count = os.write(fd, data)
        finally:
            os.close(fd)
        if count != len(data):
            raise Wrong(f"{count} bytes appended instead of {len(data)}")
        self._put(len(self._model), data)

    def truncate(self) -> None:
        size = self._rng.choice([0, 4096, self._rng.randrange(_LARGEST_BYTES), self._rng.randrange(_LARGEST_BYTES)])
        by_path = self._rng.random() < 0.5
        self.log.append(f"truncate to {size}{' by path' * by_path}")
        if by_path:
            os.truncate(self._path, size)
        else:
            os.ftruncate(self._fd, size)
        del self._model[size:]
        self._model += bytes(size - len(self._model))

    def write_mapped(self) -> None:
        offset, length = self._place()
        if not length:
            return
        data = self._data(length)
        how = self._rng.randrange(3)
        self.log.append(f"write {length} at {offset} mapped, {('unmap', 'flush', 'close before')[how]}")
        fd = os.open(self._path, os.O_RDWR) if how == 2 else self._fd
        with closing(mmap.mmap(fd, len(self._model))) as mapping:
            if how == 2:
                os.close(fd)
            mapping[offset : offset + length] = data
            if how == 1:
                mapping.flush()
        self._put(offset, data)

    def read_mapped(self) -> None:
        if not self._model:
            return
        self.log.append("read mapped")
        with closing(mmap.mmap(self._fd, len(self._model), prot=mmap.PROT_READ)) as mapping:
            self._compare("mapped", mapping[:], bytes(self._model))

    def copy_within(self) -> None:
        half = len(self._model) // 2
        length = self._rng.randrange(half + 1)
        if not length:
            return
        source = self._rng.randrange(half - length + 1)
        target = half + self._rng.randrange(half - length + 1)
        self.log.append(f"copy {length} from {source} to {target}")
        done = 0
        while done < length:
            count = os.copy_file_range(self._fd, self._fd, length - done, source + done, target + done)
            if not count:
                raise Wrong(f"copy_file_range copied {done} bytes of {length}")
            done += count
        self._put(target, bytes(self._model[source : source + length]))

    def allocate(self) -> None:
        offset, length = self._place(beyond=20_000)
        if not length:
            return
        mode = self._rng.choice([0, FALLOC_FL_KEEP_SIZE])
        self.log.append(f"allocate {length} at {offset}, mode {mode}")
        syscalls.fallocate(self._fd, mode, offset, length)
        if not mode and offset + length > len(self._model):
            self._model += bytes(offset + length - len(self._model))

    def punch(self) -> None:
        offset, length = self._place()
        if not length:
            return
        mode = self._rng.choice([FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE]) | FALLOC_FL_KEEP_SIZE
        self.log.append(f"zero {length} at {offset}, mode {mode}")
        syscalls.fallocate(self._fd, mode, offset, length)
        self._put(offset, bytes(length))

    def sync(self) -> None:
        self.log.append("fsync")
        os.fsync(self._fd)
        if self._rng.random() < 0.5:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def reopen(self) -> None:
        """Closed, it may be shared; how far that gets is random."""
        pause_s = self._rng.choice([0, 0, 0.01, 0.03, 0.1])
        self.log.append(f"reopen after {pause_s} s")
        os.close(self._fd)
        time.sleep(pause_s)
        self._fd = os.open(self._path, os.O_RDWR)

    def check_path(self) -> None:
        self.log.append("check")
        self._compare_file(self._path, bytes(self._model))

    def ask(self) -> None:
        """Which settles it, in the midst of everything."""
        self.log.append("ask")
        os.close(self._fd)
        digest = os.getxattr(self._path, "user.dedupfs.digest").decode()
        expected = xxhash.xxh3_128_hexdigest(self._model)
        if digest != expected:
            again = os.getxattr(self._path, "user.dedupfs.digest").decode()
            self._compare_file(self._path, bytes(self._model))
            raise Wrong(f"user.dedupfs.digest is {digest} instead of {expected} (then {again}), its bytes are right")
        self._fd = os.open(self._path, os.O_RDWR)

    def become_common(self) -> None:
        number = self._rng.randrange(len(self._contents))
        self.log.append(f"become {number}")
        os.close(self._fd)
        self._model[:] = self._contents[number]
        self._path.write_bytes(self._model)
        time.sleep(self._rng.choice([0, 0.03, 0.06]))
        self._fd = os.open(self._path, os.O_RDWR)

    def become_common_in_place(self) -> None:
        number = self._rng.randrange(len(self._contents))
        content = self._contents[number]
        self.log.append(f"become {number} in place")
        position = 0
        while position < len(content):
            length = self._rng.randrange(1, 131_072)
            _pwrite(self._fd, position, content[position : position + length])
            position += length
        os.ftruncate(self._fd, len(content))
        self._model[:] = content

    # -- copies of it

    def copy(self) -> None:
        if len(self._copies) >= _MOST_COPIES:
            return
        self._number += 1
        path = self._path.with_name(f"{self._path.name}.copy-{self._number}")
        self.log.append(f"copy to {path.name}")
        with open(self._path, "rb") as source, open(path, "xb") as target:
            done = 0
            while count := os.copy_file_range(source.fileno(), target.fileno(), 1 << 30):
                done += count
        if done != len(self._model):
            raise Wrong(f"{done} bytes were copied instead of {len(self._model)}")
        self._copies[path] = bytes(self._model)

    def _some_copy(self) -> Path | None:
        return self._rng.choice(sorted(self._copies)) if self._copies else None

    def check_copy(self) -> None:
        path = self._some_copy()
        if path is not None:
            self.log.append(f"check {path.name}")
            self._compare_file(path, self._copies[path])

    def drop_copy(self) -> None:
        path = self._some_copy()
        if path is not None:
            self.log.append(f"unlink {path.name}")
            path.unlink()
            del self._copies[path]

    def replace_by_copy(self) -> None:
        """What an editor does to save; the old file is still open then, and still read."""
        path = self._some_copy()
        if path is None:
            return
        self.log.append(f"rename {path.name}")
        path.rename(self._path)
        self._compare("unlinked", _pread(self._fd, 0, _LARGEST_BYTES + 1), bytes(self._model))
        self._model[:] = self._copies.pop(path)
        os.close(self._fd)
        self._fd = os.open(self._path, os.O_RDWR)


def _pread(fd: int, offset: int, length: int) -> bytes:
    parts = []
    while length and (part := os.pread(fd, length, offset)):
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return b"".join(parts)


def _pwrite(fd: int, offset: int, data: bytes) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def main(directory: str, name: str, seed: str, seconds: str) -> int:
    exerciser = Exerciser(Path(directory), name, random.Random(seed))
    deadline = time.monotonic() + float(seconds)
    steps = 0
    try:
        while time.monotonic() < deadline:
            exerciser.step()
            steps += 1
        digests = exerciser.finish()
    except (Wrong, OSError) as problem:
        print(*exerciser.log, f"{name}, step {steps}: {problem}", sep="\n", file=sys.stderr)
        return 1
    print(json.dumps({"steps": steps, "digests": digests}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
