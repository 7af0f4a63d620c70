"""The most dangerous lines, each broken on purpose: a test has to notice.

`MUTATIONS` is the table: what stands in a module, exactly once; what is put in its place; which promise that breaks
(their numbers are in docs/reliability.md); and the tests that are to fail then. `scripts/mutate` copies the checkout,
breaks one line at a time, runs the tests named beside it, and prints which mutations were killed by them and which
survived. It first runs them all with nothing broken.

    scripts/mutate              all
    scripts/mutate WORD …       those whose name or module has one of the words in it
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]

_COPIED = ("dedupfs", "tests", "scripts", "systemd", "pyproject.toml", "README.md")
_LIMIT_S = 240.0  # for the tests of one mutation: some of them make a store hang
_FAILED = 1  # pytest's exit code


class Mutation(NamedTuple):
    """`line` stands exactly once in the module, and may be several; `tests` are arguments of pytest. Where no test can
    tell, `survives` says why."""

    name: str
    module: str
    line: str
    becomes: str
    promise: int
    tests: tuple[str, ...]
    survives: str = ""

    @property
    def path(self) -> Path:
        return Path("dedupfs", f"{self.module}.py")

    def apply(self, source: str) -> str:
        """The module with the line broken. Raises ValueError when it is not there exactly once."""
        count = source.count(self.line)
        if count != 1:
            raise ValueError(f"{self.name}: the line stands {count} times in {self.path}")
        return source.replace(self.line, self.becomes)


_ENGINE = "tests/engine/"

# fmt: off
MUTATIONS = [
    # --- sharing
    Mutation(
        "two files share uncompared", "sharing",
        "if not same_bytes(known.fd, new.fd, checkpoint):",
        "if not same_bytes(known.fd, known.fd, checkpoint):",
        3, (_ENGINE + "test_sharing.py::test_collisions", _ENGINE + "test_damage.py"),
    ),
    Mutation(
        "a file shares with a blob uncompared", "sharing",
        "if not same_bytes(blob_fd, new.fd, new.watch.checkpoint):",
        "if not same_bytes(blob_fd, blob_fd, new.watch.checkpoint):",
        3, (_ENGINE + "test_damage.py::test_a_rotten_blob_is_healed_by_the_next_good_copy",),
    ),
    Mutation(
        "a file becomes a blob unflushed", "sharing",
        "if not self._backing.is_on_disk(os.fstat(known.fd)):",
        "if False:",
        2, (_ENGINE + "test_order.py",),
    ),
    Mutation(
        "the stamp is not compared before the rename", "sharing",
        "Key.of(st) != file.key or Stamp.of(st) != file.stamp or st.st_nlink != 1:",
        "Key.of(st) != file.key or st.st_nlink != 1:",
        4, (_ENGINE + "test_last_looks.py",),
    ),
    Mutation(
        "the inode is not compared before the rename", "sharing",
        "Key.of(st) != file.key or Stamp.of(st) != file.stamp or st.st_nlink != 1:",
        "Stamp.of(st) != file.stamp or st.st_nlink != 1:",
        4, (_ENGINE + "test_names.py::test_while_it_is_shared", _ENGINE + "test_last_looks.py"),
        "another inode has another change time as well",
    ),
    Mutation(
        "the link count is not looked at before the rename", "sharing",
        "Stamp.of(st) != file.stamp or st.st_nlink != 1:",
        "Stamp.of(st) != file.stamp:",
        4, (_ENGINE + "test_last_looks.py",),
        "a link moves the change time, which is compared as well",
    ),
    Mutation(
        "a writer who came is not seen before the rename", "sharing",
        "        file.watch.checkpoint()\n        if file.leased",
        "        if file.leased",
        4, (_ENGINE + "test_last_looks.py",),
    ),
    Mutation(
        "a file whose publishing failed keeps the blob's name", "sharing",
        "                self._take_back(staged)\n                if",
        "                self._backing.unlink(staged)\n                if",
        4, (_ENGINE + "test_last_looks.py",),
    ),
    Mutation(
        "there is no descriptor to undo with", "sharing",
        "                for fd in spare:  # first:",
        "                for fd in []:  # first:",
        7, (_ENGINE + "test_failures.py::test_no_descriptor_is_left_to_undo_with",),
    ),
    Mutation(
        "a writer around the mount who came is not seen before the rename", "sharing",
        "        if file.leased and self._backing.lease_is_breaking(file.fd):",
        "        if False:",
        4, (_ENGINE + "test_last_looks.py::test_opened_for_writing_after_the_comparison",),
    ),
    Mutation(
        "who waits for the lease of a file writes into the blob that it became", "sharing",
        "        if known.leased and not self._backing.immutable_binds_mappings and",
        "        if False and",
        4, (_ENGINE + "test_last_looks.py",),
    ),
    Mutation(
        "the blob's name is not flushed where metadata keep no order", "sharing",
        "                    self._blobs.flush_name(content)",
        "                    pass",
        2, (_ENGINE + "test_order.py",),
    ),
    Mutation(
        "the new file is replaced under its readers", "sharing",
        "if self._openfiles.get(new.key) is not None:",
        "if False:",
        4, (_ENGINE + "test_open_files.py::test_the_new_file_waits_for_its_reader",),
    ),
    Mutation(
        "a known file is replaced outside the gate", "sharing",
        "        with self._gate.exclusive():\n            self._verify(known)",
        "        with suppress():\n            self._verify(known)",
        4, (_ENGINE + "test_last_looks.py",),
    ),
    Mutation(
        "a new file is replaced outside the gate", "sharing",
        "        with self._gate.exclusive():\n            self._verify(new)",
        "        with suppress():\n            self._verify(new)",
        4, (_ENGINE + "test_last_looks.py",),
    ),
    Mutation(
        "a file is renamed while it is noted that its extents are shared", "sharing",
        "        with self._gate.exclusive():  # or who renames it now may note that first\n",
        "        with self._gate.shared():\n",
        1, (_ENGINE + "test_last_looks.py",),
    ),
    Mutation(
        "a copy is renamed while it is noted that it refers", "fileio",
        "        with self._gate.exclusive():\n            try:\n                blob_fd",
        "        with self._gate.shared():\n            try:\n                blob_fd",
        1, (_ENGINE + "test_last_looks.py",),
    ),
    Mutation(
        "a file is removed while it is noted that it was restored", "fileio",
        "            with self._gate.exclusive():  # or who removes it now may note that first\n",
        "            with self._gate.shared():\n",
        1, (_ENGINE + "test_last_looks.py",),
    ),
    Mutation(
        "files come to share while their names are listed", "vfs",
        "        with nullcontext() if self._backing.replaces_in_place else self._gate.shared():\n",
        "        with nullcontext():\n",
        4, (_ENGINE + "test_names.py",),
    ),
    Mutation(
        "a listing goes on where the one before it ended", "vfs",
        "            os.lseek(fd, 0, os.SEEK_SET)\n",
        "",
        4, (_ENGINE + "test_names.py",),
    ),
    Mutation(
        "a reference is renamed unflushed where metadata keep no order", "sharing",
        "                self._backing.fsync(fd)\n        except BaseException:",
        "                pass\n        except BaseException:",
        2, (_ENGINE + "test_order.py",),
    ),
    Mutation(
        "a reference does not keep its file's mode", "sharing",
        "os.fchmod(fd, stat.S_IMODE(st.st_mode))",
        "pass",
        9, (_ENGINE + "test_sharing.py",),
    ),
    Mutation(
        "a new reference is not noted", "sharing",
        "        self._note(Shared(st, link, file.path, FileState.REFERENCE, content, replaced=file.key.ino))",
        "        pass",
        1, (_ENGINE + "test_blobs.py",),
    ),
    Mutation(
        "readers do not follow a file that became a blob", "sharing",
        "self._openfiles.follow(known.key, Key.of(st), reference, spare)",
        "self._openfiles.follow(Key.of(st), Key.of(st), reference, spare)",
        4, (_ENGINE + "test_open_files.py::test_publishing_under_a_reader",),
    ),
    Mutation(
        "size before record where a copy becomes a reference", "sharing",
        "        self._backing.fset_reference(fd, reference)\n        self._backing.ftruncate(fd, size_bytes)\n"
        "        return reference",
        "        self._backing.ftruncate(fd, size_bytes)\n        self._backing.fset_reference(fd, reference)\n"
        "        return reference",
        1, (_ENGINE + "test_order.py",),
    ),
    Mutation(
        "bytes written from outside are not seen", "sharing",
        "if st.st_size != reference.size_bytes or (st.st_blocks and self._backing.has_data(fd)):",
        "if st.st_size != reference.size_bytes:",
        4, (_ENGINE + "test_damage.py",),
    ),
    Mutation(
        "a copy is begun without a mark", "sharing",
        "        self._backing.fset_reference(fd, marked)\n        try:",
        "        try:",
        1, (_ENGINE + "test_materialise.py", _ENGINE + "test_order.py"),
    ),
    Mutation(
        "the mark goes before the copy is flushed", "sharing",
        "            self._backing.fsync(fd)\n            if verify",
        "            if verify",
        2, (_ENGINE + "test_order.py",),
    ),
    Mutation(
        "a restored file is not compared", "sharing",
        "if verify and not same_bytes(blob_fd, fd):",
        "if False:",
        3, (_ENGINE + "test_restore.py::test_a_copy_that_differs_is_not_relied_on",),
    ),
    Mutation(
        "a copy that failed is left as it is", "sharing",
        "        except OSError:\n            abandon(self._backing, fd, marked)",
        "        except OSError:",
        7, (_ENGINE + "test_materialise.py",),
    ),
    Mutation(
        "truncating a reference removes its record first", "sharing",
        "        self._backing.ftruncate(fd, 0)\n        try:\n            self._backing.fremove_reference(fd)",
        "        try:\n            self._backing.fremove_reference(fd)\n            self._backing.ftruncate(fd, 0)",
        1, (_ENGINE + "test_materialise.py::test_killed_at_every_step", _ENGINE + "test_order.py"),
    ),
    Mutation(
        "the mark is cleared before the unfinished copy is gone", "sharing",
        "    with suppress(OSError):\n        backing.punch(fd, reference.size_bytes)",
        "    backing.fset_reference(fd, replace(reference, materialising=False, mtime_ns=0))\n"
        "    with suppress(OSError):\n        backing.punch(fd, reference.size_bytes)",
        1, (_ENGINE + "test_materialise.py::test_killed_at_every_step", _ENGINE + "test_order.py"),
    ),
    Mutation(
        "an unfinished copy stays where holes cannot be punched", "sharing",
        "    if backing.has_data(fd):\n        backing.ftruncate(fd, 0)",
        "    pass",
        1, (_ENGINE + "test_order.py",),
    ),
    Mutation(
        "the last reference is not flushed away before its blob", "sharing",
        "            os.sync()  # the last reference",
        "            pass  # the last reference",
        2, (_ENGINE + "test_order.py",),
    ),
    Mutation(
        "undoing a healing takes the blob from its references", "sharing",
        '                if label == b"publish":',
        "                if True:",
        3, (_ENGINE + "test_last_looks.py",),
    ),
    Mutation(
        "undoing takes away a blob that another file became", "sharing",
        "blob is not None and blob.st_ino == int(ino) and blob.st_nlink > 1:",
        "blob is not None:",
        3, (_ENGINE + "test_last_looks.py",),
    ),
    Mutation(
        "somebody's bytes in staging are deleted", "sharing",
        "if stat.S_ISREG(st.st_mode) and _is_name_in_staging(os.fsencode(entry.name)):",
        "if stat.S_ISREG(st.st_mode):",
        7, (_ENGINE + "test_hostile_names.py",),
    ),
    Mutation(
        "shared extents are noted of whatever is at the path", "sharing",
        '            if Key.of(st) != file.key or Stamp.of(st) != file.stamp:\n                raise Changed("renamed',
        '            if False:\n                raise Changed("renamed',
        4, (_ENGINE + "test_last_looks.py",),
    ),
    # --- openfiles
    Mutation(
        "a writer does not wait for the watcher", "openfiles",
        "                watch.given_up = True\n                self._condition.wait()",
        "                watch.given_up = True\n                break",
        4, ("tests/unit/test_openfiles.py",),
    ),
    Mutation(
        "the watcher is not told of a writer", "openfiles",
        "                watch.given_up = True\n                self._condition.wait()",
        "                self._condition.wait()",
        4, ("tests/unit/test_openfiles.py",),
    ),
    Mutation(
        "the watch is not given up", "openfiles",
        "        if self.given_up:\n",
        "        if False:\n",
        4, ("tests/unit/test_openfiles.py", _ENGINE + "test_open_files.py"),
    ),
    Mutation(
        "a writer who is coming does not count", "openfiles",
        "if key in self._watches or key in self._intents or (inode",
        "if key in self._watches or (inode",
        4, ("tests/unit/test_openfiles.py",),
    ),
    Mutation(
        "a file is watched while it is written", "openfiles",
        "(inode is not None and (inode.writers or inode.dirty)):\n                raise InUse",
        "(inode is not None and inode.dirty):\n                raise InUse",
        4, ("tests/unit/test_unseen_writers.py",),
    ),
    Mutation(
        "who passes shared does not wait for who passes exclusively", "openfiles",
        "            while self._exclusive or self._waiting:",
        "            while self._waiting:",
        4, ("tests/unit/test_openfiles.py",),
    ),
    Mutation(
        "who passes exclusively waits for nobody", "openfiles",
        "            while self._exclusive or self._shared:",
        "            while self._exclusive:",
        4, ("tests/unit/test_openfiles.py",),
    ),
    Mutation(
        "a file just opened does not keep its blob", "openfiles",
        "                not inode.loaded or (inode.reference",
        "                (inode.reference",
        4, (_ENGINE + "test_blobs.py",),
    ),
    Mutation(
        "a change within a tick is taken for none", "openfiles",
        "self.before = Stamp.of(st) if st.st_ctime_ns < time.time_ns() - _TICK_NS else None",
        "self.before = Stamp.of(st)",
        3, ("tests/unit/test_unseen_writers.py",),
    ),
    Mutation(
        "what is written unseen is taken for unchanged", "openfiles",
        "and self.writers == 1 and Stamp.of(os.fstat(own_fd)) == self.before:",
        "and self.writers == 1:",
        3, ("tests/unit/test_unseen_writers.py",),
    ),
    Mutation(
        "a digest of what was seen stands for what was written unseen", "openfiles",
        "        if handle.writes:\n            self.stream = None\n            if not self.dirty:",
        "        if handle.writes:\n            if not self.dirty:",
        3, ("tests/unit/test_unseen_writers.py",),
    ),
    # --- settle
    Mutation(
        "a blob is removed while the index is incomplete", "settle",
        "for content in list(self._unreferenced) if self.index_is_complete else []:",
        "for content in list(self._unreferenced):",
        6, (_ENGINE + "test_blobs.py::test_not_before_the_tree_was_walked", _ENGINE + "test_failures.py"),
    ),
    Mutation(
        "a blob is removed while it is referenced", "settle",
        "if not self.is_referenced(content) and not self._remove(content):",
        "if not self._remove(content):",
        4, (_ENGINE + "test_blobs.py",),
    ),
    Mutation(
        "a blob is removed while somebody reads it", "settle",
        "if undecided or self._openfiles.uses(content):",
        "if undecided:",
        4, (_ENGINE + "test_blobs.py",),
    ),
    Mutation(
        "a blob is removed before what is noted is counted", "settle",
        "if undecided or self._openfiles.uses(content):",
        "if self._openfiles.uses(content):",
        4, (_ENGINE + "test_last_looks.py",),
    ),
    Mutation(
        "a blob is removed outside the gate", "settle",
        "            with self._gate.exclusive():\n                # Inside the gate no app makes a reference",
        "            with suppress():\n                # Inside the gate no app makes a reference",
        4, (_ENGINE + "test_last_looks.py",),
    ),
    Mutation(
        "a lost batch is forgotten", "settle",
        "self.index_is_complete, self.lost_a_batch = False, True\n            for ino",
        "pass\n            for ino",
        6, (_ENGINE + "test_failures.py::test_a_lost_batch_removes_no_blob_and_is_made_up_for",),
    ),
    Mutation(
        "the index is called complete though a batch was lost", "settle",
        "self.index_is_complete = not self.lost_a_batch",
        "self.index_is_complete = True",
        6, (_ENGINE + "test_failures.py",),
    ),
    Mutation(
        "a digest outlives another write", "settle",
        "                if ino in self._fresh or ino in self._backlog:\n                    raise Changed",
        "                if False:\n                    raise Changed",
        3, (_ENGINE + "test_last_looks.py",),
    ),
    Mutation(
        "the queue is lost at a clean stop", "settle",
        "self._index.save_queue(list({**self._postponed, **waiting}.items()))",
        "pass",
        7, (_ENGINE + "test_open_files.py::test_close_leaves_what_is_pending_for_the_next_start",),
    ),
    # --- matching
    Mutation(
        "a file is shared while somebody writes to it around the mount", "matching",
        "                if not self._lease(file):",
        "                self._lease(file)\n                if False:",
        4, (_ENGINE + "test_last_looks.py::test_shared_when_nobody_has_it_open_for_writing",),
    ),
    Mutation(
        "a file becomes a blob while somebody writes to it around the mount", "matching",
        "                if not self._lease(other):",
        "                if False:",
        4, (_ENGINE + "test_last_looks.py::test_shared_when_nobody_has_it_open_for_writing",),
    ),
    Mutation(
        "what a writer around the mount kept from being shared is not tried again", "matching",
        " and self._postpone(file.key.ino, file.path):\n            log.info",
        ":\n            log.info",
        3, (_ENGINE + "test_last_looks.py::test_shared_when_nobody_has_it_open_for_writing",),
    ),
    Mutation(
        "who is just letting go of a file is not waited for", "matching",
        "deadline = time.monotonic() + (_LETTING_GO_S if lately else 0)",
        "deadline = time.monotonic()",
        3, (_ENGINE + "test_last_looks.py::test_whoever_is_just_letting_go_is_waited_for",),
    ),
    Mutation(
        "a file that changed while it was hashed keeps the digest", "matching",
        "                if Stamp.of(st) != file.stamp:\n                    raise Changed",
        "                if False:\n                    raise Changed",
        3, (_ENGINE + "test_last_looks.py",),
    ),
    Mutation(
        "the lease is not asked", "matching",
        "        if file.leased and self._backing.lease_is_breaking(file.fd):",
        "        if False:",
        3, (_ENGINE + "test_last_looks.py",),
    ),
    Mutation(
        "a digest is believed whatever the stamp says", "matching",
        "if before is not None and before.stamp == file.stamp and before.state",
        "if before is not None and before.state",
        3, (_ENGINE + "test_sharing.py", _ENGINE + "test_reconcile.py::test_changes_behind_our_back"),
    ),
    Mutation(
        "the clock's tick is not waited for", "matching",
        "        if 0 <= age_ns < _TICK_NS:",
        "        if False:",
        3, (_ENGINE + "test_last_looks.py",),
    ),
    Mutation(
        "a blob is healed with a copy that is bad", "matching",
        "        if self._hash(file.fd, file.watch.checkpoint) != content.digest:",
        "        if False:",
        3, (_ENGINE + "test_damage.py",),
    ),
    Mutation(
        "a good blob is taken for damaged", "matching",
        "                if self._hash(blob_fd, file.watch.checkpoint) == content.digest:",
        "                if False:",
        3, (_ENGINE + "test_sharing.py::test_collisions",
            _ENGINE + "test_damage.py::test_a_collision_is_no_damage"),
    ),
    Mutation(
        "a known file is believed whatever its stamp says", "matching",
        "if st.st_ino == ino and Stamp.of(st) == record.stamp:",
        "if st.st_ino == ino:",
        3, (_ENGINE + "test_damage.py",),
    ),
    Mutation(
        "a known file with two names becomes a blob", "matching",
        "if other is None or os.fstat(other.fd).st_nlink != 1 or not self._may_share(other, file):",
        "if other is None or not self._may_share(other, file):",
        4, (_ENGINE + "test_sharing.py",),
    ),
    Mutation(
        "files of two domains share", "matching",
        "self._rules.domain_of(other.path) == self._rules.domain_of(file.path)",
        "True",
        3, (_ENGINE + "test_domains.py",),
    ),
    Mutation(
        "a file joins a copy that another domain shares, too", "matching",
        "if domains == {domain}:",
        "if domain in domains:",
        3, (_ENGINE + "test_domains.py",),
    ),
    Mutation(
        "a blob is joined before it is known whose it is", "matching",
        "if self._index_is_complete():",
        "if True:",
        3, (_ENGINE + "test_domains.py",),
    ),
    Mutation(
        "a domain begins a copy with one that shares with others", "matching",
        "if held is not None and held.state is not FileState.PLAIN and content != target:",
        "if False:",
        3, (_ENGINE + "test_domains.py",),
    ),
    Mutation(
        "a domain takes a number that others share", "matching",
        "return self._blobs.stat(content) is None and not domains_of("
        "batch, self._rules, content, self._backing.root_ino)",
        "return self._blobs.stat(content) is None",
        3, (_ENGINE + "test_domains.py",),
    ),
    Mutation(
        "other bytes get the number of a copy", "matching",
        "taken = {number % COLLISIONS for number in taken}",
        "taken = set(taken)",
        3, (_ENGINE + "test_domains.py",),
    ),
    Mutation(
        "a copy inside the mount goes from one domain to another", "fileio",
        "if self._rules.domains and not self._is_of_one_domain(source, target):\n            return 0",
        "if False:\n            return 0",
        3, (_ENGINE + "test_domains.py",),
    ),
    Mutation(
        "a copy shares extents with another domain", "fileio",
        "return not self._rules.domains or self._is_of_one_domain(source, target)",
        "return True",
        3, (_ENGINE + "test_domains.py",),
    ),
    Mutation(
        "a copy shares extents with what may not share", "fileio",
        "            if path is None or not self._rules.allow(path, size_bytes):\n                return False",
        "            if path is None:\n                return False",
        3, (_ENGINE + "test_rules.py",),
    ),
    Mutation(
        "a copy joins what several domains share", "fileio",
        "if inode.reference.materialising or not self._may_join(source, inode.reference.content):",
        "if inode.reference.materialising:",
        3, (_ENGINE + "test_domains.py",),
    ),
    Mutation(
        "a file with two names becomes a reference", "matching",
        "shareable = st.st_nlink == 1 and self._rules.allow(file.path, st.st_size)",
        "shareable = self._rules.allow(file.path, st.st_size)",
        4, (_ENGINE + "test_last_looks.py",),
    ),
    Mutation(
        "a hash says equal of a file and a blob", "matching",
        "return same_bytes(fd, file.fd, file.watch.checkpoint)",
        "return True",
        3, (_ENGINE + "test_last_looks.py",),
    ),
    Mutation(
        "a hash says equal of two files", "matching",
        "return same_bytes(other.fd, file.fd, file.watch.checkpoint)",
        "return True",
        3, (_ENGINE + "test_last_looks.py",),
    ),
    Mutation(
        "the blob of a reference that was written to is not kept", "matching",
        "                batch.put_file(file.key.ino, record)",
        "                pass",
        3, (_ENGINE + "test_last_looks.py",),
    ),
    Mutation(
        "the blob of a reference below another store is not kept", "matching",
        "            self._recording.put(batch, file.link, file.path, st, FileState.REFERENCE, reference.content)\n\n",
        "            pass\n\n",
        3, (_ENGINE + "test_reconcile.py",),
    ),
    # --- fileio
    Mutation(
        "a writer does not announce himself", "fileio",
        "            with self._openfiles.writing_intent(key):",
        "            with suppress():",
        4, (_ENGINE + "test_open_files.py",),
    ),
    Mutation(
        "a writer is announced to another inode", "fileio",
        "                if handle.inode.key == key:\n                    break",
        "                if True:\n                    break",
        4, (_ENGINE + "test_last_looks.py",),
    ),
    Mutation(
        "a write goes into a reference", "fileio",
        "            self._materialise(inode, fd)\n            self._drop_privileges(inode, fd, caller)\n"
        "            inode.dirty, handle.flushed",
        "            self._drop_privileges(inode, fd, caller)\n            inode.dirty, handle.flushed",
        4, (_ENGINE + "test_materialise.py",),
    ),
    Mutation(
        "a written file is not settled again", "fileio",
        "            inode.dirty, handle.flushed = True, False\n",
        "            handle.flushed = False\n",
        3, (_ENGINE + "test_open_files.py", _ENGINE + "test_materialise.py"),
    ),
    Mutation(
        "a copy refers to a blob that is being removed", "fileio",
        "        with self._gate.exclusive():\n            try:\n                blob_fd",
        "        with suppress():\n            try:\n                blob_fd",
        4, (_ENGINE + "test_last_looks.py",),
    ),
    Mutation(
        "a file that changed is copied by reference", "fileio",
        "            and record.stamp == Stamp.of(st)\n",
        "",
        4, (_ENGINE + "test_materialise.py",),
        "publishing compares the stamp once more",
    ),
    Mutation(
        "a file that waits to be hashed is copied by reference", "fileio",
        "            and not self._settler.is_pending(key.ino)\n",
        "",
        3, (_ENGINE + "test_materialise.py",),
        "its stamp, and the watch that publishing takes, say the same",
    ),
    Mutation(
        "a file that somebody writes to around the mount is copied by reference", "fileio",
        "                    file.leased = self._backing.take_read_lease(fd)\n",
        "",
        4, (_ENGINE + "test_last_looks.py::test_copied_while_somebody_has_it_open_for_writing",),
    ),
    Mutation(
        "a file with two names is copied by reference", "fileio",
        "            and st.st_nlink == 1\n            and key.device",
        "            and key.device",
        4, (_ENGINE + "test_materialise.py",),
        "publishing looks at the links once more",
    ),
    Mutation(
        "a reference that was truncated keeps its record", "fileio",
        "if inode.reference is not None or self._carries_a_record(fd):",
        "if inode.reference is not None:",
        1, (_ENGINE + "test_materialise.py",),
    ),
    Mutation(
        "fsync leaves the blob unflushed", "fileio",
        "            self._backing.fsync(handle.read_fd)\n",
        "",
        2, (_ENGINE + "test_order.py",),
    ),
    Mutation(
        "fsync leaves a reference's name unflushed", "fileio",
        "                self._backing.fsync_directory(os.path.dirname(path))\n        elif data_only",
        "                pass\n        elif data_only",
        2, (_ENGINE + "test_order.py",),
    ),
    Mutation(
        "fsync flushes nothing", "fileio",
        "        else:\n            self._fsync_plain(inode, handle.own_fd)\n\n",
        "\n",
        2, (_ENGINE + "test_order.py",),
    ),
    Mutation(
        "fdatasync leaves the mark of a materialised file on disk", "fileio",
        "        elif data_only and inode.key not in self._unmarked:",
        "        elif data_only:",
        2, (_ENGINE + "test_order.py",),
    ),
    Mutation(
        "O_DSYNC leaves the mark of a materialised file on disk", "fileio",
        "        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DSYNC:",
        "        if False:",
        2, (_ENGINE + "test_order.py",),
    ),
    Mutation(
        "O_SYNC is forgotten", "fileio",
        "_KEPT_FLAGS = os.O_ACCMODE | os.O_SYNC | os.O_DSYNC",
        "_KEPT_FLAGS = os.O_ACCMODE",
        2, (_ENGINE + "test_order.py",),
    ),
    Mutation(
        "set-id bits survive a write", "fileio",
        "        os.fchmod(fd, cleared)\n",
        "        pass\n",
        9, (_ENGINE + "test_last_looks.py",),
    ),
    # --- blobs
    Mutation(
        "a blob of another size is opened", "blobs",
        "if os.fstat(fd).st_size != size_bytes:",
        "if False:",
        3, ("tests/unit/test_blobs.py::test_what_cannot_be_vouched_for_is_not_opened",),
    ),
    Mutation(
        "a blob that is somebody's file gets new references", "blobs",
        "return st is not None and st.st_nlink == 1",
        "return st is not None",
        4, (_ENGINE + "test_last_looks.py",),
    ),
    Mutation(
        "the damaged bytes are lost in healing", "blobs",
        "self._backing.rename(aside, target, RENAME_EXCHANGE)",
        "self._backing.rename(aside, target)",
        3, ("tests/unit/test_blobs.py::test_supersede_keeps_both",
            _ENGINE + "test_damage.py::test_a_second_rot_is_kept_too"),
    ),
    Mutation(
        "a blob's own inode is not flushed before it takes the place", "blobs",
        "                self._backing.fsync(target)\n",
        "",
        2, (_ENGINE + "test_order.py",),
    ),
    Mutation(
        "a blob's own inode is not compared", "blobs",
        "                if not same_bytes(source, target):",
        "                if False:",
        3, (_ENGINE + "test_order.py",),
    ),
    Mutation(
        "somebody's file is sealed", "blobs",
        "if self._backing.is_immutable(fd) or os.fstat(fd).st_nlink != 1:",
        "if self._backing.is_immutable(fd):",
        7, (_ENGINE + "test_last_looks.py",),
    ),
    Mutation(
        "the directory of a blob's directory is not flushed", "blobs",
        "            self._backing.fsync_directory(BLOBS)\n",
        "",
        2, (_ENGINE + "test_order.py",),
    ),
    # --- backing
    Mutation(
        "a symbolic link is followed out of the tree", "backing",
        "        flags |= os.O_NOFOLLOW | os.O_CLOEXEC",
        "        flags |= os.O_CLOEXEC",
        9, (_ENGINE + "test_last_looks.py",),
    ),
    Mutation(
        "what was written during a flush counts as flushed", "backing",
        "return st.st_ctime_ns < self._synced_ns - _TICK_NS and",
        "return st.st_ctime_ns < self._synced_ns and",
        2, (_ENGINE + "test_order.py",),
    ),
    Mutation(
        "a clock that was set back makes files look flushed", "backing",
        "self._synced_ns - _TICK_NS and abs(_clock_ns() - self._synced_clock_ns) < _TICK_NS",
        "self._synced_ns - _TICK_NS",
        2, (_ENGINE + "test_order.py",),
    ),
    Mutation(
        "the time of a flush is its end", "backing",
        "        self._synced_ns, self._synced_clock_ns = now_ns, clock_ns",
        "        self._synced_ns, self._synced_clock_ns = time.time_ns(), clock_ns",
        2, (_ENGINE + "test_order.py",),
    ),
    Mutation(
        "a copy that ends early counts as whole", "backing",
        '                raise OSError(errno.EIO, "content ends before its recorded size")',
        "                return",
        3, (_ENGINE + "test_order.py",),
    ),
    Mutation(
        "extents that differ count as shared", "backing",
        "            if status == _FILE_DEDUPE_RANGE_DIFFERS:\n                return False",
        "            if status == _FILE_DEDUPE_RANGE_DIFFERS:\n                return True",
        3, (_ENGINE + "test_sharing.py::test_collisions", _ENGINE + "test_damage.py"),
    ),
    Mutation(
        "a hole ends with the last byte", "backing",
        "whole_blocks = -(-size_bytes // _LARGEST_BLOCK_BYTES) * _LARGEST_BLOCK_BYTES",
        "whole_blocks = size_bytes",
        1, (_ENGINE + "test_order.py", _ENGINE + "test_materialise.py"),
    ),
    Mutation(
        "a lease that a writer keeps from being had is none that nobody can have", "backing",
        "            raise\n        except OSError:\n            return False\n        return True\n",
        "            return False\n        except OSError:\n            return False\n        return True\n",
        4, (_ENGINE + "test_last_looks.py::test_copied_while_somebody_has_it_open_for_writing",),
    ),
    Mutation(
        "nothing is settled where a server gives leases", "backing",
        "            if self.filesystem in _LEASED_BY_A_SERVER:",
        "            if False:",
        3, (_ENGINE + "test_last_looks.py::test_the_server_gives_no_lease",),
    ),
    Mutation(
        "what could not be undone is left at a clean stop", "engine",
        "            self.references.sweep()  # what could",
        "            # what could",
        7, (_ENGINE + "test_failures.py::test_healing_that_cannot_be_undone",),
    ),
    Mutation(
        "a broken lease ends the daemon", "backing",
        "            fcntl.fcntl(fd, _F_SETSIG, signal.SIGURG)\n",
        "",
        7, (_ENGINE + "test_open_files.py::test_a_write_from_outside_while_hashing_is_noticed",),
    ),
    Mutation(
        "a record in a user's attribute is believed by root", "backing",
        'b"trusted.dedupfs.ref" if _may_use_trusted() else b"user.dedupfs.ref"',
        'b"user.dedupfs.ref"',
        9, (_ENGINE + "test_damage.py::test_a_forged_reference_is_hidden_from_apps",),
    ),
    Mutation(
        "names are not flushed where there is no order", "backing",
        "            checked(_libc.syncfs(directory_fd))",
        "            self.fsync(directory_fd)",
        2, (_ENGINE + "test_order.py",),
        "only losing power on btrfs shows it, now and then: scripts/power-loss 300 -k btrfs",
    ),
    # --- when the disk is full, or the daemon was killed
    Mutation(
        "what is kept for a full disk stays kept", "settle",
        "if self._frees(batch) and self._reserve.give():",
        "if False:",
        7, ("tests/crash/test_full_disk.py::test_deleting_frees_a_disk_without_a_free_block",),
    ),
    Mutation(
        "a dead mount goes before the new one comes", "unmount",
        "        while _mounted_types(mountpoint)[-2:] == [control.FUSE_TYPE] * 2 and is_dead(mountpoint):\n",
        "        while is_dead(mountpoint):\n",
        1, ("tests/mount/test_life.py::test_nobody_sees_what_a_dead_mount_hides",),
    ),
    # --- what the kernel and LMDB keep
    Mutation(
        "the kernel drops pages as it sees fit", "fusefs",
        "        conn.want &= ~_CAP_AUTO_INVAL_DATA\n",
        "",
        4, ("tests/mount/test_coherence.py",),
    ),
    Mutation(
        "an open drops the pages under a writer", "kernelcache",
        "other.writes and other is not handle and other.known_as == handle.known_as",
        "False",
        4, ("tests/unit/test_kernelcache.py",),
    ),
    Mutation(
        "another inode at a path drops the pages under a writer", "fusefs",
        "        if not is_written:\n",
        "        if True:\n",
        4, ("tests/unit/test_kernelcache.py",),
    ),
    Mutation(
        "what is known of pages stays behind when a directory is renamed", "kernelcache",
        "            if is_directory:\n",
        "            if False:\n",
        4, ("tests/unit/test_kernelcache.py",),
    ),
    Mutation(
        "what is known of pages is taken for that of the file that comes there", "kernelcache",
        "for replaced in set(moves.values()) - moves.keys():",
        "for replaced in ():",
        4, ("tests/unit/test_kernelcache.py",),
    ),
    Mutation(
        "pages stay over what came past the mount", "fusefs",
        "fi.keep_cache = int(self._pages.may_stay(handle))",
        "fi.keep_cache = 1",
        4, ("tests/mount/test_coherence.py",),
    ),
    Mutation(
        "a dead index is closed under its readers", "environment",
        "while _is_read(self.env) and time.monotonic() < deadline:",
        "while False:",
        7, ("tests/unit/test_index_anew.py",),
    ),
    Mutation(
        "another file is opened in the place of a dead index", "environment",
        "if _inode(self._directory) != tables.inode:",
        "if False:",
        7, ("tests/unit/test_index_anew.py",),
    ),
]
# fmt: on


def _copy(target: Path) -> None:
    for name in _COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)


def _run(tests: Sequence[str], checkout: Path, limit_s: float) -> tuple[int | None, str]:
    """Exit code and output of pytest; None when it did not come to its end."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider"]
    command += ["--timeout=90", "--no-header", "--tb=line", *tests]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=checkout, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it still unmounts what it mounted
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            code = None
        output.seek(0)
        return code, output.read()


