"""Where scenarios are played: each time in a directory of its own, in a process that may die."""

import itertools
import os
from pathlib import Path
from typing import Protocol

from tests.support.crashing import Crasher, Outcome

PLAY = "tests.crash.scenarios:play"
RECOVER = "tests.crash.scenarios:recover"


class Stage:
    """One place where one scenario is played, over and over."""

    def __init__(
        self, crasher: Crasher, directory: Path, scenario: str, strategy: str, *, user: int | None, ordered: bool
    ) -> None:
        self._crasher, self._directory, self._user = crasher, directory, user
        self._arguments = {"scenario": scenario, "options": f"share={strategy}", "ordered": ordered}
        self._numbers = itertools.count()
        self._place = directory

    def _arguments_here(self) -> dict[str, object]:
        return {**self._arguments, "source": str(self._place / "source"), "ledger": str(self._place / "ledger")}

    def play(self, *, kill: str | None = None, fail: str | None = None) -> Outcome:
        """Play in a new directory, and be killed where that was asked for; the rest is the caller's to judge."""
        self._place = self._directory / str(next(self._numbers))
        for path in (self._place, self._place / "source"):
            path.mkdir()
            if self._user is not None:
                os.chown(path, self._user, self._user)
        outcome = self._crasher.run(PLAY, self._arguments_here(), kill=kill, fail=fail, user=self._user)
        if kill is not None:
            assert outcome.killed, f"was not killed {kill}, having come through {outcome.steps}: {outcome.error}"
        return outcome

    def steps(self) -> list[str]:
        """Those that come when nothing goes wrong."""
        outcome = self.play()
        result = outcome.check()
        assert result["problems"] == []
        assert result["errors"] == []
        assert outcome.steps, "nothing that could be broken"
        return outcome.steps

    def recover(self, *, kill: str | None = None, repair: bool = False) -> Outcome:
        """Start again what was killed. The result is what is wrong."""
        arguments = {**self._arguments_here(), "repair": repair}
        return self._crasher.run(RECOVER, arguments, kill=kill, user=self._user)

    def problems_after(self, kill: str, *, repair: bool = False) -> list[str]:
        """Play, be killed, start again: what is wrong then."""
        self.play(kill=kill)
        outcome = self.recover(repair=repair)
        return [*(outcome.result or []), *outcome.error.splitlines()[-3:]]


class MakeStage(Protocol):
    def __call__(
        self,
        scenario: str,
        strategy: str = "reference",
        kind: str = "ext4",
        *,
        user: int | None = None,
        ordered: bool = True,
    ) -> Stage:
        """`ordered` False: as on a filesystem that does not keep the order of metadata changes."""


def report(found: dict[str, list[str]], steps: list[str]) -> str:
    lines = [f"at {len(found)} of {len(steps)} steps:"]
    for kill, problems in found.items():
        lines += [f"  {kill}", *(f"    {problem}" for problem in problems)]
    return "\n".join(lines).encode(errors="backslashreplace").decode()  # names that are no text are no text for pytest
