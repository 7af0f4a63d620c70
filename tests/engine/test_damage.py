"""What rots, goes missing or is written to from outside: the good copies survive, and the bad ones spread nowhere."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from dedupfs.errors import DamagedContent, StoreError
from dedupfs.model import FileRecord, Ino, Stamp

from .bench import BLOCK, ME, Bench, content, few_bits, impatient

DATA = content("same", 4 * BLOCK + 3)


def unprotect(path: Path) -> None:
    if os.geteuid() == 0:
        subprocess.run(["chattr", "-i", str(path)], check=True)
    else:
        path.chmod(0o600)


def rot(path: Path, offset: int = BLOCK) -> bytes:
    """Flip one bit; the answer is what the file holds now."""
    unprotect(path)
    st = path.stat()
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))
    return path.read_bytes()


def share(bench: Bench, *names: str) -> None:
    for name in names:
        bench.write(name, DATA)
    bench.settle()
    assert all(bench.state(name) == "reference" for name in names)


def test_a_rotten_blob_is_healed_by_the_next_good_copy(bench: Bench) -> None:
    share(bench, "one", "two")
    bad = rot(bench.the_blob())
    assert bench.read("one") == bad  # nobody could know
    bench.expect_log("was damaged; healed")
    bench.write("three", DATA)
    bench.settle()
    assert [bench.read(name) for name in ("one", "two", "three")] == [DATA] * 3
    assert bench.duplicates("three") == ["one", "two"]
    (aside,) = bench.inside("quarantine")
    assert (bench.source / ".dedupfs/quarantine" / aside).read_bytes() == bad
    assert len(bench.blobs()) == 1


def test_who_reads_a_rotten_blob_goes_on_and_the_next_reads_the_good_one(bench: Bench) -> None:
    share(bench, "one", "two")
    bad = rot(bench.the_blob())
    bench.expect_log("was damaged; healed")
    with bench.opened("one") as reader:
        bench.write("three", DATA)
        bench.settle()
        assert bench.read_from(reader) in (bad, DATA)
        assert bench.read("two") == DATA
    assert bench.read("one") == DATA


def test_a_second_rot_is_kept_too(bench: Bench) -> None:
    share(bench, "one", "two")
    bench.expect_log("was damaged; healed")
    for number in range(2):
        rot(bench.the_blob(), number)
        bench.write(f"good {number}", DATA)
        bench.settle()
    assert bench.read("one") == DATA
    assert len(bench.inside("quarantine")) == 2


@pytest.mark.parametrize("damage", ["missing", "shorter"])
def test_a_missing_blob_is_an_error_until_a_good_copy_comes(bench: Bench, damage: str) -> None:
    share(bench, "one", "two")
    blob = bench.the_blob()
    unprotect(blob)
    if damage == "missing":
        blob.unlink()
    else:
        os.truncate(blob, BLOCK)
    for flags in (os.O_RDONLY, os.O_RDWR):
        with pytest.raises(DamagedContent) as caught:
            bench.open_file("one", flags)
        assert caught.value.errno == errno.EIO
    bench.expect_log("was damaged; healed")
    bench.write("three", DATA)
    bench.settle()
    assert [bench.read(name) for name in ("one", "two", "three")] == [DATA] * 3


def test_references_of_a_missing_blob_can_be_replaced(bench: Bench) -> None:
    """O_TRUNC and unlink need no blob."""
    share(bench, "one", "two", "three")
    unprotect(bench.the_blob())
    bench.the_blob().unlink()
    bench.write("one", b"new")
    bench.unlink("two")
    assert bench.read("one") == b"new"
    bench.settle()
    assert bench.names() == ["one", "three"]
    bench.unlink("three")
    bench.settle()


def test_a_bad_copy_does_not_replace_a_good_blob(bench: Bench) -> None:
    """Its digest is the blob's, its bytes are not: it rotted after it was hashed, and is hashed again."""
    share(bench, "one", "two")
    bench.write("three", DATA)
    bad = rot(bench.below("three"))
    bench.settle()
    assert bench.read("one") == bench.read("two") == DATA
    assert bench.read("three") == bad
    assert bench.state("three") == "plain"
    assert bench.duplicates("three") == []
    assert bench.digest("three") != bench.digest("one")
    assert bench.inside("quarantine") == []


