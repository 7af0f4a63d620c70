"""In quiet hours, and beyond a rate, work in the background waits. What somebody asks for does not; nothing is lost."""

import os

import pytest

from dedupfs import describing, settle
from dedupfs.model import ImageState

from .bench import BLOCK, Bench, content, impatient
from .test_damage import DATA
from .test_describing import picture, state_of


class Hours:
    """The clock on the wall."""

    def __init__(self) -> None:
        self.until = "18:00"

    def __call__(self) -> str:
        return self.until


@pytest.fixture
def hours(monkeypatch: pytest.MonkeyPatch) -> Hours:
    for module in (settle, describing):
        monkeypatch.setattr(module, "_CLOCK_S", 0.02)
    return Hours()


@pytest.fixture
def quiet(bench: Bench, hours: Hours) -> Bench:
    bench.reopen(start=True, quiet_until=hours)
    return bench


def test_files_wait_and_are_settled_afterwards(quiet: Bench, hours: Hours) -> None:
    for name in ("one", "two", "three"):
        quiet.write(name, DATA)
    # The last one is asked about: it has been the others' turn before.
    assert quiet.state("three") == "plain"
    assert quiet.refs("three") == 1
    assert (quiet.status()["pending"], quiet.status()["quiet_until"]) == (2, "18:00")
    assert "2 files wait, until 18:00" in quiet.engine.describe()
    hours.until = ""
    quiet.wait_for(lambda: quiet.status()["pending"] == 0)
    assert [quiet.state(name) for name in ("one", "two", "three")] == ["reference"] * 3


def test_names_are_followed_all_the_while(quiet: Bench) -> None:
    quiet.mkdir("folder")
    for name in ("folder/one", "folder/two"):
        quiet.write(name, DATA)
        assert quiet.state(name)
    quiet.write("folder/waits", DATA)
    quiet.rename("folder", "moved")
    quiet.unlink("moved/one")
    quiet.rename("moved/waits", "waits")
    assert quiet.duplicates("moved/two") == []
    assert quiet.status()["pending"] == 1
    assert quiet.duplicates("waits") == ["moved/two"]


def test_who_asks_for_everything_gets_it(quiet: Bench) -> None:
    for name in ("one", "two", "three"):
        quiet.write(name, DATA)
    quiet.engine.settle(impatient())
    assert (quiet.status()["pending"], quiet.status()["quiet_until"]) == (0, "18:00")
    assert [quiet.state(name) for name in ("one", "two", "three")] == ["reference"] * 3
    quiet.write("four", DATA)  # and afterwards it is quiet again
    quiet.write("five", DATA)
    assert quiet.state("five") == "reference"
    assert quiet.status()["pending"] == 1


def test_what_waits_survives_a_stop(quiet: Bench) -> None:
    for name in ("one", "two"):
        quiet.write(name, DATA)
    assert quiet.status()["pending"] == 2
    quiet.reopen(start=True)
    quiet.wait_for(lambda: quiet.status()["pending"] == 0)
    assert quiet.engine.settler.index_is_complete
    assert [quiet.state(name) for name in ("one", "two")] == ["reference"] * 2


def test_a_walk_waits_and_is_no_hindrance_to_going_down(bench: Bench, hours: Hours) -> None:
    for name in ("one", "two"):
        bench.put(name, DATA)
    (bench.source / ".dedupfs/clean").unlink(missing_ok=True)
    for _ in range(2):
        bench.close()
        os.unlink(bench.source / ".dedupfs/clean")
        bench.open(start=True, quiet_until=hours)
        bench.wait_for(lambda: bool(bench.status()["scanning"]))
        assert (bench.status()["files"], bench.status()["pending"]) == (0, 0)
    assert bench.state("two") == "plain"  # asked, and not known before
    bench.engine.settle(impatient())
    assert not bench.status()["scanning"]
    assert [bench.state(name) for name in ("one", "two")] == ["reference"] * 2
    bench.close()
    os.unlink(bench.source / ".dedupfs/clean")
    bench.put("three", DATA)
    bench.open(start=True, quiet_until=hours)
    hours.until = ""
    bench.wait_for(lambda: bench.status()["files"] == 3 and not bench.status()["scanning"])
    assert bench.state("three") == "reference"


def test_an_explicit_scan_does_not_wait(bench: Bench, hours: Hours) -> None:
    bench.close()
    os.unlink(bench.source / ".dedupfs/clean")
    for name in ("one", "two"):
        bench.put(name, DATA)
    bench.open(start=True, quiet_until=hours)
    bench.engine.scan(impatient())
    assert [bench.state(name) for name in ("one", "two")] == ["reference"] * 2


def test_pictures_wait_and_one_that_is_asked_about_does_not(quiet: Bench, hours: Hours) -> None:
    for number in range(3):
        quiet.write(f"{number}.jpg", picture(number))
    quiet.engine.settle(impatient(), exact=True)
    assert quiet.status()["pictures_waiting"] == 3
    assert quiet.xattr("1.jpg", "phash")
    assert state_of(quiet, "1.jpg") is ImageState.DESCRIBED
    quiet.write("rests.jpg", picture(4))
    assert quiet.xattr("1.jpg", "similar") == b""  # and does not wait for that one
    assert quiet.status()["pending"] == 1
    hours.until = ""
    quiet.wait_for(lambda: quiet.status()["pictures_waiting"] == 0)
    hours.until = "18:00"
    quiet.write("3.jpg", picture(3))
    quiet.engine.settle(impatient())
    assert state_of(quiet, "3.jpg") is ImageState.DESCRIBED


def test_a_rate(bench: Bench) -> None:
    """A hundred seconds' worth at once; then the next ones wait, but for those that are asked about."""
    bench.reopen(start=True, settle_rate_mb_s=0.01)
    bench.write("large", content("large", 256 * BLOCK))
    bench.wait_for(lambda: bench.status()["pending"] == 0)
    for name in ("one", "two", "three"):
        bench.write(name, DATA)
    assert bench.state("three") == "plain"
    assert bench.status()["pending"] == 2
    bench.engine.settle(impatient())
    assert [bench.state(name) for name in ("one", "two", "three")] == ["reference"] * 3
