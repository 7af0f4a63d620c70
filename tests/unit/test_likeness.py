"""What was done to a picture is named; what was not done to it is not; different pictures have nothing in common."""

import functools
import io
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from dedupfs import phash
from dedupfs.likeness import (
    FORMS,
    UPRIGHT,
    Likeness,
    compare,
    compare_cuts,
    distance,
    form_of,
    hash_of,
    is_another_release,
    levels_of,
)
from dedupfs.model import Relation
from dedupfs.phash import Description
from tests.support.photos import photographs
from tests.unit.test_authority import RECORD

PICTURES = 6


@functools.cache
def picture(number: int) -> Image.Image:
    image = ImageOps.exif_transpose(Image.open(photographs(PICTURES, jpeg=True)[number])).convert("RGB")
    image.thumbnail((1000, 1000))
    return image


def described(image: Image.Image, kind: str = "JPEG", **how: Any) -> Description:
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 88} | how if kind == "JPEG" else how))
    return phash.describe(out)


def between(one: Description, other: Description) -> Likeness | None:
    return compare(one.record, one.thumbnails, other.record, other.thumbnails)


def between_cuts(one: Description, other: Description) -> Likeness | None:
    there = compare_cuts(one.record, one.thumbnails, other.record, other.thumbnails)
    back = compare_cuts(other.record, other.thumbnails, one.record, one.thumbnails)
    assert (there is None) == (back is None)
    return there


def relation_of(image: Image.Image, changed: Image.Image, kind: str = "JPEG", **how: Any) -> str:
    """The same in both directions."""
    one, other = described(image, quality=95), described(changed, kind, **how)
    there, back = between(one, other), between(other, one)
    assert there is not None
    assert back is not None
    assert there.relation == back.relation
    return str(there.relation)


def cut(image: Image.Image, percent: float) -> Image.Image:
    left, top = image.width * percent / 200, image.height * percent / 200
    return image.crop((round(left), round(top), round(image.width - left), round(image.height - top)))


