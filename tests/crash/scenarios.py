"""What is crashed: short pieces of an app's and of dedupfs's life, played on an engine without FUSE, in one thread.

`play` is a job for `tests.support.crashing`: it prepares a scenario, arms the steps and plays it to its end, unless it
is killed there. `recover` is the job that comes after: it starts again, and holds the archive against the ledger.
"""

import contextlib
import ctypes
import os
import random
import shutil
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

from dedupfs.config import parse_options
from dedupfs.engine import Engine, rebuild
from dedupfs.errors import DedupfsError
from dedupfs.fsck import fsck
from dedupfs.gc import gc
from dedupfs.leave import leave
from dedupfs.model import Caller
from dedupfs.openfiles import Handle
from dedupfs.vfs import Vfs
from tests.support.crashing import SteppingBacking, Steps

from .ledger import Ledger, State, World

# Three blocks and a bit, so that the last one is not full; and the least that is shared.
PHOTO_BYTES = 20_001
SMALL_BYTES = 4096
PIECE = b"edited in place "

# The two files that are alike in all scenarios.
ONE, TWO = "one.jpg", "permits/2024 \udcff/two.jpg"

_A_DATE_NS = 1_234_567_890_123_456_789


def photo(name: str, size_bytes: int = PHOTO_BYTES) -> bytes:
    """Content that is like no other's."""
    return random.Random(name).randbytes(size_bytes)


def no_progress(phase: str, done: int, total: int | None) -> None:
    pass


