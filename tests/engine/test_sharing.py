"""Files of equal content share it, keep everything that is their own, and never share with anything else."""

import os
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from tests.support.flavours import FLAVOURS

from .bench import BLOCK, ME, Bench, content, few_bits, impatient

every_strategy = pytest.mark.parametrize("bench", FLAVOURS, indirect=True, ids="-".join)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@every_strategy
@pytest.mark.parametrize("count", [2, 3])
def test_equal_files_share(bench: Bench, count: int) -> None:
    data = content("same")
    names = [f"copy {number}" for number in range(count)]
    for name in names:
        bench.write(name, data)
    bench.settle()
    expected = "shared" if bench.share == "reflink" else "reference"
    assert [bench.state(name) for name in names] == [expected] * count
    assert [bench.read(name) for name in names] == [data] * count
    assert bench.refs(names[0]) == count
    assert bench.duplicates(names[0]) == names[1:]
    status = bench.status()
    assert (status["files"], status["logical_bytes"]) == (count, count * len(data))
    assert (status["stored_bytes"], status["saved_bytes"]) == (len(data), (count - 1) * len(data))
    assert status["pending"] == 0
    assert status["share"] == str(bench.share)
    if bench.share == "reflink":
        assert bench.blobs() == []
        assert status["references"] == 0
        assert bench.shared_extents(names[0], names[1])
    else:
        assert len(bench.blobs()) == 1
        assert status["references"] == count
        assert status["blobs"] == 1
        # an inode with nothing but a size and an xattr
        assert all(bench.below(name).stat().st_blocks * 512 <= BLOCK for name in names)


@every_strategy
def test_a_later_copy_joins(bench: Bench) -> None:
    data = content("same")
    for name in ("one", "two"):
        bench.write(name, data)
    bench.settle()
    bench.write("three", data)
    bench.settle()
    assert bench.duplicates("three") == ["one", "two"]
    assert bench.state("three") == bench.state("one") != "plain"
    assert bench.status()["stored_bytes"] == len(data)


@every_strategy
def test_different_files_do_not_share(bench: Bench) -> None:
    data = content("same")
    changed = data[:-1] + b"!"
    bench.write("one", data)
    bench.write("two", changed)
    bench.write("longer", data + b"\0")
    bench.settle()
    assert [bench.state(name) for name in ("one", "two", "longer")] == ["plain"] * 3
    assert bench.blobs() == []
    assert [bench.read(name) for name in ("one", "two", "longer")] == [data, changed, data + b"\0"]
    assert bench.duplicates("one") == []


@every_strategy
@pytest.mark.parametrize("size_bytes", [0, 1, BLOCK - 1])
def test_less_than_a_block_is_known_and_not_shared(bench: Bench, size_bytes: int) -> None:
    data = content("small", size_bytes)
    bench.write("one", data)
    bench.write("two", data)
    bench.settle()
    assert bench.duplicates("one") == ["two"]
    assert bench.state("one") == bench.state("two") == "plain"
    assert bench.read("two") == data


@every_strategy
@pytest.mark.parametrize("size_bytes", [BLOCK, BLOCK + 1, 1 << 20, (17 << 20) + 5])
def test_sizes_around_blocks_and_chunks(bench: Bench, size_bytes: int) -> None:
    """Reflinking goes in pieces of 16 MiB, hashing and comparing in pieces of 1 MiB."""
    data = content("sized", size_bytes)
    for name in ("one", "two"):
        bench.write(name, data)
    bench.settle()
    assert bench.state("one") == bench.state("two") != "plain"
    assert bench.read("one") == bench.read("two") == data


@every_strategy
def test_a_difference_in_the_last_piece_is_found(bench: Bench) -> None:
    """With a hash that says that all files are equal."""
    data = content("long", (16 << 20) + 3 * BLOCK)
    other = data[:-7] + b"?" + data[-6:]
    bench.close()
    bench.put("one", data)
    bench.put("two", other)
    bench.open(hasher=few_bits(0))
    bench.scan()
    assert bench.state("one") == bench.state("two") == "plain"
    assert bench.duplicates("one") == []
    assert bench.read("one") == data
    assert bench.read("two") == other


@every_strategy
def test_what_is_the_files_own_stays(bench: Bench) -> None:
    """Mode, owner, times, xattrs, ACL: of each path its own, also after sharing."""
    data = content("same")
    described = []
    for number, name in enumerate(("one", "two", "three")):
        bench.write(name, data, 0o600 + number)
        path = bench.below(name)
        os.setxattr(path, "user.comment", f"the {name} one".encode())
        os.setxattr(path, f"user.only.{name}", b"x" * 100)
        subprocess.run(["setfacl", "-m", f"u:{2000 + number}:rw", str(path)], check=True)
        if os.geteuid() == 0:
            os.chown(path, 1000 + number, 3000 + number)
        # one of them from before 1970, one from after 2262, where 64 bits of nanoseconds end
        mtime_ns = (-(10**18), 10**18, 14 * 10**18)[number] + 123_456_789
        os.utime(path, ns=(10**18 + number, mtime_ns))
        described.append(_attributes(path))
    bench.settle()
    assert all(bench.state(name) != "plain" for name in ("one", "two", "three"))
    assert [_attributes(bench.below(name)) for name in ("one", "two", "three")] == described


