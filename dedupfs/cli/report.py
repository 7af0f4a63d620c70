"""dedupfs report SOURCE|MOUNT, or DIR..."""

import argparse
import os
import sys
import tempfile
import time
from contextlib import suppress
from typing import Any

from .. import control, estimate, page
from ..config import cache_directory
from ..engine import Engine
from ..estimate import PRICES_USD
from ..model import STORE_DIRECTORY, Progress
from .estimate import add_exact, price_of
from .output import add_json, print_facts, print_json, printable, progress_shown, size_text
from .targets import ask_or_open, require_store

# What an estimate tells of pictures.
_NEAR = (
    *("near_duplicates_reason", "near_duplicate_groups", "near_duplicate_pictures", "near_duplicate_bytes"),
    *("near_duplicate_relations", "near_duplicates", "undescribable"),
)


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "report",
        help="what is duplicate where, as a page for an office",
        description="Tell what an archive holds and what sharing saves: by top-level folder, by pairs of folders that "
        "have the same files, the largest groups, the versions of one photograph, and how it was day by day. Of "
        "directories that dedupfs does not serve it tells what sharing would save, as estimate does. --html writes one "
        "page that needs nothing else, for a browser or paper.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "targets", metavar="SOURCE|MOUNT|DIR", nargs="+", help="one that dedupfs serves, or directories"
    )
    parser.add_argument("--html", metavar="FILE", help="write the page there, replacing what is there")
    parser.add_argument("--csv", action="store_true", help="print the largest groups as CSV, a line for each file")
    parser.add_argument(
        "--price-per-gb-month",
        metavar="P",
        type=price_of,
        help="what a gigabyte (10^9 bytes) of storage costs per month; by default 0.08 to 0.23 USD",
    )
    add_exact(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    answer = _ask(arguments)
    price = arguments.price_per_gb_month
    prices, currency = (PRICES_USD, "USD") if price is None else ((price,), "")
    if arguments.html is not None:
        made_at = time.strftime("%Y-%m-%d %H:%M")
        _write(arguments.html, page.render(answer, prices=prices, currency=currency, made_at=made_at))
    if arguments.json:
        print_json(answer)
    elif arguments.csv:
        sys.stdout.write(page.lines(answer))
    elif arguments.html is None:
        _show(answer, page.money(answer["saved_bytes"], prices, currency))
    return 0


def _ask(arguments: argparse.Namespace) -> dict[str, Any]:
    target = arguments.targets[0]
    is_served = control.find_mount(target) is not None
    if len(arguments.targets) > 1 or not (
        is_served or os.path.lexists(os.path.join(target, os.fsdecode(STORE_DIRECTORY)))
    ):
        return _estimated(arguments)
    if not is_served:
        require_store(target)
    thumbnails = arguments.html is not None

    def offline(engine: Engine, progress: Progress) -> object:
        return engine.report(progress, thumbnails=thumbnails)

    answer: dict[str, Any] = ask_or_open(target, "report", {"thumbnails": thumbnails}, offline)
    return dict(answer)


def _estimated(arguments: argparse.Namespace) -> dict[str, Any]:
    """What of a report can be said of directories that were only looked through."""
    cache = os.path.join(cache_directory(), "estimate.sqlite3")
    with progress_shown() as progress:
        found = estimate.estimate(arguments.targets, cache=cache, progress=progress, exact=arguments.exact)
    told: dict[str, Any] = found.as_json((), thumbnails=arguments.html is not None)
    duplicate = found.total.duplicate_bytes
    return {
        "estimated": True,
        "source": ", ".join(each["path"] for each in told["directories"]),
        "files": found.total.files,
        "logical_bytes": found.total.bytes,
        "stored_bytes": found.total.bytes - duplicate,
        "saved_bytes": duplicate,
        "duplicate_files": found.total.duplicate_files,
        "duplicate_bytes": duplicate,
        "folders": [{**each, "name": each["path"], "references": 0} for each in told["directories"]],
        "pairs": [
            *(
                {"folders": [each["path"]] * 2, "bytes": each["duplicate_bytes"]}
                for each in told["directories"]
                if each["duplicate_bytes"]
            ),
            *({"folders": each["directories"], "bytes": each["bytes"]} for each in told["pairs"]),
        ],
        "largest": [{**each, "copies": len(each["paths"])} for each in told["largest"]],
        "unknown": 0,
        "unknown_paths": [],
        "unreadable": told["unreadable"],
        "unreadable_paths": told["unreadable_paths"],
        "damaged": [],
        "shared_across_domains": 0,
        **{key: told[key] for key in _NEAR if key in told},
    }


def _write(path: str, text: str) -> None:
    """Whole, or not at all."""
    descriptor, draft = tempfile.mkstemp(prefix=".report-", dir=os.path.dirname(os.path.abspath(path)))
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(draft)
        raise


def _show(answer: dict[str, Any], saved: str) -> None:
    print_facts(
        [
            ("files", f"{answer['files']:,}, {size_text(answer['logical_bytes'])}"),
            ("duplicate", f"{answer['duplicate_files']:,}, {size_text(answer['duplicate_bytes'])}"),
            (
                "sharing would save" if answer.get("estimated") else "saved",
                f"{size_text(answer['saved_bytes'])}, {saved} a month",
            ),
            ("not known", f"{answer['unknown'] + answer['unreadable']:,}"),
        ]
    )
    if across := answer["shared_across_domains"]:
        verb = "content is" if across == 1 else "contents are"
        print(
            f"{across:,} {verb} shared across domains, since before they were or since files were moved (--json names)"
        )
    for damage in answer["damaged"]:
        print(f"damaged: {printable(damage['problem'])}")
        for path in damage["paths"]:
            print(f"  {printable(path)}")
    for folder in sorted(answer["folders"], key=lambda folder: -int(folder["bytes"])):
        name, duplicate = printable(folder["name"]), size_text(folder["duplicate_bytes"])
        print(f"{name}: {folder['files']:,} files, {size_text(folder['bytes'])}; duplicate {duplicate}")
