"""A report as one page of HTML: complete in itself, readable on a screen, a telephone and paper, and as lines of CSV.

Pure. File names are whatever somebody called a file: they are shown as text and never as markup, control and direction
characters and bytes that are no text as their codes; and no cell of CSV can be taken for a formula.
"""

import csv
import html
import io
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_MOST_FOLDERS = 12  # in the matrix, and bars; the rest is summed up
_OTHERS = "all other folders"
_IN_NONE = "(in no folder)"

_STYLE = """
:root { color-scheme: light; --ink: #1b2430; --faint: #5c6875; --line: #d9dee4; --own: #3f6fb0; --twice: #e08a2c; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff; margin: 0 auto; padding: 1.5rem;
  max-width: 62rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.note, caption, .legend { color: var(--faint); font-size: .9rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1.2rem 0; }
.fact { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem; }
.fact b { display: block; font-size: 1.2rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .5rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.wide { overflow-x: auto; }
.matrix th.n { white-space: normal; min-width: 5rem; vertical-align: bottom; overflow-wrap: anywhere; }
.path { min-width: 9rem; overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: .82rem; }
svg { width: 100%; max-width: 46rem; height: auto; display: block; }
svg text { font: 13px system-ui, sans-serif; fill: var(--ink); }
.dot { display: inline-block; width: .8em; height: .8em; border-radius: 2px; vertical-align: -.05em; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  h2 { break-after: avoid; } tr, .fact { break-inside: avoid; }
  .wide { overflow: visible; }
  svg, td, .dot { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
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
    facts = [
        ("files", f"{report['files']:,}"),
        ("size of all files", size(report["logical_bytes"])),
        ("stored", size(report["stored_bytes"])),
        ("saved by sharing", size(saved)),
        ("saved every month", money(saved, prices, currency)),
        ("duplicate files", f"{report['duplicate_files']:,}"),
        ("size of duplicates", size(duplicate)),
    ]
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>Duplicates in {_e(report['source'])}</title><style>{_STYLE}</style></head><body>",
        f"<h1>Duplicates in {_e(report['source'])}</h1>",
        f"<p class=note>{_e(made_at)}. Equal means equal in every byte.</p>",
        "<div class=facts>",
        *(f"<div class=fact>{_e(name)}<b>{_e(value)}</b></div>" for name, value in facts),
        "</div>",
        *_folders(report["folders"]),
        *_matrix(report["pairs"]),
        *_groups(report["largest"]),
        *_problems(report),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _folders(folders: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    yield "<h2>By folder</h2>"
    if not folders:
        yield "<p>There are no files.</p>"
        return
    ordered = sorted(folders, key=lambda folder: (-folder["bytes"], folder["name"]))
    yield from _bars(ordered[:_MOST_FOLDERS], max(folder["bytes"] for folder in folders))
    yield '<p class=legend><span class=dot style="background:var(--own)"></span> first of its kind &nbsp; '
    yield '<span class=dot style="background:var(--twice)"></span> also elsewhere, or twice here</p>'
    yield "<div class=wide><table><tr><th>folder<th class=n>files<th class=n>size<th class=n>shared"
    yield "<th class=n>duplicate files<th class=n>of that size</tr>"
    for folder in ordered:
        name = _IN_NONE if folder["name"] == "." else folder["name"]
        yield (
            f"<tr><td class=path>{_e(name)}<td class=n>{folder['files']:,}<td class=n>{size(folder['bytes'])}"
            f"<td class=n>{folder['references']:,}<td class=n>{folder['duplicate_files']:,}"
            f"<td class=n>{size(folder['duplicate_bytes'])}</tr>"
        )
    yield "</table></div>"


def _bars(folders: Sequence[Mapping[str, Any]], most: int) -> Iterable[str]:
    height, left, width = 28, 170, 500
    yield f'<svg viewBox="0 0 {width + 80} {height * len(folders)}" role="img" aria-label="Size by folder">'
    for number, folder in enumerate(folders):
        scale = (width - left) / most if most else 0
        twice = min(folder["duplicate_bytes"], folder["bytes"]) * scale
        whole = folder["bytes"] * scale
        top = number * height
        yield f'<text x="{left - 8}" y="{top + 18}" text-anchor="end">{_e(_short(folder["name"]))}</text>'
        yield f'<rect x="{left}" y="{top + 5}" width="{whole - twice:.1f}" height="18" fill="#3f6fb0"/>'
        yield f'<rect x="{left + whole - twice:.1f}" y="{top + 5}" width="{twice:.1f}" height="18" fill="#e08a2c"/>'
        yield f'<text x="{left + whole + 6:.1f}" y="{top + 18}">{size(folder["bytes"])}</text>'
    yield "</svg>"


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
        paths = "<br>".join(_e(path) for path in group["paths"])
        more = group["copies"] - len(group["paths"])
        further = f"<br>… and {more:,} more" if more > 0 else ""
        yield (
            f"<tr><td class=n>{group['copies']:,}<td class=n>{size(group['size_bytes'])}"
            f"<td class=n>{size(group['wasted_bytes'])}<td class=path>{paths}{further}</tr>"
        )
    yield "</table></div>"


def _problems(report: Mapping[str, Any]) -> Iterable[str]:
    if report["damaged"]:
        yield "<h2>Damaged files</h2><table>"
        for damage in report["damaged"]:
            paths = "<br>".join(_e(path) for path in damage["paths"])
            yield f"<tr><td class=path>{paths}<td>{_e(damage['problem'])}</tr>"
        yield "</table>"
    yield "<h2>Files that are not counted</h2>"
    if not report["unknown"] and not report["unreadable"]:
        yield "<p>None: everything could be read.</p>"
        return
    yield f"<p>{report['unknown']:,} files are not known: they could not be read, or wait to be. "
    yield f"{report['unreadable']:,} directories or files could not be looked at.</p><p class=path>"
    yield "<br>".join(_e(path) for path in report["unknown_paths"]) + "</p>"


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
