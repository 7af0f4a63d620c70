"""What an app may rely on after a power loss: kept by the app while it works, held against what is found afterwards.

A content is made of sectors that say whose they are and where, so that a foreign or a zeroed byte is recognised in any
file. The ledger is a file on another filesystem. Before each call that changes a path a line says what it `may` show
from then on; after the fsync that makes it certain, a line says what it `must` show. A path without a `must` after its
last `may` may show any of these contents, and where data were under way (`torn`) a mixture of them and of zeros, as on
any filesystem. Not so a reference: it stands for a content that was complete.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

SECTOR_BYTES = 512
_LONGEST_STREAM_BYTES = 256 << 10
_LINE = b"%08x sector %08x"
_LINE_BYTES = 32

# A content: pieces (start, end, number of the stream), one after the other.
Content = tuple[tuple[int, int, int], ...]


@lru_cache(maxsize=256)
def _stream(number: int) -> bytes:
    count = _LONGEST_STREAM_BYTES // SECTOR_BYTES
    repeat = SECTOR_BYTES // _LINE_BYTES
    return b"".join((_LINE % (number, sector)).ljust(_LINE_BYTES, b".") * repeat for sector in range(count))


def make(content: Content) -> bytes:
    return b"".join(_stream(number)[start:end] for start, end, number in content)


def size_of(content: Content) -> int:
    return content[-1][1] if content else 0


def overwrite(content: Content, start: int, end: int, number: int) -> Content:
    """`content` with the same part of another stream in that place, which lies in it or at its end."""
    before = tuple((a, min(b, start), n) for a, b, n in content if a < start)
    after = tuple((max(a, end), b, n) for a, b, n in content if b > end)
    return (*before, (start, end, number), *after)


def cut(content: Content, size_bytes: int) -> Content:
    return tuple((a, min(b, size_bytes), n) for a, b, n in content if a < size_bytes)


@dataclass(frozen=True, slots=True)
class Attributes:
    mode: int
    mtime_ns: int


@dataclass(slots=True)
class _Path:
    certain: Content | None = None
    attributes: Attributes | None = None
    possible: list[Content | None] = field(default_factory=list)
    torn: bool = False


@dataclass(frozen=True, slots=True)
class Seen:
    """What a path shows after the power loss."""

    data: bytes
    mode: int
    mtime_ns: int


class Ledger:
    """The writing side. Lines are whole once `os.write` has returned; only this host has to survive."""

    def __init__(self, file: Path) -> None:
        self._fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def _write(self, **words: Any) -> None:
        os.write(self._fd, json.dumps(words).encode() + b"\n")

    def may(self, path: str, content: Content | None, *, torn: bool) -> None:
        self._write(path=path, may=content, torn=torn)

    def must(self, path: str, content: Content | None, attributes: Attributes | None) -> None:
        found = None if attributes is None else [attributes.mode, attributes.mtime_ns]
        self._write(path=path, must=content, attributes=found)

    def moves(self, old: str, new: str, content: Content | None) -> None:
        """A file goes from one name to another, with whatever it may show. With the `content` that is certain of it, it
        must be at one of them."""
        self._write(path=old, to=new, moves=content)


class Promises:
    """The reading side: what was promised before an instant, and what might have been done by another one."""

    def __init__(self, file: Path, before: int, until: int | None = None) -> None:
        """`before`, `until`: lengths of the ledger's file; None: all of it."""
        self._paths: dict[str, _Path] = {}
        self._moves: list[tuple[str, str, Content]] = []
        self._lines: list[str] = []  # of the ledger; behind those that were promised for sure, one that says so
        offset = 0
        with open(file, "rb") as lines:
            for line in lines:
                offset += len(line)
                if (until is not None and offset > until) or not line.endswith(b"\n"):
                    break
                promised = offset <= before
                if not promised and offset - len(line) <= before:
                    self._lines.append("-- the power goes --")
                self._lines.append(line.decode().strip())
                self._take(json.loads(line), promised=promised)

    def _take(self, words: dict[str, Any], *, promised: bool) -> None:
        path = words["path"]
        known = self._paths.setdefault(path, _Path())
        if "to" in words:
            target = self._paths.setdefault(words["to"], _Path())
            self._moves = [move for move in self._moves if not {path, words["to"]} & set(move[:2])]
            target.possible += [content for content in (known.certain, *known.possible) if content is not None]
            target.torn = target.torn or known.torn
            known.possible.append(None)
            certain = _content(words["moves"])
            if promised and certain is not None:
                self._moves.append((path, words["to"], certain))
        elif "may" in words:
            self._moves = [move for move in self._moves if path not in move[:2]]
            known.possible.append(_content(words["may"]))
            known.torn = known.torn or words["torn"]
        elif promised:
            self._moves = [move for move in self._moves if path not in move[:2]]
            found = words["attributes"]
            self._paths[path] = _Path(_content(words["must"]), Attributes(*found) if found else None)

    def certain_count(self) -> int:
        return sum(1 for known in self._paths.values() if known.certain is not None and not known.possible)

    def tail(self, count: int = 40) -> str:
        """What the app did last, to be told with what is wrong."""
        return "\n".join(self._lines[-count:])

    def check(self, seen: Mapping[str, Seen], references: set[str], *, settled: bool) -> list[str]:
        """What is not as promised. `references`: the paths that are references in the backing directory. Times are
        looked at once everything is `settled`."""
        problems = []
        for path in sorted(self._paths.keys() | seen.keys()):
            known, found = self._paths.get(path, _Path()), seen.get(path)
            problem = _compare(known, found, is_reference=path in references)
            if problem is None and settled and found is not None and not known.possible and known.attributes:
                if Attributes(found.mode, found.mtime_ns) != known.attributes:
                    problem = f"{found.mode:o} {found.mtime_ns} instead of {known.attributes}"
            if problem is not None:
                problems.append(f"{path}: {problem}")
        for old, new, content in self._moves:
            data = make(content)
            if not any(path in seen and seen[path].data == data for path in (old, new)):
                problems.append(f"{old}: renamed to {new}, and at neither")
        return problems


