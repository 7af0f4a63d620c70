"""What sharing would save in directories that dedupfs never saw, and how many pictures there are that are alike: reads,
and changes nothing.

Only files that could share are read, and of those only the ones whose size another has; a digest is taken as proof, as
nothing is done upon it. Digests are kept in a cache by inode, size and times, so that an interrupted run goes on where
it was, and the next one reads only what is new. Called by the command line, in its thread; nothing of a store is used.
"""

import base64
import itertools
import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .digest import Checkpoint, hash_descriptor
from .errors import SourceError, Unavailable, UsageError
from .model import SMALLEST_SHARED_BYTES, STORE_DIRECTORY, Digest, Progress, Stamp
from .survey import Cache, File, open_quietly

if TYPE_CHECKING:
    from .lookalikes import Lookalikes, Version

PRICES_USD = (0.08, 0.23)  # a gigabyte and month, as municipal contracts pay

_LARGEST = 20
_SHOWN_UNREADABLE = 100
_SHOWN_PATHS = 20


@dataclass(slots=True)
class Sums:
    """`duplicate_*`: what is beyond the first of equal files."""

    files: int = 0
    bytes: int = 0
    duplicate_files: int = 0
    duplicate_bytes: int = 0

    def as_json(self) -> dict[str, object]:
        return {
            "files": self.files,
            "bytes": self.bytes,
            "duplicate_files": self.duplicate_files,
            "duplicate_bytes": self.duplicate_bytes,
        }


@dataclass(slots=True)
class Group:
    """Equal files."""

    digest: Digest
    size_bytes: int
    paths: list[bytes]

    @property
    def wasted_bytes(self) -> int:
        return self.size_bytes * (len(self.paths) - 1)


@dataclass(slots=True)
class Estimate:
    """What was found; sizes are lengths. A directory's own sums leave out what only another has as well."""

    directories: list[tuple[bytes, Sums]]
    total: Sums = field(default_factory=Sums)
    largest: list[Group] = field(default_factory=list)
    unreadable: list[tuple[bytes, str]] = field(default_factory=list)
    pairs: dict[tuple[int, int], int] = field(default_factory=dict)  # of directories, by number: what both have
    read_bytes: int = 0
    cached_files: int = 0
    lookalikes: "Lookalikes | None" = None
    lookalikes_reason: str = ""  # why there are none

    @property
    def across_bytes(self) -> int:
        """What is duplicate only because one directory has what another has."""
        return self.total.duplicate_bytes - sum(sums.duplicate_bytes for _, sums in self.directories)

    def as_json(self, prices: Sequence[float], *, thumbnails: bool = False) -> dict[str, object]:
        """`thumbnails`: with 64 x 64 grey levels of each picture that is named, in base64."""
        return {
            "directories": [{"path": os.fsdecode(path), **sums.as_json()} for path, sums in self.directories],
            "total": self.total.as_json(),
            "across_bytes": self.across_bytes,
            "pairs": [
                {"directories": [os.fsdecode(self.directories[each][0]) for each in pair], "bytes": size_bytes}
                for pair, size_bytes in sorted(self.pairs.items())
            ],
            "price_per_gb_month": list(prices),
            "cost_per_month": [cost(self.total.bytes, price) for price in prices],
            "saved_per_month": [cost(self.total.duplicate_bytes, price) for price in prices],
            "largest": [
                {
                    "digest": group.digest.hex(),
                    "size_bytes": group.size_bytes,
                    "wasted_bytes": group.wasted_bytes,
                    "paths": [os.fsdecode(path) for path in group.paths],
                }
                for group in self.largest
            ],
            "unreadable": len(self.unreadable),
            "unreadable_paths": [
                {"path": os.fsdecode(path), "reason": reason} for path, reason in self.unreadable[:_SHOWN_UNREADABLE]
            ],
            "near_duplicates_reason": self.lookalikes_reason,
            **(_lookalikes_as_json(self.lookalikes, thumbnails=thumbnails) if self.lookalikes is not None else {}),
        }


