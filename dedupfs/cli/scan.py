"""dedupfs scan SOURCE|MOUNT"""

import argparse

from ..engine import Engine
from ..model import Progress
from .output import add_json, facts_of, print_facts, print_json
from .targets import ask_or_open


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "scan",
        help="look through the whole archive",
        description="Find what the index does not know: files never seen, files that were changed around the mount. "
        "Run again after an interruption, it goes on where it was.",
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="SOURCE|MOUNT")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    def offline(engine: Engine, progress: Progress) -> object:
        return engine.scan(progress)

    answer = ask_or_open(arguments.target, "scan", {}, offline)
    if arguments.json:
        print_json(answer)
    else:
        print_facts(facts_of(answer))
    return 0