def _content(words: list[list[int]] | None) -> Content | None:
    return None if words is None else tuple((start, end, number) for start, end, number in words)


def _compare(known: _Path, found: Seen | None, *, is_reference: bool) -> str | None:
    candidates = [known.certain, *known.possible]
    if found is None:
        return None if None in candidates else f"missing; it was {known.certain}"
    contents = [content for content in candidates if content is not None]
    if not contents:
        return f"come from nowhere: {_describe(found.data)}"
    wanted = [make(content) for content in contents]
    if found.data in wanted:
        return None
    if is_reference:
        return f"a reference to what was never complete: {_describe(found.data)}, not one of {contents}"
    if not known.torn:
        return f"{_describe(found.data)}, not one of {contents}"
    return _torn(found.data, wanted)


def _torn(data: bytes, wanted: list[bytes]) -> str | None:
    """A file that data were under way to: each byte is one of those that belong there, or zero."""
    if len(data) > max(map(len, wanted)):
        return f"{len(data)} bytes long, too long"
    for start in range(0, len(data), SECTOR_BYTES):
        sector = data[start : start + SECTOR_BYTES]
        variants = [each[start : start + SECTOR_BYTES].ljust(SECTOR_BYTES, b"\0") for each in [*wanted, b""]]
        if any(variant.startswith(sector) for variant in variants):
            continue
        if any(byte not in {variant[at] for variant in variants} for at, byte in enumerate(sector)):
            return f"foreign bytes at {start}: {sector[:32]!r}"
    return None


def _describe(data: bytes) -> str:
    """Whose sectors these are, those that follow each other in one."""
    found: list[tuple[str, int]] = []
    for start in range(0, len(data), SECTOR_BYTES):
        sector = data[start : start + SECTOR_BYTES]
        if not sector.strip(b"\0"):
            name = "zeros"
        elif sector[8:16] == b" sector ":
            shift = int(sector[16:24], 16) * SECTOR_BYTES - start
            name = f"stream {int(sector[:8], 16)}" + (f" shifted by {shift}" if shift else "")
        else:
            name = repr(sector[:24])
        if found and found[-1][0] == name:
            found[-1] = (name, found[-1][1] + len(sector))
        else:
            found.append((name, len(sector)))
    return f"{len(data)} bytes ({', '.join(f'{count} of {name}' for name, count in found) or 'empty'})"
