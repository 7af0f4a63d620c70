"""A report counts right, and its page shows the names of files without obeying them."""

import base64
import csv
import datetime
import errno
import html.parser
import io
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from dedupfs import history, page
from dedupfs.backing import Backing
from dedupfs.cli import main
from dedupfs.model import Totals
from tests.support.photos import photographs

from .bench import BLOCK, Bench, content, impatient, silent
from .test_damage import DATA, rot

OTHER = content("other", 2 * BLOCK)
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    '=HYPERLINK("http:")',
    "two\nlines\r",
    "caf\udce9",
    "\u202egpj.exe",
    "&amp;",
    "'",
]


def report(bench: Bench) -> dict[str, Any]:
    return dict(bench.engine.report(silent))


@pytest.fixture
def archive(bench: Bench) -> Bench:
    for folder in ("permits", "inspections", "alone"):
        bench.mkdir(folder)
    for path in ("permits/a", "permits/b", "inspections/a", "top"):
        bench.write(path, DATA)
    for path in ("permits/o", "inspections/o"):
        bench.write(path, OTHER)
    bench.write("alone/x", content("x"))
    bench.write("alone/tiny", b"t")
    bench.write("permits/tiny", b"t")
    bench.settle()
    return bench


def test_what_is_counted(archive: Bench) -> None:
    found = report(archive)
    assert (found["groups"], found["duplicate_files"]) == (2, 4)
    assert found["duplicate_bytes"] == 3 * len(DATA) + len(OTHER) == found["saved_bytes"]
    assert (found["unknown"], found["unreadable"], found["damaged"]) == (0, 0, [])
    folders = {folder["name"]: folder for folder in found["folders"]}
    assert set(folders) == {".", "alone", "inspections", "permits"}
    assert (folders["permits"]["files"], folders["permits"]["references"]) == (4, 3)
    assert folders["alone"]["duplicate_files"] == 0
    assert sum(folder["duplicate_bytes"] for folder in folders.values()) == found["duplicate_bytes"]
    pairs = {tuple(pair["folders"]): pair["bytes"] for pair in found["pairs"]}
    assert pairs == {
        ("inspections", "permits"): len(DATA) + len(OTHER),
        (".", "inspections"): len(DATA),
        (".", "permits"): len(DATA),
        ("permits", "permits"): len(DATA),
    }
    assert [(group["copies"], group["paths"][0]) for group in found["largest"]] == [
        (4, "inspections/a"),
        (2, "inspections/o"),
    ]


def test_what_is_not_known_is_told(archive: Bench) -> None:
    archive.put("new", DATA)
    found = report(archive)
    assert (found["unknown"], found["unknown_paths"]) == (1, ["new"])
    archive.scan()
    assert report(archive)["unknown"] == 0


