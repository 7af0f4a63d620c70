"""The command line: one module a command, each with `add` (its arguments) and `run` (its exit code).

This module parses, and it is where every error becomes one line on standard error and an exit code.
"""

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from .. import __version__
from ..config import debugging
from ..control import describe
from ..errors import EXIT_INTERNAL, EXIT_OS_ERROR, DedupfsError, UsageError
from .output import printable

EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

_DESCRIPTION = """\
Front a directory of photographs, and store the bytes of every picture once.

  dedupfs mount /srv/photos /srv/photos     the archive, mounted over itself: no path changes
  dedupfs status /srv/photos                what it holds and what that saves
  dedupfs duplicates /srv/photos            which files are the same picture
  dedupfs umount /srv/photos
"""

_EPILOG = """\
SOURCE is the directory that holds the archive, MOUNT the directory where it is mounted.
A command that takes either asks the running mount where there is one, and else works on the store itself.

exit codes:
    0  done; fsck, scrub: nothing is wrong
    1  fsck, scrub: everything found was repaired; restore, leave: some files were not restored or proven;
       health: something is wrong
    2  fsck, scrub: something is left that was not repaired; gc: something is in the way, nothing was removed
   64  wrong option or argument
   65  the store is damaged
   66  the source, the mount point or a named file cannot be used
   67  not mounted
   69  libfuse, /dev/fuse or a feature of the filesystem is missing
   70  a bug in dedupfs
   71  the operating system refused
   75  somebody else uses the store or the mount; try again later
   76  the store was written by a newer version
  130  interrupted
"""

# In the order in which --help lists them. Each is a module of this package.
_COMMANDS = (
    *("estimate", "mount", "umount", "status", "health", "settle", "duplicates", "report"),
    *("similar", "find", "groups", "authoritative", "not-similar", "conflicts", "diff", "watch"),
    *("scan", "scrub", "restore", "leave", "rebuild", "fsck", "gc", "config"),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self._action_max_length = 14  # argparse forgets that commands are indented, and breaks the line of the longest


def make_parser(names: Sequence[str] = _COMMANDS) -> argparse.ArgumentParser:
    """The command line, as far as these commands go; the manual pages are made from the whole of it."""
    parser = _Parser(
        prog="dedupfs",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dedupfs {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name in names:
        import_module("." + name.replace("-", "_"), __name__).add(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command line, by default that of the process, and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a file name is the bytes it is
    try:
        words = sys.argv[1:] if argv is None else argv
        # What the other commands import would take longer to load than most commands take to run.
        named = [name for name in words[:1] if name in _COMMANDS]
        arguments = make_parser(named or _COMMANDS).parse_args(words)
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as finished:  # --help, --version
        return int(finished.code or 0)
    except DedupfsError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        _discard_output()
        return EXIT_BROKEN_PIPE
    except OSError as error:
        _discard_output()
        if debugging():
            traceback.print_exc()
        return _fail(describe(error), EXIT_OS_ERROR)
    except Exception as error:  # noqa: BLE001 - a bug: its one line says how to see the rest
        if debugging():
            traceback.print_exc()
        what = f"{type(error).__name__}: {error}"
        return _fail(f"internal error: {what}; set DEDUPFS_DEBUG=1 for the traceback", EXIT_INTERNAL)


def _discard_output() -> None:
    """What is still buffered may fail again when Python flushes it at exit, which would then be the exit code."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> int:
    print(f"dedupfs: {printable(message)}", file=sys.stderr)
    return code
