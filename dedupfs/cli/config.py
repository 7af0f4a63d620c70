"""dedupfs config show"""

import argparse
import json
import os

from .. import config
from .output import add_json, print_json, printable


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "config",
        help="what settings come to",
        description="Print every setting that a mount would have, in the form of the configuration file, and where "
        "its value came from.",
        allow_abbrev=False,
    )
    parser.add_argument("action", metavar="show", choices=["show"], help="print them")
    parser.add_argument(
        "name",
        metavar="NAME|FILE",
        nargs="?",
        help="an instance, whose file is /etc/dedupfs/NAME.toml, or a file (with a slash in its name)",
    )
    parser.add_argument("-o", dest="options", metavar="OPTS", action="append", default=[], help="as given to mount")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    file = arguments.name
    if file is not None and "/" not in file:
        file = config.instance_file(file)
    told = config.read_configuration(",".join(arguments.options), privileged=os.geteuid() == 0, file=file)
    source, mountpoint = told.source, told.mountpoint
    if arguments.name is not None and "/" not in arguments.name:
        source = source or config.instance_path(arguments.name)
    mountpoint = mountpoint or source
    places = [("source", source), ("mountpoint", mountpoint)]
    if arguments.json:
        settings = [{"name": one.name, "value": one.value, "origin": one.origin} for one in told.settings]
        print_json({**dict(places), "settings": settings})
        return 0
    for name, place in places:
        if place is not None:
            print(f"{name} = {_toml(place)}")
    lines = [(f"{one.name} = {_toml(one.value)}", one.origin) for one in told.settings]
    width = max(len(line) for line, _ in lines)
    for line, origin in lines:
        print(f"{line:<{width}}  # {printable(origin)}")
    return 0


def _toml(value: object) -> str:
    """As it would stand in the file; a string of JSON is one of TOML, too."""
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(each) for each in value)}]"
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)
