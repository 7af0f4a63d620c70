"""Directories that must not share with each other: each shares within itself, and finds its duplicates everywhere."""

import errno
import itertools
import os

import pytest

from dedupfs.config import MountOptions, Share
from dedupfs.engine import Engine
from dedupfs.model import COLLISIONS, ContentKey, Digest, Ino
from dedupfs.rules import EVERYTHING, SharingRules

from .bench import Bench, content, extents, me, silent
from .test_damage import DATA, rot

RULES = SharingRules(domains=(b"police/", b"health/"))
FOLDERS = ("police", "health", "other")
both = pytest.mark.parametrize("bench", [("reference", "ext4"), ("reflink", "xfs")], indirect=True, ids="-".join)


def keep(bench: Bench, rules: SharingRules = RULES) -> None:
    bench.engine.store.keep_rules(rules)
    bench.reopen()


@pytest.fixture
def kept(bench: Bench) -> Bench:
    keep(bench)
    for folder in FOLDERS:
        bench.mkdir(folder)
    return bench


def groups(bench: Bench, *paths: str) -> list[list[str]]:
    """Which of these files have their bytes in one place, as the disk says."""

    def place(path: str) -> object:
        if bench.engine.sharing.name == "reflink":
            return [physical for _, physical, _ in extents(bench.below(path))]
        return bench.blob_of(path) if bench.is_reference(path) else bench.below(path).stat().st_ino

    return sorted(
        sorted(found)
        for _, found in itertools.groupby(
            sorted(paths, key=lambda path: str(place(path))), lambda path: str(place(path))
        )
    )


@both
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (0, 2, 4, 1, 3, 5), (5, 0, 3, 2, 4, 1)], ids=str)
@pytest.mark.parametrize("at_once", [True, False])
def test_each_shares_within_itself(kept: Bench, order: tuple[int, ...], *, at_once: bool) -> None:
    paths = [f"{folder}/{number}" for folder in FOLDERS for number in (1, 2)]
    for number in order:
        kept.write(paths[number], DATA)
        if not at_once:
            kept.settle()
    kept.settle()
    assert groups(kept, *paths) == sorted([f"{folder}/1", f"{folder}/2"] for folder in FOLDERS)
    for path in paths:
        assert kept.read(path) == DATA
        assert kept.duplicates(path) == sorted(set(paths) - {path})
        assert kept.refs(path) == 6
    found = kept.engine.duplicates(None)
    assert isinstance(found, list)
    assert [group["paths"] for group in found] == [sorted(paths)]
    assert kept.status()["stored_bytes"] == 3 * len(DATA)
    report = kept.engine.report(silent)
    assert (report["groups"], report["duplicate_files"], report["shared_across_domains"]) == (1, 5, 0)
    assert report["duplicate_bytes"] == 5 * len(DATA)
    # and what comes later joins its own
    for folder in FOLDERS:
        kept.write(f"{folder}/3", DATA)
    kept.settle()
    paths += [f"{folder}/3" for folder in FOLDERS]
    assert groups(kept, *paths) == sorted([f"{folder}/{number}" for number in (1, 2, 3)] for folder in FOLDERS)


def test_one_each_shares_with_nobody(kept: Bench) -> None:
    for folder in FOLDERS:
        kept.write(f"{folder}/one", DATA)
    kept.settle()
    assert [kept.state(f"{folder}/one") for folder in FOLDERS] == ["plain"] * 3
    assert kept.duplicates("police/one") == ["health/one", "other/one"]
    assert kept.blobs() == []


def test_a_domain_of_each_folder(bench: Bench) -> None:
    keep(bench, SharingRules(domains=(b"agencies/*", b"agencies/*/secret")))
    bench.mkdir("agencies")
    for folder in ("a", "b", "a/secret", "a/open"):
        bench.mkdir(f"agencies/{folder}")
    paths = [f"agencies/{path}" for path in ("a/1", "a/open/2", "b/1", "b/2", "a/secret/1", "a/secret/2", "top")]
    for path in [*paths, "top"]:
        bench.write(path, DATA)
    bench.settle()
    shared = [["agencies/a/1", "agencies/a/open/2"], ["agencies/a/secret/1", "agencies/a/secret/2"]]
    assert groups(bench, *paths, "top") == sorted([*shared, ["agencies/b/1", "agencies/b/2"], ["agencies/top", "top"]])


