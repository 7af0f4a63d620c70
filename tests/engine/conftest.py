"""The bench that every test of the engine works at."""

from collections.abc import Iterator

import pytest

from dedupfs.config import Share
from tests.support.filesystems import FilesystemPool, Unsupported, remove_tree

from .bench import Bench


@pytest.fixture
def bench(request: pytest.FixtureRequest, filesystem_pool: FilesystemPool) -> Iterator[Bench]:
    """A source, and an engine for it: references on ext4, unless parametrised with (strategy, filesystem)."""
    strategy, kind = getattr(request, "param", ("reference", "ext4"))
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
