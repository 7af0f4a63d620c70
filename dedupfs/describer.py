"""The worker: a process of its own that describes one picture after the other, shut in before the first.

`python -m dedupfs.describer FD`, started by `workers` with one end of a socket as FD. Each request is one byte and a
descriptor; each answer one message: `DESCRIBED` and a description as `codec` writes it, or `REFUSED` and the reason.

A request with two descriptors is for their difference: `DESCRIBED`, width and height (`SIZE`), and then the pixels,
three bytes each, in messages of `PIECE_BYTES`. One without a descriptor is for comparing pictures that were described:
`COMPARE` or `COMPARE_CUTS`, and how many others (one byte); then a description comes in a message of its own for each,
first that of the picture the others are compared with. Each other one is answered by a message in JSON, null where
nothing is to be said.

The first message comes unasked: `DESCRIBED` and the version of the describing path once the process is shut in, or
`REFUSED` and why it cannot be.
"""

import dataclasses
import io
import itertools
import json
import os
import resource
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack

from . import codec, difference, likeness, phash, sandbox
from .errors import DedupfsError

DESCRIBED, REFUSED = b"\1", b"\0"
SIZE = struct.Struct(">II")
PIECE_BYTES = 1 << 15
COMPARE, COMPARE_CUTS = b"~", b"%"
_LONGEST_DESCRIPTION_BYTES = 32 << 10

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
            request, descriptors, _, _ = socket.recv_fds(connection, 2, 2)
            if not request:
                return
            _limit_processor_time()
            if not descriptors:
                _compare(connection, cuts=request[:1] == COMPARE_CUTS, count=request[1])
                continue
            with ExitStack() as stack:
                files = [stack.enter_context(os.fdopen(descriptor, "rb")) for descriptor in descriptors]
                messages = list(_answer(files))
            for message in messages:  # now that nothing of the file is left here
                connection.send(message)


def _compare(connection: socket.socket, *, cuts: bool, count: int) -> None:
    ours, *others = (codec.decode_description(connection.recv(_LONGEST_DESCRIPTION_BYTES)) for _ in range(count + 1))
    for found in likeness.compare_each(ours, others, cuts=cuts):
        connection.send(json.dumps(None if found is None else dataclasses.astuple(found)).encode())


def _answer(files: list[io.BufferedReader]) -> Iterator[bytes]:
    try:
        if len(files) == 1:
            yield DESCRIBED + codec.encode_description(*phash.describe(files[0]))
            return
        one, other = (phash.look(file, difference.SIDE) for file in files)
    except phash.Undescribable as error:
        yield REFUSED + str(error).encode(errors="replace")[:_LONGEST_REASON]
        return
    sheet = difference.panels(one, other, *_laid(one, other))
    yield DESCRIBED + SIZE.pack(sheet.shape[1], sheet.shape[0])
    pixels = sheet.tobytes()
    for start in range(0, len(pixels), PIECE_BYTES):
        yield pixels[start : start + PIECE_BYTES]


def _laid(
    one: phash.Colours, other: phash.Colours
) -> tuple[tuple[difference.Box, difference.Box], int, likeness.Floats]:
    """Which part of the second picture lies over which part of the first, and how: a border of either may be in the
    way. All over all where nothing fits."""
    views = []
    for picture in (one, other):
        whole = (0, picture.shape[0], 0, picture.shape[1])
        views.append([whole, *([inner] if (inner := phash.without_border(picture)) is not None else [])])
    for ours, theirs in itertools.product(*views):
        cut = [picture[box[0] : box[1], box[2] : box[3]] for picture, box in ((one, ours), (other, theirs))]
        found = likeness.overlay(phash.thumbnail_of(cut[1]), phash.thumbnail_of(cut[0]))
        if found is not None:
            return (ours, theirs), *found
    return (views[0][0], views[1][0]), likeness.UPRIGHT, likeness.IDENTITY


def _limit_processor_time() -> None:
    """From now on; when it is used up, SIGXCPU ends the process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    until = int(used.ru_utime + used.ru_stime) + PICTURE_CPU_S + 1
    resource.setrlimit(resource.RLIMIT_CPU, (min(until, LIFETIME_CPU_S), LIFETIME_CPU_S))


if __name__ == "__main__":
    main(int(sys.argv[1]))
