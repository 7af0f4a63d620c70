"""dedupfs conflicts MOUNT"""

import argparse

from .output import add_json, print_json, printable
from .targets import ask


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "conflicts",
        help="which versions of one photograph differ visibly",
        description="List pairs of pictures that claim to be one photograph, by camera and time of capture, by their "
        "name or by the number in it, and differ visibly: in tone, by something laid over, by their cut.",
        allow_abbrev=False,
    )
    parser.add_argument("mount", metavar="MOUNT")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    conflicts = ask(arguments.mount, "conflicts", {})
    if arguments.json:
        print_json(conflicts)
        return 0
    for conflict in conflicts:
        print(printable(f"{conflict['claim']}: {conflict['relation']}, {conflict['distance']}"))
        for paths in conflict["paths"]:
            for path in paths:
                print(f"  {printable(path)}")
    print(f"conflicts: {len(conflicts):,}")
    return 0
