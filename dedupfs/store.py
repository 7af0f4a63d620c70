"""The `.dedupfs` directory: its layout, its format version, its one owner, and whether it was left in order.

    .dedupfs/          mode 0700
        format         JSON: {"version": 1, "uuid": "…", "references": "trusted" | "user"}; written once
        README         how to get the files back without dedupfs
        lock           flock()ed by the one process that may change the store
        clean          exists while nobody owns the store and its index agrees with the tree
        daemon.json    while mounted: {"pid": …, "mountpoint": …, "socket": …}
        history.jsonl  what there was, day by day (see `history`)
        sharing.json   which files must not share, as the last mount was told; absent where all may
        reserve        room for when the disk is full (see `reserve`)
        blobs/         canonical contents (see `blobs`)
        index/         LMDB (see `index`)
        staging/       references under construction; anything left here by a crash is swept at the next start
        orphans/       files that were unlinked while open; swept at the next start
        trash/         blobs that were found without a reference (see `trash`)
        quarantine/    what was found damaged or foreign: never deleted by dedupfs

A store is opened by whoever is about to change it (a mount, or an offline command), never by two.
"""

import errno
import fcntl
import itertools
import json
import logging
import os
import stat
import uuid
from contextlib import suppress
from typing import Self

from .backing import Backing
from .codec import json_object
from .errors import Busy, SourceError, StoreError, UnknownFormat
from .model import ROOT, STORE_DIRECTORY
from .readme import readme
from .rules import EVERYTHING, SharingRules

log = logging.getLogger(__name__)

FORMAT_VERSION = 1

_FORMAT = STORE_DIRECTORY + b"/format"
_LOCK = STORE_DIRECTORY + b"/lock"
_CLEAN = STORE_DIRECTORY + b"/clean"
_DAEMON = STORE_DIRECTORY + b"/daemon.json"
_README = STORE_DIRECTORY + b"/README"
_RULES = STORE_DIRECTORY + b"/sharing.json"

BLOBS = STORE_DIRECTORY + b"/blobs"
INDEX = STORE_DIRECTORY + b"/index"
RESERVE = STORE_DIRECTORY + b"/reserve"
STAGING = STORE_DIRECTORY + b"/staging"
ORPHANS = STORE_DIRECTORY + b"/orphans"
QUARANTINE = STORE_DIRECTORY + b"/quarantine"
TRASH = STORE_DIRECTORY + b"/trash"  # made when it is first needed
_DIRECTORIES = (BLOBS, INDEX, STAGING, ORPHANS, QUARANTINE)