@both
def test_copies_inside_the_mount(kept: Bench) -> None:
    for folder in ("police", "health"):
        kept.write(f"{folder}/one", DATA)
    kept.write("police/two", DATA)
    kept.settle()
    for folder in FOLDERS:
        with kept.opened("police/one") as source, kept.opened_new(f"{folder}/copy") as target:
            if folder == "police":
                assert kept.engine.vfs.io.copy_range(source, 0, target, 0, len(DATA), me()) == len(DATA)
                continue
            with pytest.raises(OSError, match="cross-device") as caught:
                kept.engine.vfs.io.copy_range(source, 0, target, 0, len(DATA), me())
            assert caught.value.errno == errno.EXDEV
            kept.write_to(target, DATA)  # as the kernel goes on
    kept.settle()
    kept.copy("health/one", "health/copy of one")
    kept.settle()
    assert groups(
        kept, "police/one", "police/copy", "health/one", "health/copy", "health/copy of one", "other/copy"
    ) == [
        ["health/copy", "health/copy of one", "health/one"],
        ["other/copy"],
        ["police/copy", "police/one"],
    ]


@both
def test_what_was_shared_before_stays_shared(bench: Bench) -> None:
    for folder in FOLDERS:
        bench.mkdir(folder)
        bench.write(f"{folder}/old", DATA)
    bench.settle()
    keep(bench)
    bench.scan()
    old = [f"{folder}/old" for folder in FOLDERS]
    assert groups(bench, *old) == [sorted(old)]
    report = bench.engine.report(silent)
    assert (report["shared_across_domains"], report["across_domains"]) == (1, [sorted(old)])
    # Who comes new does not join them, but finds them.
    for folder in ("police", "health"):
        for number in (1, 2):
            bench.write(f"{folder}/{number}", DATA)
    bench.settle()
    new = [f"{folder}/{number}" for folder in ("police", "health") for number in (1, 2)]
    assert groups(bench, *old, *new) == sorted([sorted(old), ["police/1", "police/2"], ["health/1", "health/2"]])
    assert bench.duplicates("police/1") == sorted({*old, *new} - {"police/1"})
    if bench.engine.sharing.name == "reference":
        bench.copy("police/old", "police/copy")  # nor does a copy
        bench.settle()
        assert bench.blob_of("police/old") not in {bench.blob_of(path) for path in new}
        assert not bench.is_reference("police/copy") or bench.blob_of("police/copy") != bench.blob_of("police/old")


def test_a_file_that_is_moved_to_another_domain_keeps_its_bytes(kept: Bench) -> None:
    for number in (1, 2, 3):
        kept.write(f"police/{number}", DATA)
    kept.settle()
    kept.rename("police/3", "health/moved")
    kept.settle()
    assert kept.blob_of("health/moved") == kept.blob_of("police/1")
    report = kept.engine.report(silent)
    assert report["across_domains"] == [["health/moved", "police/1", "police/2"]]
    for path in ("police/4", "police/5", "health/4", "health/5"):
        kept.write(path, DATA)
    kept.settle()
    assert groups(kept, "health/moved", "police/1", "police/4", "police/5", "health/4", "health/5") == [
        ["health/4", "health/5"],
        ["health/moved", "police/1"],
        ["police/4", "police/5"],
    ]
    # With bytes of its own it is the other domain's like any other.
    kept.engine.restore([b"health/moved"], silent)
    kept.settle()
    kept.write_at("health/moved", DATA[:10], 0)
    kept.settle()
    assert kept.blob_of("health/moved") == kept.blob_of("health/4")
    assert kept.engine.report(silent)["shared_across_domains"] == 0


