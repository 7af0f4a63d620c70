"""The table at the top of `errors` is true, and complete."""

import errno
import re

import pytest

from dedupfs import errors
from dedupfs.errors import DedupfsError

_LINE = re.compile(r"^ *[│├└─ ]*(?P<name>[A-Z]\w+) +(?P<exit>\d+) +(?P<errno>E[A-Z]+)\b", re.MULTILINE)


def table() -> dict[str, tuple[int, str]]:
    assert errors.__doc__ is not None
    return {found["name"]: (int(found["exit"]), found["errno"]) for found in _LINE.finditer(errors.__doc__)}


def defined() -> dict[str, type[DedupfsError]]:
    return {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, DedupfsError) and kind is not DedupfsError
    }


def test_every_class_is_in_the_table() -> None:
    assert set(table()) - {"DedupfsError"} == set(defined())
    assert len(defined()) >= 9


@pytest.mark.parametrize("name", sorted(defined()))
def test_exit_code_and_errno(name: str) -> None:
    exit_code, number = table()[name]
    kind = defined()[name]
    assert kind.exit_code == exit_code
    assert errno.errorcode[kind.errno] == number


def test_the_tree_is_as_drawn() -> None:
    """Depth by depth: who is drawn below whom is its subclass."""
    assert errors.__doc__ is not None
    above: list[type] = []
    for line in errors.__doc__.splitlines():
        found = re.match(r"^ *(?P<branch>[│├└─ ]*)(?P<name>[A-Z]\w+)( {2,}|$)", line)
        if found is None or not hasattr(errors, found["name"]):
            continue
        depth = len(found["branch"]) // 4
        kind = getattr(errors, found["name"])
        del above[depth:]
        if above:
            assert above[-1] in kind.__bases__
        above.append(kind)


def test_a_user_can_tell_them_apart() -> None:
    """Exit codes are those of sysexits.h, none of them one that fsck or a bug uses; a subclass shares its parent's."""
    codes = {kind.exit_code for kind in defined().values()}
    assert codes.isdisjoint({0, 1, 2, errors.EXIT_INTERNAL, errors.EXIT_OS_ERROR})
    assert all(64 <= code <= 78 for code in codes)
    direct = [kind.exit_code for kind in defined().values() if kind.__base__ is DedupfsError]
    assert len(direct) == len(set(direct))


def test_they_are_no_oserrors() -> None:
    """What the backing filesystem says stays what it is."""
    assert not any(issubclass(kind, OSError) for kind in defined().values())
