"""Anything, in any order, against a model: what is read is what was written, and what is reported is what is equal.

A run depends on its seed alone (DEDUPFS_SEED, printed with a failure, and the number in the test's name).
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from dedupfs.backing import RENAME_EXCHANGE
from dedupfs.engine import rebuild
from dedupfs.openfiles import Handle

from .bench import BLOCK, Bench, content, few_bits, silent
from .test_sharing import every_strategy

STEPS = 150


class Model:
    """Files by name, and what an app has open. Several names may be of one file."""

    def __init__(self, bench: Bench, rng: random.Random) -> None:
        self.bench, self.rng = bench, rng
        self.names: dict[str, int] = {}
        self.bytes: dict[int, bytes] = {}
        self.directories = ["", "a/", "b/", "a/c/"]
        self.handles: list[tuple[Handle, int, bool]] = []
        self.steps: list[str] = []
        self.walked = True  # since the last kill: before that nobody knows of what was not settled then
        self._next = 0
        for directory in self.directories[1:]:
            bench.mkdir(directory.rstrip("/"))

    # -- choosing

    def some_content(self) -> bytes:
        """One of a few, so that equal ones are frequent; of the sizes that matter."""
        number = self.rng.randrange(6)
        size_bytes = (0, 17, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK)[number]
        return content(f"content {number}", size_bytes)

    def new_name(self) -> str:
        return f"{self.rng.choice(self.directories)}f{self.rng.randrange(12)}"

    def old_name(self) -> str | None:
        return self.rng.choice(sorted(self.names)) if self.names else None

    def is_open(self, file: int) -> bool:
        return any(of == file for _, of, _ in self.handles)

    # -- what apps do

    def write(self) -> None:
        name, data = self.new_name(), self.some_content()
        if name not in self.names:
            self._next += 1
            self.names[name] = self._next
        self.bench.write(name, data)
        self.bytes[self.names[name]] = data
        self.steps.append(f"write {name} {len(data)}")

    def change(self) -> None:
        if (name := self.old_name()) is not None:
            file, offset, piece = self.names[name], self.rng.choice((0, 5, BLOCK, 4 * BLOCK)), b"changed"
            self.bench.write_at(name, piece, offset)
            data = self.bytes[file].ljust(offset, b"\0")
            self.bytes[file] = data[:offset] + piece + data[offset + len(piece) :]
            self.steps.append(f"change {name} at {offset}")

    def append(self) -> None:
        if (name := self.old_name()) is not None:
            self.bench.append(name, b"appended")
            self.bytes[self.names[name]] += b"appended"
            self.steps.append(f"append {name}")

    def truncate(self) -> None:
        if (name := self.old_name()) is not None:
            file, size_bytes = self.names[name], self.rng.choice((0, 1, BLOCK, 2 * BLOCK + 3, 5 * BLOCK))
            self.bench.truncate(name, size_bytes)
            self.bytes[file] = self.bytes[file][:size_bytes].ljust(size_bytes, b"\0")
            self.steps.append(f"truncate {name} to {size_bytes}")

    def copy(self) -> None:
        name, new = self.old_name(), self.new_name()
        if name is not None and new not in self.names:
            self.bench.copy(name, new)
            self._next += 1
            self.names[new] = self._next
            self.bytes[self._next] = self.bytes[self.names[name]]
            self.steps.append(f"copy {name} {new}")

    def link(self) -> None:
        name, new = self.old_name(), self.new_name()
        if name is not None and new not in self.names:
            self.bench.link(name, new)
            self.names[new] = self.names[name]
            self.steps.append(f"link {name} {new}")

    def unlink(self) -> None:
        if (name := self.old_name()) is not None:
            if self.is_open(self.names[name]):
                self._next += 1
                self.bench.hide(name, f".fuse_hidden{self._next:016x}")
            else:
                self.bench.unlink(name)
            del self.names[name]
            self.steps.append(f"unlink {name}")

    def rename(self) -> None:
        name, new = self.old_name(), self.new_name()
        if name is None or name == new or (new in self.names and self.is_open(self.names[new])):
            return
        if new in self.names and self.rng.random() < 0.3:
            self.bench.rename(name, new, RENAME_EXCHANGE)
            self.names[name], self.names[new] = self.names[new], self.names[name]
            self.steps.append(f"exchange {name} {new}")
            return
        self.bench.rename(name, new)
        if self.names.get(new) != self.names[name]:  # two names of one file stay both
            self.names[new] = self.names.pop(name)
        self.steps.append(f"rename {name} {new}")

    def rename_directory(self) -> None:
        old = self.rng.choice(self.directories[1:])
        new = f"{self.rng.choice(('', 'b/', 'x'))}d{self.rng.randrange(100)}/"
        if new.startswith(old) or new in self.directories or os.path.dirname(new.rstrip("/")) + "/" not in [
            "/", *self.directories
        ]:  # fmt: skip
            return
        self.bench.rename(old.rstrip("/"), new.rstrip("/"))

        def moved(path: str) -> str:
            return new + path[len(old) :] if path.startswith(old) else path

        self.directories = [moved(directory) for directory in self.directories]
        self.names = {moved(name): file for name, file in self.names.items()}
        self.steps.append(f"rename directory {old} {new}")

    def open_one(self) -> None:
        if (name := self.old_name()) is not None and len(self.handles) < 4:
            writes = self.rng.random() < 0.4
            handle = self.bench.open_file(name, os.O_RDWR if writes else os.O_RDONLY)
            self.handles.append((handle, self.names[name], writes))
            self.steps.append(f"open {name} {'for writing' if writes else ''}")

    def use_one(self) -> None:
        if self.handles:
            handle, file, writes = self.rng.choice(self.handles)
            if writes and self.rng.random() < 0.5:
                self.bench.write_to(handle, b"through", 3)
                data = self.bytes[file].ljust(3, b"\0")
                self.bytes[file] = data[:3] + b"through" + data[10:]
                self.steps.append(f"write to open {file}")
            assert self.bench.read_from(handle) == self.bytes[file]

    def close_one(self) -> None:
        if self.handles:
            handle, file, _ = self.handles.pop(self.rng.randrange(len(self.handles)))
            assert self.bench.read_from(handle) == self.bytes[file]
            self.bench.close_file(handle)
            self.steps.append(f"close {file}")

    # -- what happens to dedupfs

    def settle(self) -> None:
        self.steps.append("settle")
        self.bench.settle()
        self.check()

    def scan(self) -> None:
        self.steps.append("scan")
        self.bench.scan()
        self.walked = True
        self.check()

    def restore(self) -> None:
        name = self.old_name()
        self.steps.append(f"restore {name}")
        paths = [] if name is None or self.rng.random() < 0.3 else [os.fsencode(name)]
        assert self.bench.engine.restore(paths, silent)["failed"] == []

    def restart(self) -> None:
        """Cleanly, killed, or with a new index; with or without a walk before apps come."""
        how = self.rng.choice(("cleanly", "cleanly", "killed", "killed and walked", "rebuilt", "checked"))
        self.steps.append(f"restart {how}")
        if how.startswith("killed"):
            self.handles.clear()
            self.walked = False
            self.bench.crash()
        else:
            while self.handles:
                self.close_one()
            self.bench.close()
            if how == "checked" and self.walked:
                report = self.bench.fsck()
                assert report.findings == []
            elif how == "rebuilt":
                rebuild(str(self.bench.source), silent)
                self.walked = True
        self.reopen()
        if how == "killed and walked":
            self.scan()

    def reopen(self) -> None:
        self.bench.open()

    def behind(self) -> None:
        """Somebody works on the archive while it is not mounted."""
        if self.handles:
            return
        self.bench.close()
        what, name, new = self.rng.choice(("add", "change", "remove", "move")), self.old_name(), self.new_name()
        self.steps.append(f"behind our back: {what} {name} {new}")
        if what == "add" and new not in self.names:
            data = self.some_content()
            self.bench.put(new, data)
            self._next += 1
            self.names[new] = self._next
            self.bytes[self._next] = data
        elif name is not None and what == "remove":
            self.bench.below(name).unlink()
            del self.names[name]
        elif name is not None and what == "move" and new not in self.names:
            os.rename(self.bench.below(name), self.bench.below(new))
            self.names[new] = self.names.pop(name)
        elif name is not None and what == "change" and not self.bench.is_reference(name):
            self.bench.put(name, b"from outside" * 1000)
            self.bytes[self.names[name]] = b"from outside" * 1000
        self.reopen()
        self.scan()

    ACTIONS: tuple[tuple[Callable[["Model"], None], int], ...] = (
        (write, 20), (change, 6), (append, 3), (truncate, 5), (copy, 8), (link, 4), (unlink, 8), (rename, 8),
        (rename_directory, 2), (open_one, 8), (use_one, 6), (close_one, 8), (settle, 14), (scan, 2), (restore, 2),
        (restart, 4), (behind, 2),
    )  # fmt: skip

    # -- what has to be true

    def check(self) -> None:
        for name, file in self.names.items():
            assert self.bench.read(name) == self.bytes[file], name
        if self.walked:
            self.check_answers()

    def check_answers(self) -> None:
        """Complete, but for files that are open for writing: of those nobody knows yet what they will be."""
        written = {file for _, file, writes in self.handles if writes}
        known = {name: file for name, file in self.names.items() if file not in written}
        for name, file in known.items():
            equal = [other for other, of in known.items() if other != name and self.bytes[of] == self.bytes[file]]
            reported = self.duplicates(name)
            assert sorted(other for other in reported if other in known) == sorted(equal), name
            inodes = len({file, *(known[other] for other in equal)})
            assert inodes <= self.bench.refs(name) <= inodes + len(written) + len(self._hidden()), name
        if not written:
            files = len(set(self.names.values()))
            assert files <= self.bench.status()["files"] <= files + len(self._hidden())

    def duplicates(self, name: str) -> list[str]:
        try:
            return self.bench.duplicates(name)
        except OSError:
            # Nothing is known of it now; asking has it looked at, which an engine with threads does while we wait.
            self.bench.settle()
            return self.bench.duplicates(name)

    def _hidden(self) -> set[int]:
        return {file for _, file, _ in self.handles} - set(self.names.values())

    def run(self, steps: int) -> None:
        actions, weights = zip(*self.ACTIONS, strict=True)
        try:
            for _ in range(steps):
                self.rng.choices(actions, weights)[0](self)
                if (name := self.old_name()) is not None:
                    assert self.bench.read(name) == self.bytes[self.names[name]], name
            while self.handles:
                self.close_one()
            self.scan()
            self.settle()
        except BaseException as error:
            error.add_note("\n".join(self.steps[-40:]))
            raise


@pytest.fixture
def forgiving(bench: Bench) -> Iterator[Bench]:
    yield bench
    with suppress(AttributeError):
        bench.expect_log("not stopped")


@every_strategy
@pytest.mark.parametrize("number", range(3))
def test_anything(forgiving: Bench, rng: random.Random, number: int) -> None:
    Model(forgiving, rng).run(STEPS)


class Colliding(Model):
    """With a hash of one bit: nothing is asked but that contents stay, and that what is called equal is."""

    def reopen(self) -> None:
        self.bench.open(hasher=few_bits(1))

    def write(self) -> None:
        super().write()
        name = self.steps[-1].split()[1]
        self.bench.write_at(name, self.bytes[self.names[name]][:5], 0)  # spoils the digest of the stream

    def check_answers(self) -> None:
        written = {file for _, file, writes in self.handles if writes}
        for name, file in self.names.items():
            if file not in written:
                for other in self.duplicates(name):
                    if other in self.names and self.names[other] not in written:
                        assert self.bytes[self.names[other]] == self.bytes[file], (name, other)


@every_strategy
def test_anything_with_collisions(forgiving: Bench, rng: random.Random) -> None:
    forgiving.reopen(hasher=few_bits(1))
    Colliding(forgiving, rng).run(STEPS)
