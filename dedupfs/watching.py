"""What is told to who watches a mount: each new duplicate, near-duplicate and conflict, as it is found.

Settling and describing hand over what they learned, and go on; a thread of its own, there while anybody watches, finds
out what that means and puts it into words. A watcher takes these at its own pace: what is kept for one that is slow is
bounded, and it is told that it missed some. Nothing is kept for who comes later.

    duplicate       a file was written, or found, whose content another file has
    near-duplicate  a picture was described that resembles others
    conflict        the same, or a further file of a picture, that differs visibly from what claims to be the same one
    missed          so many at least were not told
"""

import json
import logging
import os
import threading
import time
from collections import deque
from contextlib import suppress
from itertools import islice
from typing import Any

from .duplicates import Answers
from .model import ContentKey, Learned
from .pictures import Pictures

log = logging.getLogger(__name__)

_MOST_BYTES = 4 << 20  # kept for one watcher
_MOST_WAITING = 10_000  # that were handed over, and not looked at yet
_PATIENCE_S = 10.0  # for a name to come to the index
_MOST_OTHERS = 16  # of the other files, in one line


class Subscription:
    """What one watcher has not taken yet. `fileno` is readable while there is something."""

    def __init__(self, watching: "Watching") -> None:
        self._watching = watching
        self._lock = threading.Lock()
        self._told: list[bytes] = []
        self._size_bytes = 0
        self._missed = 0
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closed = False

    def fileno(self) -> int:
        return self._fd

    def take(self) -> list[bytes]:
        """Everything there is, in order, each as JSON."""
        with self._lock:
            with suppress(BlockingIOError):
                os.eventfd_read(self._fd)
            told, self._told, self._size_bytes = self._told, [], 0
            if self._missed:
                told.append(_encoded("missed", count=self._missed))
                self._missed = 0
            return told

    def put(self, event: bytes) -> None:
        with self._lock:
            # After the first one that finds no room, nothing before the word of that: order is kept.
            if self._missed or self._size_bytes + len(event) > _MOST_BYTES:
                self._missed += 1
            else:
                self._told.append(event)
                self._size_bytes += len(event)
            self._signal()

    def miss(self, count: int) -> None:
        with self._lock:
            self._missed += count
            self._signal()

    def _signal(self) -> None:
        if not self._closed:
            os.eventfd_write(self._fd, 1)

    def close(self) -> None:
        """Idempotent. Nothing is kept any more."""
        self._watching.forget(self)
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._fd)


class Watching:
    """One for a mount. Any thread."""

    def __init__(self, answers: Answers, pictures: Pictures) -> None:
        self._answers, self._pictures = answers, pictures
        self._condition = threading.Condition()
        self._watchers: list[Subscription] = []
        self._waiting: deque[Learned | ContentKey] = deque()
        self._thread: threading.Thread | None = None
        self._stopping = False

    def subscribe(self) -> Subscription:
        """From now on everything is told to it, until it is closed."""
        subscription = Subscription(self)
        with self._condition:
            self._watchers.append(subscription)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="watching", daemon=True)
                self._thread.start()
        return subscription

    def forget(self, subscription: Subscription) -> None:
        with self._condition:
            if subscription in self._watchers:
                self._watchers.remove(subscription)
            if not self._watchers:
                self._waiting.clear()

    def stop(self) -> None:
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join()

    # -- handed over --------------------------------------------------------------------------------------------------

    def settled(self, files: list[Learned]) -> None:
        """Files are new duplicates; the index knows."""
        self._hand_over(files)

    def described(self, contents: list[ContentKey]) -> None:
        """New pictures were described that resemble others; the index knows."""
        self._hand_over(contents)

    def _hand_over(self, what: list[Learned] | list[ContentKey]) -> None:
        with self._condition:
            if not self._watchers or not what:
                return
            room = max(_MOST_WAITING - len(self._waiting), 0)
            self._waiting.extend(what[:room])
            if len(what) > room:
                for watcher in self._watchers:
                    watcher.miss(len(what) - room)
            self._condition.notify_all()

    # -- told ---------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._waiting or self._stopping)
                if self._stopping:
                    return
                what = self._waiting.popleft()
            try:
                events = self._about_file(what) if isinstance(what, Learned) else self._about_picture(what)
            except Exception:
                log.exception("what was found cannot be told to who watches")  # a bug: the next ones are told
                continue
            with self._condition:
                for event in events:
                    for watcher in self._watchers:
                        watcher.put(event)

    def _about_file(self, learned: Learned) -> list[bytes]:
        path = self._answers.path_of(learned, _PATIENCE_S)
        found = islice(self._answers.everywhere(learned.content), _MOST_OTHERS + 1)
        others = [each for each in found if each != path][:_MOST_OTHERS]
        if path is None or not others:
            return []
        digest, copies = learned.content.digest.hex(), self._answers.count(learned.content)
        told = _encoded("duplicate", path=path, digest=digest, copies=copies, duplicates=others)
        return [told, *self._conflicts(learned.content, path)]

    def _about_picture(self, content: ContentKey) -> list[bytes]:
        paths = sorted(islice(self._answers.iter_paths(content), _MOST_OTHERS))
        if not paths:
            return []
        similar: list[dict[str, object]] = [
            {"path": os.fsdecode(path), "relation": str(alike.relation), "distance": alike.distance}
            for alike in self._pictures.versions(content)
            for path in sorted(islice(self._answers.iter_paths(alike.content), _MOST_OTHERS))
        ]
        told = [_encoded("near-duplicate", path=paths[0], similar=similar[:_MOST_OTHERS])] if similar else []
        return [*told, *self._conflicts(content, paths[0])]

    def _conflicts(self, content: ContentKey, path: bytes) -> list[bytes]:
        conflicts: list[dict[str, object]] = [
            {
                "path": os.fsdecode(other),
                "relation": str(alike.relation),
                "distance": alike.distance,
                "claim": claim,
            }
            for alike, claim in self._pictures.conflicts_of(content)
            for other in sorted(islice(self._answers.iter_paths(alike.content), _MOST_OTHERS))
        ]
        return [_encoded("conflict", path=path, conflicts=conflicts[:_MOST_OTHERS])] if conflicts else []


def _encoded(event: str, **facts: Any) -> bytes:
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return json.dumps({"event": event, "at": at, **{name: _as_json(fact) for name, fact in facts.items()}}).encode()


def _as_json(fact: object) -> object:
    if isinstance(fact, list):
        return [_as_json(each) for each in fact]
    return os.fsdecode(fact) if isinstance(fact, bytes) else fact
