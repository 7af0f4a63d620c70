"""A report as one page of HTML: complete in itself, readable on a screen, a telephone and paper, and as lines of CSV.

Of an archive that dedupfs serves, or of directories that were only looked through: what is not in a report has no part
of the page. Pure. File names are whatever somebody called a file: they are shown as text and never as markup, control
and direction characters and bytes that are no text as their codes; and no cell of CSV can be taken for a formula.
"""

import base64
import csv
import datetime
import html
import io
import unicodedata
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .model import THUMBNAIL_SIDE

_MOST_FOLDERS = 12  # in the matrix, and bars; the rest is summed up
_MOST_MONTHS = 24
_MOST_NAMES, _NAMES_BELOW = 6, 3  # of files that have the same bytes, in a table and below a picture
_SHOWN_PIXELS = 128
_OTHERS = "all other folders"
_IN_NONE = "(in no folder)"

_STYLE = """
:root { color-scheme: light; --ink: #1b2430; --faint: #5c6875; --line: #d9dee4; --own: #3f6fb0; --twice: #e08a2c; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff; margin: 0 auto; padding: 1.5rem;
  max-width: 62rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.note, caption, .legend { color: var(--faint); font-size: .9rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .8rem; margin: 1.2rem 0; }
.fact { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem; }
.fact b { display: block; font-size: 1.1rem; overflow-wrap: normal; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .5rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.day { white-space: nowrap; } th { overflow-wrap: normal; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.wide { overflow-x: auto; }
.matrix th.n { white-space: normal; min-width: 5rem; vertical-align: bottom; overflow-wrap: anywhere; }
.path { min-width: 9rem; overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: .82rem; }
.path div { padding-left: 1em; text-indent: -1em; }
.cluster { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem; margin: .6rem 0; display: flex;
  flex-wrap: wrap; gap: .8rem; break-inside: avoid; }
figure { margin: 0; width: 8.8rem; font-size: .82rem; } figure .path { min-width: 0; }
figure b { display: block; } figure img { display: block; border: 1px solid var(--line); }
.cluster > p { width: 100%; margin: 0; }
svg { width: 100%; max-width: 46rem; height: auto; display: block; }
svg text { font: 13px system-ui, sans-serif; fill: var(--ink); }
.bars { display: grid; grid-template-columns: fit-content(35%) 1fr; gap: .4rem .7rem; align-items: center;
  max-width: 46rem; font-size: .9rem; }
.bars .name { overflow-wrap: anywhere; } .bar { display: flex; align-items: center; padding-right: 5.5rem; }
.bar i { height: 1.2rem; flex: none; } .bar span { padding-left: .4rem; white-space: nowrap; }
@media screen and (max-width: 40rem) { body { padding: 1rem; } svg text { font-size: 21px; } }
.dot { display: inline-block; width: .8em; height: .8em; border-radius: 2px; vertical-align: -.05em; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  h2 { break-after: avoid; } tr, .fact { break-inside: avoid; }
  .wide { overflow: visible; } .cluster { gap: .4rem; padding: .4rem; }
  figure { width: 6.6rem; font-size: 7pt; } figure .path { font-size: 6pt; } figure img { zoom: .75; }
  svg, td, .dot, .bar i, img { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


def shown(name: str) -> str:
    """A name as text that steers nothing: neither a terminal, nor the direction of a line, nor an encoder."""
    return "".join(
        character
        if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
        else f"\\x{ord(character) - 0xDC00:02x}"
        if 0xDC80 <= ord(character) <= 0xDCFF
        else f"\\u{ord(character):04x}"
        for character in name
    )


def _e(text: object) -> str:
    return html.escape(shown(str(text)), quote=True)


def size(size_bytes: float) -> str:
    """In units of 1000, as storage is paid for."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(size_bytes) < 1000:
            return f"{size_bytes:,.0f} {unit}" if unit == "bytes" else f"{size_bytes:,.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:,.1f} TB"