def test_a_domain_that_is_renamed_as_a_whole(bench: Bench) -> None:
    keep(bench, SharingRules(domains=(b"/*",)))
    bench.mkdir("one")
    for number in (1, 2):
        bench.write(f"one/{number}", DATA)
    bench.settle()
    bench.rename("one", "two")
    bench.mkdir("one")
    bench.write("two/3", DATA)
    bench.write("one/1", DATA)
    bench.settle()
    assert groups(bench, "two/1", "two/2", "two/3", "one/1") == [["one/1"], ["two/1", "two/2", "two/3"]]


def test_a_damaged_blob_is_healed_by_its_own_domain_alone(kept: Bench) -> None:
    paths = [f"{folder}/{number}" for folder in ("police", "health") for number in (1, 2)]
    for path in paths:
        kept.write(path, DATA)
    kept.settle()
    blob = kept.source / ".dedupfs" / "blobs" / kept.blob_of("health/1").digest.hex()[:2]
    rot(blob / kept.blob_of("health/1").name)
    kept.expect_log("scrub: blob", "was damaged; healed")
    (finding,) = _findings(kept)
    assert (finding["fate"], finding["paths"]) == ("quarantined", ["health/1", "health/2"])
    assert [kept.read(path) for path in ("police/1", "police/2")] == [DATA, DATA]
    with pytest.raises(Exception, match="is missing"):
        kept.read("health/1")
    assert kept.duplicates("health/1") == ["health/2", "police/1", "police/2"]  # where a good copy is
    kept.write("health/good", kept.read("police/1"))
    kept.settle()
    assert [kept.read(path) for path in paths] == [DATA] * 4
    assert groups(kept, *paths) == [["health/1", "health/2"], ["police/1", "police/2"]]
    assert [each for each in _findings(kept) if each["fate"] != "healed"] == []


def test_a_plain_copy_known_by_another_number_heals(kept: Bench) -> None:
    for path in ("police/1", "police/2", "health/1", "health/2"):
        kept.write(path, DATA)
        kept.settle()
    kept.engine.restore([b"health/2"], silent)
    kept.settle()
    other = kept.blob_of("police/1")
    with kept.engine.settler.writing() as batch:  # as it is when it came before there was a second copy
        ino = kept.below("health/2").stat().st_ino
        record = batch.file(ino)  # type: ignore[arg-type]
        assert record is not None
        batch.put_file(ino, record._replace(content=other))  # type: ignore[arg-type]
    mine = kept.blob_of("health/1")
    assert mine != other
    rot(kept.source / ".dedupfs" / "blobs" / mine.digest.hex()[:2] / mine.name)
    kept.expect_log("scrub: blob", "was damaged; healed")
    assert [finding["fate"] for finding in _findings(kept)] == ["healed"]
    assert kept.read("health/1") == DATA


def _findings(bench: Bench) -> list[dict[str, object]]:
    found = bench.engine.scrub(silent, 0)["findings"]
    bench.settle()
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize("met_first", ["health", "police"])
def test_without_an_index_nobody_joins_a_blob_before_it_is_known_whose_it_is(kept: Bench, met_first: str) -> None:
    """Files of a second domain are met before the references of the first: they wait for the end of the walk."""
    for number in (1, 2):
        kept.write(f"police/{number}", DATA)
    kept.settle()
    kept.close()
    for path in ("health/a", "health/b", "police/x"):
        kept.put(path, DATA)
    with Engine(str(kept.source), MountOptions(share=Share.REFERENCE)) as engine:
        engine.replace_index()
        for found in sorted(kept.below(met_first).iterdir()):
            engine.settler.offer(Ino(found.stat().st_ino), os.fsencode(found.relative_to(kept.source)))
        engine.settler.work_off(lambda done, left: None)
        engine.scan(silent)
    kept.open()
    kept.settle()
    assert groups(kept, "police/1", "police/2", "police/x", "health/a", "health/b") == [
        ["health/a", "health/b"],
        ["police/1", "police/2", "police/x"],
    ]


