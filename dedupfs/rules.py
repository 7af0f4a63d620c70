"""Which files may share their bytes with others. Pure; asked before a file is shared, never afterwards.

A file that may not share, or not with some others, is hashed and known like any other: it shows its digest, and is
found as a duplicate. What was shared before a rule was made stays shared.
"""

import re
from dataclasses import dataclass, field
from functools import cached_property

from .model import SMALLEST_SHARED_BYTES


@dataclass(frozen=True)
class SharingRules:
    """A file shares if it has at least so many bytes, a glob of `include` fits it (or there is none), and none of
    `exclude`. It shares with files of its own domain alone.

    A domain is a directory that a glob of `domains` fits, the topmost one on a path that this glob fits; of several
    globs, the one that leads deepest counts. Everything else is one domain, too.

    Globs are those of gitignore's kind, of whole paths relative to the source: `*` and `?` stop at a slash, `**` does
    not, `[…]` is one of some characters. A glob without a slash fits a name at any depth, and one that fits a directory
    fits all that is in it.
    """

    min_size_bytes: int = SMALLEST_SHARED_BYTES
    include: tuple[bytes, ...] = field(default=())
    exclude: tuple[bytes, ...] = field(default=())
    domains: tuple[bytes, ...] = field(default=())

    def allow(self, path: bytes, size_bytes: int) -> bool:
        if size_bytes < max(self.min_size_bytes, SMALLEST_SHARED_BYTES):
            return False
        if self.include and not any(glob.match(path) for glob in self._included):
            return False
        return not any(glob.match(path) for glob in self._excluded)

    @property
    def keeps_apart(self) -> bool:
        """Whether there is anything that may not share for another reason than that nothing would be saved."""
        return bool(self.include or self.exclude or self.domains or self.min_size_bytes > SMALLEST_SHARED_BYTES)

    def domain_of(self, path: bytes) -> bytes:
        """The directory that is this file's domain, b"" for what is in none."""
        found = b""
        for glob in self._domains:
            end = path.find(b"/")
            while end > 0 and not glob.match(path[:end]):
                end = path.find(b"/", end + 1)
            found = max(found, path[: max(end, 0)], key=len)
        return found

    @cached_property
    def _domains(self) -> tuple[re.Pattern[bytes], ...]:
        return tuple(_compiled(glob) for glob in self.domains)

    @cached_property
    def _included(self) -> tuple[re.Pattern[bytes], ...]:
        return tuple(_compiled(glob) for glob in self.include)

    @cached_property
    def _excluded(self) -> tuple[re.Pattern[bytes], ...]:
        return tuple(_compiled(glob) for glob in self.exclude)


EVERYTHING = SharingRules()
NOTHING = SharingRules(exclude=(b"**",))


def _compiled(glob: bytes) -> re.Pattern[bytes]:
    anchored = b"/" in glob.rstrip(b"/")
    glob = glob.strip(b"/")
    parts = [] if anchored else [b"(?:.*/)?"]
    at = 0
    while at < len(glob):
        if glob.startswith(b"**/", at):
            parts.append(b"(?:.*/)?")
            at += 3
        elif glob.startswith(b"**", at):
            parts.append(b".*")
            at += 2
        elif (end := _end_of_class(glob, at)) is not None:
            inside = glob[at + 1 : end]
            negated = inside[:1] in (b"!", b"^")
            members = re.sub(rb"([\\\[\]^&~|])", rb"\\\1", inside[negated:])
            parts.append(b"(?!/)[" + (b"^" if negated else b"") + members + b"]")
            at = end + 1
        else:
            character = glob[at : at + 1]
            parts.append({b"*": b"[^/]*", b"?": b"[^/]"}.get(character, re.escape(character)))
            at += 1
    return re.compile(b"".join(parts) + rb"(?:/.*)?\Z", re.DOTALL)


def _end_of_class(glob: bytes, at: int) -> int | None:
    """Where the class that begins at `at` ends, None when none begins there."""
    if glob[at : at + 1] != b"[":
        return None
    first = at + 2 if glob[at + 1 : at + 2] in (b"!", b"^") else at + 1
    end = glob.find(b"]", first + 1)  # a bracket in the first place is a member
    return None if end < 0 else end


def is_glob(text: str) -> bool:
    """Whether it can be used: a range the wrong way round, say, cannot."""
    try:
        _compiled(text.encode(errors="surrogateescape"))
    except re.error:
        return False
    return bool(text.strip("/"))
