"""What an archive held and what sharing saved, day by day: `.dedupfs/history.jsonl`, one JSON object a line and day.

A mount writes the line of the day anew every hour and when it ends, as a whole file that takes the place of the one
before; so there is no line that a crash could tear, and no more than ten years of them. The index can be made anew:
this stays. Nothing relies on it but reports.
"""

import json
import time
from typing import Any

from .backing import Backing
from .model import STORE_DIRECTORY, Totals
from .store import read_whole, write_whole

HISTORY = STORE_DIRECTORY + b"/history.jsonl"

_MOST_DAYS = 3660
_COUNTED = ("files", "logical_bytes", "stored_bytes")


def read(backing: Backing) -> list[dict[str, Any]]:
    """The days, in order: `day` (YYYY-MM-DD, local time), `files`, `logical_bytes`, `stored_bytes`. A line that is none
    is passed over. Raises OSError."""
    found = {}
    for line in read_whole(backing, HISTORY).splitlines():
        try:
            entry = json.loads(line)
            time.strptime(entry["day"], "%Y-%m-%d")
            counted = {name: entry[name] for name in _COUNTED}
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if all(type(value) is int and 0 <= value < 1 << 63 for value in counted.values()):
            found[entry["day"]] = {"day": entry["day"], **counted}
    return [found[day] for day in sorted(found)]


def record(backing: Backing, totals: Totals, *, day: str) -> None:
    """Keep what there is on this day, in the place of what was kept of it before. Raises OSError."""
    entry = {"day": day, **{name: getattr(totals, name) for name in _COUNTED}}
    days = [*(each for each in read(backing) if each["day"] != day), entry]
    days.sort(key=lambda each: str(each["day"]))
    write_whole(backing, HISTORY, b"".join(json.dumps(each).encode() + b"\n" for each in days[-_MOST_DAYS:]))
