"""What a command is pointed at: a running mount, a store that nobody owns, a file in either."""

import argparse
import os
import pwd
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

from .. import control
from ..config import MountOptions, instance_file, instance_path, read_configuration
from ..errors import Busy, NotMounted, SourceError, UsageError
from ..model import STORE_DIRECTORY, Progress
from .output import progress_shown

if TYPE_CHECKING:
    from ..engine import Engine


def ask(mount: str, command: str, arguments: Mapping[str, object]) -> Any:
    """What the running mount answers. Raises NotMounted."""
    socket_path = control.find_mount(mount)
    if socket_path is None:
        raise NotMounted(f"{mount} is not mounted; run dedupfs mount first")
    with progress_shown() as progress:
        return control.call(socket_path, command, arguments, progress)


def ask_or_open(
    target: str, command: str, arguments: Mapping[str, object], offline: Callable[["Engine", Progress], object]
) -> Any:
    """What the running mount answers, or where there is none what `offline` does with the store."""
    socket_path = control.find_mount(target)
    with progress_shown() as progress:
        if socket_path is not None:
            return control.call(socket_path, command, arguments, progress)
        from ..engine import Engine  # asking a mount does without

        with closing(Engine(target, MountOptions())) as engine:
            return offline(engine, progress)


def require_unmounted_store(source: str) -> None:
    """Raises Busy when the source is mounted, SourceError when dedupfs never kept anything in it."""
    if control.find_mount(source) is not None:
        raise Busy(f"{source} is mounted; run dedupfs umount first")
    require_store(source)


def require_store(source: str) -> None:
    if not os.path.isdir(os.path.join(source, os.fsdecode(STORE_DIRECTORY))):
        raise SourceError(
            f"there is no dedupfs store in {source}; name the directory that was mounted, not its mount point"
        )


def path_within(root: str, path: str) -> str:
    """The path of an existing file relative to `root`, from one that is relative to it or absolute and inside it.

    Links on the way are followed, the file itself is not. "" for the root itself.
    """
    base = os.path.realpath(root)
    wanted = os.path.join(base, path)
    directory, name = os.path.split(wanted.rstrip("/"))
    if name in ("", ".", ".."):
        found = os.path.realpath(wanted)
    else:
        found = os.path.join(os.path.realpath(directory), name)
    relative = os.path.relpath(found, base)
    if relative == ".":
        return ""
    if relative.split("/", 1)[0] == "..":
        raise UsageError(f"{path} is not inside {root}")
    if relative.split("/", 1)[0] == os.fsdecode(STORE_DIRECTORY) or not os.path.lexists(found):
        raise SourceError(f"{path} does not exist in {root}")
    return relative


def add_instance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--instance", metavar="NAME", help="what /etc/dedupfs/NAME.toml mounts, or the path that NAME stands for"
    )


def named(target: str | None, instance: str | None) -> str:
    """A mount point, by itself or as that of an instance of the systemd unit."""
    if (target is None) == (instance is None):
        raise UsageError("name a directory, or an --instance")
    if target is not None or instance is None:
        return str(target)
    told = read_configuration("", privileged=os.geteuid() == 0, file=instance_file(instance))
    return told.mountpoint or told.source or instance_path(instance)


def file_within(mount: str, path: str) -> str:
    """Like `path_within`, for a command that is about one file. Raises UsageError for a directory."""
    found = path_within(mount, path)
    if os.path.isdir(os.path.join(mount, found)):
        raise UsageError(f"{path} is a directory; name a file")
    return found


def who() -> str:
    """Who gives the command, for the record: the user's name, also behind sudo."""
    if name := os.environ.get("SUDO_USER"):
        return name
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