def test_offline_commands_and_offline_stores_keep_them(kept: Bench) -> None:
    kept.close()
    for folder in FOLDERS:
        for number in (1, 2):
            kept.put(f"{folder}/{number}", DATA)
    with Engine(str(kept.source), MountOptions(share=Share.REFERENCE)) as engine:
        engine.scan(silent)
    kept.open()
    paths = [f"{folder}/{number}" for folder in FOLDERS for number in (1, 2)]
    assert groups(kept, *paths) == sorted([f"{folder}/1", f"{folder}/2"] for folder in FOLDERS)


def test_taken_back_the_copies_stay_and_nothing_is_lost(kept: Bench) -> None:
    paths = [f"{folder}/{number}" for folder in FOLDERS for number in (1, 2)]
    for path in paths:
        kept.write(path, DATA)
    kept.settle()
    before = groups(kept, *paths)
    keep(kept, EVERYTHING)
    kept.write("police/3", DATA)
    kept.settle()
    assert groups(kept, *paths) == before
    assert len(kept.blobs()) == 3
    for path in paths[:-1]:
        kept.unlink(path)
    kept.unlink("police/3")
    kept.settle()
    assert kept.read(paths[-1]) == DATA
    assert len(kept.blobs()) == 1


def test_the_last_of_a_copy_takes_its_blob_with_it_and_no_other(kept: Bench) -> None:
    for folder in ("police", "health"):
        for number in (1, 2):
            kept.write(f"{folder}/{number}", DATA)
    kept.settle()
    assert len(kept.blobs()) == 2
    for number in (1, 2):
        kept.unlink(f"police/{number}")
    kept.settle()
    assert len(kept.blobs()) == 1
    assert [kept.read(f"health/{number}") for number in (1, 2)] == [DATA, DATA]
    for number in (1, 2):
        kept.write(f"police/{number}", DATA)
    kept.settle()
    assert groups(kept, "police/1", "police/2", "health/1", "health/2") == [
        ["health/1", "health/2"],
        ["police/1", "police/2"],
    ]


@pytest.fixture
def colliding(bench: Bench) -> Bench:
    """A digest that says nothing: everything of one length collides."""
    bench.engine.store.keep_rules(RULES)
    bench.reopen(hasher=lambda fd, checkpoint=None: Digest(bytes(16)))
    for folder in FOLDERS:
        bench.mkdir(folder)
    return bench


def test_copies_and_collisions_are_told_apart(colliding: Bench) -> None:
    one, other = content("one"), content("other")
    paths = {f"{folder}/{name}{number}": data for folder in FOLDERS for number in (1, 2) for name, data in
             (("a", one), ("b", other))}  # fmt: skip
    for path in paths:
        colliding.put(path, paths[path])
    colliding.scan()
    colliding.settle()
    for path, data in paths.items():
        assert colliding.read(path) == data
        assert colliding.duplicates(path) == sorted(each for each in paths if paths[each] == data and each != path)
    assert len(colliding.blobs()) == 6
    assert groups(colliding, *paths) == sorted(
        sorted(f"{folder}/{name}{number}" for number in (1, 2)) for folder in FOLDERS for name in "ab"
    )
    numbers = {ContentKey(Digest(bytes(16)), int(name.rpartition(".")[2])).bytes_key for name in colliding.blobs()}
    assert {key.collision for key in numbers} == {0, 1}
    assert all(0 <= key.collision < COLLISIONS for key in numbers)
    # When those that were first are gone, their number is not given to other bytes.
    for path in paths:
        if colliding.blob_of(path).collision < COLLISIONS:
            colliding.unlink(path)
    colliding.settle()
    left = [path for path in paths if colliding.below(path).exists()]
    assert len(left) == 8
    colliding.put("other/new", content("new"))
    colliding.scan()
    assert colliding.duplicates("other/new") == []
    assert all("other/new" not in colliding.duplicates(path) for path in left)
