"""dedupfs leave SOURCE"""

import argparse

from .. import leave
from ..errors import EXIT_OK
from .output import add_json, print_facts, print_json, printable, progress_shown, size_text
from .restore import EXIT_SOME_FAILED, show_plan
from .targets import require_unmounted_store


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "leave",
        help="make every file plain, prove it, and remove the store",
        description="Give every reference its own bytes again, read every file and compare it with its digest, and "
        "only then remove .dedupfs: the directory is an ordinary one again. When a file cannot be restored, read or "
        "proven, or .dedupfs holds something that dedupfs cannot make again, that is told and the store stays (exit "
        "code 1). Safe to interrupt; run it again.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="a source that is not mounted")
    parser.add_argument("--dry-run", action="store_true", help="only say what it takes, and what is in the way")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    require_unmounted_store(arguments.source)
    with progress_shown() as progress:
        departure = leave.leave(arguments.source, dry_run=arguments.dry_run, progress=progress)
    code = EXIT_SOME_FAILED if departure.refused else EXIT_OK
    if arguments.json:
        print_json(departure.as_json())
        return code
    for refusal in departure.refused:
        print(f"in the way: {printable(refusal['path'])}: {printable(refusal['reason'])}")
    if departure.plan is not None:
        show_plan(departure.plan)
        return code
    print_facts(
        [
            ("restored", f"{departure.restored:,}"),
            ("proven", f"{departure.proven:,} files, {size_text(departure.proven_bytes)}"),
            ("the store", "stays, for what is in the way" if departure.refused else "is removed"),
        ]
    )
    return code
