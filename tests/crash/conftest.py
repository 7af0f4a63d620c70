"""Fixtures of the crash tests."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.support.crashing import Crasher
from tests.support.filesystems import Filesystem, FilesystemPool, Unsupported, loop_filesystem, remove_tree, run

from .stage import MakeStage, Stage


@pytest.fixture(scope="session")
def crasher() -> Iterator[Crasher]:
    with Crasher() as crasher:
        yield crasher


@pytest.fixture(scope="session")
def hasty_ext4(filesystem_pool: FilesystemPool) -> Iterator[Filesystem]:
    """An ext4 whose fsync does not wait for the disk below: no kill of a process shows the difference."""
    with ExitStack() as stack:
        try:
            filesystem = stack.enter_context(loop_filesystem("ext4", filesystem_pool.directory))
            run("mount", "-o", "remount,barrier=0", filesystem.root)
        except Unsupported:
            try:
                filesystem = filesystem_pool.get("ext4")
            except Unsupported as problem:
                pytest.skip(str(problem))
        yield filesystem


@pytest.fixture
def stage(
    request: pytest.FixtureRequest, crasher: Crasher, filesystem_pool: FilesystemPool, hasty_ext4: Filesystem
) -> Iterator[MakeStage]:
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
            filesystem = hasty_ext4 if kind == "ext4" else filesystem_pool.get(kind)
        except Unsupported as problem:
            pytest.skip(str(problem))
        directories.append(filesystem.directory(request.node.name))
        return Stage(crasher, directories[-1], scenario, strategy, user=user, ordered=ordered)

    yield make
    for directory in directories:
        remove_tree(directory)
