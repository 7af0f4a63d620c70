"""dedupfs diff A B -o FILE"""

import argparse
import os
import stat
from contextlib import ExitStack, closing
from typing import Any

from .. import png
from ..errors import SourceError, UsageError
from ..likeness import compare, compare_cuts
from ..workers import Refused, Workers
from .output import add_json, print_json, printable


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "diff",
        help="show two pictures, and where they differ, side by side",
        description="Write a PNG file with three panels: the picture in A; that in B; and A again, pale, with what is "
        "different in B in red, the more so the more it differs. B is turned, moved and scaled to fit; what it does "
        "not show of A is blue. The two may be in a mount or anywhere else. A file that exists is not overwritten.",
        allow_abbrev=False,
    )
    parser.add_argument("one", metavar="A", help="a picture")
    parser.add_argument("other", metavar="B", help="another one")
    parser.add_argument("-o", dest="output", metavar="FILE", required=True, help="the file to write; it must not exist")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if os.path.lexists(arguments.output):
        raise UsageError(f"{arguments.output} exists already, and is not overwritten; name another file, or remove it")
    with ExitStack() as stack:
        one, other = (_opened(stack, path) for path in (arguments.one, arguments.other))
        workers = stack.enter_context(closing(Workers(1)))
        answer = _compared(workers, (arguments.one, one), (arguments.other, other))
        try:
            width, height, pixels = workers.difference(one, other)
        except Refused as reason:
            raise SourceError(f"the two cannot be compared: {reason}") from None
    _write(arguments.output, png.encode(width, height, pixels))
    answer = {"output": os.path.abspath(arguments.output), "width": width, "height": height, **answer}
    if arguments.json:
        print_json(answer)
    else:
        shown = f"{answer['relation']}, {answer['distance']}" if answer["relation"] else "two different pictures"
        print(printable(f"{arguments.output}: {shown}"))
    return 0


def _opened(stack: ExitStack, path: str) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise SourceError(f"{path} is not a file")
    return fd


def _compared(workers: Workers, *pictures: tuple[str, int]) -> dict[str, Any]:
    described = []
    for path, fd in pictures:
        try:
            described.append(workers.describe(fd))
        except Refused as reason:
            raise SourceError(f"{path} cannot be described: {reason}") from None
    found = compare(*described[0], *described[1]) or compare_cuts(*described[0], *described[1])
    if found is None:
        return {"relation": None, "distance": None, "evidence": {}}
    return {"relation": str(found.relation), "distance": found.distance, "evidence": found.evidence}


def _write(path: str, data: bytes) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        raise UsageError(f"{path} exists already, and is not overwritten") from None
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
    except BaseException:
        os.unlink(path)
        raise
