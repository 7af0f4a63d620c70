"""One picture: from its bytes to its record and thumbnails. The only importer of Pillow and imagehash.

Runs in a sandboxed worker and nowhere else in dedupfs: what it opens may have been made to do harm. Whatever is wrong
with a file ends in `Undescribable` with a reason for people; a file that is sound in its pixels and broken in its
metadata is described without the latter.

There is one way of decoding, and `VERSION` names it: a JPEG at the scale next above 512 pixels, everything else whole,
first frame only; grey, over white where it is transparent; squeezed to 512 pixels at most, turned as its orientation
says. The full view is all of it. The trimmed view is what is left after edge lines were dropped in which most pixels
are nearly alike: borders, and what surrounds a picture in a screenshot. The thumbnail of a view is the very square that
its perceptual hash is made of, so the hashes of its turned and mirrored forms follow from it.
"""

import functools
import io
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import imagehash
import numpy as np
import pillow_heif
from numpy.typing import NDArray
from PIL import AvifImagePlugin, ExifTags, Image, ImageFile, UnidentifiedImageError, features
from PIL import __version__ as _pillow_version

from . import raw
from .digest import StreamDigest
from .model import DESCRIBING_PATH, THUMBNAIL_SIDE, ImageRecord, Thumbnails

# Hashes drift when Pillow decodes or resizes differently; its releases with a new first number are the ones to expect
# that of.
VERSION = DESCRIBING_PATH << 16 | int(_pillow_version.split(".", maxsplit=1)[0])

FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "HEIF", *(("AVIF",) if features.check("avif") else ()))
RAW = "RAW"  # in a record: a camera's raw file, of which the preview was described

pillow_heif.register_heif_opener()
# A worker has one processor's time; and threads only where the sandbox can tell them from processes. HEIC wants one.
pillow_heif.options.DECODE_THREADS = 0
AvifImagePlugin.DEFAULT_MAX_THREADS = 1

_VIEW_SIDE = 512
_HASH_SIDE = 16
# An error from Pillow at twice that; phones make 108 and 200 megapixels, as JPEG, which is decoded at a small scale.
_MOST_PIXELS = 125_000_000
_MOST_PIXELS_DECODED_WHOLE = 120_000_000
_JPEGS = ("JPEG", "MPO")
_LOSSLESS = ("PNG", "BMP", "GIF", "TIFF", "WEBP")

_EVEN_LINE = 0.72  # the share of a line's pixels that have to be
_EVEN_LEVELS = 10  # this near to the line's median, for the line to be border
_WORDS_LINES, _WORDS_WITHIN = 0.08, 0.25  # of all lines: so many, so near to the edge
_SMALLEST_TRIMMED = 0.3  # of a side; beyond, what is left says little
_WHITE = 225

_LONGEST_TEXT = 64
_TIME = re.compile(r"(\d{4})[:-](\d\d)[:-](\d\d)[ T](\d\d):(\d\d):(\d\d)")
_ZONE = re.compile(r"[+-]\d\d:\d\d")

# What Pillow and the libraries below it raise on files that are broken, or were made to break them.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    struct.error,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    ArithmeticError,
    EOFError,
    AssertionError,
    RuntimeError,
)

# The sum of the luminance table in annex K of the JPEG standard, of which the tables of libjpeg are multiples.
_STANDARD_LUMINANCE_SUM = 3688

# JPEG markers: all but those inside entropy-coded data
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_EOI, _SOS = 0xD9, 0xDA
# Frames, tables and scans; APP14 says what the colours mean.
_DECIDING = frozenset((*range(0xC0, 0xD0), _SOS, 0xDB, 0xDC, 0xDD, 0xEE))
_LONGEST_SCAN_BYTES = 256 << 20

Image.MAX_IMAGE_PIXELS = _MOST_PIXELS
ImageFile.LOAD_TRUNCATED_IMAGES = False

Grey = NDArray[np.uint8]
Colours = NDArray[np.uint8]  # height x width x 3: red, green, blue


class Undescribable(Exception):
    """The file is no picture that can be described; `str()` says why."""


class Description(NamedTuple):
    record: ImageRecord
    thumbnails: Thumbnails


def describe(file: BinaryIO) -> Description:
    """Describe the picture in `file`, which is read from its start. Raises Undescribable, and nothing else."""
    with _only_undescribable():
        return _describe(file)


