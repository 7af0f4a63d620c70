"""Each call that sharing, materialising, healing, copying, restoring and removing make on the disk fails once.

An app is told only of failures of what it asked for itself: none of writing, closing or copying a file because sharing
it did not work. A reference that cannot be materialised stays a reference. When the failure is gone, the next look at
the archive brings everything to where it would have been without.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dedupfs import settle
from dedupfs.backing import Backing
from dedupfs.errors import IndexDamaged
from dedupfs.index import Batch
from tests.support.crashing import Crasher, Steps
from tests.support.filesystems import FilesystemPool, remove_tree

from .scenarios import ONE, PIECE, SCENARIOS, TWO, Run, inspect, no_progress, photo
from .stage import MakeStage, report

# Starting and stopping may fail: then there is no mount, and nobody to promise anything to.
_STARTING = {
    *("first start", "stop and start", "unlink the last reference and stop", "rebuild", "start without an index"),
    *("leave", "collect garbage"),
}
PLACES = [(name, "reference", "ext4") for name in SCENARIOS if name not in _STARTING]
PLACES += [(name, "reflink", "xfs") for name, _, _ in PLACES if SCENARIOS[name].reflinks]

# What an app's own call comes down to on any filesystem; it may fail with what the disk said.
_THE_APPS_OWN = {
    "write": {"create", "os.pwrite", "chown", "chmod", "utimensat", "setxattr", "unlink"},
    "dress": {"chown", "chmod", "utimensat", "setxattr"},
    "copy": {"create", "chown", "os.copy_file_range", "os.pwrite"},
}


@pytest.mark.parametrize("code", ["EIO", "ENOSPC", "EPERM"])
@pytest.mark.parametrize(("scenario", "strategy", "kind"), PLACES, ids=[" ".join(place) for place in PLACES])
def test_every_call_fails_once(stage: MakeStage, scenario: str, strategy: str, kind: str, code: str) -> None:
    here = stage(scenario, strategy, kind)
    steps = here.steps()
    wrong = {}
    for step in steps:
        outcome = here.play(fail=f"{step}:{code}")
        if outcome.error:
            wrong[step] = outcome.error.splitlines()[-3:]
            continue
        problems = list(outcome.result["problems"])
        if not outcome.result["failed"]:
            problems.append(f"the call never came, only {outcome.steps}")
        for name, met in outcome.result["errors"]:
            if errno.errorcode[met] != code:
                problems.append(f"{name} failed with {errno.errorcode[met]}")
            if step.split(":")[0] not in _THE_APPS_OWN.get(name, {step.split(":")[0]}):
                problems.append(f"{name} failed though it was none of its business")
        if problems:
            wrong[step] = problems
    assert not wrong, report(wrong, steps)


# --- jobs


def refuse(steps: Steps, source: str, ledger: str, options: str) -> None:
    """On a full disk nothing can be materialised: who wants to write is told so, and the reference stays one."""
    run = Run(steps, Path(source), Path(ledger), options, ordered=True)
    app = run.app
    SCENARIOS["edit"].prepare(run)
    steps.arm()
    attempts: list[Callable[[], None]] = [
        lambda: app.edit(ONE, PIECE, 100),
        lambda: app.append(TWO, PIECE),
        lambda: app.truncate(ONE, 9000),
        lambda: app.truncate(TWO, 30_000),
        lambda: app.open_and_close(ONE),
    ]
    for attempt in attempts:
        before = app.look(ONE), app.look(TWO)
        attempt()
        assert [code for _, code in app.errors] == [errno.ENOSPC], app.errors
        app.errors.clear()
        assert (app.look(ONE), app.look(TWO)) == before
        run.settle()
        for path in (ONE, TWO):
            assert run.engine.vfs.getxattr(os.fsencode(path), b"user.dedupfs.state", app.caller) == b"reference"
            with open(os.path.join(source, path), "rb") as file:
                assert not Backing.has_data(file.fileno()), f"a part of the copy of {path} was left"
    # What needs no room is done.
    app.rewrite(ONE, b"short")
    app.truncate(TWO, 0)
    app.unlink(TWO)
    assert app.errors == []
    steps.disarm()
    run.settle()
    assert app.check() == []
    run.stop()


def restore_refused(steps: Steps, source: str, ledger: str, options: str) -> None:
    """What cannot be restored is told by name, and stays as it was."""
    run = Run(steps, Path(source), Path(ledger), options, ordered=True)
    SCENARIOS["edit"].prepare(run)
    steps.arm()
    answer = run.engine.restore([], no_progress)
    steps.disarm()
    assert answer["restored"] == 0
    failed = answer["failed"]
    assert isinstance(failed, list)
    assert {entry["path"] for entry in failed} == {ONE, TWO}
    assert all(os.strerror(errno.ENOSPC) in entry["reason"] for entry in failed)
    assert run.app.check() == []
    assert run.engine.restore([], no_progress)["failed"] == []
    assert run.app.check() == []
    run.stop()


def index_refuses(steps: Steps, source: str, ledger: str, options: str) -> None:
    """The index cannot be written for a while: apps do not notice, and nothing is forgotten."""
    commit, failures = Batch.commit, [3]

    def failing(batch: Batch) -> None:
        if failures[0] and len(batch):
            failures[0] -= 1
            raise IndexDamaged("the index cannot be written (no space left)")
        commit(batch)

    patch = pytest.MonkeyPatch()
    patch.setattr(Batch, "commit", failing)
    patch.setattr(settle, "_RETRY_S", 0.05)
    run = Run(steps, Path(source), Path(ledger), options, ordered=True)
    run.engine.start()
    for number in range(4):
        run.app.write(f"{number}.jpg", photo("a"))
    run.app.edit("0.jpg", PIECE, 7)
    run.app.rename("1.jpg", "moved.jpg")
    run.engine.settle(no_progress)
    assert failures == [0]
    assert run.app.errors == []
    assert run.app.check() == []
    run.stop()
    run.start()
    run.settle()
    assert run.app.check() == []
    for path in ("moved.jpg", "2.jpg", "3.jpg"):
        assert run.engine.vfs.getxattr(path.encode(), b"user.dedupfs.state", run.app.caller) == b"reference"
    run.stop()


@pytest.mark.parametrize(
    ("job", "fail"),
    [
        ("refuse", "copy_range:*:ENOSPC"),
        ("refuse", "copy_range.half:*:ENOSPC"),
        ("restore_refused", "copy_range:*:ENOSPC"),
        ("restore_refused", "fsync:*:ENOSPC"),
        ("index_refuses", None),
    ],
)
def test_what_goes_on_failing(
    crasher: Crasher, filesystem_pool: FilesystemPool, request: pytest.FixtureRequest, job: str, fail: str | None
) -> None:
    place = filesystem_pool.get("ext4").directory(request.node.name)
    (place / "source").mkdir()
    arguments = {"source": str(place / "source"), "ledger": str(place / "ledger"), "options": "share=reference"}
    crasher.run(f"{__name__}:{job}", arguments, fail=fail).check()
    assert inspect(place / "source") == []
    remove_tree(place)