class App:
    """An app on the mount's tree, that notes what it may rely on."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.caller = Caller(os.geteuid(), os.getegid(), os.getpid())
        self.contents: dict[str, bytes] = {}
        self.errors: list[tuple[str, int]] = []  # what failed, and with which errno

    def serve(self, vfs: Vfs) -> None:
        """Work on this from now on."""
        self._vfs = vfs

    # --- looking

    def look(self, path: str) -> State | None:
        encoded = os.fsencode(path)
        try:
            st = self._vfs.getattr(encoded)[0]
        except FileNotFoundError:
            return None
        xattrs = [
            (os.fsdecode(name), self._vfs.getxattr(encoded, name, self.caller).hex())
            for name in sorted(self._vfs.listxattr(encoded, self.caller))
            if name.startswith(b"user.")
        ]
        return State.of(
            self.read(path),
            mode=stat.S_IMODE(st.st_mode),
            owner=(st.st_uid, st.st_gid),
            mtime_ns=st.st_mtime_ns,
            xattrs=tuple(xattrs),
        )

    def read(self, path: str) -> bytes:
        try:
            with self._open(path, os.O_RDONLY) as handle:
                buffer = bytearray(os.fstat(handle.own_fd).st_size)  # the kernel asks for no more
                length = self._vfs.io.read(handle, memoryview(buffer), 0)
        except DedupfsError as error:
            raise OSError(error.errno, str(error)) from None
        return bytes(buffer[:length])

    def paths(self, directory: bytes = b"") -> set[str]:
        opened = self._vfs.opendir(directory)
        try:
            entries = list(self._vfs.readdir(opened, 0))
        finally:
            os.close(opened.fd)
        found = set()
        for entry in entries:
            path = directory + b"/" + entry.name if directory else entry.name
            if entry.attributes is not None and stat.S_ISDIR(entry.attributes.st.st_mode):
                found |= self.paths(path)
            else:
                found.add(os.fsdecode(path))
        return found

    def check(self, *, ignore: AbstractSet[str] = frozenset(), looked_at: bool = True) -> list[str]:
        return self.ledger.check(self.look, self.paths(), ignore=ignore, looked_at=looked_at)

    # --- calls

    @contextlib.contextmanager
    def _open(self, path: str, flags: int, *, create: int | None = None) -> Iterator[Handle]:
        encoded = os.fsencode(path)
        if create is not None:
            handle = self._vfs.create(encoded, flags | os.O_CREAT, create, self.caller)
        else:
            handle = self._vfs.open(encoded, flags, self.caller)
        try:
            yield handle
            self._vfs.io.flush(handle)
        finally:
            self._vfs.io.release(handle)

    def _write(self, handle: Handle, data: bytes, offset: int) -> None:
        written = self._vfs.io.write(handle, memoryview(data), offset, self.caller, cached=False)
        assert written == len(data)

    @contextlib.contextmanager
    def _call(self, name: str, worlds: list[World], failed: list[World] | None = None) -> Iterator[None]:
        """A call that leads from the first world to the last, or, if it fails, to one of `failed` (the first)."""
        self.ledger.begin(worlds)
        try:
            yield
        except (OSError, DedupfsError) as error:
            self.errors.append((name, error.errno or 0))
            self.ledger.begin(failed or worlds[:1])
            problems = self.ledger.check(self.look, set(self.ledger.certain))
            if problems:
                raise AssertionError(f"{name} failed with {error!r}, and: {problems}") from error
            self.ledger.adopt(self.look)
            for path in worlds[0]:
                if path in self.ledger.certain:
                    self.contents[path] = self.read(path)
                else:
                    self.contents.pop(path, None)
            return
        self.ledger.end({path: state and self._with_time(path, state) for path, state in worlds[-1].items()})

    def _with_time(self, path: str, state: State) -> State:
        """The time that the app sees after its call is the time that stays."""
        return replace(state, mtime_ns=self._vfs.getattr(os.fsencode(path))[0].st_mtime_ns)

    def mkdir(self, path: str) -> None:
        self._vfs.mkdir(os.fsencode(path), 0o755, self.caller)

    def write(
        self,
        path: str,
        data: bytes,
        *,
        mode: int = 0o644,
        owner: tuple[int, int] | None = None,
        mtime_ns: int = _A_DATE_NS,
        xattrs: dict[str, bytes] | None = None,
    ) -> None:
        """A new file, written in two pieces, closed, and then given its attributes."""
        encoded, half = os.fsencode(path), len(data) // 2
        parts: list[World] = [{path: None}]
        parts += [{path: State.of(part)} for part in (b"", data[:half], data)]
        with self._call("write", parts, parts[:-1]):
            with self._open(path, os.O_WRONLY | os.O_EXCL, create=0o600) as handle:
                self._write(handle, data[:half], 0)
                self._write(handle, data[half:], half)
            self.contents[path] = data
        if self.contents.get(path) != data:
            return
        owner = owner if os.geteuid() == 0 and owner is not None else (os.geteuid(), os.getegid())
        named = tuple(sorted((name, value.hex()) for name, value in (xattrs or {}).items()))
        dressed = State.of(data, mode=mode, owner=owner, mtime_ns=mtime_ns, xattrs=named)
        with self._call("dress", [{path: State.of(data)}, {path: dressed}], [{path: State.of(data)}]):
            for name, value in (xattrs or {}).items():
                self._vfs.setxattr(encoded, os.fsencode(name), value, 0, self.caller)
            self._vfs.chown(encoded, None, *owner)
            self._vfs.chmod(encoded, None, mode)
            seconds, ns = divmod(mtime_ns, 10**9)
            times = (ctypes.c_long * 4)(seconds, ns, seconds, ns)
            self._vfs.utimens(encoded, None, ctypes.addressof(times))

    def edit(self, path: str, piece: bytes, offset: int, flags: int = 0, *, also: tuple[str, ...] = ()) -> None:
        """Open for writing, write a piece in place, close. `also`: other names of the file."""
        before = self.contents[path]
        after = before[:offset] + piece + before[offset + len(piece) :]
        state = self.ledger.certain[path]
        worlds: list[World] = [dict.fromkeys((path, *also), state)]
        worlds.append(dict.fromkeys((path, *also), state.with_content(after)))
        with self._call("edit", worlds):
            with self._open(path, os.O_RDWR | flags) as handle:
                self._write(handle, piece, offset)
            self.contents.update(dict.fromkeys((path, *also), after))

    def append(self, path: str, piece: bytes) -> None:
        self.edit(path, piece, len(self.contents[path]), os.O_APPEND)

    def open_and_close(self, path: str) -> None:
        """Open for writing, and write nothing."""
        state = self.ledger.certain[path]
        with self._call("open", [{path: state}]), self._open(path, os.O_RDWR):
            pass

    def truncate(self, path: str, size_bytes: int) -> None:
        before = self.contents[path]
        after = before[:size_bytes].ljust(size_bytes, b"\0")
        state = self.ledger.certain[path]
        worlds: list[World] = [{path: state}, {path: state.with_content(after)}]
        with self._call("truncate", worlds, worlds):
            self._vfs.truncate(os.fsencode(path), None, size_bytes, self.caller)
            self.contents[path] = after

    def rewrite(self, path: str, data: bytes) -> None:
        """Open with O_TRUNC, write, close."""
        state = self.ledger.certain[path]
        worlds: list[World] = [{path: state}, {path: state.with_content(b"")}, {path: state.with_content(data)}]
        with self._call("rewrite", worlds, worlds[:2]):
            with self._open(path, os.O_WRONLY | os.O_TRUNC) as handle:
                self._write(handle, data, 0)
            self.contents[path] = data

    def copy(self, source: str, target: str) -> None:
        """What cp does: copy_file_range until nothing is left."""
        data = self.contents[source]
        state = State.of(data, mode=0o640)
        worlds: list[World] = [{target: None}, {target: State.of(b"")}, {target: state}]
        with self._call("copy", worlds, worlds[:2]):
            with (
                self._open(source, os.O_RDONLY) as reading,
                self._open(target, os.O_WRONLY | os.O_EXCL, create=0o640) as writing,
            ):
                done = 0
                while done < len(data):  # the kernel does not ask beyond the end
                    done += self._vfs.io.copy_range(reading, done, writing, done, 1 << 30, self.caller)
            self.contents[target] = data

    def undisturbed(self, name: str, action: Callable[[], object]) -> None:
        """No call of an app's: nothing may change for it."""
        with self._call(name, [dict(self.ledger.certain)]):
            action()

    def unlink(self, path: str) -> None:
        with self._call("unlink", [{path: self.ledger.certain[path]}, {path: None}]):
            self._vfs.unlink(os.fsencode(path))
            del self.contents[path]

    def rename(self, path: str, new: str) -> None:
        before: World = {path: self.ledger.certain[path], new: self.ledger.certain.get(new)}
        with self._call("rename", [before, {path: None, new: before[path]}]):
            self._vfs.rename(os.fsencode(path), os.fsencode(new), 0)
            self.contents[new] = self.contents.pop(path)

    def unlink_while_reading(self, path: str) -> bytes:
        """Unlink an open file the way libfuse does, and answer what can still be read of it."""
        name = b".fuse_hidden" + b"0" * 15 + b"1"
        data = b""
        worlds: list[World] = [{path: self.ledger.certain[path]}, {path: None}]
        with self._call("unlink", worlds, worlds):
            with self._open(path, os.O_RDONLY) as handle:
                self._vfs.hide(os.fsencode(path), name)
                buffer = bytearray(len(self.contents[path]))
                self._vfs.io.read(handle, memoryview(buffer), 0)
                data = bytes(buffer)
            with contextlib.suppress(FileNotFoundError):
                self._vfs.unlink(name)
            del self.contents[path]
        return data


