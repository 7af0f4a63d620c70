"""The authoritative version: one criterion after the other, and each is enough."""

from dataclasses import replace
from typing import Any

import pytest

from dedupfs.authority import CRITERIA, Candidate, judge
from dedupfs.model import ContentKey, Digest, ImageRecord

RECORD = ImageRecord(
    version=1,
    format="JPEG",
    width=4000,
    height=3000,
    orientation=1,
    phash=bytes(32),
    trimmed_phash=b"",
    scan=b"",
    pixels=b"",
    quality=90,
    contrast=500,
    bright_permille=0,
    is_grey=False,
    taken="2026-01-02T03:04:05",
    zone="",
    make="Maker",
    camera="Model",
    serial="",
    software="",
    has_gps=False,
)


def candidate(
    number: int, *, seen_ns: int = 5, pinned: bool = False, preference: int = 1, folder: str = "", **facts: Any
) -> Candidate:
    content = ContentKey(Digest(number.to_bytes(16, "big")))
    return Candidate(content, replace(RECORD, **facts), seen_ns, pinned, preference, folder)


# Each is better by this criterion, and as bad as can be by all that come after it.
@pytest.mark.parametrize(
    ("criterion", "better", "worse"),
    [
        ("pinned", {"pinned": True, "taken": "", "width": 10, "quality": 1}, {}),
        ("original", {"width": 10, "quality": 1}, {"software": "Adobe Photoshop 2026"}),
        ("original", {"width": 10, "quality": 1}, {"taken": ""}),
        ("original", {"width": 10, "quality": 1}, {"make": "", "camera": ""}),
        ("resolution", {"quality": 1, "taken": "2027-01-01T00:00:00"}, {"width": 3999}),
        ("compression", {"taken": "2027-01-01T00:00:00"}, {"quality": 89}),
        ("compression", {"format": "PNG", "quality": 0, "taken": "2027-01-01T00:00:00"}, {"quality": 99}),
        ("seen", {"seen_ns": 1, "preference": 2}, {"seen_ns": 2, "preference": 0}),
        ("captured", {"seen_ns": 9}, {"taken": "2026-01-02T03:04:06", "seen_ns": 1}),
        ("seen", {"seen_ns": 1}, {"seen_ns": 2}),
        ("preferred", {"preference": 0, "folder": "originals"}, {"preference": 1}),
        ("digest", {}, {}),
    ],
)
def test_the_order_of_evidence(criterion: str, better: dict[str, Any], worse: dict[str, Any]) -> None:
    number = 2 if criterion != "digest" else 1
    good, bad = candidate(number, **better), candidate(3 - number, **worse)
    for both in ([good, bad], [bad, good]):
        verdict = judge(both)
        assert verdict.chosen == good.content
        assert verdict.lost_by[bad.content].criterion == criterion
        assert [reason.criterion for reason in verdict.reasons] == list(CRITERIA[: CRITERIA.index(criterion) + 1])
        assert all(reason.value for reason in verdict.reasons)


def test_one_alone_needs_no_reason() -> None:
    verdict = judge([candidate(1)])
    assert (verdict.reasons, verdict.lost_by) == ([], {})
