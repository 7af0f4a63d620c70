"""Leaving: nothing of the store goes before every file is plain and proven; and without dedupfs, a shell does it."""

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dedupfs.decisions import Decisions
from dedupfs.errors import Busy
from dedupfs.leave import Departure, leave
from dedupfs.model import ContentKey, Digest
from dedupfs.restore import Group, room_needed
from tests.support.tools import needs_root, tool

from .bench import BLOCK, Bench, content, silent
from .test_damage import DATA, _rot_without_a_trace, unprotect
from .test_reconcile import Cover

OTHER = content("other", 4 * BLOCK)
DECIDED = "says what people decided about pictures; move it to where you keep it"
ODD = b'folder \xff/it\'s "odd" $(x) \n.jpg'.decode(errors="surrogateescape")


@pytest.fixture
def shared(bench: Bench) -> Bench:
    bench.mkdir("folder \udcff")
    for number, name in enumerate(("one", ODD, "folder \udcff/-two")):
        bench.write(name, DATA, mode=0o640 - number)
        os.setxattr(bench.below(name), "user.note", b"%d" % number)
        os.utime(bench.below(name), ns=(10**18, 10**18 + number))
    bench.write("three", OTHER, mode=0o400)
    bench.write("four", OTHER)
    bench.write("alone", content("alone"))
    bench.write("small", b"x")
    bench.write("small too", b"x")
    bench.write("empty", b"")
    os.symlink("one", bench.below("link"))
    bench.settle()
    assert len(bench.blobs()) == 2
    return bench


def photograph(bench: Bench) -> dict[str, tuple[Any, ...]]:
    """Everything that an application can tell of a file, from the source itself."""
    found = {}
    for path in sorted(bench.source.rglob("*")):
        if ".dedupfs" in path.parts:
            continue
        st = path.lstat()
        data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        xattrs = {
            name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)
        }
        times = st.st_mtime_ns if path.is_file() else 0
        found[str(path.relative_to(bench.source))] = (st.st_mode, st.st_uid, st.st_gid, times, data, xattrs)
    return found


def wanted(bench: Bench) -> dict[str, tuple[Any, ...]]:
    """What `photograph` must see when all is plain: references with the bytes that the mount shows."""
    found = photograph(bench)
    for path, (mode, uid, gid, times, _, xattrs) in list(found.items()):
        if bench.below(path).is_file() and not bench.below(path).is_symlink():
            xattrs.pop(bench.reference_xattr, None)
            found[path] = (mode, uid, gid, times, bench.read(path), xattrs)
    return found


def leave_it(bench: Bench, *, dry_run: bool = False) -> Departure:
    return leave(str(bench.source), dry_run=dry_run, progress=silent)


def refusals(bench: Bench) -> list[str]:
    departure = leave_it(bench)
    assert (bench.source / ".dedupfs" / "format").exists()
    return [each["path"] for each in departure.refused]


def test_a_source_below_that_has_the_same_photograph(bench: Bench) -> None:
    """Its references are to its own blob, and stay: what was ours goes."""
    for name in ("one", "two"):
        bench.write(name, DATA)
    bench.mkdir("below")
    bench.settle()
    below = Bench(bench.below("below"))
    below.open()
    for name in ("one", "two"):
        below.write(name, DATA)
    below.settle()
    before = below.below("one").stat()
    bench.scan()
    bench.close()
    assert leave_it(bench).refused == []
    assert bench.below("one").read_bytes() == DATA
    assert not (bench.source / ".dedupfs").exists()
    assert below.below("one").stat() == before
    assert below.state("one") == "reference"
    assert below.read("one") == DATA
    below.finish()


@needs_root
def test_a_reference_on_another_filesystem_that_is_mounted_below(shared: Bench) -> None:
    """Somebody moved it there past the mount, as mv does, with its xattrs: it needs its blob wherever it is."""
    shared.mkdir("mnt")
    shared.close()
    cover = Cover(shared)
    cover.put("mnt")
    try:
        tool("mv", shared.below("three"), shared.below("mnt/three"))
        shared.expect_log("cannot look at", "could not look at everything")
        assert refusals(shared)
        tool("mv", shared.below("mnt/three"), shared.below("three"))
    finally:
        cover.take_away()
    shared.open()
    shared.scan()
    assert shared.read("three") == shared.read("four") == OTHER


