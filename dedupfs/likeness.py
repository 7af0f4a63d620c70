"""How alike two described pictures are, and how one became the other: numbers from records and thumbnails. Pure.

A hash proposes: it is near to another one among millions for less than one picture in a million that has nothing to do
with it. Thumbnails decide: the one is laid over the other (moved, scaled, turned by a few degrees, sheared), what is
smooth is taken from both, and what is left has to agree, in the whole or nearly everywhere. The way from one to the
other is then named by the first of these that was needed: turning or mirroring; removing a border; cutting; covering
a region; changing tones; changing size; nothing but compressing anew.

What is decided from records alone comes first: the same scan, the same pixels. Two releases of a shutter are a sequence
however alike, and sheets of one form a template.
"""

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .model import THUMBNAIL_SIDE, ImageRecord, Relation, Thumbnails

Floats = NDArray[np.float64]
Bits = NDArray[np.bool_]

# Nearest views: what is proposed. Distinct photographs lie 127 ± 8 bits apart.
UPRIGHT_RADIUS = 84
TURNED_RADIUS = 64
_WHOLE_RADIUS = 64  # pictures of which one has a border that the other has not are further apart, as a rule

_NEAR_BITS = 24
_SAME_BLOCKS, _SAME_NCC = 0.8, 0.9  # up to _NEAR_BITS: either
_EDITED_NCC, _EDITED_BLOCKS = 0.8, 0.7  # beyond: either

_HASH_SIDE = 16
_SIDE = THUMBNAIL_SIDE
_BLOCK = 8
_BLOCKS = _SIDE // _BLOCK

# The eight ways to lay a square, by what has to be done to the first picture to see the second: mirror left and right
# or not, then turn anticlockwise by so many quarters.
FORMS = tuple((mirrored, quarters) for mirrored in (False, True) for quarters in range(4))
UPRIGHT = 0
_FORM_WORDS = (
    "upright",
    "turned left",
    "upside down",
    "turned right",
    "mirrored",
    "mirrored and turned left",
    "mirrored and upside down",
    "mirrored and turned right",
)

_EDITORS = ("photoshop", "gimp", "lightroom", "snapseed", "pixlr", "paint", "affinity", "darktable", "canva", "picasa")


@dataclass(frozen=True, slots=True)
class Likeness:
    relation: Relation
    distance: int  # bits between the nearest views
    evidence: dict[str, Any] = field(default_factory=dict)


# -- hashes -----------------------------------------------------------------------------------------------------------


def form_of(levels: NDArray[Any], form: int) -> NDArray[Any]:
    mirrored, quarters = FORMS[form]
    return np.rot90(levels[:, ::-1] if mirrored else levels, quarters)


def levels_of(thumbnail: bytes) -> Floats:
    return np.frombuffer(thumbnail, dtype=np.uint8).reshape(_SIDE, _SIDE).astype(np.float64)


def hash_of(levels: Floats) -> bytes:
    """The perceptual hash of a thumbnail, as `phash` makes it of the picture."""
    cosines = _cosines()
    low = cosines @ levels @ cosines.T
    return np.packbits((low > np.median(low)).ravel()).tobytes()


@functools.cache
def _cosines() -> Floats:
    frequency, place = np.mgrid[0:_HASH_SIDE, 0:_SIDE]
    found: Floats = np.cos(np.pi * frequency * (2 * place + 1) / (2 * _SIDE))
    return found


def distance(one: bytes, other: bytes) -> int:
    return (int.from_bytes(one) ^ int.from_bytes(other)).bit_count()


# -- comparing --------------------------------------------------------------------------------------------------------


