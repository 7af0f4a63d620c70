"""Each invariant broken on purpose: fsck names it and nothing else, and repairs what needs no guess."""

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dedupfs.backing import Backing
from dedupfs.codec import decode_reference, encode_reference
from dedupfs.errors import Busy
from dedupfs.fsck import Finding, Report, _try_repair, fsck
from dedupfs.index import Index
from dedupfs.model import ContentKey, Digest, FileRecord, FileState, Ino, Link, Reference, Stamp
from dedupfs.store import Store

from .bench import BLOCK, Bench, content, silent
from .test_damage import DATA, unprotect

Break = Callable[[Bench], None]


@pytest.fixture
def store(bench: Bench) -> Iterator[Bench]:
    """Closed, clean, with references in two directories, plain files, a hard link and an empty file."""
    bench.mkdir("d")
    for name in ("one", "d/two", "three"):
        bench.write(name, DATA)
    bench.write("plain", content("plain"))
    bench.link("plain", "d/linked")
    bench.write("empty", b"")
    bench.settle()
    bench.close()
    assert bench.checks() == []
    yield bench
    bench.expect_findings()


def test_a_healthy_store(store: Bench) -> None:
    before = _everything(store.source)
    report = store.fsck()
    assert (report.findings, report.exit_code) == ([], 0)
    assert store.fsck(repair=True).exit_code == 0
    assert _everything(store.source) == before
    store.open()
    assert store.engine.settler.index_is_complete


def test_what_is_pending_is_no_finding(store: Bench) -> None:
    store.open()
    store.write("new", content("new"))
    for name in ("one", "d/two", "three"):
        store.append(name, name.encode())  # nothing refers to the blob any more, and nobody has settled that
    store.close()
    assert store.checks() == []
    store.open()
    store.settle()
    assert store.blobs() == []
    store.close()


def test_a_store_in_use_is_refused(store: Bench) -> None:
    store.open()
    with pytest.raises(Busy):
        fsck(str(store.source), repair=False, progress=silent)
    store.close()


# -- what there is to break


def edit_index(bench: Bench, change: Callable[[Index, Ino], None], path: str = "one") -> None:
    backing = Backing(str(bench.source))
    with Store(backing) as store:
        with Index(str(bench.source / ".dedupfs/index"), store.identity) as index:
            change(index, Ino(bench.below(path).stat().st_ino))
        store.mark_clean()
    backing.close()


def edit_record(bench: Bench, change: Callable[[FileRecord], FileRecord], path: str = "one") -> None:
    def edit(index: Index, ino: Ino) -> None:
        known = index.file(ino)
        assert known is not None
        batch = index.batch()
        batch.put_file(ino, change(known))
        batch.commit()

    edit_index(bench, edit, path)


def forget(index: Index, ino: Ino) -> None:
    batch = index.batch()
    batch.forget_file(ino)
    batch.commit()


def misname(index: Index, ino: Ino) -> None:
    batch = index.batch()
    for link in index.links(ino):
        batch.remove_link(ino, link)
    batch.put_link(ino, Link(Ino(2), b"elsewhere"))
    batch.commit()


def invent(index: Index, ino: Ino) -> None:
    batch = index.batch()
    known = index.file(ino)
    assert known is not None
    batch.put_file(Ino(1 << 40), known._replace(state=FileState.PLAIN))
    batch.commit()


def miscount(index: Index, ino: Ino) -> None:
    with index._write() as (txn, tables):
        txn.put(b"count.files", (99).to_bytes(8, "big"), db=tables.meta)


def mark(bench: Bench, path: str, **changes: object) -> None:
    reference = decode_reference(os.getxattr(bench.below(path), bench.reference_xattr))
    record = encode_reference(replace(reference, **changes))  # type: ignore[arg-type]
    os.setxattr(bench.below(path), bench.reference_xattr, record)


def half_materialised(bench: Bench) -> None:
    mark(bench, "one", materialising=True, mtime_ns=10**18)
    with open(bench.below("one"), "r+b") as file:
        file.write(b"half")


def half_truncated(bench: Bench) -> None:
    os.truncate(bench.below("one"), 0)


def half_materialised_and_emptied(bench: Bench) -> None:
    mark(bench, "one", materialising=True, mtime_ns=10**18)
    os.truncate(bench.below("one"), 0)


def foreign_write(bench: Bench) -> None:
    with open(bench.below("one"), "r+b") as file:
        file.write(b"foreign")


def resized(bench: Bench) -> None:
    os.truncate(bench.below("one"), len(DATA) + 1)


