"""dedupfs groups MOUNT [--relation RELATION] [--csv]"""

import argparse
import sys

from .. import page
from ..model import Relation
from .output import add_json, print_json, printable
from .targets import ask


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "groups",
        help="which pictures are versions of one photograph",
        description="List groups of pictures that are versions of one photograph: first the authoritative one, then "
        "those that were found alike with it. Without --relation all relations count but sequence and template.",
        allow_abbrev=False,
    )
    parser.add_argument("mount", metavar="MOUNT")
    parser.add_argument(
        "--relation",
        action="append",
        default=[],
        choices=[str(relation) for relation in Relation if relation is not Relation.IDENTICAL],
        help="only pictures that are so related; may be repeated",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print CSV, a line for each file")
    add_json(form)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    groups = ask(arguments.mount, "groups", {"relations": arguments.relation})
    if arguments.json:
        print_json(groups)
        return 0
    if arguments.csv:
        sys.stdout.write(page.group_lines(groups))
        return 0
    for group in groups:
        for path in group["authoritative"]:
            print(printable(path))
        for member in group["members"]:
            for path in member["paths"]:
                print(f"  {member['relation']:<12}  {member['distance']:>3}  {printable(path)}")
    print(f"groups: {len(groups):,}")
    return 0