def compare(
    record: ImageRecord, thumbnails: Thumbnails, other: ImageRecord, other_thumbnails: Thumbnails
) -> Likeness | None:
    """How `other` is related to the picture of `record`; None when nothing is to be said of the two.

    Never called with records of different versions.
    """
    if record.scan and record.scan == other.scan:
        return Likeness(Relation.METADATA, distance(record.phash, other.phash), _differing_facts(record, other))
    if record.pixels and record.pixels == other.pixels:
        return Likeness(Relation.PIXELS, 0, {"formats": [record.format, other.format]})
    if record.is_flat or other.is_flat:
        return None
    seen = _best_view(record, thumbnails, other, other_thumbnails)
    if seen is None:
        return None
    evidence = seen.evidence()
    if record.is_document and other.is_document:
        return Likeness(Relation.TEMPLATE, seen.distance, evidence)
    if is_another_release(record, other):
        return Likeness(Relation.SEQUENCE, seen.distance, evidence | {"taken": [record.taken, other.taken]})
    relation = _name(record, other, seen, evidence)
    if (record.width, record.height) != (other.width, other.height):
        evidence["sizes"] = [[record.width, record.height], [other.width, other.height]]
    if record.format != other.format:
        evidence["formats"] = [record.format, other.format]
    if record.quality and other.quality and record.quality != other.quality:
        evidence["qualities"] = [record.quality, other.quality]
    return Likeness(relation, seen.distance, evidence)


Picture = tuple[ImageRecord, Thumbnails]


def compare_each(ours: Picture, others: list[Picture], *, cuts: bool) -> list[Likeness | None]:
    """One with each of several, by `compare_cuts` or `compare`. A few milliseconds a picture, with the interpreter
    held."""
    by = compare_cuts if cuts else compare
    return [by(*ours, *other) for other in others]


def compare_cuts(
    record: ImageRecord, thumbnails: Thumbnails, other: ImageRecord, other_thumbnails: Thumbnails
) -> Likeness | None:
    """Whether one of the two is a cut of the other that is too small for their hashes to be near.

    For pictures that have something else in common, a folder, say: among millions it would find what is not there.
    """
    if record.is_flat or other.is_flat or record.is_document or other.is_document:
        return None
    ours, theirs = levels_of(thumbnails.full), levels_of(other_thumbnails.full)
    found = _cut_of(ours, theirs) or _cut_of(theirs, ours)
    if found is None:
        return None
    evidence = found.evidence()
    far = distance(record.phash, other.phash)
    if is_another_release(record, other):
        return Likeness(Relation.SEQUENCE, far, evidence | {"taken": [record.taken, other.taken]})
    evidence["sizes"] = [[record.width, record.height], [other.width, other.height]]
    return Likeness(Relation.CROPPED, far, evidence)


def overlay(ours: bytes, theirs: bytes) -> tuple[int, Floats] | None:
    """How to lay the first of two views (thumbnails) over the second: in which of the FORMS, and the map from places in
    `theirs` to places in that form of `ours`, both from -1 to 1. None where they agree in no way that is found."""
    our_levels, their_levels = levels_of(ours), levels_of(theirs)
    wanted = hash_of(their_levels)
    forms = [form_of(our_levels, form) for form in range(len(FORMS))]
    far = [distance(hash_of(levels), wanted) for levels in forms]
    nearest = sorted(range(len(FORMS)), key=lambda form: (far[form] > UPRIGHT_RADIUS, form != UPRIGHT, far[form]))
    for form in (form for form in nearest if far[form] <= (UPRIGHT_RADIUS if form == UPRIGHT else TURNED_RADIUS)):
        view = _overlay(forms[form], their_levels, far[form], form, (False, False))
        if _agrees(view):
            return form, view.matrix
    if (cut := _cut_of(our_levels, their_levels)) is not None:
        return UPRIGHT, cut.matrix
    if (cut := _cut_of(their_levels, our_levels)) is not None:
        whole = np.linalg.inv(np.vstack([cut.matrix, [0.0, 0.0, 1.0]]))
        return UPRIGHT, whole[:2]
    return None


def is_another_release(record: ImageRecord, other: ImageRecord) -> bool:
    """Whether the camera says that its shutter was released twice. Times that are equal as far as both go are one."""
    if not record.taken or not other.taken:
        return False
    precision = min(len(record.taken), len(other.taken))
    return record.taken[:precision] != other.taken[:precision]