def look(file: BinaryIO, side: int) -> Colours:
    """The picture in `file` in colours as it is shown, no side longer than `side` pixels. Raises Undescribable, and
    nothing else."""
    with _only_undescribable(), _opened(file) as (image, exif, _):
        facts = _Facts(exif)
        if image.format in _JPEGS:
            image.draft("RGB", (side, side))
        image.load()
        shown = _in_colours(image)
        shown.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
        return np.asarray(_upright(shown, facts.orientation), dtype=np.uint8)


def thumbnail_of(colours: Colours) -> bytes:
    """The full view of a picture, as `describe` makes it, of what `look` answered."""
    return _square(Image.fromarray(colours).convert("L")).tobytes()


@contextmanager
def _only_undescribable() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata, sizes below the limit: both expected
            yield
    except Undescribable:
        raise
    except UnidentifiedImageError:
        raise Undescribable("damaged, or of a kind that is not known") from None
    except Image.DecompressionBombError:
        raise Undescribable("more pixels than are decoded") from None
    except MemoryError:
        raise Undescribable("needs more memory than is allowed") from None
    except _BROKEN as error:
        raise Undescribable(f"damaged: {_text(str(error)) or type(error).__name__}") from None


class _Opened(NamedTuple):
    image: Image.Image  # of a raw file, its preview
    exif: Callable[[], Image.Exif]
    raw: raw.Preview | None


@contextmanager
def _opened(file: BinaryIO) -> Iterator[_Opened]:
    preview = raw.preview(file)
    if preview is not None and not preview.jpeg:
        raise Undescribable("a raw file without a preview that is known")
    readable = file if preview is None else io.BytesIO(preview.jpeg)
    with Image.open(readable, formats=FORMATS if preview is None else _JPEGS) as image:
        width, height = image.size
        if not width or not height:
            raise Undescribable("has no pixels")
        if image.format not in _JPEGS and width * height > _MOST_PIXELS_DECODED_WHOLE:
            raise Undescribable(f"{width} x {height} pixels are more than are decoded")
        yield _Opened(image, image.getexif if preview is None else functools.partial(_exif_of_raw, file), preview)


def _exif_of_raw(file: BinaryIO) -> Image.Exif:
    """Of the photograph: what the preview says of itself is not asked."""
    exif = Image.Exif()
    file.seek(0)
    exif.load_from_fp(file)
    return exif


def _describe(file: BinaryIO) -> Description:
    with _opened(file) as (image, exif, preview):
        kind = "JPEG" if image.format in _JPEGS else str(image.format)
        width, height = image.size
        if preview is not None:
            kind, width, height = RAW, preview.width, preview.height
        is_grey = image.mode in ("1", "L", "LA", "I", "I;16", "F")
        quality = _quality(image) if kind == "JPEG" else 0
        facts = _Facts(exif)
        if image.format in _JPEGS:
            image.draft("L", (_VIEW_SIDE, _VIEW_SIDE))
        image.load()
        pixels = _digest_of_pixels(image, facts.orientation) if kind in _LOSSLESS else b""
        view = _view(image, facts.orientation)
    if facts.orientation >= 5:
        width, height = height, width
    levels = np.asarray(view, dtype=np.uint8)
    trimmed = _trimmed(levels)
    full_square = _square(view)
    trimmed_square = None if trimmed is None else _square(Image.fromarray(trimmed))
    record = ImageRecord(
        version=VERSION,
        format=kind,
        width=width,
        height=height,
        orientation=facts.orientation,
        phash=_phash(full_square),
        trimmed_phash=b"" if trimmed_square is None else _phash(trimmed_square),
        scan=_digest_of_scan(file) if kind == "JPEG" else b"",
        pixels=pixels,
        quality=quality,
        contrast=min(round(float(levels.std()) * 10), 0xFFFF),
        bright_permille=round(float((levels > _WHITE).mean()) * 1000),
        is_grey=is_grey,
        taken=facts.taken,
        zone=facts.zone,
        make=facts.make,
        camera=facts.camera,
        serial=facts.serial,
        software=facts.software,
        has_gps=facts.has_gps,
    )
    return Description(
        record, Thumbnails(full_square.tobytes(), b"" if trimmed_square is None else trimmed_square.tobytes())
    )


def warm_up() -> None:
    """Load what is loaded on first use, for who is about to lose the filesystem."""
    Image.init()
    image = Image.linear_gradient("L")
    _phash(_square(image))
    _trimmed(np.asarray(image))
    image.getexif().get_ifd(ExifTags.IFD.Exif)


