"""dedupfs settle MOUNT"""

import argparse

from .output import add_json, facts_of, print_facts, print_json
from .targets import ask


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "settle",
        help="wait until nothing is pending",
        description="Return when every closed file has been hashed, and shared where another has the same bytes, and "
        "every picture has been described.",
        allow_abbrev=False,
    )
    parser.add_argument("mount", metavar="MOUNT")
    parser.add_argument("--exact", action="store_true", help="do not wait for pictures to be described")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    answer = ask(arguments.mount, "settle", {"exact": arguments.exact})
    if arguments.json:
        print_json(answer)
    else:
        print_facts(facts_of(answer))
    return 0
