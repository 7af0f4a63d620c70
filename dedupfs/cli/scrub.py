"""dedupfs scrub SOURCE|MOUNT"""

import argparse
import math
from typing import Any

from .. import control
from ..engine import Engine
from ..model import Progress
from .output import add_json, print_facts, print_json, printable, size_text
from .targets import add_instance, ask_or_open, named, require_store


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "scrub",
        help="read everything again, and heal what went bad",
        description="Read the content of every file and blob again and compare it with its digest. A blob that went "
        "bad is healed with a plain file of its content, or set aside in quarantine/: its paths are named, and answer "
        "EIO until a good copy is written. A file that went bad is named, and so is a good copy; nothing is written to "
        "it. Run again after an interruption, it goes on where it was. Exits 0 when all is good, 1 when all that was "
        "found is healed, 2 when something is damaged.",
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="SOURCE|MOUNT", nargs="?")
    add_instance(parser)
    parser.add_argument(
        "--rate",
        metavar="MB/s",
        type=_rate,
        help="read no faster than so many million bytes a second; 0: as fast as it goes; otherwise what the mount was "
        "told (scrub_rate), or 50",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not (math.isfinite(rate) and 0 <= rate < 1e9):
        raise argparse.ArgumentTypeError(f"{text} is not a number of million bytes a second")
    return rate


def run(arguments: argparse.Namespace) -> int:
    target = named(arguments.target, arguments.instance)
    if control.find_mount(target) is None:
        require_store(target)

    def offline(engine: Engine, progress: Progress) -> object:
        return engine.scrub(progress, arguments.rate)

    answer = ask_or_open(target, "scrub", {"rate": arguments.rate}, offline)
    code = int(answer["exit_code"])
    if arguments.json:
        print_json(answer)
        return code
    for finding in answer["findings"]:
        _show(finding)
    print_facts(
        [
            ("contents verified", f"{answer['contents']:,}"),
            ("read", size_text(answer["bytes"])),
            ("skipped", f"{answer['skipped']:,} (changed or in use; the next scrub looks at them)"),
            ("found", f"{len(answer['findings']):,}"),
        ]
    )
    return code


def _show(finding: dict[str, Any]) -> None:
    paths = finding["paths"] or ["?"]
    print(f"{finding['fate']}: {finding['kind']} {finding['digest']}: {printable(finding['problem'])}")
    for path in paths:
        print(f"  {printable(path)}")
    for path in finding["copies"]:
        print(f"  a good copy: {printable(path)}")
