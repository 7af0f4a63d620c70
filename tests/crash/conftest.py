"""Fixtures of the crash tests."""

from collections.abc import Iterator

import pytest

from tests.support.crashing import Crasher


@pytest.fixture(scope="session")
def crasher() -> Iterator[Crasher]:
    with Crasher() as crasher:
        yield crasher
