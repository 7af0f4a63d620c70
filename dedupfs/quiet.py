"""Hours of the day in which background work waits. Pure: whoever asks says what time it is.

Only the clock on the wall counts, looked at anew each time: a clock that is set, or daylight saving, can make one night
longer or shorter, and nothing worse.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_DAY_MINUTES = 24 * 60
_SPAN = re.compile(r"([01][0-9]|2[0-4]):([0-5][0-9])-([01][0-9]|2[0-4]):([0-5][0-9])")


@dataclass(frozen=True, slots=True)
class QuietHours:
    """The minutes of the day, 0 to 1439, in which it is quiet; at least one is left to work in."""

    minutes: frozenset[int] = frozenset()

    def until(self, hour: int, minute: int) -> str:
        """Of a time of day: when it is not quiet any more, as HH:MM; "" when it is not quiet."""
        end = 60 * hour + minute
        if end not in self.minutes:
            return ""
        while end in self.minutes:
            end = (end + 1) % _DAY_MINUTES
        return f"{end // 60:02}:{end % 60:02}"


NEVER = QuietHours()


def parse_spans(spans: Iterable[str]) -> QuietHours:
    """Of spans like 08:00-18:00 or 22:00-06:00, from the first minute to before the last one. Raises ValueError with
    what is wrong."""
    minutes: set[int] = set()
    for span in spans:
        found = _SPAN.fullmatch(span)
        begin, end = (60 * int(found[at]) + int(found[at + 1]) for at in (1, 3)) if found else (0, 0)
        if begin == end or begin >= _DAY_MINUTES or end > _DAY_MINUTES:
            raise ValueError(f"{span} is no time of the day, from and to: 08:00-18:00, 22:00-06:00")
        minutes.update(minute % _DAY_MINUTES for minute in range(begin, end if begin < end else end + _DAY_MINUTES))
    if len(minutes) == _DAY_MINUTES:
        raise ValueError("no time of the day is left to work in")
    return QuietHours(frozenset(minutes))
