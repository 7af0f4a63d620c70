"""dedupfs estimate DIR..."""

import argparse
import math
import os

from .. import estimate
from ..config import cache_directory
from .output import add_json, print_facts, print_json, printable, progress_shown, size_text


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "estimate",
        help="what sharing would save, before anything is mounted",
        description="Read directories, change nothing, and tell how much of them is duplicate: within each, and across "
        "them. Of files of 4096 bytes and more those are read whose size another has. Then every picture is looked at, "
        "by processes that can do nothing else, to find those that are alike: smaller, compressed anew and the like. "
        "That takes far longer, an hour or more for each 100,000 different pictures; --exact leaves it out. Run again "
        "after an interruption, it goes on where it was (what was seen is kept in ~/.cache/dedupfs, some 7 KB a "
        "picture).",
        allow_abbrev=False,
    )
    parser.add_argument("directories", metavar="DIR", nargs="+", help="directories that do not overlap")
    parser.add_argument(
        "--price-per-gb-month",
        metavar="P",
        type=price_of,
        help="what a gigabyte (10^9 bytes) of storage costs per month; by default 0.08 to 0.23 USD",
    )
    add_exact(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def add_exact(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--exact", action="store_true", help="do not look for pictures that are alike, only for equal files"
    )


def price_of(text: str) -> float:
    """An argument that is a price. Raises ArgumentTypeError."""
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not (math.isfinite(price) and price >= 0):
        raise argparse.ArgumentTypeError(f"{text} is not a price")
    return price


def run(arguments: argparse.Namespace) -> int:
    price = arguments.price_per_gb_month
    prices = estimate.PRICES_USD if price is None else (price,)
    cache = os.path.join(cache_directory(), "estimate.sqlite3")
    with progress_shown() as progress:
        found = estimate.estimate(arguments.directories, cache=cache, progress=progress, exact=arguments.exact)
    if arguments.json:
        print_json(found.as_json(prices))
        return 0
    for path, sums in found.directories:
        print(f"{printable(os.fsdecode(path))}: {_sums(sums)}")
    if len(found.directories) > 1:
        print(f"duplicate across them: {size_text(found.across_bytes)}")
        print(f"all: {_sums(found.total)}")
    print()
    currency = " USD" if price is None else ""
    print_facts(
        [
            ("cost per month", _range(found.total.bytes, prices) + currency),
            ("of that for duplicates", _range(found.total.duplicate_bytes, prices) + currency),
            ("could not be read", f"{len(found.unreadable):,}"),
            *_near(found),
        ]
    )
    if found.largest:
        print("\nlargest groups of equal files:")
    for group in found.largest:
        print(f"{len(group.paths)} x {size_text(group.size_bytes)}")
        for path in group.paths:
            print(f"  {printable(os.fsdecode(path))}")
    return 0


def _near(found: estimate.Estimate) -> list[tuple[str, str]]:
    alike = found.lookalikes
    if alike is None:
        return [("near-duplicates", f"not looked for: {found.lookalikes_reason}")]
    groups = f"{alike.groups:,} {'group' if alike.groups == 1 else 'groups'}"
    relations = ", ".join(f"{count:,} {relation}" for relation, count in alike.relations.most_common())
    return [
        ("pictures", f"{alike.pictures:,} different ones, and {len(alike.undescribable):,} that cannot be decoded"),
        (
            "near-duplicates",
            f"{alike.near:,} of them, {size_text(alike.near_bytes)}, in {groups}"
            + (f": {relations}" if relations else ""),
        ),
    ]


def _sums(sums: estimate.Sums) -> str:
    share = f" ({100 * sums.duplicate_bytes / sums.bytes:.0f} %)" if sums.bytes else ""
    return (
        f"{sums.files:,} files, {size_text(sums.bytes)}; duplicate {sums.duplicate_files:,} files, "
        f"{size_text(sums.duplicate_bytes)}{share}"
    )


def _range(size_bytes: int, prices: tuple[float, ...]) -> str:
    return " to ".join(f"{estimate.cost(size_bytes, price):,.2f}" for price in prices)
