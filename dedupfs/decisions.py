"""What people decided about pictures: `.dedupfs/decisions.jsonl`, an append-only log. It is truth, and in no index.

One JSON object a line: `at` (UTC), `who`, `action`, `contents` (digest and collision number, `<hex>.<number>`), `paths`
as they were at the time, `text` of a note, `before` (whether the opposite held). A line counts once its line feed is on
disk; what a crash left of an unfinished one is passed over, and stays. Lines of actions that are not known, of a later
version, say, are kept and have no effect.

    pin, unpin          this version is the authoritative one of its photograph; not any more
    note                a remark
    not-similar         these two are different pictures, whatever they look like
"""

import errno
import json
import logging
import os
import threading
import time
from collections.abc import Iterable
from typing import Any

from .backing import Backing
from .codec import json_object
from .model import STORE_DIRECTORY, ContentKey, Digest

log = logging.getLogger(__name__)

DECISIONS = STORE_DIRECTORY + b"/decisions.jsonl"

PIN, UNPIN, NOTE, NOT_SIMILAR = "pin", "unpin", "note", "not-similar"


class Decisions:
    """The log of one store. Any thread."""

    def __init__(self, backing: Backing) -> None:
        self._backing = backing
        self._lock = threading.Lock()
        self._entries: list[dict[str, Any]] = []
        self._pinned: set[ContentKey] = set()
        self._apart: set[frozenset[ContentKey]] = set()
        self._torn = False
        for line in self._read():
            self._take(line)

    def _read(self) -> list[bytes]:
        try:
            fd = self._backing.open(DECISIONS, os.O_RDONLY)
        except FileNotFoundError:
            return []
        with os.fdopen(fd, "rb") as file:
            *lines, rest = file.read().split(b"\n")
        self._torn = bool(rest)
        return lines

    def _take(self, line: bytes) -> None:
        if not line:
            return
        try:
            entry = json_object(line)
            contents = [_content(name) for name in _texts(entry.get("contents"))]
            _texts(entry.get("paths"))
            _texts([entry.get(key) for key in ("at", "who", "action", "text", "before")])
        except ValueError:
            log.warning("a line of %s cannot be read; it has no effect", os.fsdecode(DECISIONS))
            return
        self._entries.append(entry)
        self._apply(entry["action"], contents)

    def _apply(self, action: str, contents: list[ContentKey]) -> None:
        if action == PIN:
            self._pinned.update(contents)
        elif action == UNPIN:
            self._pinned.difference_update(contents)
        elif action == NOT_SIMILAR:
            self._apart.add(frozenset(contents))

    def is_pinned(self, content: ContentKey) -> bool:
        return content in self._pinned

    def are_apart(self, one: ContentKey, other: ContentKey) -> bool:
        return frozenset((one, other)) in self._apart

    def record(
        self, action: str, contents: Iterable[ContentKey], *, paths: Iterable[bytes], who: str, text: str = ""
    ) -> None:
        """Decide; on disk when this returns. Raises OSError, and then nothing is decided."""
        contents = list(contents)
        with self._lock:
            entry = {
                "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "who": who,
                "action": action,
                "contents": [content.name for content in contents],
                "paths": [os.fsdecode(path) for path in paths],
                "text": text,
                "before": self._before(action, contents),
            }
            self._append(json.dumps(entry).encode())
            self._entries.append(entry)
            self._apply(action, contents)

    def _before(self, action: str, contents: list[ContentKey]) -> str:
        if action in (PIN, UNPIN):
            return "pinned" if any(self.is_pinned(content) for content in contents) else "not pinned"
        if action == NOT_SIMILAR:
            return "not similar" if frozenset(contents) in self._apart else "as found"
        return ""

    def _append(self, line: bytes) -> None:
        fd = self._backing.open(DECISIONS, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            # In one write. A torn line before it is ended first; one that was torn now, by a full disk, is next time.
            data = (b"\n" if self._torn else b"") + line + b"\n"
            self._torn, torn, size_bytes = True, self._torn, os.fstat(fd).st_size
            try:
                written = os.write(fd, data)
                if written != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), DECISIONS)
                self._backing.fsync(fd)
            except OSError:
                self._backing.ftruncate(fd, size_bytes)  # or the next start would take it for decided
                self._torn = torn
                raise
            self._torn = False
        finally:
            os.close(fd)
        self._backing.fsync_directory(STORE_DIRECTORY)

    def history(self, contents: Iterable[ContentKey]) -> list[dict[str, Any]]:
        """Whatever was decided about any of these, in the order in which it was."""
        names = {content.name for content in contents}
        return [entry for entry in self._entries if not names.isdisjoint(entry["contents"])]


def _texts(found: Any) -> list[str]:
    """A list of texts. Raises ValueError for anything else."""
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError(found)
    return found


def _content(name: str) -> ContentKey:
    digest, _, collision = name.partition(".")
    content = ContentKey(Digest(bytes.fromhex(digest)), int(collision))
    if len(digest) != 32 or content.name != name:
        raise ValueError(name)
    return content
