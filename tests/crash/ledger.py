"""What an app may rely on: kept by the app while it works, held against the archive after a crash.

At each moment one *world* is certain: every path and what it shows. While a call of the app is under way, the archive
may be in one of several worlds: as before, as after, or in between where the backing filesystem would leave it there
too. Written to a file outside of the archive, line by line, so that it outlives the app.
"""

import hashlib
import json
import os
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, slots=True, repr=False)
class State:
    """What a path shows. None for an attribute stands for any value."""

    digest: str
    size_bytes: int
    mode: int | None = None
    owner: tuple[int, int] | None = None
    mtime_ns: int | None = None
    xattrs: tuple[tuple[str, str], ...] | None = None

    def __repr__(self) -> str:
        mode = "" if self.mode is None else f" {self.mode:04o}"
        owner = "" if self.owner is None else " {}:{}".format(*self.owner)
        time = "" if self.mtime_ns is None else f" @{self.mtime_ns}"
        names = "" if self.xattrs is None else "".join(f" {name}" for name, _ in self.xattrs)
        return f"<{self.digest[:8]}… {self.size_bytes}{mode}{owner}{time}{names}>"

    @classmethod
    def of(cls, data: bytes, **attributes: Any) -> Self:
        return cls(hashlib.sha256(data).hexdigest(), len(data), **attributes)

    def with_content(self, data: bytes) -> "State":
        """The same file with other content, written now."""
        return replace(self, digest=hashlib.sha256(data).hexdigest(), size_bytes=len(data), mtime_ns=None)

    def agrees(self, seen: "State | None") -> bool:
        if seen is None:
            return False
        mine, its = asdict(self), asdict(seen)
        return all(value is None or value == its[name] for name, value in mine.items())

    @classmethod
    def load(cls, fields: dict[str, Any]) -> Self:
        owner, xattrs = fields.pop("owner"), fields.pop("xattrs")
        return cls(
            **fields,
            owner=None if owner is None else (owner[0], owner[1]),
            xattrs=None if xattrs is None else tuple((name, value) for name, value in xattrs),
        )


# Only the paths that an operation touches; None: there is no such path.
World = dict[str, State | None]

# What a path shows, None when there is none. Raises OSError.
Look = Callable[[str], State | None]


class Ledger:
    """The certain world, and the worlds that a call under way may lead to."""

    def __init__(self, file: Path | None = None) -> None:
        self.certain: dict[str, State] = {}
        self.possible: list[World] = []
        self._fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) if file is not None else -1

    @classmethod
    def load(cls, file: Path) -> Self:
        ledger = cls()
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            worlds = [
                {path: None if state is None else State.load(state) for path, state in world.items()}
                for world in entry["worlds"]
            ]
            if entry["certain"]:
                ledger.end(worlds[0])
            else:
                ledger.begin(worlds)
        return ledger

    def begin(self, worlds: list[World]) -> None:
        """A call begins; the first world is as before, the last as after it."""
        self.possible = worlds
        self._write(worlds, certain=False)

    def end(self, world: World) -> None:
        """The call has returned, and this is what it led to."""
        self.possible = []
        for path, state in world.items():
            if state is None:
                self.certain.pop(path, None)
            else:
                self.certain[path] = state
        self._write([world], certain=True)

    def _write(self, worlds: list[World], *, certain: bool) -> None:
        if self._fd >= 0:
            dumped = [{path: state and asdict(state) for path, state in world.items()} for world in worlds]
            os.write(self._fd, json.dumps({"certain": certain, "worlds": dumped}).encode() + b"\n")

    def check(
        self, look: Look, paths: set[str], *, ignore: AbstractSet[str] = frozenset(), looked_at: bool = True
    ) -> list[str]:
        """What is not as it may be. `paths`: all that there are.

        Until dedupfs has `looked_at` all files after a crash, one that was being materialised may show the time of
        that.
        """
        problems = []
        uncertain = {path for world in self.possible for path in world}
        for path in sorted((set(self.certain) | paths) - uncertain - ignore):
            problems += compare(path, self.certain.get(path), look)
        seen = {path: _try(look, path) for path in uncertain}
        possible = self.possible if looked_at else [_timeless(world) for world in self.possible]
        if possible and not any(_agree(world, seen) for world in possible):
            problems.append(f"a call was under way; there is {seen}, and might be {possible}")
        return problems

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def adopt(self, look: Look) -> None:
        """Take what there is, after a crash, for certain."""
        if self.possible:
            self.end({path: look(path) for world in self.possible for path in world})


def compare(path: str, state: State | None, look: Look) -> list[str]:
    seen = _try(look, path)
    if isinstance(seen, str):
        return [f"{path}: {seen}"]
    if state is None:
        return [f"{path} has come from nowhere: {seen}"] if seen is not None else []
    return [] if state.agrees(seen) else [f"{path} should be {state} and is {seen}"]


def _try(look: Look, path: str) -> State | str | None:
    try:
        return look(path)
    except OSError as error:
        return f"cannot be read: {error}"


def _timeless(world: World) -> World:
    return {path: state and replace(state, mtime_ns=None) for path, state in world.items()}


def _agree(world: World, seen: dict[str, State | str | None]) -> bool:
    for path, state in world.items():
        found = seen[path]
        if isinstance(found, str) or (state is None) != (found is None):
            return False
        if state is not None and not state.agrees(found):
            return False
    return True