class Store:
    """An owned store. Use as a context manager, or call `close`."""

    def __init__(self, backing: Backing) -> None:
        """Take the store of this source, making it on first use.

        Raises Busy when another process owns it, UnknownFormat when a newer version wrote it, StoreError when its
        format file is damaged, SourceError when the source cannot be written, or the store is another user's kind.
        """
        self._backing = backing
        self._namespace = backing.reference_xattr.split(b".")[0].decode()
        shown = os.fsdecode(backing.source)
        try:
            with suppress(FileExistsError):
                backing.mkdir(STORE_DIRECTORY, 0o700)
            st = backing.lstat(STORE_DIRECTORY)
            if not stat.S_ISDIR(st.st_mode) or st.st_uid != os.geteuid() or st.st_mode & 0o022:
                raise SourceError(f"{shown}/.dedupfs is not ours alone, and others could change what is in it")
            self._lock_fd = backing.open(_LOCK, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            reason = error.strerror
            if error.errno == errno.EROFS:
                reason = "it is read-only; dedupfs keeps its store in it"
            raise SourceError(f"cannot make a store in {shown}: {reason}") from None
        try:
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(f"{shown} is in use by another dedupfs ({self._owner()})") from None
            if not self._is_locked():
                raise Busy(f"the store in {shown} was removed just now; try again")
            self.uuid = self._read_or_write_format()
            st = backing.lstat(_FORMAT)
            # The index names inodes by number. A copy of the store, file by file, has other numbers, and another time
            # here, which nothing can set; a copy of the whole filesystem keeps both.
            self.identity = f"{self.uuid} {st.st_ino} {st.st_ctime_ns}"
            for directory in _DIRECTORIES:
                with suppress(FileExistsError):
                    backing.mkdir(directory, 0o700)
            self._leave_readme()
            self.was_clean = self._take_clean_mark()
        except BaseException:
            os.close(self._lock_fd)
            raise

    def _is_locked(self) -> bool:
        """Whether the file that we have locked is the one that others will: `leave` removes it while it holds it."""
        try:
            return os.path.samestat(self._backing.lstat(_LOCK), os.fstat(self._lock_fd))
        except FileNotFoundError:
            return False

    def _owner(self) -> str:
        daemon = read_daemon(self._backing)
        return f"mounted at {daemon['mountpoint']}, pid {daemon['pid']}" if daemon else "an offline command"

    def _read_or_write_format(self) -> str:
        shown = os.fsdecode(self._backing.source + b"/" + _FORMAT)
        raw = read_whole(self._backing, _FORMAT)
        if not raw:
            if self._has_blobs():
                # What their references are called is not known any more; under the wrong name nothing refers to them.
                raise StoreError(f"{shown} is missing, though there are blobs; restore it from a backup of the store")
            # Empty is what a crash between creating and writing leaves; nothing else can exist before it is written.
            identity = str(uuid.uuid4())
            record = {"version": FORMAT_VERSION, "uuid": identity, "references": self._namespace}
            write_whole(self._backing, _FORMAT, json.dumps(record).encode())
            self._backing.fsync_directory(STORE_DIRECTORY)
            self._backing.fsync_directory(b"")
            return identity
        try:
            known = json_object(raw)
            if not isinstance(known.get("version"), (int, str)):
                raise ValueError("version")
            version = int(known["version"])
            if version != FORMAT_VERSION:
                # Before anything else is looked for: another version may keep it elsewhere.
                raise UnknownFormat(
                    f"{shown} says format {version}, this dedupfs knows {FORMAT_VERSION}; use a newer one"
                )
            references = known.get("references")
            if not isinstance(known.get("uuid"), str) or references not in ("trusted", "user"):
                raise ValueError("uuid or references")
            identity = str(known["uuid"])
        except ValueError:
            raise StoreError(f"{shown} is damaged; restore that file from a backup of the store") from None
        if references != self._namespace:
            # Read under the other name, every reference would look like a file of zeros, and every blob unused.
            maker = "root" if references == "trusted" else "an ordinary user"
            raise SourceError(f"the store in {shown} was made by {maker}; run dedupfs as who made it")
        return identity

    def _has_blobs(self) -> bool:
        try:
            return any(entry.is_dir(follow_symlinks=False) for entry in self._backing.scandir(BLOBS))
        except FileNotFoundError:
            return False

    def _leave_readme(self) -> None:
        """For who finds the archive and has no dedupfs. A full disk is no reason not to go on without it."""
        text = readme(self._backing.reference_xattr.decode()).encode()
        with suppress(OSError):
            if read_whole(self._backing, _README) != text:
                write_whole(self._backing, _README, text)

    def keep_rules(self, rules: SharingRules) -> None:
        """Keep what a mount was told, for offline commands: they share files as well."""
        if rules == EVERYTHING:
            with suppress(FileNotFoundError):
                self._backing.unlink(_RULES)
            return
        globs = {"include": rules.include, "exclude": rules.exclude, "domain": rules.domains}
        record: dict[str, object] = {name: [os.fsdecode(glob) for glob in found] for name, found in globs.items()}
        record["min_size_bytes"] = rules.min_size_bytes
        write_whole(self._backing, _RULES, json.dumps(record).encode())

    def read_rules(self) -> SharingRules:
        """What the last mount was told. Raises StoreError when that cannot be said."""
        raw = read_whole(self._backing, _RULES)
        if not raw:
            return EVERYTHING
        try:
            record = json_object(raw)
            record.setdefault("domain", [])  # before there were any
            globs = (tuple(os.fsencode(glob) for glob in record[name]) for name in ("include", "exclude", "domain"))
            if type(record["min_size_bytes"]) is not int:
                raise TypeError(record["min_size_bytes"])
            return SharingRules(record["min_size_bytes"], *globs)
        except (ValueError, KeyError, TypeError):
            shown = os.fsdecode(self._backing.source + b"/" + _RULES)
            raise StoreError(f"{shown} is damaged: which files must not share is not known; mount once") from None

    def _take_clean_mark(self) -> bool:
        try:
            self._backing.unlink(_CLEAN)
        except FileNotFoundError:
            return False
        # The mark must be gone for good before anything changes, or a power loss would bring it back beside an index
        # that no longer agrees with the tree.
        self._backing.fsync_directory(STORE_DIRECTORY)
        return True

    def mark_clean(self) -> None:
        """Say that index and tree agree. The caller has made the index durable and changes nothing afterwards."""
        write_whole(self._backing, _CLEAN, b"")
        self._backing.fsync_directory(STORE_DIRECTORY)

    def announce(self, *, mountpoint: str, socket: str) -> None:
        """Leave word where the mount that owns this store is to be found."""
        record = {"pid": os.getpid(), "mountpoint": mountpoint, "socket": socket}
        write_whole(self._backing, _DAEMON, json.dumps(record).encode())

    def withdraw(self) -> None:
        with suppress(FileNotFoundError):
            self._backing.unlink(_DAEMON)

    def close(self) -> None:
        os.close(self._lock_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def source_above(backing: Backing, path: bytes) -> bytes:
    """The directory on the way to `path`, if there is one, that is a source itself: what is in it is that store's
    business. Else ROOT."""
    while path := path.rpartition(b"/")[0]:
        try:
            backing.lstat(path + b"/" + _FORMAT)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                continue
        return path  # also where we may not look
    return ROOT


def is_in_another(backing: Backing, path: bytes) -> bool:
    """Whether what is at `path` is another store's business."""
    return source_above(backing, path) != ROOT


def is_owned(backing: Backing) -> bool:
    """Whether some process owns the store of this source now."""
    try:
        fd = backing.open(_LOCK, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def read_daemon(backing: Backing) -> dict[str, object] | None:
    """What the mount that owns the store announced, None when there is nothing (or nothing legible)."""
    try:
        record = json_object(read_whole(backing, _DAEMON))
    except ValueError:
        return None
    return record if {"pid", "mountpoint", "socket"} <= record.keys() else None


def set_aside(backing: Backing, path: bytes) -> None:
    """Move to quarantine/ what lies in the store and is not ours: it is somebody's, and so is what was moved there
    under its name before."""
    name = os.path.basename(path)
    numbered = (b"%s.%d" % (name[:200], number) for number in itertools.count())
    for aside in itertools.chain([name] if name != os.path.basename(INDEX) else [], numbered):
        try:
            backing.lstat(QUARANTINE + b"/" + aside)
        except FileNotFoundError:
            backing.rename(path, QUARANTINE + b"/" + aside)
            log.warning("set aside %s", os.fsdecode(path))
            return


def read_whole(backing: Backing, path: bytes) -> bytes:
    """A file of the store; nothing where there is none."""
    try:
        fd = backing.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return b""
    with os.fdopen(fd, "rb") as file:
        return file.read()


def write_whole(backing: Backing, path: bytes, content: bytes) -> None:
    """Durable before it is visible: a reader meets the old file or the new one, never a part."""
    draft = path + b".new"
    fd = backing.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        backing.fsync(fd)
    backing.rename(draft, path)