def is_edited(record: ImageRecord) -> bool:
    """Whether a program for editing pictures says that it wrote this one."""
    return any(editor in record.software.lower() for editor in _EDITORS)


def _differing_facts(record: ImageRecord, other: ImageRecord) -> dict[str, Any]:
    names = ("orientation", "taken", "zone", "make", "camera", "serial", "software", "has_gps")
    return {
        name: [getattr(record, name), getattr(other, name)]
        for name in names
        if getattr(record, name) != getattr(other, name)
    }


@dataclass(frozen=True, slots=True)
class _View:
    """The best way found to lay one picture over the other."""

    distance: int
    form: int
    trimmed: tuple[bool, bool]  # which of the two without its border
    ncc: float
    blocks: float
    matrix: Floats  # 2 x 3, from places in `other` to places in the picture, both from -1 to 1
    differing: list[tuple[int, int]] = field(default_factory=list)  # row and column of blocks
    tone: float = 0.0  # by how much levels changed where nothing else did, in the mean

    @property
    def score(self) -> float:
        return max(self.ncc, self.blocks)

    @property
    def is_moved(self) -> bool:
        """Whether more than a pixel or so of the thumbnail had to be given."""
        corners = np.array([[-1, -1, 1], [1, -1, 1], [-1, 1, 1], [1, 1, 1]], dtype=np.float64).T
        shift = self.matrix @ corners - corners[:2]
        return float(np.abs(shift).max()) > _MOVED

    def evidence(self) -> dict[str, Any]:
        found: dict[str, Any] = {"ncc": round(self.ncc, 3), "blocks": round(self.blocks, 3)}
        if self.form != UPRIGHT:
            found["form"] = _FORM_WORDS[self.form]
        if any(self.trimmed):
            found["without_border"] = list(self.trimmed)
        if self.is_moved:
            width, height = np.abs(self.matrix[0, 0]), np.abs(self.matrix[1, 1])
            found["cut"] = {
                "width_percent": round(100 * float(width)),
                "height_percent": round(100 * float(height)),
                "degrees": round(float(np.degrees(np.arctan2(self.matrix[1, 0], self.matrix[0, 0]))), 1),
            }
        if self.differing:
            found["differing"] = [
                {"left_percent": round(100 * column / _BLOCKS), "top_percent": round(100 * row / _BLOCKS)}
                for row, column in self.differing[:16]
            ]
            found["differing_percent"] = round(100 * len(self.differing) / _BLOCKS**2)
        if self.tone > 1:
            found["levels_changed"] = round(self.tone, 1)
        return found


_MOVED = 0.012  # of half a side


def _best_view(
    record: ImageRecord, thumbnails: Thumbnails, other: ImageRecord, other_thumbnails: Thumbnails
) -> _View | None:
    """The nearest of the views of the two that are near enough and agree."""
    ours = [(False, record.phash, thumbnails.full)]
    theirs = [(False, other.phash, other_thumbnails.full)]
    if record.trimmed_phash:
        ours.append((True, record.trimmed_phash, thumbnails.trimmed))
    if other.trimmed_phash:
        theirs.append((True, other.trimmed_phash, other_thumbnails.trimmed))
    proposals: list[tuple[int, int, bool, bool, Floats, Floats]] = []
    for our_trim, our_hash, our_thumbnail in ours:
        our_levels = levels_of(our_thumbnail)
        for form in range(len(FORMS)):
            levels = our_levels if form == UPRIGHT else form_of(our_levels, form)
            hashed = our_hash if form == UPRIGHT else hash_of(levels)
            for their_trim, their_hash, their_thumbnail in theirs:
                far = distance(hashed, their_hash)
                if far <= (UPRIGHT_RADIUS if form == UPRIGHT else TURNED_RADIUS):
                    proposals.append((far, form, our_trim, their_trim, levels, levels_of(their_thumbnail)))
    proposals.sort(key=lambda proposal: (proposal[0] + 8 * (proposal[2] or proposal[3]), proposal[1:4]))
    best: _View | None = None
    compared = None
    for far, form, our_trim, their_trim, levels, their_levels in proposals[:4]:
        view = _overlay(levels, their_levels, far, form, (our_trim, their_trim))
        if _agrees(view) and (best is None or view.score > best.score + 0.02):
            best, compared = view, (levels, their_levels)
            if far <= _NEAR_BITS:
                break
    if best is None or compared is None:
        return None
    if best.form == UPRIGHT and all(best.trimmed) and best.is_moved:
        # What looks like a border, sky, say, is in both: a border that was added leaves the rest where it is.
        far, levels, their_levels = distance(record.phash, other.phash), levels_of(ours[0][2]), levels_of(theirs[0][2])
        whole = _overlay(levels, their_levels, far, UPRIGHT, (False, False))
        if far <= _WHOLE_RADIUS and _agrees(whole):
            best, compared = whole, (levels, their_levels)
    return _looked_closer(best, *compared)


