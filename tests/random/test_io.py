"""Several processes do random I/O to files that are shared and taken apart all the while; no byte is ever wrong.

What each does is in `exerciser`. DEDUPFS_RANDOM=10 runs ten times as long, DEDUPFS_SEED lets each do the same again.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash

from tests.support.mounted import REPOSITORY, Mounted

LENGTH = float(os.environ.get("DEDUPFS_RANDOM", "1"))
PROCESSES = 4
SECONDS = 10 * LENGTH


@pytest.mark.timeout(300 + SECONDS)
def test_every_byte_is_what_was_written(mounted: Mounted, rng: random.Random) -> None:
    running = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.random.exerciser",
                mounted.mountpoint,
                f"file-{number}",
                str(rng.getrandbits(64)),
                str(SECONDS),
            ],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(PROCESSES)
    ]
    problems: list[str] = []
    expected: dict[Path, str] = {}
    steps = 0
    for process in running:
        stdout, stderr = process.communicate(timeout=SECONDS + 120)
        if process.returncode != 0:
            problems.append(stderr)
        else:
            answer = json.loads(stdout)
            steps += answer["steps"]
            expected |= {Path(path): digest for path, digest in answer["digests"].items()}
    assert not problems, "\n".join(problems)
    print(f"{steps} operations")

    def check() -> None:
        found = {path: xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in mounted.mountpoint.iterdir()}
        assert found == expected

    mounted.settle()
    check()
    mounted.restart()
    check()
