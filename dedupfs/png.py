"""Pixels as a PNG file. Pure; nothing of a picture is ever read here.

What comes from a worker is pixels, which can do no harm whatever the worker has become; so it is made a file by whoever
takes them, who must not load a library of decoders for it.
"""

import struct
import zlib

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EIGHT_BITS_OF_RED_GREEN_BLUE = b"\x08\x02\0\0\0"


def encode(width: int, height: int, pixels: bytes) -> bytes:
    """`pixels`: three bytes each (red, green, blue), row by row from the top. Raises ValueError for another length."""
    if not width or not height or len(pixels) != 3 * width * height:
        raise ValueError(f"{len(pixels)} bytes are not {width} x {height} pixels")
    rows = b"".join(b"\0" + pixels[start : start + 3 * width] for start in range(0, len(pixels), 3 * width))
    head = struct.pack(">II", width, height) + _EIGHT_BITS_OF_RED_GREEN_BLUE
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return _SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