def start_engine(steps: Steps, source: str, options: str, *, ordered: bool) -> Engine:
    backing = SteppingBacking(source, steps)
    backing.orders_metadata = backing.orders_metadata and ordered
    return Engine(source, parse_options(options, privileged=os.geteuid() == 0), backing=backing)


class Run:
    """A scenario being played: the engine, the app on it, and what they write to."""

    def __init__(self, steps: Steps, source: Path, ledger: Path, options: str, *, ordered: bool) -> None:
        self.steps, self.source, self.options, self._ordered = steps, source, options, ordered
        self.app = App(Ledger(ledger))
        self.start()

    def start(self) -> None:
        self.engine = start_engine(self.steps, str(self.source), self.options, ordered=self._ordered)
        self.app.serve(self.engine.vfs)
        if not self.engine.settler.index_is_complete:
            self.engine.scan(no_progress)  # as a mount does, in the background

    def stop(self) -> None:
        self.engine.close()

    def settle(self) -> None:
        self.engine.settler.work_off(lambda done, left: None)

    def blob(self, data: bytes) -> Path:
        """Where the blob with this content is, found by looking."""
        for path in (self.source / ".dedupfs" / "blobs").glob("*/*"):
            if path.read_bytes() == data:
                return path
        raise AssertionError("there is no such blob")


