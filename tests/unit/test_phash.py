"""A record says what is in the picture, however it is stored; whatever is sent, there is one error and no other."""

import io
import random
from collections.abc import Callable

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from dedupfs import phash
from dedupfs.model import ImageRecord
from tests.support import hostile
from tests.support.photos import photographs


def picture(number: int = 0) -> Image.Image:
    image = Image.open(photographs(number + 1, jpeg=True)[number])
    image.load()
    return ImageOps.exif_transpose(image).convert("RGB")


def saved(image: Image.Image, kind: str = "JPEG", **how: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def described(data: bytes) -> ImageRecord:
    return phash.describe(io.BytesIO(data)).record


def distance(one: bytes, other: bytes) -> int:
    return (int.from_bytes(one) ^ int.from_bytes(other)).bit_count()


def test_the_hash_is_the_one_of_imagehash() -> None:
    image = picture()
    record = described(saved(image, "PNG"))
    grey = image.convert("L")
    grey.thumbnail((512, 512), Image.Resampling.LANCZOS, reducing_gap=2.0)
    assert record.phash.hex() == str(imagehash.phash(grey, hash_size=16))


def test_decoding_at_a_small_scale_moves_few_bits() -> None:
    image = picture().resize((2400, 1600), Image.Resampling.BICUBIC)
    jpeg, whole = saved(image, quality=95), saved(image, "PNG")
    assert distance(described(jpeg).phash, described(whole).phash) <= 8


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP"])
def test_formats(kind: str) -> None:
    image = picture()
    record = described(saved(image, kind))
    assert (record.format, record.width, record.height) == (kind, image.width, image.height)
    assert distance(record.phash, described(saved(image, "PNG")).phash) <= 16
    assert record.version == phash.VERSION
    assert (record.quality > 0) == (kind == "JPEG")


def test_the_same_pixels_in_another_container() -> None:
    image = picture()
    digests = {described(saved(image, kind)).pixels for kind in ("PNG", "TIFF", "BMP")}
    digests.add(described(saved(image, "WEBP", lossless=True)).pixels)
    assert len(digests) == 1
    assert described(saved(image.convert("L"), "PNG")).pixels == described(saved(image.convert("L"), "TIFF")).pixels
    changed = image.copy()
    changed.putpixel((3, 3), (255, 0, 255))
    assert described(saved(changed, "PNG")).pixels not in digests


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation: int) -> None:
    image = picture().resize((400, 300))
    exif = Image.Exif()
    exif[0x0112] = orientation
    record = described(saved(image, exif=exif))
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(saved(image, exif=exif))))
    assert (record.width, record.height, record.orientation) == (shown.width, shown.height, orientation)
    assert distance(record.phash, described(saved(shown, quality=95)).phash) <= 8


def test_a_border_is_trimmed_from_the_second_view() -> None:
    image = picture()
    framed = ImageOps.expand(image, border=image.width // 5, fill="white")
    record = described(saved(framed, quality=95))
    assert record.trimmed_phash
    assert distance(record.phash, described(saved(image)).phash) > 60
    assert distance(record.trimmed_phash, described(saved(image)).phash) <= 40


def test_a_page_without_a_picture_has_no_trimmed_view() -> None:
    record = described(saved(Image.new("RGB", (300, 200), "white")))
    assert (record.trimmed_phash, record.is_flat, record.is_document) == (b"", True, True)


def test_camera_and_time() -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0110], exif[0x0131] = "Maker \0 junk", "Model", "Editor\n2"
    camera = exif.get_ifd(0x8769)
    camera[0x9003], camera[0x9291], camera[0x9011] = "2026:01:02 03:04:05", "25", "+02:00"
    camera[0xA431] = "12345"
    exif.get_ifd(0x8825)[1] = "N"
    record = described(saved(picture(), exif=exif))
    assert (record.make, record.camera, record.serial) == ("Maker", "Model", "12345")
    assert record.software == "Editor2"
    assert (record.taken, record.zone, record.has_gps) == ("2026-01-02T03:04:05.25", "+02:00", True)
    empty = described(saved(picture()))
    assert (empty.taken, empty.zone, empty.make, empty.has_gps) == ("", "", "", False)


@pytest.mark.parametrize("time", ["0000:00:00 00:00:00", "    :  :     :  :  ", "yesterday", "2026:01:02"])
def test_a_time_that_is_none(time: str) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = time
    assert described(saved(picture(), exif=exif)).taken == ""


def test_the_scan_digest_ignores_metadata_and_nothing_else() -> None:
    image = picture()
    plain = saved(image, quality=85)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    with_exif = saved(image, quality=85, exif=exif)
    scan = described(plain).scan
    assert len(scan) == 16
    assert described(with_exif).scan == scan
    assert described(plain + b"appended").scan == scan
    assert described(plain[:2] + b"\xff\xfe\0\6note" + plain[2:]).scan == scan
    assert described(saved(image, quality=84)).scan != scan
    assert described(saved(image, quality=85, progressive=True)).scan not in (scan, b"")
    changed = bytearray(plain)
    changed[-100] ^= 1
    assert described(bytes(changed)).scan != scan


@pytest.mark.parametrize("quality", [30, 50, 75, 92, 100])
def test_the_quality_of_a_jpeg(quality: int) -> None:
    assert abs(described(saved(picture(), quality=quality)).quality - quality) <= 1


@pytest.mark.parametrize(
    "convert",
    [
        lambda image: image.convert("L"),
        lambda image: image.convert("1"),
        lambda image: image.convert("P"),
        lambda image: image.convert("RGBA"),
        lambda image: image.convert("LA"),
        lambda image: Image.fromarray((np.asarray(image.convert("L")).astype(np.uint16)) * 257),
    ],
    ids=["grey", "bits", "palette", "alpha", "grey with alpha", "16 bits"],
)
def test_ways_of_storing_pixels(convert: Callable[[Image.Image], Image.Image]) -> None:
    image = picture()
    record = described(saved(convert(image), "PNG"))
    assert distance(record.phash, described(saved(image, "PNG")).phash) <= 24


def test_what_is_transparent_is_seen_over_white() -> None:
    image = picture().convert("RGBA")
    hole = Image.new("L", image.size, 255)
    ImageDraw.Draw(hole).rectangle((0, 0, image.width // 2, image.height), fill=0)
    image.putalpha(hole)
    over_white = Image.new("RGBA", image.size, "white")
    over_white.alpha_composite(image)
    assert described(saved(image, "PNG")).phash == described(saved(over_white.convert("RGB"), "PNG")).phash


def test_an_animation_is_its_first_frame() -> None:
    first, second = picture(0).resize((200, 150)), picture(1).resize((200, 150))
    animation = saved(first, "GIF", save_all=True, append_images=[second])
    assert distance(described(animation).phash, described(saved(first, "GIF")).phash) <= 8


def test_nothing_but_one_error_comes_out_of_malformed_files() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    reasons = []
    for name, data in hostile.malformed(250, seed):
        try:
            description = phash.describe(io.BytesIO(data))
        except phash.Undescribable as reason:
            reasons.append(str(reason))
        else:
            assert len(description.record.phash) == 32, name
    assert len(reasons) > 50
    assert all(reason.isprintable() and len(reason) < 100 for reason in reasons)


@pytest.mark.parametrize(
    "name", ["exif-of-nothing.jpg", "exif-in-circles.jpg", "exif-far-away.jpg", "exif-endless.jpg"]
)
def test_broken_metadata_do_not_hide_the_picture(name: str) -> None:
    data = dict(hostile.malformed(40, 0))[name]
    assert described(data).width == 240