def _agrees(view: _View) -> bool:
    if view.distance <= _NEAR_BITS:
        return view.blocks >= _SAME_BLOCKS or view.ncc >= _SAME_NCC
    return view.ncc >= _EDITED_NCC or view.blocks >= _EDITED_BLOCKS


def _name(record: ImageRecord, other: ImageRecord, seen: _View, evidence: dict[str, Any]) -> Relation:
    if seen.form != UPRIGHT:
        return Relation.ROTATED
    if any(seen.trimmed):  # the whole views would have been taken if they agreed as well
        return Relation.ANNOTATED
    if seen.is_moved:
        return Relation.CROPPED
    if seen.differing:
        return Relation.ANNOTATED
    if record.is_grey != other.is_grey:
        evidence["colours"] = [not record.is_grey, not other.is_grey]
        return Relation.TONE
    if seen.tone > _TONE:
        return Relation.TONE
    if (record.width, record.height) != (other.width, other.height):
        return Relation.RESIZED
    return Relation.RECOMPRESSED


_TONE = 4.0  # levels


# -- overlaying -------------------------------------------------------------------------------------------------------

_STEPS = ((3.0, 8), (1.2, 8))  # how much both are blurred, how many steps are made then
_LEAST_OVERLAP = 0.4
_MOVING_PAYS = 0.6  # at most this part of what disagrees is left
_TEXTURED = 2.5  # standard deviation of a block that has something to compare, in levels
_BLOCK_NCC = 0.7
_CURVE_POINTS = 16
_PATCH_SIGMA = 1.5
# Once tones are matched, in the mean over a patch; as many times one level and what _USUAL of the pixels of that grey,
# and of the greys next to it, stay below, which counts up to _MOST_USUAL levels.
_DIFFERENT = 3.25
_USUAL, _MOST_USUAL = 0.75, 8.0


_CUT_SCALES = (0.95, 0.9, 0.8, 0.7)
_CUT_PLACES = 5  # along each side
_CUT_SIDE = 16
_CUT_PROPOSED = 0.5  # correlation of what is laid side by side coarsely
_CUT_NCC, _CUT_BLOCKS = 0.8, 0.7  # both


def _cut_of(whole: Floats, part: Floats) -> _View | None:
    """Where in `whole` the picture `part` is, if it is."""
    windows, maps = _windows(whole - _blurred(whole, 6.0))
    (wanted,) = _normalised((_coarse() @ (part - _blurred(part, 6.0)) @ _coarse().T).reshape(1, -1))
    scores = windows @ wanted
    best = int(scores.argmax())
    if scores[best] < _CUT_PROPOSED:
        return None
    matrix = _align(whole, part, maps[best])
    moved, inside = _warp(whole, matrix)
    ncc, blocks = _agreement(moved, part, inside)
    if ncc < _CUT_NCC or blocks < _CUT_BLOCKS:
        return None
    return _View(0, UPRIGHT, (False, False), ncc, blocks, matrix)


