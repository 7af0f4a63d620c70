"""mount.dedupfs, mount.fuse.dedupfs: what mount(8) runs for an fstab line or `mount -t fuse.dedupfs`.

mount.fuse.dedupfs SOURCE MOUNTPOINT [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]
"""

import getopt
import sys

from ..errors import UsageError
from . import main as dedupfs


def main(argv: list[str] | None = None) -> int:
    """Mount as mount(8) asks, and return the exit code of `dedupfs mount`."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        options, places = getopt.gnu_getopt(arguments, "sfnvN:o:t:")
    except getopt.GetoptError as error:
        return _refuse(error.msg)
    if len(places) != 2:
        return _refuse("name SOURCE and MOUNTPOINT")
    names = {name for name, _ in options}
    if "-N" in names:
        return _refuse("cannot mount in another namespace")
    words = [value for name, value in options if name == "-o"]
    if "-f" in names:
        return 0  # only pretend
    return dedupfs(["mount", "-o", ",".join(words), "--", *places])


def _refuse(reason: str) -> int:
    print(f"mount.fuse.dedupfs: {reason}", file=sys.stderr)
    return UsageError.exit_code