@dataclass(frozen=True, slots=True)
class Scenario:
    """`prepare` goes undisturbed; `act` is where the steps are. Files whose blob `prepare` has damaged are `rotten`
    until the archive was settled; `keeps_plain`: the files are not to be shared afterwards."""

    prepare: Callable[[Run], None]
    act: Callable[[Run], None]
    rotten: tuple[str, ...] = ()
    keeps_plain: bool = False
    reflinks: bool = False  # worth playing where extents are shared


@contextlib.contextmanager
def steps_in_every_backing(steps: Steps) -> Iterator[None]:
    """Where dedupfs makes its backing itself, give it one with steps."""

    def make(source: str, *, noatime: bool = False) -> SteppingBacking:
        assert not noatime
        return SteppingBacking(source, steps)

    with contextlib.ExitStack() as stack:
        for module in ("engine", "fsck", "gc", "leave"):
            stack.enter_context(mock.patch(f"dedupfs.{module}.Backing", make))
        yield


# --- what is prepared


def _two_equal(run: Run) -> None:
    """Equal files of different attributes, not yet shared, and another; deep, and oddly named."""
    app = run.app
    app.mkdir("permits")
    app.mkdir(os.path.dirname(TWO))
    app.write(ONE, photo("a"), mode=0o604, owner=(1001, 1002), xattrs={"user.note": b"north side"})
    app.write(TWO, photo("a"), mode=0o640, owner=(1003, 1004), mtime_ns=_A_DATE_NS + 5)
    app.write("other.jpg", photo("b"))


def _two_pairs(run: Run) -> None:
    _two_equal(run)
    run.app.write("small one", photo("s", SMALL_BYTES), mode=0o400)
    run.app.write("permits/small two", photo("s", SMALL_BYTES), mode=0o4755, xattrs={"user.long": b"x" * 3000})


def _two_shared(run: Run) -> None:
    _two_equal(run)
    run.settle()


def _another_domain(run: Run) -> None:
    """Two more of them, that must not share with the first two. Who recovers is not told of that."""
    _two_shared(run)
    run.stop()
    run.options += ",domain=health/"
    run.start()
    run.app.mkdir("health")
    run.app.write("health/one.jpg", photo("a"), mode=0o604, xattrs={"user.note": b"another agency's"})
    run.app.write("health/two.jpg", photo("a"), mode=0o640)


def _three_shared(run: Run) -> None:
    _two_equal(run)
    run.app.write("three.jpg", photo("a"))
    run.settle()


def _saving(run: Run) -> None:
    _two_shared(run)
    run.app.write("draft", photo("new"))


def _third(run: Run) -> None:
    _two_shared(run)
    run.app.write("permits/three.jpg", photo("a"), mode=0o664, owner=(0, 7), xattrs={"user.note": b"third"})


def _rotten(run: Run) -> None:
    """The blob's bytes change behind everybody's back; then a good copy comes."""
    _two_shared(run)
    _rot(run)
    run.app.write("good.jpg", photo("a"), mode=0o664)


