"""The index's tables of pictures. `index` owns them, opens the transactions, and calls what keeps them in step.

    table       key               value             says
    images      digest+collision  image entry       of every content that somebody holds: waiting, described, why not
    thumbnails  digest+collision  thumbnails        the views of those described
    backlog     sequence          digest+collision  those that wait; the highest sequence came last and is next
    alike     d digest+collision  Alike             which described pictures resemble it; both have the other one

Pictures are described once a content, not once a file. A content comes into `images`, waiting, in the transaction that
records its first file, and leaves all tables with its last: so the backlog survives whatever happens. `meta` has
`described`, the version of the describing path that every entry is of, absent while some may be of another one; those
are put back into the backlog, behind everything that is new.

Reading is for any thread. Writing is done inside a Batch's transaction, or under the lock that makes one.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from . import codec
from .model import Alike, ContentKey, ImageEntry, ImageRecord, ImageState, ImageTotals, Thumbnails

Transaction = Any  # lmdb's, which `index` alone imports
Table = Any


class Tables(Protocol):
    """Handles, good for the transaction that they come with."""

    meta: Table
    holders: Table
    images: Table
    thumbnails: Table
    backlog: Table
    alike: Table


Begin = Callable[[], AbstractContextManager[tuple[Transaction, Tables]]]

_FIRST_SEQUENCE = 1 << 62  # old ones are put back below it
_VERSION = b"described"
_COUNTED = {ImageState.DESCRIBED: b"count.described", ImageState.UNDESCRIBABLE: b"count.undescribable"}


@dataclass(frozen=True, slots=True)
class Described:
    """What became of one content that waited."""

    entry: ImageEntry
    thumbnails: Thumbnails | None = None
    alike: list[Alike] = field(default_factory=list)


class ImageTables:
    def __init__(self, reading: Begin, writing: Begin) -> None:
        self._read, self._write = reading, writing

    # -- asking -------------------------------------------------------------------------------------------------------

    def entry(self, content: ContentKey) -> ImageEntry | None:
        """None for a content that nobody holds."""
        with self._read() as (txn, tables):
            value = txn.get(codec.encode_content(content), db=tables.images)
            return None if value is None else codec.decode_image_entry(value)

    def is_new(self, content: ContentKey) -> bool:
        """Whether a content waits because it came, not to be described again."""
        entry = self.entry(content)
        return entry is not None and entry.state is ImageState.WAITING and entry.sequence >= _FIRST_SEQUENCE

    def picture(self, content: ContentKey) -> tuple[ImageRecord, Thumbnails] | None:
        """A described picture and its views."""
        key = codec.encode_content(content)
        with self._read() as (txn, tables):
            entry, views = txn.get(key, db=tables.images), txn.get(key, db=tables.thumbnails)
            if entry is None or views is None:
                return None
            record = codec.decode_image_entry(entry).record
            return None if record is None else (record, codec.decode_thumbnails(views))

    def alike(self, content: ContentKey) -> list[Alike]:
        with self._read() as (txn, tables), txn.cursor(tables.alike) as cursor:
            if not cursor.set_key(codec.encode_content(content)):
                return []
            return [codec.decode_alike(value) for value in cursor.iternext_dup()]

    def waiting(self, limit: int) -> list[ContentKey]:
        """The contents that are to be described next, the newest first."""
        with self._read() as (txn, tables), txn.cursor(tables.backlog) as cursor:
            values = itertools.islice(cursor.iterprev(keys=False, values=True), limit)
            return [codec.decode_content(value) for value in values]

    def totals(self) -> ImageTotals:
        with self._read() as (txn, tables):
            return ImageTotals(
                described=self._counter(txn, tables, ImageState.DESCRIBED),
                waiting=txn.stat(tables.backlog)["entries"],
                undescribable=self._counter(txn, tables, ImageState.UNDESCRIBABLE),
            )

    def all_pictures(self) -> Iterator[tuple[ContentKey, ImageRecord]]:
        """Every described picture, in short transactions."""
        for page in self._pages():
            for key, value in page:
                if codec.decode_image_state(value) is ImageState.DESCRIBED:
                    record = codec.decode_image_entry(value).record
                    assert record is not None
                    yield codec.decode_content(key), record

    def all_undescribable(self) -> Iterator[tuple[ContentKey, str]]:
        for page in self._pages():
            for key, value in page:
                if codec.decode_image_state(value) is ImageState.UNDESCRIBABLE:
                    yield codec.decode_content(key), codec.decode_image_entry(value).reason

    def all_alike(self) -> Iterator[tuple[ContentKey, list[Alike]]]:
        """Every picture that resembles others, with these; in short transactions."""
        position: bytes | None = b""
        while position is not None:
            found: list[tuple[ContentKey, list[Alike]]] = []
            with self._read() as (txn, tables), txn.cursor(tables.alike) as cursor:
                more = cursor.set_range(position + b"\0") if position else cursor.first()
                position = None
                while more:
                    key = bytes(cursor.key())
                    found.append((codec.decode_content(key), [codec.decode_alike(v) for v in cursor.iternext_dup()]))
                    if len(found) == 500:
                        position = key
                        break
                    more = cursor.next_nodup()
            yield from found

    def _pages(self) -> Iterator[list[tuple[bytes, bytes]]]:
        position = b""
        while True:
            with self._read() as (txn, tables), txn.cursor(tables.images) as cursor:
                more = cursor.set_range(position + b"\0") if position else cursor.first()
                page = list(itertools.islice(cursor.iternext(), 1000)) if more else []
            if not page:
                return
            yield page
            position = page[-1][0]

    def described_by(self) -> int | None:
        """The version of the describing path that all entries are of; None when they may be of several."""
        with self._read() as (txn, tables):
            value = txn.get(_VERSION, db=tables.meta)
            return None if value is None else codec.decode_sequence(value)

    def _counter(self, txn: Transaction, tables: Tables, state: ImageState) -> int:
        value = txn.get(_COUNTED[state], db=tables.meta)
        return 0 if value is None else codec.decode_counter(value)

    # -- changing: inside the transaction of a batch ------------------------------------------------------------------

    def follow(
        self, txn: Transaction, tables: Tables, contents: Iterable[ContentKey], no_pictures: Collection[ContentKey]
    ) -> None:
        """Files with these contents came or went: who has none any more goes, who has the first one waits, unless it is
        known to be no picture."""
        for content in contents:
            key = codec.encode_content(content)
            held = txn.get(key, db=tables.holders) is not None
            known = txn.get(key, db=tables.images)
            if held and known is None and content in no_pictures:
                txn.put(key, codec.encode_image_entry(ImageEntry(ImageState.NO_PICTURE)), db=tables.images)
            elif held and known is None:
                self._put_into_backlog(txn, tables, key, newest=True)
            elif not held and known is not None:
                self._leave(txn, tables, content, known)
                txn.delete(key, db=tables.images)

    def record(self, txn: Transaction, tables: Tables, content: ContentKey, described: Described) -> None:
        """Put what became of a content in the place of what was known of it, unless nobody holds it any more."""
        key = codec.encode_content(content)
        known = txn.get(key, db=tables.images)
        if known is None:
            return
        self._leave(txn, tables, content, known)
        txn.put(key, codec.encode_image_entry(described.entry), db=tables.images)
        self._count(txn, tables, described.entry.state, 1)
        if described.thumbnails is not None:
            txn.put(key, codec.encode_thumbnails(described.thumbnails), db=tables.thumbnails)
        for other in described.alike:
            other_key = codec.encode_content(other.content)
            value = txn.get(other_key, db=tables.images)
            if value is not None and codec.decode_image_state(value) is ImageState.DESCRIBED:
                txn.put(key, codec.encode_alike(other), db=tables.alike)
                txn.put(other_key, codec.encode_alike(other._replace(content=content)), db=tables.alike)

    def _leave(self, txn: Transaction, tables: Tables, content: ContentKey, known: bytes) -> None:
        """Take back whatever goes with an entry that is replaced or removed."""
        key, state = codec.encode_content(content), codec.decode_image_state(known)
        if state is ImageState.WAITING:
            txn.delete(codec.encode_sequence(codec.decode_image_entry(known).sequence), db=tables.backlog)
            return
        self._count(txn, tables, state, -1)
        if state is not ImageState.DESCRIBED:
            return
        txn.delete(key, db=tables.thumbnails)
        with txn.cursor(tables.alike) as cursor:
            others = [codec.decode_alike(value) for value in cursor.iternext_dup()] if cursor.set_key(key) else []
        for other in others:
            mirrored = codec.encode_alike(other._replace(content=content))
            txn.delete(codec.encode_content(other.content), mirrored, db=tables.alike)
        if others:
            txn.delete(key, db=tables.alike)

    def _put_into_backlog(self, txn: Transaction, tables: Tables, key: bytes, *, newest: bool) -> None:
        with txn.cursor(tables.backlog) as cursor:
            found = cursor.last() if newest else cursor.first()
            nearest = codec.decode_sequence(cursor.key()) if found else _FIRST_SEQUENCE
            sequence = max(nearest + 1, _FIRST_SEQUENCE) if newest else min(nearest, _FIRST_SEQUENCE) - 1
        entry = ImageEntry(ImageState.WAITING, sequence=sequence)
        txn.put(key, codec.encode_image_entry(entry), db=tables.images)
        txn.put(codec.encode_sequence(sequence), key, db=tables.backlog)

    def _count(self, txn: Transaction, tables: Tables, state: ImageState, amount: int) -> None:
        if state in _COUNTED:
            total = self._counter(txn, tables, state) + amount
            txn.put(_COUNTED[state], codec.encode_counter(total), db=tables.meta)

    # -- changing: under the lock that makes batches ------------------------------------------------------------------

    def put_back(self, position: bytes, limit: int) -> bytes:
        """Have the next `limit` contents described again, from `position` (b"" to begin). Answers where to go on, b""
        at the end."""
        with self._write() as (txn, tables):
            if not position:
                txn.delete(_VERSION, db=tables.meta)
            with txn.cursor(tables.holders) as cursor:
                more = cursor.set_range(position + b"\0") if position else cursor.first()
                keys: list[bytes] = []
                while more and len(keys) < limit:
                    keys.append(bytes(cursor.key()))
                    more = cursor.next_nodup()
            for key in keys:
                known = txn.get(key, db=tables.images)
                if known is not None and codec.decode_image_state(known) is ImageState.WAITING:
                    continue
                if known is not None:
                    self._leave(txn, tables, codec.decode_content(key), known)
                self._put_into_backlog(txn, tables, key, newest=False)
            return keys[-1] if len(keys) == limit else b""

    def set_described_by(self, version: int) -> None:
        with self._write() as (txn, tables):
            txn.put(_VERSION, codec.encode_sequence(version), db=tables.meta)

    # -- checking -----------------------------------------------------------------------------------------------------

    def problems(self) -> Iterator[str]:
        """Where the tables disagree, for fsck. Nobody changes them meanwhile."""
        found = dict.fromkeys(ImageState, 0)
        mirrored = pairs = 0
        with self._read() as (txn, tables):
            held = {bytes(key) for key in txn.cursor(tables.holders).iternext_nodup(keys=True, values=False)}
            for key, value in txn.cursor(tables.images):
                state = codec.decode_image_state(value)
                found[state] += 1
                if key not in held:
                    yield f"content {key.hex()} is known as a picture, and nobody has it"
                held.discard(key)
                if state is ImageState.WAITING:
                    place = codec.encode_sequence(codec.decode_image_entry(value).sequence)
                    if txn.get(place, db=tables.backlog) != key:
                        yield f"content {key.hex()} waits to be described, and is not in the backlog"
                if (state is ImageState.DESCRIBED) != (txn.get(key, db=tables.thumbnails) is not None):
                    yield f"content {key.hex()} has thumbnails without a record, or the other way round"
            for key, value in txn.cursor(tables.alike):
                pairs += 1
                other = codec.decode_alike(value)
                back = codec.encode_alike(other._replace(content=codec.decode_content(key)))
                with txn.cursor(tables.alike) as cursor:
                    mirrored += cursor.set_key_dup(codec.encode_content(other.content), back)
            waiting = txn.stat(tables.backlog)["entries"]
            thumbnails = txn.stat(tables.thumbnails)["entries"]
            complete = txn.get(_VERSION, db=tables.meta) is not None
        if complete and held:
            yield f"{len(held)} contents are not known as pictures or anything else"
        if mirrored != pairs:
            yield f"of {pairs} likenesses {pairs - mirrored} are known to one side only"
        counted = ImageTotals(found[ImageState.DESCRIBED], found[ImageState.WAITING], found[ImageState.UNDESCRIBABLE])
        if (totals := self.totals()) != counted or waiting != counted.waiting or thumbnails != counted.described:
            yield f"the index says {totals} of its pictures, and has {counted}"
