"""What people decided is kept, whatever happens to the file around it."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dedupfs.backing import Backing
from dedupfs.decisions import NOT_SIMILAR, NOTE, PIN, UNPIN, Decisions
from dedupfs.model import ContentKey, Digest


def content(number: int) -> ContentKey:
    return ContentKey(Digest(number.to_bytes(16, "big")))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / ".dedupfs").mkdir()
    return tmp_path / ".dedupfs/decisions.jsonl"


@pytest.fixture
def backing(log: Path) -> Iterator[Backing]:
    backing = Backing(str(log.parent.parent))
    yield backing
    backing.close()


def test_pins_and_pairs_are_remembered(backing: Backing) -> None:
    decisions = Decisions(backing)
    decisions.record(PIN, [content(1)], paths=[b"a"], who="me")
    decisions.record(PIN, [content(2)], paths=[b"caf\xe9"], who="me")
    decisions.record(UNPIN, [content(1)], paths=[b"a"], who="you")
    decisions.record(NOT_SIMILAR, [content(3), content(4)], paths=[b"c", b"d"], who="me")
    decisions.record(NOTE, [content(2)], paths=[b"b"], who="me", text="two\nlines")
    for again in (decisions, Decisions(backing)):
        assert [again.is_pinned(content(number)) for number in (1, 2, 3)] == [False, True, False]
        assert again.are_apart(content(4), content(3))
        assert not again.are_apart(content(3), content(1))
        history = again.history([content(2), content(4)])
        assert [entry["action"] for entry in history] == [PIN, NOT_SIMILAR, NOTE]
        assert history[2]["text"] == "two\nlines"
        assert history[0]["paths"] == [os.fsdecode(b"caf\xe9")]
        assert again.history([content(9)]) == []


def test_the_log_is_appended_to_and_nothing_else(backing: Backing, log: Path) -> None:
    Decisions(backing).record(PIN, [content(1)], paths=[b"a"], who="me")
    before = log.read_bytes()
    Decisions(backing).record(UNPIN, [content(1)], paths=[b"a"], who="me")
    assert log.read_bytes().startswith(before)
    assert json.loads(log.read_bytes().splitlines()[1])["before"] == "pinned"


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_line_that_a_crash_tore_does_not_count_and_harms_none(backing: Backing, log: Path, cut: int) -> None:
    decisions = Decisions(backing)
    decisions.record(PIN, [content(1)], paths=[b"a"], who="me")
    decisions.record(PIN, [content(2)], paths=[b"b"], who="me")
    log.write_bytes(log.read_bytes()[:-cut])
    decisions = Decisions(backing)
    assert (decisions.is_pinned(content(1)), decisions.is_pinned(content(2))) == (True, False)
    decisions.record(PIN, [content(3)], paths=[b"c"], who="me")
    again = Decisions(backing)
    assert again.is_pinned(content(1))
    assert again.is_pinned(content(3))


def test_a_line_of_a_later_version_has_no_effect(backing: Backing, log: Path) -> None:
    log.write_bytes(
        b'{"action": "certify", "contents": ["' + b"0" * 31 + b'1.0"]}\n'
        b'{"action": "pin", "contents": ["short.0"]}\n'
        b"not JSON\n"
        b"\n"
    )
    decisions = Decisions(backing)
    assert not decisions.is_pinned(content(1))
    decisions.record(PIN, [content(1)], paths=[], who="me")
    assert Decisions(backing).is_pinned(content(1))


def test_what_cannot_be_written_is_not_decided(backing: Backing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither now nor at the next start: who was told so may have decided otherwise since."""
    decisions = Decisions(backing)
    decisions.record(PIN, [content(2)], paths=[], who="me")

    def fail(fd: int) -> None:
        raise OSError(5, "broken disk")

    monkeypatch.setattr(backing, "fsync", fail)
    with pytest.raises(OSError, match="broken disk"):
        decisions.record(PIN, [content(1)], paths=[], who="me")
    assert not decisions.is_pinned(content(1))
    monkeypatch.undo()
    assert not Decisions(backing).is_pinned(content(1))
    decisions.record(PIN, [content(3)], paths=[], who="me")
    again = Decisions(backing)
    assert [again.is_pinned(content(number)) for number in (1, 2, 3)] == [False, True, True]