def test_a_known_file_that_rotted_is_not_shared(bench: Bench) -> None:
    """Its ctime tells that something happened."""
    bench.write("one", DATA)
    bench.settle()
    bad = rot(bench.below("one"))
    bench.write("two", DATA)
    bench.settle()
    assert bench.read("one") == bad
    assert bench.read("two") == DATA
    assert bench.duplicates("two") == []
    assert bench.digest("one") != bench.digest("two")


def _rot_without_a_trace(bench: Bench, path: str) -> bytes:
    """As a disk does it: neither time tells. The index is told the new ctime."""
    bad = rot(bench.below(path))
    st = bench.below(path).stat()
    ino = Ino(st.st_ino)
    known = bench.engine.index.file(ino)
    assert known is not None
    batch = bench.engine.index.batch()
    batch.put_file(ino, FileRecord(Stamp.of(st), known.state, known.content))
    batch.commit()
    return bad


def test_a_known_file_that_rotted_without_a_trace_is_not_shared(bench: Bench) -> None:
    bench.write("one", DATA)
    bench.settle()
    digest = bench.digest("one")
    bad = _rot_without_a_trace(bench, "one")
    bench.expect_log("has other bytes than when it was hashed")
    bench.write("two", DATA)
    bench.settle()
    assert bench.read("one") == bad
    assert bench.read("two") == DATA
    assert bench.duplicates("two") == []
    assert bench.digest("two") == digest
    assert bench.digest("one") != digest  # looked at again
    bench.write("three", DATA)
    bench.settle()
    assert bench.duplicates("three") == ["two"]


def test_the_rotten_one_is_the_one_that_is_settled_again(bench: Bench) -> None:
    """A file waits for its reader to be shared, and rots meanwhile: no endless loop, no wrong digest."""
    share(bench, "one", "two")
    bench.write("three", DATA)
    with bench.opened("three"):
        bench.settle()
        assert bench.state("three") == "plain"
        bad = _rot_without_a_trace(bench, "three")
    bench.settle()
    assert bench.read("three") == bad
    assert bench.state("three") == "plain"
    assert bench.digest("three") != bench.digest("one")
    assert bench.read("one") == bench.read("two") == DATA


def test_a_collision_is_no_damage(bench: Bench) -> None:
    """Blob and file have equal digests and are both what was hashed."""
    bench.close()
    for name in ("one", "two"):
        bench.put(name, DATA)
    other = content("other", len(DATA))
    for name in ("three", "four"):
        bench.put(name, other)
    bench.open(hasher=few_bits(0))
    bench.scan()
    assert [bench.read(name) for name in ("one", "two", "three", "four")] == [DATA, DATA, other, other]
    assert bench.duplicates("one") == ["two"]
    assert bench.duplicates("three") == ["four"]
    assert len(bench.blobs()) == 2
    assert bench.inside("quarantine") == []


# -- written to from outside


def write_from_outside(bench: Bench, path: str, data: bytes = b"FOREIGN", offset: int = BLOCK) -> bytes:
    with open(bench.below(path), "r+b") as file:
        file.seek(offset)
        file.write(data)
    return bench.below(path).read_bytes()


@pytest.mark.parametrize("offset", [0, BLOCK + 5, len(DATA) - 7, len(DATA), 10 * BLOCK])
def test_a_reference_written_to_from_outside_is_neither_read_nor_lost(bench: Bench, offset: int) -> None:
    share(bench, "one", "two")
    foreign = write_from_outside(bench, "one", offset=offset)
    for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND):
        with pytest.raises(DamagedContent) as caught:
            bench.open_file("one", flags)
        assert caught.value.errno == errno.EIO
    bench.expect_log("written to from outside")
    bench.scan()
    assert bench.read("two") == DATA
    assert bench.below("one").read_bytes() == foreign
    bench.close()
    report = bench.fsck()
    assert {(each.check, each.path) for each in report.findings} >= {("foreign-write", b"one")}
    assert {each.path for each in report.findings} == {b"one"}
    assert report.exit_code == 2
    report = bench.fsck(repair=True)
    assert [each.repaired for each in report.findings if each.check == "foreign-write"] == [False]
    assert report.exit_code == 2
    assert bench.below("one").read_bytes() == foreign
    bench.open()
    assert bench.read("two") == DATA
    bench.expect_findings()


