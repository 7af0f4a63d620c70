"""dedupfs status MOUNT"""

import argparse
from typing import Any

from .output import add_json, print_facts, print_json, size_text
from .targets import ask


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "status",
        help="what a mount holds, and what sharing saves",
        description="Show what a mount holds: sizes as applications see them, what of that is stored, what waits.",
        allow_abbrev=False,
    )
    parser.add_argument("mount", metavar="MOUNT")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    answer = ask(arguments.mount, "status", {})
    if arguments.json:
        print_json(answer)
        return 0
    logical, until = answer["logical_bytes"], answer["quiet_until"]
    share = f" ({100 * answer['saved_bytes'] / logical:.0f} %)" if logical else ""
    print_facts(
        [
            ("files", f"{answer['files']:,}"),
            ("size of all", size_text(logical)),
            ("stored", size_text(answer["stored_bytes"])),
            ("saved", size_text(answer["saved_bytes"]) + share),
            ("references", f"{answer['references']:,}"),
            ("blobs", f"{answer['blobs']:,}"),
            ("pending", f"{answer['pending']:,}" + (", and a scan is running" if answer["scanning"] else "")),
            *([("quiet hours", f"what is pending waits until {until}; dedupfs settle does it now")] if until else []),
            ("pictures", _pictures(answer)),
            ("sharing by", str(answer["share"])),
            ("passthrough", "yes" if answer["passthrough"] else f"no: {answer['passthrough_reason']}"),
        ]
    )
    return 0


def _pictures(answer: dict[str, Any]) -> str:
    text = f"{answer['pictures_described']:,} described"
    for what in ("waiting", "undescribable"):
        if answer[f"pictures_{what}"]:
            text += f", {answer[f'pictures_{what}']:,} {what}"
    if answer["pictures_reason"]:
        text += f"; none is described now: {answer['pictures_reason']}"
    return text
