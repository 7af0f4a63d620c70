"""dedupfs rebuild SOURCE"""

import argparse

from .. import engine
from .output import add_json, facts_of, print_facts, print_json, progress_shown
from .targets import require_unmounted_store


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "rebuild",
        help="make the index anew",
        description="Throw the index away and make it anew from the files, which are the truth: nothing is lost by it.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="a source that is not mounted")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    require_unmounted_store(arguments.source)
    with progress_shown() as progress:
        answer = engine.rebuild(arguments.source, progress)
    if arguments.json:
        print_json(answer)
    else:
        print_facts(facts_of(answer))
    return 0
