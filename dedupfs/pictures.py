"""What scripts and people may ask about pictures: xattrs of a file, and answers for the command line. Report only.

An answer is about contents; a path is named only after `duplicates` has checked that it leads there, and to whoever
asks through the mount only if they could have found and read it. A question about a picture that is not described yet
waits until it is.

A group has a centre, its authoritative version, and holds what was found alike with that very one: who resembles a
member and not the centre is in another group.
"""

import base64
import errno
import heapq
import itertools
import json
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator

from .asking import AsCaller
from .authority import Candidate, Verdict, judge, rank
from .backing import Backing
from .claims import NamePattern
from .decisions import NOT_SIMILAR, NOTE, PIN, UNPIN, Decisions
from .describing import Describer
from .digest import hash_descriptor
from .duplicates import LONGEST_ANSWER_BYTES, Answers
from .errors import SourceError, Unavailable, UsageError
from .index import Index
from .likeness import Likeness
from .magic import HEAD_BYTES, looks_like_picture
from .model import Alike, Caller, ContentKey, ImageEntry, ImageRecord, ImageState, Relation
from .similar import Found, Similar, alike_nearest_first, grouped
from .workers import Refused, Workers

_PATIENCE_S = 60.0

# In which two versions of a photograph differ visibly.
_CONFLICTING = (Relation.TONE, Relation.ANNOTATED, Relation.CROPPED)

# In an overview.
_SHOWN_GROUPS = 50
_SHOWN_MEMBERS = 11
_SHOWN_PATHS = 20
_SHOWN_UNDESCRIBABLE = 200

XATTRS = (b"phash", b"image", b"similar", b"authoritative", b"conflicts")


