"""dedupfs find MOUNT FILE"""

import argparse
import os

from . import similar
from .output import add_json, print_json
from .targets import ask


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "find",
        help="where a picture from outside is in the archive",
        description="List the files of a mount that show the picture in FILE, which stays where it is, in this or "
        "another form; as similar does.",
        allow_abbrev=False,
    )
    parser.add_argument("mount", metavar="MOUNT")
    parser.add_argument("file", metavar="FILE", help="a picture that need not be in MOUNT")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    answer = ask(arguments.mount, "find", {"file": os.path.abspath(arguments.file)})
    if arguments.json:
        print_json(answer)
    else:
        similar.show(answer)
    return 0
