"""The hashes of all described pictures, in memory, and the search for those near to a given one.

One flat array, 36 bytes a view and 18 a picture; LMDB keeps, this finds. A hash is four columns of 64 bits: what is
even in both frequencies first, so that turning or mirroring a picture leaves the first column as it is, or transposes
it, and one pass over it serves all eight forms.

One thread adds; any thread searches, by more threads where there are millions.
"""

import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import codec
from .likeness import FORMS, TURNED_RADIUS, UPRIGHT, UPRIGHT_RADIUS, form_of, hash_of, levels_of
from .model import HASH_BYTES, ContentKey, ImageRecord, Thumbnails

Columns = NDArray[np.uint64]
_Near = tuple[NDArray[Any], NDArray[np.uint16]]  # rows or pictures, and how far each is

_KEY_BYTES = 18
_PART = 1 << 16  # rows that are looked at together: they stay in the processor's cache
_WORTH_A_THREAD = 1 << 20  # rows: some 8 ms
_MOST_THREADS = 4
# Of the first column's 64 bits, this many may differ in a turned form that is near. By chance 0.2 % of all do.
_FIRST_COLUMN_RADIUS = 20


class Gallery:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._columns: Columns = np.empty((4, 1024), dtype=np.uint64)
        self._owners: NDArray[np.uint32] = np.empty(1024, dtype=np.uint32)
        self._keys = bytearray()
        self._rows = 0

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self._keys) // _KEY_BYTES

    @property
    def size_bytes(self) -> int:
        return self._columns.nbytes + self._owners.nbytes + len(self._keys)

    def add(self, pictures: list[tuple[ContentKey, list[bytes]]]) -> None:
        """Pictures, each with the hashes of its views."""
        if not pictures:
            return
        columns = columns_of([hashed for _, hashes in pictures for hashed in hashes])
        with self._lock:
            number = len(self)
            self._keys += b"".join(codec.encode_content(content) for content, _ in pictures)
            end = self._rows + columns.shape[1]
            if end > len(self._owners):
                self._grow(end)
            self._columns[:, self._rows : end] = columns
            counts = [len(hashes) for _, hashes in pictures]
            self._owners[self._rows : end] = np.repeat(np.arange(number, number + len(pictures)), counts)
            self._rows = end

    def _grow(self, least: int) -> None:
        capacity = least + least // 8 + 1024
        columns = np.empty((4, capacity), dtype=np.uint64)
        owners = np.empty(capacity, dtype=np.uint32)
        columns[:, : self._rows] = self._columns[:, : self._rows]
        owners[: self._rows] = self._owners[: self._rows]
        self._columns, self._owners = columns, owners

    def clear(self) -> None:
        with self._lock:
            self._keys.clear()
            self._rows = 0

    def near(self, record: ImageRecord, thumbnails: Thumbnails, limit: int) -> list[tuple[int, ContentKey]]:
        """Pictures with a view near to one of these views, in any of the eight forms, the nearest first."""
        with self._lock:
            columns, owners, rows = self._columns, self._owners, self._rows
        views = [(record.phash, thumbnails.full)]
        if record.trimmed_phash:
            views.append((record.trimmed_phash, thumbnails.trimmed))
        sought = [_forms(hashed, thumbnail) for hashed, thumbnail in views]

        def search(stretch: slice) -> list[_Near]:
            found = [_near_in(columns[:, stretch], *forms) for forms in sought]
            return [(owners[stretch][places], far) for places, far in found]

        stretches = _stretches(rows)
        if len(stretches) == 1:
            found = search(stretches[0])
        else:  # numpy lets go of the interpreter while it computes
            with ThreadPoolExecutor(len(stretches), thread_name_prefix="search") as pool:
                found = list(itertools.chain.from_iterable(pool.map(search, stretches)))
        owner = np.concatenate([numbers for numbers, _ in found])
        far = np.concatenate([distances for _, distances in found])
        order = np.lexsort((owner, far))
        _, first = np.unique(owner[order], return_index=True)  # of each picture its nearest view
        nearest = order[np.sort(first)[:limit]]
        return [(int(far[each]), self._content(int(owner[each]))) for each in nearest]

    def _content(self, number: int) -> ContentKey:
        return codec.decode_content(bytes(self._keys[number * _KEY_BYTES : (number + 1) * _KEY_BYTES]))


def columns_of(hashes: list[bytes]) -> Columns:
    """The four columns of these hashes, one hash a column of the result."""
    bits = np.unpackbits(np.frombuffer(b"".join(hashes), dtype=np.uint8)).reshape(-1, 16, 16)
    quarters = [bits[:, row::2, column::2].reshape(-1, 64) for row in (0, 1) for column in (0, 1)]
    packed = [np.packbits(quarter, axis=1).view(">u8").astype(np.uint64).ravel() for quarter in quarters]
    return np.stack(packed)


def _forms(hashed: bytes, thumbnail: bytes) -> tuple[list[np.uint64], list[list[list[np.uint64]]]]:
    """The upright form's columns; and those of the seven others, in two families that share a first column."""
    levels = levels_of(thumbnail)
    families: list[list[list[np.uint64]]] = [[], []]
    for form, (_, quarters) in enumerate(FORMS):
        if form != UPRIGHT:
            families[quarters % 2].append(_single(hash_of(form_of(levels, form))))
    return _single(hashed), families


def _single(hashed: bytes) -> list[np.uint64]:
    assert len(hashed) == HASH_BYTES
    return list(columns_of([hashed])[:, 0])


def _stretches(rows: int) -> list[slice]:
    """What each thread searches: all of it is one thread's where another would not pay."""
    threads = min(len(os.sched_getaffinity(0)), _MOST_THREADS, max(rows // _WORTH_A_THREAD, 1))
    bounds = [rows * number // threads for number in range(threads + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(bounds)]


def _near_in(columns: Columns, upright: list[np.uint64], families: list[list[list[np.uint64]]]) -> _Near:
    """Rows of these columns, with their distance from the nearest form; one several times if several forms are near."""
    found: list[_Near] = [(np.empty(0, dtype=np.intp), np.empty(0, dtype=np.uint16))]
    perhaps: list[list[NDArray[np.intp]]] = [[] for _ in families]  # rows that may be near in a turned form
    for start in range(0, columns.shape[1], _PART):
        part = columns[:, start : start + _PART]
        first = np.bitwise_count(part[0] ^ upright[0])
        total = first + np.bitwise_count(part[1] ^ upright[1])  # of three columns it fits into a byte
        total += np.bitwise_count(part[2] ^ upright[2])
        rows = np.flatnonzero(total <= UPRIGHT_RADIUS)
        far = total[rows].astype(np.uint16) + np.bitwise_count(part[3, rows] ^ upright[3])
        near = far <= UPRIGHT_RADIUS
        found.append((start + rows[near], far[near]))
        for number, forms in enumerate(families):
            if number:  # the transposed family has a first column of its own
                first = np.bitwise_count(part[0] ^ forms[0][0])
            perhaps[number].append(start + np.flatnonzero(first <= _FIRST_COLUMN_RADIUS))
    for forms, places in zip(families, perhaps, strict=True):
        rows = np.concatenate([np.empty(0, dtype=np.intp), *places])
        some = columns[:, rows]
        for form in forms:
            far = np.zeros(len(rows), dtype=np.uint16)
            for column in range(4):
                far += np.bitwise_count(some[column] ^ form[column])
            near = far <= TURNED_RADIUS
            found.append((rows[near], far[near]))
    return np.concatenate([rows for rows, _ in found]), np.concatenate([far for _, far in found])
