"""Acting as somebody else, in a process of its own."""

import encodings.ascii  # noqa: F401 - loaded while Python's library can be read, which may lie in root's home
import functools
import os
import tempfile
import traceback
from collections.abc import Callable

import lmdb


@functools.cache
def _load_lmdb() -> None:
    """The rest of it, which it loads when it is first used: while it can be read, as above."""
    with tempfile.TemporaryDirectory() as directory:
        lmdb.open(directory).close()


def as_user(uid: int, action: Callable[[], None]) -> None:
    """Do something with the rights of an ordinary user, group of the same number, no other groups; as we are where we
    are not root. An exception there is an AssertionError here."""
    if os.geteuid() != 0:
        action()
        return
    _load_lmdb()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        told = b""
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            action()
        except BaseException:  # noqa: BLE001 - it is raised in the parent
            told = traceback.format_exc().encode()
        finally:
            os.write(writing, told or b"ok")
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    assert told == b"ok", told.decode()
