"""dedupfs restore SOURCE|MOUNT [PATH...]"""

import argparse
import os

from .. import control
from ..engine import Engine
from ..errors import EXIT_OK
from ..model import Progress
from .output import add_json, facts_of, print_facts, print_json, printable
from .targets import ask_or_open, path_within, require_store

EXIT_SOME_FAILED = 1


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "restore",
        help="turn references back into plain files",
        description="Give every reference its own bytes again, so that the directory needs no dedupfs: all of them, or "
        "those at and below each PATH. Needs the space that sharing saved. Exits 1 when a file could not be restored.",
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="SOURCE|MOUNT")
    parser.add_argument("paths", metavar="PATH", nargs="*", help="relative to SOURCE|MOUNT, or absolute")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if control.find_mount(arguments.target) is None:
        require_store(arguments.target)
    paths = [path_within(arguments.target, path) for path in arguments.paths]

    def offline(engine: Engine, progress: Progress) -> object:
        return engine.restore([os.fsencode(path) for path in paths], progress)

    answer = ask_or_open(arguments.target, "restore", {"paths": paths}, offline)
    if arguments.json:
        print_json(answer)
    else:
        print_facts(facts_of(answer))
        for failure in answer["failed"]:
            print(f"not restored: {printable(failure['path'])}: {printable(failure['reason'])}")
    return EXIT_SOME_FAILED if answer["failed"] else EXIT_OK
