"""Which described pictures resemble which: proposed by the gallery, decided on thumbnails, kept in the index.

A picture is compared once, when it is described, with all that were described before; what comes of it is written with
its record, for both sides. Report only: nothing here changes what is stored of a file.

`Similar` has one writer, the thread that describes; asking is for any thread.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

from .gallery import Gallery
from .imagetables import ImageTables
from .likeness import Likeness, Picture, compare_each, is_another_release
from .model import Alike, ContentKey, ImageRecord, Relation, Thumbnails

# Of the pictures that are near, so many are looked at, and so many of those laid over the new one.
_MOST_NEAR = 256
_MOST_COMPARED = 64
# A burst has thousands of frames, a form thousands of sheets: each knows these nearest ones.
_MOST_APART = 16
_ROUND = 16  # are compared together
_LOADED_AT_ONCE = 1000


class CompareEach(Protocol):
    """As `likeness.compare_each`."""

    def __call__(self, ours: Picture, others: list[Picture], *, cuts: bool) -> list[Likeness | None]: ...


class Found(NamedTuple):
    """A picture of the archive, and how it is related to the one that was asked about."""

    content: ContentKey
    likeness: Likeness


class Search:
    """Among pictures that were described: which ones resemble another one."""

    def __init__(self, picture: Callable[[ContentKey], Picture | None], compare_each: CompareEach) -> None:
        """`picture`: one that was added, None once nobody holds it any more."""
        self._picture, self._compare_each = picture, compare_each
        self.gallery = Gallery()

    def add(self, content: ContentKey, record: ImageRecord) -> None:
        self.gallery.add([(content, _hashes(record))])

    def find(self, record: ImageRecord, thumbnails: Thumbnails) -> list[Found]:
        """What is the picture itself, or resembles it; the nearest first."""
        near = list(dict.fromkeys(content for _, content in self.gallery.near(record, thumbnails, _MOST_NEAR)))
        found: list[Found] = []
        compared = apart = 0
        for start in range(0, len(near), _ROUND):
            chosen: dict[ContentKey, Picture] = {}
            for content in near[start : start + _ROUND]:
                other = self._picture(content)
                if other is None or other[0].version != record.version:
                    continue  # nobody holds it any more
                is_apart = is_another_release(record, other[0]) or (record.is_document and other[0].is_document)
                if is_apart and apart >= _MOST_APART and not _same_bytes_inside(record, other[0]):
                    continue
                if compared < _MOST_COMPARED:
                    compared += 1
                    chosen[content] = other
            likenesses = self._compare_each((record, thumbnails), list(chosen.values()), cuts=False)
            for content, likeness in zip(chosen, likenesses, strict=True):
                if likeness is None or (apart >= _MOST_APART and not likeness.relation.is_same_picture):
                    continue
                found.append(Found(content, likeness))
                apart += not likeness.relation.is_same_picture
        return sorted(found, key=_nearest_first)


class Similar:
    def __init__(self, images: ImageTables, compare_each: CompareEach = compare_each) -> None:
        self._images, self._compare_each = images, compare_each
        self._search = Search(self._picture, compare_each)
        # Described, and not in the index yet: the group that is being written.
        self._fresh: dict[ContentKey, tuple[ImageRecord, Thumbnails]] = {}
        self._loaded: int | None = None

    def load(self, version: int) -> None:
        """Take all pictures of this describing path from the index."""
        gallery = self._search.gallery
        gallery.clear()
        pictures = self._images.all_pictures()
        while some := list(itertools.islice(pictures, _LOADED_AT_ONCE)):
            gallery.add([(content, _hashes(record)) for content, record in some if record.version == version])
        self._loaded = version

    @property
    def is_loaded(self) -> bool:
        return self._loaded is not None

    def introduce(
        self, content: ContentKey, record: ImageRecord, thumbnails: Thumbnails, beside: list[ContentKey]
    ) -> list[Alike]:
        """A picture was described: compare it with all others. From now on others are compared with it.

        `beside`: contents that have something else in common with it, among which cuts are looked for.
        """
        found = self.find(record, thumbnails)
        known = {content, *(other for other, _ in found)}
        pictures = [(other, theirs) for other in beside if other not in known and (theirs := self._picture(other))]
        pictures = [(other, theirs) for other, theirs in pictures if theirs[0].version == record.version]
        likenesses = self._compare_each((record, thumbnails), [theirs for _, theirs in pictures], cuts=True)
        found += [
            Found(other, likeness)
            for (other, _), likeness in zip(pictures, likenesses, strict=True)
            if likeness is not None
        ]
        self._fresh[content] = (record, thumbnails)
        self._search.add(content, record)
        return [
            Alike(other, Relation.IDENTICAL, 0)
            if other.bytes_key == content.bytes_key
            else Alike(other, likeness.relation, likeness.distance)
            for other, likeness in found
            if other != content
        ]

    def written(self) -> None:
        """Those introduced are in the index."""
        self._fresh.clear()

    def find(self, record: ImageRecord, thumbnails: Thumbnails) -> list[Found]:
        """What the archive has of a picture, or resembles it; the nearest first."""
        return self._search.find(record, thumbnails)

    def _picture(self, content: ContentKey) -> Picture | None:
        return self._fresh.get(content) or self._images.picture(content)

    def of(self, content: ContentKey) -> list[Found]:
        """What resembles a described picture, with the evidence, the nearest first."""
        ours = self._images.picture(content)
        if ours is None:
            return []
        alikes = self._images.alike(content)
        pictures = {alike.content: theirs for alike in alikes if (theirs := self._images.picture(alike.content))}
        likenesses = dict(zip(pictures, self._compare_each(ours, list(pictures.values()), cuts=False), strict=True))
        cuts = [
            alike.content
            for alike in alikes
            if alike.relation is Relation.CROPPED and likenesses.get(alike.content, True) is None
        ]
        again = self._compare_each(ours, [pictures[each] for each in cuts], cuts=True)
        likenesses |= dict(zip(cuts, again, strict=True))
        found = []
        for alike in alikes:
            if alike.content not in pictures:
                continue
            likeness = likenesses[alike.content]
            if likeness is None or likeness.relation is not alike.relation:
                # Laying the one over the other is not quite the same as the other over the one: what was found when
                # they met stands.
                evidence = {} if likeness is None else likeness.evidence
                likeness = Likeness(alike.relation, alike.distance, evidence)
            found.append(Found(alike.content, likeness))
        return sorted(found, key=_nearest_first)

    def neighbours(self) -> Iterator[tuple[ContentKey, list[Alike]]]:
        """Every picture that resembles others, and these."""
        return self._images.all_alike()


def grouped(
    neighbours: Mapping[ContentKey, Iterable[Alike]], best_first: Iterable[ContentKey]
) -> Iterator[tuple[ContentKey, list[Alike]]]:
    """Versions of one photograph: each picture of `best_first` that is in no group yet, with those of its neighbours
    that are in none, the nearest first. A group has at least one member that is not the same bytes."""
    order = list(best_first)
    free = set(order)
    for content in order:
        if content not in free:
            continue
        members = [each for each in sorted(neighbours[content], key=alike_nearest_first) if each.content in free]
        if all(each.relation is Relation.IDENTICAL for each in members):
            continue  # copies of the same bytes in domains that do not share, or none
        free.difference_update([content, *(each.content for each in members)])
        yield content, members


def alike_nearest_first(alike: Alike) -> tuple[bool, int, int, ContentKey]:
    return not alike.relation.is_same_picture, alike.distance, list(Relation).index(alike.relation), alike.content


def _nearest_first(found: Found) -> tuple[bool, int, int, ContentKey]:
    relation = found.likeness.relation
    return not relation.is_same_picture, found.likeness.distance, list(Relation).index(relation), found.content


def _same_bytes_inside(record: ImageRecord, other: ImageRecord) -> bool:
    return bool((record.scan and record.scan == other.scan) or (record.pixels and record.pixels == other.pixels))


def _hashes(record: ImageRecord) -> list[bytes]:
    return [record.phash, *([record.trimmed_phash] if record.trimmed_phash else [])]