def damaged_record(bench: Bench) -> None:
    os.setxattr(bench.below("one"), bench.reference_xattr, b"\x01" + bytes(43))


def record_of_a_newer_version(bench: Bench) -> None:
    os.setxattr(bench.below("one"), bench.reference_xattr, b"\x02" + bytes(43))


def missing_blob(bench: Bench) -> None:
    unprotect(bench.the_blob())
    bench.the_blob().unlink()


def short_blob(bench: Bench) -> None:
    unprotect(bench.the_blob())
    os.truncate(bench.the_blob(), BLOCK)
    bench.the_blob().chmod(0o400)


def unsealed_mode(bench: Bench) -> None:
    unprotect(bench.the_blob())
    bench.the_blob().chmod(0o644)


def unsealed_owner(bench: Bench) -> None:
    unprotect(bench.the_blob())
    os.chown(bench.the_blob(), 1000, 1000)


def linked_blob(bench: Bench) -> None:
    unprotect(bench.the_blob())
    os.link(bench.the_blob(), bench.below("leak"))


def unreferenced_blob(bench: Bench) -> None:
    directory = bench.source / ".dedupfs/blobs/ab"
    directory.mkdir(exist_ok=True)
    (directory / ("ab" * 16 + ".0")).write_bytes(b"nobody's")
    (directory / ("ab" * 16 + ".0")).chmod(0o400)


def stray_file_in_blobs(bench: Bench) -> None:
    (bench.source / ".dedupfs/blobs/stray").write_bytes(b"")


def leftover_in_staging(bench: Bench) -> None:
    (bench.source / ".dedupfs/staging/refer.1.2.3").write_bytes(b"")


def leftover_in_orphans(bench: Bench) -> None:
    (bench.source / ".dedupfs/orphans/.fuse_hidden0000000100000001").write_bytes(b"unlinked")


def killed_in_publish(bench: Bench) -> None:
    """The blob has its name, the path is not replaced yet."""
    plain = bench.below("plain")
    bench.below("d/linked").unlink()
    key = ContentKey(Digest(b"\xcd" * 16))
    (bench.source / ".dedupfs/blobs/cd").mkdir(exist_ok=True)
    os.link(plain, bench.source / ".dedupfs/blobs/cd" / key.name)
    staged = bench.source / f".dedupfs/staging/publish.{plain.stat().st_ino}.1.0"
    staged.write_bytes(b"")
    record = encode_reference(Reference(key, plain.stat().st_size))
    os.setxattr(staged, bench.reference_xattr, record)
    os.truncate(staged, plain.stat().st_size)
    (bench.source / ".dedupfs/clean").unlink()


def unclean(bench: Bench) -> None:
    (bench.source / ".dedupfs/clean").unlink()


def garbled_index(bench: Bench) -> None:
    (bench.source / ".dedupfs/index/data.mdb").write_bytes(b"garbage" * 10000)


def test_what_a_walk_will_find_is_no_finding(store: Bench) -> None:
    """A mount may be stopped cleanly before it has looked at everything that an unclean stop left."""

    def as_yet_unseen(index: Index, ino: Ino) -> None:
        forget(index, ino)
        index.set_incomplete()

    edit_index(store, as_yet_unseen)
    assert store.checks() == []
    store.open()
    store.scan()
    assert store.engine.settler.index_is_complete
    store.close()
    assert store.checks() == []


def no_index(bench: Bench) -> None:
    shutil.rmtree(bench.source / ".dedupfs/index")


def content_changed_behind(bench: Bench) -> None:
    bench.below("plain").write_bytes(content("changed"))


def file_gone_behind(bench: Bench) -> None:
    bench.below("three").unlink()


def file_renamed_behind(bench: Bench) -> None:
    os.rename(bench.below("d"), bench.below("e"))


def other_content_recorded(bench: Bench) -> None:
    edit_record(bench, lambda known: known._replace(content=ContentKey(Digest(b"\xef" * 16))))


def other_state_recorded(bench: Bench) -> None:
    edit_record(bench, lambda known: known._replace(state=FileState.PLAIN))


def other_stamp_recorded(bench: Bench) -> None:
    edit_record(bench, lambda known: known._replace(stamp=Stamp(known.stamp.size_bytes, 1, 2)))