def _windows(levels: Floats) -> tuple[Floats, list[Floats]]:
    """Coarse views through windows of each size and place, each a row; and their maps."""
    views, maps = [], []
    for scale, weights, places in _window_weights():
        rows = weights @ levels
        views.append((rows[:, None] @ weights.swapaxes(1, 2)[None]).reshape(-1, _CUT_SIDE * _CUT_SIDE))
        maps += [np.array([[scale, 0, right], [0, scale, down]]) for down in places for right in places]
    return _normalised(np.concatenate(views)), maps


def _normalised(rows: Floats) -> Floats:
    centred: Floats = rows - rows.mean(axis=1, keepdims=True)
    centred /= np.sqrt((centred**2).sum(axis=1, keepdims=True)) + 1e-9
    return centred


@functools.cache
def _window_weights() -> list[tuple[float, Floats, list[float]]]:
    """Of each scale: matrices that see the lines of a thumbnail through each window, and the windows' centres."""
    found = []
    for scale in _CUT_SCALES:
        places = [float(place) for place in np.linspace(scale - 1, 1 - scale, _CUT_PLACES)]
        found.append((scale, np.stack([_line_weights(scale, place) for place in places]), places))
    return found


@functools.cache
def _coarse() -> Floats:
    return _line_weights(1.0, 0.0)


def _line_weights(scale: float, centre: float) -> Floats:
    """A matrix that reduces what is within `scale` of `centre` (both from -1 to 1) to `_CUT_SIDE` values."""
    wanted = centre + scale * ((np.arange(_CUT_SIDE) + 0.5) * 2 / _CUT_SIDE - 1)
    there = (np.arange(_SIDE) + 0.5) * 2 / _SIDE - 1
    weights: Floats = np.exp(-((wanted[:, None] - there[None, :]) ** 2) / (2 * (scale / _CUT_SIDE) ** 2))
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


def _overlay(ours: Floats, theirs: Floats, far: int, form: int, trimmed: tuple[bool, bool]) -> _View:
    matrix = _align(ours, theirs, IDENTITY)
    moved, inside = _warp(ours, matrix)
    upright, all_inside = ours, np.ones_like(inside)
    ncc, blocks = _agreement(moved, theirs, inside)
    plain_ncc, plain_blocks = _agreement(upright, theirs, all_inside)
    # Moving has to pay: noise moves everything a little.
    if 1 - ncc > _MOVING_PAYS * (1 - plain_ncc) or blocks < plain_blocks:
        matrix, moved, inside, ncc, blocks = IDENTITY, upright, all_inside, plain_ncc, plain_blocks
    return _View(far, form, trimmed, ncc, blocks, matrix)


def _looked_closer(view: _View, ours: Floats, theirs: Floats) -> _View:
    """With the places where the two differ, and by how much tones do. As dear as laying the one over the other."""
    moved, inside = (ours, np.ones(ours.shape, dtype=np.bool_)) if view.matrix is IDENTITY else _warp(ours, view.matrix)
    expected = _with_tones_of(moved, theirs, inside)
    differing = _differing_blocks(moved, theirs, expected, inside)
    tone = float(np.abs(expected - moved)[inside].mean()) if inside.any() else 0.0
    return replace(view, differing=differing, tone=tone)


IDENTITY: Floats = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


@functools.cache
def _places() -> tuple[Floats, Floats]:
    line = (np.arange(_SIDE) + 0.5) * 2 / _SIDE - 1
    down, right = np.meshgrid(line, line, indexing="ij")
    return right.ravel(), down.ravel()


@functools.cache
def _blur(sigma: float) -> Floats:
    """A matrix that blurs the columns of what is to its right; at the edges over what is there."""
    place = np.arange(_SIDE)
    weights: Floats = np.exp(-((place[:, None] - place[None, :]) ** 2) / (2 * sigma * sigma))
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


def _blurred(levels: Floats, sigma: float) -> Floats:
    return _blur(sigma) @ levels @ _blur(sigma).T


