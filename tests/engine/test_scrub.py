"""A scrub finds what rotted, heals what can be healed, names the rest, and goes on where it was stopped."""

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest

from dedupfs.errors import Busy, DamagedContent, UsageError
from dedupfs.model import Ino

from .bench import Bench, Meeting, Tampered, content, in_thread, silent
from .test_damage import DATA, _rot_without_a_trace, rot, share, unprotect

OTHER = content("other")


def scrub(bench: Bench) -> dict[str, Any]:
    return dict(bench.engine.scrub(silent, 0))


def findings(bench: Bench) -> list[tuple[str, str, list[str], list[str]]]:
    answer = scrub(bench)
    return [(each["kind"], each["fate"], each["paths"], each["copies"]) for each in answer["findings"]]


def verified(bench: Bench, path: str) -> int | None:
    record = bench.engine.index.file(Ino(bench.below(path).stat().st_ino))
    assert record is not None
    known = bench.engine.index.verified(record.content)
    return None if known is None else known.time_s


def restored(bench: Bench, path: str) -> None:
    """A plain file of a content that others share."""
    assert bench.engine.restore([os.fsencode(path)], silent)["restored"] == 1
    bench.settle()
    assert bench.state(path) == "plain"


def test_all_is_well(bench: Bench) -> None:
    share(bench, "one", "two")
    bench.write("alone", OTHER)
    bench.write("tiny", b"x")
    bench.write("empty", b"")
    bench.settle()
    before = int(time.time())
    answer = scrub(bench)
    assert answer == {
        "contents": 4,
        "bytes": len(DATA) + len(OTHER) + 1,
        "skipped": 0,
        "resumed": False,
        "findings": [],
        "exit_code": 0,
    }
    for path in ("one", "two", "alone", "tiny"):
        assert before <= (verified(bench, path) or 0) <= time.time()


@pytest.mark.parametrize("bench", [("reflink", "xfs"), ("reflink", "btrfs")], indirect=True, ids="-".join)
def test_shared_extents(bench: Bench) -> None:
    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.settle()
    assert scrub(bench)["bytes"] == 2 * len(DATA)
    assert findings(bench) == []


def test_a_rotten_blob_is_healed_by_a_plain_file(bench: Bench) -> None:
    share(bench, "one", "two", "three")
    restored(bench, "three")
    bad = rot(bench.the_blob())
    bench.expect_log("was damaged; healed", "scrub: blob")
    assert findings(bench) == [("blob", "healed", ["one", "two"], ["three"])]
    assert [bench.read(name) for name in ("one", "two", "three")] == [DATA] * 3
    (aside,) = bench.inside("quarantine")
    assert (bench.source / ".dedupfs/quarantine" / aside).read_bytes() == bad
    assert findings(bench) == []


def test_beside_running_threads(bench: Bench) -> None:
    share(bench, "one", "two", "three")
    restored(bench, "three")
    rot(bench.the_blob())
    bench.expect_log("was damaged; healed", "scrub: blob")
    bench.reopen(start=True)
    assert findings(bench) == [("blob", "healed", ["one", "two"], ["three"])]
    assert bench.read("one") == DATA


def test_a_rotten_blob_without_a_copy_is_set_aside_until_one_comes(bench: Bench) -> None:
    share(bench, "one", "two")
    bad = rot(bench.the_blob())
    told: list[bytes] = []
    bench.engine.on_replaced = told.append
    bench.expect_log("scrub: blob .* of one, two: .*quarantined", "is missing", "was damaged; healed")
    assert findings(bench) == [("blob", "quarantined", ["one", "two"], [])]
    assert sorted(told) == [b"one", b"two"]
    for path in ("one", "two"):
        for flags in (os.O_RDONLY, os.O_RDWR):
            with pytest.raises(DamagedContent) as caught:
                bench.open_file(path, flags)
            assert caught.value.errno == errno.EIO
    (aside,) = bench.inside("quarantine")
    assert (bench.source / ".dedupfs/quarantine" / aside).read_bytes() == bad
    assert [paths for _, paths in bench.engine.damages()] == [[b"one", b"two"]]
    assert findings(bench) == [("blob", "left", ["one", "two"], [])]  # it is missing now
    bench.write("good", DATA)
    bench.settle()
    assert [bench.read(name) for name in ("one", "two", "good")] == [DATA] * 3
    assert bench.engine.damages() == []
    assert findings(bench) == []


def test_a_hard_linked_copy_is_named(bench: Bench) -> None:
    """A file with two names cannot become a blob."""
    share(bench, "one", "two")
    bench.write("linked", DATA)
    bench.link("linked", "also")
    bench.settle()
    assert bench.state("linked") == "plain"
    rot(bench.the_blob())
    bench.expect_log("scrub: blob", "is missing", "was damaged; healed")
    ((kind, fate, paths, copies),) = findings(bench)
    assert (kind, fate, paths, copies) == ("blob", "quarantined", ["one", "two"], ["also", "linked"])
    bench.settle()
    assert bench.read("linked") == DATA
    bench.copy("linked", "third")
    bench.settle()
    assert bench.read("one") == DATA


