"""All that a mount has for pictures, built once for one engine: workers, search, decisions, the thread that describes.

Loaded by a mount only: numpy takes its time, and a command without a mount describes nothing.
"""

import os

from .asking import AsCaller
from .backing import Backing
from .blobs import Blobs
from .claims import NamePattern
from .decisions import Decisions
from .describing import Describer
from .duplicates import Answers
from .errors import Unavailable
from .index import Index
from .likeness import Likeness, Picture, compare_each
from .model import Caller, Learned, Progress
from .pictures import XATTRS, Pictures
from .settle import Settler
from .similar import Similar
from .watching import Watching
from .workers import Workers

# Pictures described at the same time: half of the processors are left to apps whatever their priority.
_AT_A_TIME = max(1, min(4, (os.cpu_count() or 1) // 2))

_WAIT_S = 0.5


class Imaging:
    def __init__(
        self,
        backing: Backing,
        index: Index,
        blobs: Blobs,
        settler: Settler,
        answers: Answers,
        as_caller: AsCaller,
        *,
        at_a_time: int,
        name_pattern: NamePattern | None = None,
        preferred: tuple[bytes, ...] = (),
    ) -> None:
        """`at_a_time`: how many pictures are described at the same time, 0 for what fits the machine."""
        at_a_time = at_a_time or _AT_A_TIME
        self._workers = Workers(at_a_time + 1)  # one for who asks
        # Apart from the others: it is never handed a picture, so none can make it say of others what is not so.
        self._comparer = Workers(1)
        self._similar = Similar(index.images, self._compare_each)
        self.describer = Describer(
            backing, index, blobs, settler, self._similar, self._workers, self._comparer, at_a_time=at_a_time
        )
        self.pictures = Pictures(
            backing,
            index,
            answers,
            as_caller,
            self.describer,
            self._similar,
            self._workers,
            Decisions(backing),
            name_pattern=name_pattern,
            preferred=preferred,
        )
        self.watching = Watching(answers, self.pictures)
        self.describer.on_described = self.watching.described
        settler.on_settled = self._settled

    def _settled(self, learned: list[Learned]) -> None:
        self.describer.wake()
        self.watching.settled(learned)

    def _compare_each(self, ours: Picture, others: list[Picture], *, cuts: bool) -> list[Likeness | None]:
        """In a process of its own, so that requests need not wait for the interpreter; here where there is none."""
        if not others:
            return []
        try:
            return self._comparer.compare(ours, others, cuts=cuts)
        except Unavailable:
            return compare_each(ours, others, cuts=cuts)

    def answers(self, name: bytes) -> bool:
        """Whether `user.dedupfs.<name>` is about pictures."""
        return name in XATTRS

    def xattr(self, path: bytes, name: bytes, caller: Caller) -> bytes:
        return self.pictures.xattr(path, name, caller)

    def settle(self, progress: Progress) -> None:
        """Wait until every picture that can be read is described."""
        before = self.describer.described
        while not self.describer.wait_idle(_WAIT_S):
            done = self.describer.described - before
            progress("describing", done, done + self.describer.totals().waiting)

    def stop(self) -> None:
        self.watching.stop()
        self.describer.stop()
