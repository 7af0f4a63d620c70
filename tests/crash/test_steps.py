"""SIGKILL before and after every step of sharing, materialising, healing, copying, restoring, removing and starting.

The steps are those that a run of the scenario takes, recorded, not listed here. After each kill the store is started
again, must be as the ledger says at once, and must put itself in order; fsck finds nothing.
"""

import os
import random
from pathlib import Path

import pytest

from tests.conftest import Mounts
from tests.support.crashing import SteppedMount

from .ledger import Ledger
from .scenarios import PIECE, SCENARIOS, photo
from .stage import MakeStage, report
from .writers import DEAD, PathApp

# Everything on ext4; what differs there, also where extents can be shared.
PLACES = [(name, "reference", "ext4") for name in SCENARIOS]
PLACES += [(name, "reflink", "xfs") for name, scenario in SCENARIOS.items() if scenario.reflinks]

# Those that leave something to be put in order.
UNTIDY = ["share two new files", "heal a rotten blob", "copy a plain file", "edit", "open with O_TRUNC", "first start"]

NOBODY = 65534


# Nothing happens between two steps: after one is before the next, but for the last.
WHEN = ["before", "after"] if os.environ.get("DEDUPFS_THOROUGH") else ["before"]


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize(("scenario", "strategy", "kind"), PLACES, ids=[" ".join(place) for place in PLACES])
def test_killed_at_every_step(stage: MakeStage, scenario: str, strategy: str, kind: str, when: str) -> None:
    here = stage(scenario, strategy, kind)
    steps = here.steps()
    found = {f"{when} {step}": here.problems_after(f"{when}:{step}") for step in steps}
    wrong = {kill: problems for kill, problems in found.items() if problems}
    assert not wrong, report(wrong, steps)


@pytest.mark.parametrize("scenario", UNTIDY)
def test_fsck_repairs_what_a_kill_leaves(stage: MakeStage, scenario: str) -> None:
    here = stage(scenario)
    steps = here.steps()
    found = {f"after {step}": here.problems_after(f"after:{step}", repair=True) for step in steps}
    wrong = {kill: problems for kill, problems in found.items() if problems}
    assert not wrong, report(wrong, steps)


@pytest.mark.parametrize("scenario", UNTIDY)
def test_killed_again_while_it_recovers(stage: MakeStage, scenario: str, rng: random.Random) -> None:
    here = stage(scenario)
    steps = here.steps()
    wrong = {}
    for first in rng.sample(steps, min(6, len(steps))):
        here.play(kill=f"before:{first}")
        recovering = here.recover().steps
        for second in rng.sample(recovering, min(4, len(recovering))):
            here.play(kill=f"before:{first}")
            # What the second run does depends on its inode numbers: it may come to its end.
            here.recover(kill=f"after:{second}")
            outcome = here.recover()
            if outcome.result != []:
                wrong[f"before {first}, again after {second}"] = [*(outcome.result or []), outcome.error]
    assert not wrong, report(wrong, steps)


@pytest.mark.parametrize("scenario", ["share two new files", "unlink the last reference", "edit", "copy a plain file"])
def test_killed_where_metadata_keep_no_order(stage: MakeStage, scenario: str) -> None:
    here = stage(scenario, ordered=False)
    steps = here.steps()
    found = {f"before {step}": here.problems_after(f"before:{step}") for step in steps}
    wrong = {kill: problems for kill, problems in found.items() if problems}
    assert not wrong, report(wrong, steps)


@pytest.mark.skipif(os.geteuid() != 0, reason="all these tests are an ordinary user's then")
@pytest.mark.parametrize("scenario", ["share two new files", "heal a rotten blob", "edit", "restore"])
def test_killed_as_an_ordinary_user(stage: MakeStage, scenario: str) -> None:
    here = stage(scenario, user=NOBODY)
    steps = here.steps()
    found = {f"before {step}": here.problems_after(f"before:{step}") for step in steps}
    wrong = {kill: problems for kill, problems in found.items() if problems}
    assert not wrong, report(wrong, steps)


# --- in a real mount


def _live(app: PathApp, mountpoint: Path) -> None:
    """Everything that sharing does, asked for by an app. Raises what a dying mount says."""

    def save(name: str, content: str) -> None:
        fd = app.create(name)
        app.write(name, fd, photo(content), 0)
        app.close(fd)

    def settled(name: str) -> bytes:
        return os.getxattr(mountpoint / "folder" / name, "user.dedupfs.state")

    for name, content in (("one", "a"), ("two", "a"), ("other", "b"), ("third", "a")):
        save(name, content)
    assert settled("third") in (b"reference", b"shared")
    source, copy = app.open("other", os.O_RDONLY), app.create("copy")
    app.copy_range("other", "copy", source, copy)
    app.close(copy)
    app.close(source)
    for name, offset in (("one", 7000), ("copy", 0)):
        fd = app.open(name, os.O_RDWR)
        app.write(name, fd, PIECE, offset)
        app.close(fd)
    fd = app.open("two", os.O_WRONLY)
    app.truncate("two", fd, 9001)
    app.close(fd)
    app.close(app.open("third", os.O_WRONLY | os.O_TRUNC))
    settled("third")
    save("draft", "b")
    app.rename("draft", "two")
    settled("two")
    for name in ("other", "two"):
        app.unlink(name)


@pytest.mark.parametrize("mounts", [("reference", "ext4"), ("reflink", "xfs")], indirect=True, ids="-".join)
def test_killed_at_steps_of_a_mount(mounts: Mounts, tmp_path: Path, rng: random.Random) -> None:
    def live(kill: str) -> tuple[list[str], list[str]]:
        """The steps that came, and what was wrong after a restart."""
        mounted = mounts.new()
        ledger = Ledger()
        with SteppedMount(mounted.source, mounted.mountpoint, tmp_path, *mounted.options, kill=kill) as broken:
            os.mkdir(mounted.path("folder"))
            directory = os.open(mounted.path("folder"), os.O_RDONLY | os.O_DIRECTORY)
            broken.arm()
            died = False
            try:
                _live(PathApp(directory, ledger), mounted.mountpoint)
            except OSError as error:
                if error.errno not in DEAD:
                    raise
                died = True
            finally:
                os.close(directory)
            assert not died or broken.was_killed(patience_s=10), f"the mount died, its daemon lives: {broken.log}"
        if not kill:
            return broken.steps, []
        mounted.start()
        directory = os.open(mounted.path("folder"), os.O_RDONLY | os.O_DIRECTORY)
        app = PathApp(directory, ledger)
        problems = app.check(looked_at=False)
        mounted.settle()
        problems += app.check()
        os.close(directory)
        return broken.steps, problems

    steps, _ = live("")
    wrong = {}
    for step in rng.sample(steps, 8):
        kill = f"{rng.choice(('before', 'after'))}:{step}"
        if problems := live(kill)[1]:
            wrong[kill] = problems
    assert not wrong, report(wrong, steps)
