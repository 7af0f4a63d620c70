"""dedupfs watch MOUNT"""

import argparse
import json
import sys

from .. import control
from ..errors import NotMounted
from .output import printable


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "watch",
        help="tell each new duplicate, near-duplicate and conflict as it is found",
        description="Print one line of JSON for each new duplicate, near-duplicate and conflict as it is found, until "
        "interrupted: what the event is, when, the path of the file, and the others. Whoever takes the lines too "
        "slowly is told how many were missed. That it has begun to watch it says on standard error.",
        allow_abbrev=False,
    )
    parser.add_argument("mount", metavar="MOUNT")
    parser.add_argument("--json", action="store_true", help="changes nothing: the answer is in JSON always")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    socket_path = control.find_mount(arguments.mount)
    if socket_path is None:
        raise NotMounted(f"{arguments.mount} is not mounted; run dedupfs mount first")

    def begun(_phase: str, _done: int, _total: int | None) -> None:
        print(f"dedupfs: watching {printable(arguments.mount)}", file=sys.stderr, flush=True)

    def tell(event: object) -> None:
        print(json.dumps(event), flush=True)

    control.call(socket_path, "watch", {}, begun, tell)
    return 0