# How it is broken: what fsck says of it (check and path), and whether it can be repaired.
BROKEN: list[tuple[Break, set[tuple[str, bytes]], bool]] = [
    (half_materialised, {("materialising", b"one"), ("index-stamp", b"one")}, True),
    (half_truncated, {("empty-reference", b"one"), ("index-stamp", b"one")}, True),
    (half_materialised_and_emptied, {("materialising", b"one"), ("index-stamp", b"one")}, True),
    (foreign_write, {("foreign-write", b"one"), ("index-stamp", b"one")}, False),
    (resized, {("foreign-write", b"one"), ("index-stamp", b"one")}, False),
    (damaged_record, {("reference-record", b"one")}, False),
    (record_of_a_newer_version, {("reference-record", b"one")}, False),
    (missing_blob, {("reference-blob", name) for name in (b"one", b"d/two", b"three")}, False),
    (short_blob, {("reference-blob", name) for name in (b"one", b"d/two", b"three")}, False),
    (unsealed_mode, {("sealed", b"*")}, True),
    (unsealed_owner, {("sealed", b"*")}, True),
    (linked_blob, {("blob-links", b"*")}, False),
    (unreferenced_blob, {("unreferenced-blob", b".dedupfs/blobs/ab/" + b"ab" * 16 + b".0")}, True),
    (stray_file_in_blobs, {("blob-names", b".dedupfs/blobs/stray")}, False),
    (leftover_in_staging, {("leftovers", b".dedupfs/staging/refer.1.2.3")}, True),
    (leftover_in_orphans, {("leftovers", b".dedupfs/orphans/.fuse_hidden0000000100000001")}, True),
    (unclean, {("clean", b".dedupfs/index")}, True),
    (garbled_index, {("index", b".dedupfs/index")}, True),
    (content_changed_behind, {("index-stamp", b"plain"), ("index-stamp", b"d/linked")}, True),
    (file_gone_behind, {("index-file", b"three")}, True),
    (file_renamed_behind, {("index-path", b"e/two"), ("index-path", b"e/linked")}, True),
    (other_content_recorded, {("index-content", b"one")}, True),
    (other_state_recorded, {("index-state", b"one")}, True),
    (other_stamp_recorded, {("index-stamp", b"one")}, True),
    (lambda bench: edit_index(bench, forget), {("index-reference", b"one")}, True),
    (lambda bench: edit_index(bench, misname), {("index-path", b"one")}, True),
    (lambda bench: edit_index(bench, invent), {("index-file", b"")}, True),
    (lambda bench: edit_index(bench, miscount), {("counters", b".dedupfs/index")}, True),
]  # fmt: skip
NAMES = [breaking.__name__.strip("<>") for breaking, _, _ in BROKEN]
NAMES[-4:] = ["record forgotten", "name forgotten", "record invented", "counter wrong"]


@pytest.mark.parametrize(("breaking", "expected", "can_repair"), BROKEN, ids=NAMES)
def test_broken_on_purpose(store: Bench, breaking: Break, expected: set[tuple[str, bytes]], can_repair: bool) -> None:
    if breaking is unsealed_owner and os.geteuid() != 0:
        pytest.skip("needs root")
    breaking(store)
    store.expect_log("")
    before = _everything(store.source)
    for _ in range(2):  # looking changes nothing
        report = store.fsck()
        assert _found(report) == expected
        assert report.exit_code == 2
        assert not any(finding.repaired for finding in report.findings)
        assert all(finding.problem for finding in report.findings)
    assert _everything(store.source) == before
    report = store.fsck(repair=True)
    assert _found(report) >= expected
    assert report.exit_code == (1 if can_repair else 2), report.findings
    left = store.fsck()
    if can_repair:
        assert left.findings == []
    else:
        kinds = {check for check, _ in expected} - {"index-stamp"}
        assert {finding.check for finding in left.findings} <= kinds | {"index-stamp"}
        assert left.exit_code == 2
    _nothing_lost(store, breaking)


def _nothing_lost(store: Bench, breaking: Break) -> None:
    unread: set[str] = set()
    if breaking in (foreign_write, resized, damaged_record, record_of_a_newer_version):
        unread = {"one"}
    elif breaking in (missing_blob, short_blob):
        unread = {"one", "d/two", "three"}
    expected = {"one": DATA, "d/two": DATA, "three": DATA, "plain": content("plain"), "empty": b""}
    if breaking is half_truncated:
        expected["one"] = b""
    if breaking is content_changed_behind:
        expected["plain"] = content("changed")
    if breaking is file_gone_behind:
        del expected["three"]
    if breaking is file_renamed_behind:
        expected["e/two"] = expected.pop("d/two")
    store.open()
    for name, data in expected.items():
        if name not in unread:
            assert store.read(name) == data
    store.close()