class Reader(html.parser.HTMLParser):
    """What a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def render(found: dict[str, Any]) -> str:
    return page.render(found, prices=(0.08, 0.23), currency="USD", made_at="2026-01-02 03:04")


def test_hostile_names_are_shown(bench: Bench) -> None:
    for number, name in enumerate(HOSTILE):
        name = name.replace("/", "∕")
        bench.mkdir(name)
        for copy in range(2):
            bench.write(f"{name}/{name}{copy}", content(str(number)))
    bench.settle()
    found = report(bench)
    text = render(found)
    reader = Reader()
    reader.feed(text)
    assert reader.tags.isdisjoint({"script", "img", "a", "link", "iframe", "object"})
    assert not any(attribute.startswith("on") or attribute in ("src", "href") for attribute in reader.attributes)
    assert "<script>alert(1)<∕script>/" in reader.text
    assert "two\\u000alines\\u000d/" in reader.text
    assert r"\u202egpj.exe" in reader.text
    assert r"caf\xe9" in reader.text
    text.encode()  # is text
    rows = list(csv.reader(io.StringIO(page.lines(found))))
    assert len(rows) == 1 + 2 * len(HOSTILE)
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row)


def test_the_page_needs_nothing_else(archive: Bench) -> None:
    text = render(report(archive))
    assert not re.search(r"""(?:src\s*=(?!"data:image/png;base64,)|href\s*=)|url\(|@import|https?://""", text)
    assert '<div class=bars role="img"' in text
    assert "@media print" in text
    assert "permits" in text


def test_a_page_of_nothing(bench: Bench) -> None:
    text = render(report(bench))
    assert "There are no files." in text
    assert "None: everything could be read." in text


@pytest.fixture
def pictures(bench: Bench) -> Bench:
    """A photograph in three versions, one of them with a stamp, and one that is damaged."""
    original = Image.open(photographs(1, jpeg=True)[0]).convert("RGB")
    original.thumbnail((640, 480))
    exif = Image.Exif()
    exif[0x0132] = "2024:05:06 07:08:09"
    exif[0x0110] = "Camera"
    exif.get_ifd(0x8769)[0x9003] = "2024:05:06 07:08:09"
    stamped = original.copy()
    ImageDraw.Draw(stamped).rectangle((20, 20, 200, 90), fill="white", outline="red", width=6)
    bench.reopen(start=True)
    for folder in ("permits", "inspections"):
        bench.mkdir(folder)
    for path, image, quality in (
        ("permits/a.jpg", original, 90),
        ("inspections/<b>.jpg", original.resize((original.width // 2, original.height // 2)), 80),
        ("inspections/a.jpg", stamped, 90),
    ):
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality, exif=exif)
        bench.write(path, out.getvalue())
    bench.write("permits/<damaged>.jpg", b"\xff\xd8\xff\xe0" + bytes(6000))
    bench.engine.settle(impatient())
    return bench


@pytest.mark.parametrize("mounted", [True, False])
def test_versions_of_photographs(pictures: Bench, *, mounted: bool) -> None:
    if not mounted:
        pictures.reopen()
    found: dict[str, Any] = dict(pictures.engine.report(silent, thumbnails=True))
    assert found["near_duplicate_groups"] == len(found["near_duplicates"]) == 1
    (group,) = found["near_duplicates"]
    paths = [group["authoritative"]["paths"], *(member["paths"] for member in group["members"])]
    assert sorted(paths) == [["inspections/<b>.jpg"], ["inspections/a.jpg"], ["permits/a.jpg"]]
    assert found["conflicting"] == len(found["conflicts"]) >= 1
    assert {"annotated"} == {conflict["relation"] for conflict in found["conflicts"]}
    assert [entry["paths"] for entry in found["undescribable"]] == [["permits/<damaged>.jpg"]]
    text = render(found)
    for encoded in re.findall(r'<img alt="" width="(\d+)" height="(\d+)" src="data:image/png;base64,([^"]+)">', text):
        image = Image.open(io.BytesIO(base64.b64decode(encoded[2])))
        image.load()
        assert (image.format, image.mode, image.size) == ("PNG", "L", (64, 64))
        assert max(int(encoded[0]), int(encoded[1])) == 128
    assert text.count("<img") == 3 + 2 * len(found["conflicts"])
    assert "annotated" in text
    assert "inspections/&lt;b&gt;.jpg" in text
    assert "permits/&lt;damaged&gt;.jpg" in text
    assert "thumbnail" not in str(pictures.engine.report(silent))


@pytest.mark.parametrize(
    "thumbnail",
    [
        None,
        {},
        {"width": 1, "height": 1, "grey": '"><script>'},
        {"width": 0, "height": 1, "grey": base64.b64encode(bytes(4096)).decode()},
        {"width": '1"', "height": 1, "grey": base64.b64encode(bytes(4096)).decode()},
        {"width": 1, "height": 1, "grey": base64.b64encode(bytes(4095)).decode()},
    ],
)
def test_what_is_no_thumbnail_is_left_out(archive: Bench, thumbnail: object) -> None:
    found = report(archive)
    version = {"paths": ["a"], "copies": 1, "thumbnail": thumbnail}
    found["near_duplicates"] = [{"authoritative": version, "members": [], "more": 0}]
    assert "<img" not in render(found)


def test_days(bench: Bench) -> None:
    bench.reopen(start=True)  # which keeps the first one
    bench.wait_for(lambda: len(report(bench)["history"]) == 1)
    assert "There will be a chart" in render(report(bench))
    bench.write("one", DATA)
    bench.write("two", DATA)
    bench.settle()
    bench.reopen()
    (day,) = report(bench)["history"]
    assert day == {
        "day": time.strftime("%Y-%m-%d"),
        "files": 2,
        "logical_bytes": 2 * len(DATA),
        "stored_bytes": len(DATA),
    }
    for number in range(1, 40):
        totals = Totals(files=number, logical_bytes=number * 10**9, stored_bytes=number * 6 * 10**8)
        history.record(bench.engine.backing, totals, day=f"2025-{1 + number // 28:02}-{1 + number % 28:02}")
    history.record(bench.engine.backing, Totals(files=7), day="2999-01-01")  # by a clock that was wrong
    bench.engine.replace_index()  # they do not go with the index
    found = report(bench)
    assert [entry["files"] for entry in found["history"]] == [*range(1, 40), 2, 7]
    text = page.render(found, prices=(0.5,), currency="USD", made_at="2025-03-01 00:00")
    assert "<polyline" in text
    assert "2999" not in text
    assert "<td class=day>2025-02-12<td class=n>39<td class=n>39.0 GB<td class=n>23.4 GB<td class=n>15.6 GB" in text
    assert "7.80 USD" in text


def test_days_are_bounded_and_nonsense_is_passed_over(bench: Bench) -> None:
    path = bench.source / ".dedupfs/history.jsonl"
    days = [datetime.date(2000, 1, 1) + datetime.timedelta(number) for number in range(4000)]
    lines = [json.dumps({"day": str(day), "files": 1, "logical_bytes": 2, "stored_bytes": 1}) for day in days]
    odd = ["", "[]", "{}", '{"day": "<b>", "files": 1, "logical_bytes": 1, "stored_bytes": 1}', "[" * 5000, "\xff"]
    odd += ['{"day": "2001-01-01", "files": true, "logical_bytes": 1, "stored_bytes": 1}']
    odd += ['{"day": "2001-01-02", "files": -1, "logical_bytes": 1, "stored_bytes": 1}']
    path.write_bytes("\n".join([*odd, *lines, '{"day": "2011-']).encode("latin-1"))
    assert len(history.read(bench.engine.backing)) == 4000
    history.record(bench.engine.backing, Totals(files=5), day="2026-01-01")
    found = history.read(bench.engine.backing)
    assert (len(found), found[-1]["files"], found[-2]["day"]) == (3660, 5, str(days[-1]))
    assert path.stat().st_size < 400_000
    path.unlink()


def test_a_day_that_cannot_be_kept_is_no_matter(bench: Bench) -> None:
    class Full(Backing):
        full = False

        def rename(self, old: bytes, new: bytes, flags: int = 0) -> None:
            if self.full and new == history.HISTORY:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().rename(old, new, flags)

    bench.reopen(backing=Full(str(bench.source)))
    Full.full = True
    bench.engine._record_day()
    assert history.read(bench.engine.backing) == []


def test_what_cannot_be_looked_at_is_named(archive: Bench) -> None:
    class Failing(Backing):
        def scandir(self, path: bytes, *more: Any) -> Any:
            if path == b"permits":
                raise OSError(errno.EIO, "Input/output error")
            return super().scandir(path, *more)

    archive.reopen(backing=Failing(str(archive.source)))
    archive.expect_log("cannot list permits")
    found = report(archive)
    assert (found["unreadable"], found["unreadable_paths"]) == (
        1,
        [{"path": "permits", "reason": "Input/output error"}],
    )
    assert "<td class=path>permits<td>Input/output error" in render(found)


def test_many_folders_are_summed_up(bench: Bench) -> None:
    for number in range(20):
        bench.mkdir(f"folder {number}")
        bench.write(f"folder {number}/a", DATA)
    bench.settle()
    text = render(report(bench))
    assert "all other folders" in text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plain é", "plain é"),
        ("\x1b[2J", r"\u001b[2J"),
        ("\u200b", r"\u200b"),
        ("\udcff", r"\xff"),
        ("\U000e0001", r"\ue0001"),
    ],
)
def test_shown(name: str, text: str) -> None:
    assert page.shown(name) == text


def test_directories_that_are_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: Any) -> None:
    """Several stores before anything is mounted: what they have in common."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for directory, names in (("one <b>", "ab"), ("two", "bc"), ("three", "c")):
        (tmp_path / directory).mkdir()
        for name in names:
            (tmp_path / directory / name).write_bytes(content(name))
    places = [str(tmp_path / directory) for directory in ("one <b>", "two", "three")]
    target = tmp_path / "report.html"
    assert main(["report", *places, "--html", str(target), "--json"]) == 0
    found = json.loads(capsysbinary.readouterr().out)
    size_bytes = len(content("a"))
    assert (found["files"], found["duplicate_files"], found["saved_bytes"]) == (5, 2, 2 * size_bytes)
    assert [(pair["folders"], pair["bytes"]) for pair in found["pairs"]] == [
        ([places[0], places[1]], size_bytes),
        ([places[1], places[2]], size_bytes),
    ]
    text = target.read_text()
    assert "sharing would save" in text
    assert "one &lt;b&gt;" in text
    assert "Over time" not in text
    assert main(["report", places[0]]) == 0
    assert b"sharing would save  0 B" in capsysbinary.readouterr().out
    shutil.copytree(places[0], tmp_path / "one <b>" / "again")
    assert main(["report", places[0], "--html", str(target)]) == 0
    assert "No two files are equal" not in target.read_text()
    assert main(["report", *places, str(tmp_path / "absent")]) == 66


def test_the_command(archive: Bench, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    archive.close()
    target = tmp_path / "report.html"
    assert main(["report", str(archive.source), "--html", str(target), "--price-per-gb-month", "1000"]) == 0
    assert target.read_text().startswith("<!DOCTYPE html>")
    assert "saved every month" in target.read_text()
    assert capsysbinary.readouterr().out == b""
    assert main(["report", str(archive.source), "--csv"]) == 0
    assert capsysbinary.readouterr().out.count(b"\r\n") == 7
    assert main(["report", str(archive.source)]) == 0
    assert b"permits: 4 files" in capsysbinary.readouterr().out
    assert main(["report", str(archive.source), "--html", str(tmp_path / "absent/x")]) == 71
    assert os.listdir(tmp_path) == ["report.html"]


def test_damage_is_named(archive: Bench, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """Without reading everything again, as a scrub would."""
    rot(archive.source / ".dedupfs/blobs" / archive.blobs()[0][:2] / archive.blobs()[0])
    archive.expect_log("scrub: ", "was damaged; healed")
    archive.engine.scrub(silent, 0)
    archive.close()
    assert main(["report", str(archive.source)]) == 0
    told = capsysbinary.readouterr().out
    assert b"damaged: its bytes are not what its digest says\n  " in told
    archive.open()
    archive.write("good", DATA)
    archive.write("good, too", OTHER)
    archive.settle()