# -- views ------------------------------------------------------------------------------------------------------------


def _view(image: Image.Image, orientation: int) -> Image.Image:
    """The picture as it is shown: grey, upright, no side longer than `_VIEW_SIDE`."""
    grey = _grey(image)
    grey.thumbnail((_VIEW_SIDE, _VIEW_SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return _upright(grey, orientation)


def _grey(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        levels = np.asarray(image).astype(np.float64)
        most = 65535.0 if image.mode.startswith("I;16") or levels.max() > 255 else 255.0
        if image.mode == "F" and levels.max() <= 1:
            most = 1.0
        return Image.fromarray(np.clip(np.nan_to_num(levels) * (255 / most), 0, 255).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        # What is transparent is seen over paper.
        under = Image.new("RGBA", image.size, "white")
        under.alpha_composite(image)
        return under.convert("L")
    return image.convert("L") if image.mode != "L" else image.copy()


def _in_colours(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _grey(image).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        under = Image.new("RGBA", image.size, "white")
        under.alpha_composite(image)
        return under.convert("RGB")
    return image.convert("RGB")


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _square(image: Image.Image) -> Grey:
    side = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    return np.asarray(image.resize(side, Image.Resampling.LANCZOS), dtype=np.uint8)


def _phash(square: Grey) -> bytes:
    bits = imagehash.phash(Image.fromarray(square), hash_size=_HASH_SIDE).hash
    return np.packbits(bits.ravel()).tobytes()


def without_border(colours: Colours) -> tuple[int, int, int, int] | None:
    """Which rows (first, end) and columns of a picture are the trimmed view, None where that is none."""
    return _inner(np.asarray(Image.fromarray(colours).convert("L"), dtype=np.uint8))


def _trimmed(levels: Grey) -> Grey | None:
    """What is left without even lines at the edges, None when that is all of it, or next to nothing."""
    inner = _inner(levels)
    return None if inner is None else np.ascontiguousarray(levels[inner[0] : inner[1], inner[2] : inner[3]])


def _inner(levels: Grey) -> tuple[int, int, int, int] | None:
    top, bottom, left, right = 0, levels.shape[0], 0, levels.shape[1]
    for _ in range(2):  # a border at the sides hides one at the top, and the other way round
        first, last = _uneven_range(levels[top:bottom, left:right])
        top, bottom = top + first, top + last
        if bottom <= top:
            return None
        first, last = _uneven_range(levels[top:bottom, left:right].T)
        left, right = left + first, left + last
        if right <= left:
            return None
    if (top, bottom, left, right) == (0, levels.shape[0], 0, levels.shape[1]):
        return None
    if min((bottom - top) / levels.shape[0], (right - left) / levels.shape[1]) < _SMALLEST_TRIMMED:
        return None
    if bottom - top < 8 or right - left < 8:
        return None
    return top, bottom, left, right


def _uneven_range(lines: Grey) -> tuple[int, int]:
    """The range of lines from the first to the last one that is not even; (0, 0) when all are. A few uneven ones with
    even ones behind them do not count at either end: they are the words of a caption."""
    middle = np.partition(lines, lines.shape[1] // 2, axis=1)[:, lines.shape[1] // 2]
    near = np.abs(lines.astype(np.int16) - middle[:, None].astype(np.int16)) <= _EVEN_LEVELS
    uneven = np.flatnonzero(near.mean(axis=1) < _EVEN_LINE)
    runs = np.split(uneven, np.flatnonzero(np.diff(uneven) > 1) + 1)
    few = max(_WORDS_LINES * len(lines), 1)
    while len(runs) > 1 and len(runs[0]) <= few and runs[0][-1] < _WORDS_WITHIN * len(lines):
        runs.pop(0)
    while len(runs) > 1 and len(runs[-1]) <= few and runs[-1][0] >= (1 - _WORDS_WITHIN) * len(lines):
        runs.pop()
    return (int(runs[0][0]), int(runs[-1][-1]) + 1) if len(uneven) else (0, 0)


# -- digests ----------------------------------------------------------------------------------------------------------


def _digest_of_pixels(image: Image.Image, orientation: int) -> bytes:
    """Of the decoded pixels as they are shown, in a form that does not depend on how the format stores them."""
    if image.mode in ("1", "L"):
        plain = image.convert("L")
    elif image.mode.startswith("I;16") or image.mode in ("I", "F", "CMYK", "LAB", "HSV", "YCbCr"):
        plain = image
    else:
        alpha = image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info
        plain = image.convert("RGBA" if alpha else "RGB")
    plain = _upright(plain, orientation)
    if plain.mode == "RGBA" and plain.getchannel("A").getextrema() == (255, 255):
        plain = plain.convert("RGB")
    if plain.mode == "RGB":
        red, green, blue = plain.split()
        if red.tobytes() == green.tobytes() == blue.tobytes():
            plain = red
    head = f"{plain.mode} {plain.width} {plain.height} ".encode()
    digest = StreamDigest()
    digest.update(head, 0)
    data = plain.tobytes()
    digest.update(data, len(head))
    return digest.digest_of(len(head) + len(data)) or b""


def _digest_of_scan(file: BinaryIO) -> bytes:
    """Of all that decides the pixels of a JPEG: tables, frame, and scans to the end of the picture. b"" if it cannot be
    followed. What lies outside (EXIF, thumbnails, profiles, comments, anything appended) does not count."""
    if file.seek(0, io.SEEK_END) > _LONGEST_SCAN_BYTES:
        return b""
    file.seek(0)
    data = file.read()
    digest, length = StreamDigest(), 0
    position, in_scan, scans = 2, False, 0
    while (found := _MARKER.search(data, position)) is not None:
        kind = data[found.end() - 1]
        kept = data[position : found.start()] if in_scan else b""
        if kind == _EOI:
            digest.update(kept, length)
            return (digest.digest_of(length + len(kept)) or b"") if scans else b""
        position = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
        if position > len(data) or position < found.end() + 2:
            break
        if kind in _DECIDING:
            kept += data[found.start() : position]
        digest.update(kept, length)
        length += len(kept)
        in_scan = kind == _SOS
        scans += in_scan
    return b""


def _quality(image: Image.Image) -> int:
    """Which of libjpeg's qualities has quantisation tables of this coarseness."""
    tables: dict[int, list[int]] = getattr(image, "quantization", {})
    if not tables:
        return 0
    scale = 100 * sum(tables[min(tables)]) / _STANDARD_LUMINANCE_SUM
    quality = 100 - scale / 2 if scale <= 100 else 5000 / scale
    return min(max(round(quality), 1), 100)


# -- metadata ---------------------------------------------------------------------------------------------------------


class _Facts:
    """What EXIF says, as far as it can be read."""

    def __init__(self, read: Callable[[], Image.Exif]) -> None:
        self.orientation = 1
        self.taken = self.zone = self.make = self.camera = self.serial = self.software = ""
        self.has_gps = False
        try:
            exif = read()
            self._read_main(exif)
            self._read_camera(exif)
        except (*_BROKEN, MemoryError):
            pass

    def _read_main(self, exif: Image.Exif) -> None:
        orientation = exif.get(ExifTags.Base.Orientation)
        if isinstance(orientation, int) and 1 <= orientation <= 8:
            self.orientation = orientation
        self.make = _text(exif.get(ExifTags.Base.Make))
        self.camera = _text(exif.get(ExifTags.Base.Model))
        self.software = _text(exif.get(ExifTags.Base.Software))
        self.has_gps = ExifTags.IFD.GPSInfo in exif

    def _read_camera(self, exif: Image.Exif) -> None:
        camera = exif.get_ifd(ExifTags.IFD.Exif)
        self.serial = _text(camera.get(ExifTags.Base.BodySerialNumber))
        taken = _TIME.fullmatch(_text(camera.get(ExifTags.Base.DateTimeOriginal)))
        if taken is None or taken[1] == "0000":
            return
        year, month, day, hour, minute, second = taken.groups()
        self.taken = f"{year}-{month}-{day}T{hour}:{minute}:{second}"
        fraction = _text(camera.get(ExifTags.Base.SubsecTimeOriginal))
        if fraction.isdecimal() and fraction.isascii():
            self.taken += f".{fraction[:9]}"
        zone = _text(camera.get(ExifTags.Base.OffsetTimeOriginal))
        self.zone = zone if _ZONE.fullmatch(zone) else ""


def _text(value: object) -> str:
    """A text of somebody else's in one short line of characters that can be shown."""
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if not isinstance(value, str):
        return ""
    shown = "".join(character for character in value.partition("\0")[0] if character.isprintable())
    return " ".join(shown.split())[:_LONGEST_TEXT]
