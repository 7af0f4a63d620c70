"""Numbers in names: found as the pattern says, in whatever names, in a time that no name and no pattern draws out."""

import pytest

from dedupfs.claims import NamePattern
from dedupfs.errors import UsageError


@pytest.mark.parametrize(
    ("pattern", "path", "number"),
    [
        (r"(?i)permit[-_ ]?(\d{4}-\d+)", b"a/PERMIT_2026-117.jpg", "2026-117"),
        (r"(?i)permit[-_ ]?(\d{4}-\d+)", b"permit-2026-117/scan.jpg", ""),
        (r"([A-Z]+\d+)", b"copy of AB12 and CD34.jpg", "ab12"),
        (r"nr(\d*)", b"nr.jpg", ""),
        (r"a|b(c)", b"a", ""),
        (r"(\d+)", b"\xff\xfe 17 \x80", "17"),
        (r"№(\d+)", "№17".encode(), "17"),
        (r"(.)", b"", ""),
    ],
)
def test_the_number_in_a_name(pattern: str, path: bytes, number: str) -> None:
    assert NamePattern(pattern).number_in(path) == number


@pytest.mark.parametrize(
    "pattern", ["(", "(a)(b)", "a", "", r"(a)\1", "(?<=a)(b)", "(a{2000})", "(\udc80)", "(" + "a" * 1000 + ")"]
)
def test_what_is_no_pattern(pattern: str) -> None:
    with pytest.raises(UsageError, match="name_pattern") as refused:
        NamePattern(pattern)
    assert "\n" not in str(refused.value)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("pattern", [r"^(a|a)*b", r"((?:a+)+)b", r"(?:(?:.*)*)*(x)", r"(\w+\d+\w+\d+\w+\d+)!"])
def test_no_name_takes_long(pattern: str) -> None:
    """With a matcher that goes back and tries again, some of these would take longer than the world is old."""
    assert NamePattern(pattern).number_in(b"a" * 255) == ""
    assert NamePattern(pattern).number_in(b"a1" * 127) == ""