def _found(report: Report) -> set[tuple[str, bytes]]:
    return {
        (finding.check, b"*" if finding.check in ("sealed", "blob-links") else finding.path)
        for finding in report.findings
    }


def _everything(source: Path) -> object:
    """Every path with its attributes and content, but for what the lock and the index do to their own files."""
    found = {}
    for directory, directories, names in os.walk(source):
        for name in directories + names:
            path = Path(directory, name)
            inside = str(path.relative_to(source))
            st = path.lstat()
            attributes: list[object] = [st.st_mode, st.st_nlink, st.st_uid, st.st_gid, st.st_ino]
            if inside.startswith(".dedupfs/index"):
                attributes = [stat.S_IFMT(st.st_mode)]
            elif stat.S_ISREG(st.st_mode) and inside not in (".dedupfs/lock", ".dedupfs/clean"):
                attributes += [st.st_mtime_ns, path.read_bytes()]
                attributes += [(name, os.getxattr(path, name)) for name in os.listxattr(path)]
            elif inside == ".dedupfs/clean":
                attributes = []
            found[inside] = attributes
    return found


def test_killed_in_publish(store: Bench) -> None:
    """A blob that is a file as well: swept, since nothing refers to it."""
    killed_in_publish(store)
    report = store.fsck()
    assert {finding.check for finding in report.findings} >= {"leftovers", "blob-links", "clean"}
    assert report.exit_code == 2
    assert store.fsck(repair=True).exit_code == 1
    assert store.checks() == []
    assert store.below("plain").read_bytes() == content("plain")
    assert store.below("plain").stat().st_nlink == 1


@pytest.mark.parametrize("damage", [missing_blob, short_blob])
def test_a_plain_file_takes_the_place_of_a_missing_blob(store: Bench, damage: Break) -> None:
    store.open()
    store.write("good", DATA)
    store.link("good", "good too")
    store.settle()
    store.unlink("good too")
    store.settle()
    assert store.state("good") in ("plain", "reference")
    if store.state("good") == "reference":
        store.engine.restore([b"good"], silent)
        store.settle()
    store.close()
    damage(store)
    store.expect_log("was damaged; healed")
    assert store.fsck().exit_code == 2
    assert store.fsck(repair=True).exit_code == 1
    assert store.checks() == []
    store.open()
    assert [store.read(name) for name in ("one", "d/two", "three", "good")] == [DATA] * 4
    store.close()


def test_an_unreadable_directory_removes_nothing(store: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be listed may hold the reference that a blob is kept for."""
    store.open()
    store.unlink("one")
    store.unlink("three")
    store.settle()
    store.close()
    scandir = Backing.scandir

    def failing(self: Backing, path: bytes, *more: Any) -> Iterator[os.DirEntry[str]]:
        if path == b"d":
            raise OSError(5, "Input/output error")
        return scandir(self, path, *more)

    monkeypatch.setattr(Backing, "scandir", failing)
    store.expect_log("cannot list", "could not look at everything")
    report = store.fsck(repair=True)
    assert "readable" in {finding.check for finding in report.findings}
    assert report.exit_code == 2
    monkeypatch.undo()
    store.open()
    assert store.read("d/two") == DATA
    store.close()


@pytest.mark.parametrize("other", ["plain", "three"], ids=["a file", "a reference"])
@pytest.mark.parametrize("breaking", [half_materialised, half_truncated])
def test_another_file_comes_to_the_path_that_is_repaired(
    store: Bench, monkeypatch: pytest.MonkeyPatch, breaking: Break, other: str
) -> None:
    """It is not what fsck has looked at, and stays as it is."""
    breaking(store)
    moved: list[bytes] = []

    def moving(finding: Finding) -> None:
        if finding.path == b"one" and not moved:
            moved.append(finding.path)
            os.rename(store.below(other), store.below("one"))
        _try_repair(finding)

    monkeypatch.setattr("dedupfs.fsck._try_repair", moving)
    store.fsck(repair=True)
    assert moved
    store.open()
    store.scan()
    assert store.read("one") == (content("plain") if other == "plain" else DATA)
    assert store.read("d/two") == DATA
    store.close()


def test_a_lost_index_is_no_loss(store: Bench) -> None:
    no_index(store)
    report = store.fsck()
    assert report.exit_code in (0, 2)
    assert store.fsck(repair=True).exit_code in (0, 1)
    store.open(start=True)
    store.settle()
    assert store.duplicates("one") == ["d/two", "three"]
    store.close()
    assert store.checks() == []