def _without_words(tests: Sequence[str]) -> list[str]:
    """The files and tests among arguments of pytest."""
    return [test for test in tests if test.startswith("tests/")]


def _failed_test(output: str) -> str:
    names = [line.split(" ", 1)[1].split(" - ")[0] for line in output.splitlines() if line.startswith("FAILED ")]
    names += [line.split(" ", 1)[1].split(" - ")[0] for line in output.splitlines() if line.startswith("ERROR ")]
    return names[0].removeprefix("tests/") if names else "?"


def main(words: Sequence[str]) -> int:
    chosen = [each for each in MUTATIONS if not words or any(w in each.name or w == each.module for w in words)]
    problems = survivors = 0
    with tempfile.TemporaryDirectory(prefix="dedupfs-mutate.", dir=os.environ.get("TMPDIR", "/var/tmp")) as scratch:
        checkout = Path(scratch)
        _copy(checkout)
        quick = sorted({test for each in chosen for test in _without_words(each.tests) if "crash" not in test})
        code, output = _run(quick, checkout, 20 * _LIMIT_S)
        if code != 0:
            print(output)
            print("the tests fail with nothing broken")
            return 2
        print("| promise | module | mutation | | by | s |\n|---|---|---|---|---|---|")
        for each in chosen:
            started = time.monotonic()
            path = checkout / each.path
            sound = path.read_text()
            path.write_text(each.apply(sound))
            try:
                code, output = _run(each.tests, checkout, _LIMIT_S)
            finally:
                path.write_text(sound)
            if code == _FAILED:
                verdict, by = "killed", _failed_test(output)
            elif code is None or code < 0:
                verdict, by = "killed", "it hangs" if code is None else f"signal {-code}"
            elif code == 0 and each.survives:
                verdict, by = "survives", each.survives
            elif code == 0:
                verdict, by, survivors = "**survived**", "", survivors + 1
            else:
                verdict, by, problems = f"pytest: exit code {code}", output.strip().splitlines()[-1], problems + 1
            took_s = time.monotonic() - started
            print(f"| {each.promise} | {each.module} | {each.name} | {verdict} | {by} | {took_s:.0f} |", flush=True)
    print(f"\n{len(chosen)} mutations, {survivors} survived, {problems} could not be tried")
    return 2 if problems else int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
