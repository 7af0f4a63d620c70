"""An estimate finds pictures that are alike, looks at each content once, decodes nothing itself, and goes on where it
was."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dedupfs import lookalikes
from dedupfs.cli import main
from dedupfs.errors import Unavailable
from dedupfs.estimate import Estimate, estimate
from dedupfs.lookalikes import Lookalikes
from dedupfs.model import ImageRecord, Relation, Thumbnails
from dedupfs.workers import Workers
from tests.support.mounted import REPOSITORY
from tests.support.photos import photographs


def silent(phase: str, done: int, total: int | None) -> None:
    pass


@pytest.fixture
def archives(tmp_path: Path) -> tuple[Path, Path]:
    """Two photographs: one of them also smaller, in two places, and compressed anew; and what is none."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    first, second = photographs(2, jpeg=True)
    shutil.copy(first, one / "first.jpg")
    shutil.copy(second, one / "second.jpg")
    with Image.open(first) as picture:
        whole = picture.convert("RGB")
    whole.save(other / "anew.jpg", quality=40)
    whole.resize((whole.width // 2, whole.height // 2)).save(other / "small.jpg", quality=85)
    shutil.copy(other / "small.jpg", one / "small, too.jpg")
    whole.resize((24, 24)).save(one / "icon.png")
    shutil.copy(one / "icon.png", other / "the same icon.png")
    assert (one / "icon.png").stat().st_size < 4096
    (one / "broken.jpg").write_bytes(first.read_bytes()[:300])
    (other / "text.jpg").write_bytes(b"no picture" * 1000)
    (other / "empty.jpg").write_bytes(b"")
    return one, other


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A descriptor for each time that a worker was asked."""
    asked: list[int] = []
    describe = Workers.describe

    def counted(workers: Workers, fd: int) -> tuple[ImageRecord, Thumbnails]:
        asked.append(fd)
        return describe(workers, fd)

    monkeypatch.setattr(Workers, "describe", counted)
    return asked


def look(
    tmp_path: Path, archives: tuple[Path, Path], progress: Callable[[str, int, int | None], None] = silent
) -> Estimate:
    return estimate(
        [str(path) for path in archives], cache=str(tmp_path / "cache" / "x"), progress=progress, exact=False
    )


def found_in(found: Estimate) -> Lookalikes:
    assert found.lookalikes is not None
    assert found.lookalikes_reason == ""
    return found.lookalikes


def test_what_is_alike(tmp_path: Path, archives: tuple[Path, Path], described: list[int]) -> None:
    found = found_in(look(tmp_path, archives))
    assert len(described) == 6  # contents that begin like a picture, each once
    assert (found.pictures, found.groups, found.near) == (5, 1, 2)
    assert found.relations == {Relation.RECOMPRESSED: 1, Relation.RESIZED: 1}
    assert found.near_bytes == sum((archives[1] / name).stat().st_size for name in ("anew.jpg", "small.jpg"))
    ((versions, more),) = found.largest
    names = [sorted(os.path.basename(file.path) for file in version.files) for version in versions]
    assert names[0] == [b"first.jpg"]
    assert sorted(names[1:]) == [[b"anew.jpg"], [b"small, too.jpg", b"small.jpg"]]
    assert more == 0
    ((files, reason),) = found.undescribable
    assert [os.path.basename(file.path) for file in files] == [b"broken.jpg"]
    assert reason


def test_the_second_time_asks_for_what_is_new(
    tmp_path: Path, archives: tuple[Path, Path], described: list[int]
) -> None:
    first = found_in(look(tmp_path, archives))
    described.clear()
    assert found_in(look(tmp_path, archives)) == first
    assert described == []
    with Image.open(archives[0] / "second.jpg") as picture:
        picture.convert("RGB").save(archives[1] / "new.jpg", quality=30)
    assert found_in(look(tmp_path, archives)).groups == 2
    assert len(described) == 1


def test_an_interrupted_run_goes_on(
    tmp_path: Path, archives: tuple[Path, Path], described: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookalikes, "_AHEAD", 1)

    def interrupt(phase: str, done: int, total: int | None) -> None:
        if phase == "looking at pictures" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look(tmp_path, archives, interrupt)
    before = len(described)
    assert found_in(look(tmp_path, archives)).groups == 1
    assert before >= 3
    assert len(described) <= 7  # one at most was in hand


def test_a_damaged_cache_is_not_believed(tmp_path: Path, archives: tuple[Path, Path], described: list[int]) -> None:
    first = found_in(look(tmp_path, archives))
    with sqlite3.connect(tmp_path / "cache" / "x") as database:
        database.execute("UPDATE pictures SET seen = CAST('D?' AS BLOB) WHERE substr(seen, 1, 1) = CAST('D' AS BLOB)")
        database.execute("UPDATE compared SET found = CAST('[[99, 1, 2]]' AS BLOB)")
    database.close()
    described.clear()
    assert found_in(look(tmp_path, archives)) == first
    assert len(described) == 5


def test_nothing_is_changed(tmp_path: Path, archives: tuple[Path, Path]) -> None:
    def state() -> list[tuple[str, int, int, int]]:
        paths = sorted(path for top in archives for path in top.rglob("*"))
        return [(str(path), *(getattr(path.lstat(), f"st_{each}time_ns") for each in "mca")) for path in paths]

    before = state()
    look(tmp_path, archives)
    assert state() == before


def test_a_picture_that_changes_meanwhile_is_passed_over(
    tmp_path: Path, archives: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    describe = Workers.describe

    def changing(workers: Workers, fd: int) -> tuple[ImageRecord, Thumbnails]:
        path = os.readlink(f"/proc/self/fd/{fd}")
        if path.endswith("anew.jpg"):
            with open(path, "ab") as file:
                file.write(b"more")
        return describe(workers, fd)

    monkeypatch.setattr(Workers, "describe", changing)
    found = found_in(look(tmp_path, archives))
    assert (found.pictures, found.relations) == (4, {Relation.RESIZED: 1})


def test_where_no_worker_can_be_had(
    tmp_path: Path,
    archives: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes],
) -> None:
    def refuse(workers: Workers) -> None:
        raise Unavailable("it cannot be shut in")

    monkeypatch.setattr(Workers, "_take", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert main(["estimate", *map(str, archives)]) == 0
    told = capsysbinary.readouterr().out.decode()
    assert "near-duplicates         not looked for: it cannot be shut in" in told
    assert "all: 10 files" in told


def test_the_command(
    tmp_path: Path,
    archives: tuple[Path, Path],
    described: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    directories = [str(path) for path in archives]

    def run(*arguments: str) -> str:
        assert main([*arguments]) == 0
        return os.fsdecode(capsysbinary.readouterr().out)

    assert "not looked for: not asked for" in run("estimate", "--exact", *directories)
    assert not described
    assert "near_duplicates" not in json.loads(run("estimate", "--exact", "--json", *directories))
    told = run("estimate", *directories)
    assert "5 different ones, and 1 that cannot be decoded" in told
    assert "in 1 groups" not in told
    assert "in 1 group: " in told
    answer: dict[str, Any] = json.loads(run("estimate", "--json", *directories))
    assert (answer["near_duplicate_groups"], answer["near_duplicate_pictures"]) == (1, 2)
    (group,) = answer["near_duplicates"]
    assert group["authoritative"] == {"paths": [str(archives[0] / "first.jpg")], "copies": 1}
    page = tmp_path / "page.html"
    run("report", *directories, "--html", str(page))
    assert page.read_text().count('src="data:image/png;base64,') == 3
    run("report", *directories, "--exact", "--html", str(page))
    assert "several versions" not in page.read_text()


def test_nothing_is_decoded_here(tmp_path: Path, archives: tuple[Path, Path]) -> None:
    program = (
        "import sys; from dedupfs.cli import main; code = main(sys.argv[1:]); "
        "print(sorted({'PIL', 'imagehash', 'pillow_heif'} & set(sys.modules))); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "estimate", *map(str, archives)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "XDG_CACHE_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "in 1 group: " in done.stdout
    assert done.stdout.endswith("\n[]\n")