def money(size_bytes: float, prices: Sequence[float], currency: str) -> str:
    amounts = [f"{size_bytes / 1e9 * price:,.2f}" for price in prices]
    return " to ".join(amounts) + (f" {currency}" if currency else "")


def render(report: Mapping[str, Any], *, prices: Sequence[float], currency: str, made_at: str) -> str:
    """The page. `report` is what the command answers in JSON, `prices` are per gigabyte (10^9 bytes) and month."""
    saved, duplicate = report["saved_bytes"], report["duplicate_bytes"]
    estimated = report.get("estimated", False)
    facts = [
        ("files", f"{report['files']:,}"),
        ("size of all files", size(report["logical_bytes"])),
        ("would be stored" if estimated else "stored", size(report["stored_bytes"])),
        ("sharing would save" if estimated else "saved by sharing", size(saved)),
        ("every month" if estimated else "saved every month", money(saved, prices, currency)),
        (f"duplicate files ({size(duplicate)})", f"{report['duplicate_files']:,}"),
    ]
    csp = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{csp}">',
        f"<title>Duplicates in {_e(report['source'])}</title><style>{_STYLE}</style></head><body>",
        f"<h1>Duplicates in {_e(report['source'])}</h1>",
        f"<p class=note>{_e(made_at)}. Equal means equal in every byte.</p>",
        "<div class=facts>",
        *(f"<div class=fact>{_e(name)}<b>{_e(value)}</b></div>" for name, value in facts),
        "</div>",
        *(_history(report["history"], prices, currency, made_at) if "history" in report else ()),
        *_folders(report["folders"], prices, currency),
        *_matrix(report["pairs"]),
        *_groups(report["largest"]),
        *(_near_duplicates(report) if "near_duplicates" in report else ()),
        *(_conflicts(report) if "conflicts" in report else ()),
        *_problems(report),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _history(days: Sequence[Mapping[str, Any]], prices: Sequence[float], currency: str, made_at: str) -> Iterable[str]:
    """What there was and what of it was stored, day by day, and at the end of each of the last months."""
    days = [day for day in days if day["day"] <= made_at[:10]]  # a clock that was wrong may have written of later ones
    yield "<h2>Over time</h2>"
    if len(days) < 2:
        yield "<p>A mount keeps a count of each day. There will be a chart when there are two of them.</p>"
        return
    yield from _curves(days)
    yield '<p class=legend><span class=dot style="background:var(--own)"></span> size of all files &nbsp; '
    yield '<span class=dot style="background:var(--twice)"></span> stored; between them, what sharing saves</p>'
    months = list({day["day"][:7]: day for day in days}.values())[-_MOST_MONTHS:]
    yield "<div class=wide><table><tr><th>at the end of<th class=n>files<th class=n>size<th class=n>stored"
    yield "<th class=n>saved<th class=n>that month</tr>"
    for day in reversed(months):
        saved = day["logical_bytes"] - day["stored_bytes"]
        yield (
            f"<tr><td class=day>{_e(day['day'])}<td class=n>{day['files']:,}<td class=n>{size(day['logical_bytes'])}"
            f"<td class=n>{size(day['stored_bytes'])}<td class=n>{size(saved)}"
            f"<td class=n>{_e(money(saved, prices, currency))}</tr>"
        )
    yield "</table></div>"