def test_a_rotten_copy_heals_nothing(bench: Bench) -> None:
    share(bench, "one", "two", "three")
    restored(bench, "three")
    rot(bench.the_blob())
    bad = _rot_without_a_trace(bench, "three")
    bench.expect_log("scrub: ", "is missing")
    assert sorted(each[:2] for each in findings(bench)) == [("blob", "quarantined"), ("file", "left")]
    bench.settle()
    assert bench.read("three") == bad
    with pytest.raises(DamagedContent):
        bench.read("one")
    bench.expect_findings("reference-blob", "reference-blob")


def test_a_rotten_file_is_named_with_a_good_copy(bench: Bench) -> None:
    share(bench, "one", "two", "three")
    restored(bench, "three")
    bad = _rot_without_a_trace(bench, "three")
    bench.expect_log("scrub: three: .*; a good copy is one")
    assert findings(bench) == [("file", "left", ["three"], ["one", "two"])]
    bench.settle()
    assert bench.read("three") == bad
    assert bench.duplicates("three") == []
    assert bench.duplicates("one") == ["two"]
    # It is told again until somebody sees to it.
    bench.reopen()
    answer = scrub(bench)
    assert [(each["paths"], each["fate"]) for each in answer["findings"]] == [(["three"], "left")]
    assert answer["exit_code"] == 2
    bench.rename("three", "moved")
    bench.settle()
    assert [paths for _, paths in bench.engine.damages()] == [[b"moved"]]
    bench.write("moved", DATA)
    bench.settle()
    assert bench.engine.damages() == []
    assert findings(bench) == []


def test_a_rotten_file_that_is_alone(bench: Bench) -> None:
    bench.write("alone", DATA)
    bench.settle()
    bad = _rot_without_a_trace(bench, "alone")
    bench.expect_log("scrub: alone: ")
    assert findings(bench) == [("file", "left", ["alone"], [])]
    bench.settle()
    assert bench.below("alone").read_bytes() == bad
    bench.unlink("alone")
    bench.settle()
    assert findings(bench) == []


def test_what_was_changed_is_no_damage(bench: Bench) -> None:
    """Past the mount, or through it and not settled yet."""
    bench.write("past", DATA)
    bench.write("through", OTHER)
    bench.settle()
    rot(bench.below("past"))  # with another ctime
    with bench.opened("through", os.O_RDWR) as handle:
        bench.write_to(handle, b"CHANGED")
        answer = scrub(bench)
        assert (answer["contents"], answer["skipped"], answer["findings"]) == (0, 2, [])
    bench.scan()
    assert scrub(bench)["contents"] == 2


def test_a_writer_who_comes_while_it_looks_again(bench: Bench) -> None:
    bench.write("file", DATA)
    bench.settle()
    backing = Tampered(bench.source)
    bench.reopen(backing=backing)
    _rot_without_a_trace(bench, "file")
    meeting = Meeting()
    calls = []

    def before(name: str, arguments: tuple[object, ...]) -> None:
        if name == "forget_cached":
            calls.append(name)
            if len(calls) == 3:  # before the second reading, inside its watch
                meeting.wait()

    backing.before = before
    answers: list[dict[str, Any]] = []
    with in_thread(lambda: answers.append(scrub(bench))):
        meeting.reached()
        with in_thread(lambda: bench.write_at("file", b"NEW", 0)):
            bench.wait_for(lambda: any(watch.given_up for watch in bench.engine.openfiles._watches.values()))
            meeting.release()
    assert (answers[0]["skipped"], answers[0]["findings"]) == (1, [])
    bench.settle()


