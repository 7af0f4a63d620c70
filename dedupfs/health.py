"""Is a served source well? A few questions, each answered by looking, and cheap enough to be asked every minute.

Asked through the control socket and by whoever scrapes metrics, in any thread; nothing is changed, and nothing waits
for the index to be writable.
"""

import time
from dataclasses import dataclass

from .backing import Backing
from .index import Index
from .settle import Settler

# A batch of work takes a second, and one large file as long as reading it takes: 900 s are 90 GB from a slow disk.
_STUCK_S = 900.0

# The disk is nearly full when less than this is free, or this much of a large one.
_FREE_SHARE = 0.05
_FREE_BYTES = 20 << 30
_FREE_INODES_SHARE = 0.01

_INDEX_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that somebody should see to: which check found it, and what is wrong, in one line."""

    check: str
    problem: str


CHECKS = ("settling", "disk", "index", "damage")


@dataclass(frozen=True, slots=True)
class Health:
    """What a look found."""

    problems: tuple[Problem, ...]
    free_bytes: int
    index_used_share: float

    def as_json(self) -> dict[str, object]:
        return {
            "healthy": not self.problems,
            "problems": [{"check": one.check, "problem": one.problem} for one in self.problems],
            "free_bytes": self.free_bytes,
            "index_used_share": round(self.index_used_share, 4),
        }


def look(backing: Backing, index: Index, settler: Settler, *, damaged: int, scan_problem: str) -> Health:
    """`damaged`: how much a scrub found that nobody has put right; `scan_problem`: why the last scan
    did not make the index complete, "" where it did, or none was tried."""
    st = backing.statvfs(b"")
    size_bytes, free_bytes = st.f_blocks * st.f_frsize, st.f_bavail * st.f_frsize
    problems = []
    if settler.index_error:
        problems.append(Problem("index", f"{settler.index_error}; what is settled waits in memory"))
    if scan_problem:
        problems.append(Problem("index", scan_problem))
    if settler.lost_a_batch:
        problems.append(Problem("settling", "a batch was lost (see the log); no blob is removed until the next mount"))
    if settler.busy_since_s is not None and time.monotonic() - settler.busy_since_s > _STUCK_S:
        minutes = int(time.monotonic() - settler.busy_since_s) // 60
        problems.append(Problem("settling", f"one batch has been worked on for {minutes} minutes; see the log"))
    if settler.is_dead():
        problems.append(Problem("settling", "its thread has ended; see the log, and mount again"))
    if free_bytes < min(size_bytes * _FREE_SHARE, _FREE_BYTES):
        problems.append(Problem("disk", f"nearly full: {free_bytes >> 20:,} MiB free"))
    if st.f_files and st.f_favail < st.f_files * _FREE_INODES_SHARE:
        problems.append(Problem("disk", f"nearly out of inodes: {st.f_favail:,} free"))
    used = index.used_share()
    if used > _INDEX_SHARE:
        problems.append(Problem("index", f"{100 * used:.0f} % of the room that it can have is used"))
    if damaged:
        problems.append(Problem("damage", f"damaged contents: {damaged:,}; dedupfs report names them"))
    return Health(tuple(problems), free_bytes, used)