def _rot(run: Run) -> None:
    blob = run.blob(photo("a"))
    fd = os.open(blob, os.O_RDONLY)
    run.engine.backing.fset_immutable(fd, immutable=False)
    os.close(fd)
    os.chmod(blob, 0o600)
    with open(blob, "r+b") as file:
        file.seek(5000)
        file.write(b"rotten")
    os.chmod(blob, 0o400)


def _rotten_with_a_copy(run: Run) -> None:
    """The blob's bytes change, and one of its files was made plain before."""
    _three_shared(run)
    run.engine.restore([b"three.jpg"], no_progress)
    run.settle()
    _rot(run)


def _missing(run: Run) -> None:
    _two_shared(run)
    blob = run.blob(photo("a"))
    fd = os.open(blob, os.O_RDONLY)
    run.engine.backing.fset_immutable(fd, immutable=False)
    os.close(fd)
    blob.unlink()
    run.app.write("good.jpg", photo("a"), mode=0o664)


def _one_reference(run: Run) -> None:
    _two_shared(run)
    run.app.unlink(TWO)
    run.settle()


def _linked(run: Run) -> None:
    """A reference with two names."""
    _two_shared(run)
    app = run.app
    run.engine.vfs.link(os.fsencode(ONE), b"linked.jpg")
    app.contents["linked.jpg"] = app.contents[ONE]
    app.ledger.end({"linked.jpg": app.ledger.certain[ONE]})
    run.settle()


# --- what is played


def _settle(run: Run) -> None:
    run.settle()


def _write_and_settle(run: Run) -> None:
    run.app.write("one.jpg", photo("a"))
    run.app.write("two.jpg", photo("a"))
    run.settle()


def _copy_plain(run: Run) -> None:
    run.app.copy("other.jpg", "copy.jpg")
    run.settle()


def _copy_reference(run: Run) -> None:
    run.app.copy(ONE, "copy.jpg")
    run.settle()


def _edit(run: Run) -> None:
    run.app.edit(ONE, PIECE, 9000)
    run.settle()


def _edit_last(run: Run) -> None:
    """The last reference is materialised, and its blob goes."""
    run.app.edit(ONE, PIECE, 0)
    run.settle()


def _edit_back(run: Run) -> None:
    """Written, and as it was before: it is shared again."""
    run.app.edit(TWO, photo("a")[100:200], 100)
    run.settle()


def _edit_linked(run: Run) -> None:
    run.app.edit("linked.jpg", PIECE, 50, also=(ONE,))
    run.settle()


def _append(run: Run) -> None:
    run.app.append(TWO, PIECE)
    run.settle()


def _open_only(run: Run) -> None:
    run.app.open_and_close(ONE)
    run.settle()


def _shorten(run: Run) -> None:
    run.app.truncate(ONE, 9001)
    run.settle()


def _lengthen(run: Run) -> None:
    run.app.truncate(ONE, PHOTO_BYTES + 10_000)
    run.settle()


def _empty(run: Run) -> None:
    run.app.truncate(ONE, 0)
    run.settle()


def _rewrite(run: Run) -> None:
    run.app.rewrite(ONE, photo("new"))
    run.settle()


def _scrub(run: Run) -> None:
    run.engine.scrub(no_progress, 0)
    run.settle()


def _restore(run: Run) -> None:
    run.app.undisturbed("restore", lambda: run.engine.restore([], no_progress))


def _leave(run: Run) -> None:
    def go() -> None:
        run.stop()
        with steps_in_every_backing(run.steps):
            departure = leave(str(run.source), dry_run=False, progress=no_progress)
        assert not departure.refused
        assert not (run.source / ".dedupfs").exists()
        run.start()

    run.app.undisturbed("leave", go)


def _unneeded(run: Run) -> None:
    """A blob that nothing refers to, beside one that is needed."""
    _two_shared(run)
    directory = run.source / ".dedupfs" / "blobs" / "ab"
    directory.mkdir(exist_ok=True)
    (directory / ("ab" * 16 + ".0")).write_bytes(photo("unneeded"))
    run.engine.index.set_incomplete()  # so that the next start walks the tree, also when gc did not get to it


