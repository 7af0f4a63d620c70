"""dedupfs mount SOURCE MOUNTPOINT"""

import argparse
import os
import sys

from .. import mount
from ..config import parse_options
from .output import add_json, print_json

_DESCRIPTION = """\
Serve the directory SOURCE at MOUNTPOINT, which may be SOURCE itself. Returns when the mount answers; its daemon
goes on in the background and keeps a log in SOURCE/.dedupfs/daemon.log. On the first mount of an archive a scan in
the background finds what is there. Files of equal bytes then share them; every path stays.
"""

_EPILOG = """\
options (-o):
  ro, noexec, nodev, nosuid, noatime, sync, dirsync and their opposites, as in mount(8)
  allow_other        let other users in; root's mounts always do
  share=auto         how equal files share their bytes: as the filesystem of SOURCE does it best (the default)
  share=reference    by small files that name one common content: on any filesystem with hard links and xattrs
  share=reflink      by shared extents: on XFS and btrfs
  passthrough=auto   let the kernel read and write files without the daemon where it can (the default); on, off
"""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "mount",
        help="serve a directory",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="the directory that holds the archive")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="where to mount it")
    parser.add_argument("-o", dest="options", metavar="OPTS", action="append", default=[], help="see below")
    parser.add_argument("--foreground", action="store_true", help="do not return until unmounted; log to stderr")
    parser.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)  # from mount.spawn to its child
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    option_text = ",".join(arguments.options)
    options = parse_options(option_text, privileged=os.geteuid() == 0)
    # Resolved now: serving changes the working directory.
    answer = {"source": os.path.abspath(arguments.source), "mountpoint": os.path.realpath(arguments.mountpoint)}

    def tell() -> None:
        if arguments.json:
            print_json(answer)
            sys.stdout.flush()  # a reader waits for it, and the process goes on

    if not arguments.foreground:
        code = mount.spawn(arguments.source, arguments.mountpoint, option_text)
        if code == 0:
            tell()
        return code
    background = arguments.ready_fd is not None
    on_ready = mount.Readiness(arguments.ready_fd).report if background else tell
    mount.prepare_process()
    mount.serve(arguments.source, arguments.mountpoint, options, on_ready=on_ready, background=background)
    return 0