def _attributes(path: Path) -> object:
    st = path.stat()
    xattrs = {name: os.getxattr(path, name) for name in os.listxattr(path) if not name.endswith(".dedupfs.ref")}
    return stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid, st.st_size, st.st_atime_ns, st.st_mtime_ns, xattrs


@needs_root
@every_strategy
def test_set_id_bits_and_capabilities_stay(bench: Bench) -> None:
    data = content("program")
    capability = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service, effective
    for name in ("one", "two"):
        bench.write(name, data)
        os.chown(bench.below(name), 1000, 1000)
        os.chmod(bench.below(name), 0o6755)
        os.setxattr(bench.below(name), "security.capability", capability)
    bench.settle()
    for name in ("one", "two"):
        assert stat.S_IMODE(bench.below(name).stat().st_mode) == 0o6755
        assert os.getxattr(bench.below(name), "security.capability") == capability


@every_strategy
def test_the_directory_looks_untouched(bench: Bench) -> None:
    bench.mkdir("d")
    bench.mkdir("e")
    data = content("same")
    bench.write("d/one", data)
    bench.write("e/two", data)
    times = {"d": 10**18 + 1, "e": 10**18 + 2, "": 10**18 + 3}
    for name, mtime_ns in times.items():
        os.utime(bench.source / name, ns=(mtime_ns + 5, mtime_ns))
    bench.settle()
    assert bench.state("d/one") != "plain"
    for name, mtime_ns in times.items():
        assert (bench.source / name).stat().st_mtime_ns == mtime_ns


def test_a_blob_is_sealed(bench: Bench) -> None:
    for name in ("one", "two"):
        bench.write(name, content("same"), 0o666)
        os.setxattr(bench.below(name), "user.comment", b"mine")
        subprocess.run(["setfacl", "-m", "u:2000:rw", str(bench.below(name))], check=True)
    bench.settle()
    blob = bench.the_blob()
    st = blob.stat()
    assert stat.S_IMODE(st.st_mode) == 0o400
    assert st.st_uid == os.geteuid()
    assert st.st_nlink == 1
    assert not [name for name in os.listxattr(blob) if not name.startswith("security.selinux")]
    if os.geteuid() == 0:
        with pytest.raises(PermissionError):
            blob.unlink()  # immutable


@every_strategy
def test_files_with_several_names_are_known_and_left_alone(bench: Bench) -> None:
    data = content("same")
    bench.write("one", data)
    bench.link("one", "also one")
    bench.settle()
    bench.write("two", data)
    bench.settle()
    assert bench.below("one").stat().st_ino == bench.below("also one").stat().st_ino
    assert bench.duplicates("two") == ["also one", "one"]
    assert bench.refs("two") == 2  # inodes
    assert bench.read("two") == data
    if bench.share == "reference":
        assert bench.state("one") == bench.state("two") == "plain"


@every_strategy
def test_the_other_names_go_and_it_is_shared(bench: Bench) -> None:
    """Whoever was left alone for its hard links is shared when it is settled the next time."""
    data = content("same")
    bench.write("one", data)
    bench.link("one", "also one")
    bench.write("two", data)
    bench.settle()
    bench.unlink("also one")
    bench.write("three", data)
    bench.settle()
    assert bench.state("one") == bench.state("three") != "plain"
    assert bench.duplicates("one") == ["three", "two"]


@every_strategy
def test_a_hard_link_to_shared_content(bench: Bench) -> None:
    data = content("same")
    bench.write("one", data)
    bench.write("two", data)
    bench.settle()
    bench.link("one", "one again")
    bench.settle()
    assert bench.read("one again") == data
    assert bench.duplicates("two") == ["one", "one again"]
    bench.append("one again", b"more")
    assert bench.read("one") == data + b"more"
    assert bench.read("two") == data
    bench.settle()
    assert bench.duplicates("one") == ["one again"]


@every_strategy
def test_changing_one_leaves_the_others(bench: Bench) -> None:
    data = content("same")
    for name in ("one", "two", "three"):
        bench.write(name, data)
    bench.settle()
    bench.write_at("two", b"CHANGED", BLOCK)
    changed = data[:BLOCK] + b"CHANGED" + data[BLOCK + 7 :]
    assert bench.read("two") == changed
    bench.settle()
    assert bench.read("one") == bench.read("three") == data
    assert bench.state("two") == "plain"
    assert bench.duplicates("one") == ["three"]
    bench.unlink("one")
    bench.truncate("three", 5)
    bench.settle()
    assert bench.read("three") == data[:5]
    assert bench.blobs() == []


