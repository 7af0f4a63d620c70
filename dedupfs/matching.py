"""One closed file: what it contains, who else has that, and sharing it with them.

A digest proposes, bytes decide: a file is put under a content only after it was compared with a file or the blob that
stands for that content. Equal digests with different bytes mean that one of the two is not what was hashed (then it is
found out which, and a damaged blob is healed by the good copy), or a collision (then the file gets the next number).

Where domains are kept apart, the files of each that have a content share a copy of it: a number of its own, with its
own blob (see `ContentKey`). Whose copy one is, is what those say that share it.
"""

import itertools
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple, Protocol

from .backing import Backing
from .blobs import Blobs
from .digest import DescriptorHasher, same_bytes
from .errors import DamagedContent, StoreError
from .index import Batch
from .journal import Recording
from .magic import HEAD_BYTES, looks_like_picture
from .model import COLLISIONS, UNKNOWN_PATH, ContentKey, Digest, FileRecord, FileState, Ino, Stamp
from .openfiles import InUse, Key, OpenFiles
from .rules import EVERYTHING, SharingRules
from .sharing import Changed, ReferenceSharing, Settled, Sharing
from .store import is_in_another

log = logging.getLogger(__name__)

# A change within the same tick of the kernel's clock as the one we recorded would leave the stamp as it is. Up to 10 ms
# where HZ is 100; newer kernels give finer times to a file that was looked at.
_TICK_NS = 20_000_000

# What the kernel has open of a file in passthrough it closes a moment after the app, and after we were told. Only where
# something was written lately is that waited for: of those that are open around the mount there may be a thousand.
_LETTING_GO_S = 0.2
_LATELY_NS = 10 * 10**9

# A file with longer holes (a sparse image, or a mistake) would be hashed for hours, and hides nothing worth sharing.
_MOST_HOLE_BYTES = 1 << 40


# Of those that share a content, so many are asked for their domain.
_ASKED = 100


class Looked(NamedTuple):
    """What became of a file."""

    size_bytes: int  # of what was looked at
    duplicate: ContentKey | None = None  # its content, if others had that, and it was not known to be this file's


NOTHING = Looked(0)


class Records(Protocol):
    """What both an index and a batch of it answer."""

    def file(self, ino: Ino) -> FileRecord | None: ...
    def iter_holders(self, content: ContentKey) -> Iterator[Ino]: ...
    def paths(self, ino: Ino, root: Ino) -> list[bytes]: ...


def domains_of(records: Records, rules: SharingRules, content: ContentKey, root: Ino) -> set[bytes | None]:
    """The domains of the files that share this content; of many, of the first ones. None among them stands for a file
    whose path is not known."""
    found: set[bytes | None] = set()
    held = ((ino, records.file(ino)) for ino in records.iter_holders(content))
    sharers = (ino for ino, record in held if record is not None and record.state is not FileState.PLAIN)
    for ino in itertools.islice(sharers, _ASKED):
        found.update([rules.domain_of(path) for path in records.paths(ino, root)] or [None])
    return found