def test_everything_is_plain_and_the_store_gone(shared: Bench) -> None:
    before = wanted(shared)
    shared.close()
    departure = leave_it(shared)
    assert departure.refused == []
    assert (departure.restored, departure.proven) == (5, 9)
    assert not (shared.source / ".dedupfs").exists()
    assert photograph(shared) == before


def test_a_dry_run_changes_nothing(shared: Bench) -> None:
    before = photograph(shared)
    shared.close()
    answer = leave_it(shared, dry_run=True).as_json()
    assert not answer["left"]
    plan = answer["plan"]
    assert isinstance(plan, dict)
    assert (plan["files"], plan["bytes"], plan["fits"]) == (5, 3 * len(DATA) + 2 * len(OTHER), True)
    assert photograph(shared) == before


def test_not_while_somebody_has_the_store(shared: Bench) -> None:
    with pytest.raises(Busy):
        leave_it(shared)


def test_pending_files_are_not_shared_on_the_way(shared: Bench) -> None:
    shared.write("new", DATA)
    shared.close()
    departure = leave_it(shared)
    assert (departure.restored, departure.proven, departure.refused) == (5, 10, [])


def test_after_a_crash(shared: Bench) -> None:
    before = wanted(shared)
    shared.crash()
    assert leave_it(shared).refused == []
    assert photograph(shared) == before


def test_a_missing_blob_keeps_the_store(shared: Bench) -> None:
    blob = next(path for path in (shared.source / ".dedupfs/blobs").rglob("*.0") if path.stat().st_size == len(OTHER))
    unprotect(blob)
    blob.rename(shared.source / "rescued")
    shared.close()
    shared.expect_findings()
    assert sorted(refusals(shared)) == ["four", "three"]
    # What was refused can be put right, and the rest is done already.
    os.rename(shared.source / "rescued", blob)
    departure = leave_it(shared)
    assert (departure.restored, departure.refused) == (2, [])
    assert shared.below("three").read_bytes() == OTHER


def test_a_rotten_blob_keeps_the_store(shared: Bench) -> None:
    """Its copies are what it is; the proof finds that they are not what the digest says."""
    blob = next(path for path in (shared.source / ".dedupfs/blobs").rglob("*.0") if path.stat().st_size == len(OTHER))
    unprotect(blob)
    with open(blob, "r+b") as file:
        file.write(b"ROTTEN")
    shared.close()
    shared.expect_findings()
    assert sorted(refusals(shared)) == ["four", "three"]


def test_a_rotten_file_keeps_the_store(shared: Bench) -> None:
    _rot_without_a_trace(shared, "alone")
    shared.close()
    assert refusals(shared) == ["alone"]
    shared.expect_log("scrub: alone")
    shared.open()
    shared.engine.scrub(silent, 0)
    shared.close()
    assert refusals(shared) == ["alone"]  # as long as nobody has said that it is wanted as it is
    os.utime(shared.below("alone"))
    assert leave_it(shared).refused == []


def test_what_is_not_ours_is_not_removed(shared: Bench) -> None:
    shared.close()
    for name in ("note.txt", "quarantine/kept", "blobs/letter"):
        path = shared.source / ".dedupfs" / name
        if name == "blobs/letter":
            path.mkdir()
            path = path / "a"
        path.write_text("mine")
    found = refusals(shared)
    assert found == [".dedupfs/note.txt", ".dedupfs/quarantine/kept", ".dedupfs/blobs/letter/a"]
    for each in found:
        os.unlink(shared.source / each)
    assert leave_it(shared).refused == []


def test_what_people_decided_is_for_them_to_take_away(shared: Bench) -> None:
    decisions = Decisions(shared.engine.backing)
    decisions.record("note", [shared.blob_of("one")], paths=[b"one"], who="somebody", text="kept")
    shared.close()
    departure = leave_it(shared)
    assert departure.refused == [{"path": ".dedupfs/decisions.jsonl", "reason": DECIDED}]
    os.rename(shared.source / ".dedupfs/decisions.jsonl", shared.source / "decisions.jsonl")
    assert leave_it(shared).refused == []
    assert "kept" in (shared.source / "decisions.jsonl").read_text()


def test_what_was_written_to_from_outside_keeps_the_store(shared: Bench) -> None:
    with open(shared.below("one"), "r+b") as file:
        file.write(b"FOREIGN")
    shared.close()
    shared.expect_log("written to from outside")
    shared.expect_findings()
    assert refusals(shared) == ["one"]


# -- room