def _lookalikes_as_json(found: "Lookalikes", *, thumbnails: bool) -> dict[str, object]:
    """As a mount tells them in a report."""

    def shown(version: "Version") -> dict[str, object]:
        paths = _paths(version.files)
        told: dict[str, object] = {"paths": paths[:_SHOWN_PATHS], "copies": len(paths)}
        if thumbnails:
            record, views = version.picture
            grey = base64.b64encode(views.full).decode()
            told["thumbnail"] = {"width": record.width, "height": record.height, "grey": grey}
        return told

    return {
        "pictures": found.pictures,
        "near_duplicate_groups": found.groups,
        "near_duplicate_pictures": found.near,
        "near_duplicate_bytes": found.near_bytes,
        "near_duplicate_relations": {str(relation): count for relation, count in found.relations.most_common()},
        "near_duplicates": [
            {
                "authoritative": shown(centre),
                "members": [{"relation": str(version.relation), **shown(version)} for version in members],
                "more": more,
            }
            for (centre, *members), more in found.largest
        ],
        "undescribable_pictures": len(found.undescribable),
        "undescribable": [
            {"paths": _paths(files), "reason": reason} for files, reason in found.undescribable[:_SHOWN_UNREADABLE]
        ],
    }


def _paths(files: Sequence[File]) -> list[str]:
    return sorted(os.fsdecode(file.path) for file in files)


def cost(size_bytes: int, price: float) -> float:
    """Per month, at a price per gigabyte (10^9 bytes)."""
    return round(size_bytes / 1e9 * price, 2)


def estimate(directories: Sequence[str], *, cache: str, progress: Progress, exact: bool) -> Estimate:
    """Look through directories that do not overlap. `cache` is a file, made where there is none; with `exact` pictures
    that are alike are not looked for.

    Raises UsageError, SourceError. What cannot be read is told, and counted by its length.
    """
    tops = _checked(directories)
    found = Estimate([(top, Sums()) for top in tops])
    by_size: dict[int, list[File]] = defaultdict(list)
    for file in _files(tops, found, progress):
        for sums in (found.total, found.directories[file.directory][1]):
            sums.files += 1
            sums.bytes += file.stamp.size_bytes
        by_size[file.stamp.size_bytes].append(file)
    with Cache(cache) as known:
        sharable = [files for size_bytes, files in by_size.items() if size_bytes >= SMALLEST_SHARED_BYTES]
        by_content = _by_content(sharable, known, found, progress)
        _sum_up(by_content, found)
        if exact:
            found.lookalikes_reason = "not asked for"
        else:
            small = [files for size_bytes, files in by_size.items() if 0 < size_bytes < SMALLEST_SHARED_BYTES]
            contents = [*by_content.values(), *_by_content(small, known, found, progress).values()]
            alone = (files for size_bytes, files in by_size.items() if size_bytes and len(files) == 1)
            _look_for_lookalikes([*contents, *alone], known, found, progress)
    return found


def _by_content(
    by_size: Sequence[Sequence[File]], known: Cache, found: Estimate, progress: Progress
) -> dict[tuple[int, Digest], list[File]]:
    """Of files that another one has the size of, those that are equal."""
    by_content: dict[tuple[int, Digest], list[File]] = defaultdict(list)
    candidates = [file for files in by_size if len(files) > 1 for file in files]
    for file, digest in _digests(candidates, known, found, progress):
        by_content[file.stamp.size_bytes, digest].append(file)
    return by_content


def _look_for_lookalikes(contents: Sequence[Sequence[File]], known: Cache, found: Estimate, progress: Progress) -> None:
    from . import lookalikes  # loads numpy, which all other commands do without

    try:
        found.lookalikes = lookalikes.look(contents, known, progress)
    except Unavailable as reason:
        found.lookalikes_reason = str(reason)


