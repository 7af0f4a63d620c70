"""dedupfs mount SOURCE MOUNTPOINT"""

import argparse
import os
import sys

from .. import mount
from ..config import Configuration, instance_file, instance_path, read_configuration
from ..errors import UsageError
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
  include=GLOB       only files below these share (may be repeated; otherwise all)
  exclude=GLOB       these never share (may be repeated): *.tmp, drafts/, permits/**/*.tif
  min_size=BYTES     smaller ones never share; with K, M or G
  scrub_rate=MB/s    how fast a scrub reads unless it is told (50); 0: as fast as it goes
  prefer=DIR         versions of a photograph in this folder are authoritative where nothing else decides (may be
                     repeated: the first before the next)
  name_pattern=REGEX a regular expression with one group; versions that differ visibly are in conflict when it finds
                     the same number in their names. With a comma in it, it belongs into a file
  metrics=SOCKET     tell Prometheus numbers there, or at [HOST:]PORT
  config=FILE        a TOML file with these names as keys; dedupfs config show FILE tells what it comes to
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
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="the directory that holds the archive")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", nargs="?", help="where to mount it")
    parser.add_argument("-o", dest="options", metavar="OPTS", action="append", default=[], help="see below")
    parser.add_argument(
        "--instance",
        metavar="NAME",
        help="mount what /etc/dedupfs/NAME.toml says; where it names no source, or is not there, the path that NAME "
        "stands for (systemd-escape --path), over itself",
    )
    parser.add_argument("--foreground", action="store_true", help="do not return until unmounted; log to stderr")
    parser.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)  # from mount.spawn to its child
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    option_text = ",".join(arguments.options)
    file = None if arguments.instance is None else instance_file(arguments.instance)
    told = read_configuration(option_text, privileged=os.geteuid() == 0, file=file)
    source, mountpoint = _places(arguments, told)
    # Resolved now: serving changes the working directory.
    answer = {"source": os.path.abspath(source), "mountpoint": os.path.realpath(mountpoint)}

    def tell() -> None:
        if arguments.json:
            print_json(answer)
            sys.stdout.flush()  # a reader waits for it, and the process goes on

    if not arguments.foreground:
        words = option_text if file is None else ",".join(filter(None, [option_text, f"config={file}"]))
        code = mount.spawn(source, mountpoint, words)
        if code == 0:
            tell()
        return code
    background = arguments.ready_fd is not None
    on_ready = mount.Readiness(arguments.ready_fd).report if background else tell
    mount.prepare_process()
    mount.serve(source, mountpoint, told.options, on_ready=on_ready, background=background)
    return 0


def _places(arguments: argparse.Namespace, told: Configuration) -> tuple[str, str]:
    """What is to be mounted where: by the command line, by the configuration, by the instance's name."""
    if arguments.instance is not None:
        if arguments.source is not None:
            raise UsageError("give --instance, or SOURCE and MOUNTPOINT")
        source = told.source or instance_path(arguments.instance)
        return source, told.mountpoint or source
    for given, configured in ((arguments.source, told.source), (arguments.mountpoint, told.mountpoint)):
        if given and configured and os.path.realpath(given) != os.path.realpath(configured):
            raise UsageError(f"{given} and the configuration's {configured} contradict each other; give one")
    named: str | None = arguments.source or told.source
    # What is mounted by its configuration alone is mounted over itself, unless that says where.
    where: str | None = arguments.mountpoint or told.mountpoint or (None if arguments.source else named)
    if not named or not where:
        raise UsageError("name SOURCE and MOUNTPOINT; see dedupfs mount --help")
    return named, where
