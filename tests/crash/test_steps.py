"""SIGKILL before and after every step of sharing, materialising, healing, copying, restoring, removing and starting.

The steps are those that a run of the scenario takes, recorded, not listed here. After each kill the store is started
again, must be as the ledger says at once, and must put itself in order; fsck finds nothing.
"""

import os
import random

import pytest

from .scenarios import SCENARIOS
from .stage import MakeStage, report

# Everything on ext4; what differs there, also where extents can be shared.
PLACES = [(name, "reference", "ext4") for name in SCENARIOS]
PLACES += [(name, "reflink", "xfs") for name, scenario in SCENARIOS.items() if scenario.reflinks]

# Those that leave something to be put in order.
UNTIDY = ["share two new files", "heal a rotten blob", "copy a plain file", "edit", "open with O_TRUNC", "first start"]

NOBODY = 65534


@pytest.mark.parametrize("when", ["before", "after"])
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
