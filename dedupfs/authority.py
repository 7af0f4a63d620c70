"""Which of several versions of a photograph is the authoritative one, and why: a fixed order of evidence. Pure.

The first criterion on which two versions differ decides between them, later ones do not count:

    pinned        a person said so
    original      the camera's own metadata are there (time and model), and no editor says that it wrote the file
    resolution    more pixels
    compression   the finer quantisation of a JPEG; formats without loss are finest
    captured      the earlier time of capture; any before none
    seen          the earlier modification time of its oldest copy
    preferred     a copy in a folder that the configuration prefers; the one named first before the next
    digest        nothing tells them apart: the lower digest, so that every answer is the same
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from .likeness import is_edited
from .model import ContentKey, ImageRecord

_FINEST = 100
_UNKNOWN_QUALITY = 50  # of formats that may have lost something, and do not say how much
_WITHOUT_LOSS = ("PNG", "TIFF", "BMP", "RAW")


class Candidate(NamedTuple):
    content: ContentKey
    record: ImageRecord
    seen_ns: int
    pinned: bool
    preference: int = 0  # the place of its best copy's folder in the list of preferred ones; its length for none
    folder: str = ""  # that folder


class Reason(NamedTuple):
    criterion: str
    value: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reasons`: what speaks for the one that was chosen, up to what set it apart from all others; `lost_by`: for each
    other one, what it lost by, and what it has there."""

    chosen: ContentKey
    reasons: list[Reason]
    lost_by: dict[ContentKey, Reason]


CRITERIA = ("pinned", "original", "resolution", "compression", "captured", "seen", "preferred", "digest")


def judge(candidates: list[Candidate]) -> Verdict:
    ranked = sorted(candidates, key=rank)
    chosen, others = ranked[0], ranked[1:]
    lost_by: dict[ContentKey, Reason] = {}
    furthest = 0
    for other in others:
        ours, theirs = rank(chosen), rank(other)
        decided = next(number for number in range(len(CRITERIA)) if ours[number] != theirs[number])
        lost_by[other.content] = Reason(CRITERIA[decided], _value(other, CRITERIA[decided]))
        furthest = max(furthest, decided)
    reasons = [Reason(criterion, _value(chosen, criterion)) for criterion in CRITERIA[: furthest + 1]]
    return Verdict(chosen.content, reasons if others else [], lost_by)


def is_original(record: ImageRecord) -> bool:
    return bool(record.taken and (record.make or record.camera)) and not is_edited(record)


def _quality(record: ImageRecord) -> int:
    if record.format == "JPEG":
        return record.quality or _UNKNOWN_QUALITY
    return _FINEST if record.format in _WITHOUT_LOSS else _UNKNOWN_QUALITY


def rank(candidate: Candidate) -> tuple[Any, ...]:
    """The smallest one wins; one place for each criterion."""
    record = candidate.record
    return (
        not candidate.pinned,
        not is_original(record),
        -record.width * record.height,
        -_quality(record),
        record.taken or "9999",
        candidate.seen_ns,
        candidate.preference,
        candidate.content,
    )


def _value(candidate: Candidate, criterion: str) -> str:
    record = candidate.record
    match criterion:
        case "pinned":
            return "yes" if candidate.pinned else "no"
        case "original":
            if is_original(record):
                return f"{record.make} {record.camera}".strip()
            return f"written by {record.software}" if is_edited(record) else "no camera metadata"
        case "resolution":
            return f"{record.width} x {record.height}"
        case "compression":
            return f"{record.format} of quality {record.quality}" if record.quality else record.format
        case "captured":
            return record.taken or "not known"
        case "seen":
            return f"{candidate.seen_ns / 1e9:.0f}"
        case "preferred":
            return candidate.folder or "in no preferred folder"
    return candidate.content.digest.hex()
