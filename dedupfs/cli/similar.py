"""dedupfs similar MOUNT PATH"""

import argparse
from typing import Any

from .output import add_json, print_json, printable
from .targets import ask, file_within


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "similar",
        help="which files show the same picture",
        description="List the files that show the picture in PATH in this or another form, the nearest first: the "
        "relation, by how many of 256 bits their hashes differ, the path. Frames of a sequence and sheets of a form "
        "come last; they are no duplicates.",
        allow_abbrev=False,
    )
    parser.add_argument("mount", metavar="MOUNT")
    parser.add_argument("path", metavar="PATH", help="a picture, relative to MOUNT or absolute")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    answer = ask(arguments.mount, "similar", {"path": file_within(arguments.mount, arguments.path)})
    if arguments.json:
        print_json(answer)
    else:
        show(answer)
    return 0


def show(answer: dict[str, Any]) -> None:
    for found in answer["similar"]:
        print(f"{found['relation']:<12}  {found['distance']:>3}  {printable(found['path'])}")
