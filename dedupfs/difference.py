"""A picture of two pictures: both, and where they differ, side by side. Pure; runs in a worker.

The second one is laid over the first as `likeness` finds that it fits, turned, moved and scaled where it has to be. A
place differs by as much as it lies outside of what the other one has within a few pixels of it, in the colour that
differs most, seen from either side: so the noise of a compression and an edge that is a pixel off show nothing, and a
line that one of them lacks does. Tones are not matched: who asks wants to see them.
"""

import numpy as np
from numpy.typing import NDArray

from .likeness import Floats, form_of

Colours = NDArray[np.uint8]  # height x width x 3: red, green, blue

SIDE = 800  # of a panel, at most
GAP = 16  # pixels between panels
_REACH = 2  # pixels
_VISIBLE = 16.0  # levels; less is not marked
_FULL = 64.0  # levels from which the mark is full
_MARK = np.array([220.0, 20.0, 20.0])
_OUTSIDE = np.array([150.0, 170.0, 210.0])
_FADED = 0.45  # how much of the first picture's contrast is left below the marks


Box = tuple[int, int, int, int]  # of rows and columns: first, end, first, end


def panels(one: Colours, other: Colours, boxes: tuple[Box, Box], form: int, matrix: Floats) -> Colours:
    """Three panels: `one`, `other`, and `one` faded with what differs marked red, what `other` does not show blue.

    `form` and `matrix` lay the second box, of `other`, over the first, of `one`, as `likeness.overlay` answers them.
    """
    (top, bottom, left, right), (other_top, other_bottom, other_left, other_right) = boxes
    height, width = one.shape[:2]
    # From places in all of `one` to places in its box.
    into = np.array(
        [
            [width / (right - left), 0.0, (width - left - right) / (right - left)],
            [0.0, height / (bottom - top), (height - top - bottom) / (bottom - top)],
            [0.0, 0.0, 1.0],
        ]
    )
    shown = form_of(other[other_top:other_bottom, other_left:other_right], form)
    laid, inside = _laid_over(np.ascontiguousarray(shown), (height, width), matrix @ into)
    far = np.maximum(_outside(one.astype(np.int16), laid), _outside(laid, one.astype(np.int16))).max(axis=2)
    marked = np.clip((far - _VISIBLE) / (_FULL - _VISIBLE), 0.0, 1.0)
    marked = np.where(far > _VISIBLE, 0.35 + 0.65 * marked, 0.0)[:, :, None]
    faded = 255 - (255 - one.astype(np.float64).mean(axis=2, keepdims=True)) * _FADED
    faded = np.where(inside[:, :, None], faded * (1 - marked) + _MARK * marked, 0.4 * faded + 0.6 * _OUTSIDE)
    return _beside([one, other, np.clip(faded, 0, 255).astype(np.uint8)])


def _laid_over(levels: Colours, size: tuple[int, ...], matrix: Floats) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
    """`levels` as seen through `matrix` in a frame of this size (height, width), and where that is inside of them."""
    height, width = size
    right = (np.arange(width) + 0.5)[None, :] * 2 / width - 1
    down = (np.arange(height) + 0.5)[:, None] * 2 / height - 1
    x = (matrix[0, 0] * right + matrix[0, 1] * down + matrix[0, 2] + 1) * levels.shape[1] / 2 - 0.5
    y = (matrix[1, 0] * right + matrix[1, 1] * down + matrix[1, 2] + 1) * levels.shape[0] / 2 - 0.5
    inside = (x > -1) & (x < levels.shape[1]) & (y > -1) & (y < levels.shape[0])
    x, y = np.clip(x, 0, levels.shape[1] - 1), np.clip(y, 0, levels.shape[0] - 1)
    column = np.minimum(x.astype(np.intp), max(levels.shape[1] - 2, 0))
    row = np.minimum(y.astype(np.intp), max(levels.shape[0] - 2, 0))
    next_column, next_row = np.minimum(column + 1, levels.shape[1] - 1), np.minimum(row + 1, levels.shape[0] - 1)
    across, along = (x - column)[:, :, None], (y - row)[:, :, None]
    top = levels[row, column] * (1 - across) + levels[row, next_column] * across
    bottom = levels[next_row, column] * (1 - across) + levels[next_row, next_column] * across
    return np.rint(top * (1 - along) + bottom * along).astype(np.int16), inside


def _outside(levels: NDArray[np.int16], others: NDArray[np.int16]) -> NDArray[np.int16]:
    """By how much each level lies outside of the range that the other picture has within reach."""
    height, width = levels.shape[:2]
    padded = np.pad(others, ((_REACH, _REACH), (_REACH, _REACH), (0, 0)), mode="edge")
    least, most = others.copy(), others.copy()
    for row in range(2 * _REACH + 1):
        for column in range(2 * _REACH + 1):
            shifted = padded[row : row + height, column : column + width]
            np.minimum(least, shifted, out=least)
            np.maximum(most, shifted, out=most)
    far: NDArray[np.int16] = np.maximum(np.maximum(levels - most, least - levels), 0)
    return far


def _beside(pictures: list[Colours]) -> Colours:
    height = max(picture.shape[0] for picture in pictures)
    width = sum(picture.shape[1] for picture in pictures) + GAP * (len(pictures) - 1)
    sheet = np.full((height, width, 3), 255, dtype=np.uint8)
    left = 0
    for picture in pictures:
        sheet[: picture.shape[0], left : left + picture.shape[1]] = picture
        left += picture.shape[1] + GAP
    return sheet