@every_strategy
def test_changed_back_and_shared_again(bench: Bench) -> None:
    data = content("same")
    for name in ("one", "two"):
        bench.write(name, data)
    bench.settle()
    bench.write("one", content("else"))
    bench.settle()
    assert bench.duplicates("one") == []
    bench.write("one", data)
    bench.settle()
    assert bench.duplicates("one") == ["two"]
    assert bench.state("one") != "plain"


@every_strategy
@pytest.mark.parametrize("bits", [0, 4])
def test_collisions(bench: Bench, bits: int) -> None:
    """A hash of few bits: equal contents, and only those, find each other, whatever their digest."""
    bench.close()
    contents = [content(f"content {number % 12}", BLOCK * (1 + number % 3)) for number in range(36)]
    names = [f"file {number:02d}" for number in range(36)]
    for name, data in zip(names, contents, strict=True):
        bench.put(name, data)
    bench.open(hasher=few_bits(bits))
    bench.scan()
    for name, data in zip(names, contents, strict=True):
        assert bench.read(name) == data
        equal = [other for other, theirs in zip(names, contents, strict=True) if theirs == data and other != name]
        assert bench.duplicates(name) == equal
        assert bench.state(name) != "plain"
    assert bench.status()["stored_bytes"] == sum(map(len, set(contents)))


@every_strategy
def test_collisions_through_changes(bench: Bench) -> None:
    """The same, while files come, change and go; sizes are equal, so that only bytes tell them apart."""
    bench.reopen(hasher=few_bits(1))
    model: dict[str, bytes] = {}
    for step in range(60):
        name = f"file {step * 7 % 10}"
        if step % 5 == 4 and name in model:
            bench.unlink(name)
            del model[name]
        else:
            model[name] = content(f"content {step * 3 % 4}", 2 * BLOCK)
            # not from start to end: the digest of a stream would be the real one
            bench.write(name, b"")
            bench.write_at(name, model[name][BLOCK:], BLOCK)
            bench.write_at(name, model[name][:BLOCK], 0)
        if step % 3 == 0:
            bench.settle()
            for each, data in model.items():
                assert bench.read(each) == data
                reported = bench.duplicates(each)
                assert all(model[other] == data for other in reported)
    bench.settle()
    assert {name: bench.read(name) for name in model} == model


def test_names_that_are_not_utf8(bench: Bench) -> None:
    data = content("same")
    names = [os.fsdecode(b"caf\xe9 \xff"), "x" * 255, "line\nbreak"]
    for name in names:
        bench.write(name, data)
    bench.settle()
    assert bench.duplicates(names[0]) == sorted(names[1:])
    assert all(bench.state(name) == "reference" for name in names)


def test_a_file_changed_behind_our_back_while_settling_is_not_shared_wrongly(bench: Bench) -> None:
    """Hashed, then changed from outside, then compared: bytes decide."""
    data, other = content("same"), content("other")
    bench.write("one", data)
    bench.settle()
    bench.write("two", data)
    with open(bench.below("two"), "r+b") as file:
        file.write(other)
    bench.settle()
    assert bench.read("one") == data
    assert bench.read("two") == other
    assert bench.state("one") == bench.state("two") == "plain"
    assert bench.duplicates("one") == []


def test_without_root_everything_is_the_users(bench: Bench) -> None:
    """The store is nobody else's business."""
    assert stat.S_IMODE((bench.source / ".dedupfs").stat().st_mode) == 0o700


@every_strategy
def test_in_the_background(bench: Bench) -> None:
    """The same with the engine's threads, and apps that write from several."""
    bench.reopen(start=True)
    data = [content(f"picture {number}") for number in range(5)]

    def upload(directory: str) -> None:
        bench.mkdir(directory)
        for number in range(20):
            bench.write(f"{directory}/{number}", data[number % 5])

    uploads = [threading.Thread(target=upload, args=(f"app {number}",)) for number in range(4)]
    for each in uploads:
        each.start()
    for each in uploads:
        each.join()
    bench.settle()
    for app in range(4):
        for number in range(20):
            assert bench.read(f"app {app}/{number}") == data[number % 5]
            assert bench.refs(f"app {app}/{number}") == 16
    assert bench.status()["stored_bytes"] == sum(map(len, data))


def test_asking_a_pending_file_waits_for_it(bench: Bench) -> None:
    bench.reopen(start=True)
    bench.write("one", content("same"))
    assert bench.duplicates("one") == []
    bench.write("two", content("same"))
    assert bench.duplicates("two") == ["one"]
    assert bench.state("one") == "reference"


@every_strategy
def test_a_second_mount_finds_nothing_to_do(bench: Bench) -> None:
    for name in ("one", "two", "three"):
        bench.write(name, content("same"))
    bench.write("four", content("other"))
    bench.settle()
    bench.reopen()
    assert bench.scan()["looked_at"] == 0
    assert bench.engine.settle(impatient()) == {"settled": 0}


def test_the_caller_is_the_test() -> None:
    assert ME.uid == os.geteuid()
