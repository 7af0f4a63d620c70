"""Which files share: what a glob fits, and what is too small."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedupfs.rules import EVERYTHING, NOTHING, SharingRules, is_glob

ENOUGH = 4096


@pytest.mark.parametrize(
    ("glob", "fits", "fits_not"),
    [
        (b"*.tmp", [b"a.tmp", b"deep/down/a.tmp", b"x.tmp/in it"], [b"a.tmpx", b"atmp", b"tmp"]),
        (b"drafts/", [b"drafts/a", b"deep/drafts/b/c"], [b"draftsman/a", b"mydrafts/a"]),
        (b"/drafts", [b"drafts/a", b"drafts"], [b"deep/drafts/b"]),
        (b"permits/2024", [b"permits/2024/a"], [b"old/permits/2024/a", b"permits/2024a"]),
        (b"permits/*/a", [b"permits/x/a"], [b"permits/a", b"permits/x/y/a"]),
        (b"permits/**/a", [b"permits/a", b"permits/x/a", b"permits/x/y/a"], [b"a", b"permitsa"]),
        (b"a**", [b"abc", b"x/abc"], [b"bac"]),
        (b"**", [b"a", b"a/b"], []),
        (b"?.jpg", [b"1.jpg", b"x/2.jpg", b"\xff.jpg", b"\n.jpg"], [b"12.jpg", b".jpg"]),
        (b"[ab]x", [b"ax", b"bx"], [b"cx", b"x"]),
        (b"[!ab]x", [b"cx"], [b"ax", b"a/x"]),
        (b"[]-]x", [b"]x", b"-x"], [b"ax"]),
        (b"[x", [b"[x"], [b"x"]),
        (b"a+(b).c", [b"a+(b).c"], [b"aab.c", b"a+(b)xc"]),
        ("café*".encode(), ["café.jpg".encode()], [b"cafe.jpg"]),
    ],
)
def test_globs(glob: bytes, fits: list[bytes], fits_not: list[bytes]) -> None:
    excluding, including = SharingRules(exclude=(glob,)), SharingRules(include=(glob,))
    for path in fits:
        assert not excluding.allow(path, ENOUGH), path
        assert including.allow(path, ENOUGH), path
    for path in fits_not:
        assert excluding.allow(path, ENOUGH), path
        assert not including.allow(path, ENOUGH), path


def test_exclude_wins() -> None:
    rules = SharingRules(include=(b"permits/", b"photos/"), exclude=(b"*.tmp",))
    assert rules.allow(b"permits/a", ENOUGH)
    assert not rules.allow(b"permits/a.tmp", ENOUGH)
    assert not rules.allow(b"other/a", ENOUGH)


def test_sizes() -> None:
    assert EVERYTHING.allow(b"a", 4096)
    assert not EVERYTHING.allow(b"a", 4095)
    assert not SharingRules(min_size_bytes=10_000).allow(b"a", 9_999)
    assert SharingRules(min_size_bytes=1).allow(b"a", 4096)


@pytest.mark.parametrize(
    ("globs", "domains"),
    [
        ([], {b"a/b": b"", b"a": b""}),
        ([b"police/"], {b"police/a": b"police", b"x/police/y/a": b"x/police", b"police": b"", b"policemen/a": b""}),
        ([b"/police"], {b"police/a/b": b"police", b"x/police/a": b""}),
        ([b"*"], {b"a/b/c": b"a", b"b": b"", b"\xff\n/x": b"\xff\n"}),
        ([b"agencies/*"], {b"agencies/a/b": b"agencies/a", b"agencies/a/b/c": b"agencies/a", b"agencies/x": b""}),
        ([b"agencies/*", b"agencies/a/secret", b"a"], {b"agencies/a/secret/x": b"agencies/a/secret"}),
        ([b"**"], {b"a/b/c": b"a"}),
    ],
)
def test_domains(globs: list[bytes], domains: dict[bytes, bytes]) -> None:
    for order in (globs, globs[::-1]):
        rules = SharingRules(domains=tuple(order))
        assert {path: rules.domain_of(path) for path in domains} == domains


@given(st.lists(st.text(max_size=10), max_size=3), st.binary(max_size=30))
def test_a_domain_is_a_directory_on_the_way(globs: list[str], path: bytes) -> None:
    usable = tuple(glob.encode(errors="surrogateescape") for glob in globs if is_glob(glob))
    found = SharingRules(domains=usable).domain_of(path)
    assert found == b"" or path.startswith(found + b"/")


@given(st.binary(min_size=1, max_size=40))
def test_nothing_is_nothing(path: bytes) -> None:
    assert not NOTHING.allow(path, 1 << 30)


@given(st.text(max_size=20), st.binary(max_size=30))
def test_any_glob_is_one_or_refused(glob: str, path: bytes) -> None:
    if is_glob(glob):
        SharingRules(exclude=(glob.encode(errors="surrogateescape"),)).allow(path, ENOUGH)
