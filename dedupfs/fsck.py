"""Is the store in order? One check per invariant, each a function that yields what it found; repair is a second step.

Works on a store that nobody owns. Without `repair` nothing of the archive or the index is changed. With it, what can be
put right without a guess is put right: leftovers are swept, abandoned copies undone, blobs sealed, blobs that no
reference names moved to the trash (only after the whole tree could be read), missing ones taken from there or replaced
by a plain file of that very content, and the index brought in line. What would need a guess is only told: which of two
contents of a file is the wanted one is a person's to say.
"""

import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from .backing import Backing
from .blobs import SEALED_MODE, Blobs
from .config import MountOptions, Share
from .engine import Engine
from .errors import IndexDamaged, StoreError
from .index import Index, recompute
from .model import ContentKey, FileState, Ino, Progress, Reference, Stamp
from .reconcile import Census, refuse_references_elsewhere, walk
from .sharing import abandon
from .store import BLOBS, INDEX, ORPHANS, STAGING, Store, is_in_another
from .trash import Trash

log = logging.getLogger(__name__)


# What `repair` does about a finding of this check; what is not here is left for a person.
_REMEDIES = {
    "leftovers": "taken back, or set aside in quarantine/ if it is not of dedupfs",
    "materialising": "its unfinished copy freed; the blob has its content",
    "empty-reference": "its record removed",
    "reference-blob": "its blob taken from the trash, or from a plain file of that content, if there is one",
    "unreferenced-blob": "moved to the trash",
    "sealed": "sealed",
    "clean": "the tree walked, and the index brought in line",
    "index": "a new index made, by a scan",
    "counters": "a new index made, by a scan",
    **dict.fromkeys(
        ("index-reference", "index-stamp", "index-state", "index-content", "index-path", "index-file"),
        "looked at again, and the index brought in line",
    ),
}


@dataclass(slots=True)
class Finding:
    """One violated invariant. `repair` puts it right, and raises OSError or StoreError when it cannot."""

    check: str
    path: bytes
    problem: str
    repair: Callable[[], None] | None = None
    content: ContentKey | None = None  # whose blob is missing
    repaired: bool = False

    @property
    def remedy(self) -> str:
        """What a repair would do about it, "" when that is for a person to decide."""
        if self.check == "unreferenced-blob" and self.repair is None:
            return ""  # not everything could be read
        return _REMEDIES.get(self.check, "")


@dataclass(slots=True)
class Report:
    findings: list[Finding] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 clean, 1 all repaired, 2 something left."""
        if not self.findings:
            return 0
        return 1 if all(finding.repaired for finding in self.findings) else 2


@dataclass(slots=True)
class _Tree:
    """What one walk saw: every reference, and every other file's stamp by inode."""

    references: dict[bytes, Reference] = field(default_factory=dict)
    stats: dict[bytes, os.stat_result] = field(default_factory=dict)
    by_content: dict[ContentKey, list[bytes]] = field(default_factory=dict)
    elsewhere: set[Ino] = field(default_factory=set)  # inodes below another store, or with a damaged record
    complete: bool = True  # nothing was unreadable
    scanned: bool = True  # the index has seen all of it


def fsck(source: str, *, repair: bool, progress: Progress) -> Report:
    """Check the store of `source`. Raises Busy when it is in use, and what `Store` raises."""
    report = _check(source, progress, repair=False, take_over=repair)
    if repair and report.findings:
        with Engine(source, MountOptions(share=Share.REFERENCE)):
            pass  # takes back what was left half-way, before anything is concluded from it
        _check(source, progress, repair=True)
        _reconcile(source, report.findings, progress)
        left = {(finding.check, finding.path) for finding in _check(source, progress, repair=False).findings}
        for finding in report.findings:
            finding.repaired = (finding.check, finding.path) not in left
    return report


def _check(source: str, progress: Progress, *, repair: bool, take_over: bool = True) -> Report:
    """Look at everything; with `repair`, put right at once what concerns one file alone. Raises SourceError for an
    index of an older version that may not be taken over."""
    report = Report()
    with ExitStack() as stack:
        backing = Backing(source)
        stack.callback(backing.close)
        store = stack.enter_context(Store(backing))
        if store.was_clean and not repair:
            stack.callback(store.mark_clean)
        blobs, tree = Blobs(backing), _Tree()
        report.findings += _read_tree(backing, tree, progress)
        place = b"/proc/self/fd/%d/%s" % (backing.root_fd, INDEX)
        try:
            index = stack.enter_context(Index(place, store.identity, take_over=take_over))
            report.findings += check_index(index, tree, backing, was_clean=store.was_clean)
            tree.scanned = index.is_complete() and not index.load_queue()  # what is pending may settle it
        except IndexDamaged as error:
            report.findings.append(Finding("index", INDEX, str(error)))
        for check in (check_leftovers, check_references, check_blobs):
            report.findings += check(backing, blobs, tree)
        if repair:
            _look_again(backing, report.findings, progress)
            for finding in report.findings:
                _try_repair(finding)
            if store.was_clean and not report.findings:
                store.mark_clean()
    return report


