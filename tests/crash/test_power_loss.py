"""Power is lost while several apps work on a mount: nothing that was fsynced is missing or wrong.

`DEDUPFS_ROUNDS` losses for each way, filesystem and strategy; scripts/power-loss asks for hundreds. Files that were not
fsynced may be old, short or absent, as on any filesystem, but never hold what does not belong there, and a reference
always is to a whole content. DEDUPFS_SEED repeats the choices; the instants of course differ.
"""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.filesystems import FilesystemPool, Unsupported

from .power import Bench

ROUNDS = int(os.environ.get("DEDUPFS_ROUNDS", "2"))
_MOST_LOSSES = 12  # of one filesystem, before a new one is made

CASES = [
    ("shutdown", "ext4", "reference"),
    ("shutdown", "xfs", "reference"),
    ("shutdown", "xfs", "reflink"),
    ("snapshot", "ext4", "reference"),
    ("snapshot", "xfs", "reference"),
    ("snapshot", "btrfs", "reference"),
    ("cut", "ext4", "reference"),
    ("cut", "xfs", "reference"),
    ("cut", "xfs", "reflink"),
    ("cut", "btrfs", "reference"),
    ("cut", "btrfs", "reflink"),
]


@pytest.fixture
def xfs_directory(request: pytest.FixtureRequest, filesystem_pool: FilesystemPool) -> Iterator[Path]:
    try:
        yield filesystem_pool.get("xfs").directory(request.node.name)
    except Unsupported as problem:
        pytest.skip(str(problem))


@pytest.mark.timeout(120 + 15 * ROUNDS)
@pytest.mark.parametrize(
    ("way", "kind", "strategy"),
    [pytest.param(*case, id="-".join(case)) for case in CASES],
)
def test_power_loss(
    way: str, kind: str, strategy: str, xfs_directory: Path, tmp_path: Path, rng: random.Random
) -> None:
    bench = Bench(xfs_directory / "bench", way, kind, strategy)
    runs = 0
    while bench.losses < ROUNDS:
        runs += 1
        ledgers = tmp_path / f"{runs}"
        ledgers.mkdir()
        bench.run(min(_MOST_LOSSES, ROUNDS - bench.losses), ledgers, rng)
    print(f"{bench.losses} losses, {bench.calls} calls, {bench.certain} certain files, {bench.references} references")
    assert bench.certain > 3 * ROUNDS, "hardly anything was promised"
