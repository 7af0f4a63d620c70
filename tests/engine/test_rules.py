"""What must not share stays by itself, whoever works on the store, and is known all the same."""

import os
from pathlib import Path

import pytest

from dedupfs.config import MountOptions, Share
from dedupfs.engine import Engine, rebuild
from dedupfs.errors import StoreError
from dedupfs.rules import EVERYTHING, SharingRules

from .bench import Bench, content, me, silent
from .test_damage import DATA

RULES = SharingRules(min_size_bytes=10_000, exclude=(b"private/", b"*.tmp"))


@pytest.fixture
def ruled(bench: Bench) -> Bench:
    """A source that was mounted with rules, and is worked on with those that the store keeps."""
    bench.engine.store.keep_rules(RULES)
    bench.reopen()
    bench.mkdir("private")
    bench.mkdir("public")
    return bench


def states(bench: Bench, *paths: str) -> list[str]:
    bench.settle()
    return [bench.state(path) for path in paths]


@pytest.mark.parametrize("first", ["private/one", "public/one"])
def test_globs(ruled: Bench, first: str) -> None:
    paths = {"private/one", "public/one", "a.tmp"}
    for path in (first, *sorted(paths - {first})):
        ruled.write(path, DATA)
        ruled.settle()
    assert states(ruled, *paths) == ["plain"] * 3
    assert ruled.duplicates("private/one") == ["a.tmp", "public/one"]
    ruled.write("public/two", DATA)
    assert states(ruled, "private/one", "public/one", "public/two", "a.tmp") == [
        *("plain", "reference", "reference", "plain")
    ]
    assert ruled.refs("private/one") == 4
    assert all(ruled.read(path) == DATA for path in ("private/one", "public/two", "a.tmp"))


@pytest.mark.parametrize("bench", [("reference", "ext4"), ("reflink", "xfs")], indirect=True, ids="-".join)
@pytest.mark.parametrize(
    ("source", "target", "length", "may_share"),
    [
        ("public/one", "public/copy", len(DATA), True),
        ("public/one", "private/copy", len(DATA), False),
        ("public/one", "copy.tmp", 4096, False),
        ("private/one", "public/copy", len(DATA), False),
        ("small", "public/copy", 9_000, False),
    ],
)
def test_a_copy_shares_no_extents(ruled: Bench, source: str, target: str, length: int, *, may_share: bool) -> None:
    """Not even where the filesystem would have them shared when bytes are copied: the kernel is told to move them."""
    for path, data in (("public/one", DATA), ("private/one", DATA), ("small", DATA[:9_000])):
        ruled.write(path, data)
    ruled.settle()
    with ruled.opened(source) as opened, ruled.opened_new(target) as new:
        if may_share:
            assert ruled.engine.vfs.io.copy_range(opened, 0, new, 0, length, me()) == length
        else:
            with pytest.raises(OSError, match="cross-device"):
                ruled.engine.vfs.io.copy_range(opened, 0, new, 0, length, me())


@pytest.mark.parametrize("bench", [("reflink", "xfs")], indirect=True, ids="-".join)
def test_reflinks(ruled: Bench) -> None:
    for path in ("private/one", "public/one", "private/two"):
        ruled.write(path, DATA)
    assert states(ruled, "private/one", "public/one", "private/two") == ["plain"] * 3
    ruled.write("public/two", DATA)
    assert states(ruled, "public/one", "public/two", "private/one") == ["shared", "shared", "plain"]


def test_sizes(ruled: Bench) -> None:
    small = content("small", 9_999)
    for name in ("one", "two"):
        ruled.write(name, small)
    assert states(ruled, "one", "two") == ["plain", "plain"]


def test_copies_inside_the_mount(ruled: Bench) -> None:
    for name in ("public/one", "public/two"):
        ruled.write(name, DATA)
    ruled.settle()
    assert ruled.copy("public/one", "private/copy") == 0
    ruled.write("private/original", DATA)
    ruled.settle()
    assert ruled.copy("private/original", "public/copy") == 0
    assert states(ruled, "private/copy", "private/original", "public/copy") == ["plain", "plain", "reference"]


def test_a_plain_original_is_not_made_a_blob_by_its_copy(ruled: Bench) -> None:
    ruled.write("private/original", DATA)
    ruled.settle()
    ruled.copy("private/original", "public/copy")
    assert states(ruled, "private/original", "public/copy") == ["plain", "plain"]
    assert ruled.blobs() == []


def test_offline_commands_keep_them(ruled: Bench) -> None:
    ruled.close()
    for name in ("private/one", "private/two"):
        ruled.put(name, DATA)
    rebuild(str(ruled.source), silent)
    with Engine(str(ruled.source), MountOptions(share=Share.REFERENCE)) as engine:
        engine.scan(silent)
    assert not ruled.is_reference("private/one")
    ruled.open()


def test_they_can_be_taken_back(ruled: Bench) -> None:
    path: Path = ruled.source / ".dedupfs" / "sharing.json"
    assert ruled.engine.store.read_rules() == RULES
    odd = SharingRules(include=(b"caf\xe9/", "é".encode()), domains=(b"\xff",))
    ruled.engine.store.keep_rules(odd)
    assert ruled.engine.store.read_rules() == odd
    ruled.engine.store.keep_rules(EVERYTHING)
    assert not path.exists()
    assert ruled.engine.store.read_rules() == EVERYTHING


def test_damaged_rules_let_nothing_be_shared(ruled: Bench) -> None:
    path: Path = ruled.source / ".dedupfs" / "sharing.json"
    ruled.close()
    path.write_text('{"min_size_bytes": "many"}')
    with pytest.raises(StoreError, match=r"sharing\.json is damaged"):
        ruled.open()
    os.unlink(path)
    ruled.expect_findings("clean")