def _look_again(backing: Backing, findings: list[Finding], progress: Progress) -> None:
    """Before blobs go: somebody who moves files meanwhile can hide one from a walk; hardly from two."""
    unneeded = [finding for finding in findings if finding.check == "unreferenced-blob" and finding.repair is not None]
    if not unneeded:
        return
    tree = _Tree()
    for _ in _read_tree(backing, tree, progress):
        pass
    needed = {Blobs.path(content) for content in tree.by_content}
    for finding in unneeded:
        if not tree.complete or finding.path in needed:
            finding.repair = None


def _try_repair(finding: Finding) -> None:
    try:
        if finding.repair is not None:
            finding.repair()
    except (OSError, StoreError) as error:
        finding.problem += f" (repair failed: {error})"


def _reconcile(source: str, findings: list[Finding], progress: Progress) -> None:
    """Opening the store sweeps leftovers; a walk corrects what is stale in the index, a new index what is wrong; and a
    plain file takes the place of a missing blob of its content."""
    with Engine(source, MountOptions(share=Share.REFERENCE)) as engine:
        if any(finding.check in ("index", "counters", "pictures") for finding in findings):
            engine.replace_index()
        engine.scan(progress)
        for content in {finding.content for finding in findings if finding.content is not None}:
            engine.look_again(content)
        engine.settle(progress)


def _read_tree(backing: Backing, tree: _Tree, progress: Progress) -> Iterator[Finding]:
    census = Census()
    for path, st in walk(backing, census, lambda: False):
        if stat.S_ISDIR(st.st_mode):
            continue
        try:
            reference = backing.read_reference(path)
        except StoreError as error:
            tree.complete = False
            tree.elsewhere.add(Ino(st.st_ino))
            yield Finding("reference-record", path, str(error))
            continue
        except OSError as error:
            tree.complete = False
            yield Finding("readable", path, error.strerror or str(error))
            continue
        if reference is not None:
            tree.by_content.setdefault(reference.content, []).append(path)
        if is_in_another(backing, path):
            tree.elsewhere.add(Ino(st.st_ino))  # that store's business, but it may need a blob of ours
            continue
        tree.stats[path] = st
        if reference is not None:
            tree.references[path] = reference
        census.files += 1
        if not census.files % 1000:
            progress("checking", census.files, None)
    refuse_references_elsewhere(backing, census)
    if census.unreadable:
        tree.complete = False
    for path, reason in census.unreadable_paths:
        yield Finding("readable", path, reason)


def check_leftovers(backing: Backing, blobs: Blobs, tree: _Tree) -> Iterator[Finding]:
    """staging/ and orphans/ are empty while nobody works."""
    for directory in (STAGING, ORPHANS):
        for entry in backing.scandir(directory):
            # Opening the store sweeps both; that is what the repair of the index does.
            path = directory + b"/" + os.fsencode(entry.name)
            yield Finding("leftovers", path, "left by a crash; swept at the next start")


def check_references(backing: Backing, blobs: Blobs, tree: _Tree) -> Iterator[Finding]:
    """A reference has its size and no bytes of its own, and its blob exists with that size."""
    for path, reference in tree.references.items():
        st = tree.stats[path]
        if reference.materialising:
            repair = _abandon(backing, path, reference)
            yield Finding("materialising", path, "a copy from its blob was not finished", repair)
        elif not st.st_size:
            yield Finding("empty-reference", path, "an empty file with a reference record", _forget(backing, path))
            continue
        elif st.st_size != reference.size_bytes or _has_data(backing, path, st):
            yield Finding(
                "foreign-write",
                path,
                f"a reference was written to from outside dedupfs; its blob is {Blobs.path(reference.content)!r}",
            )
        blob = blobs.stat(reference.content)
        if blob is None or blob.st_size != reference.size_bytes:
            fault = "is missing" if blob is None else f"has {blob.st_size} bytes instead of {reference.size_bytes}"
            problem = f"blob {reference.content.name} {fault}"
            take_back = partial(_take_back, backing, blobs, reference.content)
            yield Finding("reference-blob", path, problem, take_back, content=reference.content)