def _warp(levels: Floats, matrix: Floats) -> tuple[Floats, Bits]:
    """`levels` as seen through `matrix`, and where that is inside of them; between pixels, linear."""
    right, down = _places()
    x = (matrix[0, 0] * right + matrix[0, 1] * down + matrix[0, 2] + 1) * _SIDE / 2 - 0.5
    y = (matrix[1, 0] * right + matrix[1, 1] * down + matrix[1, 2] + 1) * _SIDE / 2 - 0.5
    inside = (x > -0.75) & (x < _SIDE - 0.25) & (y > -0.75) & (y < _SIDE - 0.25)
    x, y = np.clip(x, 0, _SIDE - 1.001), np.clip(y, 0, _SIDE - 1.001)
    column, row = x.astype(np.intp), y.astype(np.intp)
    x -= column
    y -= row
    flat = levels.ravel()
    first = row * _SIDE + column
    top = flat[first] * (1 - x) + flat[first + 1] * x
    bottom = flat[first + _SIDE] * (1 - x) + flat[first + _SIDE + 1] * x
    return (top * (1 - y) + bottom * y).reshape(_SIDE, _SIDE), inside.reshape(_SIDE, _SIDE)


def _align(ours: Floats, theirs: Floats, start: Floats) -> Floats:
    """The affine map near `start` under which `ours` fits `theirs` best, by Gauss and Newton on blurred levels,
    whatever their brightness and contrast; the identity when there is no overlap to speak of."""
    matrix = start.copy()
    right, down = _places()
    for sigma, steps in _STEPS:
        target = _blurred(theirs, sigma) - _blurred(theirs, 4 * sigma)
        source = _blurred(ours, sigma) - _blurred(ours, 4 * sigma)
        scale = target.std() or 1.0
        for _ in range(steps):
            moved, inside = _warp(source, matrix)
            if inside.mean() < _LEAST_OVERLAP:
                return IDENTITY
            spread = moved[inside].std()
            if spread < 1e-6:
                return IDENTITY
            moved = moved * (scale / spread)
            slope_down, slope_right = np.gradient(moved, 2 / _SIDE)
            mask = inside.ravel()
            gx, gy = slope_right.ravel()[mask], slope_down.ravel()[mask]
            x, y = right[mask], down[mask]
            jacobian = np.stack([gx * x, gx * y, gx, gy * x, gy * y, gy])
            error = (target - moved).ravel()[mask]
            # What an overlay disturbs should not pull: far errors count less.
            weight = 1 / (1 + (error / (scale + 1e-9)) ** 2)
            weighted = jacobian * weight
            normal = weighted @ jacobian.T
            normal[np.diag_indices(6)] *= 1.001
            try:
                step = np.linalg.solve(normal + np.eye(6) * 1e-9, weighted @ error)
            except np.linalg.LinAlgError:
                return IDENTITY
            # The step was made in the frame of the warped picture: put it before the map.
            change = np.array([[1 + step[0], step[1], step[2]], [step[3], 1 + step[4], step[5]], [0, 0, 1]])
            matrix = matrix @ change
            if np.abs(step).max() < 5e-4:
                break
        size = matrix[:, :2]
        if not np.isfinite(matrix).all() or not 0.4 < abs(float(np.linalg.det(size))) < 2.5:
            return IDENTITY
    return matrix


def _agreement(moved: Floats, theirs: Floats, inside: Bits) -> tuple[float, float]:
    """Correlation of the fine structure, and the share of textured blocks that correlate."""
    if inside.mean() < _LEAST_OVERLAP:
        return 0.0, 0.0
    one, other = moved - _blurred(moved, 3.0), theirs - _blurred(theirs, 3.0)
    ncc = _correlation(one[inside], other[inside])
    blocks_one, blocks_other, blocks_inside = _in_blocks(one), _in_blocks(other), _in_blocks(inside)
    whole = blocks_inside.all(axis=1)
    one_c = blocks_one - blocks_one.mean(axis=1, keepdims=True)
    other_c = blocks_other - blocks_other.mean(axis=1, keepdims=True)
    one_norm, other_norm = np.sqrt((one_c**2).mean(axis=1)), np.sqrt((other_c**2).mean(axis=1))
    textured = whole & (np.maximum(one_norm, other_norm) > _TEXTURED)
    if textured.sum() < 8:
        return ncc, 0.0
    correlation = (one_c * other_c).mean(axis=1) / (one_norm * other_norm + 1e-9)
    return ncc, float((correlation[textured] > _BLOCK_NCC).mean())


