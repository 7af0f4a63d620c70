"""SIGKILL before and after every step of sharing, materialising, healing, copying, restoring, removing and starting.

The steps are those that a run of the scenario takes, recorded, not listed here. After each kill the store is started
again, must be as the ledger says at once, and must put itself in order; fsck finds nothing.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.crashing import Crasher
from tests.support.filesystems import FilesystemPool, remove_tree

from .scenarios import SCENARIOS

PLAY = "tests.crash.scenarios:play"
RECOVER = "tests.crash.scenarios:recover"

# Everything on ext4; what differs there, also where extents can be shared.
PLACES = [(name, "reference", "ext4") for name in SCENARIOS]
PLACES += [(name, "reflink", "xfs") for name, scenario in SCENARIOS.items() if scenario.reflinks]


class Stage:
    """One place where scenarios are played, each in a directory of its own."""

    def __init__(self, crasher: Crasher, directory: Path, scenario: str, strategy: str) -> None:
        self._crasher, self._directory = crasher, directory
        self._arguments = {"scenario": scenario, "options": f"share={strategy}"}
        self._numbers = itertools.count()
        self.source, self.ledger = directory, directory

    def play(self, *, kill: str | None = None) -> list[str]:
        """Play in a new directory, and answer the steps that came. It ends well, or is killed where it should be."""
        place = self._directory / str(next(self._numbers))
        place.mkdir()
        self.source, self.ledger = place / "source", place / "ledger"
        self.source.mkdir()
        outcome = self._crasher.run(PLAY, kill=kill, **self._where())
        if kill is None:
            assert outcome.check()["problems"] == []
            assert outcome.result["errors"] == []
        else:
            assert outcome.killed, f"was not killed {kill}, having come through {outcome.steps}: {outcome.error}"
        return outcome.steps

    def recover(self, *, kill: str | None = None, repair: bool = False) -> list[str]:
        """Start again. Answers what is wrong."""
        outcome = self._crasher.run(RECOVER, kill=kill, repair=repair, **self._where())
        if kill is not None and outcome.killed:
            return []
        problems = list(outcome.result or [])
        return [*problems, *outcome.error.splitlines()[-3:]] if outcome.error else problems

    def recovery_steps(self) -> list[str]:
        outcome = self._crasher.run(RECOVER, **self._where())
        assert outcome.check() == []
        return outcome.steps

    def _where(self) -> dict[str, Any]:
        return {**self._arguments, "source": str(self.source), "ledger": str(self.ledger)}


@pytest.fixture
def stage(
    request: pytest.FixtureRequest, crasher: Crasher, filesystem_pool: FilesystemPool
) -> Iterator[Callable[[str, str, str], Stage]]:
    directories = []

    def make(scenario: str, strategy: str, kind: str) -> Stage:
        directories.append(filesystem_pool.get(kind).directory(request.node.name))
        return Stage(crasher, directories[-1], scenario, strategy)

    yield make
    for directory in directories:
        remove_tree(directory)


def _report(found: dict[str, list[str]], steps: list[str]) -> str:
    lines = [f"{len(found)} of {len(steps)} steps lose something:"]
    for kill, problems in found.items():
        lines += [f"  {kill}", *(f"    {problem}" for problem in problems)]
    return "\n".join(lines).encode(errors="backslashreplace").decode()  # names that are no text are no text for pytest


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("scenario", "strategy", "kind"), PLACES, ids=[" ".join(place) for place in PLACES])
def test_killed_at_every_step(
    stage: Callable[[str, str, str], Stage], scenario: str, strategy: str, kind: str, when: str
) -> None:
    here = stage(scenario, strategy, kind)
    steps = here.play()
    assert steps, "nothing that could be broken"
    found = {}
    for step in steps:
        here.play(kill=f"{when}:{step}")
        if problems := here.recover():
            found[f"{when} {step}"] = problems
    assert not found, _report(found, steps)