def group(size_bytes: int, files: int, *, frees: bool = True) -> Group:
    return Group(ContentKey(Digest(bytes(16))), size_bytes, [b"x"] * files, files, frees)


def test_room_needed() -> None:
    assert room_needed([], 4096) == 0
    assert room_needed([group(4096, 2)], 4096) == 8192
    assert room_needed([group(4097, 2)], 4096) == 16384
    assert room_needed([group(4096, 2), group(4096, 1)], 4096) == 8192
    assert room_needed([group(4096, 2, frees=False), group(4096, 1)], 4096) == 12288
    assert room_needed([group(40960, 2), group(4096, 3)], 4096) == 81920


# -- without dedupfs


def loop_of(bench: Bench) -> str:
    """The shell loop, as a person would paste it."""
    readme = (bench.source / ".dedupfs" / "README").read_text()
    (found,) = re.findall(r"^    find .*?^    done' sh .*?$", readme, re.DOTALL | re.MULTILINE)
    return str(found)


def run_loop(bench: Bench) -> tuple[list[str], str]:
    done = subprocess.run(["sh", "-c", loop_of(bench)], cwd=bench.source, capture_output=True, check=False)
    return sorted(done.stdout.decode(errors="surrogateescape").splitlines()), done.stderr.decode()


@pytest.mark.skipif(os.geteuid() != 0, reason="the store of root")
def test_the_loop_of_the_readme(shared: Bench) -> None:
    os.chown(shared.below("four"), 1001, 1002)
    os.chmod(shared.below("four"), 0o4755)
    shared.link("three", "linked")
    shared.scan()
    shared.settle()
    before = wanted(shared)
    shared.close()
    said, complaints = run_loop(shared)
    assert complaints == ""
    assert len([line for line in said if line.startswith("restored: ")]) == 6
    assert not any("NOT" in line for line in said)
    assert photograph(shared) == before
    assert run_loop(shared) == ([], "")
    subprocess.run("chattr -R -f -i .dedupfs; rm -r .dedupfs", shell=True, cwd=shared.source, check=True)
    assert photograph(shared) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="the store of root")
def test_the_loop_leaves_what_it_does_not_understand(shared: Bench) -> None:
    with open(shared.below("one"), "r+b") as file:
        file.write(b"FOREIGN")
    os.setxattr(shared.below("three"), shared.reference_xattr, b"\x02" * 44)
    blob = shared.source / ".dedupfs/blobs"
    before = {name: shared.below(name).read_bytes() for name in ("one", "three")}
    shared.close()
    shared.expect_findings()
    assert blob.is_dir()
    said, _ = run_loop(shared)
    assert "NOT restored, something has written to it: ./one" in said
    assert "NOT restored, its record is of another version: ./three" in said
    assert {name: shared.below(name).read_bytes() for name in before} == before
    assert shared.below("four").read_bytes() == OTHER


@pytest.mark.skipif(os.geteuid() != 0, reason="the store of root")
def test_the_loop_where_a_crash_came_between(shared: Bench) -> None:
    """A copy that was not finished, a truncated reference, and a blob that is missing."""
    backing = shared.engine.backing
    fd = os.open(shared.below("one"), os.O_RDWR)
    reference = backing.fread_reference(fd)
    assert reference is not None
    backing.fset_reference(fd, replace(reference, materialising=True, mtime_ns=10**18))
    os.pwrite(fd, b"half", 0)
    os.close(fd)
    os.truncate(shared.below("three"), 0)
    shared.crash()
    shared.expect_findings()
    said, _ = run_loop(shared)
    assert "restored: ./one" in said
    assert "restored: ./three" in said
    assert shared.below("one").read_bytes() == DATA
    assert shared.below("three").read_bytes() == b""
    assert not shared.is_reference("three")
    blob = next(path for path in (shared.source / ".dedupfs/blobs").rglob("*.0") if path.stat().st_size == len(DATA))
    unprotect(blob)
    blob.unlink()
    assert run_loop(shared)[0] == []


def test_a_store_without_a_readme_gets_one(bench: Bench) -> None:
    path = bench.source / ".dedupfs" / "README"
    text = path.read_text()
    assert bench.reference_xattr in text
    path.unlink()
    bench.reopen()
    assert path.read_text() == text
    assert max(map(len, text.splitlines())) <= 120


def test_the_loop_is_in_the_documentation(bench: Bench) -> None:
    docs = Path(__file__).parents[2] / "docs" / "operations.md"
    assert ".dedupfs/README" in docs.read_text()
