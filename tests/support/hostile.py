"""Files that look like pictures and are not, from a seed: what every archive of other people's files comes to hold.

All are small on disk. Some would be huge in memory, some are two things at once, most are a sound picture with damage.
"""

import functools
import io
import random
import struct
import zlib
from collections.abc import Iterator

import pillow_heif
from PIL import Image

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "HEIF")

pillow_heif.register_heif_opener()


def sound(kind: str, seed: int = 0) -> bytes:
    """A small sound picture of this format with something to see, and EXIF where the format has it."""
    noise = random.Random(seed)
    coarse = Image.frombytes("RGB", (12, 9), noise.randbytes(12 * 9 * 3))
    picture = coarse.resize((240, 180), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    if kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"):
        exif = Image.Exif()
        exif[0x010F], exif[0x0110], exif[0x0112] = "maker", "model", 6
        exif.get_ifd(0x8769)[0x9003] = "2026:01:02 03:04:05"
        picture.save(out, kind, exif=exif)
    else:
        picture.save(out, kind)
    return out.getvalue()


def malformed(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """`count` files, each with a name that tells what was done to it."""
    noise = random.Random(seed)
    fixed = _special()
    for number in range(count):
        if number < len(fixed):
            yield fixed[number]
            continue
        kind = noise.choice(FORMATS)
        data = sound(kind, noise.randrange(20))
        what = noise.choice((_truncate, _flip, _flip_head, _cut_out, _insert, _overwrite_lengths, _append))
        yield f"{number:04d}-{what.__name__.strip('_')}.{kind.lower()}", what(noise, data)


def _truncate(noise: random.Random, data: bytes) -> bytes:
    return data[: noise.randrange(len(data))]


def _flip(noise: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(noise.choice((1, 8, 64))):
        changed[noise.randrange(len(changed))] ^= 1 << noise.randrange(8)
    return bytes(changed)


def _flip_head(noise: random.Random, data: bytes) -> bytes:
    return _flip(noise, data[:400]) + data[400:]


def _cut_out(noise: random.Random, data: bytes) -> bytes:
    start = noise.randrange(len(data))
    return data[:start] + data[start + noise.randrange(1, 200) :]


def _insert(noise: random.Random, data: bytes) -> bytes:
    start = noise.randrange(len(data))
    return data[:start] + noise.randbytes(noise.randrange(1, 200)) + data[start:]


def _overwrite_lengths(noise: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(4):
        start = noise.randrange(min(300, len(changed) - 4))
        changed[start : start + 4] = noise.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\1"))
    return bytes(changed)


def _append(noise: random.Random, data: bytes) -> bytes:
    return data + noise.randbytes(noise.randrange(1, 5000))


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of this many pixels that all are black: the data are real, and compress to next to nothing."""
    row = b"\0" + bytes(-(-width // 8))
    packer = zlib.compressobj(9)
    data = bytearray()
    for _ in range(height):
        data += packer.compress(row)
    data += packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", bytes(data)) + _chunk(b"IEND", b"")


@functools.cache
def _special() -> tuple[tuple[str, bytes], ...]:
    return tuple(_specials())


def _specials() -> Iterator[tuple[str, bytes]]:
    jpeg, png = sound("JPEG"), sound("PNG")
    yield "empty.jpg", b""
    yield "one-byte.jpg", b"\xff"
    yield "only-the-magic.jpg", b"\xff\xd8\xff"
    yield "only-the-magic.png", b"\x89PNG\r\n\x1a\n"
    yield "only-the-magic.webp", b"RIFF\xff\xff\xff\xffWEBP"
    yield "only-the-magic.gif", b"GIF89a"
    yield "only-the-magic.tif", b"II*\0\x08\0\0\0"
    yield "circle.tif", b"II*\0\x08\0\0\0\0\0\x08\0\0\0"
    yield "zeros.jpg", b"\xff\xd8\xff" + bytes(60_000)
    yield "endless-markers.jpg", b"\xff\xd8" + b"\xff\xe1\0\2" * 15_000
    yield "bomb.png", png_bomb(30_000, 30_000)
    yield "wide.png", png_bomb(500_000_000, 1)
    text = zlib.compress(bytes(100 << 20), 9)
    yield "text-bomb.png", png[:33] + _chunk(b"zTXt", b"Comment\0\0" + text) + png[33:]
    yield "huge.bmp", b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0)
    yield "huge.gif", b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0xF0, 0, 0) + bytes(6) + b",\0\0\0\0" + bytes(9)
    yield "no-size.jpg", jpeg.replace(b"\x00\xb4\x00\xf0", b"\0\0\0\0", 1)
    yield "jpeg-and-zip.jpg", jpeg + b"PK\3\4" + bytes(500)
    yield "jpeg-and-html.jpg", jpeg[:2] + b"\xff\xfe\0\x1f<script>alert(1)</script>\0\0\0" + jpeg[2:]
    yield "png-in-jpeg.jpg", jpeg[:20] + png
    yield "exif-of-nothing.jpg", jpeg[:2] + b"\xff\xe1\0\x0aExif\0\0II" + jpeg[2:]
    yield "exif-in-circles.jpg", _jpeg_with_exif(b"II*\0\x08\0\0\0\x01\0\x69\x87\4\0\1\0\0\0\x08\0\0\0\x08\0\0\0")
    yield "exif-far-away.jpg", _jpeg_with_exif(b"II*\0\xf0\xff\xff\xff")
    yield "exif-endless.jpg", _jpeg_with_exif(b"II*\0\x08\0\0\0\xff\xff" + bytes(range(256)) * 20)
    yield "svg.jpg", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    yield "postscript.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(/etc/passwd) (r) file\n"


def _jpeg_with_exif(tiff: bytes) -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(sound("PNG"))).save(out, "JPEG")
    body = b"Exif\0\0" + tiff
    return out.getvalue()[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + out.getvalue()[2:]