def _gc(run: Run) -> None:
    def go() -> None:
        run.stop()
        with steps_in_every_backing(run.steps):
            for _ in range(2):
                plan = gc(str(run.source), keep_days=0, dry_run=False, progress=no_progress)
                assert not plan.problems
        assert not list((run.source / ".dedupfs" / "trash").iterdir())
        run.start()

    run.app.undisturbed("gc", go)


def _unlink_all(run: Run) -> None:
    run.app.unlink(ONE)
    run.app.unlink(TWO)
    run.settle()


def _unlink_open(run: Run) -> None:
    read = run.app.unlink_while_reading(ONE)
    assert read == photo("a") or run.app.errors
    run.settle()


def _rename_over(run: Run) -> None:
    """How editors save: a new file over the old name."""
    run.app.rename("draft", ONE)
    run.app.rename("other.jpg", TWO)
    run.settle()


def _restart(run: Run) -> None:
    """A clean stop with work pending, and the start that takes it up."""
    run.stop()
    run.start()
    run.settle()


def _no_store(run: Run) -> None:
    """An archive that dedupfs never saw."""
    _two_equal(run)
    run.stop()
    shutil.rmtree(run.source / ".dedupfs")


def _first_start(run: Run) -> None:
    run.start()


def _stopped(run: Run) -> None:
    _third(run)
    run.stop()


def _unlink_and_stop(run: Run) -> None:
    run.app.unlink(ONE)
    run.app.unlink(TWO)
    run.stop()
    run.start()


def _rebuild(run: Run) -> None:
    with steps_in_every_backing(run.steps):
        rebuild(str(run.source), no_progress)
    run.start()


def _rebuild_lost(run: Run) -> None:
    """The index is gone when the store is next opened."""
    shutil.rmtree(run.source / ".dedupfs" / "index")
    run.start()


SCENARIOS = {
    "share two new files": Scenario(_two_pairs, _settle, reflinks=True),
    "write and share": Scenario(lambda run: None, _write_and_settle, reflinks=True),
    "share a third file": Scenario(_third, _settle, reflinks=True),
    "share in another domain": Scenario(_another_domain, _settle, keeps_plain=True, reflinks=True),
    "heal a rotten blob": Scenario(_rotten, _settle, rotten=(ONE, TWO)),
    "heal a missing blob": Scenario(_missing, _settle, rotten=(ONE, TWO)),
    "scrub, and heal with a plain file": Scenario(_rotten_with_a_copy, _scrub, rotten=(ONE, TWO)),
    "scrub, and set aside until a copy comes": Scenario(_rotten, _scrub, rotten=(ONE, TWO)),
    "copy a plain file": Scenario(_two_shared, _copy_plain, reflinks=True),
    "copy a reference": Scenario(_two_shared, _copy_reference),
    "edit": Scenario(_two_shared, _edit, reflinks=True),
    "edit the last reference": Scenario(_one_reference, _edit_last),
    "edit and share again": Scenario(_two_shared, _edit_back),
    "edit a reference with two names": Scenario(_linked, _edit_linked),
    "append": Scenario(_three_shared, _append),
    "open for writing only": Scenario(_two_shared, _open_only),
    "truncate to less": Scenario(_two_shared, _shorten),
    "truncate to more": Scenario(_two_shared, _lengthen),
    "truncate to nothing": Scenario(_two_shared, _empty),
    "open with O_TRUNC": Scenario(_two_shared, _rewrite, reflinks=True),
    "restore": Scenario(_three_shared, _restore, keeps_plain=True),
    "leave": Scenario(_two_shared, _leave, keeps_plain=True),
    "collect garbage": Scenario(_unneeded, _gc),
    "unlink the last reference": Scenario(_two_shared, _unlink_all),
    "unlink an open reference": Scenario(_two_shared, _unlink_open),
    "rename over references": Scenario(_saving, _rename_over),
    "first start": Scenario(_no_store, _first_start, reflinks=True),
    "stop and start": Scenario(_two_equal, _restart, reflinks=True),
    "unlink the last reference and stop": Scenario(_two_shared, _unlink_and_stop),
    "rebuild": Scenario(_stopped, _rebuild),
    "start without an index": Scenario(_stopped, _rebuild_lost),
}


