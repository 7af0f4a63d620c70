"""Running dedupfs as an ordinary user, wherever Python and this checkout are.

A checkout in root's home, or a Python there, is out of a user's reach. What is, is shown to him read-only at another
place for as long as the tests run.
"""

import atexit
import functools
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

from .filesystems import run, unmount
from .tools import USER, attempt


def interpreter() -> Path:
    """The Python that runs the tests, where an ordinary user can run it; its packages are not on its path."""
    executable = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
    base = Path(sys.base_prefix).resolve()
    return within_reach(base) / executable.relative_to(base)


def environment(repository: Path) -> dict[str, str]:
    """What that Python needs to find this checkout, the packages it needs, and its own library."""
    packages = dict.fromkeys(Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))
    search_path = os.pathsep.join(str(within_reach(path)) for path in (repository, *packages))
    return {"PYTHONPATH": search_path, "LD_LIBRARY_PATH": str(within_reach(Path(sys.base_prefix).resolve()) / "lib")}


@functools.cache
def within_reach(directory: Path) -> Path:
    """The directory, at a path that an ordinary user may follow to its end. Needs root."""
    if attempt("ls", directory, user=USER).returncode == 0:
        return directory
    place = Path(tempfile.mkdtemp(prefix="dedupfs-reach.", dir=os.environ.get("TMPDIR", "/var/tmp")))
    # Read-only: whatever goes wrong later, nobody removes a checkout through this.
    done = run("mount", "--bind", "--options", "ro", directory, place)
    if done.returncode != 0:
        place.rmdir()
        raise RuntimeError(f"cannot show {directory} at {place}: {done.stderr.strip()}")
    atexit.register(_take_back, place)
    return place


def _take_back(place: Path) -> None:
    unmount(place)
    place.rmdir()


def runtime_directory() -> Path:
    """A new XDG_RUNTIME_DIR for an ordinary user; his control sockets belong there. Removed at the end of the run."""
    path = Path(tempfile.mkdtemp(prefix="dedupfs-runtime."))
    if os.geteuid() == 0:
        os.chown(path, USER, USER)
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path
