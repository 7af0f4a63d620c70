"""The index: what is known about the tree, in LMDB. It holds no truth; deleting it costs time and nothing else.

`environment` knows LMDB, `codec` makes the bytes. The tables (d: dupsort, several values a key):

    table      key               value             says
    meta       b"version"        b"2"              schema version; a newer one is refused, an older one taken over
    meta       b"store"          identity          the store this index describes; another one's is not used
    meta       b"complete"       b"1"              a walk of the whole tree has finished
    meta       b"count.*"        counter           sums, see `_COUNTERS`; fsck recomputes them
    meta       b"scrub"          ScrubPass         the scrub that is under way, or the last one
    files      inode             FileRecord        the settled state of a regular file
    links    d inode             directory, name   each name of a regular file
    dirs       inode             directory, name   the one name of a directory: paths are found by walking up
    holders  d digest+collision  inode             every settled inode with this content
    sharers  d digest+collision  inode             those of them that are references or share extents
    queue      sequence          inode, path       pending work, written at a clean stop
    verified   digest+collision  Verified          when a scrub last found this content good
    damages    content, kind, inode   Damage       what a scrub found damaged, until it is good again or gone
    images, thumbnails, backlog, alike             pictures by content, see `imagetables`

Sharing is never recorded before it is done, and never unrecorded before it is undone: a record that is missing costs a
look at the file, a record too many is found wrong when it is looked at.

One thread at a time writes, through a `Batch`: changes gather in memory, readable at once by their owner, and go to
LMDB in one transaction. No file is read and nothing hashed while a write transaction is open.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Self

from . import codec
from .environment import Environment, Tables
from .errors import IndexDamaged, SourceError, UnknownFormat
from .imagetables import Described, ImageTables
from .model import ContentKey, Damage, Digest, FileRecord, FileState, Ino, Link, ScrubPass, Totals, Verified

if TYPE_CHECKING:
    from .environment import Cursor, Reading, Table, Transaction

SCHEMA_VERSION = b"2"
# Older schemas that are taken over as they are. 1 has all of this one but the tables of pictures, which begin empty.
TAKEN_OVER = (b"1",)

_COUNTERS = ("files", "logical", "plain", "references", "shared", "contents", "contents_bytes")
_LONGEST_PATH = 1 << 16
_PAGE = 64


class Index:
    """An open index. Reading is for any thread; at most one `Batch` exists at a time."""

    def __init__(self, directory: str | bytes, identity: str, *, take_over: bool = True) -> None:
        """Open or create; one of an older schema is taken over, after a copy of it was put beside it (`backup_name`).
        Without `take_over` that is refused (SourceError), and nothing is changed.

        Raises IndexDamaged when it cannot be used as it is, UnknownFormat, with nothing changed, when it is newer, and
        OSError when there is no room for the copy.
        """
        self._directory = os.fsdecode(directory)
        self.images = ImageTables(self._read, self._write)
        self._environment = Environment(self._directory)
        try:
            # Before a table is made that another schema does not have.
            self._check_identity(identity.encode(), take_over=take_over)
            self._environment.open_tables()
        except BaseException:
            self._environment.close()
            raise

    def _check_identity(self, identity: bytes, *, take_over: bool) -> None:
        with self._read() as (txn, tables):
            version, owner = (txn.get(key, db=tables.meta) for key in (b"version", b"store"))
        if version is None:
            owner = identity
        elif version in TAKEN_OVER and owner == identity:
            if not take_over:
                raise SourceError(
                    "the index is of an older version: mount the store once, or check it with --repair; either takes "
                    "it over"
                )
            self._back_up(version)
        elif version not in (SCHEMA_VERSION, *TAKEN_OVER):
            raise UnknownFormat(
                f"the index has schema {version!r}, this dedupfs knows {SCHEMA_VERSION!r}; use a newer one"
            )
        if owner != identity:
            raise IndexDamaged(
                "the index describes another store, or this one before it was copied; run dedupfs rebuild"
            )
        if version != SCHEMA_VERSION:
            with self._write() as (txn, tables):
                txn.put(b"version", SCHEMA_VERSION, db=tables.meta)
                txn.put(b"store", identity, db=tables.meta)

    def _back_up(self, version: bytes) -> None:
        """Put a copy of the index beside it before anything in it is changed. Killed anywhere, it is done again."""
        path = os.path.join(self._directory, backup_name(version))
        try:
            fd = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                self._environment.copy(fd)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(path + ".new", path)
            directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            with suppress(FileNotFoundError):
                os.unlink(path + ".new")
            raise OSError(
                error.errno,
                f"the index is of an older version, and cannot be copied before it is taken over ({error}); make room, "
                "or delete .dedupfs/index: then it is made anew",
            ) from None

    def close(self) -> None:
        self._environment.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> Reading:
        return self._environment.read()

    def _write(self) -> AbstractContextManager[tuple[Transaction, Tables]]:
        return self._environment.write()

    # -- asking -------------------------------------------------------------------------------------------------------

    def file(self, ino: Ino) -> FileRecord | None:
        with self._read() as (txn, tables):
            value = txn.get(codec.encode_ino(ino), db=tables.files)
            return None if value is None else codec.decode_file(value)

    def holders(self, content: ContentKey) -> list[Ino]:
        """Settled inodes with this content."""
        with self._read() as (txn, tables):
            return _inodes(txn, tables.holders, content)

    def iter_holders(self, content: ContentKey) -> Iterator[Ino]:
        """The same, a page and a transaction at a time: for who needs the first few of perhaps a hundred thousand."""
        key, start = codec.encode_content(content), codec.encode_ino(Ino(0))
        while True:
            with self._read() as (txn, tables), txn.cursor(tables.holders) as cursor:
                found = cursor.set_range_dup(key, start)
                page = list(itertools.islice(cursor.iternext_dup(), _PAGE)) if found else []
            inodes = [codec.decode_ino(value) for value in page]
            yield from inodes
            if len(page) < _PAGE:
                return
            start = codec.encode_ino(Ino(inodes[-1] + 1))

    def sharers(self, content: ContentKey) -> list[Ino]:
        """Those of the holders that are references, or share extents."""
        with self._read() as (txn, tables):
            return _inodes(txn, tables.sharers, content)

    def numbers(self, digest: Digest) -> list[int]:
        """The numbers that are in use with this digest."""
        with self._read() as (txn, tables), txn.cursor(tables.holders) as cursor:
            found: list[int] = []
            more = cursor.set_range(codec.encode_content(ContentKey(digest, 0)))
            while more and (content := codec.decode_content(cursor.key())).digest == digest:
                found.append(content.collision)
                more = cursor.next_nodup()
            return found

    def copies(self, content: ContentKey) -> list[ContentKey]:
        """What is in use for the same bytes, this one included."""
        named = (ContentKey(content.digest, number) for number in self.numbers(content.digest))
        return [each for each in named if each.bytes_key == content.bytes_key]

    def count_holders(self, content: ContentKey) -> int:
        with self._read() as (txn, tables), txn.cursor(tables.holders) as cursor:
            return cursor.count() if cursor.set_key(codec.encode_content(content)) else 0

    def links(self, ino: Ino) -> list[Link]:
        with self._read() as (txn, tables), txn.cursor(tables.links) as cursor:
            if not cursor.set_key(codec.encode_ino(ino)):
                return []
            return [codec.decode_link(value) for value in cursor.iternext_dup()]

    def paths(self, ino: Ino, root: Ino) -> list[bytes]:
        """The paths an inode is recorded under. The caller checks each against the tree."""
        with self._read() as (txn, tables):
            with txn.cursor(tables.links) as cursor:
                if not cursor.set_key(codec.encode_ino(ino)):
                    return []
                links = [codec.decode_link(value) for value in cursor.iternext_dup()]
            found = (_walk_up(txn, tables, link, root) for link in links)
            return [path for path in found if path is not None]

    def directory(self, ino: Ino) -> Link | None:
        with self._read() as (txn, tables):
            value = txn.get(codec.encode_ino(ino), db=tables.dirs)
            return None if value is None else codec.decode_link(value)

    def totals(self) -> Totals:
        with self._read() as (txn, tables):
            count = {name: _counter(txn, tables, name) for name in _COUNTERS}
        return Totals(
            files=count["files"],
            logical_bytes=count["logical"],
            stored_bytes=count["plain"] + count["contents_bytes"],
            references=count["references"],
            shared_files=count["shared"],
            contents_shared=count["contents"],
        )

    def is_complete(self) -> bool:
        """Whether a walk of the whole tree has ever finished: until then, what is not here may still exist."""
        with self._read() as (txn, tables):
            return txn.get(b"complete", db=tables.meta) is not None

    def all_files(self, after: Ino, limit: int) -> list[tuple[Ino, FileRecord]]:
        """Up to `limit` records of inodes above `after`, ascending: a long walk in short transactions."""
        with self._read() as (txn, tables), txn.cursor(tables.files) as cursor:
            found: list[tuple[Ino, FileRecord]] = []
            if cursor.set_range(codec.encode_ino(Ino(after + 1))):
                for key, value in cursor:
                    found.append((codec.decode_ino(key), codec.decode_file(value)))
                    if len(found) == limit:
                        break
            return found

    def all_links(self, after: Ino, limit: int) -> list[tuple[Ino, list[Link]]]:
        """Up to `limit` inodes above `after` with the names recorded for them."""
        with self._read() as (txn, tables), txn.cursor(tables.links) as cursor:
            found: list[tuple[Ino, list[Link]]] = []
            more = cursor.set_range(codec.encode_ino(Ino(after + 1)))
            while more and len(found) < limit:
                ino = codec.decode_ino(cursor.key())
                found.append((ino, [codec.decode_link(value) for value in cursor.iternext_dup()]))
                more = cursor.next_nodup()
            return found

    def all_directories(self) -> list[tuple[Ino, Link]]:
        with self._read() as (txn, tables), txn.cursor(tables.dirs) as cursor:
            return [(codec.decode_ino(key), codec.decode_link(value)) for key, value in cursor]

    def all_groups(self, after: bytes, limit: int) -> tuple[list[tuple[ContentKey, list[Ino]]], bytes]:
        """Contents and who holds them, at most `limit`, from the position `after` (b"" to begin).

        Also answers the position to go on from, b"" at the end.
        """
        with self._read() as (txn, tables), txn.cursor(tables.holders) as cursor:
            found: list[tuple[ContentKey, list[Ino]]] = []
            more = _go_to_next(cursor, after)
            while more:
                key = cursor.key()
                inodes = [codec.decode_ino(value) for value in cursor.iternext_dup()]
                found.append((codec.decode_content(key), inodes))
                if len(found) == limit:
                    return found, key
                more = cursor.next_nodup()
            return found, b""

    def all_duplicates(self, after: bytes, limit: int) -> tuple[list[tuple[ContentKey, list[Ino]]], bytes]:
        """Like `all_groups`, with the holders of all copies of the same bytes together: a few more than `limit`."""
        with self._read() as (txn, tables), txn.cursor(tables.holders) as cursor:
            found: list[tuple[ContentKey, list[Ino]]] = []
            more = _go_to_next(cursor, after)
            while more:
                digest, copies = codec.decode_content(cursor.key()).digest, dict[ContentKey, list[bytes]]()
                while more and (content := codec.decode_content(cursor.key())).digest == digest:
                    key = cursor.key()
                    copies.setdefault(content.bytes_key, []).append(key)
                    alone = cursor.count() == 1
                    more = cursor.next_nodup()
                if alone and list(copies.values()) == [[key]]:
                    continue  # as nearly all are
                for content, keys in copies.items():
                    inodes: list[Ino] = []
                    for each in keys:
                        cursor.set_key(each)
                        inodes += [codec.decode_ino(value) for value in cursor.iternext_dup()]
                    if len(inodes) > 1:
                        found.append((content, inodes))
                if len(found) >= limit:
                    return found, key
                more = cursor.set_key(key) and cursor.next_nodup()
            return found, b""

    def verified(self, content: ContentKey) -> Verified | None:
        with self._read() as (txn, tables):
            value = txn.get(codec.encode_content(content), db=tables.verified)
            return None if value is None else codec.decode_verified(value)

    def all_verified(self, after: bytes, limit: int) -> tuple[list[ContentKey], bytes]:
        """Contents that a scrub has a record of, and the position to go on from, as `all_groups`."""
        with self._read() as (txn, tables), txn.cursor(tables.verified) as cursor:
            found: list[ContentKey] = []
            if cursor.set_range(after + b"\0" if after else b"\0"):
                for key in cursor.iternext(keys=True, values=False):
                    found.append(codec.decode_content(key))
                    if len(found) == limit:
                        return found, key
            return found, b""

    def damages(self) -> list[Damage]:
        with self._read() as (txn, tables), txn.cursor(tables.damages) as cursor:
            return [codec.decode_damage(key, value) for key, value in cursor]

    def scrub_pass(self) -> ScrubPass | None:
        with self._read() as (txn, tables):
            value = txn.get(b"scrub", db=tables.meta)
            return None if value is None else codec.decode_scrub_pass(value)

    def used_share(self) -> float:
        """How much of the room that the index can have is used, 0 to 1."""
        return self._environment.used_share()

    # -- changing -----------------------------------------------------------------------------------------------------

    def batch(self) -> Batch:
        return Batch(self)

    def clear(self) -> None:
        """Forget everything."""
        with self._write() as (txn, tables):
            owner = txn.get(b"store", db=tables.meta)
            for table in tables.all():
                txn.drop(table, delete=False)
            txn.put(b"version", SCHEMA_VERSION, db=tables.meta)
            txn.put(b"store", owner or b"", db=tables.meta)

    def set_complete(self) -> None:
        with self._write() as (txn, tables):
            txn.put(b"complete", b"1", db=tables.meta)

    def set_incomplete(self) -> None:
        """The tree may hold what is not here: it is to be walked again."""
        with self._write() as (txn, tables):
            txn.delete(b"complete", db=tables.meta)

    def save_queue(self, items: list[tuple[Ino, bytes]]) -> None:
        """Replace the stored queue."""
        with self._write() as (txn, tables):
            txn.drop(tables.queue, delete=False)
            for number, (ino, path) in enumerate(items):
                txn.put(codec.encode_ino(Ino(number)), codec.encode_pending(path, ino), db=tables.queue)

    def load_queue(self) -> list[tuple[Ino, bytes]]:
        with self._read() as (txn, tables), txn.cursor(tables.queue) as cursor:
            return [codec.decode_pending(value) for _, value in cursor]


def backup_name(version: bytes) -> str:
    """What the copy of an index of an older schema is called, in its directory."""
    return f"schema-{version.decode()}.mdb"


def _inodes(txn: Transaction, table: Table, content: ContentKey) -> list[Ino]:
    with txn.cursor(table) as cursor:
        if not cursor.set_key(codec.encode_content(content)):
            return []
        return [codec.decode_ino(value) for value in cursor.iternext_dup()]


def _walk_up(txn: Transaction, tables: Tables, link: Link, root: Ino) -> bytes | None:
    parts = [link.name]
    length = len(link.name)
    while link.parent != root:
        value = txn.get(codec.encode_ino(link.parent), db=tables.dirs)
        if value is None:
            return None
        link = codec.decode_link(value)
        parts.append(link.name)
        length += len(link.name) + 1
        if length > _LONGEST_PATH:  # directories of a damaged index that contain each other
            return None
    return b"/".join(reversed(parts))


def _counter(txn: Transaction, tables: Tables, name: str) -> int:
    value = txn.get(b"count." + name.encode(), db=tables.meta)
    return 0 if value is None else codec.decode_counter(value)


def _go_to_next(cursor: Cursor, after: bytes) -> bool:
    """Put a cursor of a table with several values a key on the first key behind `after`, b"" for the first of all;
    False when there is none."""
    more = cursor.set_range(after) if after else cursor.first()
    return cursor.next_nodup() if more and after and cursor.key() == after else more


class Batch:
    """Changes that will be committed together. Its owner reads through it; nobody else sees them before `commit`."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._files: dict[Ino, FileRecord | None] = {}
        self._holders: dict[ContentKey, dict[Ino, bool]] = {}  # True: joined, False: left
        self._numbers: dict[Digest, set[int]] = {}  # collision numbers of those that somebody joined
        self._links: dict[Ino, dict[Link, bool]] = {}  # True: put, False: removed
        self._dirs: dict[Ino, Link | None] = {}
        self._described: dict[ContentKey, Described] = {}
        self.no_pictures: set[ContentKey] = set()  # contents that do not begin like one
        self.learned: set[Ino] = set()  # directories that were looked at for this batch, with all above them
        self.dereferenced: set[ContentKey] = set()  # contents that a record of a reference was dropped of
        self._scrubbed: list[tuple[str, bytes, bytes | None]] = []  # the table's name; None: removed

    def __len__(self) -> int:
        records = len(self._files) + len(self._links) + len(self._dirs)
        return records + len(self._scrubbed) + len(self._described)

    def file(self, ino: Ino) -> FileRecord | None:
        return self._files[ino] if ino in self._files else self._index.file(ino)

    def holders(self, content: ContentKey) -> list[Ino]:
        return list(self.iter_holders(content))

    def iter_holders(self, content: ContentKey) -> Iterator[Ino]:
        """Like Index.iter_holders, with the changes of this batch in view."""
        changed = self._holders.get(content, {})
        known = set()
        for ino in self._index.iter_holders(content):
            if changed.get(ino, True):
                known.add(ino)
                yield ino
        yield from [ino for ino, joined in changed.items() if joined and ino not in known]

    def sharers(self, content: ContentKey) -> list[Ino]:
        sharing = (FileState.REFERENCE, FileState.SHARED)
        return [ino for ino in self.holders(content) if (held := self.file(ino)) is not None and held.state in sharing]

    def numbers(self, digest: Digest) -> list[int]:
        """The collision numbers under which somebody holds a content with this digest, ascending."""
        numbers = self._numbers.get(digest, set()).union(self._index.numbers(digest))
        return sorted(number for number in numbers if any(self.iter_holders(ContentKey(digest, number))))

    def paths(self, ino: Ino, root: Ino) -> list[bytes]:
        """Like Index.paths, with the changes of this batch in view."""
        changed = self._links.get(ino, {})
        links = [link for link in self._index.links(ino) if changed.get(link, True)]
        links += [link for link, put in changed.items() if put and link not in links]
        found = (self._walk_up(link, root) for link in links)
        return [path for path in found if path is not None]

    def _walk_up(self, link: Link, root: Ino) -> bytes | None:
        parts = [link.name]
        length = len(link.name)
        while link.parent != root:
            up = self.directory(link.parent)
            if up is None or length > _LONGEST_PATH:
                return None
            link = up
            parts.append(link.name)
            length += len(link.name) + 1
        return b"/".join(reversed(parts))

    def put_file(self, ino: Ino, record: FileRecord) -> None:
        self._leave(ino)
        self._files[ino] = record
        self._holders.setdefault(record.content, {})[ino] = True
        self._numbers.setdefault(record.content.digest, set()).add(record.content.collision)

    def doubt_file(self, ino: Ino) -> None:
        """Drop the record of an inode whose content is to be looked at again. It keeps its names."""
        self._leave(ino)
        self._files[ino] = None

    def forget_file(self, ino: Ino) -> FileRecord | None:
        """Drop the record and all names of an inode that is gone. Answers what was known of it."""
        known = self._leave(ino)
        self._files[ino] = None
        self._links[ino] = dict.fromkeys([*self._index.links(ino), *self._links.get(ino, ())], False)
        return known

    def _leave(self, ino: Ino) -> FileRecord | None:
        known = self.file(ino)
        if known is not None:
            self._holders.setdefault(known.content, {})[ino] = False
            if known.state is FileState.REFERENCE:
                self.dereferenced.add(known.content)
        return known

    def directory(self, ino: Ino) -> Link | None:
        return self._dirs[ino] if ino in self._dirs else self._index.directory(ino)

    def put_link(self, ino: Ino, link: Link) -> None:
        self._links.setdefault(ino, {})[link] = True

    def remove_link(self, ino: Ino, link: Link) -> None:
        self._links.setdefault(ino, {})[link] = False

    def put_directory(self, ino: Ino, link: Link) -> None:
        self._dirs[ino] = link

    def forget_directory(self, ino: Ino) -> None:
        self._dirs[ino] = None
        self.learned.discard(ino)

    def put_verified(self, content: ContentKey, verified: Verified | None) -> None:
        """A scrub read a content and found it good; None: nobody has it any more."""
        value = None if verified is None else codec.encode_verified(verified)
        self._scrubbed.append(("verified", codec.encode_content(content), value))

    def put_damage(self, damage: Damage) -> None:
        self._scrubbed.append(("damages", *codec.encode_damage(damage)))

    def drop_damage(self, damage: Damage) -> None:
        self._scrubbed.append(("damages", codec.encode_damage(damage)[0], None))

    def put_scrub_pass(self, scrub: ScrubPass) -> None:
        self._scrubbed.append(("meta", b"scrub", codec.encode_scrub_pass(scrub)))

    def put_image(self, content: ContentKey, described: Described) -> None:
        """What became of a content that waited to be described."""
        self._described[content] = described

    def commit(self) -> None:
        """Write everything in one transaction. Raises IndexDamaged (a full map or disk too), with nothing changed
        or, where the disk failed at the very end, perhaps everything: to commit it again does nothing twice."""
        if not len(self):
            return
        with self._index._write() as (txn, tables):
            contents: dict[ContentKey, None] = {}  # in the order in which their files came
            for ino, record in self._files.items():
                contents.update(dict.fromkeys(self._write_file(txn, tables, ino, record)))
            self._index.images.follow(txn, tables, contents, self.no_pictures)
            for content, described in self._described.items():
                self._index.images.record(txn, tables, content, described)
            for ino, changed in self._links.items():
                key = codec.encode_ino(ino)
                for link, put in changed.items():
                    if put:
                        txn.put(key, codec.encode_link(link), db=tables.links)
                    else:
                        txn.delete(key, codec.encode_link(link), db=tables.links)
            for ino, up in self._dirs.items():
                if up is None:
                    txn.delete(codec.encode_ino(ino), db=tables.dirs)
                else:
                    txn.put(codec.encode_ino(ino), codec.encode_link(up), db=tables.dirs)
            for table, key, value in self._scrubbed:
                if value is None:
                    txn.delete(key, db=getattr(tables, table))
                else:
                    txn.put(key, value, db=getattr(tables, table))
        self._files.clear()
        self._holders.clear()
        self._numbers.clear()
        self._links.clear()
        self._dirs.clear()
        self.no_pictures.clear()
        self.learned.clear()
        self._scrubbed.clear()
        self._described.clear()

    def _write_file(self, txn: Transaction, tables: Tables, ino: Ino, record: FileRecord | None) -> list[ContentKey]:
        """Answers the contents that it had and has."""
        key = codec.encode_ino(ino)
        contents: list[ContentKey] = []
        value = txn.get(key, db=tables.files)
        if value is not None:
            before = codec.decode_file(value)
            contents.append(before.content)
            self._account(txn, tables, key, before, joins=False)
        if record is None:
            txn.delete(key, db=tables.files)
        else:
            txn.put(key, codec.encode_file(record), db=tables.files)
            self._account(txn, tables, key, record, joins=True)
            contents.append(record.content)
        return contents

    def _account(self, txn: Transaction, tables: Tables, ino: bytes, record: FileRecord, *, joins: bool) -> None:
        """Keep the tables by content, and the counters, in step with one file record that comes or goes."""
        content, size = codec.encode_content(record.content), record.stamp.size_bytes
        sign = 1 if joins else -1
        change = {"files": sign, "logical": sign * size}
        by_content = [tables.holders]
        if record.state is FileState.PLAIN:
            change["plain"] = sign * size
        else:
            by_content.append(tables.sharers)
            change["references" if record.state is FileState.REFERENCE else "shared"] = sign
            before = txn.get(content, db=tables.sharers) is not None
        for table in by_content:
            if joins:
                txn.put(content, ino, db=table)
            else:
                txn.delete(content, ino, db=table)
        if record.state is not FileState.PLAIN:
            after = txn.get(content, db=tables.sharers) is not None
            if before != after:
                change["contents"] = sign
                change["contents_bytes"] = sign * size
        for name, amount in change.items():
            total = _counter(txn, tables, name) + amount
            txn.put(b"count." + name.encode(), codec.encode_counter(total), db=tables.meta)


def recompute(index: Index) -> Totals:
    """The totals as the file records give them, to be held against the counters."""
    files = logical = plain = references = shared = 0
    contents: dict[ContentKey, int] = {}
    after = Ino(-1)
    while chunk := index.all_files(after, 1000):
        for _, (stamp, state, content) in chunk:
            files += 1
            logical += stamp.size_bytes
            if state is FileState.PLAIN:
                plain += stamp.size_bytes
                continue
            references += state is FileState.REFERENCE
            shared += state is FileState.SHARED
            contents[content] = stamp.size_bytes
        after = chunk[-1][0]
    return Totals(files, logical, plain + sum(contents.values()), references, shared, len(contents))
