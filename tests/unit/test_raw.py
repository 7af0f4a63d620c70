"""The preview of a raw file is what is described of it, and a file that only claims to be one does no harm."""

import io
import random
import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from dedupfs import phash, raw
from dedupfs.model import ImageRecord
from tests.support import hostile, raws
from tests.support.photos import photographs


def picture() -> Image.Image:
    return ImageOps.exif_transpose(Image.open(photographs(1, jpeg=True)[0])).convert("RGB").resize((900, 600))


def described(data: bytes) -> ImageRecord:
    return phash.describe(io.BytesIO(data)).record


def distance(one: bytes, other: bytes) -> int:
    return (int.from_bytes(one) ^ int.from_bytes(other)).bit_count()


@pytest.mark.parametrize("kind", raws.ALL)
def test_the_preview_is_described(kind: str) -> None:
    image = picture()
    record = described(raws.ALL[kind](image))
    out = io.BytesIO()
    image.save(out, "PNG")
    assert distance(record.phash, described(out.getvalue()).phash) <= 8
    assert (record.format, record.width, record.height, record.orientation) == ("RAW", 6000, 4000, 1)
    assert (record.taken, record.make, record.camera) == ("2026-01-02T03:04:05.25", "Maker", "Model")
    assert (record.scan, record.pixels, record.quality) == (b"", b"", 0)


@pytest.mark.parametrize("kind", raws.ALL)
def test_it_is_upright_as_the_raw_file_says(kind: str) -> None:
    """And not as its preview says, in which there is something else."""
    image = picture()
    record = described(raws.ALL[kind](image, orientation=6))
    upright = described(raws.ALL[kind](image.transpose(Image.Transpose.ROTATE_270)))
    assert (record.width, record.height, record.orientation) == (4000, 6000, 6)
    assert distance(record.phash, upright.phash) <= 8
    assert phash.look(io.BytesIO(raws.ALL[kind](image, orientation=6)), 300).shape[:2] == (300, 200)


def test_without_a_preview_it_is_not_described() -> None:
    with pytest.raises(phash.Undescribable, match="without a preview"):
        described(raws.dng(picture(), with_preview=False))


def test_other_tiffs_are_none() -> None:
    for data in (hostile.sound("TIFF"), hostile.sound("JPEG"), b"", b"II*\0", b"MM\0*\0\0\0\x08", b"II*\0CR\2\0\0\0"):
        found = raw.preview(io.BytesIO(data))
        assert found is None or not found.jpeg


def test_pointers_that_lead_in_a_circle() -> None:
    circle = b"II*\0" + struct.pack("<I", 8) + struct.pack("<HHHIII", 1, 0x14A, 4, 1, 8, 8)
    assert raw.preview(io.BytesIO(circle)) is None
    fan = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 400) + struct.pack("<HHII", 0x14A, 4, 60, 8) * 400
    assert raw.preview(io.BytesIO(fan)) is None


@given(st.sampled_from(sorted(raws.ALL)), st.randoms(use_true_random=False))
def test_damage_ends_in_a_record_or_a_reason(kind: str, noise: random.Random) -> None:
    data = bytearray(_SMALL[kind])
    for _ in range(noise.choice((1, 4, 30))):
        start = noise.randrange(len(data) - 4)
        data[start : start + 4] = noise.choice((noise.randbytes(4), b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\0\0\x08"))
    del data[noise.randrange(len(data)) :]
    with suppress(phash.Undescribable):  # and nothing else
        assert described(bytes(data)).width > 0


_SMALL = {kind: make(Image.linear_gradient("L").convert("RGB").resize((60, 40))) for kind, make in raws.ALL.items()}
# Damage belongs where something is: most of these are zeros of a sensor.
_SMALL = {kind: data.replace(bytes(40_000), b"") for kind, data in _SMALL.items()}
