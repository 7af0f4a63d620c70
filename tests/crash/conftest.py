"""Fixtures of the crash tests."""

from collections.abc import Iterator

import pytest

from tests.support.crashing import Crasher
from tests.support.filesystems import FilesystemPool, Unsupported, remove_tree

from .stage import MakeStage, Stage


@pytest.fixture(scope="session")
def crasher() -> Iterator[Crasher]:
    with Crasher() as crasher:
        yield crasher


@pytest.fixture
def stage(request: pytest.FixtureRequest, crasher: Crasher, filesystem_pool: FilesystemPool) -> Iterator[MakeStage]:
    """Makes stages; what was played on them is removed afterwards."""
    directories = []

    def make(
        scenario: str,
        strategy: str = "reference",
        kind: str = "ext4",
        *,
        user: int | None = None,
        ordered: bool = True,
    ) -> Stage:
        try:
            filesystem = filesystem_pool.get(kind)
        except Unsupported as problem:
            pytest.skip(str(problem))
        directories.append(filesystem.directory(request.node.name))
        return Stage(crasher, directories[-1], scenario, strategy, user=user, ordered=ordered)

    yield make
    for directory in directories:
        remove_tree(directory)
