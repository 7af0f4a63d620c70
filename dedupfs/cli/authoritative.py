"""dedupfs authoritative MOUNT PATH"""

import argparse
from typing import Any

from .output import add_json, print_json, printable
from .targets import ask, file_within, who


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "authoritative",
        help="which version of a photograph is the authoritative one, and why",
        description="Show which of the versions of the photograph in PATH is held authoritative, and by what evidence. "
        "A person's decision comes first: it is kept for good, with who made it and when.",
        allow_abbrev=False,
    )
    parser.add_argument("mount", metavar="MOUNT")
    parser.add_argument("path", metavar="PATH", help="a picture, relative to MOUNT or absolute")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--pin", action="store_true", help="hold the version in PATH authoritative from now on")
    what.add_argument("--unpin", action="store_true", help="let the evidence decide again")
    what.add_argument("--note", metavar="TEXT", help="keep a remark")
    what.add_argument("--history", action="store_true", help="show what was decided so far")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    path = file_within(arguments.mount, arguments.path)
    if arguments.history:
        history = ask(arguments.mount, "history", {"path": path})
        if arguments.json:
            print_json(history)
            return 0
        for entry in history:
            text = f": {entry['text']}" if entry["text"] else ""
            before = f" (before: {entry['before']})" if entry["before"] else ""
            paths = ", ".join(entry["paths"])
            print(printable(f"{entry['at']}  {entry['who']}  {entry['action']}  {paths}{text}{before}"))
        return 0
    request: dict[str, Any] = {"path": path, "who": who()}
    if arguments.pin or arguments.unpin:
        request["action"] = "pin" if arguments.pin else "unpin"
    elif arguments.note is not None:
        request |= {"action": "note", "text": arguments.note}
    answer = ask(arguments.mount, "authoritative", request)
    if arguments.json:
        print_json(answer)
    else:
        _show(answer)
    return 0


def _show(answer: dict[str, Any]) -> None:
    print(printable(str(answer["authoritative"])))
    for reason in answer["why"]:
        print(f"  {reason['criterion']:<12}  {printable(reason['value'])}")
    for other in answer["others"]:
        for path in other["paths"]:
            print(f"not {printable(path)} ({other['relation']}): {other['lost_by']}, {printable(other['value'])}")
    for note in answer["notes"]:
        print(f"note: {printable(note)}")
