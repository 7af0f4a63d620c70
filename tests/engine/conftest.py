"""The bench that every test of the engine works at.

DEDUPFS_TEST_FILESYSTEM=btrfs (or xfs) puts it on another filesystem where a test does not ask for one.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dedupfs.config import Share
from tests.support.filesystems import FilesystemPool, Unsupported, remove_tree

from .bench import Bench

_FILESYSTEM = os.environ.get("DEDUPFS_TEST_FILESYSTEM", "ext4")


@pytest.fixture
def bench(request: pytest.FixtureRequest, filesystem_pool: FilesystemPool) -> Iterator[Bench]:
    """A source, and an engine for it: references on ext4, unless parametrised with (strategy, filesystem)."""
    strategy, kind = getattr(request, "param", ("reference", _FILESYSTEM))
    try:
        filesystem = filesystem_pool.get(kind)
    except Unsupported as problem:
        pytest.skip(str(problem))
    source = filesystem.directory(request.node.name)
    made = Bench(source, Share(strategy))
    made.open()
    made.scan()  # of nothing, so that the index is complete from the start
    yield made
    try:
        made.finish()
    finally:
        remove_tree(source)


@pytest.fixture
def beside(bench: Bench) -> Iterator[Path]:
    """A directory on the same filesystem, outside of the source."""
    path = bench.source.with_name(bench.source.name + " beside")
    path.mkdir()
    yield path
    remove_tree(path)
