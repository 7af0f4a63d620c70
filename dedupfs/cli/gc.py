"""dedupfs gc SOURCE"""

import argparse
import math

from .. import gc
from .output import add_json, print_facts, print_json, printable, progress_shown, size_text
from .targets import require_unmounted_store

EXIT_IN_THE_WAY = 2
_KEEP_DAYS = 14.0


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "gc",
        help="remove blobs that nothing refers to",
        description="Move blobs that no reference names to the trash, delete what was there long enough, and clear "
        "what a crash left. When a single file cannot be looked at, nothing is removed (exit code 2).",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="a source that is not mounted")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.add_argument(
        "--keep",
        metavar="DAYS",
        type=_days,
        default=_KEEP_DAYS,
        help="how long a blob stays in the trash (default: 14); 0: delete what the last run moved there",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = math.nan
    if not (math.isfinite(days) and days >= 0):
        raise argparse.ArgumentTypeError(f"{text} is not a number of days")
    return days


def run(arguments: argparse.Namespace) -> int:
    require_unmounted_store(arguments.source)
    with progress_shown() as progress:
        plan = gc.gc(arguments.source, keep_days=arguments.keep, dry_run=arguments.dry_run, progress=progress)
    answer = plan.as_json()
    code = EXIT_IN_THE_WAY if plan.problems else 0
    if arguments.json:
        print_json(answer)
        return code
    for problem in plan.problems:
        print(f"in the way: {printable(problem['path'])}: {printable(problem['reason'])}")
    if arguments.dry_run:
        heading = "would be "
    else:
        heading = "not " if plan.problems else ""
    print_facts(
        [
            (f"{heading}moved to the trash", _count(len(plan.unreferenced), sum(plan.unreferenced.values()))),
            (f"{heading}taken back from it", f"{len(plan.wanted_back):,}"),
            (f"{heading}deleted", _count(len(plan.expired), sum(each.size_bytes for each in plan.expired))),
            ("stay in the trash", _count(len(plan.waiting), sum(each.size_bytes for each in plan.waiting))),
            ("leftovers of crashes", f"{len(plan.leftovers):,}"),
        ]
    )
    return code


def _count(blobs: int, size_bytes: int) -> str:
    return f"{blobs:,} blobs, {size_text(size_bytes)}" if blobs else "0"
