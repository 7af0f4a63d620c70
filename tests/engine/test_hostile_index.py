"""An index in which one record is not what was written: no program that uses the mount is told wrong bytes for it, no
content goes that a file needs, and making it anew gives the right answers again."""

import errno
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path

import lmdb
import pytest

from dedupfs.engine import rebuild
from dedupfs.errors import DedupfsError
from dedupfs.model import FileState
from tests.support.fuzz import FACTOR

from .bench import BLOCK, Bench, content, silent

NAMES = ("one", "a/two", "a/deep/three", "b/four", "b/five", "b/six")
DATA = {name: content(("same", "other", "unique")[number % 3], 3 * BLOCK + 3) for number, name in enumerate(NAMES)}
TABLES = ("meta", "files", "links", "dirs", "holders", "sharers", "images", "backlog", "queue", "verified")
ATTRIBUTES = ("digest", "state", "refs", "duplicates")


def damage(index: Path, rng: random.Random) -> str:
    """Change, cut, lengthen, remove or add one record. Answers what was done."""
    with lmdb.open(str(index), max_dbs=32) as env, env.begin(write=True) as txn:
        table = rng.choice(TABLES)
        # The flags of a table are the file's own.
        db = env.open_db(table.encode(), txn=txn, create=False)
        with txn.cursor(db) as cursor:
            records = list(cursor)
            if not records:
                return f"{table} is empty"
            key, value = rng.choice(records)
            deed = rng.choice(("change", "change", "change", "cut", "lengthen", "remove", "add", "garbage"))
            changed = bytearray(value)
            match deed:
                case "change" if value:
                    changed[rng.randrange(len(value))] ^= 1 << rng.randrange(8)
                case "cut":
                    changed = changed[: rng.randrange(len(value))] if value else changed
                case "lengthen":
                    changed += rng.randbytes(rng.randint(1, 9))
                case "add":
                    key = bytes([*key[:-1], key[-1] ^ 1])
                case "garbage":
                    changed = bytearray(rng.randbytes(len(value)))
            with suppress(lmdb.BadValsizeError):
                if deed != "add":
                    txn.delete(key, value, db=db)
                if deed != "remove":
                    txn.put(key, bytes(changed), db=db)
        return f"{deed} {table} {key.hex()}: {value.hex()} -> {bytes(changed).hex()}"


def use(bench: Bench, gone: str) -> None:
    """What people do; where it fails, it says so in one line."""
    engine = bench.engine
    with suppress(DedupfsError):
        engine.status()
    with suppress(DedupfsError):
        engine.duplicates(None)
    with suppress(DedupfsError):
        bench.settle()
    for name in NAMES:
        for attribute in ATTRIBUTES:
            try:
                bench.xattr(name, attribute)
            except OSError as error:
                assert error.errno in (errno.ENODATA, errno.EIO, errno.EAGAIN), (name, attribute, error)  # noqa: PT017
            except DedupfsError:
                pass
    bench.unlink(gone)
    with suppress(DedupfsError):
        bench.settle()
    with suppress(DedupfsError):
        bench.scan()


@pytest.mark.parametrize(
    ("table", "number"),
    [("sharers", 0), ("holders", 0), ("files", 0), ("files", 1)],
    ids=["no sharer", "no holder", "no record", "another state"],
)
def test_one_lost_record_does_not_lose_the_content(bench: Bench, table: str, number: int) -> None:
    """Of two references, which are all there are, the index forgets one in one place; the other one is removed."""
    bench.write("one", DATA["one"])
    bench.write("two", DATA["one"])
    bench.settle()
    bench.close()
    ino = bench.below("one").stat().st_ino.to_bytes(8, "big")
    with lmdb.open(str(bench.source / ".dedupfs/index"), max_dbs=32) as env, env.begin(write=True) as txn:
        db = env.open_db(table.encode(), txn=txn, create=False)
        if table != "files":
            (key,) = [key for key, value in txn.cursor(db) if value == ino]
            assert txn.delete(key, ino, db=db)
        elif number:
            record = bytearray(txn.get(ino, db=db) or b"")
            assert record[1] == FileState.REFERENCE
            record[1] = FileState.SHARED
            txn.put(ino, bytes(record), db=db)
        else:
            assert txn.delete(ino, db=db)
    bench.open()
    assert bench.engine.settler.index_is_complete
    bench.unlink("two")
    bench.settle()
    assert bench.read("one") == DATA["one"]
    bench.close()
    shutil.rmtree(bench.source / ".dedupfs/index")
    rebuild(str(bench.source), silent)
    bench.open()
    assert bench.read("one") == DATA["one"]


@pytest.mark.parametrize("number", range(60 * FACTOR))
def test_one_record_is_wrong(bench: Bench, number: int) -> None:
    rng = random.Random(number)
    for directory in ("a", "a/deep", "b"):
        bench.mkdir(directory)
    for name, data in DATA.items():
        bench.write(name, data)
    bench.settle()
    bench.close()
    done = damage(bench.source / ".dedupfs/index", rng)
    gone = rng.choice(NAMES)
    try:
        bench.open()
    except DedupfsError:
        pass  # refused: that is an answer, too
    else:
        use(bench, gone)
        for name in NAMES:
            if name != gone:
                assert bench.read(name) == DATA[name], done
        with suppress(DedupfsError):
            bench.close()
    bench.expect_log(".*")
    shutil.rmtree(bench.source / ".dedupfs/index", ignore_errors=True)
    rebuild(str(bench.source), silent)
    bench.open()
    for name in NAMES:
        if os.path.lexists(bench.below(name)):
            assert bench.read(name) == DATA[name], done
            others = [other for other in NAMES if DATA[other] == DATA[name] and os.path.lexists(bench.below(other))]
            assert bench.duplicates(name) == sorted(set(others) - {name}), done
