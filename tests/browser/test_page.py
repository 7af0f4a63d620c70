"""The report's page in a real browser: it is drawn as it is meant, on a desktop, a telephone and paper; it asks for
nothing, and obeys no file name."""

import base64
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dedupfs import page
from dedupfs.model import THUMBNAIL_SIDE
from tests.support.browser import Browser

# Each would set `hacked`, ask for something, or end what it stands in.
HOSTILE = [
    "<script>hacked = 1</script>",
    "<img src=x onerror='hacked = 1'>",
    '"><svg onload="hacked = 1">',
    "</style><style>* { display: none }</style>",
    "</title><script>hacked = 1</script>",
    "<iframe srcdoc='<script>parent.hacked = 1</script>'>",
    "<link rel=stylesheet href=http://example.invalid/x.css>",
    "javascript:hacked = 1",
    "\u202egpj.exe",
    "caf\udce9",
    "two\nlines",
    "unbroken" * 30,
]


def version(name: str) -> dict[str, Any]:
    grey = base64.b64encode(random.Random(name.encode(errors="replace")).randbytes(THUMBNAIL_SIDE**2)).decode()
    thumbnail = {"width": 4000, "height": 3000, "grey": grey}
    return {"paths": [f"folder/{name}/{name}.jpg"] * 5, "copies": 20, "thumbnail": thumbnail}


def report() -> dict[str, Any]:
    """Everything that a page can hold, named as badly as can be."""
    folders = [
        {"name": name, "files": 10**6 + number, "bytes": 10**12 // (number + 1), "references": 5}
        | {"duplicate_files": 10**5, "duplicate_bytes": 10**11}
        for number, name in enumerate(HOSTILE)
    ]
    pairs = [{"folders": [one, other], "bytes": 10**9} for one in HOSTILE for other in HOSTILE if one <= other]
    return {
        "source": "/srv/" + HOSTILE[0],
        "files": 12_345_678,
        "logical_bytes": 98_765_432_100_000,
        "stored_bytes": 45_678_901_200_000,
        "saved_bytes": 53_086_530_900_000,
        "duplicate_files": 6_543_210,
        "duplicate_bytes": 53_086_530_900_000,
        "history": [
            {"day": f"2025-{month:02}-15", "files": month, "logical_bytes": month * 10**12, "stored_bytes": 10**12}
            for month in range(1, 13)
        ],
        "folders": folders,
        "pairs": pairs,
        "largest": [
            {"digest": "00" * 16, "size_bytes": 10**9, "copies": 40, "wasted_bytes": 39 * 10**9}
            | {"paths": [f"{name}/{name}"] * 20}
            for name in HOSTILE
        ],
        "near_duplicate_groups": 1000,
        "near_duplicates": [
            {"authoritative": version(name), "more": 7}
            | {"members": [{"relation": "recompressed", **version(name)} for _ in range(11)]}
            for name in HOSTILE
        ],
        "conflicting": 100,
        "conflicts": [
            {"claim": f"called {name}", "relation": "annotated", "versions": [version(name), version(name)]}
            for name in HOSTILE
        ],
        "damaged": [{"paths": HOSTILE, "problem": "its bytes are not what its digest says"}],
        "shared_across_domains": 1,
        "across_domains": [HOSTILE],
        "unknown": len(HOSTILE),
        "unknown_paths": HOSTILE,
        "unreadable": 1,
        "unreadable_paths": [{"path": name, "reason": "Input/output error"} for name in HOSTILE],
        "undescribable": [{"paths": HOSTILE, "reason": "damaged: " + name} for name in HOSTILE],
    }


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def written(tmp_path: Path) -> Path:
    text = page.render(report(), prices=(0.08, 0.23), currency="USD", made_at="2026-01-02 03:04")
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(browser: Browser, written: Path, width: int) -> None:
    browser.open(written, width=width, is_phone=width < 600)
    evaluate = browser.evaluate

    # nothing ran, and nothing was asked for
    assert evaluate("typeof hacked") == "undefined"
    asked = [told["request"]["url"] for told in browser.happened("Network.requestWillBeSent")]
    assert [url for url in asked if not url.startswith("data:")] == [written.as_uri()]
    assert browser.happened("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded") == []
    made = evaluate("[...new Set([...document.body.querySelectorAll('*')].map(one => one.localName))].sort()")
    assert set(made).isdisjoint({"script", "iframe", "link", "style", "a", "form", "object"})
    text = evaluate("document.body.innerText")
    assert "<script>hacked = 1</script>" in text
    assert evaluate("document.title") == "Duplicates in /srv/<script>hacked = 1</script>"

    # nothing hangs out of the page
    assert evaluate("innerWidth") == width
    assert evaluate("document.documentElement.scrollWidth") <= width
    # … nor is cut off within it, but for tables, which can be moved
    outside = "[...document.querySelectorAll('h1, h2, p, figure, img, svg, .fact, .bars *')].filter(one => "
    outside += "one.getBoundingClientRect().right > innerWidth + 0.5).map(one => one.outerHTML.slice(0, 99))"
    assert evaluate(outside) == []

    # charts have been drawn, letters in them can be read
    drawn = "document.querySelector('svg polygon').getBoundingClientRect()"
    assert evaluate(f"{drawn}.width") > 200
    assert evaluate(f"{drawn}.height") > 80
    letters = "[...document.querySelectorAll('svg text')].map(one => one.getBoundingClientRect())"
    assert evaluate(f"{letters}.every(box => box.height > 10 && box.left >= 0)")
    bars = "[...document.querySelectorAll('.bar i')].map(one => one.getBoundingClientRect())"
    assert evaluate(f"Math.max(...{bars}.map(box => box.width))") > width / 6
    assert evaluate(f"{bars}.every(box => box.height > 10)")
    images = "[...document.images]"
    assert evaluate(f"{images}.length") == 14 * len(HOSTILE)
    assert evaluate(f"{images}.every(one => one.complete && one.naturalWidth == {THUMBNAIL_SIDE} && one.width > 50)")


def test_the_page_on_paper(browser: Browser, written: Path) -> None:
    browser.open(written, width=1280)
    pdf = base64.b64decode(browser.ask("Page.printToPDF", printBackground=False)["data"])
    assert pdf.startswith(b"%PDF-")
    browser.ask("Emulation.setEmulatedMedia", media="print")
    try:
        browser.ask("Emulation.setDeviceMetricsOverride", width=720, height=900, deviceScaleFactor=1, mobile=False)
        colours = "[...document.querySelectorAll('.bar i')].map(one => getComputedStyle(one).printColorAdjust)"
        assert set(browser.evaluate(colours)) == {"exact"}
    finally:
        browser.ask("Emulation.setEmulatedMedia", media="")
