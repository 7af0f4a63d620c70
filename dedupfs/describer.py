"""The worker: a process of its own that describes one picture after the other, shut in before the first.

`python -m dedupfs.describer FD`, started by `workers` with one end of a socket as FD. Each request is one byte and a
descriptor; each answer one message: `DESCRIBED` and a description as `codec` writes it, or `REFUSED` and the reason.
The first message comes unasked: `DESCRIBED` and the version of the describing path once the process is shut in, or
`REFUSED` and why it cannot be.
"""

import io
import os
import resource
import socket
import sys

from . import codec, phash, sandbox
from .errors import DedupfsError

DESCRIBED, REFUSED = b"\1", b"\0"

ADDRESS_SPACE_BYTES = 1536 << 20
PICTURE_CPU_S = 20
LIFETIME_CPU_S = 3600
_LONGEST_REASON = 200


def main(fd: int) -> None:
    with socket.socket(fileno=fd) as connection:
        try:
            phash.warm_up()
            sandbox.enter(sandbox.Limits(ADDRESS_SPACE_BYTES, LIFETIME_CPU_S))
        except (DedupfsError, OSError) as error:
            connection.send(REFUSED + str(error).encode())
            return
        connection.send(DESCRIBED + phash.VERSION.to_bytes(4, "big"))
        while True:
            request, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
            if not request or not descriptors:
                return
            _limit_processor_time()
            with os.fdopen(descriptors[0], "rb") as file:
                answer = _answer(file)
            connection.send(answer)


def _answer(file: io.BufferedReader) -> bytes:
    try:
        description = phash.describe(file)
    except phash.Undescribable as error:
        return REFUSED + str(error).encode(errors="replace")[:_LONGEST_REASON]
    return DESCRIBED + codec.encode_description(*description)


def _limit_processor_time() -> None:
    """From now on; when it is used up, SIGXCPU ends the process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    until = int(used.ru_utime + used.ru_stime) + PICTURE_CPU_S + 1
    resource.setrlimit(resource.RLIMIT_CPU, (min(until, LIFETIME_CPU_S), LIFETIME_CPU_S))


if __name__ == "__main__":
    main(int(sys.argv[1]))