# --- jobs


def play(steps: Steps, scenario: str, source: str, ledger: str, options: str, *, ordered: bool) -> dict[str, object]:
    """Play a scenario to its end, and say what the app met and what is wrong afterwards."""
    played = SCENARIOS[scenario]
    run = Run(steps, Path(source), Path(ledger), options, ordered=ordered)
    played.prepare(run)
    steps.arm()
    played.act(run)
    steps.disarm()
    problems: list[str] = []
    if steps.failed:
        # The failure is gone; what it held up is done when the archive is looked at again.
        run.engine.scan(no_progress)
    run.settle()
    problems += run.app.check()
    if not played.keeps_plain:
        problems += _unshared(run.app, run.engine)
    run.stop()
    problems += inspect(Path(source))
    return {"errors": run.app.errors, "problems": problems, "failed": steps.failed}


def recover(
    steps: Steps, scenario: str, source: str, ledger: str, options: str, *, ordered: bool, repair: bool
) -> list[str]:
    """Start again after a crash, and hold the archive against the ledger. Answers what is wrong."""
    played = SCENARIOS[scenario]
    known = Ledger.load(Path(ledger))
    problems = []
    steps.arm()
    if repair:
        with steps_in_every_backing(steps):
            report = fsck(source, repair=True, progress=no_progress)
        left = [f"fsck --repair: {finding}" for finding in report.findings if not finding.repaired]
        problems += [] if played.rotten else left
    engine = start_engine(steps, source, options, ordered=ordered)
    app = App(known)
    app.serve(engine.vfs)
    problems += [f"at the start: {problem}" for problem in app.check(ignore=set(played.rotten), looked_at=False)]
    engine.start()
    engine.settle(no_progress)
    steps.disarm()
    problems += app.check()
    if not problems:
        known.adopt(app.look)
        if engine.status()["pending"]:
            problems.append(f"something is still pending: {engine.status()}")
        if not played.keeps_plain:
            problems += _unshared(app, engine)
        problems += _go_on(app, engine)
    engine.close()
    return problems + inspect(Path(source))


def _go_on(app: App, engine: Engine) -> list[str]:
    """Life goes on: what is written to one file shows in no other."""
    app.contents = {path: app.read(path) for path in app.ledger.certain}
    for path in sorted(app.contents)[:2]:
        st = engine.vfs.getattr(os.fsencode(path))[0]
        if st.st_nlink == 1 and st.st_size > len(PIECE):
            app.edit(path, PIECE, 1)
    engine.settle(no_progress)
    return [f"when life goes on: {problem}" for problem in app.check()]


def _unshared(app: App, engine: Engine) -> list[str]:
    """Files of equal content that are not shared though nothing keeps them from it."""
    groups = defaultdict(list)
    for path in app.paths():
        st = engine.vfs.getattr(os.fsencode(path))[0]
        if st.st_nlink == 1 and st.st_size >= SMALL_BYTES:
            groups[app.read(path)].append(path)
    plain = []
    for paths in groups.values():
        states = {
            path: engine.vfs.getxattr(os.fsencode(path), b"user.dedupfs.state", Caller(0, 0, 0)) for path in paths
        }
        if len(paths) > 1 and b"plain" in states.values():
            plain.append(f"not shared: {states}")
    return plain


def inspect(source: Path) -> list[str]:
    """What is wrong with a store that was stopped."""
    store = source / ".dedupfs"
    problems = [] if (store / "clean").exists() else ["the store is not marked clean"]
    report = fsck(str(source), repair=False, progress=no_progress)
    return problems + [f"fsck: {finding}" for finding in report.findings]
