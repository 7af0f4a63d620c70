"""An estimate counts right, reads only what it must, changes nothing, and goes on where it was."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dedupfs.cli import main
from dedupfs.errors import SourceError, UsageError
from dedupfs.estimate import Estimate, cost, estimate
from dedupfs.model import Stamp
from dedupfs.survey import Cache, File

BLOCK = 4096


def silent(phase: str, done: int, total: int | None) -> None:
    pass


@pytest.fixture
def archives(tmp_path: Path) -> tuple[Path, Path]:
    one, other = tmp_path / "one", tmp_path / "other"
    for path, fill, size in (
        (one / "a", b"a", 2 * BLOCK),
        (one / "deep" / "a too", b"a", 2 * BLOCK),
        (one / "b", b"b", 2 * BLOCK),
        (one / "c", b"c", 3 * BLOCK),
        (one / "small", b"s", 100),
        (one / "small too", b"s", 100),
        (other / os.fsdecode(b"a \xff\n"), b"a", 2 * BLOCK),
        (other / "c", b"c", 3 * BLOCK),
        (other / "alone", b"x", 9 * BLOCK),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(fill * size)
    os.link(one / "c", one / "another name")
    os.symlink(one / "a", one / "link")
    return one, other


def look(tmp_path: Path, *directories: Path) -> Estimate:
    return estimate(
        [str(path) for path in directories], cache=str(tmp_path / "cache" / "x"), progress=silent, exact=True
    )


def test_sums(tmp_path: Path, archives: tuple[Path, Path]) -> None:
    found = look(tmp_path, *archives)
    first, second = (sums for _, sums in found.directories)
    assert (first.files, first.bytes) == (6, 9 * BLOCK + 200)
    assert (first.duplicate_files, first.duplicate_bytes) == (1, 2 * BLOCK)
    assert (second.files, second.duplicate_files) == (3, 0)
    assert (found.total.files, found.total.bytes) == (9, 23 * BLOCK + 200)
    assert (found.total.duplicate_files, found.total.duplicate_bytes) == (3, 7 * BLOCK)
    assert found.across_bytes == 5 * BLOCK
    assert [len(group.paths) for group in found.largest] == [3, 2]
    assert found.largest[0].wasted_bytes == 4 * BLOCK
    assert found.unreadable == []


def test_only_what_has_an_equal_size_is_read(tmp_path: Path, archives: tuple[Path, Path]) -> None:
    found = look(tmp_path, *archives)
    assert found.read_bytes == 4 * 2 * BLOCK + 2 * 3 * BLOCK


def test_the_second_time_reads_what_is_new(tmp_path: Path, archives: tuple[Path, Path]) -> None:
    look(tmp_path, *archives)
    again = look(tmp_path, *archives)
    assert (again.read_bytes, again.cached_files) == (0, 6)
    (archives[0] / "b").write_bytes(b"a" * 2 * BLOCK)
    third = look(tmp_path, *archives)
    assert (third.read_bytes, third.cached_files) == (2 * BLOCK, 5)
    assert third.total.duplicate_files == 4


def test_an_interrupted_run_goes_on(tmp_path: Path, archives: tuple[Path, Path]) -> None:
    reading: list[int] = []

    def interrupt(phase: str, done: int, total: int | None) -> None:
        if phase.startswith("reading"):
            reading.append(done)
            if len(reading) == 8:
                raise KeyboardInterrupt

    cache = str(tmp_path / "cache" / "x")
    with pytest.raises(KeyboardInterrupt):
        estimate([str(path) for path in archives], cache=cache, progress=interrupt, exact=True)
    assert look(tmp_path, *archives).cached_files > 0


@pytest.mark.parametrize("content", [b"no database at all, but long enough to be taken for one" * 100, b""])
def test_a_cache_that_is_none_is_begun_anew(tmp_path: Path, archives: tuple[Path, Path], content: bytes) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "x").write_bytes(content)
    assert look(tmp_path, *archives).total.duplicate_files == 3


def test_a_cache_that_cannot_be_used_is_told(tmp_path: Path, archives: tuple[Path, Path]) -> None:
    (tmp_path / "cache" / "x").mkdir(parents=True)
    with pytest.raises(SourceError, match=r"the cache .* cannot be used"):
        look(tmp_path, *archives)
    with Cache(str(tmp_path / "full")) as cache:
        cache._database.execute("PRAGMA max_page_count = 1")
        file = File(0, b"x", 1, 1, Stamp(1, 1, 1))
        with pytest.raises(SourceError, match=r"the cache .* is full"):
            cache.put_picture(file, 1, bytes(100_000))


def test_nothing_is_changed(tmp_path: Path, archives: tuple[Path, Path]) -> None:
    def state() -> dict[str, tuple[int, int, int]]:
        return {
            str(path): (st.st_mtime_ns, st.st_ctime_ns, st.st_atime_ns)
            for top in archives
            for path in top.rglob("*")
            if path.is_file() and not path.is_symlink()
            for st in [path.lstat()]
        }

    before = state()
    look(tmp_path, *archives)
    assert state() == before


def test_what_cannot_be_estimated(tmp_path: Path, archives: tuple[Path, Path]) -> None:
    with pytest.raises(SourceError):
        look(tmp_path, tmp_path / "absent")
    with pytest.raises(UsageError, match="overlap"):
        look(tmp_path, archives[0], archives[0] / "deep")
    with pytest.raises(UsageError, match="overlap"):
        look(tmp_path, archives[0], archives[0])
    (archives[0] / ".dedupfs").mkdir()
    with pytest.raises(UsageError, match="has a dedupfs store"):
        look(tmp_path, archives[0])


def test_a_file_that_changes_meanwhile_is_told(tmp_path: Path, archives: tuple[Path, Path]) -> None:
    def write(phase: str, done: int, total: int | None) -> None:
        if phase.startswith("reading") and not written:
            written.append(phase)
            for path in ("a", "b", "c"):
                with open(archives[0] / path, "ab") as file:
                    file.write(b"more")

    written: list[str] = []
    found = estimate([str(path) for path in archives], cache=str(tmp_path / "x"), progress=write, exact=True)
    assert {reason for _, reason in found.unreadable} == {"was changed meanwhile"}


def test_costs() -> None:
    assert cost(10**12, 0.08) == 80.0
    assert cost(0, 0.23) == 0


def run(capsysbinary: pytest.CaptureFixture[bytes], *arguments: str) -> str:
    assert main(["estimate", *arguments]) == 0
    return os.fsdecode(capsysbinary.readouterr().out)


def test_the_command(
    tmp_path: Path,
    archives: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    directories = [str(path) for path in archives]
    answer: dict[str, Any] = json.loads(run(capsysbinary, *directories, "--json"))
    assert answer["total"]["duplicate_bytes"] == 7 * BLOCK
    assert answer["price_per_gb_month"] == [0.08, 0.23]
    assert (tmp_path / "home" / "dedupfs" / "estimate.sqlite3").exists()
    out = run(capsysbinary, *directories, "--price-per-gb-month", "1000000")
    assert "all: 9 files, 92.2 KiB; duplicate 3 files, 28.0 KiB (30 %)" in out
    assert "cost per month          94.41" in out
    assert "\\xff" not in out
    assert "a \udcff\\x0a" in out
    assert main(["estimate", "--price-per-gb-month", "-1", directories[0]]) == 64
