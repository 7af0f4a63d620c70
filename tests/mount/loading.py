"""One client of a mount under load: a process that writes, copies, edits, reads, renames and deletes photographs.

It owns its files, knows every byte of them and believes none: whatever it reads it compares. Run as a program it works
for as long as it is told, looks at everything once more, and writes down what it leaves:

    python -m tests.mount.loading MOUNTPOINT NUMBER SEED SECONDS LEFT

MOUNTPOINT has a directory `masters`, which nobody changes, and one called `inbox`, in which all clients have files.
LEFT gets a pickled dict of paths, relative to the mount, and contents.
"""

import mmap
import os
import pickle
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

_MOST_FILES = 24
_WRITE_BYTES = 64 << 10


class Client:
    def __init__(self, mountpoint: Path, number: int, rng: random.Random) -> None:
        self._mountpoint, self._number, self._rng = mountpoint, number, rng
        self._masters = sorted((mountpoint / "masters").iterdir())
        self._photographs = [path.read_bytes() for path in self._masters]
        self._names = 0
        self._home = f"client {number}"
        self._directories = ["inbox", self._home, f"{self._home}/field", f"{self._home}/office"]
        self.files: dict[str, bytes] = {}
        self.calls = 0
        for directory in self._directories:
            (mountpoint / directory).mkdir(exist_ok=True)

    # --- what it does

    def write(self) -> None:
        """A new file, as an upload program does it: some bytes at a time, now and then with fsync."""
        path, content = self._new_path(), self._rng.choice(self._photographs)
        with open(self._at(path), "xb", buffering=0) as file:
            file.writelines(content[start : start + _WRITE_BYTES] for start in range(0, len(content), _WRITE_BYTES))
            if self._rng.random() < 0.1:
                os.fsync(file.fileno())
        self.files[path] = content

    def save(self) -> None:
        """As an editor saves: another file, renamed over the one that is there."""
        path, draft = self._any_path(), self._new_path()
        content = self._rng.choice(self._photographs)
        self._at(draft).write_bytes(content)
        os.rename(self._at(draft), self._at(path))
        self.files[path] = content

    def overwrite(self) -> None:
        path, content = self._any_path(), self._rng.choice(self._photographs)
        self._at(path).write_bytes(content)
        self.files[path] = content

    def copy(self) -> None:
        """copy_file_range of a master, or of a file of its own."""
        path, number = self._new_path(), self._rng.randrange(len(self._masters))
        source, content = self._masters[number], self._photographs[number]
        if self.files and self._rng.random() < 0.5:
            own = self._any_path()
            source, content = self._at(own), self.files[own]
        with open(source, "rb") as from_file, open(self._at(path), "xb") as to_file:
            left = len(content)
            while left:
                count = os.copy_file_range(from_file.fileno(), to_file.fileno(), left)
                if not count:
                    break
                left -= count
        self.files[path] = content

    def edit(self) -> None:
        """In place: for a shared file that means bytes of its own first."""
        path = self._any_path()
        content = bytearray(self.files[path])
        piece = self._rng.randbytes(self._rng.randrange(1, 5000))
        offset = self._rng.randrange(len(content) + 1)
        with open(self._at(path), "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), piece, offset)
            content[offset : offset + len(piece)] = piece
            self._compare(path, os.pread(file.fileno(), len(content) + 1, 0), bytes(content))
        self.files[path] = bytes(content)

    def revert(self) -> None:
        """Byte for byte what a master is, so that it is a duplicate once more."""
        path, content = self._any_path(), self._rng.choice(self._photographs)
        with open(self._at(path), "r+b", buffering=0) as file:
            for start in range(0, len(content), _WRITE_BYTES):
                os.pwrite(file.fileno(), content[start : start + _WRITE_BYTES], start)
            os.ftruncate(file.fileno(), len(content))
        self.files[path] = content

    def truncate(self) -> None:
        path = self._any_path()
        size_bytes = self._rng.randrange(len(self.files[path]) + 1) if self._rng.random() < 0.8 else 0
        os.truncate(self._at(path), size_bytes)
        self.files[path] = self.files[path][:size_bytes]

    def append(self) -> None:
        path, piece = self._any_path(), self._rng.randbytes(self._rng.randrange(1, 5000))
        with open(self._at(path), "ab", buffering=0) as file:
            file.write(piece)
        self.files[path] += piece

    def rename(self) -> None:
        old, new = self._any_path(), self._new_path()
        os.rename(self._at(old), self._at(new))
        self.files[new] = self.files.pop(old)

    def rename_directory(self) -> None:
        number = self._rng.randrange(2, len(self._directories))
        old, new = self._directories[number], f"{self._home}/folder {self._next()}"
        os.rename(self._at(old), self._at(new))
        self._directories[number] = new
        for path in [path for path in self.files if path.startswith(old + "/")]:
            self.files[new + path[len(old) :]] = self.files.pop(path)

    def delete(self) -> None:
        path = self._any_path()
        os.unlink(self._at(path))
        del self.files[path]

    def delete_while_open(self) -> None:
        path = self._any_path()
        content = self.files.pop(path)
        with open(self._at(path), "rb") as file:
            os.unlink(self._at(path))
            self._compare(path, file.read(), content)

    def read(self) -> None:
        path = self._any_path()
        self._compare(path, self._at(path).read_bytes(), self.files[path])
        st = os.stat(self._at(path))
        if st.st_size != len(self.files[path]):
            raise AssertionError(f"{path} says it has {st.st_size} bytes, not {len(self.files[path])}")

    def map(self) -> None:
        path = self._any_path()
        if not self.files[path]:
            return
        with open(self._at(path), "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
            self._compare(path, pages[:], self.files[path])

    def ask(self) -> None:
        """What dedupfs says of a file: itself is none of its duplicates."""
        path = self._any_path()
        if os.fsencode(path) in os.getxattr(self._at(path), "user.dedupfs.duplicates").split(b"\0"):
            raise AssertionError(f"{path} is a duplicate of itself")

    # --- how

    def work(self, seconds: float) -> None:
        calls: list[Callable[[], None]] = [self.write, self.copy]
        others = [
            *(self.save, self.overwrite, self.edit, self.revert, self.truncate, self.append, self.rename, self.read),
            *(self.rename_directory, self.delete, self.delete_while_open, self.read, self.map, self.ask, self.delete),
        ]
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if len(self.files) < 4 or (len(self.files) < _MOST_FILES and self._rng.random() < 0.4):
                self._rng.choice(calls)()
            else:
                self._rng.choice(others)()
            self.calls += 1

    def verify(self) -> None:
        for path, content in self.files.items():
            self._compare(path, self._at(path).read_bytes(), content)

    def leave(self) -> None:
        """Take everything away again."""
        for path in self.files:
            os.unlink(self._at(path))
        shutil.rmtree(self._at(self._home))

    def _at(self, path: str) -> Path:
        return self._mountpoint / path

    def _next(self) -> int:
        self._names += 1
        return self._names

    def _new_path(self) -> str:
        return f"{self._rng.choice(self._directories)}/{self._number}-{self._next()}.jpg"

    def _any_path(self) -> str:
        return self._rng.choice(sorted(self.files))

    def _compare(self, path: str, found: bytes, expected: bytes) -> None:
        if found == expected:
            return
        same = next((at for at, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), -1)
        raise AssertionError(
            f"client {self._number}, call {self.calls}: {path} has {len(found)} bytes, expected {len(expected)}; "
            f"they differ at {same if same >= 0 else min(len(found), len(expected))}"
        )


def main(mountpoint: str, number: str, seed: str, seconds: str, left: str) -> None:
    client = Client(Path(mountpoint), int(number), random.Random(f"{seed} {number}"))
    try:
        client.work(float(seconds))
        client.verify()
    except OSError as error:
        raise AssertionError(f"client {number}, call {client.calls}: {error}") from error
    with open(left, "wb") as file:
        pickle.dump((client.calls, client.files), file)


if __name__ == "__main__":
    main(*sys.argv[1:])
