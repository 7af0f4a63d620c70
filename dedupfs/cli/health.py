"""dedupfs health MOUNT"""

import argparse

from .output import add_json, print_json, printable
from .targets import ask

EXIT_UNWELL = 1


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "health",
        help="whether a mount is well",
        description="Exit 0 when a mount is well. Exit 1, and say why, when settling is stuck, the disk is nearly "
        "full, the index cannot be written or grow, or a scrub found damage that nobody has put right. For monitoring.",
        allow_abbrev=False,
    )
    parser.add_argument("mount", metavar="MOUNT")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    answer = ask(arguments.mount, "health", {})
    if arguments.json:
        print_json(answer)
    else:
        for problem in answer["problems"]:
            print(f"{problem['check']}: {printable(problem['problem'])}")
        if answer["healthy"]:
            print("well")
    return 0 if answer["healthy"] else EXIT_UNWELL