class Matcher:
    """Settles one file at a time; the settler's thread calls it."""

    def __init__(
        self,
        backing: Backing,
        blobs: Blobs,
        openfiles: OpenFiles,
        references: ReferenceSharing,
        strategy: Sharing,
        hasher: DescriptorHasher,
        recording: Recording,
        on_replaced: Callable[[bytes], None],
        offer: Callable[[Ino, bytes], None],
        postpone: Callable[[Ino, bytes], bool],
        index_is_complete: Callable[[], bool],
        *,
        rules: SharingRules = EVERYTHING,
    ) -> None:
        """`on_replaced` is called with each path whose inode is another, `offer` with files to look at again, and
        `postpone` with those that could not be shared; it answers whether that is new. `index_is_complete`: whether
        every reference is in the index."""
        self._backing, self._blobs, self._openfiles = backing, blobs, openfiles
        self._references, self._strategy, self._hash = references, strategy, hasher
        self._recording, self._on_replaced = recording, on_replaced
        self._offer, self._postpone = offer, postpone
        self._index_is_complete = index_is_complete
        self._rules = rules

    def settle(self, batch: Batch, ino: Ino, path: bytes, written_digest: Callable[[Stamp], Digest | None]) -> Looked:
        """Record and share the file at `path`, whose inode was `ino`. Answers what was found.

        `written_digest` is asked once nobody can write any more: its digest as it was computed while it was written.

        Raises FileNotFoundError when another inode is there, InUse and GivenUp when an app writes to it, Changed when
        it has to be looked at again, OSError when it cannot be read; it is then as it was, or shared and recorded.
        """
        st = self._backing.lstat(path)
        key = Key.of(st)
        if st.st_ino != ino:
            raise FileNotFoundError
        if not stat.S_ISREG(st.st_mode) or st.st_dev != self._backing.device:
            return NOTHING
        with self._openfiles.watch(key) as watch:
            fd = self._backing.open_quietly(path)
            try:
                st = os.fstat(fd)
                if Key.of(st) != key:
                    raise Changed("replaced")
                link = self._backing.link_of(path)
                if self._backing.lstat(path).st_ino != ino:
                    raise Changed("renamed")  # or a directory above it was, and the link is not its own
                file = Settled(path, link, fd, Stamp.of(st), key, watch)
                if is_in_another(self._backing, path):
                    self._count_foreign_reference(batch, file, st)
                    return NOTHING
                before = batch.file(ino)
                if self._record_reference(batch, file, st):
                    return Looked(0, self._newly_referring(batch, ino, before))
                if st.st_size - st.st_blocks * 512 > _MOST_HOLE_BYTES:
                    log.info("%s is nearly all holes, and is not hashed", os.fsdecode(path))
                    batch.doubt_file(ino)
                    return NOTHING
                if not self._lease(file):
                    batch.doubt_file(ino)
                    return NOTHING
                digest = self._digest(file, before, written_digest(file.stamp))
                st = os.fstat(fd)
                if Stamp.of(st) != file.stamp:
                    raise Changed("written meanwhile")
                common = self._join(batch, file, st, digest)
                content = common or self._begin(batch, file, st, before, digest)
                # Now that its bytes are in memory: who describes need not open what is no picture.
                if content is not None and not looks_like_picture(os.pread(fd, HEAD_BYTES, 0)):
                    batch.no_pictures.add(content)
                return Looked(st.st_size, None if before is not None and before.content == common else common)
            finally:
                os.close(fd)

    def _count_foreign_reference(self, batch: Batch, file: Settled, st: os.stat_result) -> None:
        """Below another store nothing is shared or mended. But what became a reference of ours before that store was
        made there needs its blob."""
        reference = self._backing.fread_reference(file.fd)
        if reference is not None and self._blobs.is_needed_by(reference, file.path):
            self._recording.put(batch, file.link, file.path, st, FileState.REFERENCE, reference.content)

    def _record_reference(self, batch: Batch, file: Settled, st: os.stat_result) -> bool:
        """Whether the file is a reference, which then is recorded, and mended where a crash left it half-way."""
        try:
            reference = self._references.load(file.fd, st)
        except DamagedContent as error:
            log.error("%s: %s", os.fsdecode(file.path), error)
            doubtful = self._backing.fread_reference(file.fd)
            if doubtful is not None:
                # Which of the two contents is wanted a person has to say; until then the blob is kept. No file has this
                # stamp, so that nothing else is ever concluded from the record.
                record = FileRecord(Stamp(doubtful.size_bytes, 0, 0), FileState.REFERENCE, doubtful.content)
                batch.put_file(file.key.ino, record)
            return True
        if reference is None:
            if not st.st_size:
                with suppress(OSError):  # truncated, and the crash came before its record went
                    self._backing.fremove_reference(file.fd)
            return False
        if reference.materialising and self._blobs.usable(reference.content):
            self._references.undo_copy(file.fd, reference)
            st = os.fstat(file.fd)
            self._on_replaced(file.path)  # it had another time, perhaps another length
        self._recording.put(batch, file.link, file.path, st, FileState.REFERENCE, reference.content)
        return True

    def _newly_referring(self, batch: Batch, ino: Ino, before: FileRecord | None) -> ContentKey | None:
        """What a reference was recorded with just now, if it had another content before, and others have this one."""
        record = batch.file(ino)
        if record is None or (before is not None and before.content == record.content):
            return None
        return record.content if any(self._others(batch, record.content, ino)) else None

    def _digest(self, file: Settled, before: FileRecord | None, digest: Digest | None) -> Digest:
        if before is not None and before.stamp == file.stamp and before.state is not FileState.REFERENCE:
            return before.content.digest
        if digest is None:
            digest = self._hash(file.fd, file.watch.checkpoint)
        age_ns = time.time_ns() - max(file.stamp.mtime_ns, file.stamp.ctime_ns)
        if 0 <= age_ns < _TICK_NS:
            time.sleep((_TICK_NS - age_ns) / 1e9)
        if file.leased and self._backing.lease_is_breaking(file.fd):
            raise Changed("opened for writing meanwhile")
        return digest

    def _lease(self, file: Settled) -> bool:
        """Take a lease on the file, where there are any. False when somebody can write to it, around the mount or by a
        mapping: what he writes would be in no digest, and in an inode that nobody sees, or that others share. It is
        settled again later."""
        lately = time.time_ns() - file.stamp.ctime_ns < _LATELY_NS
        deadline = time.monotonic() + (_LETTING_GO_S if lately else 0)
        while True:
            try:
                file.leased = self._backing.take_read_lease(file.fd)
                return True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    break
            time.sleep(_LETTING_GO_S / 20)
        # In passthrough the kernel has it open for writing also for a reader who came while an app wrote.
        if not self._openfiles.settle_when_closed(file.key) and self._postpone(file.key.ino, file.path):
            log.info("%s is open or mapped for writing, and is settled later", os.fsdecode(file.path))
        return False

    def _join(self, batch: Batch, file: Settled, st: os.stat_result, digest: Digest) -> ContentKey | None:
        """Put the file under the content that it has in common with somebody, shared if it can be; None if there is
        none."""
        shareable = st.st_nlink == 1 and self._rules.allow(file.path, st.st_size)
        for _, named in itertools.groupby(self._known_contents(batch, digest), lambda content: content.bytes_key):
            copies = [each for each in named if self._size_of(batch, each, file.key.ino) == st.st_size]
            for content, target in self._choices(batch, file, copies) if shareable else ():
                if self._try_sharing(batch, file, content, target):
                    return target
            equal = self._equal_known(batch, file, copies)
            if equal is not None:
                self._recording.put(batch, file.link, file.path, st, FileState.PLAIN, equal)
                return equal
        return None

    def _begin(
        self, batch: Batch, file: Settled, st: os.stat_result, before: FileRecord | None, digest: Digest
    ) -> ContentKey | None:
        """Put the file under a content that nobody has; None if its digest is that of too many others."""
        taken = set(batch.numbers(digest))
        if before is not None and not any(self._others(batch, before.content, file.key.ino)):
            taken.discard(before.content.collision if before.content.digest == digest else -1)
        taken = {number % COLLISIONS for number in taken}
        free = (ContentKey(digest, number) for number in range(COLLISIONS) if number not in taken)
        fresh = next((content for content in free if self._blobs.stat(content) is None), None)
        if fresh is None:
            log.warning("%s has the digest of %d others, which are not its bytes", os.fsdecode(file.path), COLLISIONS)
            batch.doubt_file(file.key.ino)
            return None
        self._recording.put(batch, file.link, file.path, st, FileState.PLAIN, fresh)
        return fresh

    def _choices(self, batch: Batch, file: Settled, copies: list[ContentKey]) -> list[tuple[ContentKey, ContentKey]]:
        """With whom the file may share: those who have the first content, all of them under the second one."""
        if not self._rules.domains:
            return [(content, content) for content in copies]
        domain, root = self._rules.domain_of(file.path), self._backing.root_ino
        ours = []
        for content in copies:
            domains = domains_of(batch, self._rules, content, root)
            if domains == {domain}:
                ours.append(content)
            elif not domains and self._blobs.usable(content):
                if self._index_is_complete():
                    ours.append(content)  # it lost its last reference just now
                else:
                    # Whose it is, the walk will tell.
                    self._postpone(file.key.ino, file.path)
                    return []
        if ours:
            return [(content, content) for content in ours]
        unshared = (each for each in copies[0].copies() if self._is_unshared(batch, each)) if copies else iter(())
        target = next(unshared, None)
        return [] if target is None else [(content, target) for content in copies]

    def _is_unshared(self, batch: Batch, content: ContentKey) -> bool:
        """Whether nobody shares this content, so that those of another domain may begin to."""
        return self._blobs.stat(content) is None and not domains_of(batch, self._rules, content, self._backing.root_ino)

    @staticmethod
    def _others(batch: Batch, content: ContentKey, ino: Ino) -> Iterator[Ino]:
        """Who else has a content; as a rule the first few are all that is asked for."""
        return (holder for holder in batch.iter_holders(content) if holder != ino)

    def _known_contents(self, batch: Batch, digest: Digest) -> list[ContentKey]:
        """Every content with this digest that somebody holds, or that has a blob."""
        known = [ContentKey(digest, number) for number in batch.numbers(digest)]
        for number in itertools.count():
            content = ContentKey(digest, number)
            if content not in known:
                if not self._blobs.usable(content):
                    return sorted(known, key=lambda each: (each.bytes_key, each))
                known.append(content)
        raise AssertionError("counting ended")

    def _try_sharing(self, batch: Batch, file: Settled, content: ContentKey, target: ContentKey) -> bool:
        try:
            if content == target:
                return self._share(batch, file, content)
            return self._share_with_files(batch, file, content, target)
        except (FileNotFoundError, NotADirectoryError):
            raise Changed("one of the two was moved meanwhile") from None
        except OSError as error:
            if self._postpone(file.key.ino, file.path):
                log.warning("cannot share %s now: %s", os.fsdecode(file.path), error.strerror or error)
            return False

    def _size_of(self, batch: Batch, content: ContentKey, ino: Ino) -> int | None:
        for other in self._others(batch, content, ino):
            if (held := batch.file(other)) is not None:
                return held.stamp.size_bytes
        blob = self._blobs.stat(content)
        return None if blob is None else blob.st_size

    def _share(self, batch: Batch, file: Settled, content: ContentKey) -> bool:
        """Whether the file shares its blocks now. False when nobody who has this content can be shared with."""

        try:
            blob_fd = self._blobs.open(content, file.stamp.size_bytes) if self._blobs.usable(content) else None
        except DamagedContent:
            blob_fd = None
        try:
            if blob_fd is not None:
                if self._strategy.share_with_blob(blob_fd, file, content):
                    return True
                return self._heal(batch, file, content)
        except InUse:
            return self._wait_for_readers(file)
        finally:
            if blob_fd is not None:
                os.close(blob_fd)
        return self._share_with_files(batch, file, content, content)

    def _share_with_files(self, batch: Batch, file: Settled, content: ContentKey, target: ContentKey) -> bool:
        """Whether the file shares its blocks, as `target`, with one that has this content.

        Where the two are not the same, others share this content already, with whom the file may not: only who has
        bytes of his own will do.
        """
        for ino in self._others(batch, content, file.key.ino):
            held = batch.file(ino)
            if held is not None and held.state is not FileState.PLAIN and content != target:
                continue
            if held is not None and held.state is FileState.REFERENCE:
                if self._refers(batch, ino, content):
                    return self._heal(batch, file, content)  # references without a blob wait for this copy
                continue
            with self._open_other(batch, ino) as other:
                if other is None or os.fstat(other.fd).st_nlink != 1 or not self._may_share(other, file):
                    continue
                if not self._lease(other):
                    continue
                try:
                    if self._strategy.share(other, file, target):
                        return True
                except InUse:
                    return self._wait_for_readers(file)
                if self._hash(other.fd, other.watch.checkpoint) != content.digest:
                    log.warning("%s has other bytes than when it was hashed", os.fsdecode(other.path))
                    batch.doubt_file(ino)
                    self._offer(ino, other.path)
        return False

    def _may_share(self, other: Settled, file: Settled) -> bool:
        return self._rules.allow(other.path, other.stamp.size_bytes) and (
            self._rules.domain_of(other.path) == self._rules.domain_of(file.path)
        )

    def _wait_for_readers(self, file: Settled) -> bool:
        """An app reads the file: it is shared when that is over."""
        if not self._openfiles.settle_when_closed(file.key):
            raise Changed("closed meanwhile")
        return False

    def _heal(self, batch: Batch, file: Settled, content: ContentKey) -> bool:
        """The blob has other bytes, or there is none. If it is the blob that is wrong, this copy takes its place."""
        if self._hash(file.fd, file.watch.checkpoint) != content.digest:
            batch.doubt_file(file.key.ino)
            raise Changed("its bytes are not what was hashed")
        try:
            blob_fd = self._blobs.open(content, file.stamp.size_bytes)
        except DamagedContent:
            pass
        else:
            try:
                if self._hash(blob_fd, file.watch.checkpoint) == content.digest:
                    return False  # both are what they should be: a collision
            finally:
                os.close(blob_fd)
        self._references.heal(file, content)
        log.warning("blob %s was damaged; healed with %s", content.name, os.fsdecode(file.path))
        for ino in batch.sharers(content):
            for path in batch.paths(ino, self._backing.root_ino):
                self._on_replaced(path)  # the kernel may have pages of the damaged one
        return True

    def _equal_known(self, batch: Batch, file: Settled, copies: list[ContentKey]) -> ContentKey | None:
        """Which of these the file has, where it is not shared: compared with anyone who stands for it."""
        somebody = False
        for content in copies:
            equal = self._equals(batch, file, content)
            somebody |= equal is not None
            if equal:
                return content
        # Nobody can be compared with: all are being written to, say. Then nobody vouches for this content, and the file
        # takes it over; they find it when they are settled again.
        everybody = [(content, ino) for content in copies for ino in self._others(batch, content, file.key.ino)]
        if somebody or not copies or any(self._refers(batch, ino, content) for content, ino in everybody):
            return None
        for _, ino in everybody:
            held = batch.file(ino)
            if held is not None and held.state is FileState.REFERENCE:
                continue  # of a file that is not there; the walk drops it
            paths = [path for path in batch.paths(ino, self._backing.root_ino) if self._is_at(path, ino)]
            batch.doubt_file(ino)
            if not self._openfiles.settle_when_closed(Key(self._backing.device, ino)):
                self._offer(ino, paths[0] if paths else UNKNOWN_PATH)
        return copies[0]

    def _equals(self, batch: Batch, file: Settled, content: ContentKey) -> bool | None:
        """Whether the file has this content. None when nobody can be compared with."""
        if self._blobs.usable(content):
            try:
                fd = self._blobs.open(content, file.stamp.size_bytes)
            except DamagedContent:
                pass
            else:
                try:
                    return same_bytes(fd, file.fd, file.watch.checkpoint)
                finally:
                    os.close(fd)
        for ino in self._others(batch, content, file.key.ino):
            with self._open_other(batch, ino) as other:
                if other is not None:
                    return same_bytes(other.fd, file.fd, file.watch.checkpoint)
        return None

    def _refers(self, batch: Batch, ino: Ino, content: ContentKey) -> bool:
        """Whether an inode that is recorded as a reference is one. After a power loss the index may know of more than
        the tree: LMDB flushes its own pages, which does not carry the filesystem's journal to disk."""
        record = batch.file(ino)
        return record is not None and record.state is FileState.REFERENCE and self.leads_to(batch, ino, content)

    def leads_to(self, batch: Batch, ino: Ino, content: ContentKey) -> bool:
        """Whether an inode is a reference to this content, whatever the index says of it but its names."""
        for path in batch.paths(ino, self._backing.root_ino):
            with suppress(OSError, StoreError):
                reference = self._backing.read_reference(path)
                if reference is not None and reference.content == content and self._is_at(path, ino):
                    return True
        return False

    def _is_at(self, path: bytes, ino: Ino) -> bool:
        try:
            return self._backing.lstat(path).st_ino == ino
        except OSError:
            return False

    @contextmanager
    def _open_other(self, batch: Batch, ino: Ino) -> Iterator[Settled | None]:
        """A settled file by inode, watched and open, if it holds its own bytes and still is what the index says."""
        with ExitStack() as stack:
            yield self._enter_other(stack, batch, ino)

    def _enter_other(self, stack: ExitStack, batch: Batch, ino: Ino) -> Settled | None:
        record = batch.file(ino)
        if record is None or record.state is FileState.REFERENCE:
            return None
        for path in batch.paths(ino, self._backing.root_ino):
            try:
                st = self._backing.lstat(path)
                if st.st_ino != ino or st.st_dev != self._backing.device:
                    continue
                watch = stack.enter_context(self._openfiles.watch(Key.of(st)))
                fd = self._backing.open_quietly(path)
            except (OSError, InUse):
                continue
            stack.callback(os.close, fd)
            st = os.fstat(fd)
            if st.st_ino == ino and Stamp.of(st) == record.stamp:
                return Settled(path, self._backing.link_of(path), fd, record.stamp, Key.of(st), watch)
        return None
