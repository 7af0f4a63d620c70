"""Whatever lies in the files of a store that are text: it is understood, or refused in one line."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dedupfs.backing import Backing
from dedupfs.decisions import PIN, Decisions
from dedupfs.errors import DedupfsError
from dedupfs.model import ContentKey, Digest
from dedupfs.rules import SharingRules
from dedupfs.store import Store, read_daemon
from tests.support.fuzz import examples

CONTENT = ContentKey(Digest(bytes(16)))
RULES = SharingRules(8192, (b"*.jpg",), (b"drafts/", b"caf\xe9"))

# What each file holds when all is well, by the names of its keys, some of which are to be other things.
WORDS = ["version", "uuid", "references", "include", "exclude", "min_size_bytes", "pid", "mountpoint", "socket"]
WORDS += ["at", "who", "action", "contents", "paths", "text", "before", "pin", "trusted", "0" * 32 + ".0"]
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(WORDS)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=9)
)
texts = (
    st.binary(max_size=60)
    | st.builds(lambda value: json.dumps(value).encode(), values)
    | st.sampled_from([b"[" * 2000, b'{"version": Infinity}', b'{"version": 1e999}', b"9" * 5000])
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Backing]]:
    top = tmp_path_factory.mktemp("store")
    backing = Backing(str(top))
    with Store(backing) as made:
        made.keep_rules(RULES)
    yield top / ".dedupfs", backing
    backing.close()


@contextmanager
def refused_in_a_line() -> Iterator[None]:
    try:
        yield
    except DedupfsError as refusal:
        reason = str(refusal)
    else:
        return
    assert reason
    assert "\n" not in reason


def lying_about(good: bytes) -> st.SearchStrategy[bytes]:
    """Any text, and the right one with something else in the place of a few bytes."""
    damaged = st.builds(
        lambda at, length, other: good[:at] + other + good[at + length :],
        st.integers(0, len(good)),
        st.integers(0, 8),
        st.binary(max_size=8),
    )
    return texts | damaged


@contextmanager
def tampered_with(path: Path, data: st.DataObject) -> Iterator[None]:
    """Inside, the file holds something else than it should."""
    good = path.read_bytes()
    path.write_bytes(data.draw(lying_about(good)))
    try:
        yield
    finally:
        path.write_bytes(good)


@examples()
@given(data=st.data())
def test_format(store: tuple[Path, Backing], data: st.DataObject) -> None:
    directory, backing = store
    with tampered_with(directory / "format", data), refused_in_a_line():
        Store(backing).close()


@examples()
@given(data=st.data())
def test_rules(store: tuple[Path, Backing], data: st.DataObject) -> None:
    directory, backing = store
    with Store(backing) as opened, tampered_with(directory / "sharing.json", data), refused_in_a_line():
        opened.read_rules().allow(b"a/b.jpg", 10_000)


@examples()
@given(raw=texts)
def test_announcement(store: tuple[Path, Backing], raw: bytes) -> None:
    directory, backing = store
    (directory / "daemon.json").write_bytes(raw)
    read_daemon(backing)


def _entry(**changed: Any) -> bytes:
    entry = {"at": "2026-01-01T00:00:00Z", "who": "me", "action": PIN, "contents": [CONTENT.name], "paths": ["a"]}
    return json.dumps({**entry, "text": "", "before": "", **changed}).encode()


@examples()
@given(lines=st.lists(lying_about(_entry()), max_size=4))
@example(lines=[_entry(paths=7)])
@example(lines=[_entry(contents={CONTENT.name: 1})])
def test_decisions(store: tuple[Path, Backing], lines: list[bytes]) -> None:
    """A line that cannot be read has no effect, and keeps none of the others from having theirs."""
    directory, backing = store
    other = ContentKey(Digest(b"x" * 16))
    (directory / "decisions.jsonl").write_bytes(b"\n".join([*lines, _entry(contents=[other.name])]) + b"\n")
    decisions = Decisions(backing)
    assert decisions.is_pinned(other)
    for entry in decisions.history([CONTENT, other]):
        assert all(isinstance(entry[key], str) for key in ("at", "who", "action", "text", "before"))
        assert all(isinstance(path, str) for path in entry["paths"])
