"""Things of any name in `.dedupfs/staging` and orphans: the store starts, and nothing of somebody else's is lost."""

import os
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fuzz import examples

from .bench import BLOCK, Bench, content

DATA = content("same", 3 * BLOCK + 100)

OURS = ["publish", "heal", "refer", "probe", "detach"]

# What an ill-meaning or careless root, or a newer dedupfs, could leave there.
NEARLY = [
    *OURS,
    *(f"{purpose}." for purpose in OURS),
    *(f"{purpose}.x.1.1" for purpose in OURS),
    *(f"{purpose}.-1.1.1" for purpose in OURS),
    *(f"{purpose}.٣.1.1" for purpose in OURS),
    *(f"{purpose}.99999999999999999999999.1.1" for purpose in OURS),
    *(f"{purpose}.1.1.1.1" for purpose in OURS),
    "index",
    "publish\n.1.1.1",
    "n" * 255,
    "\udcff",
]


def start_again(bench: Bench) -> None:
    bench.crash()
    bench.recover()


def strangers(bench: Bench) -> list[bytes]:
    """The contents of the files in quarantine/, whatever they are called."""
    place = bench.source / ".dedupfs/quarantine"
    return sorted(path.read_bytes() for path in place.iterdir() if path.is_file())


@pytest.mark.parametrize("name", NEARLY, ids=[ascii(name)[:40] for name in NEARLY])
def test_a_name_that_is_nearly_ours(bench: Bench, name: str) -> None:
    bench.expect_log("set aside", "was not stopped", "unclean")
    for known in ("one", "two"):
        bench.write(known, DATA)
    bench.settle()
    for number in range(2):
        (bench.source / ".dedupfs/staging" / name).write_bytes(b"somebody's %d" % number)
        start_again(bench)
        assert bench.inside("staging") == []
    assert strangers(bench) == [b"somebody's 0", b"somebody's 1"]
    assert bench.read("one") == bench.read("two") == DATA
    assert bench.state("one") == "reference"


@pytest.mark.parametrize("kind", ["directory", "link", "fifo"])
@pytest.mark.parametrize("name", ["refer.1.1.1", "publish.1.1.1", "notes"])
def test_what_is_no_file(bench: Bench, name: str, kind: str) -> None:
    bench.expect_log("set aside", "was not stopped", "unclean")
    outside = bench.put("outside", DATA)
    bench.scan()
    for _ in range(2):
        path = bench.source / ".dedupfs/staging" / name
        if kind == "directory":
            path.mkdir()
            (path / "inside").write_bytes(b"somebody's")
        elif kind == "link":
            path.symlink_to(outside)
        else:
            os.mkfifo(path)
        start_again(bench)
        assert bench.inside("staging") == []
    assert len(bench.inside("quarantine")) == 2
    assert outside.read_bytes() == DATA


@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize("name", ["notes", "index", ".fuse_hidden", ".fuse_hidden0000000100000001", "x.fuse_hidden"])
def test_what_is_no_orphan(bench: Bench, name: str, kind: str) -> None:
    """What libfuse called so was unlinked while it was open, and goes. Nothing else does."""
    bench.expect_log("set aside", "was not stopped", "unclean")
    for number in range(2):
        path = bench.source / ".dedupfs/orphans" / name
        if kind == "directory":
            path.mkdir()
            path /= "inside"
        path.write_bytes(b"somebody's %d" % number)
        start_again(bench)
        assert bench.inside("orphans") == []
    kept = 0 if kind == "file" and name.startswith(".fuse_hidden") else 2
    assert len(bench.inside("quarantine")) == kept


names = st.text(string.ascii_lowercase + string.digits + ".-_ ٣", min_size=1, max_size=30)
labelled = st.builds("{}.{}".format, st.sampled_from(OURS), st.text(string.digits + ".x-", max_size=12))


@examples(8)
@given(chosen=st.lists(st.one_of(names, labelled), max_size=5, unique=True))
def test_any_names(bench: Bench, chosen: list[str]) -> None:
    bench.expect_log("set aside", "was not stopped", "unclean")
    bench.write("one", DATA)
    bench.write("two", DATA)
    bench.settle()
    for name in chosen:
        if name not in (".", ".."):
            (bench.source / ".dedupfs/staging" / name).write_bytes(b"somebody's")
    start_again(bench)
    assert bench.inside("staging") == []
    assert bench.read("one") == bench.read("two") == DATA