def _in_blocks(levels: NDArray[Any]) -> NDArray[Any]:
    return levels.reshape(_BLOCKS, _BLOCK, _BLOCKS, _BLOCK).swapaxes(1, 2).reshape(_BLOCKS * _BLOCKS, _BLOCK * _BLOCK)


def _correlation(one: Floats, other: Floats) -> float:
    one, other = one - one.mean(), other - other.mean()
    norm = float(np.sqrt((one @ one) * (other @ other)))
    return float(one @ other) / norm if norm > 1e-9 else 0.0


def _with_tones_of(moved: Floats, theirs: Floats, inside: Bits) -> Floats:
    """`moved`, its levels changed as they would have to be for the two to agree: by the curve through the medians of
    `theirs` over levels of `moved` that lie near each other, which small overlays do not bend."""
    levels = moved[inside]
    if len(levels) < _SIDE:
        return moved
    parts, _ = _parts(levels)
    places, values = np.median(levels[parts], axis=1), np.median(theirs[inside][parts], axis=1)
    # On to the darkest and the brightest pixels in a straight line.
    first, last = _slope(places[:2], values[:2]), _slope(places[-2:], values[-2:])
    places = np.concatenate([[places[0] - 256], places, [places[-1] + 256]])
    values = np.concatenate([[values[0] - 256 * first], values, [values[-1] + 256 * last]])
    curve: Floats = np.clip(np.interp(moved, places, values), 0, 255)
    return curve


def _slope(places: Floats, values: Floats) -> float:
    run = float(places[1] - places[0])
    return min(max(float(values[1] - values[0]) / run, 0.0), 3.0) if run > 1 else 1.0


def _differing_blocks(ours: Floats, theirs: Floats, expected: Floats, inside: Bits) -> list[tuple[int, int]]:
    """Blocks in which the two are not the same picture, where most others are. `expected`: `ours` in tones of `theirs`.

    What became white, or black, in one of them is lost to it, and looks as if something were laid over the other one;
    from this one to that nothing is lost. So a place differs only if it does both ways. With signs, since what is
    sharper in one than in the other is as much brighter as it is darker, near by.
    """
    there = _beyond(ours, theirs - expected, inside)
    back = _beyond(theirs, ours - _with_tones_of(theirs, ours, inside), inside)
    patches = np.abs(_blurred(np.where(np.abs(there) < np.abs(back), there, -back), _PATCH_SIGMA))
    return sorted({(int(row) // _BLOCK, int(column) // _BLOCK) for row, column in np.argwhere(patches > _DIFFERENT)})


def _beyond(levels: Floats, difference: Floats, inside: Bits) -> Floats:
    """By how many times of what is usual there, and one level, the two differ at each place; 0 outside.

    What is usual depends on `levels`: where one channel of a colour is full, that colour does not become brighter with
    the others of its grey. A large overlay of one grey is not usual.
    """
    found = np.zeros_like(difference)
    if np.count_nonzero(inside) < _SIDE:
        return found
    parts, rest = _parts(levels[inside])
    differences = difference[inside]
    rank = int(_USUAL * parts.shape[1])
    usual = np.partition(np.abs(differences[parts]), rank, axis=1)[:, rank]
    around = np.maximum(usual, np.maximum(np.append(usual[1:], 0), np.append(0, usual[:-1])))
    scale = 1 + np.minimum(around, _MOST_USUAL)
    differences[parts] /= scale[:, None]
    differences[rest] /= scale[-1]
    found[inside] = differences
    return found


def _parts(levels: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Which are the darkest, the next, and so on, in rows of the same length; and the few brightest that are left."""
    order = np.argsort(levels, kind="stable")
    even = len(order) // _CURVE_POINTS * _CURVE_POINTS
    return order[:even].reshape(_CURVE_POINTS, -1), order[even:]