def test_the_last_reference_written_to_from_outside_keeps_its_blob(bench: Bench) -> None:
    """Which of the two contents is wanted is for a person to say; until then both are there."""
    share(bench, "one", "two")
    bench.unlink("two")
    bench.settle()
    foreign = write_from_outside(bench, "one")
    bench.expect_log("written to from outside")
    bench.scan()
    bench.reopen()
    bench.scan()
    assert bench.the_blob().read_bytes() == DATA
    assert bench.below("one").read_bytes() == foreign
    bench.close()
    bench.fsck(repair=True)
    assert bench.the_blob().read_bytes() == DATA
    assert bench.below("one").read_bytes() == foreign
    bench.open()
    bench.write("one", b"the person said so")
    bench.settle()
    assert bench.read("one") == b"the person said so"
    assert bench.blobs() == []


def test_the_blob_of_a_foreign_written_reference_serves_new_copies(bench: Bench) -> None:
    share(bench, "one", "two", "three")
    write_from_outside(bench, "one")
    write_from_outside(bench, "two")
    bench.expect_log("written to from outside")
    bench.scan()
    bench.write("four", DATA)
    bench.settle()
    assert bench.duplicates("four") == ["three"]
    assert len(bench.blobs()) == 1
    for name in ("one", "two"):
        bench.unlink(name)
    bench.settle()
    totals = bench.status()
    assert totals["files"] == 2
    assert totals["stored_bytes"] == len(DATA)


def test_a_damaged_record_is_an_error_and_removes_nothing(bench: Bench) -> None:
    share(bench, "one", "two")
    record = os.getxattr(bench.below("one"), bench.reference_xattr)
    os.setxattr(bench.below("one"), bench.reference_xattr, record[:-1] + bytes([record[-1] ^ 1]))
    bench.unlink("two")
    bench.expect_log("is not settled", "could not look at everything")
    bench.settle()
    bench.crash()
    bench.recover()
    with pytest.raises(StoreError):
        bench.read("one")
    assert bench.the_blob().read_bytes() == DATA
    bench.close()
    report = bench.fsck(repair=True)
    assert ("reference-record", b"one") in [(each.check, each.path) for each in report.findings]
    assert report.exit_code == 2
    assert bench.the_blob().read_bytes() == DATA
    os.setxattr(bench.below("one"), bench.reference_xattr, record)
    bench.open()
    assert bench.read("one") == DATA
    bench.scan()


def test_a_damaged_reference_can_be_replaced(bench: Bench) -> None:
    """As anything that cannot be read: by writing a new content, or by removing it."""
    share(bench, "one", "two", "three")
    for name in ("one", "two"):
        os.setxattr(bench.below(name), bench.reference_xattr, b"garbage")
    bench.write("one", b"new")
    bench.unlink("two")
    bench.settle()
    assert bench.read("one") == b"new"
    assert bench.read("three") == DATA


def test_a_forged_reference_is_hidden_from_apps(bench: Bench) -> None:
    """No one can forge a reference through the mount, nor see one."""
    bench.write("one", DATA)
    for name in (bench.reference_xattr, "user.dedupfs.ref", "trusted.dedupfs.ref", "user.dedupfs.digest"):
        with pytest.raises(OSError) as caught:
            bench.engine.vfs.setxattr(b"one", name.encode(), b"x", 0, ME)
        assert caught.value.errno == errno.EPERM
        with pytest.raises(OSError) as caught:
            bench.engine.vfs.removexattr(b"one", name.encode())
        assert caught.value.errno == errno.EPERM
    bench.write("two", DATA)
    bench.engine.settle(impatient())
    assert bench.is_reference("one")
    assert bench.engine.vfs.listxattr(b"one", ME) == []
    with pytest.raises(OSError) as caught:
        bench.engine.vfs.getxattr(b"one", bench.reference_xattr.encode(), ME)
    assert caught.value.errno == errno.ENODATA