class Pictures:
    """One for a mount. Any thread."""

    def __init__(
        self,
        backing: Backing,
        index: Index,
        answers: Answers,
        as_caller: AsCaller,
        describer: Describer,
        similar: Similar,
        workers: Workers,
        decisions: Decisions,
        *,
        name_pattern: NamePattern | None,
        preferred: tuple[bytes, ...],
    ) -> None:
        self._backing, self._index, self._answers, self._as_caller = backing, index, answers, as_caller
        self._describer, self._similar, self._workers, self._decisions = describer, similar, workers, decisions
        self._name_pattern, self._preferred = name_pattern, preferred

    # -- xattrs -------------------------------------------------------------------------------------------------------

    def xattr(self, path: bytes, name: bytes, caller: Caller) -> bytes:
        """The value of `user.dedupfs.<name>`, one of XATTRS. Raises ENODATA where there is no answer."""
        content = self._content(path)
        entry = self._entry(content)
        if name == b"image" and entry.state is ImageState.UNDESCRIBABLE:
            return json.dumps({"undescribable": entry.reason}).encode()
        if entry.record is None:
            raise _no_answer()
        if name == b"image":
            return json.dumps(_as_seen(entry.record)).encode()
        if name == b"phash":
            return entry.record.phash.hex().encode()
        self._wait_for_others()
        if name == b"similar":
            return self._similar_xattr(path, content, caller)
        if name == b"conflicts":
            return self._conflicts_xattr(path, content, caller)
        verdict, _ = self._verdict(content)
        paths = self._oldest_first(verdict.chosen)
        readable = self._as_caller.readable(paths, caller)
        if not readable:
            raise _no_answer()
        return readable[0]

    def _similar_xattr(self, path: bytes, content: ContentKey, caller: Caller) -> bytes:
        identical = sorted(found for found in self._answers.paths(content) if found != path)
        groups: list[tuple[Relation, int, list[bytes]]] = [(Relation.IDENTICAL, 0, identical)]
        # Without the evidence, which would have to be found again: relation and distance are in the index.
        alikes = sorted(self._alike(content), key=alike_nearest_first)
        groups += [(alike.relation, alike.distance, sorted(self._answers.paths(alike.content))) for alike in alikes]
        return _records(
            (relation, distance, self._as_caller.readable(paths, caller)) for relation, distance, paths in groups
        )

    def _conflicts_xattr(self, path: bytes, content: ContentKey, caller: Caller) -> bytes:
        """Names that the caller may not see claim nothing to him."""
        alikes = [alike for alike in self.versions(content) if self._may_conflict(content, alike)]
        if not alikes:
            return b""
        ours = [path, *self._as_caller.readable(self._answers.paths(content), caller)]
        found = []
        for alike in alikes:
            theirs = self._as_caller.readable(sorted(self._answers.paths(alike.content)), caller)
            if theirs and self._common_claim((content, ours), (alike.content, theirs)):
                found.append((alike.relation, alike.distance, theirs))
        return _records(found)

    # -- one picture --------------------------------------------------------------------------------------------------

    def similar(self, path: bytes) -> dict[str, object]:
        """Raises OSError (ENODATA) for what is no described picture."""
        content = self._content(path)
        record = self._record(content)
        self._wait_for_others()
        identical = sorted(found for found in self._answers.paths(content) if found != path)
        found = [_as_json(other, Likeness(Relation.IDENTICAL, 0)) for other in identical]
        found += self._listed(each for each in self._similar.of(content) if self._counts(content, each.content))
        return {"path": os.fsdecode(path), "image": _as_seen(record), "similar": found}

    def find(self, file: str) -> dict[str, object]:
        """Where the picture in a file from outside is in the archive, and in which forms. Raises OSError for one that
        cannot be read, SourceError for one that cannot be described, Unavailable."""
        self._describer.wait_loaded(_PATIENCE_S)
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise SourceError(f"{file} is not a file")
            digest = hash_descriptor(fd)
            identical = [ContentKey(digest, number) for number in self._index.numbers(digest)]
            if not looks_like_picture(os.pread(fd, HEAD_BYTES, 0)):
                raise SourceError(f"{file} is no picture of a known format")
            record, thumbnails = self._workers.describe(fd)
        except Refused as reason:
            raise SourceError(f"{file} cannot be described: {reason}") from None
        finally:
            os.close(fd)
        found = [
            _as_json(path, Likeness(Relation.IDENTICAL, 0))
            for content in identical
            for path in sorted(self._answers.paths(content))
        ]
        found += self._listed(each for each in self._similar.find(record, thumbnails) if each.content not in identical)
        return {"path": file, "image": _as_seen(record), "similar": found}

    def _listed(self, found: Iterable[Found]) -> list[dict[str, object]]:
        return [
            _as_json(path, likeness) for content, likeness in found for path in sorted(self._answers.paths(content))
        ]

    # -- groups -------------------------------------------------------------------------------------------------------

    def groups(self, relations: list[str], progress: Callable[[int], None]) -> list[dict[str, object]]:
        """Pictures that are versions of one photograph, by these relations (all but sequence and template, if none is
        named)."""
        try:
            wanted = {Relation(name) for name in relations}
        except ValueError:
            raise UsageError(f"known relations are {', '.join(Relation)}") from None
        wanted = wanted or {relation for relation in Relation if relation.is_same_picture}
        self._wait_for_others()
        found = []
        for centre, members in self._clusters(wanted):
            found.append(self._group(centre, members))
            progress(len(found))
        return found

    def _clusters(self, wanted: Collection[Relation]) -> Iterator[tuple[ContentKey, list[Alike]]]:
        neighbours = {
            content: [each for each in alikes if each.relation in wanted and self._counts(content, each.content)]
            for content, alikes in self._similar.neighbours()
        }
        candidates = {
            content: candidate
            for content, alikes in neighbours.items()
            if alikes and (candidate := self._candidate(content)) is not None
        }
        yield from grouped(neighbours, self._best_first(candidates))

    @staticmethod
    def _best_first(candidates: dict[ContentKey, Candidate]) -> list[ContentKey]:
        return [candidate.content for candidate in sorted(candidates.values(), key=rank)]

    def _group(self, centre: ContentKey, members: list[Alike]) -> dict[str, object]:
        return {
            "authoritative": [os.fsdecode(path) for path in self._oldest_first(centre)],
            "members": [
                {
                    "relation": str(each.relation),
                    "distance": each.distance,
                    "paths": [os.fsdecode(path) for path in sorted(self._answers.paths(each.content))],
                }
                for each in members
            ],
        }

    # -- the authoritative version ------------------------------------------------------------------------------------

    def authoritative(self, path: bytes) -> dict[str, object]:
        content = self._content(path)
        self._record(content)
        self._wait_for_others()
        verdict, candidates = self._verdict(content)
        chosen = self._oldest_first(verdict.chosen)
        relations = {alike.content: alike.relation for alike in self._alike(content)}
        others = [
            {
                "paths": [os.fsdecode(found) for found in sorted(self._answers.paths(each.content))],
                "relation": "itself" if each.content == content else str(relations[each.content]),
                "lost_by": verdict.lost_by[each.content].criterion,
                "value": verdict.lost_by[each.content].value,
            }
            for each in candidates
            if each.content != verdict.chosen
        ]
        return {
            "path": os.fsdecode(path),
            "authoritative": os.fsdecode(chosen[0]) if chosen else None,
            "copies": [os.fsdecode(found) for found in chosen],
            "pinned": self._decisions.is_pinned(verdict.chosen),
            "why": [{"criterion": reason.criterion, "value": reason.value} for reason in verdict.reasons],
            "others": others,
            "notes": [
                entry["text"]
                for entry in self._decisions.history(each.content for each in candidates)
                if entry["action"] == NOTE
            ],
        }

    def decide(self, path: bytes, action: str, *, who: str, text: str) -> dict[str, object]:
        """Pin, unpin or note. One version of a photograph is pinned: the one before is unpinned."""
        content = self._content(path)
        self._record(content)
        if action == PIN:
            for alike in self._alike(content):
                if alike.relation.is_same_picture and self._decisions.is_pinned(alike.content):
                    paths = self._answers.paths(alike.content)
                    self._decisions.record(UNPIN, [alike.content], paths=paths, who=who)
        elif action == UNPIN and not self._decisions.is_pinned(content):
            raise UsageError(f"{os.fsdecode(path)} is not pinned")
        self._decisions.record(action, [content], paths=[path], who=who, text=text)
        return self.authoritative(path)

    def history(self, path: bytes) -> list[dict[str, object]]:
        content = self._content(path)
        self._record(content)
        self._wait_for_others()
        contents = [content, *(alike.content for alike in self._index.images.alike(content))]
        return self._decisions.history(contents)

    def not_similar(self, one: bytes, other: bytes, *, who: str) -> dict[str, object]:
        contents = self._content(one), self._content(other)
        if contents[0] == contents[1]:
            raise UsageError("these two have the same bytes")
        self._decisions.record(NOT_SIMILAR, contents, paths=[one, other], who=who)
        return {"not_similar": [os.fsdecode(one), os.fsdecode(other)]}

    def _verdict(self, content: ContentKey) -> tuple[Verdict, list[Candidate]]:
        contents = [content, *(each.content for each in self._alike(content) if each.relation.is_same_picture)]
        found = [self._candidate(each) for each in contents]
        candidates = [candidate for candidate in found if candidate is not None]
        if not candidates:
            raise _no_answer()
        return judge(candidates), candidates

    def _candidate(self, content: ContentKey) -> Candidate | None:
        entry = self._index.images.entry(content)
        times = self._times(content)
        if entry is None or entry.record is None or not times:
            return None
        seen_ns = times[0][0]
        preference = min(place for _, place, _ in times)
        folder = os.fsdecode(self._preferred[preference]) if preference < len(self._preferred) else ""
        return Candidate(content, entry.record, seen_ns, self._decisions.is_pinned(content), preference, folder)

    def _times(self, content: ContentKey) -> list[tuple[int, int, bytes]]:
        """Every path of a content with its modification time and the place of its folder among the preferred ones, the
        best first."""
        found = []
        for path in self._answers.paths(content):
            try:
                found.append((self._backing.lstat(path).st_mtime_ns, self._preference(path), path))
            except OSError:
                continue
        return sorted(found)

    def _preference(self, path: bytes) -> int:
        places = (place for place, folder in enumerate(self._preferred) if path.startswith(folder + b"/"))
        return next(places, len(self._preferred))

    def _oldest_first(self, content: ContentKey) -> list[bytes]:
        return [path for *_, path in self._times(content)]

    # -- conflicts ----------------------------------------------------------------------------------------------------

    def conflicts(self) -> list[dict[str, object]]:
        """Pairs that claim to be one photograph, by capture time and camera or by name, and differ visibly."""
        self._wait_for_others()
        return [
            {
                "paths": [
                    [os.fsdecode(path) for path in sorted(self._answers.paths(each))]
                    for each in (content, alike.content)
                ],
                "relation": str(alike.relation),
                "distance": alike.distance,
                "claim": claim,
            }
            for content, alike, claim in self._conflicts()
        ]

    def _conflicts(self) -> Iterator[tuple[ContentKey, Alike, str]]:
        for content, alikes in self._similar.neighbours():
            for alike in alikes:
                if alike.content <= content or not self._may_conflict(content, alike):
                    continue
                paths = [sorted(self._answers.paths(each)) for each in (content, alike.content)]
                claim = self._common_claim((content, paths[0]), (alike.content, paths[1]))
                if claim:
                    yield content, alike, claim

    # -- all of it, for a report --------------------------------------------------------------------------------------

    def overview(self, progress: Callable[[int], None], *, thumbnails: bool) -> dict[str, object]:
        """The groups with most members, conflicts, and pictures that cannot be described: how many there are, and the
        first of each. With `thumbnails` each picture has its width and height, and 64 x 64 grey levels in base64."""
        clusters = conflicts = 0
        largest: list[tuple[int, int, ContentKey, list[Alike]]] = []
        for centre, members in self._clusters({each for each in Relation if each.is_same_picture}):
            clusters += 1
            heapq.heappush(largest, (len(members), -clusters, centre, members))
            if len(largest) > _SHOWN_GROUPS:
                heapq.heappop(largest)
            progress(clusters)
        shown = []
        for content, alike, claim in self._conflicts():
            conflicts += 1
            if conflicts <= _SHOWN_GROUPS:
                versions = [self._shown(each, thumbnails=thumbnails) for each in (content, alike.content)]
                shown.append({"claim": claim, "relation": str(alike.relation), "versions": versions})
        undescribable = [
            {"paths": [os.fsdecode(path) for path in sorted(self._answers.paths(content))], "reason": reason}
            for content, reason in itertools.islice(self._index.images.all_undescribable(), _SHOWN_UNDESCRIBABLE)
        ]
        return {
            "near_duplicate_groups": clusters,
            "near_duplicates": [
                {
                    "authoritative": self._shown(centre, thumbnails=thumbnails),
                    "members": [
                        {"relation": str(each.relation), **self._shown(each.content, thumbnails=thumbnails)}
                        for each in members[:_SHOWN_MEMBERS]
                    ],
                    "more": max(len(members) - _SHOWN_MEMBERS, 0),
                }
                for _, _, centre, members in sorted(largest, reverse=True)
            ],
            "conflicting": conflicts,
            "conflicts": shown,
            "undescribable": undescribable,
        }

    def _shown(self, content: ContentKey, *, thumbnails: bool) -> dict[str, object]:
        paths = sorted(self._answers.paths(content))
        found: dict[str, object] = {"paths": [os.fsdecode(path) for path in paths[:_SHOWN_PATHS]], "copies": len(paths)}
        picture = self._index.images.picture(content) if thumbnails else None
        if picture is not None:
            record, views = picture
            grey = base64.b64encode(views.full).decode()
            found["thumbnail"] = {"width": record.width, "height": record.height, "grey": grey}
        return found

    def conflicts_of(self, content: ContentKey) -> list[tuple[Alike, str]]:
        """What is in conflict with a picture, and what both claim, the nearest first."""
        alikes = [alike for alike in self.versions(content) if self._may_conflict(content, alike)]
        ours = self._answers.paths(content) if alikes else []
        found = []
        for alike in alikes:
            if claim := self._common_claim((content, ours), (alike.content, self._answers.paths(alike.content))):
                found.append((alike, claim))
        return found

    def versions(self, content: ContentKey) -> list[Alike]:
        """The other versions of a photograph, the nearest first."""
        alikes = (alike for alike in self._alike(content) if alike.relation.is_same_picture)
        return sorted(alikes, key=alike_nearest_first)

    def _may_conflict(self, content: ContentKey, alike: Alike) -> bool:
        return alike.relation in _CONFLICTING and self._counts(content, alike.content)

    def _common_claim(self, one: tuple[ContentKey, list[bytes]], other: tuple[ContentKey, list[bytes]]) -> str:
        """What two pictures, each with its paths, both claim to be; "" where that is nothing."""
        records = [entry.record for each, _ in (one, other) if (entry := self._index.images.entry(each)) is not None]
        if len(records) == 2 and records[0] is not None and records[1] is not None:
            first, second = records[0], records[1]
            if first.taken and (first.taken, first.camera) == (second.taken, second.camera):
                return f"taken {first.taken}" + (f" by {first.camera}" if first.camera else "")
        names = [{os.path.basename(path).lower() for path in paths} for _, paths in (one, other)]
        if common := names[0] & names[1]:
            return f"called {os.fsdecode(min(common))}"
        if self._name_pattern is None:
            return ""
        numbers = [{self._name_pattern.number_in(path) for path in paths} - {""} for _, paths in (one, other)]
        common_numbers = numbers[0] & numbers[1]
        return f"numbered {min(common_numbers)}" if common_numbers else ""

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _content(self, path: bytes) -> ContentKey:
        return self._answers.settled(path)[1].content

    def _entry(self, content: ContentKey) -> ImageEntry:
        """Raises ENODATA when it is not known in time."""
        entry = self._describer.entry(content, _PATIENCE_S)
        if entry is None:
            raise _no_answer()
        return entry

    def _wait_for_others(self) -> None:
        self._answers.wait_for_others(self._describer.wait_for_few)

    def _record(self, content: ContentKey) -> ImageRecord:
        """Raises SourceError for what is no picture that could be described, Unavailable where none can be."""
        if self._describer.why_not:
            raise Unavailable(f"pictures are not described: {self._describer.why_not}")
        entry = self._entry(content)
        if entry.state is ImageState.UNDESCRIBABLE:
            raise SourceError(f"the picture cannot be described: {entry.reason}")
        if entry.record is None:
            raise SourceError("that is no picture of a known format")
        return entry.record

    def _alike(self, content: ContentKey) -> list[Alike]:
        return [alike for alike in self._index.images.alike(content) if self._counts(content, alike.content)]

    def _counts(self, one: ContentKey, other: ContentKey) -> bool:
        return not self._decisions.are_apart(one, other)


def _no_answer() -> OSError:
    return OSError(errno.ENODATA, os.strerror(errno.ENODATA))


def _records(found: Iterable[tuple[Relation, int, list[bytes]]]) -> bytes:
    """Relation, distance and path of each, as many whole records as an xattr may hold."""
    answer = bytearray()
    for relation, distance, paths in found:
        for path in paths:
            record = b"%s %d %s\0" % (relation.encode(), distance, path)
            if len(answer) + len(record) > LONGEST_ANSWER_BYTES:
                return bytes(answer)
            answer += record
    return bytes(answer)


def _as_seen(record: ImageRecord) -> dict[str, object]:
    taken = record.taken + record.zone if record.taken else None
    return {"format": record.format, "width": record.width, "height": record.height, "taken": taken}


def _as_json(path: bytes, likeness: Likeness) -> dict[str, object]:
    return {
        "path": os.fsdecode(path),
        "relation": str(likeness.relation),
        "distance": likeness.distance,
        "evidence": likeness.evidence,
    }
