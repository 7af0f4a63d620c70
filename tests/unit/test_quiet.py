"""Quiet hours are minutes of the day, whatever clocks do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedupfs.quiet import NEVER, parse_spans


@pytest.mark.parametrize(
    ("spans", "at", "until"),
    [
        (["08:00-18:00"], (8, 0), "18:00"),
        (["08:00-18:00"], (17, 59), "18:00"),
        (["08:00-18:00"], (18, 0), ""),
        (["08:00-18:00"], (7, 59), ""),
        (["22:00-06:30"], (23, 59), "06:30"),
        (["22:00-06:30"], (0, 0), "06:30"),
        (["22:00-06:30"], (6, 30), ""),
        (["22:00-24:00"], (23, 59), "00:00"),
        (["22:00-24:00"], (0, 0), ""),
        (["08:00-12:00", "12:00-13:00", "23:00-08:00"], (23, 30), "13:00"),
        (["08:00-12:00", "11:00-14:00"], (9, 0), "14:00"),
    ],
)
def test_spans(spans: list[str], at: tuple[int, int], until: str) -> None:
    assert parse_spans(spans).until(*at) == until


@pytest.mark.parametrize(
    "spans",
    [
        *(
            ["8:00-18:00"],
            ["08:00"],
            ["08:00-08:00"],
            ["25:00-26:00"],
            ["24:00-01:00"],
            ["08:60-09:00"],
            ["23:00-24:01"],
        ),
        *(["00:00-24:00"], ["00:00-12:00", "12:00-00:00"], [""], ["08:00-18:00 "], ["٠٨:00-09:00"]),
    ],
)
def test_what_is_none(spans: list[str]) -> None:
    with pytest.raises(ValueError, match=r"no time of the day"):
        parse_spans(spans)


def test_never() -> None:
    assert all(NEVER.until(hour, minute) == "" for hour in range(24) for minute in range(60))


@given(st.lists(st.tuples(*[st.integers(0, 1439)] * 2), max_size=4), st.integers(0, 1439))
def test_an_end_is_the_end(spans: list[tuple[int, int]], now: int) -> None:
    written = [f"{a // 60:02}:{a % 60:02}-{b // 60:02}:{b % 60:02}" for a, b in spans]
    try:
        hours = parse_spans(written)
    except ValueError:
        return
    until = hours.until(*divmod(now, 60))
    within = any((now - begin) % 1440 < (end - begin) % 1440 for begin, end in spans)
    assert bool(until) == within
    if until:
        assert hours.until(int(until[:2]), int(until[3:])) == ""
