"""dedupfs umount MOUNTPOINT"""

import argparse
import os

from .. import mount
from .output import add_json, print_json


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "umount",
        help="end a mount",
        description="Unmount, and return when the daemon has ended and its store is marked clean. "
        "Also removes what a killed daemon left at MOUNTPOINT.",
        allow_abbrev=False,
    )
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    mount.unmount(arguments.mountpoint)
    if arguments.json:
        print_json({"mountpoint": os.path.realpath(arguments.mountpoint)})
    return 0