def blot(image: Image.Image) -> Image.Image:
    changed = image.copy()
    side = min(image.size) // 4
    box = (side, side, 2 * side, 2 * side)
    # Whatever is there, one half of it differs.
    ImageDraw.Draw(changed).rectangle(box, fill="black")
    ImageDraw.Draw(changed).rectangle((*box[:2], box[2] - side // 2, box[3]), fill="white")
    return changed


def stamp(image: Image.Image) -> Image.Image:
    """A date in small letters."""
    changed, size = image.copy(), image.height // 22
    place = (image.width - 10 * size, image.height - 2 * size)
    ImageDraw.Draw(changed).text(place, "02.01.2026 03:04", fill="yellow", font=ImageFont.load_default(size))
    return changed


WAYS: dict[str, tuple[Callable[[Image.Image], Image.Image], dict[str, Any], str]] = {
    "compressed": (lambda image: image, {"quality": 40}, "recompressed"),
    "png": (lambda image: image, {"kind": "PNG"}, "recompressed"),
    "half": (lambda image: image.resize((image.width // 2, image.height // 2)), {}, "resized"),
    "left": (lambda image: image.transpose(Image.Transpose.ROTATE_90), {}, "rotated"),
    "mirrored": (lambda image: ImageOps.mirror(image), {}, "rotated"),
    "transverse": (lambda image: image.transpose(Image.Transpose.TRANSVERSE), {}, "rotated"),
    "brighter": (lambda image: ImageEnhance.Brightness(image).enhance(1.25), {}, "tone"),
    "sharper": (lambda image: image.filter(ImageFilter.UnsharpMask(3, 150)), {}, "recompressed"),
    "stamp": (lambda image: stamp(image), {}, "annotated"),
    "darker": (lambda image: ImageEnhance.Brightness(image).enhance(0.6), {}, "tone"),
    "pale": (lambda image: ImageEnhance.Contrast(image).enhance(0.5), {}, "tone"),
    "grey": (lambda image: image.convert("L"), {}, "tone"),
    "blot": (blot, {}, "annotated"),
    "border": (lambda image: ImageOps.expand(image, image.width // 10, "white"), {}, "annotated"),
    "cut": (lambda image: cut(image, 6), {}, "cropped"),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways(way: str) -> None:
    change, how, expected = WAYS[way]
    found = [relation_of(picture(number), change(picture(number)), **how) for number in range(PICTURES)]
    # Each can be mistaken for another one now and then: a cut of sky is a border, to a program.
    assert found.count(expected) >= PICTURES - 1, found


@pytest.mark.parametrize("percent", [10, 20, 30])
def test_cuts_that_no_hash_proposes(percent: float) -> None:
    cuts = [between_cuts(described(picture(number)), described(cut(picture(number), percent))) for number in range(6)]
    found = [likeness for likeness in cuts if likeness is not None]
    assert len(found) >= PICTURES - 1
    for likeness in found:
        assert likeness.relation is Relation.CROPPED
        assert abs(likeness.evidence["cut"]["width_percent"] - (100 - percent)) <= 5
    different = itertools.combinations([described(picture(number)) for number in range(PICTURES)], 2)
    assert [between_cuts(one, other) for one, other in different] == [None] * 15


def test_different_pictures_have_nothing_in_common() -> None:
    all_of_them = [described(picture(number)) for number in range(PICTURES)]
    assert [between(one, other) for one, other in itertools.combinations(all_of_them, 2)] == [None] * 15


def test_the_same_scan_and_the_same_pixels() -> None:
    image = picture(0)
    exif = Image.Exif()
    exif[0x0131] = "Editor"
    likeness = between(described(image), described(image, exif=exif))
    assert likeness == Likeness(Relation.METADATA, 0, {"software": ["", "Editor"]})
    likeness = between(described(image, "PNG"), described(image, "TIFF"))
    assert likeness == Likeness(Relation.PIXELS, 0, {"formats": ["PNG", "TIFF"]})


def test_evidence_says_where_and_how() -> None:
    image = picture(0)
    likeness = between(described(image), described(blot(image)))
    assert likeness is not None
    places = likeness.evidence["differing"]
    assert all(12 <= place["left_percent"] <= 62 and 12 <= place["top_percent"] <= 62 for place in places)
    likeness = between(described(image), described(image.transpose(Image.Transpose.ROTATE_90).resize((300, 400))))
    assert likeness is not None
    assert likeness.evidence["form"] == "turned left"
    assert likeness.evidence["sizes"][1] == [300, 400]


@pytest.mark.parametrize(
    ("one", "other", "another"),
    [
        ("2026-01-01T00:00:00", "2026-01-01T00:00:01", True),
        ("2026-01-01T00:00:00.10", "2026-01-01T00:00:00.11", True),
        ("2026-01-01T00:00:00.10", "2026-01-01T00:00:00", False),
        ("2026-01-01T00:00:00.1", "2026-01-01T00:00:00.10", False),
        ("2026-01-01T00:00:00", "", False),
        ("", "", False),
    ],
)
def test_releases_of_the_shutter(one: str, other: str, another: bool) -> None:
    assert is_another_release(replace(RECORD, taken=one), replace(RECORD, taken=other)) == another


def test_frames_of_a_burst_are_a_sequence_and_no_duplicate() -> None:
    frames = []
    for second in ("01", "02"):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9003] = f"2026:01:01 00:00:{second}"
        frames.append(described(ImageEnhance.Brightness(picture(1)).enhance(0.9 + int(second) / 20), exif=exif))
    likeness = between(*frames)
    assert likeness is not None
    assert likeness.relation is Relation.SEQUENCE
    assert likeness.evidence["taken"] == ["2026-01-01T00:00:01", "2026-01-01T00:00:02"]


def test_two_sheets_of_a_form_are_a_template_and_no_duplicate() -> None:
    def sheet(number: int) -> Description:
        page = Image.new("RGB", (850, 1100), "white")
        draw = ImageDraw.Draw(page)
        for line in range(20):
            draw.rectangle((80, 80 + 45 * line, 300 + 23 * (line * 7 % 19), 95 + 45 * line), fill="black")
        draw.text((600, 900), str(number), fill="black")
        return described(page)

    likeness = between(sheet(1234), sheet(9876))
    assert likeness is not None
    assert likeness.relation is Relation.TEMPLATE


def test_flat_pictures_are_like_nothing() -> None:
    flat = [described(Image.new("RGB", (300, 200), (grey, grey, grey + 1))) for grey in (100, 101)]
    assert between(*flat) is None


def test_hashes_of_turned_pictures_follow_from_the_thumbnail() -> None:
    image = picture(2)
    levels = levels_of(described(image, "PNG").thumbnails.full)
    assert hash_of(levels) == described(image, "PNG").record.phash
    for form, (mirrored, quarters) in enumerate(FORMS):
        turned = ImageOps.mirror(image) if mirrored else image
        turned = turned.rotate(90 * quarters, expand=True)
        expected = described(turned, "PNG").record.phash
        assert distance(hash_of(form_of(levels, form)), expected) <= 6
        assert np.array_equal(form_of(levels, form), levels) == (form == UPRIGHT)
