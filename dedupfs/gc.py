"""What a store holds and nobody needs: blobs without a reference, leftovers of crashes, trash whose time is over.

Works on a store that nobody owns. Plan, show, execute. The plan comes from the tree, not from the index: one walk reads
every reference. If a single file or directory could not be looked at, nothing is removed, for it may be the reference
that a blob is kept for. Blobs go to the trash first, and are deleted when they were there long enough and still nothing
refers to them. Every step is one rename or unlink of something unneeded; killed anywhere, it is run again.
"""

import os
import stat
import time
from contextlib import ExitStack
from dataclasses import dataclass, field

from .backing import Backing
from .blobs import Blobs
from .config import MountOptions, Share
from .engine import Engine
from .errors import StoreError
from .model import ContentKey, Progress
from .reconcile import Census, refuse_references_elsewhere, walk
from .rules import NOTHING
from .store import ORPHANS, STAGING, Store
from .trash import Discarded, Trash

_DAY_S = 86400


@dataclass(slots=True)
class Plan:
    """What is to be done. With `problems`, nothing is."""

    leftovers: list[bytes] = field(default_factory=list)
    unreferenced: dict[ContentKey, int] = field(default_factory=dict)  # sizes
    wanted_back: list[ContentKey] = field(default_factory=list)  # a reference names them, and there is no such blob
    expired: list[Discarded] = field(default_factory=list)
    waiting: list[Discarded] = field(default_factory=list)  # their time is not over
    problems: list[dict[str, str]] = field(default_factory=list)

    def refuse(self, path: bytes, reason: str) -> None:
        self.problems.append({"path": os.fsdecode(path), "reason": reason})

    def as_json(self) -> dict[str, object]:
        return {
            "leftovers": [os.fsdecode(path) for path in self.leftovers],
            "unreferenced": len(self.unreferenced),
            "unreferenced_bytes": sum(self.unreferenced.values()),
            "taken_back": len(self.wanted_back),
            "expired": len(self.expired),
            "expired_bytes": sum(each.size_bytes for each in self.expired),
            "waiting": len(self.waiting),
            "waiting_bytes": sum(each.size_bytes for each in self.waiting),
            "problems": self.problems,
        }


def gc(source: str, *, keep_days: float, dry_run: bool, progress: Progress) -> Plan:
    """Clear the store of `source`; a `dry_run` only says what that would be. Raises Busy when it is in use."""
    if not dry_run:
        with Engine(source, MountOptions(share=Share.REFERENCE, rules=NOTHING)):
            pass  # takes back what a crash left half-way, before anything is concluded from it
    with ExitStack() as stack:
        backing = Backing(source)
        stack.callback(backing.close)
        store = stack.enter_context(Store(backing))
        if store.was_clean:
            stack.callback(store.mark_clean)  # nothing that the index knows of is changed
        plan = _plan(backing, before_s=time.time() - keep_days * _DAY_S, progress=progress)
        if not dry_run and not plan.problems:
            _execute(backing, plan)
    return plan


def _plan(backing: Backing, *, before_s: float, progress: Progress) -> Plan:
    plan = Plan()
    for directory in (STAGING, ORPHANS):
        plan.leftovers += [directory + b"/" + os.fsencode(entry.name) for entry in backing.scandir(directory)]
    referenced = _referenced(backing, plan, progress)
    present = dict(Blobs(backing).list())
    if not plan.problems and present.keys() - referenced:
        # Somebody who moves files meanwhile can hide one from a walk; hardly from two.
        referenced |= _referenced(backing, plan, progress)
    for content, st in present.items():
        if content not in referenced:
            if st.st_nlink != 1:
                plan.refuse(Blobs.path(content), f"has {st.st_nlink} links and no reference; run dedupfs fsck")
            plan.unreferenced[content] = st.st_size
    for discarded in Trash(backing).list():
        if discarded.content in referenced and discarded.content not in present:
            if discarded.content not in plan.wanted_back:
                plan.wanted_back.append(discarded.content)
        elif discarded.time_s <= before_s:
            plan.expired.append(discarded)
        else:
            plan.waiting.append(discarded)
    return plan


def _referenced(backing: Backing, plan: Plan, progress: Progress) -> set[ContentKey]:
    """What the tree refers to; what stands in the way of knowing that goes into the plan."""
    found: set[ContentKey] = set()
    census = Census()

    def look(path: bytes) -> None:
        try:
            reference = backing.read_reference(path)
        except FileNotFoundError:
            return
        except (OSError, StoreError) as error:
            plan.refuse(path, str(error))
            return
        if reference is not None:
            found.add(reference.content)

    for path, st in walk(backing, census, lambda: False):
        if stat.S_ISREG(st.st_mode):
            look(path)
            census.files += 1
            if not census.files % 1000:
                progress("looking for references", census.files, None)
    for path in plan.leftovers:
        look(path)
    refuse_references_elsewhere(backing, census)
    for path, reason in census.unreadable_paths:
        plan.refuse(path, reason)
    return found


def _execute(backing: Backing, plan: Plan) -> None:
    trash, now_s = Trash(backing), int(time.time())
    for content in plan.wanted_back:
        try:
            trash.take_back(content)
        except StoreError as error:
            plan.refuse(Blobs.path(content), str(error))
    for content in plan.unreferenced:
        trash.put(content, now_s=now_s)
    if plan.expired:
        backing.sync()  # what removed their last references must last before they go
    for discarded in plan.expired:
        trash.remove(discarded)
