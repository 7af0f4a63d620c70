"""dedupfs fsck SOURCE [--repair]"""

import argparse
import os

from .. import fsck
from ..errors import UsageError
from .output import add_json, print_json, printable, progress_shown
from .targets import require_unmounted_store


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "fsck",
        help="check every invariant of a store",
        description="Check a store, one line for each thing found: the check, the file, what is wrong, whether it was "
        "repaired. Exits 0 when clean, 1 when everything found was repaired, 2 when something is left.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="a source that is not mounted")
    parser.add_argument("--repair", action="store_true", help="put right what can be put right without losing bytes")
    parser.add_argument(
        "--dry-run", action="store_true", help="with --repair: say what it would do, and change nothing"
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.dry_run and not arguments.repair:
        raise UsageError("--dry-run says what --repair would do; give both, or neither to only check")
    require_unmounted_store(arguments.source)
    with progress_shown() as progress:
        report = fsck.fsck(arguments.source, repair=arguments.repair and not arguments.dry_run, progress=progress)
    if arguments.json:
        findings = [
            {
                "check": one.check,
                "path": os.fsdecode(one.path),
                "problem": one.problem,
                "repaired": one.repaired,
                "remedy": one.remedy,
            }
            for one in report.findings
        ]
        print_json({"findings": findings, "exit_code": report.exit_code})
        return report.exit_code
    for one in report.findings:
        fate = "repaired" if one.repaired else "not repaired"
        if arguments.dry_run:
            fate = f"would be {one.remedy}" if one.remedy else "would be left: a person has to decide"
        print(f"{one.check}: {printable(os.fsdecode(one.path))}: {printable(one.problem)} ({fate})")
    if not report.findings:
        print("clean")
    return report.exit_code
