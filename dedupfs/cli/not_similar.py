"""dedupfs not-similar MOUNT PATH PATH"""

import argparse

from .output import add_json, print_json
from .targets import ask, file_within, who


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "not-similar",
        help="say that two pictures are different ones",
        description="Remember for good that the pictures in two files are different ones, whatever they look like.",
        allow_abbrev=False,
    )
    parser.add_argument("mount", metavar="MOUNT")
    parser.add_argument("path", metavar="PATH", help="a picture, relative to MOUNT or absolute")
    parser.add_argument("other", metavar="PATH", help="another one")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    path, other = (file_within(arguments.mount, each) for each in (arguments.path, arguments.other))
    answer = ask(arguments.mount, "not-similar", {"path": path, "other": other, "who": who()})
    if arguments.json:
        print_json(answer)
    return 0
