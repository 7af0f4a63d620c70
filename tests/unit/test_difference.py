"""Where two pictures differ is marked, and nowhere else, however the one was laid down."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from dedupfs import describer, difference, phash, png
from dedupfs.difference import GAP, Colours
from tests.support.photos import photographs


def picture() -> Image.Image:
    image = ImageOps.exif_transpose(Image.open(photographs(1, jpeg=True)[0])).convert("RGB")
    return image.resize((480, 360))


def changed(image: Image.Image) -> Image.Image:
    copy = image.copy()
    ImageDraw.Draw(copy).ellipse((120, 90, 200, 170), fill=(255, 0, 255))
    return copy


def looked(image: Image.Image, quality: int = 85) -> Colours:
    """As a worker sees it."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    out.seek(0)
    return phash.look(out, difference.SIDE)


def marks(one: Colours, other: Colours) -> NDArray[np.bool_]:
    """Where the third panel is red, by the pixels of the first."""
    sheet = difference.panels(one, other, *describer._laid(one, other))
    height, width = one.shape[:2]
    assert sheet.shape == (max(height, other.shape[0]), 2 * (width + GAP) + other.shape[1], 3)
    assert (sheet[:height, :width] == one).all()
    assert (sheet[: other.shape[0], width + GAP : width + GAP + other.shape[1]] == other).all()
    third = sheet[:height, -width:].astype(np.int16)
    return (third[:, :, 0] - third[:, :, 1] > 60) & (third[:, :, 0] - third[:, :, 2] > 60)


def inside_and_outside(marked: NDArray[np.bool_]) -> tuple[float, float]:
    """The share of marked pixels well inside the ellipse, and well outside of it."""
    inside, outside = marked[110:150, 140:180], marked.copy()
    outside[80:180, 110:210] = False
    return float(inside.mean()), float(outside.mean())


@pytest.mark.parametrize(
    "lay",
    [
        lambda image: image,
        lambda image: image.resize((300, 225)),
        lambda image: image.transpose(Image.Transpose.ROTATE_90),
        lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        lambda image: image.crop((24, 18, 470, 350)),
        lambda image: ImageOps.expand(image, 30, "white"),
        lambda image: ImageOps.expand(image, (100, 20, 0, 70), "black").transpose(Image.Transpose.ROTATE_180),
    ],
    ids=["as it is", "smaller", "turned", "mirrored", "cut", "with a border", "a turned screenshot"],
)
def test_what_was_changed_is_marked_and_nothing_else(lay: object) -> None:
    assert callable(lay)
    image = picture()
    inside, outside = inside_and_outside(marks(looked(image, 92), looked(lay(changed(image)), 75)))
    assert inside > 0.95
    assert outside < 0.05
    assert marks(looked(image, 92), looked(lay(image), 75)).mean() < 0.05
    # and the other way round: of the picture with the border all is told that lies in the other one
    assert marks(looked(lay(image), 75), looked(image, 92)).mean() < 0.05


def test_what_one_lacks_is_marked_from_either_side() -> None:
    image = picture()
    for one, other in ((image, changed(image)), (changed(image), image)):
        assert inside_and_outside(marks(looked(one), looked(other)))[0] > 0.95


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16", "1", "F"])
def test_pictures_of_every_kind_are_seen_in_colours(mode: str) -> None:
    out = io.BytesIO()
    source = picture().convert("L") if mode in ("I;16", "F") else picture()
    source.convert(mode).save(out, "TIFF")
    out.seek(0)
    assert phash.look(out, 100).shape == (75, 100, 3)


@given(st.integers(1, 20), st.integers(1, 20))
def test_pixels_as_a_file(width: int, height: int) -> None:
    pixels = bytes(number * 37 % 256 for number in range(3 * width * height))
    with Image.open(io.BytesIO(png.encode(width, height, pixels))) as image:
        assert (image.format, image.size, image.mode) == ("PNG", (width, height), "RGB")
        assert image.tobytes() == pixels


@pytest.mark.parametrize(("width", "height", "size"), [(0, 0, 0), (1, 1, 2), (1, 1, 4), (2, 0, 0)])
def test_what_are_no_pixels(width: int, height: int, size: int) -> None:
    with pytest.raises(ValueError):
        png.encode(width, height, bytes(size))
