"""dedupfs umount MOUNTPOINT"""

import argparse
import os
import sys

from .. import unmount
from .output import add_json, print_json
from .targets import add_instance, named

_STILL_THERE = """\
dedupfs: it is unmounted here, but the daemon (process {pid}) has not ended, and is waited for: it writes down what it \
knows, or a container or another mount namespace has the mount still"""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "umount",
        help="end a mount",
        description="Unmount, and return when the daemon has ended and its store is marked clean. "
        "Also removes what a killed daemon left at MOUNTPOINT.",
        allow_abbrev=False,
    )
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", nargs="?")
    add_instance(parser)
    parser.add_argument("--if-dead", action="store_true", help="only remove what a killed daemon left, if it left it")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    mountpoint = named(arguments.mountpoint, arguments.instance)
    if not arguments.if_dead or unmount.is_dead(mountpoint):
        unmount.unmount(mountpoint, lambda pid: print(_STILL_THERE.format(pid=pid), file=sys.stderr))
    if arguments.json:
        print_json({"mountpoint": os.path.realpath(mountpoint)})
    return 0