def _checked(directories: Sequence[str]) -> list[bytes]:
    tops: list[bytes] = []
    for directory in directories:
        top = os.path.realpath(os.fsencode(directory))
        if not os.path.isdir(top):
            raise SourceError(f"{directory} is not a directory; name directories that hold archives")
        if os.path.lexists(os.path.join(top, STORE_DIRECTORY)):
            raise UsageError(
                f"{directory} has a dedupfs store: what is shared in it reads as zeros here; mount it, and ask dedupfs "
                "status, or estimate the mount"
            )
        for other in tops:
            if os.path.commonpath((top, other)) in (top, other):
                raise UsageError(f"{directory} and {os.fsdecode(other)} overlap; name each directory once")
        tops.append(top)
    return tops


def _files(tops: Sequence[bytes], found: Estimate, progress: Progress) -> Iterator[File]:
    """Every regular file below, each inode once, on the filesystem of its top. Links are not followed."""
    seen: set[tuple[int, int]] = set()
    for number, top in enumerate(tops):
        device = os.stat(top).st_dev
        waiting = [top]
        while waiting:
            directory = waiting.pop()
            try:
                with os.scandir(directory) as entries:
                    for entry in entries:
                        st = entry.stat(follow_symlinks=False)
                        if stat.S_ISDIR(st.st_mode) and st.st_dev == device:
                            waiting.append(entry.path)
                        elif stat.S_ISREG(st.st_mode) and (st.st_dev, st.st_ino) not in seen:
                            seen.add((st.st_dev, st.st_ino))
                            yield File(number, entry.path, st.st_dev, st.st_ino, Stamp.of(st))
                            if not len(seen) % 1000:
                                progress("looking", len(seen), None)
            except FileNotFoundError:
                continue  # removed while we looked
            except OSError as error:
                found.unreadable.append((directory, error.strerror or str(error)))


def _digests(files: Sequence[File], known: Cache, found: Estimate, progress: Progress) -> Iterator[tuple[File, Digest]]:
    """In the order of their inodes, which on a disk is nearly that of their bytes."""
    total = sum(file.stamp.size_bytes for file in files)
    done = 0

    def checkpoint() -> None:
        progress("reading (MiB)", done >> 20, total >> 20)

    for file in sorted(files, key=lambda file: (file.device, file.ino)):
        digest = known.digest(file)
        if digest is None:
            digest = _digest(file, found, checkpoint)
            if digest is not None:
                known.put_digest(file, digest)
                found.read_bytes += file.stamp.size_bytes
        else:
            found.cached_files += 1
        done += file.stamp.size_bytes
        checkpoint()
        if digest is not None:
            yield file, digest


def _digest(file: File, found: Estimate, checkpoint: Checkpoint) -> Digest | None:
    try:
        fd = open_quietly(file.path)
        try:
            digest = hash_descriptor(fd, checkpoint)
            if Stamp.of(os.fstat(fd)) == file.stamp:
                return digest
            reason = "was changed meanwhile"
        finally:
            os.close(fd)
    except OSError as error:
        reason = error.strerror or str(error)
    found.unreadable.append((file.path, reason))
    return None


def _sum_up(by_content: dict[tuple[int, Digest], list[File]], found: Estimate) -> None:
    groups = []
    for (size_bytes, digest), files in by_content.items():
        if len(files) < 2:
            continue
        counts: dict[int, int] = defaultdict(int)
        for file in files:
            counts[file.directory] += 1
        for directory, count in counts.items():
            found.directories[directory][1].duplicate_files += count - 1
            found.directories[directory][1].duplicate_bytes += size_bytes * (count - 1)
        for one, other in itertools.combinations(sorted(counts), 2):
            both = size_bytes * min(counts[one], counts[other])
            found.pairs[one, other] = found.pairs.get((one, other), 0) + both
        found.total.duplicate_files += len(files) - 1
        found.total.duplicate_bytes += size_bytes * (len(files) - 1)
        groups.append(Group(digest, size_bytes, sorted(file.path for file in files)))
    groups.sort(key=lambda group: (-group.wasted_bytes, group.paths))
    found.largest = groups[:_LARGEST]
