"""dedupfs duplicates MOUNT [PATH]"""

import argparse
import os
from typing import Any

from ..errors import UsageError
from .output import add_json, print_json, printable, size_text
from .targets import ask, path_within


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "duplicates",
        help="which files hold the same bytes",
        description="List the files that hold the same bytes, group by group, or all that hold the bytes of PATH.",
        allow_abbrev=False,
    )
    parser.add_argument("mount", metavar="MOUNT")
    parser.add_argument("path", metavar="PATH", nargs="?", help="a file, relative to MOUNT or absolute")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.path is None:
        groups = answer = ask(arguments.mount, "duplicates", {})
    else:
        path = path_within(arguments.mount, arguments.path)
        if os.path.isdir(os.path.join(arguments.mount, path)):
            raise UsageError(f"{arguments.path} is a directory; name a file")
        answer = ask(arguments.mount, "duplicates", {"path": path})
        groups = [answer]
    if arguments.json:
        print_json(answer)
        return 0
    for group in groups:
        _show(group)
    if arguments.path is None:
        further = sum(group["size_bytes"] * (len(group["paths"]) - 1) for group in groups)
        print(f"groups: {len(groups):,}; size of the further copies: {size_text(further)}")
    return 0


def _show(group: dict[str, Any]) -> None:
    print(f"{group['digest']}  {len(group['paths'])} x {size_text(group['size_bytes'])}")
    for path in group["paths"]:
        print(f"  {printable(path)}")
