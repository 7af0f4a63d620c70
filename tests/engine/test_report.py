"""A report counts right, and its page shows the names of files without obeying them."""

import csv
import html.parser
import io
import os
import re
from pathlib import Path
from typing import Any

import pytest

from dedupfs import page
from dedupfs.cli import main

from .bench import BLOCK, Bench, content, silent
from .test_damage import DATA

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
    assert not re.search(r"(?:src|href)\s*=|url\(|@import|https?://", text)
    assert "<svg" in text
    assert "@media print" in text
    assert "permits" in text


def test_a_page_of_nothing(bench: Bench) -> None:
    text = render(report(bench))
    assert "There are no files." in text
    assert "None: everything could be read." in text


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