def _curves(days: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    width, height, left, top = 580, 220, 104, 16  # so that there is room for larger letters on a telephone
    ordinals = [datetime.date.fromisoformat(day["day"]).toordinal() for day in days]
    most = max(1, *(max(day["logical_bytes"], day["stored_bytes"]) for day in days))

    def points(name: str) -> list[str]:
        return [
            f"{left + (width - left) * (at - ordinals[0]) / (ordinals[-1] - ordinals[0]):.1f},"
            f"{height - (height - top) * day[name] / most:.1f}"
            for at, day in zip(ordinals, days, strict=True)
        ]

    everything, stored = points("logical_bytes"), points("stored_bytes")
    yield f'<svg viewBox="0 0 {width + 10} {height + 30}" role="img" aria-label="Size of all files and stored, by day">'
    for share in (0, 0.5, 1):
        y = height - (height - top) * share
        yield f'<line x1="{left}" y1="{y:.1f}" x2="{width}" y2="{y:.1f}" stroke="#d9dee4"/>'
        yield f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{size(most * share)}</text>'
    yield f'<polygon points="{" ".join(everything + stored[::-1])}" fill="#3f6fb0" fill-opacity="0.15"/>'
    for line, colour in ((everything, "#3f6fb0"), (stored, "#e08a2c")):
        yield f'<polyline points="{" ".join(line)}" fill="none" stroke="{colour}" stroke-width="2.5"/>'
    yield f'<text x="{left}" y="{height + 22}">{_e(days[0]["day"])}</text>'
    yield f'<text x="{width}" y="{height + 22}" text-anchor="end">{_e(days[-1]["day"])}</text></svg>'


def _folders(folders: Sequence[Mapping[str, Any]], prices: Sequence[float], currency: str) -> Iterable[str]:
    yield "<h2>By folder</h2>"
    if not folders:
        yield "<p>There are no files.</p>"
        return
    ordered = sorted(folders, key=lambda folder: (-folder["bytes"], folder["name"]))
    yield from _bars(ordered[:_MOST_FOLDERS], max(folder["bytes"] for folder in folders))
    yield '<p class=legend><span class=dot style="background:var(--own)"></span> first of its kind &nbsp; '
    yield '<span class=dot style="background:var(--twice)"></span> also elsewhere, or twice here</p>'
    yield "<div class=wide><table><tr><th>folder<th class=n>files<th class=n>size<th class=n>shared"
    yield "<th class=n>duplicate files<th class=n>of that size<th class=n>worth every month</tr>"
    for folder in ordered:
        name = _IN_NONE if folder["name"] == "." else folder["name"]
        yield (
            f"<tr><td class=path>{_e(name)}<td class=n>{folder['files']:,}<td class=n>{size(folder['bytes'])}"
            f"<td class=n>{folder['references']:,}<td class=n>{folder['duplicate_files']:,}"
            f"<td class=n>{size(folder['duplicate_bytes'])}"
            f"<td class=n>{_e(money(folder['duplicate_bytes'], prices, currency))}</tr>"
        )
    yield "</table></div>"


def _bars(folders: Sequence[Mapping[str, Any]], most: int) -> Iterable[str]:
    """Boxes, not a drawing: their letters stay as large as all others, however narrow the page is."""
    yield '<div class=bars role="img" aria-label="Size by folder">'
    for folder in folders:
        twice = min(folder["duplicate_bytes"], folder["bytes"])
        yield f"<div class=name>{_e(_short(folder['name']))}</div><div class=bar>"
        for size_bytes, colour in ((folder["bytes"] - twice, "own"), (twice, "twice")):
            share = 100 * size_bytes / most if most else 0
            yield f'<i style="width:{share:.1f}%;background:var(--{colour})"></i>'
        yield f"<span>{size(folder['bytes'])}</span></div>"
    yield "</div>"


def _short(name: str) -> str:
    text = _IN_NONE if name == "." else shown(name)
    return text if len(text) <= 22 else text[:21] + "…"


def _matrix(pairs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    yield "<h2>Which folder has what another has</h2>"
    if not pairs:
        yield "<p>No two files are equal.</p>"
        return
    involved: dict[str, int] = {}
    for pair in pairs:
        for name in pair["folders"]:
            involved[name] = involved.get(name, 0) + pair["bytes"]
    names = sorted(involved, key=lambda name: (-involved[name], name))
    kept = names[:_MOST_FOLDERS]
    labels = [*kept, *([_OTHERS] if len(names) > len(kept) else [])]
    sums: dict[tuple[int, int], int] = {}
    for pair in pairs:
        one, other = sorted(kept.index(name) if name in kept else len(kept) for name in pair["folders"])
        sums[one, other] = sums.get((one, other), 0) + pair["bytes"]
    most = max(sums.values())
    yield "<p class=note>Size of what is in both; on the diagonal, of further copies in the same folder.</p>"
    yield '<div class="wide matrix"><table>'
    yield "<tr><th>" + "".join(f"<th class=n>{_e(_short(name))}" for name in labels) + "</tr>"
    for row, name in enumerate(labels):
        cells = []
        for column in range(len(labels)):
            size_bytes = sums.get((min(row, column), max(row, column)), 0)
            shade = 0.08 + 0.72 * size_bytes / most if size_bytes else 0
            style = f' style="background:rgba(224,138,44,{shade:.2f})"' if size_bytes else ""
            cells.append(f"<td class=n{style}>{size(size_bytes) if size_bytes else ''}")
        yield f"<tr><th class=path>{_e(_short(name))}{''.join(cells)}</tr>"
    yield "</table></div>"


def _groups(groups: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    yield "<h2>Largest groups of equal files</h2>"
    if not groups:
        yield "<p>There are none.</p>"
        return
    yield "<div class=wide><table>"
    yield "<tr><th class=n>copies<th class=n>size of each<th class=n>further copies<th>files</tr>"
    for group in groups:
        yield (
            f"<tr><td class=n>{group['copies']:,}<td class=n>{size(group['size_bytes'])}"
            f"<td class=n>{size(group['wasted_bytes'])}<td class=path>{_copies(group, _MOST_NAMES)}</tr>"
        )
    yield "</table></div>"


def _near_duplicates(report: Mapping[str, Any]) -> Iterable[str]:
    yield "<h2>The same photograph in several versions</h2>"
    count, groups = report["near_duplicate_groups"], report["near_duplicates"]
    if not groups:
        yield "<p>None are known.</p>"
        return
    follow = f"; {len(groups):,} of them follow" if count > len(groups) else ""
    yield f"<p class=note>{count:,} groups of pictures that show the same, and are not equal in every byte{follow}."
    yield "They are reported, never merged. The first one of each is held authoritative.</p>"
    for group in groups:
        yield "<div class=cluster>"
        yield from _picture("authoritative", group["authoritative"])
        for member in group["members"]:
            yield from _picture(member["relation"], member)
        yield f"<p>… and {group['more']:,} more</p></div>" if group["more"] else "</div>"


def _conflicts(report: Mapping[str, Any]) -> Iterable[str]:
    yield "<h2>Versions that contradict each other</h2>"
    count, conflicts = report["conflicting"], report["conflicts"]
    if not conflicts:
        yield "<p>None are known.</p>"
        return
    follow = f"; {len(conflicts):,} of them follow" if count > len(conflicts) else ""
    yield f"<p class=note>{count:,} pairs claim to be one photograph, and differ visibly{follow}.</p>"
    for conflict in conflicts:
        yield f"<div class=cluster><p>both {_e(conflict['claim'])}: {_e(conflict['relation'])}</p>"
        for version in conflict["versions"]:
            yield from _picture("", version)
        yield "</div>"


def _picture(title: str, version: Mapping[str, Any]) -> Iterable[str]:
    yield f"<figure>{_image(version.get('thumbnail'))}<b>{_e(title)}</b>"
    yield f"<div class=path>{_copies(version, _NAMES_BELOW)}</div></figure>"


def _image(thumbnail: Mapping[str, Any] | None) -> str:
    """A grey square of the index in the shape that the picture has."""
    try:
        grey = base64.b64decode(thumbnail["grey"], validate=True) if thumbnail else b""
        width, height = (int(thumbnail[side]) for side in ("width", "height")) if thumbnail else (0, 0)
    except (ValueError, KeyError, TypeError):
        return ""
    if len(grey) != THUMBNAIL_SIDE**2 or width < 1 or height < 1:
        return ""
    scale = _SHOWN_PIXELS / max(width, height)
    shape = f'width="{max(round(width * scale), 1)}" height="{max(round(height * scale), 1)}"'
    return f'<img alt="" {shape} src="data:image/png;base64,{base64.b64encode(_png(grey)).decode()}">'


def _png(grey: bytes) -> bytes:
    """A square of `THUMBNAIL_SIDE` grey levels as PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    side = THUMBNAIL_SIDE
    rows = b"".join(b"\0" + grey[at : at + side] for at in range(0, side * side, side))
    header = side.to_bytes(4, "big") * 2 + bytes((8, 0, 0, 0, 0))  # eight bits, grey
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def _problems(report: Mapping[str, Any]) -> Iterable[str]:
    if report["damaged"]:
        yield "<h2>Damaged files</h2><table>"
        for damage in report["damaged"]:
            yield f"<tr><td class=path>{_listed(damage['paths'])}<td>{_e(damage['problem'])}</tr>"
        yield "</table>"
    if report.get("across_domains"):
        yield "<h2>Shared across domains</h2>"
        yield f"<p class=note>{report['shared_across_domains']:,} contents, since before there were domains, or since "
        yield "files were moved.</p><table>"
        for paths in report["across_domains"]:
            yield f"<tr><td class=path>{_listed(paths)}</tr>"
        yield "</table>"
    yield "<h2>Files that could not be read</h2>"
    if not report["unknown"] and not report["unreadable"] and not report.get("undescribable"):
        yield "<p>None: everything could be read.</p>"
        return
    if report["unknown"]:
        yield f"<p>{report['unknown']:,} files are not known: they could not be read, or wait to be.</p>"
        yield f"<div class=path>{_listed(report['unknown_paths'])}</div>"
    if report["unreadable"]:
        yield f"<p>{report['unreadable']:,} directories or files could not be looked at.</p><table>"
        for entry in report["unreadable_paths"]:
            yield f"<tr><td class=path>{_e(entry['path'])}<td>{_e(entry['reason'])}</tr>"
        yield "</table>"
    if report.get("undescribable"):
        yield "<p>Pictures that could not be looked at as pictures, damaged ones among them:</p><table>"
        for entry in report["undescribable"]:
            yield f"<tr><td class=path>{_listed(entry['paths'])}<td>{_e(entry['reason'])}</tr>"
        yield "</table>"


def _listed(paths: Iterable[str]) -> str:
    return "".join(f"<div>{_e(path)}</div>" for path in paths)


def _copies(group: Mapping[str, Any], most: int) -> str:
    """Some of the files that have the same bytes, and how many more there are."""
    paths = group["paths"][:most]
    more = group["copies"] - len(paths)
    return _listed(paths) + (f"<div>… and {more:,} more</div>" if more > 0 else "")


def lines(report: Mapping[str, Any]) -> str:
    """The largest groups as CSV, a line for each file."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(("digest", "size_bytes", "copies", "folder", "path"))
    for group in report["largest"]:
        for path in group["paths"]:
            folder = path.partition("/")[0] if "/" in path else "."
            writer.writerow((group["digest"], group["size_bytes"], group["copies"], _cell(folder), _cell(path)))
    return out.getvalue()


def group_lines(groups: Sequence[Mapping[str, Any]]) -> str:
    """Groups of pictures as CSV, a line for each file; those of the authoritative version come first in each group."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(("group", "relation", "distance", "path"))
    for number, group in enumerate(groups, 1):
        for path in group["authoritative"]:
            writer.writerow((number, "authoritative", 0, _cell(path)))
        for member in group["members"]:
            for path in member["paths"]:
                writer.writerow((number, member["relation"], member["distance"], _cell(path)))
    return out.getvalue()


def _cell(name: str) -> str:
    """A spreadsheet takes what begins like this for a formula; some take the wide forms of these for the same."""
    text = shown(name)
    return "'" + text if text[:1] in tuple("=+-@'＝＋－＠") else text
