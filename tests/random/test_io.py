"""Random I/O by many at once to files that are shared and taken apart all the while; no byte is ever wrong.

DEDUPFS_RANDOM=10 runs ten times as long, DEDUPFS_SEED lets each process and thread do the same again.
"""

import json
import mmap
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import xxhash

from tests.random.exerciser import common_contents
from tests.support.mounted import REPOSITORY, Mounted

LENGTH = float(os.environ.get("DEDUPFS_RANDOM", "1"))
PROCESSES = 4
SECONDS = 8 * LENGTH

WRITERS = 4
BLOCK_BYTES = 4096


@pytest.mark.timeout(300 + SECONDS)
def test_every_byte_is_what_was_written(mounted: Mounted, rng: random.Random) -> None:
    """Processes with a file each, whose contents become the same now and then; see `exerciser`."""
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
    for process in running:
        stdout, stderr = process.communicate(timeout=SECONDS + 120)
        if process.returncode != 0:
            problems.append(stderr)
        else:
            answer = json.loads(stdout)
            print(f"{answer['steps']} operations")
            expected |= {Path(path): digest for path, digest in answer["digests"].items()}
    assert not problems, "\n".join(problems)

    def check() -> None:
        found = {path: xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in mounted.mountpoint.iterdir()}
        assert found == expected

    mounted.settle()
    check()
    mounted.restart()
    check()


@pytest.mark.timeout(300 + SECONDS)
def test_several_writers_of_one_file(mounted: Mounted, rng: random.Random) -> None:
    """Threads that write to blocks of their own in a file that is shared when the first of them opens it. Others read
    its duplicate meanwhile, which stays as it is."""
    original, path = mounted.path("original"), mounted.path("file")
    content = rng.choice(common_contents()[:2])
    original.write_bytes(content)
    finished = threading.Event()
    deadline = time.monotonic() + SECONDS

    def read(rng: random.Random) -> None:
        while not finished.is_set():
            with open(original, "rb") as file:
                for _ in range(20):
                    offset = rng.randrange(len(content))
                    assert os.pread(file.fileno(), 10_000, offset) == content[offset : offset + 10_000]
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    with ThreadPoolExecutor(WRITERS + 2) as pool:
        readers = [pool.submit(read, random.Random(rng.random())) for _ in range(2)]
        try:
            rounds = 0
            while time.monotonic() < deadline:
                rounds += 1
                _copy(rng, original, path)
                if rng.random() < 0.7:
                    os.getxattr(path, "user.dedupfs.state")  # settled, so shared
                writers = [
                    pool.submit(_write_blocks, path, content, number, random.Random(rng.random()))
                    for number in range(WRITERS)
                ]
                expected = bytearray(content)
                for writer in writers:
                    for block, data in writer.result().items():
                        expected[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = data
                assert path.read_bytes() == expected, f"round {rounds}"
                assert original.read_bytes() == content, f"round {rounds}"
        finally:
            finished.set()
        for reader in readers:
            reader.result()
    print(f"{rounds} rounds")
    mounted.settle()
    mounted.restart()
    assert path.read_bytes() == expected
    assert original.read_bytes() == content


def _copy(rng: random.Random, source: Path, target: Path) -> None:
    """In one of the ways in which a file comes to have another's content."""
    match rng.randrange(4):
        case 0:
            shutil.copyfile(source, target)
        case 1:
            with open(source, "rb") as reader, open(target, "wb") as writer:
                while os.copy_file_range(reader.fileno(), writer.fileno(), 1 << 30):
                    pass
        case 2:
            target.write_bytes(source.read_bytes())
        case 3:
            new = target.with_name("new")
            new.write_bytes(source.read_bytes())
            new.rename(target)


def _write_blocks(path: Path, content: bytes, number: int, rng: random.Random) -> dict[int, bytes]:
    """Answers what is now in the blocks that are this writer's alone."""
    own = {
        block: content[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        for block in range(number, len(content) // BLOCK_BYTES, WRITERS)
    }
    for _ in range(rng.randrange(1, 4)):
        with open(path, "r+b", buffering=0) as file:
            for _ in range(rng.randrange(20)):
                block = rng.choice(list(own))
                start, end = sorted(rng.choices(range(BLOCK_BYTES + 1), k=2))
                data = rng.randbytes(end - start)
                match rng.randrange(4):
                    case 0:
                        found = os.pread(file.fileno(), BLOCK_BYTES, block * BLOCK_BYTES)
                        assert found == own[block], f"writer {number} reads something else in block {block}"
                        continue
                    case 1:
                        with mmap.mmap(file.fileno(), len(content)) as mapping:
                            mapping[block * BLOCK_BYTES + start : block * BLOCK_BYTES + end] = data
                    case _:
                        assert os.pwrite(file.fileno(), data, block * BLOCK_BYTES + start) == len(data)
                own[block] = own[block][:start] + data + own[block][end:]
    return own
