"""Fixtures that all tests share; what they are made of is in tests/support/."""

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.support import photos
from tests.support.filesystems import Filesystem, FilesystemPool, Unsupported, remove_tree
from tests.support.flavours import FLAVOURS
from tests.support.mounted import Mounted

pytest_plugins = ["tests.support.policy"]

# A mount under load takes its time, and a blob of choices replays a failure elsewhere.
hypothesis.settings.register_profile(
    "dedupfs",
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("dedupfs")

# A hung mount is ended this long before pytest's own time limit, which could only end the whole session.
_WATCHDOG_MARGIN_S = 30.0


# A shell that puts us into the background has SIGINT ignored, which the programs that we start would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    return f"dedupfs: {photos.real_count()} real photographs (scripts/photos)"


@pytest.fixture(scope="session")
def filesystem_pool() -> Iterator[FilesystemPool]:
    pool = FilesystemPool()
    yield pool
    pool.close()


def _get(pool: FilesystemPool, kind: str) -> Filesystem:
    try:
        return pool.get(kind)
    except Unsupported as problem:
        pytest.skip(str(problem))


@pytest.fixture(scope="session", params=["ext4", "xfs"])
def filesystem(request: pytest.FixtureRequest, filesystem_pool: FilesystemPool) -> Filesystem:
    """A real filesystem; `@pytest.mark.parametrize("filesystem", ["btrfs"], indirect=True)` asks for another."""
    return _get(filesystem_pool, request.param)


@pytest.fixture
def scratch(request: pytest.FixtureRequest, filesystem: Filesystem) -> Iterator[Path]:
    """An empty directory on `filesystem`, removed afterwards with whatever is in it, immutable files too."""
    directory = filesystem.directory(request.node.name)
    yield directory
    remove_tree(directory)


class Mounts:
    """Makes stores and mounts for one test, all of one strategy on one filesystem, and finishes them at its end."""

    def __init__(self, filesystem: Filesystem, strategy: str, label: str, watchdog_s: float) -> None:
        self.filesystem = filesystem
        self.strategy = strategy
        self.expected_log: list[str] = []
        self._directory = filesystem.directory(label)
        self._watchdog_s = watchdog_s
        self._numbers = itertools.count(1)
        self._made: list[Mounted] = []

    def new(
        self,
        *options: str,
        over_itself: bool = False,
        prepare: Callable[[Path], object] | None = None,
        user: int | None = None,
    ) -> Mounted:
        """A store that is not mounted yet. `prepare` fills the source directory before anything else happens."""
        number = next(self._numbers)
        source = self._directory / f"source-{number}"
        source.mkdir()
        if prepare is not None:
            prepare(source)
        if not any(option.startswith("share=") for option in options):
            options = (f"share={self.strategy}", *options)
        # Both ways of serving pass the same tests: CI runs them once with each.
        wanted = os.environ.get("DEDUPFS_TEST_PASSTHROUGH")
        if wanted and user is None and not any(option.startswith("passthrough=") for option in options):
            options = (f"passthrough={wanted}", *options)
        mounted = Mounted(
            source,
            source if over_itself else self._directory / f"mount-{number}",
            options=options,
            expected_log=self.expected_log,
            watchdog_s=self._watchdog_s,
            user=user,
        )
        self._made.append(mounted)
        return mounted

    def directory(self, name: str) -> Path:
        """An empty directory on the same filesystem, that dedupfs has nothing to do with."""
        path = self._directory / name
        path.mkdir()
        return path

    def finish(self) -> None:
        problems = []
        for mounted in reversed(self._made):
            try:
                mounted.finish()
            except AssertionError as problem:
                problems.append(str(problem))
        remove_tree(self._directory)
        assert not problems, "\n".join(problems)


@pytest.fixture(params=FLAVOURS, ids=["-".join(flavour) for flavour in FLAVOURS])
def mounts(request: pytest.FixtureRequest, filesystem_pool: FilesystemPool) -> Iterator[Mounts]:
    """Stores that the test mounts itself, for each sharing strategy."""
    strategy, kind = request.param
    limit = request.node.get_closest_marker("timeout")
    limit_s = float(limit.args[0] if limit and limit.args else request.config.getini("timeout"))
    factory = Mounts(
        _get(filesystem_pool, kind),
        strategy,
        request.node.name,
        max(limit_s - _WATCHDOG_MARGIN_S, limit_s / 2),
    )
    for marker in request.node.iter_markers("expected_log"):
        factory.expected_log += marker.args
    yield factory
    factory.finish()


@pytest.fixture
def mounted(request: pytest.FixtureRequest, mounts: Mounts) -> Mounted:
    """An empty store, mounted, for each sharing strategy. `mount_options` adds options."""
    options = [option for marker in request.node.iter_markers("mount_options") for option in marker.args]
    return mounts.new(*options).start()
