"""Garbage: only what nothing refers to goes, and through the trash; a doubt keeps everything."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dedupfs.backing import Backing
from dedupfs.errors import Busy
from dedupfs.gc import Plan, gc
from dedupfs.model import ContentKey, Digest

from .bench import Bench, content, silent
from .test_damage import DATA, share, unprotect

UNNEEDED = ContentKey(Digest(b"\xab" * 16), 0)


def collect(bench: Bench, *, keep_days: float = 14, dry_run: bool = False) -> Plan:
    return gc(str(bench.source), keep_days=keep_days, dry_run=dry_run, progress=silent)


def trash(bench: Bench) -> list[str]:
    path = bench.source / ".dedupfs" / "trash"
    return sorted(os.listdir(path)) if path.exists() else []


@pytest.fixture
def littered(bench: Bench) -> Bench:
    """Two references, and a blob that nothing refers to. Closed."""
    share(bench, "one", "two")
    bench.close()
    path = bench.source / ".dedupfs" / "blobs" / "ab" / UNNEEDED.name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content("unneeded"))
    return bench


def test_a_dry_run_changes_nothing(littered: Bench) -> None:
    before = littered.blobs()
    plan = collect(littered, dry_run=True)
    assert plan.as_json() == {
        "leftovers": [],
        "unreferenced": 1,
        "unreferenced_bytes": len(content("unneeded")),
        "taken_back": 0,
        "expired": 0,
        "expired_bytes": 0,
        "waiting": 0,
        "waiting_bytes": 0,
        "problems": [],
    }
    assert littered.blobs() == before
    assert (littered.source / ".dedupfs" / "clean").exists()
    littered.expect_findings("unreferenced-blob")


def test_through_the_trash(littered: Bench) -> None:
    collect(littered)
    assert len(littered.blobs()) == 1
    (name,) = trash(littered)
    assert name.startswith(UNNEEDED.name + ".")
    again = collect(littered)
    assert (len(again.unreferenced), len(again.expired), len(again.waiting)) == (0, 0, 1)
    assert trash(littered) == [name]
    assert len(collect(littered, keep_days=0).expired) == 1
    assert trash(littered) == []
    littered.open()
    assert littered.read("one") == littered.read("two") == DATA


def test_two_of_a_content_are_both_kept(littered: Bench) -> None:
    collect(littered)
    blob = littered.source / ".dedupfs" / "blobs" / "ab" / UNNEEDED.name
    for _ in range(3):
        blob.write_bytes(content("unneeded"))
        collect(littered)
    assert len(trash(littered)) == 4


def test_its_time_is_counted_from_when_it_came(littered: Bench) -> None:
    collect(littered)
    directory = littered.source / ".dedupfs" / "trash"
    (name,) = trash(littered)
    for age_days, gone in ((13.9, False), (14.1, True)):
        now = f"{UNNEEDED.name}.{int(time.time() - age_days * 86400)}"
        os.rename(directory / name, directory / now)
        name = now
        collect(littered)
        assert (trash(littered) == []) is gone


def test_a_reference_that_comes_back_finds_its_blob(littered: Bench) -> None:
    """The only two references were away: in a backup, say."""
    away = littered.source.with_name(littered.source.name + " away")
    away.mkdir()
    for name in ("one", "two"):
        os.rename(littered.below(name), away / name)
    assert len(collect(littered).unreferenced) == 2
    assert littered.blobs() == []
    for name in ("one", "two"):
        os.rename(away / name, littered.below(name))
    away.rmdir()
    plan = collect(littered, keep_days=0)
    assert (len(plan.wanted_back), len(plan.expired)) == (1, 1)
    littered.open()
    littered.scan()
    assert littered.read("one") == littered.read("two") == DATA


def test_fsck_takes_a_blob_back(littered: Bench) -> None:
    blob = next(path for path in (littered.source / ".dedupfs/blobs").rglob("*.0") if path.name != UNNEEDED.name)
    unprotect(blob)
    (littered.source / ".dedupfs/trash").mkdir()
    os.rename(blob, littered.source / ".dedupfs/trash" / f"{blob.name}.{int(time.time())}")
    findings = littered.fsck(repair=False).findings
    assert {finding.check: finding.remedy for finding in findings} == {
        "reference-blob": "its blob taken from the trash, or from a plain file of that content, if there is one",
        "unreferenced-blob": "moved to the trash",
    }
    assert littered.fsck(repair=True).exit_code == 1
    assert len(trash(littered)) == 1
    littered.open()
    assert littered.read("one") == DATA


def test_a_damaged_blob_is_not_taken_back(littered: Bench) -> None:
    blob = next(path for path in (littered.source / ".dedupfs/blobs").rglob("*.0") if path.name != UNNEEDED.name)
    unprotect(blob)
    (littered.source / ".dedupfs/trash").mkdir()
    target = littered.source / ".dedupfs/trash" / f"{blob.name}.1"
    os.rename(blob, target)
    target.chmod(0o600)
    target.write_bytes(b"rotten")
    plan = collect(littered, keep_days=0)
    (problem,) = plan.problems
    assert problem["reason"].endswith("is not in the trash, or damaged")
    assert target.exists()
    littered.expect_findings("reference-blob", "reference-blob")


def test_a_doubt_keeps_everything(littered: Bench) -> None:
    os.setxattr(littered.below("two"), littered.reference_xattr, b"not understood")
    plan = collect(littered, keep_days=0)
    assert [problem["path"] for problem in plan.problems] == ["two"]
    assert len(littered.blobs()) == 2
    assert trash(littered) == []
    littered.expect_findings()


@pytest.mark.parametrize("how", ["gc", "fsck"])
def test_what_is_moved_while_it_is_looked_for(bench: Bench, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Both references are always where the walk is not: before it comes there, or when it is gone. Their blob stays."""
    for directory in ("a", "z"):
        bench.mkdir(directory)
    share(bench, "a/one", "a/two")
    bench.close()
    stranger = bench.source / ".dedupfs/blobs/stranger"
    if how == "fsck":
        stranger.write_bytes(b"so that there is something to repair")
    decisive = 1 if how == "gc" else 2  # the walk whose answer is acted on
    listed: list[bytes] = []
    scandir = Backing.scandir

    def move_to(directory: bytes) -> None:
        for path in list(bench.source.glob("[az]/*")):
            os.rename(path, bench.below(os.fsdecode(directory)) / path.name)

    def moving(self: Backing, path: bytes, *more: Any) -> Iterator[os.DirEntry[str]]:
        if path in (b"a", b"z"):
            listed.append(path)
            if len(listed) == 2 * decisive - 1:
                move_to(b"z" if path == b"a" else b"a")
            elif len(listed) == 2 * decisive:
                move_to(listed[-2])
        return scandir(self, path, *more)

    monkeypatch.setattr(Backing, "scandir", moving)
    if how == "gc":
        collect(bench, keep_days=0)
    else:
        bench.fsck(repair=True)
        stranger.unlink()
    monkeypatch.undo()
    assert len(listed) >= 2 * decisive
    assert len(bench.blobs()) == 1
    bench.open()
    bench.scan()
    (one, two) = (str(path.relative_to(bench.source)) for path in bench.source.glob("[az]/*"))
    assert bench.read(one) == bench.read(two) == DATA


def test_leftovers_are_cleared(littered: Bench) -> None:
    staged = littered.source / ".dedupfs/staging/refer.1.2.3"
    staged.touch()
    assert collect(littered, dry_run=True).leftovers == [b".dedupfs/staging/refer.1.2.3"]
    assert staged.exists()
    collect(littered)
    assert not staged.exists()


def test_not_while_somebody_has_the_store(bench: Bench) -> None:
    with pytest.raises(Busy):
        collect(bench)


def test_a_blob_that_is_somebodys_file_is_left(littered: Bench) -> None:
    path: Path = littered.source / ".dedupfs" / "blobs" / "ab" / UNNEEDED.name
    os.link(path, littered.below("mine"))
    plan = collect(littered)
    assert "has 2 links" in plan.problems[0]["reason"]
    assert path.exists()
    littered.expect_findings()
