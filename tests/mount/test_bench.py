"""The benchmark still runs, and its own comparisons of bytes hold."""

import json
from pathlib import Path

import pytest

from tests.support.mounted import REPOSITORY
from tests.support.tools import needs_root, tool

pytestmark = pytest.mark.either_way


@needs_root
def test_the_benchmark_in_small(tmp_path: Path) -> None:
    words = ("--photographs", "4", "--rounds", "1", "--only", "dedupfs", "--output", tmp_path / "bench")
    printed = tool(REPOSITORY / "scripts/bench", *words)
    assert b"| copy phone, until settled |" in printed
    rounds = json.loads((tmp_path / "bench.json").read_text())["rounds"]
    assert set(rounds) == {"native", "dedupfs"}
    assert rounds["native"][0]["written for duplicates, % of their bytes"] > 99
    assert rounds["dedupfs"][0]["written for duplicates, % of their bytes"] < 50
    assert (tmp_path / "bench.png").stat().st_size
