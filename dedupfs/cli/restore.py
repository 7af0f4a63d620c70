"""dedupfs restore SOURCE|MOUNT [PATH...]"""

import argparse
import os
from typing import Any

from .. import control
from ..engine import Engine
from ..errors import EXIT_OK
from ..model import Progress
from .output import add_json, facts_of, print_facts, print_json, printable, size_text
from .targets import ask_or_open, path_within, require_store

EXIT_SOME_FAILED = 1


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "restore",
        help="turn references back into plain files",
        description="Give every reference its own bytes again, so that the directory needs no dedupfs: all of them, or "
        "those at and below each PATH. Needs the space that sharing saved, and does nothing when that is surely not "
        "there. Exits 1 when a file could not be restored.",
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="SOURCE|MOUNT")
    parser.add_argument("paths", metavar="PATH", nargs="*", help="relative to SOURCE|MOUNT, or absolute")
    parser.add_argument("--dry-run", action="store_true", help="only say how many files, and how much room it takes")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if control.find_mount(arguments.target) is None:
        require_store(arguments.target)
    paths = [path_within(arguments.target, path) for path in arguments.paths]

    def offline(engine: Engine, progress: Progress) -> object:
        return engine.restore([os.fsencode(path) for path in paths], progress, dry_run=arguments.dry_run)

    request = {"paths": paths, **({"dry_run": True} if arguments.dry_run else {})}
    answer = ask_or_open(arguments.target, "restore", request, offline)
    if arguments.json:
        print_json(answer)
    else:
        if arguments.dry_run:
            show_plan(answer)
        else:
            print_facts(facts_of(answer))
        for failure in answer["failed"]:
            print(f"not restored: {printable(failure['path'])}: {printable(failure['reason'])}")
    return EXIT_SOME_FAILED if answer["failed"] else EXIT_OK


def show_plan(plan: dict[str, Any]) -> None:
    """What restoring would take."""
    enough = "" if plan["fits"] else ": not enough"
    print_facts(
        [
            ("to restore", f"{plan['files']:,} files, {size_text(plan['bytes'])}"),
            ("room needed", size_text(plan["needed_bytes"])),
            ("room free", size_text(plan["available_bytes"]) + enough),
        ]
    )