@pytest.mark.parametrize("what", ["blob", "file"])
def test_what_cannot_be_read_is_left(bench: Bench, what: str) -> None:
    """It may be the cable."""
    share(bench, "one", "two")
    bench.write("alone", OTHER)
    bench.settle()
    backing = Tampered(bench.source)
    bench.reopen(backing=backing)

    def before(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "open_quietly" and (
            arguments[0].startswith(b".dedupfs/blobs") if what == "blob" else arguments[0] == b"alone"
        ):
            raise OSError(errno.EIO, "Input/output error")

    backing.before = before
    bench.expect_log("scrub: ")
    assert findings(bench) == [(what, "left", ["one", "two"] if what == "blob" else ["alone"], [])]
    assert len(bench.engine.damages()) == 1
    backing.before = lambda name, arguments: None
    assert findings(bench) == []
    assert bench.engine.damages() == []
    assert bench.read("one") == DATA


@pytest.mark.parametrize("known", [False, True], ids=["unknown before", "known before"])
def test_damage_of_what_cannot_be_looked_at(bench: Bench, known: bool) -> None:
    """The references cannot be looked at: their blob is neither called good, nor is its damage forgotten."""
    bench.mkdir("folder")
    share(bench, "folder/one", "folder/two")
    rot(bench.the_blob())
    backing = Tampered(bench.source)
    bench.reopen(backing=backing)

    def before(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "lstat" and arguments[0].startswith(b"folder/"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    bench.expect_log("scrub: blob")
    if known:
        assert scrub(bench)["exit_code"] == 2
    backing.before = before
    assert scrub(bench)["exit_code"] == 2
    backing.before = lambda name, arguments: None
    damages = bench.engine.damages()
    assert damages
    assert all(paths == [b"folder/one", b"folder/two"] for _, paths in damages)
    bench.expect_findings("reference-blob", "reference-blob")


def test_a_blob_that_cannot_be_read_is_healed(bench: Bench) -> None:
    share(bench, "one", "two", "three")
    restored(bench, "three")
    backing = Tampered(bench.source)
    bench.reopen(backing=backing)
    bad = bench.the_blob().stat().st_ino

    def before(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "forget_cached" and os.fstat(arguments[0]).st_ino == bad:
            raise OSError(errno.EIO, "Input/output error")  # as the read that comes next

    backing.before = before
    bench.expect_log("was damaged; healed", "scrub: blob")
    assert findings(bench) == [("blob", "healed", ["one", "two"], ["three"])]
    backing.before = lambda name, arguments: None
    assert bench.read("one") == DATA


def test_it_goes_on_where_it_was(bench: Bench) -> None:
    for number in range(20):
        bench.write(f"file {number}", content(str(number)))
    bench.settle()

    class Enough(Exception):
        pass

    seen: list[int] = []

    def impatient(phase: str, done: int, total: int | None) -> None:
        seen.append(done)
        if len(seen) > 8:
            raise Enough

    with pytest.raises(Enough):
        bench.engine.scrub(impatient, 0)
    bench.reopen()
    answer = scrub(bench)
    assert answer["resumed"]
    assert 0 < answer["contents"] < 20
    first = bench.engine.index.scrub_pass()
    assert first is not None
    assert first.number == 1
    assert first.finished_s >= first.begun_s
    answer = scrub(bench)
    assert (answer["contents"], answer["resumed"]) == (20, False)


def test_contents_that_are_gone_are_forgotten(bench: Bench) -> None:
    bench.write("here", DATA)
    bench.write("gone", OTHER)
    bench.settle()
    scrub(bench)
    bench.unlink("gone")
    bench.settle()
    scrub(bench)
    assert len(bench.engine.index.all_verified(b"", 10)[0]) == 1


def test_the_rate_is_kept(bench: Bench) -> None:
    for number in range(4):
        bench.write(f"file {number}", content(str(number), 500_000))
    bench.settle()
    begun = time.monotonic()
    bench.engine.scrub(silent, 4)
    # The last piece need not be waited for.
    assert time.monotonic() - begun > 1_500_000 / 4_000_000


def test_one_at_a_time(bench: Bench) -> None:
    bench.write("file", DATA)
    bench.settle()
    meeting = Meeting()

    def wait(phase: str, done: int, total: int | None) -> None:
        meeting.wait()

    with in_thread(lambda: bench.engine.scrub(wait, 0)):
        meeting.reached()
        with pytest.raises(Busy):
            scrub(bench)
        meeting.release()


def test_not_where_nothing_may_be_changed(bench: Bench) -> None:
    bench.reopen(read_only=True)
    with pytest.raises(UsageError):
        scrub(bench)
    bench.reopen()


def test_a_missing_blob(bench: Bench) -> None:
    share(bench, "one", "two")
    unprotect(bench.the_blob())
    bench.the_blob().unlink()
    bench.expect_log("scrub: ", "is missing")
    assert findings(bench) == [("blob", "left", ["one", "two"], [])]
    bench.expect_findings("reference-blob", "reference-blob")


def test_an_index_that_is_new_begins_anew(bench: Bench, tmp_path: Path) -> None:
    bench.write("file", DATA)
    bench.settle()
    scrub(bench)
    bench.engine.replace_index()
    bench.scan()
    assert verified(bench, "file") is None
    assert scrub(bench)["contents"] == 1


def test_it_stops_also_while_the_index_cannot_be_written(bench: Bench) -> None:
    """Somebody else has a batch in hand that does not come to its end: the disk is full."""

    class Enough(Exception):
        pass

    bench.write("file", DATA)
    bench.settle()
    with bench.engine.settler._batch_lock:
        stopping: list[int] = []

        def stop(phase: str, done: int, total: int | None) -> None:
            stopping.append(done)
            if len(stopping) > 3:
                raise Enough

        with pytest.raises(Enough):
            bench.engine.scrub(stop, 0)
    assert scrub(bench)["contents"] == 1