def check_blobs(backing: Backing, blobs: Blobs, tree: _Tree) -> Iterator[Finding]:
    """A blob is sealed, nobody's file, and referred to."""
    for content, st in blobs.list():
        path = Blobs.path(content)
        if st.st_nlink != 1:
            yield Finding("blob-links", path, f"has {st.st_nlink} links: a file outside can change it")
        if content not in tree.by_content:
            if not tree.scanned:
                continue  # what is still to be scanned or settled removes it
            repair = partial(Trash(backing).put, content, now_s=int(time.time())) if tree.complete else None
            yield Finding("unreferenced-blob", path, "no reference names it", repair)
        elif st.st_nlink == 1 and (stat.S_IMODE(st.st_mode) != SEALED_MODE or (backing.privileged and st.st_uid)):
            yield Finding("sealed", path, "is not sealed", partial(blobs.seal, content))
    known = {Blobs.path(content) for content, _ in blobs.list()}
    for directory in backing.scandir(BLOBS):
        path = BLOBS + b"/" + os.fsencode(directory.name)
        if not directory.is_dir(follow_symlinks=False):
            yield Finding("blob-names", path, "is no blob")
            continue
        for entry in backing.scandir(path):
            if path + b"/" + os.fsencode(entry.name) not in known:
                yield Finding("blob-names", path + b"/" + os.fsencode(entry.name), "is no blob")


def check_index(index: Index, tree: _Tree, backing: Backing, *, was_clean: bool) -> Iterator[Finding]:
    """After a clean stop every record agrees with its file, every file has one, and the counters are their sums.

    Until a walk came to its end only the counters hold: what else is wrong or missing is what the walk is for.
    """
    if not was_clean:
        yield Finding("clean", INDEX, "the store was not stopped cleanly; it is reconciled at the next mount")
        return
    totals, counted = index.totals(), recompute(index)
    if totals != counted:
        yield Finding("counters", INDEX, f"counters say {totals}, the records {counted}")
    for problem in index.images.problems():
        yield Finding("pictures", INDEX, problem)
    if not index.is_complete():
        return
    pending = {ino for ino, _ in index.load_queue()}
    seen: set[Ino] = set(tree.elsewhere)
    for path, st in tree.stats.items():
        ino = Ino(st.st_ino)
        seen.add(ino)
        record = index.file(ino)
        if record is None or ino in pending:
            if path in tree.references and record is None:
                yield Finding("index-reference", path, "a reference that the index does not know")
            continue
        reference = tree.references.get(path)
        if record.stamp != Stamp.of(st):
            yield Finding("index-stamp", path, "changed since it was settled, by something other than a mount")
        elif (record.state is FileState.REFERENCE) != (reference is not None and bool(st.st_size)):
            yield Finding("index-state", path, f"recorded as {record.state.word}, which it is not")
        elif reference is not None and record.content != reference.content:
            yield Finding("index-content", path, "recorded with another content than its reference names")
        if path not in index.paths(ino, backing.root_ino):
            yield Finding("index-path", path, "is not recorded under this path")
    after = Ino(-1)
    while chunk := index.all_files(after, 1000):
        for ino, _ in chunk:
            if ino not in seen:
                paths = index.paths(ino, backing.root_ino)
                yield Finding("index-file", paths[0] if paths else b"", f"inode {ino} is recorded, and gone")
        after = chunk[-1][0]


def _has_data(backing: Backing, path: bytes, st: os.stat_result) -> bool:
    if not st.st_blocks:
        return False
    fd = backing.open_quietly(path)
    try:
        return backing.has_data(fd)
    finally:
        os.close(fd)


def _take_back(backing: Backing, blobs: Blobs, content: ContentKey) -> None:
    """A missing blob may be in the trash; else a plain file may take its place, later."""
    if blobs.stat(content) is None and any(each.content == content for each in Trash(backing).list()):
        Trash(backing).take_back(content)


def _forget(backing: Backing, path: bytes) -> Callable[[], None]:
    def repair() -> None:
        fd = backing.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if not os.fstat(fd).st_size:  # or another file came to the path since
                backing.fremove_reference(fd)
        finally:
            os.close(fd)

    return repair


def _abandon(backing: Backing, path: bytes, reference: Reference) -> Callable[[], None]:
    def repair() -> None:
        fd = backing.open(path, os.O_RDWR | os.O_NONBLOCK)
        try:
            if backing.fread_reference(fd) == reference:  # or another file came to the path since
                abandon(backing, fd, reference)
        finally:
            os.close(fd)

    return repair
